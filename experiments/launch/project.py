"""The Flower app that a command runs, and the settings a user gives it on the command line."""

import difflib
import time
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from experiments.launch.presets import PRESET, preset
from fedkd.errors import FedkdError, SettingError
from fedkd.models.libraries import whole
from fedkd.results.claim import new_folder
from fedkd.settings.sources import absolute

Setting = str | int | float | bool

OWN_FOLDER = Path(__file__).resolve().parent.parent.parent
_WORDS = {"true": True, "false": False}
_PATH_KEYS = ("out-dir", "data-dir", "resume", "trials")
_GRAPH = "file:"


@dataclass(frozen=True)
class Project:
    """A folder with a Flower app.

    Args:
        folder: where its pyproject.toml lies, absolute.
        name: the project's name.
        defaults: its run config, `[tool.flwr.app.config]`.
    """

    folder: Path
    name: str
    defaults: Mapping[str, Setting]

    @classmethod
    def read(cls, folder: Path | None = None) -> "Project":
        """Read the app in a folder; None: the one this package belongs to.

        Raises:
            FedkdError: there is no Flower app.
        """
        root = (folder or OWN_FOLDER).expanduser().absolute()
        try:
            content = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
            app = content["tool"]["flwr"]["app"]
        except (OSError, tomllib.TOMLDecodeError, KeyError) as error:
            problem = f"no pyproject.toml with a [tool.flwr.app] table in {root} ({type(error).__name__}: {error})"
            raise FedkdError(f"Expected --app to be the folder of a Flower app, but found {problem}.") from error
        return cls(root, content["project"]["name"], app.get("config", {}))

    def settings(self, pairs: Iterable[str], *, cwd: Path, expand: bool = True) -> dict[str, Setting]:
        """Return the settings that a user's KEY=VALUE pairs stand for, ready to leave the user's folder.

        Paths become absolute.

        Args:
            pairs: the user's words; whatever they say wins over a preset, wherever that stands among them.
            cwd: where relative paths start.
            expand: put a preset's settings in the place of its name.

        Raises:
            SettingError: a pair without "=", an unknown key or preset, or a value of another type than the default's.
        """
        given = dict(self._parse(pair) for pair in pairs)
        if expand and PRESET in given and PRESET not in self.defaults:
            given = {**preset(str(given.pop(PRESET))).settings, **given}
        usual = {key: self.defaults[key] for key in _PATH_KEYS if self.defaults.get(key) and not given.get(key)}
        return with_absolute_paths({**given, **usual}, cwd=cwd)

    @contextmanager
    def new_folder(self, settings: Mapping[str, Setting], *, cwd: Path) -> Iterator[dict[str, Setting]]:
        """Yield settings with a new folder for the results below `cwd`, if a new run has none of the user's choice.

        A folder that stays empty is removed at the end of the block.
        """
        if "out-dir" not in self.defaults or any(settings.get(key) for key in ("out-dir", "resume", "trials")):
            yield dict(settings)
            return
        name = settings.get("run-name") or self.defaults.get("run-name") or self.name
        path = new_folder(cwd / "runs", f"{time.strftime('%Y%m%d-%H%M%S')}-{name}")
        try:
            yield {**settings, "out-dir": str(path)}
        finally:
            with suppress(OSError):
                path.rmdir()

    def _parse(self, pair: str) -> tuple[str, Setting]:
        key, equals, text = pair.partition("=")
        if not equals:
            raise SettingError(key, pair, "written as KEY=VALUE")
        if key == PRESET and key not in self.defaults:
            return key, preset(text).name
        if key not in self.defaults:
            near = difflib.get_close_matches(key, [*self.defaults, PRESET]) or sorted(self.defaults)
            raise SettingError(key, text, "a known key (nearest: " + ", ".join(near) + ")")
        return key, _typed(key, text, like=self.defaults[key])


def with_absolute_paths(settings: Mapping[str, Setting], *, cwd: Path, data: Path | None = None) -> dict[str, Setting]:
    """Return settings whose paths hold in any folder.

    Args:
        settings: as they were written.
        cwd: where relative paths start.
        data: where those of data sources start; None: there too.
    """
    found = dict(settings)
    for key in ("dataset", "proxy"):
        if key in found:
            found[key] = absolute(str(found[key]), data or cwd)
    if (graph := str(found.get("topology", ""))).startswith(_GRAPH):
        found["topology"] = _GRAPH + _absolute(graph.removeprefix(_GRAPH), cwd)
    for key in ("models", "pooled-model", "fedavg-model"):
        if key in found:
            found[key] = ",".join(whole(spec.strip(), cwd) for spec in str(found[key]).split(","))
    for key in ("checkpoints", "held-out"):
        if key in found:
            found[key] = ",".join(_absolute_if_file(p, cwd) for p in str(found[key]).split(","))
    for key in _PATH_KEYS:
        if value := str(found.get(key, "")):
            found[key] = _absolute(value, cwd)
    return found


def _typed(key: str, text: str, *, like: Setting) -> Setting:
    if isinstance(like, bool):
        if text.lower() not in _WORDS:
            raise SettingError(key, text, "true or false")
        return _WORDS[text.lower()]
    if isinstance(like, str):
        return text
    try:
        return type(like)(text)
    except ValueError:
        raise SettingError(key, text, "a whole number" if isinstance(like, int) else "a number") from None


def _absolute(path: str, cwd: Path) -> str:
    return str(cwd / Path(path).expanduser())


def _absolute_if_file(entry: str, cwd: Path) -> str:
    """Leave what only looks like a path, such as "-" for none, to those who know what it means."""
    path = _absolute(entry.strip(), cwd)
    return path if entry.strip() and Path(path).is_file() else entry
