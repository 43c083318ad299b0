"""`fedkd compare`: a recipe's trials through one `flwr run`, and the report."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from experiments.analysis.comparison import Comparison, alone, comparison_runs
from experiments.compare.recipe import Planned, Recipe, plan
from experiments.launch import preflight
from experiments.launch.project import OWN_FOLDER
from experiments.launch.runner import Federation, Outcome, launch
from experiments.outputs import REPORT, is_json_with, refuse_foreign
from experiments.report.tensorboard import board
from fedkd.errors import FedkdError
from fedkd.results.claim import held
from fedkd.results.folder import RunFolder
from fedkd.settings.config import RunConfig, recorded, spelled
from fedkd.settings.declare import Scalar
from strategies.relay.trials import Trial

_ELSEWHERE = {"out-dir", "run-name", "resume"}
"""Settings that say where a run lies, and nothing of what it computes."""

_WRITTEN = ("comparison.json", "trials.jsonl", *REPORT)

_TRIAL = re.compile(r"^trial (\d+)/(\d+) ")


@dataclass(frozen=True)
class Compared:
    """What became of a comparison.

    Attributes:
        folder: where everything is.
        report: the HTML file; None if no trial finished.
        finished: how many trials have results.
        failed: names of those that do not.
        exit_code: what a shell should see.
        reason: why the run did not complete, in the app's own words; empty if it did.
    """

    folder: Path
    report: Path | None
    finished: int
    failed: tuple[str, ...]
    exit_code: int
    reason: str = ""


def compare_recipe(
    recipe: Recipe,
    folder: Path | None,
    *,
    command: str,
    cpus_per_peer: int = 1,
    gpus_per_peer: float = 0.0,
    actors: int | None = None,
    gpus: int | None = None,
    tensorboard: Path | None = None,
    out: Callable[[str], None] = print,
    verbose: bool = False,
) -> Compared:
    """Compare as a user asks for it, on the command line or in a notebook.

    Args:
        recipe: what to compare.
        folder: where results go; None: ``runs/compare-NAME`` in the current folder.
        command: what the user typed, for the report.
        cpus_per_peer: CPUs of a peer's actor; the other shares as in :class:`Federation`.
        gpus_per_peer: GPUs, or the part of one, of a peer's actor.
        actors: peers that work at once; None: all that fit.
        gpus: GPUs that Ray may use; None: all it finds.
        tensorboard: where curves are written for TensorBoard; None: nowhere.
        out: takes every line meant for the user.
        verbose: pass on Flower's and Ray's own lines too.

    Raises:
        FedkdError: as :func:`compare`, or a peer is to have more than the machine has.
    """
    federation = Federation(peers=1, cpus_per_peer=cpus_per_peer, gpus_per_peer=gpus_per_peer, actors=actors, gpus=gpus)
    preflight.check_machine(federation)
    place = folder or Path("runs") / f"compare-{recipe.name}"
    with board(tensorboard) as follow:
        return compare(
            recipe, federation, place, command=command, out=follow(out, place / "trials"), verbose=verbose
        )  # fmt: skip


def compare(
    recipe: Recipe,
    federation: Federation,
    folder: Path,
    *,
    command: str,
    out: Callable[[str], None] = print,
    verbose: bool = False,
) -> Compared:
    """Run the trials of a recipe that have not finished yet, and write the report.

    Args:
        recipe: what to compare.
        federation: the machine's share of a peer; the number of peers is the recipe's.
        folder: where results go; trials that finished there are not run again.
        command: what the user typed, for the report.
        out: takes every line meant for the user.
        verbose: pass on Flower's and Ray's own lines too.

    Raises:
        FedkdError: the recipe's settings do not go together or name what is not there, the folder holds results under
            others or files of somebody else's, or the run did not start.
    """
    from experiments.report.page import write_report

    folder = folder.expanduser().absolute()
    refuse_foreign(folder, _WRITTEN, key="--out", ours=is_json_with(folder / "comparison.json", ("trials", "recipe")))
    earlier = _measured(folder)
    planned = plan(recipe, begun={name: str(settings.get("controls", "")) for name, settings in earlier.items()})
    trials = [Trial(p.name, RunConfig.from_mapping({**p.settings, "out-dir": _place(folder, p)})) for p in planned]
    _refuse_other_settings(trials, earlier, folder)
    for trial in trials:
        if not trial.finished():
            trial.refuse_taken()
            preflight.check(trial.config, trial.config.peers, app=OWN_FOLDER, cwd=recipe.cwd)
    commands = {trial.name: alone(trial.settings, federation, called=trial.preset) for trial in planned}
    about = Comparison(
        recipe.title, recipe.paper, recipe.claims, recipe.target, command, recipe.text, commands,
        quick=recipe.quick, presets={trial.name: trial.preset for trial in planned if trial.preset},
    )  # fmt: skip
    peers = replace(federation, peers=max(trial.peers for trial in planned)).sharing()
    with held(folder):
        about.write(folder)
        outcome = _run(trials, _write_trials(folder, planned), peers, out=out, verbose=verbose)
        done = [trial.name for trial in trials if trial.finished()]
        failed = tuple(trial.name for trial in planned if trial.name not in done)
        report = write_report(comparison_runs(folder), folder, about) if done else None
    exit_code = outcome.exit_code if outcome and outcome.signal else int(bool(failed))
    reason = (outcome.reason or outcome.status) if outcome and not outcome.completed else ""
    if outcome and reason and not outcome.signal:
        out(f"error: {reason}")
    return Compared(folder, report, len(done), failed, exit_code, reason)


def _measured(folder: Path) -> dict[str, dict[str, Scalar]]:
    """Return the settings of the trials in a folder that have measured something, by name.

    Of settings that are younger than a trial it is what that did without them.
    """
    return {
        path.name: spelled(recorded(RunFolder(path).read_config()["settings"]))
        for path in sorted((folder / "trials").glob("*"))
        if (path / "rounds.jsonl").exists()
    }


def _refuse_other_settings(trials: Sequence[Trial], earlier: Mapping[str, Mapping[str, Scalar]], folder: Path) -> None:
    """Refuse trials that would take the place of others: a name tells only what is varied.

    Raises:
        FedkdError: a trial of that name was run under other settings, or none there is of this comparison.
    """
    if earlier and not earlier.keys() & {trial.name for trial in trials}:
        raise FedkdError(
            f"The comparison in {folder} is about other trials: {next(iter(earlier))}. Take another --out."
        )
    differing: dict[str, tuple[Scalar | None, Scalar | None]] = {}
    for trial in trials:
        now = spelled(trial.config.effective().to_mapping())
        before = earlier.get(trial.name, now)
        for key in sorted((now.keys() | before.keys()) - _ELSEWHERE):
            if before.get(key) != now.get(key):
                differing.setdefault(key, (before.get(key), now.get(key)))
    if differing:
        words = ", ".join(f"{key} ({before!r} there, {now!r} here)" for key, (before, now) in differing.items())
        raise FedkdError(f"The comparison in {folder} is about other settings: {words}. Take another --out.")


def _place(folder: Path, trial: Planned) -> str:
    return str(folder / "trials" / trial.name)


def _write_trials(folder: Path, planned: Sequence[Planned]) -> Path:
    path = folder / "trials.jsonl"
    lines = [
        {"name": trial.name, "settings": {**trial.settings, "out-dir": _place(folder, trial)}} for trial in planned
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def _run(
    known: Sequence[Trial], file: Path, federation: Federation, *, out: Callable[[str], None], verbose: bool
) -> Outcome | None:
    """Run what is not finished, with a bar; every trial's line tells the time left. None if there is nothing to do."""
    done = sum(trial.finished() for trial in known)
    out(f"{len(known)} trials" + (f", {done} of them finished already" if done else ""))
    if done == len(known):
        return None
    console = Console(stderr=True)
    with Progress(
        TextColumn("trials"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        console=console, disable=not console.is_terminal, transient=True,
    ) as bar:  # fmt: skip
        task = bar.add_task("trials", total=len(known), completed=done)

        def show(line: str) -> None:
            if counted := _TRIAL.match(line):
                bar.update(task, completed=int(counted[1]))
            out(line)

        return launch(OWN_FOLDER, {"trials": str(file)}, federation, out=show, verbose=verbose)
