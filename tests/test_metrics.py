"""Metrics, held to torchmetrics where it has them and to their definitions where it has not."""

import math

import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_calibration_error

from fedkd.metrics import (
    accuracy,
    agreement,
    brier,
    class_accuracy,
    ece,
    nll,
    reliability,
    reweighted_accuracy,
)

N, C = 500, 7


@pytest.fixture
def sample():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(C, (N,), generator=generator)
    logits = 2 * torch.randn(N, C, generator=generator)
    logits[range(N), labels] += 1.5
    return logits, labels


def test_accuracy_is_that_of_torchmetrics(sample):
    logits, labels = sample
    assert accuracy(logits, labels) == pytest.approx(multiclass_accuracy(logits, labels, C, average="micro").item())


def test_class_accuracy_is_that_of_torchmetrics(sample):
    torch.testing.assert_close(class_accuracy(*sample), multiclass_accuracy(*sample, C, average="none"))


@pytest.mark.parametrize("bins", [1, 10, 15])
def test_calibration_error_is_that_of_torchmetrics(sample, bins):
    logits, labels = sample
    expected = multiclass_calibration_error(logits.softmax(-1), labels, C, n_bins=bins, norm="l1")
    assert ece(logits, labels, bins=bins) == pytest.approx(expected.item(), abs=1e-6)


def test_likelihood_and_brier_score_are_those_of_their_definitions(sample):
    logits, labels = sample
    probs = np.exp(logits.double().numpy())
    probs /= probs.sum(axis=1, keepdims=True)
    truth = np.eye(C)[labels.numpy()]
    assert nll(logits, labels) == pytest.approx(-np.log(probs[truth == 1]).mean(), rel=1e-10)
    assert brier(logits, labels) == pytest.approx(((probs - truth) ** 2).sum(axis=1).mean(), rel=1e-10)


def test_certain_and_right():
    logits, labels = torch.tensor([[1e4, 0.0], [0.0, 1e4]]), torch.tensor([0, 1])
    assert (accuracy(logits, labels), nll(logits, labels), brier(logits, labels), ece(logits, labels)) == (1, 0, 0, 0)


def test_certain_and_wrong():
    logits, labels = torch.tensor([[1e4, 0.0], [0.0, 1e4]]), torch.tensor([1, 0])
    assert (accuracy(logits, labels), nll(logits, labels), brier(logits, labels), ece(logits, labels)) == (0, 1e4, 2, 1)


def test_predictions_drawn_from_themselves_are_calibrated():
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(20_000, 4, generator=generator)
    labels = torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(1)
    assert ece(logits, labels) < 0.02 < 0.1 < ece(3 * logits, labels)


def test_bins_of_the_diagram_hold_every_sample_once(sample):
    logits, labels = sample
    bins = reliability(logits, labels)
    share = bins.samples / N
    assert len(bins.samples) == 15 and bins.samples.sum() == N
    filled = bins.samples > 0
    assert (share * bins.accuracy)[filled].sum().item() == pytest.approx(accuracy(logits, labels))
    edges = torch.arange(16) / 15
    assert ((bins.confidence >= edges[:-1]) & (bins.confidence <= edges[1:]))[filled].all()
    assert bins.confidence[~filled].isnan().all() and (~filled).any()


def test_full_confidence_falls_into_the_last_bin():
    bins = reliability(torch.tensor([[1e4, 0.0], [1e4, 0.0]]), torch.tensor([0, 1]), bins=4)
    assert bins.samples.tolist() == [0, 0, 0, 2] and bins.accuracy[3] == 0.5


def test_agreement_is_the_share_of_equal_answers(sample):
    logits, _ = sample
    other = logits.roll(1, dims=0)
    found = agreement(torch.stack([logits, other, logits]))
    expected = sum(int(a.argmax() == b.argmax()) for a, b in zip(logits, other, strict=True)) / N
    assert found.diagonal().tolist() == [1.0] * 3
    assert found[0, 2] == 1.0 and found[0, 1].item() == pytest.approx(expected)
    torch.testing.assert_close(found, found.T)


def test_absent_class_has_no_accuracy():
    per_class = class_accuracy(torch.eye(3), torch.tensor([0, 0, 2]))
    assert per_class.isnan().tolist() == [False, True, False]
    assert per_class[[0, 2]].tolist() == [0.5, 1.0]


def test_accuracy_at_the_test_sets_own_mix_is_the_accuracy(sample):
    logits, labels = sample
    own = torch.bincount(labels, minlength=C)
    assert reweighted_accuracy(logits, labels, own) == pytest.approx(accuracy(logits, labels))


def test_accuracy_at_one_class_is_that_of_the_class(sample):
    logits, labels = sample
    only = torch.nn.functional.one_hot(torch.tensor(3), C)
    assert reweighted_accuracy(logits, labels, only) == pytest.approx(class_accuracy(logits, labels)[3].item())


def test_weights_of_absent_classes_are_shared_out():
    logits, labels = torch.eye(3), torch.tensor([0, 0, 2])
    assert reweighted_accuracy(logits, labels, torch.tensor([1.0, 5.0, 1.0])) == pytest.approx(0.75)
    assert math.isnan(reweighted_accuracy(logits, labels, torch.tensor([0.0, 1.0, 0.0])))


@pytest.mark.parametrize("metric", [accuracy, nll, brier, ece, reliability, class_accuracy])
@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (torch.zeros(3, 2), torch.zeros(2, dtype=torch.int64), r"\[N, C\] and \[N\].*\[3, 2\] and \[2\]"),
        (torch.zeros(3), torch.zeros(3, dtype=torch.int64), r"\[N, C\] and \[N\].*\[3\] and \[3\]"),
        (torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64), r"N >= 1.*\[0, 2\] and \[0\]"),
        (torch.zeros(3, 2), torch.zeros(3), r"`labels`.*class indices.*float32"),
        (torch.zeros(3, 2), torch.tensor([0, 1, 2]), r"`labels`.*0 to 1.*2"),
        (torch.zeros(3, 2), torch.tensor([0, 1, -1]), r"`labels`.*0 to 1.*-1"),
    ],
)
def test_wrong_input_is_named(metric, logits, labels, message):
    with pytest.raises(ValueError, match=message):
        metric(logits, labels)


def test_other_wrong_input_is_named():
    logits, labels = torch.zeros(3, 2), torch.tensor([0, 1, 1])
    with pytest.raises(ValueError, match=r"`bins`.*>= 1.*0"):
        ece(logits, labels, bins=0)
    with pytest.raises(ValueError, match=r"`logits`.*\[K, N, C\].*\[3, 2\]"):
        agreement(logits)
    with pytest.raises(ValueError, match=r"`class_weights`.*\[2\] non-negative"):
        reweighted_accuracy(logits, labels, torch.tensor([1.0, -1.0]))
