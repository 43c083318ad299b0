"""How good, how calibrated and how alike models are: pure functions of logits ``[N, C]`` and labels ``[N]``.

torchmetrics has accuracy and the calibration error, but importing it costs seconds in every process that evaluates, and
each is a few tensor lines; so they are written here, and the tests hold them to torchmetrics. Numbers come back as
Python floats, ready for a result file.
"""

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "Reliability",
    "accuracy",
    "agreement",
    "brier",
    "class_accuracy",
    "ece",
    "nll",
    "reliability",
    "reweighted_accuracy",
]


class Reliability(NamedTuple):
    """The bins of a reliability diagram, each ``[bins]`` in float64 on the CPU; NaN where a bin is empty."""

    confidence: Tensor
    accuracy: Tensor
    samples: Tensor


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of samples whose top class is the label, in [0, 1].

    >>> accuracy(torch.tensor([[2.0, 1.0], [0.0, 1.0]]), torch.tensor([0, 0]))
    0.5
    """
    _check(logits, labels)
    return float((logits.argmax(dim=-1) == labels).double().mean())


def nll(logits: Tensor, labels: Tensor) -> float:
    """Mean negative log-likelihood of the labels, −log p_y, in nats.

    >>> round(nll(torch.zeros(3, 4), torch.tensor([0, 1, 2])), 4)
    1.3863
    """
    _check(logits, labels)
    return float(torch.nn.functional.cross_entropy(logits.double(), labels))


def brier(logits: Tensor, labels: Tensor) -> float:
    """Mean Brier score over all classes, Σ_c (p_c − 1[c = y])², in [0, 2].

    Source: Brier 1950, https://doi.org/10.1175/1520-0493%281950%29078%3C0001:VOFEIT%3E2.0.CO;2.

    >>> brier(torch.zeros(1, 4), torch.tensor([0]))
    0.75
    """
    _check(logits, labels)
    probs = logits.double().softmax(dim=-1)
    truth = torch.nn.functional.one_hot(labels, logits.shape[-1])
    return float((probs - truth).square().sum(dim=-1).mean())


def reliability(logits: Tensor, labels: Tensor, *, bins: int = 15) -> Reliability:
    """Sort samples by the confidence of their top class into equal-width bins: mean confidence, accuracy, number.

    Feeds a reliability diagram.

    A bin is [i/bins, (i+1)/bins), the last one closed.

    >>> bins = reliability(torch.tensor([[9.0, 0.0], [9.0, 0.0], [0.1, 0.0]]), torch.tensor([0, 1, 0]), bins=2)
    >>> bins.confidence.float(), bins.accuracy.float(), bins.samples
    (tensor([   nan, 0.8416]), tensor([   nan, 0.6667]), tensor([0, 3]))
    """
    _check(logits, labels)
    if bins < 1:
        raise ValueError(f"Expected argument `bins` to be >= 1, but got {bins!r}.")
    confidence, top = logits.double().softmax(dim=-1).max(dim=-1)
    # On the CPU: a GPU adds weights up in another order each time, and so to other last bits.
    confidence, right = confidence.cpu(), (top == labels).double().cpu()
    bin_of = (confidence * bins).long().clamp_max(bins - 1)
    count = torch.bincount(bin_of, minlength=bins)
    mean_confidence = torch.bincount(bin_of, weights=confidence, minlength=bins) / count
    share_right = torch.bincount(bin_of, weights=right, minlength=bins) / count
    return Reliability(mean_confidence, share_right, count)


def ece(logits: Tensor, labels: Tensor, *, bins: int = 15) -> float:
    """Expected calibration error of the top class, Σ_b n_b/N · |accuracy_b − confidence_b|, in [0, 1].

    Source: Guo et al. 2017, https://arxiv.org/abs/1706.04599 [paper].

    >>> ece(torch.zeros(4, 2), torch.tensor([0, 0, 1, 1]))
    0.0
    """
    confidence, share_right, samples = reliability(logits, labels, bins=bins)
    gaps = (confidence - share_right).abs().nan_to_num(0.0)
    return float((gaps * samples).sum() / samples.sum())


def agreement(logits: Tensor) -> Tensor:
    """Share of samples on which two models have the same top class.  [K, N, C] -> [K, K].

    >>> agreement(torch.tensor([[[1.0, 0.0], [1.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]]]))
    tensor([[1.0000, 0.5000],
            [0.5000, 1.0000]])
    """
    if logits.dim() != 3 or logits.numel() == 0:
        raise ValueError(f"Expected argument `logits` to have shape [K, N, C], but got {list(logits.shape)}.")
    top = logits.argmax(dim=-1)
    return (top.unsqueeze(0) == top.unsqueeze(1)).float().mean(dim=-1)


def class_accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Accuracy within each true class, ``[C]``; NaN for a class without a sample.

    >>> class_accuracy(torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 0.0]]), torch.tensor([0, 0]))
    tensor([0.5000,    nan,    nan])
    """
    _check(logits, labels)
    classes = logits.shape[-1]
    right = labels[logits.argmax(dim=-1) == labels]
    return torch.bincount(right, minlength=classes) / torch.bincount(labels, minlength=classes)


def reweighted_accuracy(logits: Tensor, labels: Tensor, class_weights: Tensor) -> float:
    """Accuracy under another label distribution, Σ_c π_c·accuracy_c with π ∝ ``class_weights`` ``[C]``.

    A common test set so answers for a peer's own label mix. Classes without a sample are left out and π renormalised;
    NaN where the weights have no other class.

    >>> logits = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    >>> reweighted_accuracy(logits, torch.tensor([0, 1, 1]), torch.tensor([30, 10]))
    0.875
    """
    per_class = class_accuracy(logits, labels).double()
    if class_weights.shape != per_class.shape or bool((class_weights < 0).any()):
        raise ValueError(
            f"Expected argument `class_weights` to be [{len(per_class)}] non-negative numbers, but got {class_weights}."
        )
    present = ~per_class.isnan()
    weights = class_weights.to(per_class)[present]
    return float((weights * per_class[present]).sum() / weights.sum())


def _check(logits: Tensor, labels: Tensor) -> None:
    if logits.dim() != 2 or labels.shape != logits.shape[:1] or len(labels) == 0:
        raise ValueError(
            "Expected arguments `logits` and `labels` to have shapes [N, C] and [N] with N >= 1, "
            f"but got {list(logits.shape)} and {list(labels.shape)}."
        )
    if labels.is_floating_point():
        raise ValueError(f"Expected argument `labels` to be class indices, but got dtype {labels.dtype}.")
    low, high = labels.aminmax()
    if low < 0 or high >= logits.shape[-1]:
        raise ValueError(f"Expected argument `labels` to be from 0 to {logits.shape[-1] - 1}, but got {low} to {high}.")
