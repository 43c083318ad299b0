"""Poisoned knowledge, and what the defences make of it."""

import numpy as np
import pytest
import torch
from federation import federate
from hypothesis import given
from hypothesis import strategies as st

from clients.attacks import is_attacker, poison
from fedkd.losses.robust import agreement_weights
from fedkd.settings.config import RunConfig

ATTACKS = ["flip", "noise", "constant", "collude"]


@pytest.mark.parametrize("attack", ATTACKS)
def test_poison_is_well_formed_agrees_with_nothing_true_and_follows_from_the_seed(attack):
    logits = torch.nn.functional.one_hot(torch.arange(1, 10).repeat(30), 10).float() * 6 + torch.randn(270, 10)
    config = RunConfig(attack=attack)

    poisoned = poison(logits, config, index=4, round=2)

    assert poisoned.shape == logits.shape and bool(poisoned.isfinite().all())
    assert (poisoned.argmax(-1) == logits.argmax(-1)).float().mean() < 0.2
    assert torch.equal(poisoned, poison(logits, config, index=4, round=2))
    colludes = torch.equal(poisoned, poison(logits, config, index=3, round=2))
    assert colludes == (attack in ("flip", "constant", "collude"))


def test_attackers_are_the_last_peers():
    config = RunConfig(attack="flip", attackers=0.2)

    assert [i for i in range(10) if is_attacker(config, i, 10)] == [8, 9]
    assert not any(is_attacker(RunConfig(), i, 10) for i in range(10))


@pytest.mark.parametrize(
    ("robust", "attackers"), [("median", 0.2), ("trimmed", 0.2), ("agreement", 0.2), ("agreement", 0.4)]
)
@pytest.mark.slow
def test_a_defence_keeps_honest_peers_above_an_undefended_mean(tmp_path, robust, attackers):
    """Some of five peers flip their labels. At 40 % half of a peer's teachers lie, and no median helps."""
    settings = {
        "attack": "flip", "attackers": attackers, "proxy_size": 300, "pretrain_epochs": 12, "rounds": 3,
        "distill_epochs": 6, "models": "mlp", "trim": 0.3, "partition": "dirichlet",
    }  # fmt: skip

    def honest(run):
        return sum(peer["after"] for peer in run.summary()["peers"][:3]) / 3

    undefended = honest(federate(tmp_path / "none", 5, **settings))
    defended = honest(federate(tmp_path / robust, 5, robust=robust, **settings))

    assert defended > undefended


def test_agreement_leaves_out_two_colluding_copies_of_five_peers():
    torch.manual_seed(0)
    truth = torch.randint(0, 10, (400,))

    def honest():
        logits = torch.nn.functional.one_hot(truth, 10).float() * 4 + torch.randn(400, 10) * 1.5
        return logits

    flipped = torch.nn.functional.one_hot((truth + 1) % 10, 10).float() * 9
    teachers = torch.stack([honest(), honest(), flipped, flipped])

    assert agreement_weights(teachers, honest()).tolist() == [1, 1, 0, 0]


def predictions(classes):
    """Logits whose top classes these are."""
    return torch.nn.functional.one_hot(torch.as_tensor(classes), 4).float()


@given(data=st.data(), teachers=st.integers(1, 6), samples=st.sampled_from([4, 16]))
def test_agreement_believes_whom_an_independent_calculation_does(data, teachers, samples):
    """The rule of the docstring in numpy; with 4 classes and 4 or 16 samples every number of it is exact."""
    rows = st.lists(st.integers(0, 3), min_size=samples, max_size=samples)
    truth = np.array(data.draw(rows))
    noise = np.array(
        [data.draw(st.lists(st.booleans(), min_size=samples, max_size=samples)) for _ in range(teachers + 1)]
    )
    lies = np.array([data.draw(rows) for _ in range(teachers + 1)])
    top = np.where(noise, lies, truth)  # the last row is the peer itself

    scores = []
    for one in range(teachers):
        others = sorted(np.mean(top[one] == top[other]) for other in range(teachers + 1) if other != one)
        above = [share for share in others if sum(other >= share for other in others) >= (len(others) + 1) // 2]
        scores.append(max(above) - 0.25)  # the least share that half of them reach, or the upper one of two
    best = max(scores)
    expected = [float(score >= best / 2) if best > 0 else 1.0 for score in scores]

    found = agreement_weights(predictions(top[:-1]), predictions(top[-1]))

    assert found.tolist() == expected


@given(seed=st.integers(0, 2**32 - 1), teachers=st.integers(2, 6))
def test_agreement_knows_neither_the_order_of_teachers_nor_the_names_of_classes_nor_how_sure_they_are(seed, teachers):
    stream = torch.Generator().manual_seed(seed)
    logits = torch.randn(teachers + 1, 16, 4, generator=stream)
    logits[: teachers // 2 + 1, :, 0] += 2  # some that agree
    order, classes = torch.randperm(teachers, generator=stream), torch.randperm(4, generator=stream)

    found = agreement_weights(logits[:-1], logits[-1])

    assert set(found.tolist()) <= {0.0, 1.0} and found.any()
    assert torch.equal(agreement_weights(logits[:-1][order], logits[-1]), found[order])
    assert torch.equal(agreement_weights(logits[:-1][..., classes], logits[-1][..., classes]), found)
    assert torch.equal(agreement_weights(3 * logits[:-1] + 1, 0.5 * logits[-1]), found)


@pytest.mark.parametrize(("wrong", "believed"), [(0, 1), (5, 1), (6, 1), (7, 0), (16, 0)])
def test_a_teacher_half_as_good_beyond_chance_as_the_best_is_still_believed(wrong, believed):
    """Three that are right: 12/16 beyond the chance of 4/16. With 6 errors a teacher is 6/16 beyond it."""
    truth = torch.arange(16) % 4
    doubtful = truth.clone()
    doubtful[:wrong] = (doubtful[:wrong] + 1) % 4

    found = agreement_weights(predictions(torch.stack([truth, truth, doubtful])), predictions(truth))

    assert found.tolist() == [1, 1, believed]


def test_where_nobody_agrees_beyond_chance_all_are_believed():
    """Teachers each of whom is alone with its opinion: there is no majority to trust, and none is thrown out."""
    alone = torch.stack([torch.full((16,), one) for one in range(3)])

    assert agreement_weights(predictions(alone), predictions(torch.full((16,), 3))).tolist() == [1, 1, 1]
    # Exactly at chance: each pair shares a quarter of the samples.
    quarter = torch.stack([torch.arange(16) % 4, torch.arange(16) // 4])
    assert agreement_weights(
        predictions(quarter), predictions((torch.arange(16) % 4 + torch.arange(16) // 4) % 4)
    ).all()
