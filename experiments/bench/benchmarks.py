"""`fedkd bench NAME`: the benchmarks, each a module with ``main(json_path, *, quick)``."""

import importlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.outputs import is_json_with, refuse_foreign_file
from fedkd.errors import SettingError

BENCHES = {
    "losses": "experiments.bench.losses",
    "loop": "experiments.bench.loop",
    "augment": "experiments.bench.augment",
    "gpu": "experiments.bench.gpu",
    "robust": "experiments.bench.robust",
    "privacy": "experiments.bench.privacy",
    "payload": "experiments.bench.payload",
    "start": "experiments.bench.start",
    "scale": "experiments.bench.scale",
    "wire": "experiments.bench.wire",
    "bytes": "experiments.bench.bytes",
    "accuracy": "experiments.bench.accuracy",
}

_OPTIONS: Mapping[str, frozenset[str]] = {
    "gpu": frozenset(["actors", "fleets", "compiled", "seconds"]),
    "accuracy": frozenset(["folder"]),
    "robust": frozenset(["folder", "ways"]),
}


def bench(name: str, json_path: Path | None, *, quick: bool, options: Mapping[str, Any] | None = None) -> None:
    """Run a benchmark: a table on the screen, and the figures as JSON where a path is given.

    Args:
        name: which one.
        json_path: the file of figures.
        quick: a small size.
        options: those that were given: of `gpu` ``actors``, ``fleets``, ``compiled``, ``seconds``; of `accuracy`
            and `robust` ``folder``; of `robust` ``ways``.

    Raises:
        SettingError: no benchmark of that name, an option that it does not have, or no place for its figures.
    """
    if name not in BENCHES:
        raise SettingError("NAME", name, "one of " + ", ".join(BENCHES))
    options = options or {}
    for option, value in options.items():
        if option not in _OPTIONS.get(name, ()):
            owners = " and ".join(f"`bench {other}`" for other, theirs in _OPTIONS.items() if option in theirs)
            raise SettingError(_spelled(option, value), str(value), f"left out: it is of {owners}")
    if json_path is not None and (json_path.is_dir() or not os.access(json_path.parent, os.W_OK | os.X_OK)):
        # A benchmark takes minutes, and this is its last step.
        raise SettingError("--json", str(json_path), "a file in a folder that exists and can be written to")
    if json_path is not None:
        refuse_foreign_file(json_path, key="--json", ours=is_json_with(json_path, ("machine", "versions", "commit")))
    importlib.import_module(BENCHES[name]).main(json_path, quick=quick, **options)
    if quick:
        print("--quick shows that the benchmark runs; its figures mean nothing")


def _spelled(option: str, value: object) -> str:
    """Return an option as it is typed."""
    return {"fleets": "--fleet", "compiled": "--compiled" if value else "--plain"}.get(option, f"--{option}")
