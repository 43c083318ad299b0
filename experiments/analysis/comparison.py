"""What a comparison is, beside its results: enough to make its report again and to run each trial alone."""

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from experiments.analysis.runs import Run
from experiments.analysis.settings import VARIANT_KEYS, effective
from experiments.launch.presets import PRESET, preset
from experiments.launch.runner import Federation
from fedkd.errors import FedkdError
from fedkd.settings.config import RunConfig, spelled
from fedkd.settings.declare import Scalar

_NOT_TYPED = ("peers", "out-dir", "run-name", "resume", "trials", "keep-models")


@dataclass(frozen=True)
class Comparison:
    """What a comparison is, written beside its trials so that a report can be made again.

    Attributes:
        title: the report's.
        paper: what it is after.
        claims: what the paper says.
        target: accuracy whose price is asked for, or None.
        command: what the user typed.
        recipe: the recipe's text.
        trials: by name, the command that runs the trial alone.
        quick: whether it is a recipe's quick size.
        presets: by name, the preset of the trial; of those that have one.
    """

    title: str
    paper: str
    claims: tuple[str, ...]
    target: float | None
    command: str
    recipe: str
    trials: Mapping[str, str]
    quick: bool = False
    presets: Mapping[str, str] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Write ``comparison.json``."""
        (folder / "comparison.json").write_text(json.dumps(vars(self), indent=2, ensure_ascii=False) + "\n")

    @classmethod
    def read(cls, folder: Path) -> "Comparison":
        """Read ``comparison.json``.

        Raises:
            FedkdError: it is not there or not readable.
        """
        try:
            content = json.loads((folder / "comparison.json").read_text())
            return cls(**{**content, "claims": tuple(content["claims"])})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise FedkdError(f"Expected the folder of a comparison, but got {folder}: {error}") from error


def comparison_runs(folder: Path) -> list[Path]:
    """Return the folders of a comparison's trials that were begun, in its order."""
    names = Comparison.read(folder).trials
    return [path for name in names if ((path := folder / "trials" / name) / "config.json").exists()]


def alone(settings: Mapping[str, Scalar], federation: Federation | None = None, *, called: str = "") -> str:
    """Return the command that runs a trial by itself; outside of ``mode=async`` it gives the same numbers.

    Args:
        settings: of the trial; ``peers`` says how many, 0: not known. Defaults are left out.
        federation: the machine's share of a peer.
        called: the preset that it began with, which says in one word what it brings; empty: none.

    >>> print(alone({"peers": 3, "seed": 1, "divergence": "sed"}, Federation(peers=6, gpus_per_peer=1)))
    fedkd run --peers 3 --gpus-per-peer 1 seed=1 divergence=sed
    """
    words = ["fedkd", "run"] + (["--peers", str(settings["peers"])] if settings["peers"] else [])
    defaults = Federation(peers=1)
    federation = federation or defaults
    for option in ("cpus_per_peer", "gpus_per_peer"):
        value = getattr(federation, option)
        if value != getattr(defaults, option):
            words += ["--" + option.replace("_", "-"), f"{value:g}"]
    usual = RunConfig().to_mapping()
    if called:
        brought = {**usual, **preset(called).settings}
        words.append(f"{PRESET}={called}")
        return shlex.join([*words, *_pairs({**usual, **settings}, brought)])
    return shlex.join([*words, *_pairs(settings, usual)])


def means(command: str, settings: Mapping[str, Scalar]) -> bool:
    """Tell whether a command of :func:`alone` that was written down once still asks for what was run.

    It does not where another value has become the default since.
    """
    usual, said, brought = RunConfig().to_mapping(), {}, {}
    try:
        for key, is_pair, text in (word.partition("=") for word in shlex.split(command) if not word.startswith("-")):
            if key == PRESET:
                brought = dict(preset(text).settings)
            elif is_pair:
                default = usual[key]
                said[key] = text == "true" if isinstance(default, bool) else type(default)(text)
        now = spelled(RunConfig.from_mapping({**brought, **said}).effective().to_mapping())
    except (FedkdError, KeyError, ValueError):
        return False
    return effective(now, VARIANT_KEYS) == effective(settings, VARIANT_KEYS)


def again(run: Run) -> str:
    """Return the command that runs a finished or stopped run again; a deployed one on its own deployment, DIR."""
    if run.simulated:
        return alone(run.settings)
    usual = {**RunConfig().to_mapping(), "controls": "isolated"}  # as `fedkd deploy run` has it
    return shlex.join(["fedkd", "deploy", "run", "DIR", *_pairs(run.settings, usual)])


def _pairs(settings: Mapping[str, Scalar], usual: Mapping[str, Scalar]) -> list[str]:
    return [f"{key}={_text(value)}" for key, value in settings.items() if key not in _NOT_TYPED and value != usual[key]]


def _text(value: Scalar) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
