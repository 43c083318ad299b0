"""A run or a comparison as a notebook shows it: tables for pandas, and pictures that show themselves."""

import base64
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedkd.results.folder import Row
from fedkd.settings.declare import CONTROLS, Scalar

if TYPE_CHECKING:
    import pandas as pd

_TOLD = ("strategy", "divergence", "dataset", "peers", "rounds", "seed")
_SHOWN = {
    "model": "model", "before": "before", "after": "after", "gain": "gain", "own_after": "own classes",
    "isolated": "isolated", "channel": "true labels",
}  # fmt: skip
_TEXTS = ("peer", "model", "failures")
_SHARES = ("before", "after", "own classes", "isolated", "true labels", "channel", "accuracy", "worst")


@dataclass(frozen=True)
class Picture:
    """A PNG file that shows itself in Jupyter.

    Attributes:
        path: the file.
    """

    path: Path

    def _repr_png_(self) -> bytes:
        return self.path.read_bytes()

    def _html(self) -> str:
        data = base64.b64encode(self._repr_png_()).decode()
        return f'<img alt="{escape(self.path.stem)}" style="max-width: 40em" src="data:image/png;base64,{data}">'


class Pictures(Mapping[str, Picture]):
    """The PNG files of a folder by their names without suffix; all of them show themselves in Jupyter.

    Args:
        folder: need not exist.
    """

    def __init__(self, folder: Path) -> None:
        self._found = {path.stem: Picture(path) for path in sorted(folder.glob("*.png"))}

    def __getitem__(self, name: str) -> Picture:
        return self._found[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)

    def __repr__(self) -> str:
        return f"Pictures({', '.join(self)})"

    def _repr_html_(self) -> str:
        return "\n".join(f"<p>{escape(name)}</p>{picture._html()}" for name, picture in self.items())


@dataclass(frozen=True, eq=False, repr=False)
class OpenRun:
    """One run's folder, as far as it could be read. Jupyter shows its peers and the picture of its accuracy.

    Attributes:
        folder: where it is.
        settings: all of them, by their keys (``kd-weight``); ``peers`` is how many took part.
        rows: of ``rounds.jsonl``.
        summary: ``summary.json``; empty if the run did not finish.
        error: why it did not finish; empty if it did.
        remarks: what has to be said beside its numbers, and what could not be read.
    """

    folder: Path
    settings: Mapping[str, Scalar]
    rows: Sequence[Row]
    summary: Mapping[str, Any]
    error: str = ""
    remarks: Sequence[str] = ()

    @cached_property
    def rounds(self) -> "pd.DataFrame":
        """A line per peer and round, with the columns of ``rounds.jsonl``."""
        import pandas as pd

        return pd.DataFrame([asdict(row) for row in self.rows], columns=[field.name for field in fields(Row)])

    @cached_property
    def peers(self) -> "pd.DataFrame":
        """A line per peer, by its name, with the columns of ``summary.json``.

        What was measured of the isolated control has columns like ``isolated_measures.ece``. Of a run that did not
        finish there are only the model, the accuracy ``before`` and ``after`` as far as it came, and the ``gain``.
        """
        import pandas as pd

        entries = [{**entry, "failures": str(entry.get("failures") or "")} for entry in self.summary.get("peers", ())]
        frame = pd.json_normalize(entries or self._so_far())
        if frame.empty:
            frame = pd.DataFrame(columns=["peer", "model", "before", "after", "gain"])
        numbers = [name for name in frame.columns if name not in _TEXTS]
        frame[numbers] = frame[numbers].apply(pd.to_numeric)
        return frame.set_index("peer")

    @property
    def figures(self) -> Pictures:
        """The run's pictures: ``accuracy``, ``topology`` where there is a graph, ``profile`` if it was measured."""
        return Pictures(self.folder)

    def _so_far(self) -> list[dict[str, Any]]:
        found: dict[str, list[Row]] = {}
        for row in self.rows:
            found.setdefault(row.peer, []).append(row)
        entries = []
        for peer, rows in found.items():
            measured = [row.test_accuracy for row in rows if math.isfinite(row.test_accuracy)] or [math.nan]
            ends = {"before": measured[0], "after": measured[-1], "gain": measured[-1] - measured[0]}
            entries.append({"peer": peer, "model": rows[0].model, **ends})
        return entries

    def _told(self) -> str:
        return ", ".join(f"{key} {self.settings[key]}" for key in _TOLD if key in self.settings)

    def _controls(self) -> str:
        levels = {name: self.summary.get(name) for name in (*CONTROLS, "share_of_channel")}
        return ", ".join(f"{name.replace('_', ' ')} {value:.1%}" for name, value in levels.items() if value is not None)

    def _table(self) -> "pd.DataFrame":
        shown = self.peers[[name for name in _SHOWN if name in self.peers.columns]].rename(columns=_SHOWN)
        return _readable(shown)

    def __repr__(self) -> str:
        lines = [f"run {self.folder.name}: {self._told()}", *self.remarks, *([self.error] if self.error else [])]
        if len(self.peers):
            lines += [self._table().to_string()]
        return "\n".join([*lines, *filter(None, [self._controls()]), str(self.folder)])

    def _repr_html_(self) -> str:
        parts = [f"<p><b>{escape(self.folder.name)}</b>: {escape(self._told())}</p>"]
        parts += [f"<p>{escape(remark)}</p>" for remark in self.remarks]
        if self.error:
            parts.append(f'<pre style="color: #b00020">{escape(self.error)}</pre>')
        if len(self.peers):
            parts.append(_html(self._table()))
        if controls := self._controls():
            parts.append(f"<p>{escape(controls)}</p>")
        if "accuracy" in self.figures:
            parts.append(self.figures["accuracy"]._html())
        return "\n".join([*parts, f"<p><code>{escape(str(self.folder))}</code></p>"])


