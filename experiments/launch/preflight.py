"""What can be told before Flower starts: files, modules, the graph, an earlier run. Executes no code of the user."""

import importlib.util
import os
import pkgutil
import sys
from collections.abc import Iterator
from importlib.machinery import PathFinder
from pathlib import Path
from typing import TYPE_CHECKING

from fedkd.errors import SettingError
from fedkd.models import check_there
from fedkd.privacy import promise_line
from fedkd.results.claim import refuse_held, refuse_taken
from fedkd.settings.config import PEER, RunConfig
from fedkd.settings.declare import FILES, declared
from fedkd.settings.rules import DATASETS, SOURCES, STRATEGIES, split_list
from fedkd.settings.sources import Place, place
from strategies.relay.resuming import resumed
from strategies.relay.trials import read_trials
from strategies.topology import topology

if TYPE_CHECKING:
    from experiments.launch.runner import Federation


def check(config: RunConfig, peers: int, *, app: Path, cwd: Path, files: bool = True) -> RunConfig:
    """Refuse a run that could not begin; return the settings that it will have.

    Args:
        config: what is given, with absolute paths.
        peers: how many peers there are.
        app: the folder of the app that runs.
        cwd: where the user stands.
        files: whether peers, data and checkpoints are on this machine.

    Raises:
        SettingError: what the settings name is not there, or not possible with so many peers.
    """
    if config.resume:
        config = resumed(config, Path(config.resume))
    promise_line(config)
    if files:
        _check_files(config, peers)
        _check_device(config)
    for key, spec in _specs(config):
        _check_module(key, spec, app=app, cwd=cwd)
    if not config.trials:
        _check_graph(config, config.peers or peers)
    return config


def check_machine(federation: "Federation") -> None:
    """Refuse peers that this machine has not the CPUs or GPUs for: Flower would wait for them, or fail in a minute.

    Args:
        federation: the peers' shares; what a Ray cluster has is the cluster's to tell.

    Raises:
        SettingError: a peer is to have more than there is.
    """
    if federation.ray_address:
        return
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if federation.cpus_per_peer > cpus:
        raise SettingError("--cpus-per-peer", federation.cpus_per_peer, f"at most {cpus}, as many as are here")
    asked = {"--gpus-per-peer": federation.gpus_per_peer, "--gpus": federation.gpus or 0}
    if not any(asked.values()):
        return  # importing torch to count none would cost every run seconds
    import torch

    gpus = torch.cuda.device_count()
    for option, value in asked.items():
        if value > gpus:
            here = f"at most {gpus}, as many GPUs as PyTorch sees here" if gpus else (
                "0, or left out, to compute on the CPU: PyTorch sees no GPU here (`fedkd doctor`)"
            )  # fmt: skip
            raise SettingError(option, value, here)
    if federation.gpus is not None and federation.gpus_per_peer > federation.gpus:
        raise SettingError("--gpus-per-peer", federation.gpus_per_peer, f"at most --gpus {federation.gpus}")


def check_folder(config: RunConfig) -> None:
    """Refuse a run whose results would lie where others do.

    Args:
        config: as :func:`check` returns it.

    Raises:
        FedkdError: names the folder, what is there, and the way out.
    """
    if config.trials:
        for trial in read_trials(Path(config.trials), config):
            if not trial.finished():
                trial.refuse_taken()
    elif config.resume:
        refuse_held(Path(config.resume))
    elif config.out_dir:
        refuse_held(Path(config.out_dir))
        refuse_taken(Path(config.out_dir))


def with_own_code(python_path: str, *, app: Path, cwd: Path) -> str:
    """Return a PYTHONPATH on which modules of the user's folder are found too, unless they would hide others."""
    return python_path if hidden_by(cwd, app=app) else os.pathsep.join(filter(None, [python_path, str(cwd)]))


