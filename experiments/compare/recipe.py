"""A recipe says what a comparison runs: common settings, axes that are crossed, and a quick size.

::

    title = "Divergences on skewed data"
    target = 0.8                      # accuracy, for "rounds and bytes to target"
    claims = ["The measures tie on iid data."]

    [settings]                        # of every trial
    dataset = "digits"
    peers = 6

    [[grid]]                          # a list is an axis; several blocks are united
    divergence = ["kl", "js", "sed"]
    seed = [0, 1, 2]

    [quick]                           # what `--quick` puts in their place
    rounds = 3
    seed = [0, 1]

`preset` (:mod:`experiments.launch.presets`) may be a setting or an axis: its settings stand in the place of the
defaults, and what the recipe says wins over them. A trial is called after its preset.
"""

import hashlib
import itertools
import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.analysis.settings import control_group, control_groups, effective, has_effect, leaves_own_models
from experiments.launch.presets import PRESET, preset
from experiments.launch.project import with_absolute_paths
from fedkd.errors import FedkdError, SettingError
from fedkd.settings.config import RunConfig
from fedkd.settings.declare import Scalar
from fedkd.settings.rules import split_list

Settings = dict[str, Scalar]
Axes = Mapping[str, Sequence[Scalar]]
Values = Scalar | list[Scalar]

FOLDER = Path(__file__).parent.parent / "recipes"
_PARTS = {"title": str, "paper": str, "claims": list, "target": (int, float), "settings": dict, "quick": dict}
_RESERVED = ("out-dir", "run-name", "resume", "trials")
_DEFAULT_PEERS = 6
_LONGEST_NAME = 100


class RecipeError(FedkdError):
    """A recipe that cannot be run as it stands."""


@dataclass(frozen=True)
class Recipe:
    """What a comparison runs.

    Attributes:
        name: of the recipe's file.
        title: the report's.
        paper: what it is after, for the report.
        claims: what the paper says, one sentence each.
        target: accuracy whose price in rounds and bytes is asked for; None: the report picks one.
        settings: common to all trials.
        grids: blocks of axes; the trials are the union of their products.
        text: the file as it was read.
        quick: whether it is the quick size.
        cwd: the user's folder, where relative paths start; those of data sources in `data-dir`, if that is given.
    """

    name: str
    title: str
    paper: str
    claims: tuple[str, ...]
    target: float | None
    settings: Mapping[str, Scalar]
    grids: tuple[Axes, ...]
    text: str
    quick: bool
    cwd: Path


@dataclass(frozen=True)
class Planned:
    """One trial to be run.

    Attributes:
        name: unique in the comparison, fit for a folder.
        settings: those that differ from the defaults.
        preset: the one that they began with; empty: none.
    """

    name: str
    settings: Settings
    preset: str = ""

    @property
    def peers(self) -> int:
        """Return how many peers take part."""
        return int(self.settings["peers"])


def find(name: str) -> Path:
    """Return the file of a recipe: a path, or the name of one that comes with fedkd.

    Raises:
        RecipeError: there is none.
    """
    own = FOLDER / f"{name}.toml"
    for path in (Path(name), own):
        if path.is_file():
            return path
    known = ", ".join(sorted(path.stem for path in FOLDER.glob("*.toml")))
    raise RecipeError(f"Expected RECIPE to be a TOML file or one of {known}, but got {name!r}.")


