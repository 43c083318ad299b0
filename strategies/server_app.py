"""The Flower ServerApp: reads the settings, runs the relay, leaves the results."""

import logging
import time
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedkd.config import RunConfig
from fedkd.errors import FedkdError
from fedkd.plots import accuracy_png
from fedkd.results import RunFolder
from fedkd.source import source_hash
from fedkd.workdir import STARTED_IN
from strategies.averaged import Averaged
from strategies.console import closing_line, summary_table
from strategies.post import Post
from strategies.relay import Relay
from strategies.strategy import Strategy

STRATEGIES: dict[str, type[Strategy]] = {"averaged": Averaged}

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run one federation."""
    config = RunConfig.from_mapping(context.run_config)
    folder = RunFolder(_out_dir(config))
    folder.write_config(config.to_mapping(), {"run_id": context.run_id, "source": source_hash()})
    print(f"results go to {folder.path}", flush=True)
    post = Post(grid, time_to_live=2 * config.round_timeout)
    relay = Relay(post, config, STRATEGIES[config.strategy], folder, say=_say)
    summary = relay.run()
    folder.write_summary(summary)
    accuracy_png(folder.path / "accuracy.png", relay.rows, summary, title=_title(config))
    _say(summary_table(summary))
    _say(closing_line(summary))
    _say(f"results: {folder.path}")


def _out_dir(config: RunConfig) -> Path:
    if config.out_dir:
        return (STARTED_IN / Path(config.out_dir).expanduser()).absolute()
    return STARTED_IN / "runs" / f"{time.strftime('%Y%m%d-%H%M%S')}-{config.run_name}"


def _title(config: RunConfig) -> str:
    return f"{config.run_name}: {config.strategy}, {config.divergence}, {config.dataset}, {config.partition}"


def _say(line: str) -> None:
    print(line, flush=True)


class _NoStack(logging.Filter):
    """A user's error is one line in the log: its message says it all."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if isinstance(record.exc_info, tuple) else None
        if isinstance(error, FedkdError):
            record.msg, record.args, record.exc_info = "error: %s", (str(error),), None
        return True


logging.getLogger("flwr").addFilter(_NoStack())
