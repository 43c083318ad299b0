"""The labels' loss of a site with few of some classes, against torch's own losses and numbers made by hand."""

import math

import pytest
import torch
from torch.nn import functional as F

from fedkd.losses.calibration import (
    Calibration,
    adjusted_cross_entropy,
    class_shares,
    logit_suppression,
    vacant_class_distillation,
)

LABELS = torch.tensor([0, 0, 0, 1, 1, 3])
SHARES = class_shares(LABELS, 5)


def logits(seed=0, count=6, classes=5):
    return 3 * torch.randn(count, classes, generator=torch.Generator().manual_seed(seed))


def test_shares_are_smoothed_by_one_sample_of_each_class():
    torch.testing.assert_close(SHARES, torch.tensor([4, 3, 1, 2, 1]) / 11)
    torch.testing.assert_close(class_shares(LABELS[:0], 4), torch.full((4,), 0.25))


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0, 2.0])
def test_an_adjusted_loss_is_cross_entropy_under_a_prior(strength):
    """By another route: a softmax weighed by π^λ, class by class."""
    z = logits().double()
    weighed = z.exp() * SHARES.double() ** strength
    expected = -(weighed[torch.arange(6), LABELS] / weighed.sum(1)).log().mean()

    found = adjusted_cross_entropy(z, LABELS, SHARES.double(), strength=strength)

    torch.testing.assert_close(found, expected)
    if not strength:
        assert torch.equal(found, F.cross_entropy(z, LABELS))


def test_a_rare_class_costs_more():
    z = torch.zeros(1, 5)
    costs = [float(adjusted_cross_entropy(z, torch.tensor([c]), SHARES)) for c in range(5)]
    assert costs == pytest.approx([math.log(11 / n) for n in (4, 3, 1, 2, 1)])


def test_balanced_shares_change_nothing():
    z = logits()
    torch.testing.assert_close(
        adjusted_cross_entropy(z, LABELS, torch.full((5,), 0.2), strength=3.0), F.cross_entropy(z, LABELS)
    )


def test_vacant_classes_keep_their_ratios_and_nothing_else():
    vacant = torch.tensor([False, False, True, False, True])
    now, before = logits(1).requires_grad_(), logits(2).requires_grad_()
    p, q = (z[:, [2, 4]].softmax(1) for z in (before, now))
    by_hand = (p * (p / q).log()).sum(1).mean()

    loss = vacant_class_distillation(now, before, vacant)
    loss.backward()

    torch.testing.assert_close(loss, by_hand)
    assert before.grad is None and not now.grad[:, ~vacant].any() and now.grad[:, vacant].abs().min() > 0
    shifted = before.detach() + torch.tensor([5.0, -1.0, 3.0, 0.0, 3.0])  # the vacant ones alike
    assert float(vacant_class_distillation(shifted, before, vacant)) == pytest.approx(0, abs=1e-6)
    for few in ([], [3]):
        alone = torch.zeros(5, dtype=torch.bool)
        alone[few] = True
        assert float(vacant_class_distillation(now, before, alone)) == 0


def test_suppression_by_hand_and_where_it_pushes():
    z, shares = torch.tensor([[2.0, -1.0], [0.5, 1.0]]), torch.tensor([0.75, 0.25])
    # class 0: sample 0 is of it, so 0; sample 1: 0.5 − ln 0.75 − ln 2. Class 1 the other way round.
    first = math.log((1 + math.exp(0.5 - math.log(0.75) - math.log(2))) / 2)
    second = math.log((math.exp(-1 - math.log(0.25) - math.log(2)) + 1) / 2)
    z.requires_grad_()

    loss = logit_suppression(z, torch.tensor([0, 1]), shares)
    loss.backward()

    assert float(loss) == pytest.approx(0.75 * first + 0.25 * second, abs=1e-6)
    assert z.grad[0, 0] == z.grad[1, 1] == 0 and z.grad[0, 1] > 0 and z.grad[1, 0] > 0


def test_the_parts_add_up_with_their_weights():
    z, former, batch = logits(1, 3), logits(2), torch.tensor([5, 0, 3])
    found = Calibration(LABELS, SHARES, 0.5, 2.0, 0.1, former)(z, batch)

    vacant = torch.tensor([False, False, True, False, True])
    expected = (
        F.cross_entropy(z + 0.5 * SHARES.log(), LABELS[batch])
        + 2.0 * vacant_class_distillation(z, former[batch], vacant)
        + 0.1 * logit_suppression(z, LABELS[batch], SHARES)
    )
    torch.testing.assert_close(found, expected)
    assert torch.equal(Calibration(LABELS, SHARES)(z, batch), F.cross_entropy(z, LABELS[batch]))


@pytest.mark.parametrize("strength", [0.0, 0.5])
def test_a_smoothed_label_is_spread_over_all_classes(strength):
    z, batch = logits(1, 3), torch.tensor([5, 0, 3])
    target = 0.7 * F.one_hot(LABELS[batch], len(SHARES)) + 0.3 / len(SHARES)
    expected = -(target * (z + strength * SHARES.log()).log_softmax(dim=1)).sum(dim=1).mean()

    torch.testing.assert_close(Calibration(LABELS, SHARES, strength, smoothing=0.3)(z, batch), expected)