def read(path: Path, *, quick: bool = False, changes: Mapping[str, Values] | None = None) -> Recipe:
    """Read a recipe.

    Args:
        path: its file.
        quick: put its quick size in the place of the full one.
        changes: settings that win over the recipe's, and over its axes; a list is an axis, if need be a new one.

    Raises:
        FedkdError: an unknown key, a value that is not allowed, an empty grid, or a target nothing can reach.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: {error}") from error
    return _of_text(text, path.stem, path, quick=quick, changes=changes or {})


def of_axes(given: Mapping[str, Values]) -> Recipe:
    """Return the recipe in which lists are crossed and single values are common settings.

    Its name tells the axes and, by a hash, the rest: the same is the same comparison, and anything else another.

    Raises:
        FedkdError: no list, or an empty one.
    """
    axes = {key: values for key, values in given.items() if isinstance(values, list)}
    if not axes:
        raise RecipeError("Expected a list of values for at least one setting, such as divergence=['kl', 'js'].")
    common = {key: value for key, value in given.items() if not isinstance(value, list)}
    lines = [f"title = {_toml(' × '.join(axes))}", "", "[settings]"]
    lines += [f"{key} = {_toml(value)}" for key, value in common.items()]
    lines += ["", "[[grid]]", *(f"{key} = [{', '.join(map(_toml, values))}]" for key, values in axes.items())]
    text = "\n".join(lines) + "\n"
    told = hashlib.blake2b(text.encode(), digest_size=4).hexdigest()
    return _of_text(text, f"{'-'.join(axes)[:_LONGEST_NAME]}-{told}", "the comparison", quick=False, changes={})


def _of_text(text: str, name: str, path: Path | str, *, quick: bool, changes: Mapping[str, Values]) -> Recipe:
    """Return the recipe that a text is; a path is for errors alone."""
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{path}: {error}") from error
    content, grids = _checked_parts(content, path)
    settings: dict[str, Any] = dict(content.get("settings", {}))
    replaced: dict[str, Any] = dict(content.get("quick", {})) if quick else {}
    target = replaced.pop("target", content.get("target"))
    for key, value in {**replaced, **changes}.items():
        if isinstance(value, list) and key in changes and not any(key in axes for axes in grids):
            grids = [{**axes, key: value} for axes in grids]
        else:
            settings, grids = _replaced(key, value, settings, grids, path)
    if target is not None and not 0 < target <= 1:
        raise RecipeError(f"{path}: nothing can reach target = {target}; expected an accuracy in (0, 1].")
    for key in {*settings, *itertools.chain(*grids)}:
        if key in _RESERVED:
            raise RecipeError(f"{path}: `{key}` belongs to the comparison itself and cannot be set in a recipe.")
    return Recipe(
        name=name + ("-quick" if quick else ""),
        title=content.get("title", name),
        paper=content.get("paper", ""),
        claims=tuple(content.get("claims", ())),
        target=target,
        settings=settings,
        grids=tuple(grids),
        text=text,
        quick=quick,
        cwd=Path.cwd(),
    )


def plan(recipe: Recipe, *, begun: Mapping[str, str] | None = None) -> list[Planned]:
    """Return the trials of a recipe, one seed after the other so that an early look shows every variant.

    The controls of trials that differ only in how knowledge is exchanged are the same; the first of them runs them.

    Args:
        recipe: what to compare.
        begun: the controls of trials that were begun before, by name: they keep them, whatever else is compared now.

    Raises:
        SettingError: settings that do not exist or do not go together, or an unknown preset.
    """
    wanted = _wanted(recipe.settings)
    found: dict[tuple[Scalar | None, ...], tuple[str, Settings]] = {}
    for axes in recipe.grids:
        for values in itertools.product(*axes.values()):
            given = {**recipe.settings, **dict(zip(axes, values, strict=True))}
            if called := str(given.pop(PRESET, "")):
                given = {**preset(called).settings, **given}
            config = RunConfig.from_mapping({"peers": _DEFAULT_PEERS, "keep-models": False, **given, "controls": ""})
            settings = config.to_mapping()
            if config.peers == 0:
                raise SettingError("peers", 0, "a whole number >= 1 in a comparison")
            found.setdefault(effective(settings, settings), (called, settings))
    seeds = list(dict.fromkeys(trial["seed"] for _, trial in found.values()))
    ordered = sorted(found.values(), key=lambda each: seeds.index(each[1]["seed"]))
    presets, trials = [called for called, _ in ordered], [trial for _, trial in ordered]
    defaults = RunConfig().to_mapping()
    alike = [[trial for called, trial in ordered if called == one] for one in dict.fromkeys(presets)]
    varied = [key for key in defaults if any(len({trial[key] for trial in of}) > 1 for of in alike)]
    names = _names(trials, varied, presets)
    _share_controls(dict(zip(names, trials, strict=True)), wanted, begun or {})
    kept = ("peers", "seed", "controls")
    return [
        Planned(
            name,
            _absolute({key: v for key, v in trial.items() if v != defaults[key] or key in kept}, recipe.cwd),
            called,
        )
        for name, trial, called in zip(names, trials, presets, strict=True)
    ]


def _absolute(settings: Settings, cwd: Path) -> Settings:
    data = str(settings.get("data-dir", ""))
    return with_absolute_paths(settings, cwd=cwd, data=cwd / Path(data).expanduser() if data else None)


def _checked_parts(content: dict[str, Any], path: Path | str) -> tuple[dict[str, Any], list[Axes]]:
    for key, value in content.items():
        if key == "grid":
            continue
        if key not in _PARTS:
            raise RecipeError(f"{path}: unknown key `{key}`; a recipe has {', '.join(_PARTS)} and [[grid]] blocks.")
        _check_kind(key, value, path)
    if "target" in content.get("quick", {}):
        _check_kind("target", content["quick"]["target"], path)
    blocks = content.get("grid", [])
    blocks = [blocks] if isinstance(blocks, dict) else blocks
    if not isinstance(blocks, list) or not all(isinstance(block, dict) for block in blocks):
        raise RecipeError(
            f"{path}: unexpected value of `grid`: {blocks!r}; expected [[grid]] blocks of `key = [values]`."
        )
    grids = [{key: value if isinstance(value, list) else [value] for key, value in block.items()} for block in blocks]
    empty = [key for axes in grids for key, values in axes.items() if not values]
    if not any(grids) or empty:
        which = f"axis `{empty[0]}` has no value" if empty else "no [[grid]] block has an axis"
        raise RecipeError(f"{path}: the grid is empty: {which}.")
    return content, list(grids)


def _check_kind(key: str, value: Any, path: Path | str) -> None:
    if not isinstance(value, _PARTS[key]) or isinstance(value, bool):  # type: ignore[arg-type]
        raise RecipeError(f"{path}: unexpected value of `{key}`: {value!r}.")
    if key == "claims" and not all(isinstance(claim, str) for claim in value):
        raise RecipeError(f"{path}: unexpected value of `claims`: {value!r}; expected a list of texts.")


def _replaced(
    key: str, value: Any, settings: dict[str, Any], grids: list[Axes], path: Path | str
) -> tuple[dict[str, Any], list[Axes]]:
    """Put a value, or for an axis a list of values, in the place of what a recipe says."""
    having = [axes for axes in grids if key in axes]
    if isinstance(value, list) and (not value or not having):
        raise RecipeError(f"{path}: the quick size gives `{key}` the values {value}, but no axis takes them.")
    if not having:
        return {**settings, key: value}, grids
    values = value if isinstance(value, list) else [value]
    return settings, [{**axes, key: values} if key in axes else axes for axes in grids]


def _wanted(settings: Mapping[str, Scalar]) -> str:
    return str(settings.get("controls", RunConfig().controls))


def _share_controls(trials: Mapping[str, Settings], wanted: str, begun: Mapping[str, str]) -> None:
    """Give each control to the first trial of those that it serves.

    Federated averaging comes last, and of that last what has nothing of the peers' own models. What was begun keeps
    what it had: another trial that comes first now would make it run anew.
    """

    def late(name: str) -> tuple[bool, ...]:
        return leaves_own_models(trials[name]), trials[name]["strategy"] == "fedavg", name in begun

    order = sorted(trials, key=late)
    chosen = {name: list(split_list(begun.get(name, ""))) for name in order}
    for control in split_list(wanted):
        carried = {control_group(trials[name], control) for name in order if control in chosen[name]}
        for name in order:
            if name in begun or (control == "channel" and RunConfig.from_mapping(trials[name]).without_channel):
                continue
            if carried.isdisjoint(control_groups(trials[name], control)):
                chosen[name].append(control)
                carried.add(control_group(trials[name], control))
    for name, trial in trials.items():
        trial["controls"] = ",".join(chosen[name])


def _names(trials: Sequence[Settings], varied: Sequence[str], presets: Sequence[str]) -> list[str]:
    """Return names that are fit for folders and do not depend on what else is compared.

    Args:
        trials: their settings.
        varied: the keys in which trials of one preset differ.
        presets: of each trial; empty: none.
    """
    names = []
    for trial, called in zip(trials, presets, strict=True):
        words = [f"{PRESET}={called}"] * bool(called)
        words += [f"{key}={_plain(trial[key])}" for key in varied if has_effect(trial, key)]
        name = ",".join(words) or "only"
        slug = re.sub(r"[^A-Za-z0-9._=,+-]", "-", name)
        if slug != name or len(slug) > _LONGEST_NAME or slug in names:
            everything = repr(sorted(trial.items())).encode()
            slug = f"{slug[:_LONGEST_NAME]}-{hashlib.blake2b(everything, digest_size=4).hexdigest()}"
        names.append(slug)
    return names


def _toml(value: Scalar) -> str:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else _plain(value)


def _plain(value: Scalar) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
