"""Images brought to one form, in integer arithmetic: every site computes the same bytes."""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from fedkd.data.arrays import Dataset, Source
from fedkd.errors import SettingError

_COLOURS = {1, 3}


def shaped(source: Source, *, size: int = 0, channels: int = 0, key: str = "dataset") -> Source:
    """Return a source of images of one form.

    Args:
        source: of any inputs.
        size: side of the squares that the images become, in pixels; 0: as they are.
        channels: 1 for grey, 3 for RGB; 0: as they are.
        key: the setting that holds the source, for errors.

    Raises:
        SettingError: on `key`, the inputs are no 8-bit images, grey or RGB.
    """
    shape = source.train.inputs.shape[1:]
    if not size and not channels:
        return source
    if source.train.inputs.dtype != torch.uint8 or len(shape) != 3 or shape[0] not in _COLOURS:
        raise SettingError(
            key,
            source.name,
            "8-bit images, grey or RGB, beside `image-size` or `image-channels`; "
            f"its inputs are {source.train.inputs.dtype} {list(shape)}",
        )
    wanted = (channels or shape[0], size or shape[1], size or shape[2])
    train, test = (
        Dataset(match_images(part.inputs, wanted), part.labels) if wanted != tuple(shape) else part
        for part in (source.train, source.test)
    )
    return replace(source, train=train, test=test)


def match_images(images: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Resize images (bilinear, antialiased), and turn RGB to grey (ITU-R 601 luma) or grey to RGB.

    Args:
        images: ``[N, 1 or 3, h, w]`` uint8.
        shape: channels (1 or 3), height and width.

    Returns:
        ``[N, *shape]`` uint8.
    """
    from PIL import Image

    channels, height, width = shape
    mode = "L" if channels == 1 else "RGB"
    matched = np.empty((len(images), height, width, channels), dtype=np.uint8)
    for i, image in enumerate(images.permute(0, 2, 3, 1).numpy()):
        picture = Image.fromarray(image.squeeze(2) if image.shape[2] == 1 else image)
        resized = picture.resize((width, height), Image.Resampling.BILINEAR).convert(mode)
        matched[i] = np.asarray(resized).reshape(height, width, channels)
    return torch.from_numpy(matched).permute(0, 3, 1, 2).contiguous()
