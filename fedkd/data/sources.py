"""Where data come from: a labelled training and test set by name, file, folder or function, read into memory."""

import gzip
import importlib.util
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedkd.errors import SettingError
from fedkd.plugins import is_callable_spec, load_callable
from fedkd.seeding import derive
from fedkd.settings.rules import DATASETS, SOURCES

Array = npt.NDArray[Any]

# The handwritten digits come without a test set; this one is part of the source's definition, like a file would be.
_DIGITS_SPLIT = derive(0, "digits")
_DIGITS_TEST_SHARE = 0.2


@dataclass(frozen=True)
class Dataset:
    """Labelled samples in memory: inputs [N, ...] (uint8 images [N, C, H, W], or float32), labels [N] int64."""

    inputs: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, index: Array | Tensor) -> "Dataset":
        """Return the samples at `index` [n] integers, in that order."""
        chosen = torch.as_tensor(index, dtype=torch.int64)
        return Dataset(self.inputs[chosen], self.labels[chosen])


@dataclass(frozen=True)
class Source:
    """A training set and a test set over the same classes; label c means `classes[c]`.

    Where nobody has named the classes, they are called by their numbers, and are not `named`.
    """

    name: str
    train: Dataset
    test: Dataset
    classes: tuple[str, ...]
    named: bool = True


def load_source(spec: str, *, data_dir: Path, download: bool = False, key: str = "dataset") -> Source:
    """Load the data that a spec names.

    - `digits`: scikit-learn's handwritten digits, 1,797 images of 1×8×8 with a fixed stratified 80/20 split.
    - `mnist`, `fashion-mnist`, `cifar10`, `cifar100`, `svhn`: in `data_dir` as torchvision lays them out.
    - `npz:PATH`: arrays `x_train`, `y_train`, `x_test`, `y_test` and, optionally, `classes` (see `from_arrays`).
    - `folder:PATH` or `folder:PATH@SIZE`: `train/CLASS/*` and `test/CLASS/*` (see `fedkd.data.folder`).
    - `package.module:function`: one's own; called without arguments, returns a `Source` or the four arrays.

    Args:
        spec: what to load.
        data_dir: where the files are; a relative PATH starts here.
        download: whether files that are missing may be fetched into `data_dir`.
        key: the setting that holds the spec, for errors.

    Raises:
        SettingError: the spec is unknown, or what it names is absent, unreadable or not well formed.
    """
    kind, _, rest = spec.partition(":")
    if spec == "digits":
        return _digits(key=key)
    if spec in DATASETS:
        from fedkd.data.torchvision_sets import load

        return from_arrays(spec, *load(spec, data_dir=data_dir, download=download, key=key), key=key)
    if kind == "npz" and rest:
        return _npz(spec, data_dir / Path(rest).expanduser(), key=key)
    if kind == "folder" and rest:
        from fedkd.data.folder import load_folder

        return from_arrays(spec, *load_folder(spec, data_dir, key=key), key=key)
    if is_callable_spec(spec):
        return _from_callable(spec, key=key)
    raise SettingError(key, spec, SOURCES)


def as_float(inputs: Tensor) -> Tensor:
    """Return inputs as float32: uint8 divided by 255, into [0, 1]; floating-point values as they are.

    >>> as_float(torch.tensor([0, 51, 255], dtype=torch.uint8))
    tensor([0.0000, 0.2000, 1.0000])
    """
    if inputs.dtype == torch.uint8:
        return inputs.to(torch.float32).div_(255)
    return inputs.to(torch.float32)


def from_arrays(
    name: str,
    x_train: Array,
    y_train: Array,
    x_test: Array,
    y_test: Array,
    classes: Sequence[str] | Array | None = None,
    *,
    key: str = "dataset",
) -> Source:
    """Make a source of arrays.

    Images are [N, H, W, C] or [N, H, W], uint8 (or floating-point, kept unscaled); features are [N, D] numbers.
    Labels are integers from 0; without `classes` there are as many as the largest label says.

    Raises:
        SettingError: shapes, types or values that do not fit together; names the array.
    """
    train = Dataset(_inputs(name, "x_train", x_train, key=key), _labels(name, "y_train", y_train, key=key))
    test = Dataset(_inputs(name, "x_test", x_test, key=key), _labels(name, "y_test", y_test, key=key))
    named = classes is not None
    if classes is None:
        largest = max((int(part.labels.max()) for part in (train, test) if len(part)), default=-1)
        classes = [str(label) for label in range(largest + 1)]
    return _checked(Source(name, train, test, tuple(str(c) for c in classes), named), key=key)


def _inputs(name: str, array_name: str, values: Any, *, key: str) -> Tensor:
    array = np.asarray(values)
    if array.ndim == 2 and array.dtype.kind in "uifb":
        return torch.from_numpy(np.array(array, dtype=np.float32))
    if array.ndim in (3, 4) and (array.dtype == np.uint8 or array.dtype.kind == "f"):
        images = array[..., None] if array.ndim == 3 else array
        kept = images.dtype if images.dtype == np.uint8 else np.float32
        return torch.from_numpy(np.array(images.transpose(0, 3, 1, 2), dtype=kept, order="C"))
    raise SettingError(
        key,
        name,
        f"a source whose `{array_name}` is uint8 or float images [N, H, W, C] or [N, H, W], "
        f"or features [N, D], not {array.dtype} {list(array.shape)}",
    )


