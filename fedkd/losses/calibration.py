r"""The labels' loss of a site whose classes are skewed: what it has much of should not crowd out what it has little of.

Pure functions of a batch of private samples, and :class:`Calibration`, which holds what a peer chose of them. None of
them touches what is evaluated or published: they are losses, and the model's logits stay as they are.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Calibration", "adjusted_cross_entropy", "class_shares", "logit_suppression", "vacant_class_distillation"]


def class_shares(labels: Tensor, classes: int) -> Tensor:
    """Return the smoothed share of each class, π_c = (n_c + 1)/(n + C).  [N] -> [C], float32, sums to 1.

    Smoothed, since the logarithm of a class without a sample would be −∞ [ours].

    Args:
        labels: ``[N]`` int64, each in [0, C).
        classes: C.

    >>> class_shares(torch.tensor([0, 0, 1]), 3)
    tensor([0.5000, 0.3333, 0.1667])
    """
    counts = torch.bincount(labels, minlength=classes).double() + 1
    return (counts / counts.sum()).float()


def adjusted_cross_entropy(
    logits: Tensor, labels: Tensor, shares: Tensor, *, strength: float = 1.0, smoothing: float = 0.0
) -> Tensor:
    """Cross-entropy of z + λ·log π, the batch's mean.  [B, C], [B], [C] -> scalar, in nats.

    At λ = 1 what the logits themselves say is, in the end, the posterior over the class shares: what a balanced set
    would have taught. A rare class that is missed costs more, and so does a class that is often there and is guessed.

    Args:
        logits: z, ``[B, C]``.
        labels: ``[B]`` int64.
        shares: π, ``[C]``, each > 0.
        strength: λ >= 0; 0 is plain cross-entropy.
        smoothing: ε in [0, 1), by which the label's one-hot y becomes (1 − ε)·y + ε/C (Szegedy et al. 2016, arXiv
            1512.00567).

    Source: logit adjustment, Menon et al. 2021, arXiv 2007.07314 [paper]; FedLC, arXiv 2209.00189, calibrates the
    same way with a margin of another form; the smoothed shares of one's own samples are [ours].

    >>> adjusted_cross_entropy(torch.zeros(1, 2), torch.tensor([1]), torch.tensor([0.75, 0.25]))  # ln 4
    tensor(1.3863)
    """
    return F.cross_entropy(logits + strength * shares.log().to(logits), labels, label_smoothing=smoothing)


def vacant_class_distillation(logits: Tensor, former_logits: Tensor, vacant: Tensor) -> Tensor:
    """KL(p̃ ‖ q̃) over the classes without a sample, p̃, q̃ their softmax among themselves.  -> scalar, in nats.

    Labels push all classes down that a site has no sample of; what tells them from one another is kept as it was. The
    mean over the batch; 0 where fewer than two classes are vacant.

    Args:
        logits: the model's, ``[B, C]``.
        former_logits: those of the same samples before, ``[B, C]``; no gradient goes there.
        vacant: ``[C]`` bool.

    Source: vacant-class distillation of FedVLS, arXiv 2401.02329, with the softmax over the vacant classes alone
    [code]. There the former model is the global one that a client receives; here it is the peer's own [ours].

    >>> now, before = torch.tensor([[5.0, 0.0, 0.0]]), torch.tensor([[0.0, 0.0, torch.inf]]).nan_to_num(posinf=100.0)
    >>> vacant_class_distillation(now, before, torch.tensor([False, True, True]))  # ln 2
    tensor(0.6931)
    """
    ours = torch.log_softmax(logits[:, vacant], dim=-1)
    theirs = torch.log_softmax(former_logits[:, vacant].detach().to(ours), dim=-1)
    return (theirs.exp() * (theirs - ours)).sum() / len(logits)


def logit_suppression(logits: Tensor, labels: Tensor, shares: Tensor) -> Tensor:
    r"""Penalty on the logits of classes that are not the label, Σ_c π_c · log 1/B Σ_i exp(ẑ_ic).  -> scalar, in nats.

    ẑ_ic = z_ic − log π_c − log C, and 0 where c is the label of sample i: a frequent class's logit on a sample of
    another class costs most.

    Args:
        logits: z, ``[B, C]``.
        labels: ``[B]`` int64.
        shares: π, ``[C]``, each > 0.

    Source: logit suppression of FedVLS, arXiv 2401.02329, in the form of LADE's regulariser [code]; there π is not
    smoothed [ours], and a class without a sample weighs nothing, here π_c.

    >>> logit_suppression(torch.tensor([[9.0, 1.0]]), torch.tensor([0]), torch.tensor([0.5, 0.5]))
    tensor(0.5000)
    """
    shares = shares.to(logits)
    shifted = logits - shares.log() - math.log(logits.shape[-1])
    label = torch.zeros_like(shifted, dtype=torch.bool).scatter(1, labels.unsqueeze(1), value=True)
    over_batch = torch.logsumexp(shifted.masked_fill(label, 0.0), dim=0) - math.log(len(logits))
    return (shares * over_batch).sum()


@dataclass(frozen=True)
class Calibration:
    """The labels' loss of one peer in one phase of training.

    Attributes:
        labels: of all its samples, ``[N]`` int64.
        shares: of its classes, ``[C]``, as :func:`class_shares` returns them.
        adjustment: λ of :func:`adjusted_cross_entropy`.
        vacant: weight of :func:`vacant_class_distillation`.
        suppression: weight of :func:`logit_suppression`.
        former_logits: of all its samples, ``[N, C]``, as the phase began; None: nothing of them is kept.
        smoothing: of the labels, as :func:`adjusted_cross_entropy` takes it.
    """

    labels: Tensor
    shares: Tensor
    adjustment: float = 0.0
    vacant: float = 0.0
    suppression: float = 0.0
    former_logits: Tensor | None = None
    smoothing: float = 0.0

    def __call__(self, logits: Tensor, batch: Tensor) -> Tensor:
        """Return the loss of a batch, a scalar, from its logits ``[B, C]`` and its indices ``[B]``."""
        labels = self.labels[batch]
        loss = adjusted_cross_entropy(logits, labels, self.shares, strength=self.adjustment, smoothing=self.smoothing)
        if self.suppression > 0:
            loss = loss + self.suppression * logit_suppression(logits, labels, self.shares)
        if self.former_logits is not None:
            kept = vacant_class_distillation(logits, self.former_logits[batch], self._vacant)
            loss = loss + self.vacant * kept
        return loss

    @cached_property
    def _vacant(self) -> Tensor:
        """The classes without a sample, ``[C]`` bool."""
        return torch.bincount(self.labels, minlength=len(self.shares)) == 0
