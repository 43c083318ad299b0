"""What a study left: ``NAME.csv``, a row for every trial and measured round, and ``NAME.json``, what it is of.

The CSV file has a column for each setting in which the trials differ. The JSON file has all the others, the commit, the
versions, the dates and the command: a row and its JSON file together are a whole configuration and its numbers.
"""

import csv
import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from experiments.analysis.runs import Point, counts_from
from experiments.analysis.settings import control_group, effective
from experiments.analysis.variants import carrier_of, carriers
from fedkd.errors import FedkdError
from fedkd.settings.config import RunConfig, recorded
from fedkd.settings.declare import Scalar

Record = dict[str, object]

OUTCOMES = ("round", "accuracy", "worst", "spread", "ece", "nll", "brier", "bytes")
"""Columns of what was measured: attributes of a :class:`~experiments.analysis.runs.Point`."""

CONTROLS: Mapping[str, tuple[str, ...]] = {
    "isolated": ("isolated", "isolated_ece", "isolated_nll", "isolated_brier"),
    "channel": ("channel",),
    "pooled": ("pooled",),
}
"""Columns of each control."""

ELSEWHERE = {"out-dir", "run-name", "controls", "resume", "trials", "data-dir", "download", "profile"}
"""Settings that say where a trial lies and what was added to it, and nothing of its numbers."""


@dataclass(frozen=True)
class Recorded:
    """One trial.

    Attributes:
        settings: all of them; where one has no effect it has its default.
        points: where it stood, by round.
        carried: the columns of the controls that it carried itself.
        controls: those of the controls that serve it, whichever trial carried them.
        samples: private samples of a peer, on average; NaN if that is not recorded.
    """

    settings: Mapping[str, Scalar]
    points: tuple[Point, ...]
    carried: Mapping[str, float]
    controls: Mapping[str, float]
    samples: float = math.nan

    @property
    def seed(self) -> int:
        """Return its seed."""
        return int(self.settings["seed"])

    @property
    def counts_from(self) -> int:
        """Return the round from which on its accuracy is that of what it is about."""
        return counts_from(self.settings)

    def curve(self) -> list[Point]:
        """Return where it stood, by round."""
        return list(self.points)

    def control(self, name: str) -> float:
        """Return a column of a control that it carried itself; NaN without it."""
        return self.carried[name]


def read_record(path: Path) -> Record:
    """Read a study's JSON file.

    Raises:
        FedkdError: it is not there, or not of this CSV file.
    """
    beside = path.with_suffix(".json")
    try:
        record = dict(json.loads(beside.read_text()))
    except (OSError, ValueError) as error:
        raise FedkdError(f"Expected {beside} to say what {path.name} is of: {error}") from error
    if record.get("sha256") != fingerprint(path):
        raise FedkdError(f"Expected {beside} to be of {path.name}, but that has other content: gather both again.")
    return record


def fingerprint(path: Path) -> str:
    """Return what tells a file's content."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read_trials(path: Path) -> list[Recorded]:
    """Read a study's trials.

    Args:
        path: the CSV file.

    Raises:
        FedkdError: no JSON file beside it says what it is of.
    """
    defaults = RunConfig().to_mapping()
    settings = read_record(path)["settings"]
    assert isinstance(settings, dict)
    common = recorded(settings)
    groups: dict[tuple[str, ...], list[dict[str, str]]] = {}
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        keys = [name for name in reader.fieldnames or () if name in defaults]
        for row in reader:
            groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    found = []
    for values, rows in groups.items():
        varied = {key: _scalar(text, defaults[key]) for key, text in zip(keys, values, strict=True) if text}
        controls = {name: _number(rows[0], name) for columns in CONTROLS.values() for name in columns}
        found.append(
            Recorded({**common, **varied}, tuple(map(_point, rows)), controls, {}, _number(rows[0], "samples"))
        )
    return _served(found)


def contradictions(studies: Mapping[str, Iterable[Recorded]]) -> list[str]:
    """Return a sentence for each configuration whose numbers stand differently in two places.

    Trials that differ only in how many rounds they went on for are one configuration up to where the shorter ends, and
    so are controls of trials that share them.

    Args:
        studies: trials by the study's name.
    """
    known: dict[object, tuple[str, tuple[float, ...]]] = {}
    found = []
    for study, trials in studies.items():
        for trial in trials:
            for key, words, numbers in _numbers(trial):
                place, before = known.setdefault(key, (study, numbers))
                if not all(a == b or (a != a and b != b) for a, b in zip(before, numbers, strict=True)):
                    found.append(f"{words}: {before} in {place}, {numbers} in {study}")
    return found


def _numbers(trial: Recorded) -> Iterable[tuple[object, str, tuple[float, ...]]]:
    """Yield what a number depends on, what it is called, and the numbers."""
    lasting = float(trial.settings["privacy-epsilon"]) > 0  # noise is drawn for as many rounds as there are
    free = ELSEWHERE | {"eval-every"} | (set() if lasting else {"rounds"})
    keys = [key for key in trial.settings if key not in free]
    used = effective(trial.settings, keys)
    named = {key: value for key, value in zip(keys, used, strict=True) if value not in (None, _DEFAULTS[key])}
    for point in trial.points:
        of_round = tuple(float(getattr(point, name)) for name in OUTCOMES if name not in ("round", "bytes"))
        yield (used, point.round), f"{named}, round {point.round}", of_round
        if point.round < int(trial.settings["rounds"]):  # federated averaging sends nothing after its last round
            yield (used, point.round, "bytes"), f"{named}, round {point.round}, bytes", (point.bytes,)
    for name, columns in CONTROLS.items():
        if math.isfinite(trial.control(name)):
            group = control_group(trial.settings, name)
            yield (name, group), f"control {name} of {named}", tuple(trial.control(column) for column in columns)


_DEFAULTS = RunConfig().to_mapping()


def _served(trials: Sequence[Recorded]) -> list[Recorded]:
    """Give every trial the controls that serve it."""
    having = {name: carriers(trials, name) for name in CONTROLS}
    found = []
    for trial in trials:
        controls: dict[str, float] = {}
        for name, columns in CONTROLS.items():
            carrier = carrier_of(trial.settings, name, having[name])
            controls |= {column: carrier.control(column) if carrier else math.nan for column in columns}
        found.append(replace(trial, controls=controls))
    return found


def _point(row: Mapping[str, str]) -> Point:
    numbers = {name: float(row[name]) for name in OUTCOMES if name not in ("round", "bytes")}
    own, seconds = math.nan, math.nan  # not in the file
    return Point(round=int(row["round"]), bytes=int(float(row["bytes"])), own_accuracy=own, seconds=seconds, **numbers)


def _number(row: Mapping[str, str], name: str) -> float:
    return float(row.get(name) or math.nan)


def _scalar(text: str, default: Scalar) -> Scalar:
    return text == "True" if isinstance(default, bool) else type(default)(text)
