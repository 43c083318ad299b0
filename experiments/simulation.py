"""One run as a user asks for it, on the command line or in a notebook: checked, started, and what came of it."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.analysis.runs import read_run
from experiments.launch import preflight, runner
from experiments.launch.project import OWN_FOLDER, Project
from experiments.launch.runner import Federation, Outcome
from experiments.report.tensorboard import board
from fedkd.errors import SettingError
from fedkd.results.folder import RunFolder
from fedkd.settings.config import RunConfig
from strategies.relay.trials import resumable

_PEERS = 6


@dataclass(frozen=True)
class Simulated:
    """What became of a run.

    Attributes:
        folder: where its results are; None where the app says nothing of a folder, or has one for each of many trials.
        outcome: the launcher's; None if nothing was started, since the run to be resumed was complete already.
        resumable: whether it stopped where ``resume`` can go on.
    """

    folder: Path | None
    outcome: Outcome | None
    resumable: bool = False


def simulate(
    pairs: Iterable[str],
    *,
    peers: int | None = None,
    cpus_per_peer: int = 1,
    gpus_per_peer: float = 0.0,
    actors: int | None = None,
    gpus: int | None = None,
    ray_address: str | None = None,
    app: Path | None = None,
    tensorboard: Path | None = None,
    out: Callable[[str], None] = print,
    verbose: bool = False,
) -> Simulated:
    """Check a run, make its folder, run it through Flower and wait for its end.

    Args:
        pairs: settings that differ from the defaults, ``KEY=VALUE``; relative paths start in the current folder.
        peers: how many there are; None: 6, or as many as the run had that is resumed.
        cpus_per_peer: CPUs of a peer's actor; the other shares as in :class:`Federation`.
        gpus_per_peer: GPUs, or the part of one, of a peer's actor.
        actors: peers that work at once; None: all that fit.
        gpus: GPUs that Ray may use; None: all it finds.
        ray_address: of a running Ray cluster; None, "" or "local": a Ray of its own.
        app: the folder of a Flower app; None: fedkd's own, whose settings are checked before Flower starts.
        tensorboard: where curves are written for TensorBoard; None: nowhere.
        out: takes every line meant for the user.
        verbose: pass on Flower's and Ray's own lines too.

    Raises:
        FedkdError: the run could not begin: a wrong setting, a folder that is taken, too few CPUs, no Flower.
    """
    project = Project.read(app)
    settings = project.settings(pairs, cwd=Path.cwd())
    own = project.folder == OWN_FOLDER
    federation = Federation(
        peers=_how_many(peers, settings if own else {}),
        cpus_per_peer=cpus_per_peer,
        gpus_per_peer=gpus_per_peer,
        actors=actors,
        gpus=gpus,
        ray_address=None if ray_address in ("", "local") else ray_address,
    )
    preflight.check_machine(federation)
    config = None
    if own and _may_share(settings):
        federation, settings["peers"] = federation.sharing(), federation.peers
    if own:
        config = preflight.check(
            RunConfig.from_mapping({**project.defaults, **settings}), federation.peers,
            app=OWN_FOLDER, cwd=Path.cwd(), files=not federation.ray_address,
        )  # fmt: skip
        if config.resume and (Path(config.resume) / "summary.json").exists():
            return Simulated(Path(config.resume), None)
        preflight.check_folder(config)
    scratch = None
    with board(tensorboard) as follow, project.new_folder(settings, cwd=Path.cwd()) as settings:
        if federation.ray_address:  # the cluster's machines share the results' folder, so they can find the app there
            scratch = Path(str(settings.get("out-dir") or settings.get("resume") or Path.cwd()))
            scratch.mkdir(parents=True, exist_ok=True)
        outcome = runner.launch(
            project.folder, settings, federation, out=follow(out), verbose=verbose, scratch=scratch
        )  # fmt: skip
    place = settings.get("resume") or settings.get("out-dir")
    folder = Path(str(place)) if place else None
    return Simulated(folder, outcome, resumable=bool(config and folder and _can_go_on(config, folder)))


def _how_many(option: int | None, settings: Mapping[str, Any]) -> int:
    """Return how many peers a run has: as an option says, a setting, or the run that is resumed."""
    word = int(settings.get("peers", 0))
    if option is not None and word not in (0, option):
        raise SettingError("peers", word, f"left out beside --peers {option}")
    before = 0
    if resumed := str(settings.get("resume", "")):
        earlier = read_run(Path(resumed))
        before = int(earlier.settings["peers"])
        if option is not None and len(earlier.peers) not in (0, option):  # no row: nobody has begun to learn
            raise SettingError("--peers", option, f"{before} as in the run that is resumed")
        if option is None and not before:
            allowed = "a run that was stopped after its peers had introduced themselves: start this one anew"
            raise SettingError("resume", resumed, allowed)
    return option if option is not None else word or before or _PEERS


def _may_share(settings: Mapping[str, Any]) -> bool:
    """Tell whether the relay can be told how many peers there are, as it has to be where they share nodes.

    Not where each trial of a file says so, and not where a run is resumed that has counted nodes.
    """
    if settings.get("trials"):
        return False
    resumed = str(settings.get("resume", ""))
    return not resumed or RunFolder(Path(resumed)).read_config()["settings"].get("peers", 0) > 0


def _can_go_on(config: RunConfig, folder: Path) -> bool:
    """Tell whether a run that stopped can be resumed: a round of it has closed, and it still has rounds to do."""
    if config.trials or not resumable(config) or not (folder / "relay.safetensors").exists():
        return False
    return not (folder / "summary.json").exists()  # all rounds are done: what failed would fail again
