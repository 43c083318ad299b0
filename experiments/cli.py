"""`fedkd`: the command line. Heavy imports happen inside the commands, so that `fedkd --help` is immediate."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from fedkd import __version__
from fedkd.errors import FedkdError

app = typer.Typer(
    help="Sites with different, already trained models learn from one another's logits on a public proxy set.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Run the command line; a user's mistake is one line and exit status 2."""
    try:
        app()
    except FedkdError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fedkd {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", "-V", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Keep `run` a subcommand, and hold what belongs to none."""


@app.command()
def run(
    pairs: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings that differ from the defaults.")
    ] = None,
    peers: Annotated[int, typer.Option(help="Number of peers.")] = 6,
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
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show Flower's and Ray's own lines too.")] = False,
) -> None:
    """Run a federation in simulation, through `flwr run` on a SuperLink of its own.

    The settings are those of [tool.flwr.app.config] in the app's pyproject.toml: `fedkd run rounds=3 divergence=td`.
    The exit status is 0 if the run completed, 1 if it failed, 2 for a mistake found before it began.
    """
    from experiments.launch import Federation, launch
    from experiments.project import OWN_FOLDER, Project

    project = Project.read(app_folder)
    settings = project.settings(pairs or [], cwd=Path.cwd())
    if project.folder == OWN_FOLDER:
        from fedkd.config import RunConfig

        RunConfig.from_mapping({**project.defaults, **settings})
    federation = Federation(
        peers=peers,
        cpus_per_peer=cpus_per_peer,
        gpus_per_peer=gpus_per_peer,
        actors=actors,
        gpus=gpus,
        ray_address=None if ray_address in ("", "local") else ray_address,
    )
    scratch = None
    if federation.ray_address:  # the cluster's machines share the results' folder, so they can find the app there
        scratch = Path(str(settings.get("out-dir", Path.cwd())))
        scratch.mkdir(parents=True, exist_ok=True)
    outcome = launch(project.folder, settings, federation, out=typer.echo, verbose=verbose, scratch=scratch)
    if outcome.completed:
        typer.echo(f"completed in {outcome.seconds:.1f} s, Flower's start and end {outcome.flower_seconds:.1f} s of it")
    else:
        typer.echo(f"error: {outcome.reason or outcome.status}", err=True)
    raise typer.Exit(outcome.exit_code)
