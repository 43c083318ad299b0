"""What `fedkd.run` and the others of `fedkd.notebook` do: the command line's functions, with keywords for its words."""

import signal
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from os import environ
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.analysis.comparison import Comparison, comparison_runs
from experiments.analysis.runs import Run, read_run
from experiments.analysis.settings import effective
from experiments.analysis.variants import study
from experiments.compare.recipe import Values, find, of_axes, read
from experiments.compare.running import Compared, compare_recipe
from experiments.launch.project import Project
from experiments.simulation import Simulated, simulate
from fedkd.errors import FedkdError, SettingError
from fedkd.results.opened import OpenComparison, OpenRun
from fedkd.settings.config import RunConfig
from fedkd.settings.declare import BOOKKEEPING, declared

if TYPE_CHECKING:
    import pandas as pd
    from torch import nn

_MEASURED = ("before", "accuracy", "worst", "isolated", "channel", "bytes")
_DEPENDS = [key for key, about in declared(RunConfig).items() if about.decides != BOOKKEEPING]


def run(settings: Mapping[str, Any], *, ray_address: str | None, quiet: bool, **shares: Any) -> OpenRun:
    """Run a federation and open its folder; the arguments are those of :func:`fedkd.notebook.run`.

    Raises:
        FedkdError: it could not begin, or did not complete.
    """
    if settings.get("trials"):
        raise SettingError("trials", settings["trials"], "left out here: fedkd.compare runs many")
    address = environ.get("RAY_ADDRESS") if ray_address is None else ray_address
    pairs = [f"{_key(name)}={_text(name, value)}" for name, value in settings.items()]
    done = simulate(pairs, ray_address=address, out=_printer(quiet=quiet), **shares)
    if done.folder is None or (done.outcome and not done.outcome.completed):
        raise FedkdError(_why(done))
    return open_run(done.folder)


def compare(
    recipe: str | Path | None,
    settings: Mapping[str, Any],
    *,
    quick: bool,
    folder: str | Path | None,
    quiet: bool,
    **shares: Any,
) -> OpenComparison:
    """Run a comparison and open its folder; the arguments are those of :func:`fedkd.notebook.compare`.

    Raises:
        FedkdError: it could not begin, was interrupted, or no trial has a result.
    """
    given = {_key(name): _values(name, value) for name, value in settings.items()}
    if recipe is not None:
        chosen = read(find(str(recipe)), quick=quick, changes=given)
    elif quick:
        raise SettingError("quick", quick, "left out without a recipe, which alone has a quick size")
    else:
        chosen = of_axes(given)
    words = [repr(str(recipe))] * (recipe is not None) + ["quick=True"] * quick
    place = None if folder is None else Path(folder)
    words += [f"folder={str(place)!r}"] * (place is not None)
    typed = ", ".join([*words, *(f"{name}={value!r}" for name, value in settings.items())])
    done = compare_recipe(
        chosen, place, command=f"fedkd.compare({typed})", out=_printer(quiet=quiet), **shares
    )  # fmt: skip
    if done.exit_code > 128:
        name = signal.Signals(done.exit_code - 128).name
        raise FedkdError(f"Stopped by {name}: {done.finished} trials in {done.folder} are done; call again to go on.")
    if done.report is None:
        raise FedkdError(f"No trial of the comparison in {done.folder} has a result: {_first_error(done)}")
    return _open_comparison(done, done.report)


def open_run(folder: Path) -> OpenRun:
    """Open the folder of a run.

    Raises:
        FedkdError: as :func:`experiments.analysis.runs.read_run`.
    """
    found = read_run(folder.expanduser().absolute())
    remarks = (*found.caveats, *found.problems)
    return OpenRun(found.path, dict(found.settings), found.rows, found.summary, found.error, remarks)


def load_model(place: Path, peer: str | None) -> "nn.Module":
    """Return a peer's model with its scaling inside.

    Raises:
        FedkdError: as :func:`experiments.export.find` and :func:`experiments.export.load`.
    """
    from experiments.export import find as find_model
    from experiments.export import load_raw

    return load_raw(find_model(place, peer))


