"""Whom a peer believes: how much each teacher it hears counts, for each proxy sample and class."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedkd.errors import FedkdError, SettingError
from fedkd.losses.robust import agreement_weights, eigentrust
from fedkd.losses.weighing import WAYS, Evidence, Way
from fedkd.plugins import load_callable
from fedkd.settings.config import RunConfig

_JUDGES: Mapping[str, Callable[[Evidence, Tensor], Tensor]] = {
    "agreement": lambda e, own: agreement_weights(e.logits, own),
    "eigentrust": lambda e, own: eigentrust(e.logits, own, temperature=e.temperature),
}
_EXPECTED = "a function (Evidence) -> weights >= 0 that broadcast to [K, N, C]"


@dataclass(frozen=True)
class Belief:
    """How a peer weighs its teachers in a round.

    Attributes:
        name: as the setting ``weighing`` has it.
        way: what that names.
        temperature: T of the distillation.
        robust: the defence, as the setting has it: ``agreement`` and ``eigentrust`` weigh whole teachers first.
    """

    name: str
    way: Way
    temperature: float
    robust: str

    @classmethod
    def from_config(cls, config: RunConfig) -> "Belief":
        """Take the settings of a run: where a server combines, its word is all there is.

        Raises:
            SettingError: one's own function cannot be loaded, or returns what are no weights.
        """
        name = config.weighing if config.peers_combine else "uniform"
        return cls(name, WAYS.get(name) or _own(name), config.temperature, config.defence)

    @property
    def needs_own(self) -> bool:
        """Whether it takes the peer's own logits."""
        return self.robust in _JUDGES or self.way.needs_own

    def whole(self, weights: Tensor, evidence: Evidence) -> Tensor:
        """Return the weights of whole teachers ``[K]``: those they come with, times how far each is believed.

        Args:
            weights: that they come with, ``[K]``, as their knowledge ages.
            evidence: of the same teachers, with the peer's own logits where it :attr:`needs_own`.
        """
        judge = _JUDGES.get(self.robust)
        if judge is None or evidence.own_logits is None:
            return weights
        return weights * judge(evidence, evidence.own_logits)

    def by_place(self, weights: Tensor, evidence: Evidence) -> Tensor | None:
        """Return weights ``[K, N or 1, C or 1]`` by sample and class; None where whole teachers' weights are all.

        Where a way lets no teacher count for one class of a sample, and some for others, and where it lets none count
        for anything at all, whole teachers count for it: those that sent the sample. A teacher whose weights are no
        numbers, as its logits may be of any size, counts for nothing.

        Args:
            weights: of whole teachers, ``[K]``, one of which is > 0.
            evidence: of the same teachers.

        Raises:
            FedkdError: one's own function returned what are no weights of these teachers.
        """
        if self.name == "uniform" and evidence.certainty is None:
            return None
        left = weights > 0
        believed = evidence.of(left)
        found = self.way.weigh(believed)
        if problem := _wrong(found, believed):
            raise FedkdError(f"weighing = {self.name}: expected {_EXPECTED}, but {problem}")
        whole = weights[left].reshape(-1, 1, 1).to(found)
        if believed.sent is not None:  # what a teacher has not sent counts for nothing
            whole = whole * believed.sent.unsqueeze(-1)
        found = whole * torch.where(torch.isfinite(found).flatten(1).all(dim=1).reshape(-1, 1, 1), found, 0)
        if not bool((found > 0).any()):
            if believed.sent is None or not bool(believed.sent.any()):
                return None
            found = whole
        total = found.sum(dim=0)
        forgotten = (total == 0) & (total > 0).any(dim=-1, keepdim=True)
        if bool(forgotten.any()):
            found = torch.where(forgotten, whole, found)
        placed = found.new_zeros(len(weights), *found.shape[1:])
        placed[left] = found
        return placed


def _own(spec: str) -> Way:
    """Return one's own way, ``package.module:function``, once it has been tried.

    Raises:
        SettingError: it does not take what it is given, or returns something else.
    """
    found = load_callable(spec, key="weighing")
    logits = torch.tensor([[[1.0, 0.0, -1.0], [0.0, 0.5, 0.0]], [[0.0, 1.0, 0.0], [0.0, 0.0, 2.0]]])
    evidence = Evidence(logits, own_logits=logits[0])
    try:
        problem = _wrong(found(evidence), evidence)
    except (Exception, SystemExit) as error:  # one's own function may fail in any way
        raise SettingError("weighing", spec, f"{_EXPECTED} ({type(error).__name__}: {error})") from error
    if problem:
        raise SettingError("weighing", spec, f"{_EXPECTED} (for K = 2, N = 2, C = 3 {problem})")
    return Way(found, needs_own=True)


def _wrong(found: object, evidence: Evidence) -> str:
    """Return what is wrong with weights; empty if nothing is."""
    if not isinstance(found, Tensor):
        return f"it returned {type(found).__name__}"
    fits = found.dim() == 3 and all(
        size in (1, full) for size, full in zip(found.shape, evidence.logits.shape, strict=True)
    )
    if not fits or len(found) != len(evidence.logits):
        return f"it returned {list(found.shape)}"
    return "it returned numbers that are no weights" if bool((found < 0).any()) else ""
