"""Going on with a run that was stopped: it keeps its settings."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedkd.errors import SettingError
from fedkd.results.folder import RunFolder, environment
from fedkd.settings.config import RunConfig, recorded
from fedkd.source import source_hash
from strategies.relay.trials import resumable


def resumed(config: RunConfig, path: Path) -> RunConfig:
    """Return the settings under which the run in a folder goes on: its own.

    Args:
        config: what is given now; ``resume`` names the folder.
        path: the folder, absolute.

    Raises:
        SettingError: there is no run that can be resumed, or it was begun under other settings.
    """
    if not path.is_dir():
        raise SettingError("resume", config.resume, "the folder of a run")
    earlier = replace(RunConfig.from_mapping(recorded(RunFolder(path).read_config()["settings"])), resume="")
    if not resumable(earlier):
        raise SettingError("resume", config.resume, "a run with rounds of ours: not async, not fedavg")
    _refuse_changes(config, earlier)
    return replace(earlier, resume=config.resume, out_dir=str(path))


def changed_since(config: Mapping[str, Any]) -> str:
    """Return in one line what else a run's numbers depend on and has changed since it began; empty if nothing has.

    Args:
        config: the run's ``config.json``.
    """
    before, now = (
        _conditions(config.get("source"), config.get("environment", {})),
        _conditions(source_hash(), environment()),
    )
    names = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    changed = ", ".join(f"{name} {before.get(name)} → {now.get(name)}" for name in names)
    said = "not as when the run began, so that numbers may differ from those of an uninterrupted one"
    return f"{said}: {changed}" if changed else ""


def _conditions(source: object, environment: Mapping[str, Any]) -> dict[str, object]:
    return {**environment.get("versions", {}), "code": source, "platform": environment.get("platform")}


def _refuse_changes(given: RunConfig, earlier: RunConfig) -> None:
    """Refuse settings that are neither the default nor those of the run that is resumed: they could not hold."""
    defaults, before = RunConfig().to_mapping(), earlier.to_mapping()
    for key, value in given.to_mapping().items():
        if value not in (defaults[key], before[key]) and key not in ("resume", "out-dir"):
            raise SettingError(key, value, f"{before[key]!r} as in the run that is resumed")
