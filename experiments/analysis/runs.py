"""Finished runs read back from their folders."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

from fedkd.errors import FedkdError
from fedkd.results.folder import Row, read_row, refuse_mixture
from fedkd.settings.config import recorded, spelled
from fedkd.settings.declare import Scalar

_OF_A_PEER = ("peer", "model", "before", "after", "isolated", "temperature", "kd_weight")

_MEANS = ("own_accuracy", "ece", "test_loss", "brier")
"""Of a row; the test loss is the negative log-likelihood."""


@dataclass(frozen=True)
class Point:
    """Where a run stands at the end of a round: over its peers, and what it has cost so far.

    Attributes:
        round: its number.
        accuracy: mean test accuracy; ``worst``: the lowest; ``spread``: their standard deviation.
        own_accuracy: mean accuracy on the peers' own label mixes.
        ece: mean expected calibration error; ``nll``, in nats, and ``brier`` likewise.
        bytes: of all encoded arrays of all peers, up and down, since the start.
        seconds: wall time since the end of round 0; NaN where that is not known.
    """

    round: int
    accuracy: float
    worst: float
    spread: float
    own_accuracy: float
    ece: float
    nll: float
    brier: float
    bytes: int
    seconds: float


@dataclass(frozen=True)
class Run:
    """One run's folder, as far as it could be read.

    Attributes:
        path: the folder.
        name: of the folder.
        settings: all of them; ``peers`` is how many took part, 0 if it was stopped before that was known; likewise
            ``proxy-size`` where all of a proxy set was taken.
        environment: versions, machine, commit.
        rows: of ``rounds.jsonl``.
        summary: ``summary.json``; empty if the run did not finish.
        problems: what could not be read, by file and line.
        error: why it did not finish.
        simulated: whether its peers were stand-ins on one machine.
        caveats: what has to be said beside its numbers.
    """

    path: Path
    name: str
    settings: Mapping[str, Scalar]
    environment: Mapping[str, Any]
    rows: tuple[Row, ...]
    summary: Mapping[str, Any]
    problems: tuple[str, ...] = ()
    error: str = ""
    simulated: bool = True
    caveats: tuple[str, ...] = ()

    @property
    def seed(self) -> int:
        """Return its seed."""
        return int(self.settings["seed"])

    @property
    def starts_distilled(self) -> bool:
        """Tell whether it is federated averaging from a model that was distilled from the peers' own."""
        return self.settings["strategy"] == "fedavg" and self.settings["fedavg-start"] == "distilled"

    @property
    def counts_from(self) -> int:
        """Return the round from which on its accuracy is that of what it is about."""
        return counts_from(self.settings)

    @property
    def peers(self) -> tuple[str, ...]:
        """Return the peers' names."""
        return tuple(dict.fromkeys(row.peer for row in self.rows))

    @property
    def models(self) -> tuple[str, ...]:
        """Return what the peers' models are called, sorted."""
        return tuple(sorted({row.peer: row.model for row in self.rows}.values()))

    def curve(self) -> list[Point]:
        """Return where it stood after every round in which peers were measured.

        A peer that was not measured in a round stands where it stood before. Round 0 costs bytes but no seconds: it
        loads or trains the models that the peers bring, and whichever run comes first does that for all after it.
        """
        return self._curve

    @cached_property
    def _curve(self) -> list[Point]:
        totals = self.summary.get("totals", {})
        by_round: dict[int, list[Row]] = {}
        for row in self.rows:
            by_round.setdefault(row.round, []).append(row)
        in_rows = sum(row.bytes_up + row.bytes_down for row in self.rows)
        # A model that is merged for federated averaging travels between the rounds and is due before round 1. Beside a
        # line that was left out, what is missing in the rows would be taken for it.
        known = bool(totals) and self.starts_distilled and not self.problems
        unseen = int(totals.get("bytes_up", 0)) + int(totals.get("bytes_down", 0)) - in_rows if known else 0
        seconds = list(self.summary.get("round_seconds") or [])
        last: dict[str, Row] = {}
        points, spent = [], 0
        for round in sorted(by_round):
            spent += sum(row.bytes_up + row.bytes_down for row in by_round[round])
            spent += max(0, unseen) if round == 1 else 0
            measured = [row for row in by_round[round] if math.isfinite(row.test_accuracy)]
            last |= {row.peer: row for row in measured}
            if not measured:
                continue
            accuracies = [row.test_accuracy for row in last.values()]
            points.append(
                Point(
                    round,
                    fmean(accuracies),
                    min(accuracies),
                    pstdev(accuracies),
                    *(fmean(getattr(row, what) for row in last.values()) for what in _MEANS),
                    bytes=spent,
                    seconds=sum(seconds[1 : round + 1]) if round < len(seconds) else math.nan,
                )
            )
        return points

    def control(self, name: str) -> float:
        """Return the final accuracy of a control (``isolated``, ``channel``, ``pooled``); NaN without it."""
        value = self.summary.get(name)
        return math.nan if value is None else float(value)

    def isolated(self, what: str) -> float:
        """Return the peers' mean of a measure of their isolated controls (``test_loss``, as in a row), or NaN."""
        found = [(peer.get("isolated_measures") or {}).get(what) for peer in self.summary.get("peers", ())]
        values = [float(value) for value in found if value is not None]
        return fmean(values) if values else math.nan

    @property
    def schedule(self) -> Mapping[tuple[str, int], float]:
        """Return, by peer and round, on how many private samples a peer had been trained, where it told."""
        return {(row.peer, row.round): row.samples_seen for row in self.rows if math.isfinite(row.samples_seen)}

    @property
    def taught(self) -> frozenset[tuple[str, int]]:
        """Return the peers and rounds in which a peer says that it had a teacher."""
        return frozenset((row.peer, row.round) for row in self.rows if math.isfinite(row.kd_loss))


