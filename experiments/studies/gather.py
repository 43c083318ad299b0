"""A comparison's folder as one table: a row for every trial and round in which its peers were measured."""

import math
from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from experiments.settings import effective
from experiments.study import Run, read_run

_OUTCOMES = ("round", "accuracy", "worst", "spread", "ece", "bytes")
_CALIBRATION = {"ece": "ece", "nll": "test_loss", "brier": "brier"}
_ALWAYS = {"partition", "seed"}
_NEVER = {"out-dir", "run-name", "controls", "resume", "trials", "data-dir", "peers"}


def gather(folder: Path) -> pd.DataFrame:
    """Read the finished runs under ``folder/trials``.

    Returns:
        One column for each setting in which the trials differ (empty where it has no effect), then ``round``,
        ``accuracy`` (mean over the peers), ``worst`` (peer), ``spread`` (standard deviation over the peers), ``ece``,
        ``nll`` in nats, ``brier``, ``bytes`` (up and down, all peers, so far), and the controls ``isolated`` (with
        ``isolated_ece``, ``isolated_nll``, ``isolated_brier``) and ``pooled`` of the trial that carried them.
    """
    runs = [read_run(path) for path in sorted((folder / "trials").iterdir())]
    finished = [run for run in runs if run.summary]
    keys = [
        key
        for key in finished[0].settings
        if key in _ALWAYS or (key not in _NEVER and len({run.settings[key] for run in finished}) > 1)
    ]
    frame = pd.DataFrame([row for run in finished for row in _rows(run, keys)])
    return frame.sort_values([*keys, "round"], kind="stable", ignore_index=True)


def _rows(run: Run, keys: Iterable[str]) -> Iterable[dict[str, object]]:
    keys = list(keys)
    settings = dict(zip(keys, effective(run.settings, keys), strict=True))
    controls = {name: run.control(name) for name in ("isolated", "pooled")}
    controls |= {f"isolated_{name}": run.isolated(what) for name, what in _CALIBRATION.items()}
    for point in run.curve():
        rows = [row for row in run.rows if row.round == point.round and math.isfinite(row.test_accuracy)]
        means = {
            "nll": sum(row.test_loss for row in rows) / len(rows),
            "brier": sum(row.brier for row in rows) / len(rows),
        }
        yield {**settings, **{name: getattr(point, name) for name in _OUTCOMES}, **means, **controls}