def hidden_by(folder: Path, *, app: Path) -> list[str]:
    """Return the names of a folder's modules that others have too: on PYTHONPATH they would hide those.

    Of Python itself, of what is installed, and of the app: a folder with another copy of it must not be taken for it.
    """
    places = [str(app), *(place for place in sys.path if place not in ("", str(folder)))]
    own = [module.name for module in pkgutil.iter_modules([str(folder)])]
    return sorted(name for name in own if name in sys.stdlib_module_names or PathFinder.find_spec(name, places))


def _check_files(config: RunConfig, peers: int) -> None:
    for key, spec in (("dataset", config.dataset), ("proxy", config.proxy)):
        if ":" not in spec and spec not in (*DATASETS, "split" if key == "proxy" else ""):
            raise SettingError(key, spec, f"{'split, or ' * (key == 'proxy')}{SOURCES}")
        for index in range(peers if PEER in spec else 1):
            if found := place(spec.replace(PEER, str(index))):
                _check_place(key, spec, found)
    values = config.to_mapping()
    for key in (key for key, about in declared(RunConfig).items() if about.opens == FILES):
        for entry in split_list(str(values[key])):
            if entry != "-" and not Path(entry).expanduser().is_file():
                raise SettingError(key, entry, "files that exist, or - for none")
    for key in ("models", "pooled-model", "fedavg-model"):
        for spec in split_list(str(values[key])):
            check_there(spec, key=key)
    if config.trials and not Path(config.trials).is_file():
        raise SettingError("trials", config.trials, "a file of trials")


def _check_place(key: str, spec: str, found: Place) -> None:
    if found.kind == "npz" and not found.path.is_file():
        raise SettingError(key, spec, f"npz:PATH of a file; there is none at {found.path}")
    if found.kind == "folder" and not found.path.is_dir():
        raise SettingError(key, spec, f"folder:PATH of a folder; there is none at {found.path}")
    if found.kind == "parquet" and not found.path.exists():
        raise SettingError(key, spec, f"parquet:PATH of a file or a folder; there is none at {found.path}")
    if found.kind in ("parquet", "hf") and importlib.util.find_spec("datasets") is None:
        raise SettingError(key, spec, "another source, or one to be read after `pip install 'fedkd[datasets]'`")


def _check_device(config: RunConfig) -> None:
    if config.device in ("auto", "cpu"):
        return  # importing torch costs seconds
    from clients.device import pick_device

    pick_device(config.device)


def _specs(config: RunConfig) -> Iterator[tuple[str, str]]:
    """Yield what settings name of one's own code."""
    values = config.to_mapping()
    for key, about in declared(RunConfig).items():
        for spec in split_list(str(values[key])):
            if about.names_code(spec):
                yield key, spec


def _check_module(key: str, spec: str, *, app: Path, cwd: Path) -> None:
    module = spec.partition(":")[0]
    if _findable(module):
        return
    allowed = f"an importable `package.module:name`; there is no module {module} installed, on PYTHONPATH or in {cwd}"
    if _findable(module, cwd):
        if not (hidden := hidden_by(cwd, app=app)):
            return
        allowed = (
            f"an importable `package.module:name`; {cwd} is left out, since it would hide other modules named "
            f"{', '.join(hidden)}: rename them there, or `export PYTHONPATH=$PWD`"
        )
    raise SettingError(key, spec, allowed)


def _findable(module: str, folder: Path | None = None) -> bool:
    """Tell whether there is such a module, in a folder or else where Python looks; nothing of it is executed."""
    top, *below = module.split(".")
    spec = PathFinder.find_spec(top, [str(folder)]) if folder else importlib.util.find_spec(top)
    for part in below:
        if spec is None:
            break
        spec = PathFinder.find_spec(f"{spec.name}.{part}", spec.submodule_search_locations or [])
    return spec is not None


def _check_graph(config: RunConfig, peers: int) -> None:
    if config.strategy not in STRATEGIES or config.strategy == "fedavg":
        return
    if peers < 2:
        raise SettingError("--peers", peers, f"at least 2 under strategy {config.strategy}: one alone hears nobody")
    topology(
        config.topology, peers, degree=config.topology_degree, probability=config.topology_probability,
        seed=config.seed,
    )  # fmt: skip