def _labels(name: str, array_name: str, values: Any, *, key: str) -> Tensor:
    array = np.asarray(values)
    if array.ndim != 1 or array.dtype.kind not in "ui":
        raise SettingError(
            key, name, f"a source whose `{array_name}` is integers [N], not {array.dtype} {list(array.shape)}"
        )
    return torch.from_numpy(array.astype(np.int64))


def _checked(source: Source, *, key: str) -> Source:
    """Return the source if a run can use it."""

    def refuse(reason: str) -> SettingError:
        return SettingError(key, source.name, reason)

    for part_name, part in (("train", source.train), ("test", source.test)):
        inputs, labels = part.inputs, part.labels
        if labels.ndim != 1 or labels.dtype != torch.int64 or len(inputs) != len(labels):
            raise refuse(
                f"a source with one int64 label per {part_name} input, not "
                f"{len(inputs)} inputs with {labels.dtype} labels {list(labels.shape)}"
            )
        if not len(labels):
            raise refuse(f"a source with at least one {part_name} sample")
        if inputs.dtype not in (torch.uint8, torch.float32) or inputs.ndim < 2:
            raise refuse(
                f"a source of uint8 or float32 inputs [N, ...], not {inputs.dtype} {list(inputs.shape)} ({part_name})"
            )
        if inputs.dtype == torch.float32 and not bool(torch.isfinite(inputs).all()):
            raise refuse(f"a source of finite numbers, but its {part_name} inputs have NaN or infinity")
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= len(source.classes):
            raise refuse(
                f"a source with {part_name} labels from 0 to {len(source.classes) - 1} "
                f"(it has {len(source.classes)} classes), not from {low} to {high}"
            )
    if source.train.inputs.shape[1:] != source.test.inputs.shape[1:]:
        raise refuse(
            "a source whose train and test inputs have one shape, not "
            f"{list(source.train.inputs.shape[1:])} and {list(source.test.inputs.shape[1:])}"
        )
    if source.train.inputs.dtype != source.test.inputs.dtype:
        raise refuse(
            "a source whose train and test inputs have one type, not "
            f"{source.train.inputs.dtype} and {source.test.inputs.dtype}"
        )
    if len(source.classes) < 2:
        raise refuse("a source with at least two classes")
    return source


def _digits(*, key: str) -> Source:
    table = _digits_table(key=key)
    labels = table[:, -1]
    # The original grey levels are 0..16; over the full byte they keep their order and are images like any other.
    images = np.rint(table[:, :-1] * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8)
    rng = np.random.default_rng(_DIGITS_SPLIT)
    test = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        test[members[: round(_DIGITS_TEST_SHARE * len(members))]] = True
    digits = [str(digit) for digit in range(10)]
    return from_arrays("digits", images[~test], labels[~test], images[test], labels[test], digits, key=key)


def _digits_table(*, key: str) -> npt.NDArray[np.int64]:
    """Return [1797, 65]: 64 grey levels and the label, from the file that scikit-learn ships."""
    found = importlib.util.find_spec("sklearn")
    if found is None or not found.submodule_search_locations:
        raise SettingError(key, "digits", "an available source, and scikit-learn, which ships it, is not installed")
    # Read directly: importing scikit-learn would cost every process seconds.
    path = Path(found.submodule_search_locations[0], "datasets", "data", "digits.csv.gz")
    try:
        with gzip.open(path, "rt", encoding="ascii") as lines:
            return np.loadtxt(lines, delimiter=",", dtype=np.int64)
    except FileNotFoundError as error:
        raise SettingError(key, "digits", f"an available source, but scikit-learn has no file {path}") from error


def _npz(spec: str, path: Path, *, key: str) -> Source:
    if not path.is_file():
        raise SettingError(key, spec, f"an existing file; there is none at {path.absolute()}")
    names = ("x_train", "y_train", "x_test", "y_test")
    try:
        archive = np.load(path, allow_pickle=False)
        arrays = {name: archive[name] for name in (*names, "classes") if name in archive}
        archive.close()
    except (ValueError, OSError, EOFError, AttributeError, zipfile.BadZipFile, zlib.error) as error:
        raise SettingError(key, spec, f"an npz file of plain arrays, without pickled objects, at {path}") from error
    absent = [name for name in names if name not in arrays]
    if absent:
        raise SettingError(key, spec, f"an npz file with {', '.join(names)}; it has no {', '.join(absent)}")
    x_train, y_train, x_test, y_test = (arrays[name] for name in names)
    return from_arrays(spec, x_train, y_train, x_test, y_test, arrays.get("classes"), key=key)


def _from_callable(spec: str, *, key: str) -> Source:
    function = load_callable(spec, key=key)
    try:
        made = function()
    except (Exception, SystemExit) as error:  # one's own function may fail in any way
        raise SettingError(
            key, spec, f"a function that loads data when called without arguments ({type(error).__name__}: {error})"
        ) from error
    if isinstance(made, Source):
        return _checked(made, key=key)
    if isinstance(made, tuple | list) and len(made) == 4:
        return from_arrays(spec, *made, key=key)
    raise SettingError(
        key,
        spec,
        "a function that returns a fedkd.data.sources.Source or (x_train, y_train, x_test, y_test), "
        f"not {type(made).__name__}",
    )
