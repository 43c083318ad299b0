"""Samples in memory: what a source has to be, made of anybody's arrays and checked."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedkd.errors import SettingError

Array = npt.NDArray[Any]

LAYOUTS = ("NHWC", "NCHW")
_USUAL_CHANNELS = (1, 3)
_MOST_NAMED = 10


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


@dataclass(frozen=True)
class Public:
    """What a proxy set is drawn from.

    Attributes:
        name: of the source.
        inputs: ``[N, ...]``, as those of a :class:`Dataset`.
        labels: ``[N]`` int64; None where they are not known.
        classes: what they mean.
        named: whether somebody has named them.
    """

    name: str
    inputs: Tensor
    labels: Tensor | None = None
    classes: tuple[str, ...] = ()
    named: bool = False

    @classmethod
    def of(cls, source: Source) -> "Public":
        """Return the training set of a source."""
        return cls(source.name, source.train.inputs, source.train.labels, source.classes, source.named)


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
    layout: str | Array | None = None,
    *,
    key: str = "dataset",
) -> Source:
    """Make a source of arrays.

    Images are [N, H, W], [N, H, W, C] or [N, C, H, W], uint8 (or floating-point, kept unscaled); features are [N, D]
    numbers. Labels are integers from 0; without `classes` there are as many as the largest label says, and each has to
    occur.

    Args:
        name: of the source, for errors.
        x_train: training inputs.
        y_train: their labels [N].
        x_test: test inputs.
        y_test: their labels [N].
        classes: the classes' names [C].
        layout: of images with channels, one of `LAYOUTS`; None: the sizes tell.
        key: the setting that holds the name, for errors.

    Raises:
        SettingError: shapes, types or values that do not fit together; names the array.
    """
    train, test = (
        Dataset(to_inputs(name, f"x_{part}", x, layout, key=key), _labels(name, f"y_{part}", y, key=key))
        for part, x, y in (("train", x_train, y_train), ("test", x_test, y_test))
    )
    if classes is not None:
        return checked(Source(name, train, test, class_names(name, classes, key=key)), key=key)
    occurring = set(np.unique(np.concatenate([part.labels.numpy() for part in (train, test)])).tolist())
    numbered = range(max(occurring, default=-1) + 1)
    if min(occurring, default=0) >= 0 and (missing := [label for label in numbered if label not in occurring]):
        some = ", ".join(map(str, missing[:_MOST_NAMED])) + ", ..." * (len(missing) > _MOST_NAMED)
        raise SettingError(
            key,
            name,
            f"a source whose labels are 0, 1, 2, ... without gaps, or with the names of all its classes as `classes`; "
            f"of the labels up to {max(occurring)} there are {len(missing)} that no sample has ({some})",
        )
    return checked(Source(name, train, test, tuple(map(str, numbered)), named=False), key=key)


def public_inputs(
    name: str,
    inputs: Any,
    labels: Any = None,
    classes: Sequence[str] | Array | None = None,
    layout: str | Array | None = None,
    *,
    key: str = "proxy",
) -> Public:
    """Make what a proxy set is drawn from; the arguments are those of :func:`from_arrays`.

    Labels are no more than a control's: those that are no numbers of classes are taken to be not known.

    Raises:
        SettingError: inputs that cannot be used, or not as many labels as inputs.
    """
    found = to_inputs(name, "inputs", inputs, layout, key=key)
    if not len(found):
        raise SettingError(key, name, "a source with at least one public sample")
    if found.dtype == torch.float32 and not bool(torch.isfinite(found).all()):
        raise SettingError(key, name, "a source of finite numbers, but its inputs have NaN or infinity")
    names = None if classes is None else class_names(name, classes, key=key)
    known = None if labels is None else np.asarray(labels)
    if known is None or known.ndim != 1 or known.dtype.kind not in "ui":
        return Public(name, found)
    if len(known) != len(found):
        raise SettingError(
            key, name, f"a source with one label per input, or none, not {len(found)} inputs with {len(known)} labels"
        )
    most = int(known.max()) + 1
    if known.min() < 0 or (names is not None and most > len(names)):
        return Public(name, found)
    given = tuple(map(str, range(most))) if names is None else names
    return Public(name, found, torch.from_numpy(known.astype(np.int64)), given, named=names is not None)


def class_names(name: str, classes: Sequence[str] | Array, *, key: str) -> tuple[str, ...]:
    """Return the names of classes as text.

    Raises:
        SettingError: they are not a list of different names.
    """
    given = np.asarray(classes)
    if given.ndim != 1:
        raise SettingError(key, name, f"a source whose `classes` is a list of names [C], not {list(given.shape)}")
    try:
        # An array of bytes has been read from a file that was written so, and str() of b"cat" is "b'cat'".
        names = [each.decode() if isinstance(each, bytes) else str(each) for each in given.tolist()]
    except UnicodeDecodeError as error:
        raise SettingError(key, name, f"a source whose `classes` are UTF-8 ({error})") from error
    if twice := sorted({each for each in names if names.count(each) > 1}):
        raise SettingError(key, name, f"a source whose `classes` have names of their own; {twice[0]!r} comes twice")
    return tuple(names)


def to_inputs(name: str, array_name: str, values: Any, layout: str | Array | None = None, *, key: str) -> Tensor:
    """Return inputs of one's own form as they are kept: uint8 or float32 images [N, C, H, W], or features [N, D].

    Raises:
        SettingError: on `key`, names the array with its type and shape.
    """
    array = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    if array.ndim == 2 and array.dtype.kind in "uifb":
        return torch.from_numpy(np.array(array, dtype=np.float32))
    if array.ndim in (3, 4) and (array.dtype == np.uint8 or array.dtype.kind == "f"):
        images = array[:, None] if array.ndim == 3 else array
        if array.ndim == 4 and _layout(name, array_name, array, layout, key=key) == "NHWC":
            images = array.transpose(0, 3, 1, 2)
        kept = images.dtype if images.dtype == np.uint8 else np.float32
        return torch.from_numpy(np.array(images, dtype=kept, order="C"))
    raise SettingError(
        key,
        name,
        f"a source whose `{array_name}` is uint8 or float images [N, H, W, C], [N, C, H, W] or [N, H, W], "
        f"or features [N, D], not {array.dtype} {list(array.shape)}",
    )


def _layout(name: str, array_name: str, images: Array, layout: str | Array | None, *, key: str) -> str:
    """Return where the channels of images are: at the side that is 1 or 3, or else at that smaller than both others."""
    if layout is not None:
        if str(layout) not in LAYOUTS:
            raise SettingError(key, name, f"a source whose `layout` is one of {', '.join(LAYOUTS)}, not {layout}")
        return str(layout)
    first, middle, last = images.shape[1:]
    usual = [side in _USUAL_CHANNELS for side in (first, last)]
    smallest = [first < min(middle, last), last < min(first, middle)]
    candidates = usual if any(usual) else smallest
    if candidates[0] != candidates[1]:
        return "NCHW" if candidates[0] else "NHWC"
    raise SettingError(
        key,
        name,
        f"a source whose sizes tell the channels of `{array_name}` {list(images.shape)} from height and width, or that "
        "says `layout`: in an npz file an array `layout` of NHWC or NCHW, of a function a fedkd.data.sources.Source",
    )


def _labels(name: str, array_name: str, values: Any, *, key: str) -> Tensor:
    array = np.asarray(values)
    if array.ndim != 1 or array.dtype.kind not in "ui":
        raise SettingError(
            key, name, f"a source whose `{array_name}` is integers [N], not {array.dtype} {list(array.shape)}"
        )
    return torch.from_numpy(array.astype(np.int64))


def checked(source: Source, *, key: str) -> Source:
    """Return the source if a run can use it.

    Raises:
        SettingError: on `key`, what is wrong with it.
    """

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
