"""The part of an app's folder that Flower bundles, apart from all else that lies in the folder.

Flower looks at every file below an app's folder, one by one, before it leaves most of them out: with an environment of
sixty thousand files beside the code, as most people have it, that takes seconds of every run.
"""

import os
import shutil
import tomllib
from pathlib import Path

from pathspec import PathSpec

# As Flower has them: what can go into a bundle, and folders at the top that never do.
_SUFFIXES = (".py", ".toml", ".md", ".yaml", ".yml", ".json", ".jsonl")
_NAMES = (".gitignore", "LICENSE")
_NEVER = {
    ".git", ".flwr", ".eggs", ".venv", "build", "eggs", "lib", "lib64", "parts", "env", "venv", "ENV", "env.bak",
    "venv.bak",
}  # fmt: skip


def bundled(app: Path, folder: Path) -> Path:
    """Copy what of an app Flower can bundle, and its .gitignore, by which Flower chooses; return the new folder.

    Left out are environments, what the .gitignore names, and the folder that is copied to. An app whose own patterns
    speak of what is left out is returned as it is, for Flower insists that each of them finds something.

    Args:
        app: the app's folder.
        folder: does not exist yet; nothing in its parent is the app's.
    """
    if _names_what_is_left_out(app / "pyproject.toml"):
        return app
    home, ignored, prunes = folder.parent.resolve(), *_ignored(app / ".gitignore")
    for path, folders, files in os.walk(app):
        here = Path(path)
        below, top = here.relative_to(app), here == app
        folders[:] = [
            name
            for name in folders
            if not (name == "__pycache__" or (top and name in _NEVER) or (here / name).resolve() == home)
            and not (prunes and ignored.match_file(f"{(below / name).as_posix()}/"))
            and not os.path.exists(here / name / "pyvenv.cfg")  # noqa: PTH110 - false where one may not look
        ]
        for name in files:
            wanted = name.endswith(_SUFFIXES) or (top and name in _NAMES)
            if wanted and not (here / name).is_symlink() and not ignored.match_file((below / name).as_posix()):
                (folder / below).mkdir(parents=True, exist_ok=True)
                shutil.copyfile(here / name, folder / below / name)
    return folder


def _ignored(gitignore: Path) -> tuple[PathSpec, bool]:
    """Return what is ignored, as Flower reads it, and whether nothing in a folder that is ignored can be taken back."""
    try:
        lines = [] if gitignore.is_symlink() else gitignore.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        lines = []
    lines = [line.strip() for line in lines]
    # By the name that Flower uses; there are others, with other rules.
    return PathSpec.from_lines("gitwildmatch", lines), not any(line.startswith("!") for line in lines)


def _names_what_is_left_out(project: Path) -> bool:
    try:
        app = tomllib.loads(project.read_text(encoding="utf-8"))["tool"]["flwr"]["app"]
        patterns = [str(pattern) for key in ("fab-include", "fab-exclude") for pattern in app.get(key, [])]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return True  # Flower says what is wrong
    return any(pattern.lstrip("!/").split("/")[0] in _NEVER for pattern in patterns)
