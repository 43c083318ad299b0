"""What a run leaves on disk: ``config.json``, ``rounds.jsonl``, ``summary.json`` and ``accuracy.png``."""

import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from fedkd import __version__
from fedkd.errors import FedkdError, SettingError
from fedkd.results.claim import LEFT, MODELS, STATES

_SECRET = re.compile(r"--?[\w-]*(token|secret|password|key)", re.IGNORECASE)
_PACKAGES = ("flwr", "ray", "torch", "torchvision", "numpy", "flwr-datasets", "scikit-learn", "safetensors")


@dataclass(frozen=True)
class Row:
    """One line of ``rounds.jsonl``: one peer in one round. NaN becomes null.

    ``status`` is ``ok``, ``error`` (the peer or Flower said so), ``late`` (no answer in time; what was measured is
    there if the answer came afterwards), ``refused`` (its knowledge could not be used) or ``absent`` (not drawn for
    this round); ``error`` has the reason. ``epsilon`` is what the peer's published knowledge amounts to so far, with
    the run's ``privacy-delta``, or what its class counts do where they alone are noised; ``samples_seen`` counts the
    private samples that the peer was trained on so far, each as often as it was drawn; ``run`` is the token of the run,
    which the folder adds.
    """

    round: int
    peer: str
    model: str
    teachers: Sequence[str]
    test_accuracy: float = math.nan
    own_accuracy: float = math.nan
    test_loss: float = math.nan
    ece: float = math.nan
    brier: float = math.nan
    kd_loss: float = math.nan
    local_loss: float = math.nan
    bytes_up: int = 0
    bytes_down: int = 0
    seconds: float = math.nan
    temperature: float = math.nan
    kd_weight: float = math.nan
    epsilon: float = math.nan
    samples_seen: float = math.nan
    refused_letters: int = 0
    status: str = "ok"
    error: str = ""
    run: str = ""


@dataclass(frozen=True)
class Measures:
    """What is measured of a model on the test set, as in a :class:`Row`."""

    test_accuracy: float = math.nan
    own_accuracy: float = math.nan
    test_loss: float = math.nan
    ece: float = math.nan
    brier: float = math.nan


@dataclass(frozen=True)
class PeerSummary:
    """One peer before and after.

    Attributes:
        peer: its name.
        model: the name of its model.
        parameters: trainable parameters.
        samples: private samples that it trains on; ``held_out``: those that it never trains on.
        before: test accuracy before round 1; ``after``: at the last measurement; ``own_*``: on its own classes.
        isolated: test accuracy of the same peer with local training only, after the same private batches as it had
            seen at its own last measurement; NaN without that control.
        isolated_measures: all that was measured of that control then.
        channel: test accuracy of the same peer that was taught the proxy set's true labels, in the same rounds and at
            the same point; NaN without that control.
        temperature: the one it ended with; ``kd_weight`` likewise.
        samples_seen: private samples that it was trained on, as in a :class:`Row`; NaN if it does not tell.
        failures: rounds by status, where that was not ``ok``.
    """

    peer: str
    model: str
    parameters: int
    samples: int
    before: float
    after: float
    own_before: float
    own_after: float
    isolated: float = math.nan
    isolated_measures: Measures = Measures()
    temperature: float = math.nan
    kd_weight: float = math.nan
    samples_seen: float = math.nan
    failures: Mapping[str, int] = field(default_factory=dict)
    held_out: int = 0
    channel: float = math.nan

    @property
    def gain(self) -> float:
        """Return the accuracy gained since before round 1."""
        return self.after - self.before


@dataclass(frozen=True)
class Summary:
    """A finished run.

    Attributes:
        peers: one entry per peer.
        isolated: mean final accuracy of the same peers with local training only; NaN without that control.
        isolated_by_round: its mean by round, from round 0; empty without that control. A peer that did not take part in
            a round, or under `async` did fewer rounds than others, stands where it stood.
        channel: mean final accuracy of the same peers with the proxy set's true labels in their teachers' place; NaN
            without that control. ``channel_by_round``: likewise by round.
        pooled: final accuracy of one model on all private data; NaN without that control.
        pooled_samples_seen: private samples it was trained on; ``samples_seen``: all peers together.
        totals: rounds, bytes and seconds of the whole run.
        round_seconds: wall time of every round, from round 0; empty under `async`.
        classes: their names, in the order of the logits.
        topology: degree, diameter and spectral gap of the graph; empty without one.
        privacy: the (ε, δ) that is promised and under which conditions; empty without such a promise.
        caveats: what has to be said beside these numbers, a sentence each.
        models: where the peers' models are: a folder below the run's, or with whom; empty if none was kept.
    """

    peers: Sequence[PeerSummary]
    isolated: float = math.nan
    isolated_by_round: Sequence[float] = ()
    channel: float = math.nan
    channel_by_round: Sequence[float] = ()
    pooled: float = math.nan
    pooled_model: str = ""
    pooled_samples_seen: float = math.nan
    samples_seen: float = math.nan
    totals: Mapping[str, float] = field(default_factory=dict)
    round_seconds: Sequence[float] = ()
    classes: Sequence[str] = ()
    topology: Mapping[str, float | str] = field(default_factory=dict)
    privacy: Mapping[str, Any] = field(default_factory=dict)
    caveats: Sequence[str] = ()
    models: str = ""

    def mean(self, what: str) -> float:
        """Return the mean of a number over the peers that have it (``before``, ``after``, ``gain``, ...)."""
        return mean([getattr(peer, what) for peer in self.peers])

    @property
    def gain_over_isolated(self) -> float:
        """Return the mean difference to isolated, over the peers that have both."""
        return mean([peer.after - peer.isolated for peer in self.peers])

    @property
    def share_of_channel(self) -> float:
        """Return the :func:`share_of_channel`, over the peers that have both controls."""
        both = [p for p in self.peers if math.isfinite(p.after + p.isolated + p.channel)]
        return share_of_channel(*(mean([getattr(p, what) for p in both]) for what in ("after", "isolated", "channel")))


