"""`fedkd`: the command line. Heavy imports happen inside the commands, so that `fedkd --help` is immediate."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer
import typer.core

from experiments.bench.benchmarks import BENCHES
from experiments.command import WithSettings
from experiments.deploy.cli import app as deploy
from experiments.launch import presets
from fedkd import __version__
from fedkd.errors import FedkdError, SettingError

_RECIPES = sorted(path.stem for path in (Path(__file__).parent / "recipes").glob("*.toml"))

typer.core.HAS_RICH = False  # with it, plain help has the backslashes of rich's markup

app = typer.Typer(
    help="Sites with different, already trained models learn from one another's logits on a public proxy set.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(deploy, name="deploy", no_args_is_help=True)


def main() -> None:
    """Run the command line; a user's mistake, or a file that cannot be used, is one line and exit status 2."""
    try:
        app()
    except (FedkdError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fedkd {__version__}")
        raise typer.Exit


def _whole(option: str, word: str) -> int:
    """Read one of several numbers that an option holds."""
    try:
        return int(word)
    except ValueError as error:
        raise SettingError(option, word, "whole numbers with commas between them") from error


def _show_complete(run: Path) -> None:
    """Say that a run to be resumed is complete, with its table."""
    from experiments.analysis.runs import read_run
    from experiments.report.terminal import show as show_run

    found = read_run(run)
    done = f"{found.summary.get('totals', {}).get('rounds', 0):.0f}"
    typer.echo(f"already complete ({done} of {found.settings['rounds']} rounds)")
    show_run(run)


def _say_how_to_go_on(folder: Path) -> None:
    """Give the command that resumes the run in a folder."""
    near = folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder
    typer.echo(f"go on: {shlex.join(['fedkd', 'run', f'resume={near}'])}", err=True)


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", "-V", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Keep `run` a subcommand, and hold what belongs to none."""


_OFTEN = "peers, models, dataset, partition-alpha, strategy, divergence, rounds, kd-weight, temperature, proxy-size"


@app.command(
    cls=WithSettings,
    epilog=f"Settings that people change first: {_OFTEN}. All: `fedkd settings`. Methods, preset=NAME: "
    f"{', '.join(presets.names())}.",
)
def run(
    pairs: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings that differ from the defaults.")
    ] = None,
    peers: Annotated[
        int | None, typer.Option(help="Number of peers; default: 6, or as many as the run had that is resumed.")
    ] = None,
    cpus_per_peer: Annotated[int, typer.Option(help="CPUs of a peer's actor.")] = 1,
    gpus_per_peer: Annotated[float, typer.Option(help="GPUs of a peer's actor; 0.25: four actors on one GPU.")] = 0.0,
    actors: Annotated[int | None, typer.Option(help="Peers that work at once; default: all that fit.")] = None,
    gpus: Annotated[int | None, typer.Option(help="GPUs that Ray may use; default: all it finds.")] = None,
    ray_address: Annotated[
        str | None, typer.Option(envvar="RAY_ADDRESS", help="host:port of a running Ray cluster.")
    ] = None,
    app_folder: Annotated[
        Path | None, typer.Option("--app", help="Folder of the Flower app; default: fedkd's.")
    ] = None,
    profile: Annotated[bool, typer.Option("--profile", help="Measure where each peer's time goes.")] = False,
    tensorboard: Annotated[
        Path | None, typer.Option(help="Write curves for `tensorboard --logdir` there, round by round.")
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show Flower's and Ray's own lines too.")] = False,
) -> None:
    """Run a federation in simulation.

    It goes through `flwr run`, on a SuperLink of its own. Settings are words, `fedkd run rounds=3 divergence=td`: the
    README has the table of all. The exit status is 0 if the run completed, 1 if it failed, 2 for a mistake found before
    it began.
    """
    from experiments.simulation import simulate

    done = simulate(
        [*(pairs or []), *(["profile=true"] if profile else [])],
        peers=peers,
        cpus_per_peer=cpus_per_peer,
        gpus_per_peer=gpus_per_peer,
        actors=actors,
        gpus=gpus,
        ray_address=ray_address,
        app=app_folder,
        tensorboard=tensorboard,
        out=typer.echo,
        verbose=verbose,
    )
    outcome = done.outcome
    if outcome is None:
        if done.folder:
            _show_complete(done.folder)
        return
    if outcome.completed:
        typer.echo(f"completed in {outcome.seconds:.1f} s, Flower's start and end {outcome.flower_seconds:.1f} s of it")
    else:
        typer.echo(f"error: {outcome.reason or outcome.status}", err=True)
        if done.resumable and done.folder:
            _say_how_to_go_on(done.folder)
    raise typer.Exit(outcome.exit_code)


@app.command()
def settings(
    word: Annotated[str, typer.Argument(help="Only those that have it in their name, group or meaning.")] = "",
) -> None:
    """Print the settings of a run, by group: key, default, what is allowed, what it means."""
    import textwrap

    from fedkd.settings.table import found

    groups = found(word)
    if not groups:
        raise SettingError("WORD", word, "found in a setting; left out, all are printed")
    for title, lines in groups:
        typer.echo(f"{title}")
        for line in lines:
            typer.echo(f"  {line.key} = {line.default}    {line.allowed}")
            typer.echo(
                textwrap.fill(line.meaning.replace("`", ""), 100, initial_indent="      ", subsequent_indent="      ")
            )
        typer.echo("")


@app.command(epilog=f"Benchmarks: {', '.join(BENCHES)}.")
def bench(
    name: Annotated[str, typer.Argument(help="Which one.")],
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the figures there.")] = None,
    quick: Annotated[bool, typer.Option(help="A small size, to see that it runs.")] = False,
    actors: Annotated[
        str | None, typer.Option(help="`gpu`: how many share the GPU, e.g. 1,4; default: 1,2,4,8.")
    ] = None,
    fleet: Annotated[
        str | None, typer.Option(help="`gpu`: resnet18, mixed, or both with a comma; default: both.")
    ] = None,
    compiled: Annotated[
        bool | None,
        typer.Option("--compiled/--plain", help="`gpu`: only compiled, or only as they are; default: both."),
    ] = None,
    seconds: Annotated[
        float | None, typer.Option(help="`gpu`: what all may take; the telling rows come first.")
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option(
            help="`accuracy`, `robust`: keep the trials there, and do only those that have not finished there."
        ),
    ] = None,
    ways: Annotated[
        str | None, typer.Option(help="`robust`: to weigh teachers, beside uniform, with a comma; default: all.")
    ] = None,
) -> None:
    """Run a benchmark and print its table."""
    from experiments.bench.benchmarks import bench as run_bench
    from fedkd.settings.rules import split_list

    given = {
        "actors": None if actors is None else [_whole("--actors", word) for word in split_list(actors)],
        "fleets": None if fleet is None else split_list(fleet),
        "compiled": compiled,
        "seconds": seconds,
        "folder": folder,
        "ways": None if ways is None else split_list(ways),
    }
    run_bench(name, json_path, quick=quick, options={key: value for key, value in given.items() if value is not None})


@app.command(cls=WithSettings, epilog=f"Recipes that come with fedkd: {', '.join(_RECIPES)}.")
def compare(
    recipe: Annotated[str, typer.Argument(help="A TOML file, or the name of a recipe that comes with fedkd.")],
    pairs: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings that win over the recipe's.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="The recipe's quick size: minutes on two cores.")] = False,
    folder: Annotated[
        Path | None, typer.Option("--out", help="Folder of the results; default: runs/compare-RECIPE.")
    ] = None,
    cpus_per_peer: Annotated[int, typer.Option(help="CPUs of a peer's actor.")] = 1,
    gpus_per_peer: Annotated[float, typer.Option(help="GPUs of a peer's actor; 0.25: four actors on one GPU.")] = 0.0,
    actors: Annotated[int | None, typer.Option(help="Peers that work at once; default: all that fit.")] = None,
    gpus: Annotated[int | None, typer.Option(help="GPUs that Ray may use; default: all it finds.")] = None,
    tensorboard: Annotated[
        Path | None, typer.Option(help="Write curves for `tensorboard --logdir` there, trial by trial.")
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show Flower's and Ray's own lines too.")] = False,
) -> None:
    """Run a recipe's trials, and write one report about them.

    They share one `flwr run`. Started again with the same folder, it goes on where it stopped. The exit status is 0 if
    all trials have results, 1 if some failed (the report names them), 2 for a mistake found before anything ran.
    """
    from experiments.compare.recipe import find, read
    from experiments.compare.running import compare_recipe
    from experiments.launch.project import Project

    given = Project.read().settings(pairs or [], cwd=Path.cwd(), expand=False)
    changes = {key: value for key, value in given.items() if any(p.startswith(f"{key}=") for p in pairs or [])}
    done = compare_recipe(
        read(find(recipe), quick=quick, changes=changes),
        folder,
        command=shlex.join(["fedkd", *sys.argv[1:]]),
        cpus_per_peer=cpus_per_peer,
        gpus_per_peer=gpus_per_peer,
        actors=actors,
        gpus=gpus,
        tensorboard=tensorboard,
        out=typer.echo,
        verbose=verbose,
    )
    for name in done.failed[:5]:
        typer.echo(f"no result: {name}", err=True)
    if len(done.failed) > 5:
        typer.echo(f"no result: {len(done.failed) - 5} more", err=True)
    typer.echo(f"report: {done.report}" if done.report else f"no report: no trial finished in {done.folder}")
    raise typer.Exit(done.exit_code)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs or of comparisons.")],
    folder: Annotated[
        Path | None, typer.Option("--out", help="Folder of the report; default: report, or the comparison's own.")
    ] = None,
    target: Annotated[float | None, typer.Option(help="Accuracy whose price in rounds and bytes is asked for.")] = None,
) -> None:
    """Write a self-contained HTML report about finished runs.

    Its figures and tables are files beside it, too.
    """
    from experiments.report.page import describe, find_runs, write_report

    command = shlex.join(["fedkd", *sys.argv[1:]])
    about = describe(runs, command=command, target=target)
    own = runs[0] if len(runs) == 1 and about.recipe else Path("report")
    place = (folder or own).expanduser().absolute()
    typer.echo(f"report: {write_report(find_runs(runs), place, about)}")


@app.command(cls=WithSettings)
def tune(
    pairs: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings of every trial.")
    ] = None,
    peers: Annotated[int, typer.Option(help="Number of peers.")] = 6,
    trials: Annotated[int, typer.Option(help="Finished trials in all, earlier ones in the folder included.")] = 32,
    seeds: Annotated[int, typer.Option(help="Runs per trial, each with a seed of its own.")] = 1,
    batch: Annotated[int, typer.Option(help="Trials proposed together and run in one `flwr run`.")] = 8,
    folder: Annotated[Path, typer.Option("--out", help="Folder of the study.")] = Path("runs/tune"),
    cpus_per_peer: Annotated[int, typer.Option(help="CPUs of a peer's actor.")] = 1,
    gpus_per_peer: Annotated[float, typer.Option(help="GPUs of a peer's actor; 0.25: four actors on one GPU.")] = 0.0,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show Flower's and Ray's own lines too.")] = False,
) -> None:
    """Search temperature, weight and epochs with Optuna.

    Started again, the search goes on. Under `schedule=alternate` with Adam the weight, which does nothing, is left out.
    Settings are chosen by accuracy on a part of the training set that no peer holds, never by the test set.
    """
    from experiments.compare.tuning import Stopped
    from experiments.compare.tuning import tune as search
    from experiments.launch.preflight import check_machine
    from experiments.launch.project import Project
    from experiments.launch.runner import Federation

    settings = Project.read().settings(pairs or [], cwd=Path.cwd())
    federation = Federation(peers=peers, cpus_per_peer=cpus_per_peer, gpus_per_peer=gpus_per_peer)
    check_machine(federation)
    try:
        found = search(
            settings, federation, folder, trials=trials, seeds=seeds, batch=batch, out=typer.echo, verbose=verbose
        )
    except Stopped as stopped:
        typer.echo(f"error: {stopped}", err=True)
        raise typer.Exit(stopped.exit_code) from stopped
    typer.echo(f"best of {found.trials} trials: {found.accuracy:.1%} on held-out samples. On the test set:")
    typer.echo(found.command)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="Folder of a run, a real peer's own folder, or the file of a model.")],
    peer: Annotated[str | None, typer.Option(help="Whose model; may be left out where there is one.")] = None,
    form: Annotated[
        str, typer.Option("--format", help="safetensors, torchscript, pt2 (torch.export) or onnx.")
    ] = "torchscript",
    out: Annotated[
        Path | None, typer.Option(help="The file; default: PEER.SUFFIX here. Nothing is overwritten.")
    ] = None,
) -> None:
    """Write a peer's improved model as a file that loads without fedkd.

    Its scaling of inputs is inside, except in safetensors. A JSON file beside it has the classes, the form of an input,
    the accuracy before and after, and where the model comes from.
    """
    from experiments.export import export as write

    sys.path.append(str(Path.cwd()))  # where `fedkd run` found a factory of one's own; last, so that it hides nothing
    done = write(run, peer=peer, form=form, out=out)
    card = done.card
    reached = f"{card.before:.1%} → {card.after:.1%}" + (
        f" (round {card.measured_round})" * (card.measured_round != card.round)
    )
    typer.echo(f"{card.peer}: {card.model} of run {card.run}, round {card.round}, accuracy {reached}")
    typer.echo(f"written to {done.file}, about it {done.about}")


@app.command()
def doctor(
    ray: Annotated[bool, typer.Option("--ray", help="Start a Ray of its own for a moment, too.")] = False,
) -> None:
    """Show versions, devices, folders, and test every loss.

    The exit status is 1 if something is wrong.
    """
    from experiments.doctor import doctor as examine

    raise typer.Exit(0 if examine(ray=ray, out=typer.echo) else 1)


@app.command()
def show(
    run: Annotated[Path, typer.Argument(help="Folder of a run.")],
    tensorboard: Annotated[
        Path | None, typer.Option(help="Write the curves for `tensorboard --logdir` there instead.")
    ] = None,
) -> None:
    """Print one run's table and curves in the terminal.

    With --tensorboard they are written there instead.
    """
    if tensorboard is None:
        from experiments.report.terminal import show as show_run

        show_run(run)
        return
    from experiments.report.tensorboard import export

    typer.echo(f"written to {export(run, tensorboard)}")
