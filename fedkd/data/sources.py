"""Where data come from: a labelled training and test set by name, file, folder or function, read into memory.

A proxy set may come without labels, and without a test set.
"""

from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from fedkd.data.arrays import Dataset, Public, Source, as_float, checked, from_arrays, public_inputs
from fedkd.errors import SettingError
from fedkd.plugins import is_callable_spec, load_callable
from fedkd.settings.rules import DATASETS, SOURCES
from fedkd.settings.sources import Place, place

__all__ = ["Dataset", "Public", "Source", "as_float", "from_arrays", "load_public", "load_source"]


def load_source(spec: str, *, data_dir: Path, download: bool = False, key: str = "dataset") -> Source:
    """Load the labelled data that a spec names.

    - `digits`: scikit-learn's handwritten digits, 1,797 images of 1×8×8 with a fixed stratified 80/20 split.
    - `mnist`, `fashion-mnist`, `cifar10`, `cifar100`, `svhn`: in `data_dir` as torchvision lays them out.
    - `npz:PATH`: arrays `x_train`, `y_train`, `x_test`, `y_test` and, optionally, `classes` and `layout` (see
      `fedkd.data.arrays`).
    - `folder:PATH` or `folder:PATH@SIZE`: `train/CLASS/*` and `test/CLASS/*` (see `fedkd.data.folder`).
    - `parquet:PATH`, `hf:PATH` or `hf:NAME`: a data set of Hugging Face's library (see `fedkd.data.hugging_face`).
    - `package.module:function`: one's own; called without arguments, returns a `Source` or the four arrays.

    Args:
        spec: what to load.
        data_dir: where the files are; a relative PATH starts here.
        download: whether data that are missing may be fetched.
        key: the setting that holds the spec, for errors.

    Raises:
        SettingError: the spec is unknown, or what it names is absent, unreadable or not well formed.
    """
    if spec == "digits":
        from fedkd.data.digits import load_digits

        return from_arrays(spec, *load_digits(key=key), key=key)
    if spec in DATASETS:
        from fedkd.data.torchvision_sets import load

        return from_arrays(spec, *load(spec, data_dir=data_dir, download=download, key=key), key=key)
    if found := place(spec, data_dir):
        return _read(spec, found, download=download, key=key)
    if is_callable_spec(spec):
        return _made(spec, _call(spec, key=key), key=key)
    raise SettingError(key, spec, SOURCES)


def load_public(spec: str, *, data_dir: Path, download: bool = False, key: str = "proxy") -> Public:
    """Load what a proxy set is drawn from: any source of :func:`load_source`, of which only the training set is read.

    And what has no labels: an npz file with one array; a folder of images; a set of Hugging Face's with a column of
    images; a function that returns an array or a tensor.

    Raises:
        SettingError: as :func:`load_source`.
    """
    found = place(spec, data_dir)
    if found is None and is_callable_spec(spec):
        return _made_public(spec, _call(spec, key=key), key=key)
    if found is None:
        return Public.of(load_source(spec, data_dir=data_dir, download=download, key=key))
    if found.kind == "npz":
        from fedkd.data.npz import load_public_npz

        arrays = load_public_npz(spec, found.path, key=key)
        return public_inputs(spec, arrays["x"], arrays.get("y"), arrays.get("classes"), arrays.get("layout"), key=key)
    if found.kind == "folder":
        from fedkd.data.folder import load_public_folder

        return public_inputs(spec, *load_public_folder(spec, found, key=key), "NHWC", key=key)
    from fedkd.data.hugging_face import load_public_set

    return public_inputs(spec, *load_public_set(spec, found, download=download, key=key), "NHWC", key=key)


def _read(spec: str, found: Place, *, download: bool, key: str) -> Source:
    if found.kind == "npz":
        from fedkd.data.npz import SAMPLES, load_npz

        arrays = load_npz(spec, found.path, key=key)
        x_train, y_train, x_test, y_test = (arrays[name] for name in SAMPLES)
        about = {name: arrays.get(name) for name in ("classes", "layout")}
        return from_arrays(spec, x_train, y_train, x_test, y_test, **about, key=key)
    if found.kind == "folder":
        from fedkd.data.folder import load_folder

        return from_arrays(spec, *load_folder(spec, found, key=key), "NHWC", key=key)
    from fedkd.data.hugging_face import load_set

    return from_arrays(spec, *load_set(spec, found, download=download, key=key), "NHWC", key=key)


def _call(spec: str, *, key: str) -> Any:
    """Return what a function of one's own does."""
    function = load_callable(spec, key=key)
    try:
        return function()
    except (Exception, SystemExit) as error:  # one's own function may fail in any way
        raise SettingError(
            key, spec, f"a function that loads data when called without arguments ({type(error).__name__}: {error})"
        ) from error


def _made(spec: str, made: Any, *, key: str) -> Source:
    if isinstance(made, Source):
        return checked(made, key=key)
    if isinstance(made, tuple | list) and len(made) == 4:
        return from_arrays(spec, *made, key=key)
    raise SettingError(
        key,
        spec,
        "a function that returns a fedkd.data.sources.Source or (x_train, y_train, x_test, y_test), "
        f"not {type(made).__name__}",
    )


def _made_public(spec: str, made: Any, *, key: str) -> Public:
    if isinstance(made, Source):
        return Public.of(checked(made, key=key))
    if isinstance(made, Tensor | np.ndarray):
        return public_inputs(spec, made, key=key)
    if isinstance(made, tuple | list) and len(made) == 4:
        return public_inputs(spec, made[0], made[1], key=key)
    raise SettingError(
        key,
        spec,
        "a function that returns inputs alone (an array or a tensor), a fedkd.data.sources.Source or (x_train, "
        f"y_train, x_test, y_test), not {type(made).__name__}",
    )
