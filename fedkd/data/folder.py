"""Image folders: `train/CLASS/*` and `test/CLASS/*`, any format that Pillow reads."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fedkd.errors import SettingError

if TYPE_CHECKING:
    from PIL.Image import Image

Array = npt.NDArray[Any]

_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"})
# Pillow's modes of pictures without colour; one other picture makes the whole set RGB.
_GREY = frozenset({"1", "L", "LA"})


def load_folder(spec: str, data_dir: Path, *, key: str) -> tuple[Array, Array, Array, Array, list[str]]:
    """Load `folder:PATH` or `folder:PATH@SIZE`: images [N, H, W, C] uint8, labels, test images and labels, classes.

    The classes are the folders in `train`, sorted by name. Images are grey if all of them are, else RGB. They
    must have one size, unless SIZE says to which square of SIZE × SIZE pixels they are resized.

    Raises:
        SettingError: on `key`, naming the folder or file that is absent, empty, unreadable or of another size.
    """
    root, size = _parse(spec, data_dir)
    for part in ("train", "test"):
        if not (root / part).is_dir():
            raise SettingError(key, spec, f"a folder with train/ and test/; there is no {(root / part).absolute()}")
    classes = _subfolders(root / "train")
    unknown = sorted(set(_subfolders(root / "test")) - set(classes))
    if unknown:
        raise SettingError(key, spec, f"a folder whose test classes are among those of train, not {', '.join(unknown)}")
    files = {part: _files(root / part, classes) for part in ("train", "test")}
    for part, found in files.items():
        if not found:
            raise SettingError(key, spec, f"a folder with images in {part}/CLASS/; there are none in {root / part}")
    mode = _common_mode([path for found in files.values() for path, _ in found], size, spec, key=key)
    (x_train, y_train), (x_test, y_test) = (
        (np.stack([_pixels(path, mode, size, spec, key=key) for path, _ in found]), np.array([c for _, c in found]))
        for found in files.values()
    )
    return x_train, y_train, x_test, y_test, classes


def _parse(spec: str, data_dir: Path) -> tuple[Path, int | None]:
    """Return the folder and the size asked for, where there is one."""
    text = spec.removeprefix("folder:")
    path, at, size = text.rpartition("@")
    if at and size.isdecimal() and int(size) > 0 and not (data_dir / Path(text).expanduser()).is_dir():
        return data_dir / Path(path).expanduser(), int(size)
    return data_dir / Path(text).expanduser(), None


def _subfolders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _files(folder: Path, classes: list[str]) -> list[tuple[Path, int]]:
    """Return the images of a part with their labels, in an order that is the same on every machine."""
    return [
        (path, label)
        for label, name in enumerate(classes)
        if (folder / name).is_dir()
        for path in sorted((folder / name).iterdir())
        if path.suffix.lower() in _SUFFIXES and not path.name.startswith(".")
    ]


def _common_mode(paths: list[Path], size: int | None, spec: str, *, key: str) -> str:
    """Read the images' headers; return "L" or "RGB", or refuse a set of several sizes."""
    first = None
    grey = True
    for path in paths:
        with _open(path, spec, key=key) as image:
            if image.mode.startswith(("I", "F")):  # Pillow would clip these at 255 without a word
                raise SettingError(key, spec, f"a folder of images with 8 bits per channel, unlike {path}")
            grey = grey and image.mode in _GREY
            first = first or (path, image.size)
            if size is None and image.size != first[1]:
                raise SettingError(
                    key,
                    spec,
                    "a folder whose images have one size, or folder:PATH@SIZE to resize them; "
                    f"{first[0]} has {_sides(first[1])} pixels and {path} has {_sides(image.size)}",
                )
    return "L" if grey else "RGB"


def _pixels(path: Path, mode: str, size: int | None, spec: str, *, key: str) -> Array:
    """Return [H, W, 1 or 3] uint8."""
    from PIL.Image import Resampling

    with _open(path, spec, key=key) as image:
        try:
            picture = image.convert(mode)
        except (OSError, SyntaxError) as error:  # Pillow's, for a file that is cut short or damaged
            raise _unreadable(path, spec, error, key=key) from error
    if size is not None:
        picture = picture.resize((size, size), Resampling.BILINEAR)
    return np.asarray(picture).reshape(picture.height, picture.width, -1)


def _open(path: Path, spec: str, *, key: str) -> "Image":
    from PIL import Image

    try:
        return Image.open(path)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise _unreadable(path, spec, error, key=key) from error


def _unreadable(path: Path, spec: str, error: Exception, *, key: str) -> SettingError:
    return SettingError(key, spec, f"a folder of images that can be read, but {path} cannot be ({error})")


def _sides(size: tuple[int, int]) -> str:
    return f"{size[0]}×{size[1]}"
