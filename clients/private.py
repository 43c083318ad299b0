"""A peer's side of differential privacy: noise that nobody else knows, and a budget that outlives runs."""

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path

from clients.place import Place
from fedkd.config import RunConfig
from fedkd.errors import FedkdError, SettingError
from fedkd.privacy import Logits, Mechanism, reproducible_normal, secret_normal, spent
from fedkd.seeding import derive

_BUDGET, _MEASURED = "privacy.json", "measured.jsonl"


class BudgetError(FedkdError):
    """What a peer's owner allows is spent, or cannot be written down."""


class Private:
    """Makes one peer's knowledge private in one run, and knows what that has cost.

    Args:
        mechanism: the run's.
        config: the run's settings.
        place: the peer.

    A deployed peer draws its noise from the operating system, anew for every release, and writes each release into
    ``privacy.json`` in its folder before it is sent: runs add up until the peer's ``max-epsilon`` is reached. A
    simulated peer's noise comes from the run's seed, so that a run can be repeated; it hides nothing from whoever
    knows the seed.
    """

    def __init__(self, mechanism: Mechanism, config: RunConfig, place: Place) -> None:
        self._mechanism, self._seed, self._place = mechanism, config.seed, place
        self._path = place.state_dir / _BUDGET
        self.epsilon = 0.0

    @classmethod
    def of(cls, config: RunConfig, place: Place) -> "Private | None":
        """Return what the settings ask for, or None."""
        mechanism = Mechanism.from_config(config)
        return cls(mechanism, config, place) if mechanism else None

    def check_budget(self) -> None:
        """Refuse a run whose releases, together with those of earlier runs, are more than the peer allows.

        Raises:
            SettingError: names what is left of the budget.
        """
        if self._place.simulated or self._place.limits.epsilon is None:
            return
        before, planned = _read(self._path), self._mechanism.releases * self._mechanism.cost
        if self._over(before + planned):
            used = spent(before, self._place.limits.delta)
            raise SettingError(
                "privacy-epsilon",
                self._mechanism.epsilon,
                f"such that it and the {used:.3g} that earlier runs spent are together within {self._allowed()}",
            )

    def publish(self, logits: Logits, *, round: int) -> Logits:
        """Return logits ``[P, C]`` that may leave the peer; afterwards ``epsilon`` is what the peer has spent.

        Raises:
            BudgetError: nothing is left of the peer's budget, or it cannot be written down.
        """
        shape = logits.shape[0], logits.shape[1]
        if self._place.simulated:
            self.epsilon = spent((round + 1) * self._mechanism.cost, self._mechanism.delta)
            seed = derive(self._seed, "privacy", self._place.index, round)
            return self._mechanism.publish(logits, reproducible_normal(shape, seed))
        total = _read(self._path) + self._mechanism.cost
        if self._over(total):
            raise BudgetError(f"the budget is spent: another release would exceed {self._allowed()}")
        _write(self._path, total)
        delta = self._mechanism.delta if self._place.limits.epsilon is None else self._place.limits.delta
        self.epsilon = spent(total, delta)
        return self._mechanism.publish(logits, secret_normal(shape))

    def _over(self, cost: float) -> bool:
        limits = self._place.limits
        return limits.epsilon is not None and spent(cost, limits.delta) > limits.epsilon * (1 + 1e-9)

    def _allowed(self) -> str:
        limits = self._place.limits
        return f"ε {limits.epsilon:g} at δ {limits.delta:g} (this peer's `max-epsilon`, `max-delta`; {self._path})"


def withhold(place: Place, run: str, round: int, metrics: Mapping[str, float]) -> None:
    """Write what a peer measured into its own ``measured.jsonl``, a line a round, readable by it alone."""
    line = {"time": time.time(), "run": run, "round": round, **metrics}
    place.state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    handle = os.open(place.state_dir / _MEASURED, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    with os.fdopen(handle, "a") as file:
        file.write(json.dumps(line) + "\n")


def _read(path: Path) -> float:
    """Return what has been spent: Σ 1/z² over all releases."""
    try:
        return float(json.loads(path.read_text())["spent"])
    except FileNotFoundError:
        return 0.0
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BudgetError(f"cannot read the budget in {path}: {error}") from error


def _write(path: Path, total: float) -> None:
    """Write the budget, on the disk before anything leaves the peer."""
    partial = path.with_suffix(".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(handle, "w") as file:
            json.dump({"spent": total}, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise BudgetError(f"cannot write the budget to {path}: {error}") from error
