"""What a notebook calls: ``fedkd.run``, ``fedkd.compare``, ``fedkd.open_run`` and ``fedkd.load_model``.

They do what the commands of the same names do, by the same functions. Those lie in the folder of the Flower app, beside
this package in a clone and inside of it in an installed wheel. The first call puts that folder at the end of Python's
path, where it hides nobody's modules; before it, ``import fedkd`` loads nothing of size.
"""

import importlib
import importlib.util
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedkd.errors import FedkdError
from fedkd.source import app_folder

if TYPE_CHECKING:
    from torch import nn

    from fedkd.results.opened import OpenComparison, OpenRun

_ROOMS = ("experiments", "clients", "strategies")

Value = str | int | float | bool | Path  # one of a setting


def run(
    *,
    peers: int | None = None,
    cpus_per_peer: int = 1,
    gpus_per_peer: float = 0.0,
    actors: int | None = None,
    gpus: int | None = None,
    ray_address: str | None = None,
    quiet: bool = False,
    **settings: Value | Iterable[Value],
) -> "OpenRun":
    """Run a federation in simulation, as ``fedkd run`` does, and open what it leaves.

    ::

        run = fedkd.run(divergence="sed", peers=4, rounds=3, models=["mlp", "cnn-small"])

    Args:
        peers: how many there are; None: 6, or as many as the run had that is resumed.
        cpus_per_peer: CPUs of a peer's actor.
        gpus_per_peer: GPUs of a peer's actor; 0.25: four actors on one GPU.
        actors: peers that work at once; None: all that fit.
        gpus: GPUs that Ray may use; None: all it finds.
        ray_address: ``host:port`` of a running Ray cluster; None: what the variable ``RAY_ADDRESS`` says.
        quiet: print nothing.
        **settings: those of ``fedkd settings`` that differ from the defaults, underscores for hyphens. Several values
            of one setting (``models``, ``controls``) may be a list. Relative paths start in the current folder.

    Raises:
        SettingError: before Flower starts, a setting that does not exist, is wrong, or contradicts another.
        FedkdError: the run did not complete: why, where it lies, and whether it can go on.
    """
    opened: OpenRun = _app("experiments.notebook").run(
        settings, peers=peers, cpus_per_peer=cpus_per_peer, gpus_per_peer=gpus_per_peer, actors=actors, gpus=gpus,
        ray_address=ray_address, quiet=quiet,
    )  # fmt: skip
    return opened


def compare(
    recipe: str | Path | None = None,
    *,
    quick: bool = False,
    folder: str | Path | None = None,
    cpus_per_peer: int = 1,
    gpus_per_peer: float = 0.0,
    actors: int | None = None,
    gpus: int | None = None,
    quiet: bool = False,
    **settings: Value | Iterable[Value],
) -> "OpenComparison":
    """Run the trials of a comparison, as ``fedkd compare`` does, write its report, and open both.

    ::

        fedkd.compare("rounds", quick=True)
        fedkd.compare(divergence=["kl", "js"], seed=range(3), peers=4, rounds=3)

    The same call goes on where it was stopped, and runs nothing twice.

    Args:
        recipe: a TOML file, or the name of a recipe that comes with fedkd; None: the settings say it all.
        quick: the recipe's quick size.
        folder: of the results; None: ``runs/compare-NAME``, after the recipe, or the axes and a hash of all settings.
        cpus_per_peer: CPUs of a peer's actor.
        gpus_per_peer: GPUs of a peer's actor; 0.25: four actors on one GPU.
        actors: peers that work at once; None: all that fit.
        gpus: GPUs that Ray may use; None: all it finds.
        quiet: print nothing.
        **settings: underscores for hyphens. A list or range is an axis: its values are tried, with each of every
            other axis. Anything else is common to all trials, a tuple being the values of one setting that takes
            several (``models=("mlp", "cnn-small")``). Both win over the recipe's.

    Raises:
        SettingError: before Flower starts, a setting that does not exist, is wrong, or contradicts another.
        FedkdError: no trial has a result, it was interrupted, or the folder is of another comparison.
    """
    opened: OpenComparison = _app("experiments.notebook").compare(
        recipe, settings, quick=quick, folder=folder, cpus_per_peer=cpus_per_peer, gpus_per_peer=gpus_per_peer,
        actors=actors, gpus=gpus, quiet=quiet,
    )  # fmt: skip
    return opened


def open_run(folder: str | Path) -> "OpenRun":
    """Open the folder of a run, finished or not.

    Raises:
        FedkdError: it is not the folder of a run, or what two runs left is mixed there.
    """
    opened: OpenRun = _app("experiments.notebook").open_run(Path(folder))
    return opened


def load_model(run: "OpenRun | str | Path", peer: str | None = None) -> "nn.Module":
    """Return a peer's model as a run left it, on the CPU and in evaluation mode.

    Its scaling is inside: it takes float32 ``[B, *shape]`` as the data source gives them, 8-bit pixels divided by 255,
    and returns logits ``[B, C]``.

    Args:
        run: as :func:`run` or :func:`open_run` returns it, its folder, that of a real peer, or the file of a model.
        peer: whose; None where there is one.

    Raises:
        FedkdError: there is no such model, or what builds it cannot be imported or builds another one now.
    """
    place = Path(run) if isinstance(run, str | Path) else run.folder
    model: nn.Module = _app("experiments.notebook").load_model(place, peer)
    return model


def _app(module: str) -> Any:
    """Import a module of the app's, and never one of somebody else's.

    Raises:
        FedkdError: Python finds another package of one of the app's names first.
    """
    folder = app_folder()
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    for room in _ROOMS:
        if (found := _place(room)) != folder / room:
            raise FedkdError(
                f"Python finds another {room!r} before fedkd's, at {found}: rename that one, start Python in another "
                f"folder, or call sys.path.insert(0, {str(folder)!r}) before anything imports it."
            )
    return importlib.import_module(module)


def _place(package: str) -> Path | None:
    """Return the folder, or the file, from which this process has imported a package or would import it."""
    try:
        spec = importlib.util.find_spec(package)
    except ValueError:  # it is imported, and does not tell
        return None
    places = [*(spec.submodule_search_locations or ()), spec.origin] if spec else []
    return Path(places[0]).resolve() if places and places[0] else None