class RunFolder:
    """The folder of one run.

    Args:
        path: made if it is not there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._run: str | None = None
        path.mkdir(parents=True, exist_ok=True)

    @property
    def run(self) -> str:
        """The token of the run that the folder is of, as its config.json says; empty without one."""
        if self._run is None:
            self._run = str(self.read_config()["run"]) if (self.path / "config.json").exists() else ""
        return self._run

    def write_config(self, settings: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
        """Write ``config.json``: every setting, the versions, the commit, and facts about this run."""
        self._write("config.json", {"settings": dict(settings), **facts, "environment": environment()})
        self._run = None

    def add_facts(self, facts: Mapping[str, Any]) -> None:
        """Add to ``config.json`` what became known after the run began."""
        self._write("config.json", {**self.read_config(), **facts})

    def clear(self) -> None:
        """Remove what an earlier try in this folder left, so that nothing of it can be taken for this one's."""
        for name in LEFT:
            (self.path / name).unlink(missing_ok=True)
        for name in (STATES, MODELS):
            shutil.rmtree(self.path / name, ignore_errors=True)

    def read_config(self) -> dict[str, Any]:
        """Read ``config.json``.

        Raises:
            SettingError: it is not there or cannot be read.
        """
        try:
            content = json.loads((self.path / "config.json").read_text())
            return {**content, "settings": dict(content["settings"]), "run": str(content["run"])}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SettingError("resume", str(self.path), f"the folder of a run with a config.json ({error})") from error

    def rewind(self, round: int) -> list[Row]:
        """Cut the files of rows back to rounds up to one, a line cut off by a kill included; return the rows.

        Raises:
            FedkdError: rows of another run are among them.
        """
        rows = []
        for line in self._lines("rounds.jsonl"):
            try:
                row = read_row(line)
            except ValueError:
                continue
            rows.append(row)
        refuse_mixture((row.run for row in rows), self.run, self.path / "rounds.jsonl")
        rows = [row for row in rows if row.round <= round]
        self._write_text("rounds.jsonl", "".join(row_line(row) for row in rows))
        for name in ("reliability.jsonl", "profile.jsonl"):
            if (self.path / name).exists():
                kept = [x for x in self._lines(name) if x.endswith("}") and json.loads(x)["round"] <= round]
                self._write_text(name, "".join(line + "\n" for line in kept))
        return rows

    def _lines(self, name: str) -> list[str]:
        path = self.path / name
        return path.read_text().splitlines() if path.exists() else []

    def append(self, rows: Sequence[Row]) -> None:
        """Append the rows of a closed round, in one write."""
        lines = "".join(row_line(replace(row, run=self.run)) for row in rows)
        with (self.path / "rounds.jsonl").open("a") as file:
            file.write(lines)
            file.flush()
            os.fsync(file.fileno())

    def write_summary(self, summary: Summary) -> None:
        """Write ``summary.json``."""
        content = {"run": self.run, **asdict(summary)}
        for entry, peer in zip(content["peers"], summary.peers, strict=True):
            entry["gain"] = peer.gain
        content["mean"] = {name: summary.mean(name) for name in ("before", "after", "gain", "own_before", "own_after")}
        content["gain_over_isolated"] = summary.gain_over_isolated
        content["share_of_channel"] = summary.share_of_channel
        self._write("summary.json", content)

    def replace_rows(self, rows: Mapping[int, Row]) -> None:
        """Put rows in the place of earlier ones, by the number of their line from 0."""
        lines = self._lines("rounds.jsonl")
        for number, row in rows.items():
            lines[number] = row_line(replace(row, run=self.run)).rstrip("\n")
        self._write_text("rounds.jsonl", "".join(line + "\n" for line in lines))

    def append_reliability(self, round: int, peer: str, bins: Mapping[str, Sequence[float]]) -> None:
        """Append the bins of one peer's reliability diagram to ``reliability.jsonl``."""
        with (self.path / "reliability.jsonl").open("a") as file:
            file.write(json.dumps(_plain({"round": round, "peer": peer, **bins})) + "\n")

    def append_profile(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Append where peers' time went to ``profile.jsonl``, a line per peer and round."""
        if lines:
            with (self.path / "profile.jsonl").open("a") as file:
                file.write("".join(json.dumps(_plain(line)) + "\n" for line in lines))

    def read_profile(self) -> list[dict[str, Any]]:
        """Read ``profile.jsonl``; empty where nothing was measured."""
        return [json.loads(line) for line in self._lines("profile.jsonl")]

    def write_error(self, text: str) -> None:
        """Write ``error.txt``: why there is no summary."""
        self._write_text("error.txt", text.rstrip() + "\n")

    def _write(self, name: str, content: Mapping[str, Any]) -> None:
        self._write_text(name, json.dumps(_plain(content), indent=2) + "\n")

    def _write_text(self, name: str, text: str) -> None:
        partial = self.path / f".{name}.partial"
        partial.write_text(text)
        partial.replace(self.path / name)


def refuse_mixture(found: Iterable[str], run: str, file: Path) -> None:
    """Refuse what two runs left in one folder: nothing that is made of it would be true.

    Args:
        found: the tokens of runs in a file; empty for one that says none.
        run: the run's token, as its ``config.json`` says.
        file: where they are.

    Raises:
        FedkdError: names both runs.
    """
    if others := sorted(set(found) - {run, ""}):
        raise FedkdError(
            f"{file} is of run {others[0]}, at least in part, but the config.json beside it of run {run}: two runs are "
            "mixed there; run it again in a folder of its own"
        )


def mean(values: Sequence[float]) -> float:
    """Return the mean of those values that are finite; NaN if none is."""
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan


def share_of_channel(after: float, isolated: float, channel: float) -> float:
    """Return (after − isolated)/(channel − isolated): how much of what true labels would have brought the exchange did.

    1 is as much as labels; below 0 the exchange costs accuracy.

    Args:
        after: accuracy with the exchange.
        isolated: without it.
        channel: with true labels in the teachers' place.

    Returns:
        NaN where a number is missing, or where true labels bring nothing.

    >>> share_of_channel(0.75, 0.5, 1.0)
    0.5
    """
    return (after - isolated) / (channel - isolated) if channel > isolated and math.isfinite(after) else math.nan


def row_line(row: Row) -> str:
    """Return a row as a line of ``rounds.jsonl``."""
    return json.dumps(_plain(asdict(row))) + "\n"


_ALLOWED: Mapping[Any, tuple[type, ...]] = {float: (float, int), int: (int,), str: (str,)}


def read_row(line: str) -> Row:
    """Read a line of ``rounds.jsonl``.

    Raises:
        ValueError: it is not a row.
    """
    content = json.loads(line)
    if not isinstance(content, dict):
        raise ValueError(f"expected a row, but got {line!r}")
    kinds = {f.name: f.type for f in fields(Row)}
    values: dict[str, Any] = {k: math.nan if v is None and kinds.get(k) is float else v for k, v in content.items()}
    if wrong := [k for k, v in values.items() if kinds.get(k) in _ALLOWED and type(v) not in _ALLOWED[kinds[k]]]:
        raise ValueError(f"unexpected {wrong[0]} = {values[wrong[0]]!r}")
    try:
        return Row(**values)
    except TypeError as error:
        raise ValueError(f"expected a row, but got {line!r}") from error


def environment() -> dict[str, Any]:
    """Return what a reader needs to know to run it again: versions, machine, command, date, git commit."""
    versions = {"fedkd": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "versions": versions,
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "command": without_secrets(sys.argv),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": os.environ.get("FEDKD_COMMIT") or git_commit(Path(__file__).parent),
    }


def without_secrets(words: Sequence[str]) -> list[str]:
    """Return a command's words with what its options keep secret left out; Flower starts an app with ``--token``.

    >>> without_secrets(["flwr-simulation", "--token", "abc", "--run-id=1", "--auth-key=k"])
    ['flwr-simulation', '--token', '***', '--run-id=1', '--auth-key=***']
    """
    told = []
    for word, before in zip(words, ["", *words], strict=False):
        name, equals, _ = word.partition("=")
        if _SECRET.match(before) and "=" not in before:
            told.append("***")
        else:
            told.append(f"{name}=***" if equals and _SECRET.match(name) else word)
    return told


def git_commit(folder: Path) -> str:
    """Return the commit that is checked out in a folder, with ``+`` where files differ; empty outside git.

    An environment inside of some repository is outside: its commit says nothing of what is installed there.
    """
    kept = ["git", "ls-files", "--error-unmatch", "."]
    described = ["git", "describe", "--always", "--dirty=+", "--abbrev=40", "--exclude=*"]
    said = ""
    for command in (kept, described):
        try:
            run = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=10, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return ""
        if run.returncode:
            return ""
        said = run.stdout.strip()
    return said


def _plain(value: Any) -> Any:
    """Make JSON of it: NaN and infinities become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
