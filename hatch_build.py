"""What a wheel holds: the library `fedkd`, and inside it, as data, the Flower app that the repository's root is.

`clients`, `strategies` and `experiments` are names that other projects use too. On the top level of somebody's
site-packages they would shadow, or be shadowed by, packages of the same names. Flower wants an app as a folder anyway,
so a wheel carries it as `fedkd/flower-app`: nobody can import from there by accident. The command `fedkd` puts it on
its own process's path alone (`fedkd/__main__.py`), and `fedkd.run` at the end of a notebook's (`fedkd/notebook.py`).
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

APP = "fedkd/flower-app"
ROOMS = ("clients", "strategies", "experiments")
KINDS = (".py", ".toml", ".jinja", ".ipynb")
_NOT_OURS = ("__pycache__", "runs", "build", "dist", "gpu_kit")  # the kit packs a clone, and is no part of the app
_OWN_LIBRARY = '    "fedkd/**/*.py",\n'


def app_files(folder: Path) -> Iterator[Path]:
    """Yield what of a folder belongs to the app: what a user keeps there, results and keys too, is nobody else's."""
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.name in _NOT_OURS:
            continue
        if path.is_dir():
            yield from app_files(path)
        elif path.suffix in KINDS:
            yield path


class FlowerAppInWheel(BuildHookInterface):
    """Puts the app into a wheel. An editable install needs none: there the clone itself is the app."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Add the app's files, with a pyproject.toml that does not bundle the library, which is installed beside it."""
        if version == "editable":
            return
        root = Path(self.root)
        before, found, after = (root / "pyproject.toml").read_text(encoding="utf-8").partition(_OWN_LIBRARY)
        if not found:
            raise ValueError(f"Expected a line {_OWN_LIBRARY!r} in fab-include of pyproject.toml.")
        self._scratch = tempfile.TemporaryDirectory()
        settings = Path(self._scratch.name, "pyproject.toml")
        settings.write_text(before + after, encoding="utf-8")
        ours = [root / "LICENSE", *(path for room in ROOMS for path in app_files(root / room))]
        build_data["force_include"] |= {str(path): f"{APP}/{path.relative_to(root).as_posix()}" for path in ours}
        build_data["force_include"][str(settings)] = f"{APP}/pyproject.toml"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Clear up."""
        if version != "editable":
            self._scratch.cleanup()
