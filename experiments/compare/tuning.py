"""`fedkd tune`: look for good settings with Optuna, many trials in one `flwr run`, going on where it stopped.

Peers are measured on a part of the training set that none of them holds: what is chosen has not seen the test set.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.analysis.comparison import alone
from experiments.analysis.runs import read_run
from experiments.launch import preflight
from experiments.launch.project import OWN_FOLDER
from experiments.launch.runner import Federation, launch
from experiments.outputs import refuse_foreign
from fedkd.errors import FedkdError, SettingError
from fedkd.results.claim import held
from fedkd.settings.config import RunConfig, recorded
from fedkd.settings.declare import Scalar

if TYPE_CHECKING:
    import optuna

_STUDY = "study.journal"
_ALWAYS: Mapping[str, Scalar] = {"evaluate-on": "validation", "controls": "", "keep-models": False}


class Stopped(FedkdError):
    """A signal ended the search."""

    def __init__(self, reason: str, exit_code: int) -> None:
        super().__init__(reason)
        self.exit_code = exit_code


@dataclass(frozen=True)
class Tuned:
    """What was found.

    Attributes:
        settings: the best trial's.
        accuracy: on held-out samples, the mean of its peers and seeds.
        trials: how many have been finished in all.
        command: runs the best settings and measures them on the test set.
    """

    settings: Mapping[str, Scalar]
    accuracy: float
    trials: int
    command: str


def tune(
    settings: Mapping[str, Scalar],
    federation: Federation,
    folder: Path,
    *,
    trials: int,
    seeds: int = 1,
    batch: int = 8,
    out: Callable[[str], None] = print,
    verbose: bool = False,
) -> Tuned:
    """Search temperature, weight and distillation epochs until so many trials are finished in the folder.

    Args:
        settings: of every trial.
        federation: the peers and the machine's share of each.
        folder: where the study file and the trials' results go.
        trials: finished trials in all, earlier ones of this folder included.
        seeds: runs per trial, with the seeds ``seed``, ``seed`` + 1, ...
        batch: trials proposed together, for one `flwr run`.
        out: takes every line meant for the user.
        verbose: pass on Flower's and Ray's own lines too.

    Raises:
        FedkdError: Optuna is not installed, the study is about other settings, or no trial finished.
        Stopped: a signal ended the search; started again, it goes on.
    """
    _need_optuna()
    for name, value in (("--trials", trials), ("--seeds", seeds), ("--batch", batch)):
        if value < 1:
            raise SettingError(name, value, "a whole number >= 1")
    base = {**_ALWAYS, **settings, "peers": federation.peers}
    for key in ("evaluate-on", "regime"):
        usual = {"evaluate-on": "validation", "regime": "vanilla"}[key]
        if base.get(key, usual) != usual:
            raise SettingError(key, base[key], f"{usual} in a search over temperature and weight")
    config = RunConfig.from_mapping(base)
    preflight.check(config, federation.peers, app=OWN_FOLDER, cwd=Path.cwd())
    folder = folder.expanduser().absolute()
    refuse_foreign(folder, ("trials", "trials.jsonl"), key="--out", ours=(folder / _STUDY).exists())
    with held(folder):
        return _search(base, config, federation, folder, trials, seeds, batch, out, verbose=verbose)


def _search(
    base: Mapping[str, Scalar], config: RunConfig, federation: Federation, folder: Path, trials: int, seeds: int,
    batch: int, out: Callable[[str], None], *, verbose: bool,
) -> Tuned:  # fmt: skip
    """Search in a folder that is held; the arguments are those of :func:`tune`."""
    study = _open(folder, {k: v for k, v in base.items() if k not in ("out-dir", "run-name")}, config.seed, seeds)
    while (missing := trials - _finished(study)) > 0:
        proposed = [study.ask() for _ in range(min(batch, missing))]
        runs = {
            trial.number: [{**base, **_suggest(trial, config), "seed": config.seed + i} for i in range(seeds)]
            for trial in proposed
        }
        file = _write(folder, runs)
        outcome = launch(OWN_FOLDER, {"trials": str(file)}, federation.sharing(), out=out, verbose=verbose)
        told = [_tell(study, trial.number, folder, seeds) for trial in proposed]
        if outcome.signal:
            raise Stopped(outcome.reason, outcome.exit_code)
        if not any(told):
            raise FedkdError(outcome.reason or f"no trial finished; see the error.txt below {folder / 'trials'}")
        out(f"{_finished(study)} of {trials} trials, best {study.best_value:.1%} with {_rounded(study.best_params)}")
    for caveat in read_run(_place(folder, study.best_trial.number, 0)).caveats:
        out(caveat)
    best = {**base, **study.best_params}
    command = alone({**{k: v for k, v in best.items() if k not in ("evaluate-on", "controls")}}, federation)
    return Tuned(best, study.best_value, _finished(study), command)


def _rounded(params: Mapping[str, Scalar]) -> str:
    return " ".join(f"{key}={value:.3g}" for key, value in params.items())


def _suggest(trial: "optuna.Trial", config: RunConfig) -> dict[str, Scalar]:
    found: dict[str, Scalar] = {"temperature": trial.suggest_float("temperature", 0.5, 16.0, log=True)}
    # Elsewhere a weight has no effect, or, under `consensus`, makes another method of it.
    if config.joint or (config.schedule == "alternate" and config.optimizer == "sgd"):
        found["kd-weight"] = trial.suggest_float("kd-weight", 0.1, 0.95)
    found["distill-epochs"] = trial.suggest_int("distill-epochs", 1, 5)
    return found


def _open(folder: Path, base: Mapping[str, Scalar], seed: int, seeds: int) -> "optuna.Study":
    """Open the study of a folder, or begin one; of what a killed search had proposed, what has a result counts."""
    import optuna
    from optuna.storages.journal import JournalFileBackend

    backend = JournalFileBackend(str(folder / _STUDY))
    study = optuna.create_study(
        storage=optuna.storages.JournalStorage(backend),
        study_name="fedkd",
        direction="maximize",
        load_if_exists=True,
        sampler=optuna.samplers.TPESampler(seed=seed, constant_liar=True),
    )
    if (earlier := study.user_attrs.get("settings")) is not None:
        # A study that wrote down no more than what was typed meant the defaults of its time by the rest.
        was = study.user_attrs.get("meant") or _meant(recorded(earlier))
        now = _meant(base)
        differing = sorted(k for k in was.keys() | now.keys() if was.get(k) != now.get(k))
    if earlier is not None and differing:
        raise FedkdError(f"The study in {folder} is about other settings: {', '.join(differing)}. Take another --out.")
    study.set_user_attr("settings", dict(base))
    study.set_user_attr("meant", _meant(base))
    for trial in study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
        _tell(study, trial.number, folder, seeds)
    # A sampler that is seeded anew would propose the same again.
    study.sampler = optuna.samplers.TPESampler(seed=seed + len(study.trials), constant_liar=True)
    return study


def _meant(settings: Mapping[str, Scalar]) -> dict[str, Scalar]:
    return RunConfig.from_mapping(settings).effective().to_mapping()


def _finished(study: "optuna.Study") -> int:
    return sum(trial.value is not None for trial in study.trials)


def _write(folder: Path, runs: Mapping[int, list[dict[str, Scalar]]]) -> Path:
    lines = [
        {"name": f"{number}-{i}", "settings": {**settings, "out-dir": str(_place(folder, number, i))}}
        for number, of in runs.items()
        for i, settings in enumerate(of)
    ]
    path = folder / "trials.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def _place(folder: Path, number: int, i: int) -> Path:
    return folder / "trials" / f"{number:04d}-{i}"


def _tell(study: "optuna.Study", trial: int, folder: Path, seeds: int) -> bool:
    """Tell the study what came of a trial: the mean over its seeds, or that it failed."""
    import optuna

    found: list[float] = []
    for i in range(seeds):
        summary = _place(folder, trial, i) / "summary.json"
        mean = json.loads(summary.read_text())["mean"]["after"] if summary.exists() else None
        found.append(math.nan if mean is None else float(mean))
    if any(math.isnan(value) for value in found):
        study.tell(trial, state=optuna.trial.TrialState.FAIL)
        return False
    study.tell(trial, sum(found) / len(found))
    return True


def _need_optuna() -> None:
    try:
        import optuna
    except ModuleNotFoundError as error:
        raise FedkdError("`fedkd tune` needs Optuna: pip install 'fedkd[tune]'.") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
