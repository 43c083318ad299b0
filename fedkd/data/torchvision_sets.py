"""The public image sets that torchvision knows: read where they are, fetched only where that is allowed."""

import gzip
import struct
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fedkd.data.lock import exclusive
from fedkd.errors import SettingError

Array = npt.NDArray[Any]


class Arrays(NamedTuple):
    """Images [N, H, W] or [N, H, W, 3] uint8, labels [N], and the names of the classes."""

    x_train: Array
    y_train: Array
    x_test: Array
    y_test: Array
    classes: list[str]


# Folder in `data_dir`, as torchvision names it, and the classes.
_IDX = {
    "mnist": ("MNIST", [str(digit) for digit in range(10)]),
    "fashion-mnist": (
        "FashionMNIST",
        ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"],
    ),
}
_CIFAR = {"cifar10": ("CIFAR10", "cifar-10-batches-py"), "cifar100": ("CIFAR100", "cifar-100-python")}


def load(name: str, *, data_dir: Path, download: bool, key: str) -> Arrays:
    """Load `mnist`, `fashion-mnist`, `cifar10`, `cifar100` or `svhn` from `data_dir`.

    Raises:
        SettingError: the files are absent (naming where they were looked for), damaged, or can't be downloaded.
    """
    try:
        found = _read(name, data_dir)
        if found is None and download:
            # Several processes may ask at once; one of them downloads.
            with exclusive(data_dir / f"{name}.lock"):
                found = _read(name, data_dir)
                if found is None:
                    _download(name, data_dir)
                    found = _read(name, data_dir)
    except (OSError, RuntimeError, ValueError, EOFError, zlib.error) as error:
        raise SettingError(key, name, f"a data set that can be read or downloaded ({error})") from error
    if found is None:
        raise SettingError(
            key, name, f"a complete data set in {_place(name, data_dir).absolute()} (`download = true` would fetch it)"
        )
    return found


def _place(name: str, data_dir: Path) -> Path:
    if name in _IDX:
        return data_dir / _IDX[name][0] / "raw"
    if name in _CIFAR:
        return data_dir / _CIFAR[name][1]
    return data_dir / "train_32x32.mat"


def _read(name: str, data_dir: Path) -> Arrays | None:
    if not _place(name, data_dir).exists():
        return None
    if name in _IDX:
        return _read_mnist(_place(name, data_dir), _IDX[name][1])
    return _read_cifar(name, data_dir) if name in _CIFAR else _read_svhn(data_dir)


def _read_mnist(folder: Path, classes: list[str]) -> Arrays | None:
    """Read the four IDX files, packed or not.

    torchvision would read only unpacked ones, and importing it costs each process seconds.
    """
    names = [f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
    contents = [_unpacked(folder / name) for name in names]
    present = [content for content in contents if content is not None]
    if len(present) < len(names):
        return None
    x_train, y_train, x_test, y_test = (read_idx(content) for content in present)
    return Arrays(x_train, y_train, x_test, y_test, classes)


def _unpacked(path: Path) -> bytes | None:
    packed = path.with_name(f"{path.name}.gz")
    if path.is_file():
        return path.read_bytes()
    return gzip.decompress(packed.read_bytes()) if packed.is_file() else None


def read_idx(content: bytes) -> npt.NDArray[np.uint8]:
    """Decode an IDX file of bytes (the MNIST format): 0, 0, 8, number of dimensions, sizes as big-endian int32, data.

    >>> read_idx(bytes([0, 0, 8, 1, 0, 0, 0, 2, 7, 9]))
    array([7, 9], dtype=uint8)

    Raises:
        ValueError: not such a file, or one that is cut short.
    """
    if len(content) < 4 or content[:3] != b"\0\0\x08":
        raise ValueError("not an IDX file of bytes")
    start = 4 + 4 * content[3]
    if len(content) < start:
        raise ValueError(f"an IDX file of {len(content)} bytes, cut short in its header")
    shape = struct.unpack(f">{content[3]}I", content[4:start])
    if len(content) - start != np.prod(shape, dtype=np.int64):
        raise ValueError(f"an IDX file with {len(content) - start} bytes of data for the shape {list(shape)}")
    return np.frombuffer(content, dtype=np.uint8, offset=start).reshape(shape)


def _read_cifar(name: str, data_dir: Path) -> Arrays | None:
    from torchvision import datasets

    # The format is pickle: torchvision compares each file's MD5 with the published one before it opens any.
    make = getattr(datasets, _CIFAR[name][0])
    try:
        train, test = make(str(data_dir), train=True), make(str(data_dir), train=False)
    except RuntimeError:  # incomplete, or not the published files
        return None
    return Arrays(train.data, np.array(train.targets), test.data, np.array(test.targets), list(train.classes))


def _read_svhn(data_dir: Path) -> Arrays | None:
    from torchvision import datasets

    try:
        train, test = (datasets.SVHN(str(data_dir), split=split) for split in ("train", "test"))
    except RuntimeError:  # incomplete, or not the published files
        return None
    images = (part.data.transpose(0, 2, 3, 1) for part in (train, test))
    return Arrays(next(images), train.labels, next(images), test.labels, [str(digit) for digit in range(10)])


def _download(name: str, data_dir: Path) -> None:
    from torchvision import datasets

    if name == "svhn":
        for split in ("train", "test"):
            datasets.SVHN(str(data_dir), split=split, download=True)
        return
    folder = _IDX[name][0] if name in _IDX else _CIFAR[name][0]
    getattr(datasets, folder)(str(data_dir), download=True)