def counts_from(settings: Mapping[str, Scalar]) -> int:
    """Return the round from which on a run's accuracy is that of what it is about.

    Federated averaging that does not start cold measures in round 0 the peers' models before anything is averaged. It
    then leaves them behind: they reach nothing. The first common model is measured in round 1.
    """
    return int(settings["strategy"] == "fedavg" and settings["fedavg-start"] != "cold")


def read_run(path: Path) -> Run:
    """Read a run's folder. A line of ``rounds.jsonl`` that cannot be read is named and costs nothing else.

    Raises:
        FedkdError: it is not the folder of a run, or what two runs left is mixed there.
    """
    try:
        config = json.loads((path / "config.json").read_text())
        settings = recorded(config["settings"])
        environment = dict(config.get("environment", {}))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FedkdError(f"Expected the folder of a run with its config.json, but got {path}: {error}") from error
    problems: list[str] = []
    rows: list[Row] = []
    rounds = path / "rounds.jsonl"
    for number, line in enumerate(rounds.read_text(errors="replace").splitlines() if rounds.exists() else [], 1):
        try:
            rows.append(read_row(line))
        except ValueError as error:
            problems.append(f"{rounds}, line {number}: left out, not a row ({_brief(str(error))})")
    run = str(config.get("run", ""))
    refuse_mixture((row.run for row in rows), run, rounds)
    summary: Mapping[str, Any] = {}
    if (path / "summary.json").exists():
        try:
            summary = _read_summary(path / "summary.json")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            problems.append(f"{path / 'summary.json'}: left out, not a run's summary ({_brief(repr(error))})")
    refuse_mixture([str(summary.get("run", ""))], run, path / "summary.json")
    failure = path / "error.txt"
    text = failure.read_text(errors="replace").strip() if failure.exists() else "" if summary else "not finished"
    settings["peers"] = len({row.peer for row in rows}) or config.get("peers") or settings["peers"]
    simulated, caveats = bool(config.get("simulated", True)), tuple(map(str, config.get("caveats", ())))
    if simulated:
        settings = spelled(settings)
    if settings["proxy-size"] == 0 and not (simulated and settings["proxy"] == "split"):
        samples = config.get("proxy_samples", 0)
        settings["proxy-size"] = samples if isinstance(samples, int) else 0
    return Run(path, path.name, settings, environment, tuple(rows), summary, tuple(problems), text, simulated, caveats)


def _read_summary(path: Path) -> Mapping[str, Any]:
    """Read a summary as far as reports use it; any error of a wrong kind of content may come out."""
    content = json.loads(path.read_text())
    missing = [name for entry in content["peers"] for name in _OF_A_PEER if name not in entry]
    if missing or not content["peers"]:
        raise ValueError(f"no {missing[0]}" if missing else "no peers")
    sum(content.get("totals", {}).values()) + sum(content.get("round_seconds") or [])
    return dict(content)


def _brief(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "..."
