"""Runs a small federation in this process, for the tests that look at what it did."""

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, RecordDict
from local_grid import LocalGrid

from clients.client_app import app as client_app
from fedkd.settings.config import RunConfig
from strategies import server_app

SMALL = {
    "partition": "iid",
    "models": "mlp,cnn-small",
    "proxy-size": 60,
    "pretrain-epochs": 2,
    "rounds": 2,
    "distill-epochs": 1,
    "controls": "",
}


@dataclass(frozen=True)
class Finished:
    """A federation that ran to its end."""

    folder: Path
    grid: LocalGrid
    settings: dict[str, Any]

    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "rounds.jsonl").read_text().splitlines()]

    def timeless_rows(self) -> list[dict[str, Any]]:
        return [{name: value for name, value in row.items() if name not in ("seconds", "run")} for row in self.rows()]

    def summary(self) -> dict[str, Any]:
        return json.loads((self.folder / "summary.json").read_text())


def local_grid(path: Path, peers: int = 3, **options: Any) -> LocalGrid:
    return LocalGrid(client_app, peers, path / "state", **options)


@contextmanager
def without_pictures() -> Iterator[None]:
    """Draw nothing: a picture takes twice as long as all else in a small run."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name in ("accuracy_png", "topology_png", "profile_png"):
            monkeypatch.setattr(server_app, name, lambda *_, **__: None)
        yield


class Killed(BaseException):
    """The process ends, at a place that a test chooses."""


def killed(path: Path, peers: int, *, peer: int, round: int, **settings: Any) -> LocalGrid:
    """Run a federation until one peer is sent the mail of a round, which kills the run; return its grid, to resume on.

    Peers have forgotten what was in memory.
    """
    grid = local_grid(path, peers)

    def kill(partition: int, message: Any) -> None:
        if message.content["mail"]["round"] == round and partition == peer:
            raise Killed

    grid.fault = kill
    with pytest.raises(Killed):
        federate(path, peers, grid=grid, **settings)
    grid.fault = None
    grid.forget()
    return grid


def federate(
    path: Path, peers: int = 3, *, grid: LocalGrid | None = None, pictures: bool = False, **settings: Any
) -> Finished:
    """Run a federation; settings with underscores for hyphens. ``seats`` is how many peers share a grid's nodes."""
    grid = grid or local_grid(path, peers)
    changed = {name.replace("_", "-"): value for name, value in settings.items()}
    changed |= {"peers": changed.pop("seats")} if "seats" in changed else {}
    config = {**RunConfig().to_mapping(), **SMALL, "out-dir": str(path / "run"), **changed}
    with nullcontext() if pictures else without_pictures():
        server_app.app(grid, Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config=config))
    return Finished(path / "run", grid, config)
