"""What a peer measures of a model."""

from torch import Tensor

from fedkd import metrics

Series = dict[str, list[float]]


def scores(logits: Tensor, labels: Tensor, label_share: Tensor) -> dict[str, float]:
    """Return what a model scores on samples, by the names under which it is told.

    Args:
        logits: ``[N, C]``.
        labels: ``[N]`` int64.
        label_share: of each class in the peer's own data, ``[C]``: what its own accuracy is weighed by.
    """
    return {
        "test_accuracy": metrics.accuracy(logits, labels),
        "own_accuracy": metrics.reweighted_accuracy(logits, labels, label_share),
        "test_loss": metrics.nll(logits, labels),
        "ece": metrics.ece(logits, labels),
        "brier": metrics.brier(logits, labels),
    }


def reliability(logits: Tensor, labels: Tensor) -> Series:
    """Return the bins of a reliability diagram."""
    return {name: values.double().tolist() for name, values in metrics.reliability(logits, labels)._asdict().items()}
