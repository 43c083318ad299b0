"""How long a run takes to the end of its first round, beside an empty Flower app on the same machine.

Both are started by the same launcher, with as many peers, and take turns. The clock starts when `flwr run` is called
(the SuperLink is up by then) and stops when the app has written that its first round is over: the empty app sends an
empty message to every peer and gets one back; ours loads data and models, trains and exchanges.
"""

import statistics
import tempfile
import textwrap
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.bench.measuring import Marks, Watch, leave
from experiments.launch.project import OWN_FOLDER
from experiments.launch.runner import Federation, Outcome, launch
from fedkd.errors import FedkdError

PEERS = 6
REPEATS, QUICK_REPEATS = 3, 1
SETTINGS = {
    "rounds": 1, "schedule": "alternate", "divergence": "js", "pretrain-epochs": 1, "distill-epochs": 1, "controls": "",
    "weighing": "uniform", "robust": "none",
}  # fmt: skip

_APPS = ("empty", "fedkd")
_PROJECT = """
    [project]
    name = "empty"
    version = "0.1.0"
    dependencies = []

    [tool.flwr.app]
    publisher = "fedkd"

    [tool.flwr.app.components]
    serverapp = "empty:server"
    clientapp = "empty:client"

    [tool.flwr.app.config]
"""
_APP = """
    import time
    from pathlib import Path

    from flwr.app import Message, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import ServerApp

    server = ServerApp()
    client = ClientApp()


    @client.train()
    def train(message, context):
        return Message(RecordDict(), reply_to=message)


    @server.main()
    def main(grid, context):
        while len(nodes := list(grid.get_node_ids())) < {peers}:
            time.sleep(0.05)
        waiting = set(grid.push_messages([Message(RecordDict(), node, "train") for node in nodes]))
        while waiting:
            time.sleep(0.05)
            waiting -= {{reply.metadata.reply_to_message_id for reply in grid.pull_messages(waiting)}}
        Path({over!r}).write_text("round 1 is over\\n")
"""


def run(*, quick: bool = False) -> dict[str, Any]:
    """Start both apps in turns; return ``{"ratio": ..., "more_seconds": ..., "rows": [...]}``.

    ``ratio`` is our median wall time over the empty app's, ``more_seconds`` their difference: at most 3 is the goal. A
    row has ``app``, ``seconds``, and ``cpu_seconds`` of all processes up to the same moment.

    Args:
        quick: every app once.

    Raises:
        FedkdError: a run failed.
    """
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="fedkd-start-") as name:
        for turn in range(QUICK_REPEATS if quick else REPEATS):
            over, folder = Path(name) / f"over-{turn}", Path(name) / f"run-{turn}"
            empty = _empty_app(Path(name) / f"empty-{turn}", over)
            rows.append({"app": "empty", **_first_round(empty, {}, over, 1)})
            settings = {**SETTINGS, "out-dir": str(folder)}
            # A row for each peer, in round 0 and in round 1.
            rows.append({"app": "fedkd", **_first_round(OWN_FOLDER, settings, folder / "rounds.jsonl", 2 * PEERS)})
    seconds, cpu = ({app: _median(rows, app, what) for app in _APPS} for what in ("seconds", "cpu_seconds"))
    return {
        "ratio": seconds["fedkd"] / seconds["empty"],
        "more_seconds": seconds["fedkd"] - seconds["empty"],
        "more_cpu_seconds": cpu["fedkd"] - cpu["empty"],
        "peers": PEERS,
        "settings": SETTINGS,
        "rows": rows,
    }


def main(json_path: Path | None = None, *, quick: bool = False) -> None:
    """Print a table of :func:`run`, and write it to ``json_path`` if given."""
    from rich.console import Console
    from rich.table import Table

    result = run(quick=quick)
    table = Table(title=f"From `flwr run` to the end of the first round, {PEERS} peers", box=None)
    table.add_column("app")
    for column in ("seconds", "CPU seconds"):
        table.add_column(column, justify="right")
    for row in result["rows"]:
        table.add_row(row["app"], f"{row['seconds']:.1f}", f"{row['cpu_seconds']:.1f}")
    Console().print(table)
    print(
        f"fedkd over the empty app, medians: {result['more_seconds']:+.1f} s, {result['more_cpu_seconds']:+.1f} CPU s, "
        f"{result['ratio']:.2f} times"
    )
    leave(result, json_path)


def _first_round(app: Path, settings: Mapping[str, Any], file: Path, lines: int) -> dict[str, float]:
    """Launch an app that is over with its first round when a file has some number of lines."""
    with Watch() as watch:

        def note() -> tuple[float, float]:
            return time.monotonic(), watch.cpu_seconds()

        began = time.monotonic()
        with Marks(file, [lines], note) as marks:
            outcome: Outcome = launch(app, settings, Federation(peers=PEERS), out=lambda line: None)
    if not outcome.completed or not marks.noted:
        raise FedkdError(f"the benchmark's run failed: {outcome.reason or outcome.status}")
    ((at, cpu_seconds),) = marks.noted
    return {"seconds": at - began - outcome.phases["superlink"], "cpu_seconds": cpu_seconds}


def _median(rows: list[dict[str, Any]], app: str, what: str) -> float:
    return statistics.median(row[what] for row in rows if row["app"] == app)


def _empty_app(folder: Path, over: Path) -> Path:
    folder.mkdir()
    (folder / "pyproject.toml").write_text(textwrap.dedent(_PROJECT))
    (folder / "empty.py").write_text(textwrap.dedent(_APP.format(peers=PEERS, over=str(over))))
    return folder