@dataclass(frozen=True, eq=False, repr=False)
class OpenComparison:
    """A comparison that ran. Jupyter shows its trials and the picture of their accuracy by round.

    Attributes:
        folder: where it is.
        report: the HTML page about it.
        runs: a line per trial, by its name: the settings in which trials differ (none where one has no effect), the
            mean accuracy of the peers ``before`` round 1 and at the end (``accuracy``), that of the ``worst`` peer at
            the end, that of the same peers ``isolated`` and with true labels for teachers (``channel``), the ``bytes``
            of all peers, up and down, and the ``folder``.
        failed: why a trial has no result, by its name.
    """

    folder: Path
    report: Path
    runs: "pd.DataFrame"
    failed: Mapping[str, str]

    @property
    def figures(self) -> Pictures:
        """The report's figures; more than one scenario has numbers before their names."""
        return Pictures(self.folder / "figures")

    def _told(self) -> str:
        return f"{self.folder.name}: {len(self.runs)} trials"

    def _table(self) -> "pd.DataFrame":
        return _readable(self.runs.drop(columns="folder").reset_index(drop=True))

    def __repr__(self) -> str:
        failed = [f"no result: {name}: {why}" for name, why in self.failed.items()]
        return "\n".join([self._told(), self._table().to_string(index=False), *failed, str(self.report)])

    def _repr_html_(self) -> str:
        failed = [f"no result: {name}: {why}" for name, why in self.failed.items()]
        parts = [f"<p>{escape(self._told())}</p>", _html(self._table(), index=False)]
        parts += [f'<p style="color: #b00020">{escape(line)}</p>' for line in failed]
        parts += [picture._html() for name, picture in self.figures.items() if name.endswith("accuracy-by-round")]
        return "\n".join([*parts, f"<p><code>{escape(str(self.report))}</code></p>"])


def _readable(frame: "pd.DataFrame") -> "pd.DataFrame":
    """Return a table with its numbers as people read them: accuracies in per cent, gains in points."""
    import pandas as pd

    def told(name: str, value: Any) -> str:
        if pd.isna(value):
            return "–"
        if name in _SHARES:
            return f"{value:.1%}"
        return f"{100 * value:+.1f}" if name == "gain" else f"{value:,}" if name == "bytes" else f"{value}"

    return pd.DataFrame({name: [told(name, value) for value in frame[name]] for name in frame}, index=frame.index)


def _html(table: "pd.DataFrame", *, index: bool = True) -> str:
    return str(table.to_html(border=0, index=index, index_names=False, escape=True))
