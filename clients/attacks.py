"""Poisoned but well-formed knowledge, to measure defences against it. Simulated peers only."""

import torch
from torch import Tensor

from fedkd.seeding import derive
from fedkd.settings.config import RunConfig
from fedkd.settings.learning import Attacks


def is_attacker(config: Attacks, index: int, peers: int) -> bool:
    """Tell whether a peer poisons its knowledge: the last ⌊``attackers`` · peers⌉ do.

    >>> [is_attacker(Attacks(attack="flip", attackers=0.4), i, 5) for i in range(5)]
    [False, False, False, True, True]
    """
    return config.attack != "none" and index >= peers - round(config.attackers * peers)


def poison(logits: Tensor, config: RunConfig, *, index: int, round: int) -> Tensor:
    """Replace honest logits ``[P, C]`` by poisoned ones of about the same scale.

    ``flip``: every class takes the one before's logit. ``noise``: Gaussian noise of the logits' mean and deviation.
    ``constant``: the first class everywhere. ``collude``: random classes, the same of all attackers.

    Source: [ours], after the attacks that Cronus (arXiv 1912.11279) and FedMD's critics study.
    """
    if config.attack == "flip":
        return logits.roll(1, dims=-1)
    spread, middle, classes = logits.std(), logits.mean(), logits.shape[-1]
    who = "all" if config.attack == "collude" else index
    generator = torch.Generator().manual_seed(derive(config.seed, "attack", who, round))
    if config.attack == "noise":
        return middle + spread * torch.randn(logits.shape, generator=generator).to(logits)
    if config.attack == "constant":
        target = torch.zeros(len(logits), dtype=torch.int64)
    else:
        target = torch.randint(classes, (len(logits),), generator=generator)
    certain = torch.nn.functional.one_hot(target, classes).to(logits)
    return middle + 3 * spread * certain
