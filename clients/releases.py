"""A peer's side of differential privacy: noise that nobody else knows, and a budget that outlives runs."""

import fcntl
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from clients.configuration import PeerConfig
from clients.runs import run_folder
from clients.state import make_private, write_whole
from fedkd.errors import FedkdError, SettingError
from fedkd.privacy import CountsMechanism, Logits, Mechanism, reproducible_normal, secret_normal, spent
from fedkd.seeding import derive
from fedkd.settings.config import RunConfig
from fedkd.wire.codecs import BadKnowledge

_BUDGET, _LOCK, _RELEASES, _MEASURED = "privacy.json", "privacy.lock", "releases", "measured.jsonl"
_COUNTS = "counts.npy"
_OF_COUNTS = -1  # stands for the release of class counts among the rounds' in a ledger
_KEEP = 2  # releases, as many as rounds whose states are kept: of those alone can one be asked for again
_ROUNDING = 1e-6  # of ε: the accountant finds a z for an ε, and an ε for a z, by search


class BudgetError(FedkdError):
    """What a peer's owner allows is spent, or cannot be written down."""


@dataclass(frozen=True)
class _Ledger:
    """What ``privacy.json`` holds.

    Attributes:
        spent: Σ 1/z² over all releases of all runs.
        runs: the rounds whose releases are among them, by the name of the run's folder; −1 are its class counts.
    """

    spent: float = 0.0
    runs: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


class Private:
    """Makes one peer's knowledge private in one run, and knows what that has cost.

    Args:
        mechanism: of the run's logits; None: they are published as they are.
        counts: of the class counts; None: they are not told, or as they are.
        config: the run's settings.
        peer_config: the peer.
        run: the run's token.

    Attributes:
        epsilon: what the peer has spent, after the last release.

    A deployed peer draws its noise from the operating system, and before a release is sent it keeps it in ``releases``
    of the run's folder and writes its cost into ``privacy.json`` of its own: runs add up, those side by side too, until
    the peer's ``max-epsilon`` is reached, and a round that is asked for again, by a resumed run or another server, gets
    the same release again, which tells nothing new and costs nothing. A simulated peer's noise comes from the run's
    seed, so that a run can be repeated; it hides nothing from whoever knows the seed.
    """

    def __init__(
        self,
        mechanism: Mechanism | None,
        counts: CountsMechanism | None,
        config: RunConfig,
        peer_config: PeerConfig,
        run: str,
    ) -> None:
        self._mechanism, self._counts = mechanism, counts
        self._config, self._seed, self._peer_config = config, config.seed, peer_config
        self._folder = run_folder(peer_config.state_dir, run)
        self._path = peer_config.state_dir / _BUDGET
        self.epsilon = 0.0

    @classmethod
    def of(cls, config: RunConfig, peer_config: PeerConfig, run: str) -> "Private | None":
        """Return what the settings ask for, or None."""
        mechanism, counts = Mechanism.from_config(config), CountsMechanism.from_config(config)
        return cls(mechanism, counts, config, peer_config, run) if mechanism or counts else None

    def check_budget(self) -> None:
        """Refuse a run whose releases, together with those already made, are more than the peer allows.

        Raises:
            SettingError: names what is left of the budget.
        """
        if self._peer_config.simulated or self._peer_config.limits.epsilon is None:
            return
        ledger = _read(self._path)
        if self._over(ledger.spent + self._planned(ledger)):
            used = spent(ledger.spent, self._peer_config.limits.delta)
            raise SettingError(
                "privacy-epsilon",
                self._config.privacy_epsilon,
                f"such that it and the {used:.3g} that are spent already are together within {self._allowed()}",
            )

    def publish(self, logits: Logits, *, round: int) -> Logits:
        """Return logits ``[P, C]`` that may leave the peer; afterwards ``epsilon`` is what the peer has spent.

        Raises:
            BadKnowledge: logits that are not finite, which no noise would hide.
            BudgetError: the round is not one of the run's, nothing is left of the peer's budget, or the release cannot
                be written down.
        """
        if self._mechanism is None:
            return logits
        if not 0 <= round < self._mechanism.releases:
            raise BudgetError(f"round {round} is not among the {self._mechanism.releases} that the promise counts")
        if not np.isfinite(logits).all():
            raise BadKnowledge("expected finite logits to publish")
        mechanism = self._mechanism
        if self._peer_config.simulated:
            self.epsilon = spent((round + 1) * mechanism.cost + mechanism.beside, mechanism.delta)
            seed = derive(self._seed, "privacy", self._peer_config.index, round)
            return mechanism.publish(logits, reproducible_normal(_shape(logits), seed))
        return self._released(round, mechanism.cost, lambda: mechanism.publish(logits, secret_normal(_shape(logits))))

    def publish_counts(self, counts: Logits) -> Logits:
        """Return class counts ``[C]`` that may leave the peer: noised once in a run, the same ones whenever asked for.

        Raises:
            BudgetError: nothing is left of the peer's budget, or the release cannot be written down.
        """
        if self._counts is None:
            return counts
        mechanism, shape = self._counts, (1, len(counts))
        if self._peer_config.simulated:
            self.epsilon = spent(mechanism.cost, mechanism.delta)
            seed = derive(self._seed, "privacy of counts", self._peer_config.index)
            return mechanism.publish(counts, reproducible_normal(shape, seed)[0])
        return self._released(_OF_COUNTS, mechanism.cost, lambda: mechanism.publish(counts, secret_normal(shape)[0]))

    def _released(self, round: int, cost: float, make: Callable[[], Logits]) -> Logits:
        """Return a deployed peer's release of a round: the one that it made before, or a new one, kept and charged."""
        try:
            with _locked(self._peer_config.state_dir):
                ledger = _read(self._path)
                if round not in self._made(ledger):
                    ledger = self._release(make, round, cost, ledger)
                release: Logits = np.load(self._kept(round), allow_pickle=False)
        except (OSError, EOFError, ValueError) as error:
            raise BudgetError(f"cannot write the budget to {self._path}, or read a release: {error}") from error
        self.epsilon = spent(ledger.spent, self._config.privacy_delta)
        return release

    def _release(self, make: Callable[[], Logits], round: int, cost: float, ledger: _Ledger) -> _Ledger:
        """Keep a new release and charge it, in this order: what is charged can be sent again after a crash."""
        total = ledger.spent + cost
        if self._over(total):
            raise BudgetError(f"the budget is spent: another release would exceed {self._allowed()}")
        path = self._kept(round)
        make_private(path.parent)
        release = make()
        write_whole(path, lambda partial: _save(partial, release))
        made = (*self._made(ledger), round)
        others = {run: rounds for run, rounds in ledger.runs.items() if (self._folder.parent / run).is_dir()}
        charged = _Ledger(total, {**others, self._folder.name: made})
        _write(self._path, charged)
        if round != _OF_COUNTS:
            kept = {self._kept(one) for one in [one for one in made if one != _OF_COUNTS][-_KEEP:]}
            for old in set(path.parent.iterdir()) - kept:
                old.unlink(missing_ok=True)
        return charged

    def _planned(self, ledger: _Ledger) -> float:
        """Return what the run's releases cost that have not been made."""
        made = self._made(ledger)
        left = self._counts.cost if self._counts and _OF_COUNTS not in made else 0.0
        if self._mechanism:
            left += (self._mechanism.releases - len(set(made) - {_OF_COUNTS})) * self._mechanism.cost
        return left

    def _made(self, ledger: _Ledger) -> tuple[int, ...]:
        """Return the rounds whose releases this run has made."""
        return ledger.runs.get(self._folder.name, ())

    def _kept(self, round: int) -> Path:
        """Return the file of a release."""
        if round == _OF_COUNTS:
            return self._folder / _COUNTS
        return self._folder / _RELEASES / f"{round:06d}.npy"

    def _over(self, cost: float) -> bool:
        limits = self._peer_config.limits
        return limits.epsilon is not None and spent(cost, limits.delta) > limits.epsilon * (1 + _ROUNDING)

    def _allowed(self) -> str:
        limits = self._peer_config.limits
        return f"ε {limits.epsilon:g} at δ {limits.delta:g} (this peer's `max-epsilon`, `max-delta`; {self._path})"


