"""Poisoned knowledge, and what the defences make of it."""

import pytest
import torch
from federation import federate

from fedkd.attacks import is_attacker, poison
from fedkd.config import RunConfig
from fedkd.robust import agreement_weights

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
