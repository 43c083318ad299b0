"""The part of an app's folder that Flower bundles, apart from all else that lies in the folder.

Flower looks at every file below an app's folder, one by one, before it leaves most of them out: with an environment of
sixty thousand files beside the code, as most people have it, that takes seconds of every run.
"""

import os
import shutil
from pathlib import Path

# As Flower has them: what can go into a bundle, and folders at the top that never do.
_SUFFIXES = (".py", ".toml", ".md", ".yaml", ".yml", ".json", ".jsonl")
_NAMES = (".gitignore", "LICENSE")
_NEVER = {
    ".git",
    ".flwr",
    ".eggs",
    ".venv",
    "build",
    "eggs",
    "lib",
    "lib64",
    "parts",
    "env",
    "venv",
    "ENV",
    "env.bak",
    "venv.bak",
}


def bundled(app: Path, folder: Path) -> Path:
    """Copy what of an app Flower can bundle, and its .gitignore, by which Flower chooses; return the new folder.

    Left out are environments, and folders that a line of the .gitignore names as ``name/``.

    Args:
        app: the app's folder.
        folder: does not exist yet.
    """
    ignored = _ignored_folders(app / ".gitignore")
    for path, folders, files in os.walk(app):
        here = Path(path)
        top = here == app
        folders[:] = [
            name
            for name in folders
            if not (name == "__pycache__" or name in ignored or (top and name in _NEVER))
            and not (here / name / "pyvenv.cfg").exists()
        ]
        for name in files:
            if (name.endswith(_SUFFIXES) or (top and name in _NAMES)) and not (here / name).is_symlink():
                copy = folder / (here / name).relative_to(app)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(here / name, copy)
    return folder


def _ignored_folders(gitignore: Path) -> set[str]:
    """Return the names of the folders that are ignored wherever they are, as far as plain lines tell."""
    if not gitignore.is_file():
        return set()
    lines = [line.strip() for line in gitignore.read_text(encoding="utf-8", errors="replace").splitlines()]
    if any(line.startswith("!") for line in lines):  # a later line may take back an earlier one
        return set()
    plain = (line.removesuffix("/") for line in lines if line.endswith("/"))
    return {name for name in plain if name and not set(name) & set("/*?[]\\#")}