def withhold(peer_config: PeerConfig, run: str, round: int, metrics: Mapping[str, float]) -> None:
    """Write what a peer measured into its own ``measured.jsonl``, a line a round, readable by it alone."""
    line = {"time": time.time(), "run": run, "round": round, **metrics}
    peer_config.state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    handle = os.open(peer_config.state_dir / _MEASURED, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    with os.fdopen(handle, "a") as file:
        file.write(json.dumps(line) + "\n")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the budget of a folder: under ``worker = false`` an answer that is late works beside the next one."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    handle = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _shape(logits: Logits) -> tuple[int, int]:
    return logits.shape[0], logits.shape[1]


def _save(path: Path, release: Logits) -> None:
    with path.open("wb") as file:  # given a name, numpy would add to it
        np.save(file, release, allow_pickle=False)


def _read(path: Path) -> _Ledger:
    """Return what has been spent."""
    try:
        content = json.loads(path.read_text())
        runs = {str(run): tuple(map(int, rounds)) for run, rounds in content.get("runs", {}).items()}
        ledger = _Ledger(float(content["spent"]), runs)
    except FileNotFoundError:
        return _Ledger()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BudgetError(f"cannot read the budget in {path}: {error}") from error
    if not 0 <= ledger.spent < math.inf:
        raise BudgetError(f"cannot read the budget in {path}: expected a number >= 0, got {ledger.spent}")
    return ledger


def _write(path: Path, ledger: _Ledger) -> None:
    content = json.dumps({"spent": ledger.spent, "runs": dict(ledger.runs)})
    write_whole(path, lambda partial: partial.write_text(content))
