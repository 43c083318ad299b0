"""A module of compiled loops, imported from where it stays, so that numba finds again what it compiled.

numba keeps compiled code beside the source and knows it by the source's path. Flower runs an app from a copy that lives
as long as a run; so each run would compile everything anew. Hence the module is copied, and imported from its copy.
"""

import hashlib
import importlib
import importlib.util
import os
import sys
import tempfile
from pathlib import Path
from types import ModuleType

_FOLDER = "~/.cache/fedkd/loops"


def from_its_place(name: str) -> ModuleType:
    """Import a module of one file from a copy below ``~/.cache/fedkd``, or as it is where nothing can be written there.

    Raises:
        ImportError: what the module needs is not installed.
    """
    found = importlib.util.find_spec(name)
    if name in sys.modules or found is None or found.origin is None:
        return importlib.import_module(name)
    try:
        kept = _copied(Path(found.origin))
    except (OSError, RuntimeError):  # no home, or none that can be written to
        return importlib.import_module(name)
    spec = importlib.util.spec_from_file_location(name, kept)
    if spec is None or spec.loader is None:
        return importlib.import_module(name)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _copied(source: Path) -> Path:
    """Return a copy whose path is the same for the same text, whichever file that came from."""
    text = source.read_bytes()
    folder = Path(_FOLDER).expanduser() / hashlib.sha256(text).hexdigest()[:16]
    kept = folder / source.name
    if kept.is_file() and kept.read_bytes() == text:
        return kept
    folder.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=folder, suffix=".tmp")
    with os.fdopen(handle, "wb") as file:
        file.write(text)
    Path(name).replace(kept)  # whole, or not there, for the actors that start at the same time
    return kept
