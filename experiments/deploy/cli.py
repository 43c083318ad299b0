"""The `fedkd deploy` commands."""

from pathlib import Path
from typing import Annotated

import typer

from experiments.command import WithSettings

app = typer.Typer(help="Run a real federation. SuperLink and SuperNodes talk over gRPC, with TLS and node keys.")

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="The deployment's folder.")]


@app.command()
def init(
    folder: Folder,
    peers: Annotated[int, typer.Option(help="Number of peers.")] = 3,
    host: Annotated[
        list[str] | None, typer.Option(help="Name or address of the SuperLink; several: the first is what peers use.")
    ] = None,
    fleet_port: Annotated[int, typer.Option(help="Where SuperNodes reach the SuperLink.")] = 9092,
    control_port: Annotated[int, typer.Option(help="Where `flwr run` reaches it, on its own machine.")] = 9093,
    node_port: Annotated[int, typer.Option(help="A SuperNode's local port; in a trial, the first of them.")] = 9400,
    demo: Annotated[bool, typer.Option("--demo", help="Fill in models and data (digits), ready for a trial.")] = False,
) -> None:
    """Make a folder for every party.

    It holds the party's keys, its configuration, unit files, and a README with its commands.
    """
    from experiments.deploy.create import create
    from experiments.deploy.layout import Deployment

    hosts = tuple(host or ["127.0.0.1"])
    deployment = Deployment(folder.expanduser().absolute(), hosts, peers, fleet_port, control_port, node_port)
    create(deployment, demo=demo)
    typer.echo((deployment.folder / "README.md").read_text(encoding="utf-8"))


@app.command()
def up(folder: Folder) -> None:
    """Start the SuperLink and all peers on this machine.

    Returns once they are connected.
    """
    from experiments.deploy import trial
    from experiments.deploy.layout import Deployment

    trial.up(Deployment.read(folder), out=typer.echo)


@app.command()
def register(folder: Folder) -> None:
    """Make the peers' keys known to the SuperLink on this machine.

    Those that it knows stay as they are.
    """
    from experiments.deploy import trial
    from experiments.deploy.layout import Deployment

    deployment = Deployment.read(folder)
    with trial.flower(deployment) as flwr:
        new = trial.register(deployment, flwr)
    typer.echo(f"registered: {', '.join(new) or 'none, the SuperLink knows all keys'}")


@app.command()
def down(folder: Folder) -> None:
    """End what `up` started, and nothing else."""
    from experiments.deploy import trial
    from experiments.deploy.layout import Deployment

    ended = trial.down(Deployment.read(folder))
    typer.echo(f"ended: {', '.join(ended) or 'nothing was running'}")


@app.command()
def status(folder: Folder) -> None:
    """Show which parties run and which peers are connected."""
    from experiments.deploy import trial
    from experiments.deploy.layout import Deployment

    for line in trial.status(Deployment.read(folder)):
        typer.echo(line)


@app.command(cls=WithSettings)
def run(
    folder: Folder,
    pairs: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings that differ from the defaults.")
    ] = None,
) -> None:
    """Run a federation on the deployment's SuperLink.

    The exit status is 0 only if it completed. docs/settings.md lists the settings.
    """
    from experiments.deploy.layout import Deployment
    from experiments.deploy.run import run as run_on
    from experiments.launch.project import Project

    project = Project.read()
    deployment = Deployment.read(folder)
    with project.new_folder(project.settings(pairs or [], cwd=Path.cwd()), cwd=Path.cwd()) as settings:
        reason = run_on(deployment, project.folder, settings, out=typer.echo)
    if reason:
        typer.echo(f"error: {reason}", err=True)
        raise typer.Exit(1)
