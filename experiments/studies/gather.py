"""A comparison's folder as one table, and a record of what made it: see :mod:`experiments.studies.record`."""

import json
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import pandas as pd

from experiments.analysis.comparison import Comparison
from experiments.analysis.runs import Run, read_run
from experiments.analysis.settings import effective
from experiments.studies.record import ELSEWHERE, OUTCOMES, Record, fingerprint
from fedkd.errors import FedkdError
from fedkd.settings.declare import Scalar

_ALWAYS = {"partition", "seed"}
_PATH = re.compile(r"(?:(?<=[:,=])|^)[ ]*(?:/|~|\.\./)[^,]*")
_ISOLATED = {"isolated_ece": "ece", "isolated_nll": "test_loss", "isolated_brier": "brier"}


def gather(folder: Path, *, as_they_are: bool = False) -> tuple[pd.DataFrame, Record]:
    """Read the finished runs under ``folder/trials``.

    Args:
        folder: of a comparison.
        as_they_are: take trials of several commits, or of files that no commit has, and say so in the record.

    Returns:
        One column for each setting in which the trials differ (empty where it has no effect), then ``round``,
        ``accuracy`` (mean over the peers), ``worst`` (peer), ``spread`` (standard deviation over the peers), ``ece``,
        ``nll`` in nats, ``brier``, ``bytes`` (up and down, all peers, so far), ``samples`` (private ones of a peer, on
        average), and the controls ``isolated`` (with ``isolated_ece``, ``isolated_nll``,
        ``isolated_brier``), ``channel`` and ``pooled`` of the trial that carried them. And the record beside it.

    Raises:
        FedkdError: it is no comparison's folder, no trial finished, the trials are not of one commit with all its files
            as they were, or they vary files that only their folders tell apart.
    """
    if not (folder / "trials").is_dir():
        raise FedkdError(f"Expected the folder of a comparison, but {folder} has no trials.")
    runs = [read_run(path) for path in sorted((folder / "trials").iterdir())]
    finished = [run for run in runs if run.summary]
    if not finished:
        raise FedkdError(f"Expected finished trials in {folder / 'trials'}, but none is.")
    record = _record(finished, folder, as_they_are=as_they_are)
    used = [key for key in finished[0].settings if key not in ELSEWHERE]
    keys = [key for key in used if key in _ALWAYS or len({run.settings[key] for run in finished}) > 1]
    for key in keys:
        values = {run.settings[key] for run in finished}
        if len({_portable(value) for value in values}) < len(values):
            raise FedkdError(
                f"Expected files under `{key}` of different names, since their folders are left out: rename one."
            )
    record["settings"] = {key: _portable(finished[0].settings[key]) for key in used if key not in keys}
    frame = pd.DataFrame([row for run in finished for row in _rows(run, keys)])
    return frame.sort_values([*keys, "round"], kind="stable", ignore_index=True), record


def write(found: pd.DataFrame, record: Record, path: Path) -> None:
    """Write a CSV file and the JSON file beside it."""
    found.to_csv(path, index=False, float_format="%.6g")
    content = {**record, "sha256": fingerprint(path)}
    path.with_suffix(".json").write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _record(runs: Sequence[Run], folder: Path, *, as_they_are: bool) -> Record:
    commits = Counter(str(run.environment.get("commit") or "none") for run in runs)
    versions = {json.dumps(run.environment.get("versions", {})): run.environment.get("versions", {}) for run in runs}
    clean = len(commits) == len(versions) == 1 and not any(c == "none" or c.endswith("+") for c in commits)
    if not clean and not as_they_are:
        which = ", ".join(f"{commit} ({count})" for commit, count in commits.items())
        which += f", with {len(versions)} sets of versions" if len(versions) > 1 else ""
        raise FedkdError(
            f"Expected the trials in {folder} to be of one commit without changes (+), but they are of {which}. "
            "Run them again from a clean clone, or take them with --as-they-are."
        )
    dates = sorted(str(run.environment["date"])[:10] for run in runs if run.environment.get("date"))
    return {
        "commits": dict(commits),
        "versions": next(iter(versions.values())) if len(versions) == 1 else list(versions.values()),
        "dates": [dates[0], dates[-1]] if dates else [],
        "platform": sorted({str(run.environment.get("platform", "")) for run in runs}),
        "command": portable(_command(folder)),
        "trials": len(runs),
    }


def _command(folder: Path) -> str:
    return Comparison.read(folder).command if (folder / "comparison.json").exists() else ""


def portable(command: str) -> str:
    """Leave the folders of this machine out of a command.

    >>> portable("fedkd run dataset=npz:/home/me/a.npz seed=0")
    'fedkd run dataset=npz:a.npz seed=0'
    """
    return shlex.join(str(_portable(word)) for word in shlex.split(command))


def _portable(value: Scalar) -> Scalar:
    """Leave the folders of this machine, which may be called after its user, out of a setting or a command's word.

    >>> _portable("npz:/home/me/my data/a.npz"), _portable("--checkpoints=/home/me/a.pt,-,../me/b.pt"), _portable("~me")
    ('npz:a.npz', '--checkpoints=a.pt,-,b.pt', '~')
    """
    return _PATH.sub(_name, value) if isinstance(value, str) else value


def _name(path: re.Match[str]) -> str:
    place = Path(path[0].strip())
    at_home = place.name.startswith("~") or place == Path.home()
    return "~" if at_home else place.name


def _rows(run: Run, keys: Sequence[str]) -> Iterable[dict[str, Any]]:
    values = effective(run.settings, keys)
    settings = {key: value and _portable(value) for key, value in zip(keys, values, strict=True)}
    peers = run.summary["peers"]
    held = {
        "samples": fmean(peer["samples"] for peer in peers),
        "isolated": run.control("isolated"),
        **{name: run.isolated(measure) for name, measure in _ISOLATED.items()},
        "channel": run.control("channel"),
        "pooled": run.control("pooled"),
    }
    for point in run.curve():
        yield {**settings, **{name: getattr(point, name) for name in OUTCOMES}, **held}
