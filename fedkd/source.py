"""A hash of the code that runs: Ray can put another checkout of the same names ahead of the bundle."""

import hashlib
import importlib.util
from functools import lru_cache
from pathlib import Path

_PACKAGES = ("fedkd", "clients")
_APP = "flower-app"  # as in hatch_build.py


@lru_cache(maxsize=1)
def source_hash() -> str:
    """Return a hash over the Python files of the packages a peer runs, as this process would import them."""
    digest = hashlib.blake2b(digest_size=8)
    for package in _PACKAGES:
        root = source_root(package)
        for path in sorted(path for path in root.rglob("*.py") if root / _APP not in path.parents):
            digest.update(f"{package}/{path.relative_to(root).as_posix()}\0".encode())
            digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()


def app_folder() -> Path:
    """Return the folder of the Flower app, with its pyproject.toml: inside of an installed wheel, else the clone."""
    root = source_root()
    shipped = root / _APP
    return shipped if shipped.is_dir() else root.parent


def source_root(package: str = "fedkd") -> Path:
    """Return the folder from which this process imports a package."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"package {package!r} is not importable in this process")
    return Path(next(iter(spec.submodule_search_locations))).resolve()