def _open_comparison(done: Compared, report: Path) -> OpenComparison:
    found = {run.name: run for run in map(read_run, comparison_runs(done.folder))}
    why = {name: _last_line(found[name].error) if name in found else "not begun" for name in done.failed}
    return OpenComparison(done.folder, report, _trials(found, list(Comparison.read(done.folder).trials)), why)


def _trials(found: Mapping[str, Run], names: Sequence[str]) -> "pd.DataFrame":
    """Return a line for each trial: what it varied and what it came to."""
    import pandas as pd

    sorted_runs = study(list(found.values()))
    controls = {
        run.name: {"isolated": variant.isolated.get(seed), "channel": variant.channel.get(seed)}
        for scenario in sorted_runs.scenarios
        for variant in scenario.variants
        for seed, run in variant.runs.items()
    }
    varied = [key for key in _DEPENDS if len({run.settings[key] for run in found.values()}) > 1]
    lines = []
    for run in found.values():
        line: dict[str, Any] = dict(zip(varied, effective(run.settings, varied), strict=True))
        if run.summary and (curve := run.curve()):
            line |= {"before": curve[0].accuracy, "accuracy": curve[-1].accuracy, "worst": curve[-1].worst}
            line |= {**controls.get(run.name, {}), "bytes": curve[-1].bytes}
        lines.append({"trial": run.name, **line, "folder": run.path})
    frame = pd.DataFrame(lines, columns=["trial", *varied, *_MEASURED, "folder"]).set_index("trial")
    floats = [name for name in _MEASURED if name != "bytes"]
    frame[floats] = frame[floats].astype(float)
    frame["bytes"] = frame["bytes"].astype("Int64")
    return frame.reindex(pd.Index(names, name="trial"))


def _printer(*, quiet: bool) -> Any:
    return (lambda line: None) if quiet else partial(print, flush=True)


def _why(done: Simulated) -> str:
    """Say why a run did not complete, where it lies, and how it goes on."""
    reason = (done.outcome.reason or done.outcome.status) if done.outcome else "it has no folder"
    if done.folder is None or not done.folder.exists():
        return f"The run did not complete, and left nothing: {reason}"
    told = f"The run in {done.folder} did not complete: {reason}"
    return f"{told}\nGo on: fedkd.run(resume={str(done.folder)!r})" if done.resumable else told


def _first_error(done: Compared) -> str:
    runs = map(read_run, comparison_runs(done.folder))
    return done.reason or next((_last_line(run.error) for run in runs if run.error), "see its trials")


def _last_line(text: str) -> str:
    return (text.splitlines() or [""])[-1]


def _key(name: str) -> str:
    return name.replace("_", "-")


def _values(name: str, value: Any) -> Values:
    """Return a setting of a comparison with its own type: a list of them for an axis."""
    if hasattr(value, "tolist"):  # NumPy's
        value = value.tolist()
    if isinstance(value, str | tuple) or not isinstance(value, Iterable):
        return _typed(name, value)
    if not (values := [_typed(name, one) for one in value]):
        raise SettingError(_key(name), value, "at least one value")
    return values


def _typed(name: str, value: Any) -> str | int | float | bool:
    pair = f"{_key(name)}={_text(name, value)}"
    return Project.read().settings([pair], cwd=Path.cwd(), expand=False)[_key(name)]


def _text(name: str, value: Any) -> str:
    """Return a value as the command line has it.

    >>> _text("models", ["mlp", "cnn-small"]), _text("sealed", True), _text("kd_weight", 0.5)
    ('mlp,cnn-small', 'true', '0.5')
    """
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str | int | float | Path):
        return str(value)
    if isinstance(value, Iterable) and not isinstance(value, Mapping | bytes):
        return ",".join(_text(name, one) for one in value)
    raise SettingError(_key(name), value, "a text, a number, true or false, a path, or a list of them")
