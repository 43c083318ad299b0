"""Many trials in one run: Ray, the data and the imports are paid for once, and each trial stands alone."""

import json
import shutil
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from fedkd.errors import FedkdError, SettingError
from fedkd.results.claim import STATES, held, refuse_taken
from fedkd.results.folder import RunFolder
from fedkd.settings.config import RunConfig, recorded, spelled

Say = Callable[[str], None]


class Run(Protocol):
    """Runs one federation to its end."""

    def __call__(self, config: RunConfig, folder: RunFolder, /, *, say: Say) -> None:
        """Run it in a folder that is held; ``say`` takes what it prints."""


class TrialsError(FedkdError):
    """No trial could be run."""


@dataclass(frozen=True)
class Trial:
    """One run among many.

    Attributes:
        name: what it is called in progress lines.
        config: its settings; ``out-dir`` is its own.
    """

    name: str
    config: RunConfig

    @property
    def folder(self) -> Path:
        """Return where its results go."""
        return Path(self.config.out_dir)

    def finished(self) -> bool:
        """Tell whether its folder holds the summary of a run with these settings that did not fail."""
        failed = (self.folder / "error.txt").exists()
        return not failed and (self.folder / "summary.json").exists() and self._begun()

    def next_config(self) -> RunConfig:
        """Return the settings to run it with: resumed where a killed run can be continued."""
        stopped = (self.folder / "relay.safetensors").exists() and (self.folder / STATES).is_dir()
        if stopped and self._begun() and resumable(self.config):
            return replace(self.config, resume=self.config.out_dir)
        return self.config

    def refuse_taken(self) -> None:
        """Refuse a folder that holds anything but this trial's own, of an earlier try; touch nothing.

        Raises:
            SettingError: names what is there.
        """
        refuse_taken(self.folder, own=not self.finished() and self._begun())

    def _begun(self) -> bool:
        """Tell whether a run with these settings was begun in its folder."""
        try:
            earlier = json.loads((self.folder / "config.json").read_text())["settings"]
        except (OSError, ValueError, KeyError, TypeError):
            return False
        return _comparable(recorded(earlier)) == _comparable(self.config.effective().to_mapping())


def resumable(config: RunConfig) -> bool:
    """Tell whether a run with these settings can be continued after it was stopped."""
    return config.mode == "sync" and config.strategy != "fedavg"


def read_trials(path: Path, base: RunConfig) -> list[Trial]:
    """Read a file of trials: ``{"name": ..., "settings": {...}}`` a line, settings on top of the run's own.

    Raises:
        SettingError: a line is not a trial, or two trials share a name or a folder.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingError("trials", str(path), f"a file of trials ({error})") from error
    trials = [_read_trial(line, base, where=f"{path}, line {n}") for n, line in enumerate(lines, 1) if line.strip()]
    if not trials:
        raise SettingError("trials", str(path), "a file with at least one trial")
    for what in ("name", "folder"):
        values = [str(getattr(trial, what)) for trial in trials]
        if twice := sorted({value for value in values if values.count(value) > 1}):
            raise SettingError("trials", str(path), f"trials with a {what} of their own, but {twice[0]!r} comes twice")
    return trials


def run_trials(trials: Sequence[Trial], run: Run, *, say: Say) -> None:
    """Run all trials that are not finished. One that fails leaves ``error.txt`` and stops nothing.

    Raises:
        TrialsError: every trial failed.
    """
    todo = [trial for trial in trials if not trial.finished()]
    if len(todo) < len(trials):
        say(f"{len(trials) - len(todo)} of {len(trials)} trials are finished already")
    failures: list[str] = []
    began = time.monotonic()
    for done, trial in enumerate(todo, 1 + len(trials) - len(todo)):
        started = time.monotonic()
        problem = _attempt(trial, run)
        now = time.monotonic()
        if problem:
            failures.append(f"{trial.name}: {problem}")
        line = f"trial {done}/{len(trials)}  {trial.name}  {'FAILED: ' + problem if problem else _result(trial)}"
        ours = done - (len(trials) - len(todo))
        left = f"  ~{(now - began) / ours * (len(todo) - ours):.0f} s left" if done < len(trials) else ""
        say(f"{line}  {now - started:.1f} s{left}")
    if failures and len(failures) == len(trials):
        raise TrialsError(f"all {len(trials)} trials failed; the first was {failures[0]}")
    if failures:
        say(f"{len(failures)} of {len(trials)} trials failed: their folders have an error.txt")


def _attempt(trial: Trial, run: Run) -> str:
    """Run one trial; return what went wrong, in one line, or nothing."""
    try:
        if trial.finished():  # by another process, meanwhile
            return ""
        trial.refuse_taken()
        with held(trial.folder):  # a launcher that was killed with SIGKILL leaves its run behind
            return "" if trial.finished() else _work(trial, run)
    except FedkdError as error:  # somebody else's folder: not even an error.txt is written there
        return str(error)


def _work(trial: Trial, run: Run) -> str:
    """Run one trial with its lines in ``log.txt``; return what went wrong, in one line, or nothing."""
    folder = RunFolder(trial.folder)
    with (folder.path / "log.txt").open("a") as log:
        try:
            run(trial.next_config(), folder, say=lambda line: print(line, file=log, flush=True))
        except FedkdError as error:
            folder.write_error(str(error))
            return str(error)
        except (Exception, SystemExit) as error:  # whatever breaks in one trial must not cost the others
            folder.write_error(traceback.format_exc())
            return f"{type(error).__name__}: {error}"
        finally:
            if (folder.path / "summary.json").exists():  # the states of hundreds of trials would fill a disk
                shutil.rmtree(folder.path / STATES, ignore_errors=True)
    (folder.path / "error.txt").unlink(missing_ok=True)
    return ""


def _result(trial: Trial) -> str:
    mean = json.loads((trial.folder / "summary.json").read_text())["mean"]
    before, after = (f"{mean[name]:.1%}" if mean[name] is not None else "–" for name in ("before", "after"))
    return f"{before} → {after}"


def _read_trial(line: str, base: RunConfig, *, where: str) -> Trial:
    try:
        content = json.loads(line)
        name, settings = content["name"], dict(content["settings"])
    except (ValueError, KeyError, TypeError) as error:
        raise SettingError("trials", where, 'a line like {"name": ..., "settings": {...}}') from error
    config = RunConfig.from_mapping({**base.to_mapping(), "trials": "", **settings})
    if not config.out_dir or not Path(config.out_dir).is_absolute() or config.trials or config.resume:
        raise SettingError("trials", where, "settings with an absolute out-dir, without trials and resume")
    return Trial(str(name), config)


def _comparable(settings: dict[str, Any]) -> dict[str, Any]:
    """Leave out what may differ in a run that gives the same numbers: where it lies."""
    return {name: value for name, value in spelled(settings).items() if name not in ("out-dir", "resume", "run-name")}
