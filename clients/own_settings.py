"""A peer's own settings, as its owner wrote them: keys, what they may be, paths. Imports no torch.

They come from the SuperNode's ``node-config``, directly or through a TOML file that ``peer-config`` names there.
"""

import difflib
import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path

from clients.bounds import NAMES
from fedkd.errors import SettingError
from fedkd.models.libraries import HF, whole
from fedkd.settings.declare import Scalar
from fedkd.settings.rules import (
    INPUT_SIZE,
    NAME,
    STRATEGIES,
    STRATEGY,
    TRAINED,
    Rule,
    above,
    at_least,
    one_entry,
    some_of,
    split_list,
)
from fedkd.settings.sources import absolute, without_reader
from fedkd.wire.claims import CLAIMS

Own = Mapping[str, Scalar]

_KEYS: dict[str, type] = {
    "name": str,
    "partition-id": int,
    "num-partitions": int,
    "model": str,
    "checkpoint": str,
    "replace-head": bool,
    "held-out": str,
    "input-size": str,
    "train": str,
    "dataset": str,
    "data-dir": str,
    "proxy": str,
    "device": str,
    "state-dir": str,
    "worker": bool,
    "idle-seconds": float,
    "allowed-strategies": str,
    "require-sealed": bool,
    "tell": str,
    "max-epochs": int,
    "max-payload": int,
    "max-seconds": float,
    "max-epsilon": float,
    "max-delta": float,
    "identity": str,
    "trusted-keys": str,
    **dict.fromkeys(NAMES, int),
}
_RULES = {
    "name": NAME,
    "allowed-strategies": Rule(
        f"a comma-separated choice of {', '.join(STRATEGIES)} or `package.module:Class`",
        lambda v: all(map(STRATEGY.accepts, split_list(v))),
    ),
    "tell": some_of(*CLAIMS),
    "input-size": one_entry(INPUT_SIZE),
    "train": one_entry(TRAINED),
    "max-epsilon": above(0),
    "max-delta": Rule("a number between 0 and 1, neither of them", lambda v: 0 < v < 1),
}
_PATHS = (
    "peer-config", "state-dir", "data-dir", "checkpoint", "held-out", "dataset", "proxy", "identity", "trusted-keys",
    "model",
)  # fmt: skip
_WITHIN = r"[^\s'\",;:)\]]*"  # the rest of a path in a sentence


def own_settings(node_config: Own) -> dict[str, Scalar]:
    """Return a peer's own configuration: what its ``peer-config`` file says, and over it what ``node-config`` says.

    Paths in the file are relative to the file.

    Raises:
        SettingError: the file is unreadable, has an unknown key, or a value that is not allowed.
    """
    own: dict[str, Scalar] = {}
    if path := str(node_config.get("peer-config", "")):
        own |= _read(Path(path).expanduser())
    own |= {key: value for key, value in node_config.items() if key != "peer-config"}
    for key in _KEYS.keys() & own.keys():
        own[key] = _checked(key, own[key])
    return own


def without_paths(text: str, own: Own) -> str:
    """Replace a peer's own paths, and what lies below them, by the names of the settings that hold them.

    >>> without_paths("no file '/data/ada/scans.npz'", {"dataset": "npz:/data/ada/scans.npz"})
    "no file '<dataset>'"
    """
    paths = {os.environ.get("HOME", "").rstrip(os.sep): "home"}
    paths |= {_path_in(str(own[key])): key for key in _PATHS if own.get(key)}
    for path in sorted(filter(lambda path: os.sep in path, paths), key=len, reverse=True):
        text = re.sub(re.escape(path) + _WITHIN, f"<{paths[path]}>", text)
    return text


def _path_in(value: str) -> str:
    """Return the path that a setting names; of what is on the Hugging Face hub, whose name has a slash too, none."""
    path = without_reader(value)
    return "" if value.startswith(HF) and not Path(path).is_absolute() else path


def _read(path: Path) -> dict[str, Scalar]:
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SettingError("peer-config", str(path), f"a readable TOML file ({error})") from error
    for key in found.keys() - _KEYS.keys():
        near = difflib.get_close_matches(key, _KEYS) or sorted(_KEYS)
        raise SettingError(key, found[key], f"a known key of {path} (nearest: {', '.join(near)})")
    return {key: _from_here(key, value, path.absolute().parent) for key, value in found.items()}


def _from_here(key: str, value: Scalar, folder: Path) -> Scalar:
    """Make a file's relative path absolute."""
    if not isinstance(value, str) or not value:
        return value
    if key in ("checkpoint", "held-out", "data-dir", "state-dir", "identity", "trusted-keys"):
        return str(folder / Path(value).expanduser())
    if key == "model":
        return whole(value, folder)
    return absolute(value, folder) if key in ("dataset", "proxy") else value


def _checked(key: str, value: Scalar) -> Scalar:
    kind = _KEYS[key]
    if kind is float and type(value) is int:
        value = float(value)
    if kind is bool and value in ("true", "false"):  # `node-config` on a command line knows them quoted only
        value = value == "true"
    if type(value) is not kind:
        words = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
        raise SettingError(key, value, words[kind])
    rule = _RULES.get(key) or (at_least(0) if kind in (int, float) else None)
    if rule and not rule.accepts(value):
        raise SettingError(key, value, rule.phrase)
    return value
