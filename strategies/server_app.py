"""The Flower ServerApp: reads the settings, runs the relay, leaves the results."""

import logging
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedkd.errors import FedkdError
from fedkd.privacy import promise_line
from fedkd.results.claim import MODELS, held, new_folder, refuse_taken
from fedkd.results.folder import RunFolder, Summary
from fedkd.results.picture import accuracy_png, profile_png, topology_png
from fedkd.results.profile import profile_table
from fedkd.settings.config import RunConfig
from fedkd.settings.effect import without_effect
from fedkd.settings.rules import split_list
from fedkd.source import source_hash
from fedkd.workdir import STARTED_IN
from strategies.registry import strategy_class
from strategies.relay.asynchronous import Asynchronous
from strategies.relay.console import MOST_SHOWN, closing_line, summary_table, telling_line, topology_line
from strategies.relay.controls import conclude
from strategies.relay.failures import never_trained
from strategies.relay.introductions import introduce
from strategies.relay.post import Post
from strategies.relay.resuming import changed_since, resumed
from strategies.relay.rounds import Relay, RelayError
from strategies.relay.trials import Say, read_trials, run_trials

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run one federation, go on with one that was stopped, or run the trials of a file one after another."""
    config = RunConfig.from_mapping(context.run_config)
    federation = partial(_run, grid, context.run_id)
    if config.trials:
        run_trials(read_trials(_absolute(config.trials), config), federation, say=_say)
        return
    with _folder(config) as folder:
        federation(config, folder, say=_say)


def _run(grid: Grid, run_id: int, config: RunConfig, folder: RunFolder, *, say: Say) -> None:
    began, given = time.monotonic(), config
    config = resumed(config, folder.path) if config.resume else config.effective()
    chosen = strategy_class(config)
    if not config.resume:
        folder.clear()
        facts = {"run": secrets.token_hex(8), "flower_run_id": run_id, "source": source_hash()}
        folder.write_config(config.to_mapping(), facts)
    run = folder.run
    say(f"results go to {folder.path}")
    for line in _overruled(given, config):
        say(line)
    if config.resume and (changed := changed_since(folder.read_config())):
        say(changed)
    for line in filter(None, (telling_line(config), promise_line(config))):
        say(line)
    post = Post(grid, time_to_live=2 * config.round_timeout)
    say("peers introduce themselves ...")
    members = introduce(post, config, run=run, state_dir=str(folder.path / "peers"))
    for m in members[:MOST_SHOWN]:
        key = f", key {m.key_fingerprint()}" if config.sealed else ""
        held_out = f" and {m.held_out:,} held out" if m.held_out else ""
        say(f"{m.name}: {m.model}, {m.parameters:,} parameters, {m.samples:,} private samples{held_out}{key}")
    if (more := len(members) - MOST_SHOWN) > 0:
        say(f"and {more:,} more")
    caveats = [caveat for m in members if (caveat := m.caveat())]
    for line in caveats[:MOST_SHOWN]:
        say(line)
    samples = config.proxy_size or members[0].proxy_shape[0]
    strategy = chosen(config.knowing(samples), len(members), len(members[0].classes))
    if strategy.topology:
        say(topology_line(strategy.topology))
    relay = Relay(post, members, config, strategy, folder, run=run, say=say, resume=bool(config.resume), began=began)
    folder.add_facts({"peers": len(members), "proxy_samples": samples, "simulated": post.simulated, "caveats": caveats})
    if relay.ledger.round < 0:
        say(f"peers {'train' if config.pretrain_epochs else 'measure'} their models ...")
    relay.run()
    if config.mode == "async":
        Asynchronous(relay, say=say).run()
    if config.controls:
        say(f"controls {', '.join(split_list(config.controls))} ...")
    closed = time.monotonic()
    summary = conclude(relay, config, say=say)
    _leave(relay, config, folder, summary, controls=time.monotonic() - closed, say=say)
    if problem := never_trained(relay.rows):
        raise RelayError(problem)


def _leave(relay: Relay, config: RunConfig, folder: RunFolder, summary: Summary, *, controls: float, say: Say) -> None:
    """Write what a finished run leaves, and say what came of it."""
    simulated = relay.post.simulated
    kept = MODELS if config.keep_models or not simulated else ""
    summary = replace(summary, models=kept if simulated else "with each peer")
    folder.write_summary(summary)
    title = f"{config.run_name}: {config.strategy}, {config.divergence}, {config.dataset}, {config.partition}"
    accuracy_png(folder.path / "accuracy.png", relay.rows, summary, title=title)
    if topology := relay.strategy.topology:
        accuracies = [peer.after for peer in summary.peers]
        topology_png(
            folder.path / "topology.png", topology.edges, accuracies, title=topology.name, directed=topology.directed
        )
    say(summary_table(summary))
    if lines := folder.read_profile():
        profile_png(folder.path / "profile.png", lines, title=title)
        say(profile_table(lines))
    say(closing_line(summary, controls=controls if config.controls else 0.0))
    say(f"results: {folder.path}")
    if kept:
        say(f"models: {folder.path / kept if simulated else f'{kept}/ of each peer, which keeps its own'}")


@contextmanager
def _folder(config: RunConfig) -> Iterator[RunFolder]:
    """Hold the folder of a run for the length of a block: a new one, or that of the run that is resumed.

    Raises:
        FedkdError: it is not this run's to write to.
    """
    if config.resume:
        path = _absolute(config.resume)
        resumed(config, path)
    elif config.out_dir:
        path = _absolute(config.out_dir)
        refuse_taken(path)
    else:
        path = new_folder(STARTED_IN / "runs", f"{time.strftime('%Y%m%d-%H%M%S')}-{config.run_name}")
    with held(path):
        if not config.resume:
            refuse_taken(path)  # once more: another run may have come and gone
        yield RunFolder(path)


def _overruled(given: RunConfig, used: RunConfig) -> list[str]:
    """Return a line for each setting that a user gave and that the run does not use."""
    if used.resume:
        return []
    defaults, values, really = RunConfig().to_mapping(), given.to_mapping(), used.to_mapping()
    overruled = {
        key: f"`{key}` = {value!r} has no effect under strategy {used.strategy}, which uses {really[key]!r}"
        for key, value in values.items()
        if value not in (defaults[key], really[key])
    }
    idle = {
        key: f"`{key}` = {values[key]!r} has no effect: it takes {needs}"
        for key, needs in without_effect(used)
        if key not in overruled and values[key] != defaults[key]
    }
    lines = [*overruled.values(), *idle.values()]
    if used.joint and used.local_epochs != defaults["local-epochs"] and "local-epochs" not in idle:
        lines.append(
            f"`local-epochs` = {used.local_epochs} is for the pooled control alone: peers go by `distill-epochs`"
        )
    return lines


def _absolute(path: str) -> Path:
    return (STARTED_IN / Path(path).expanduser()).absolute()


def _say(line: str) -> None:
    print(line, flush=True)


class _NoStack(logging.Filter):
    """Ends Flower's log of a user's error with that error: its message says it all, no stack and no exit code."""

    def __init__(self) -> None:
        super().__init__()
        self._told = False

    def filter(self, record: logging.LogRecord) -> bool:
        """Turn the record of the error into one line, and drop what follows it."""
        error = record.exc_info[1] if isinstance(record.exc_info, tuple) else None
        if isinstance(error, FedkdError):
            record.msg, record.args, record.exc_info, record.exc_text = "%s", (str(error),), None, None
            self._told = True
            return True
        return not self._told


logging.getLogger("flwr").addFilter(_NoStack())
