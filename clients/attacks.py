"""Poisoned but well-formed knowledge, to measure defences against it. Simulated peers only."""

import torch
from torch import Tensor

from fedkd.seeding import derive
from fedkd.settings.config import RunConfig
from fedkd.settings.learning import Attacks

_CERTAIN = 120.0  # exp(−120) is 0 in float32
_MOST_IN_HALF = 60_000.0


def is_attacker(config: Attacks, index: int, peers: int) -> bool:
    """Tell whether a peer poisons its knowledge: the last ⌊``attackers`` · peers⌉ do.

    >>> [is_attacker(Attacks(attack="flip", attackers=0.4), i, 5) for i in range(5)]
    [False, False, False, True, True]
    """
    return config.attack != "none" and index >= peers - round(config.attackers * peers)


def poison(logits: Tensor, config: RunConfig, *, index: int, round: int) -> Tensor:
    """Replace honest logits ``[P, C]`` by poisoned ones.

    Of about the honest logits' scale are these. ``flip``: every class takes the one before's logit. ``noise``: Gaussian
    noise of the logits' mean and deviation. ``constant``: the first class everywhere. ``collude``: random classes, the
    same of all attackers.

    Two boasters speak with a certainty of 1 at the run's temperature, to the last bit of float32, and finite in
    float16: against rules that go by how sure a teacher is. ``boast`` claims one class on every sample, of each
    attacker its own, its number modulo C. ``boast-all`` claims all: a class drawn for each sample, each as often as
    any other, so that its mean prediction is flat; every attacker and round has a draw of its own.

    Args:
        logits: what an honest peer would say.
        config: the run's settings.
        index: of the attacker.
        round: in which it speaks.

    Source: [ours], after the attacks that Cronus (arXiv 1912.11279) and FedMD's critics study.
    """
    if config.attack == "flip":
        return logits.roll(1, dims=-1)
    spread, middle, classes = logits.std(), logits.mean(), logits.shape[-1]
    who = "all" if config.attack == "collude" else index
    generator = torch.Generator().manual_seed(derive(config.seed, "attack", who, round))
    if config.attack == "noise":
        return middle + spread * torch.randn(logits.shape, generator=generator).to(logits)
    if config.attack in ("boast", "boast-all"):
        order = torch.randperm(len(logits), generator=generator)
        claimed = order % classes if config.attack == "boast-all" else torch.full_like(order, index % classes)
        margin = min(_CERTAIN * max(1.0, config.temperature), _MOST_IN_HALF)
        return margin * torch.nn.functional.one_hot(claimed, classes).to(logits)
    if config.attack == "constant":
        target = torch.zeros(len(logits), dtype=torch.int64)
    else:
        target = torch.randint(classes, (len(logits),), generator=generator)
    certain = torch.nn.functional.one_hot(target, classes).to(logits)
    return middle + 3 * spread * certain
