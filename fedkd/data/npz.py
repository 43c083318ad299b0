"""Arrays in an npz file."""

import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedkd.errors import SettingError

Array = npt.NDArray[Any]

SAMPLES = ("x_train", "y_train", "x_test", "y_test")
_ABOUT = ("classes", "layout")
_INPUTS, _LABELS = ("x_train", "x"), {"x_train": "y_train", "x": "y"}


def load_npz(spec: str, path: Path, *, key: str) -> dict[str, Array]:
    """Return the arrays `x_train`, `y_train`, `x_test` and `y_test`, and `classes` and `layout` if they are there.

    Raises:
        SettingError: on `key`: there is no such file, or it lacks an array.
    """
    arrays = _read(spec, path, (*SAMPLES, *_ABOUT), key=key)
    if absent := [name for name in SAMPLES if name not in arrays]:
        raise SettingError(key, spec, f"an npz file with {', '.join(SAMPLES)}; it has no {', '.join(absent)}")
    return arrays


def load_public_npz(spec: str, path: Path, *, key: str) -> dict[str, Array]:
    """Return the array of a proxy set as `x`, and `y`, `classes` and `layout` if they are there.

    It is `x_train` (with `y_train`), or `x` (with `y`), or whatever a file's only array is called.

    Raises:
        SettingError: on `key`: there is no such file, or it has several arrays and none of these.
    """
    arrays = _read(spec, path, (), key=key)
    names = [name for name in arrays if name not in _ABOUT]
    chosen = next((name for name in _INPUTS if name in arrays), names[0] if len(names) == 1 else None)
    if chosen is None:
        there = f"it has {', '.join(names)}" if names else "it has no array"
        raise SettingError(key, spec, f"an npz file with one array, or with one called x or x_train; {there}")
    found = {"x": arrays[chosen], **{name: arrays[name] for name in _ABOUT if name in arrays}}
    if (labels := _LABELS.get(chosen, "")) in arrays:
        found["y"] = arrays[labels]
    return found


def _read(spec: str, path: Path, names: Sequence[str], *, key: str) -> dict[str, Array]:
    """Return the named arrays of a file, as far as it has them; all without names."""
    if not path.is_file():
        raise SettingError(key, spec, f"an existing file; there is none at {path.absolute()}")
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in names or archive.files if name in archive}
    except (ValueError, OSError, EOFError, AttributeError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise SettingError(key, spec, f"an npz file of plain arrays, without pickled objects, at {path}") from error
