"""The models that this process ran last: the truth is on disk, and this saves reading it."""

from dataclasses import dataclass

from torch import Tensor, nn

from clients.learner import Memo

_MOST = 8

Key = tuple[str, str]
"""A state folder and a run."""


@dataclass
class Warm:
    """A peer's model as this process left it.

    Attributes:
        round: at whose end it stands.
        model: on its device.
        memo: what the peer chose.
        logits: what the model said then of the next round's proxy samples, where the peer compares them with its
            teachers'.
    """

    round: int
    model: nn.Module
    memo: Memo
    logits: Tensor | None


_kept: dict[Key, Warm] = {}


def take(key: Key) -> Warm | None:
    """Return a peer's model, which is then the caller's to change; None: it ran elsewhere, or long ago."""
    return _kept.pop(key, None)


def keep(key: Key, warm: Warm) -> None:
    """Keep a peer's model; of too many those that ran longest ago go."""
    while len(_kept) >= _MOST:
        _kept.pop(next(iter(_kept)))
    _kept[key] = warm
