"""Image files decoded as people see them: turned upright, eight bits, grey or RGB."""

from collections.abc import Iterable
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from PIL.Image import Image

Array = npt.NDArray[Any]

SUFFIXES = (
    ".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".jp2", ".j2k", ".bmp", ".dib", ".gif", ".tif", ".tiff", ".webp",
    ".avif", ".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".pcx",
)  # fmt: skip
"""By what the files are known; of all that Pillow reads, not what runs another program (`.eps`) or is no picture."""

# Pillow's modes of pictures without colour; one other picture makes the whole set RGB.
_GREY = frozenset({"1", "L", "LA", "La"})


class ImageError(ValueError):
    """Images that cannot be read, or not as one set: the message completes "images ..." and names the file."""


def read_images(files: Iterable[tuple[str, Path | bytes]], *, size: int | None = None) -> Array:
    """Decode images that are to be one set: [N, H, W, C] uint8, with one channel if all of them are grey, else three.

    What a camera has noted of its position (EXIF) is heeded.

    Args:
        files: of each image its name, for errors, and its file or content; at least one.
        size: to squares of how many pixels a side they are resized (bilinear, antialiased); None: not at all.

    Raises:
        ImageError: names the image that cannot be read or has another size.
    """
    pictures: list[Array] = []
    first = ""
    for name, file in files:
        picture = _decode(file, name=name, size=size)
        first = first or name
        if pictures and picture.shape[:2] != pictures[0].shape[:2]:
            raise ImageError(
                "of one size, or with @SIZE after its path to resize them; "
                f"{first} has {_sides(pictures[0])} pixels and {name} has {_sides(picture)}"
            )
        pictures.append(picture)
    channels = max(picture.shape[2] for picture in pictures)
    images = np.empty((len(pictures), *pictures[0].shape[:2], channels), dtype=np.uint8)
    for image, picture in zip(images, pictures, strict=True):
        image[...] = picture
    return images


def _decode(file: Path | bytes, *, name: str, size: int | None) -> Array:
    """Return [H, W, 1 or 3] uint8."""
    from PIL import Image, ImageOps

    try:
        with Image.open(BytesIO(file) if isinstance(file, bytes) else file) as image:
            deep = image.mode.startswith(("I", "F"))  # Pillow would clip these at 255 without a word
            picture = image if deep else _upright(ImageOps.exif_transpose(image), size)
    except Exception as error:  # Pillow's readers raise what they like on a damaged file
        reason = str(error) or type(error).__name__
        raise ImageError(f"that can be read, but {name} cannot be ({reason})") from error
    if deep:
        raise ImageError(f"with 8 bits per channel, unlike {name} (Pillow's mode {picture.mode}): save it with 8 bits")
    return np.asarray(picture).reshape(picture.height, picture.width, -1)


def _upright(image: "Image", size: int | None) -> "Image":
    from PIL.Image import Resampling

    picture = image.convert("L" if image.mode in _GREY else "RGB")
    return picture if size is None else picture.resize((size, size), Resampling.BILINEAR)


def _sides(picture: Array) -> str:
    return f"{picture.shape[1]}×{picture.shape[0]}"
