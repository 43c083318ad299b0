"""How one model sees images: in its own size, its own number of channels and its own scale."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fedkd.data.normalize import Standardizer
from fedkd.data.sources import as_float
from fedkd.errors import SettingError

INTERPOLATIONS = ("bilinear", "bicubic", "nearest", "nearest-exact")
"""Ways to resize, as torch calls them."""


@dataclass(frozen=True)
class Appearance:
    """Turns images as they are kept into what a model sees: enlarged or reduced, of its channels, standardised.

    The whole image is resized, with antialiasing and whatever its aspect ratio: nothing is cropped away [ours].

    Attributes:
        mean: per channel of what the model sees, of pixels in [0, 1].
        std: likewise.
        size: height and width; None: as they are.
        channels: 3 for grey images shown as RGB; None: as they are.
        interpolation: of :data:`INTERPOLATIONS`.

    >>> Appearance((0.5,), (0.5,), size=(4, 4))(torch.full((2, 1, 2, 2), 255, dtype=torch.uint8)).shape
    torch.Size([2, 1, 4, 4])
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: tuple[int, int] | None = None
    channels: int | None = None
    interpolation: str = "bilinear"

    def __call__(self, kept: Tensor) -> Tensor:
        """Return ``[B, C', H', W']`` float32 for images ``[B, C, H, W]``; of other inputs only the scale changes."""
        seen = as_float(kept)
        if self.size is not None and tuple(seen.shape[-2:]) != self.size:
            seen = self._resized(seen, pixels=kept.dtype == torch.uint8)
        if self.channels is not None and seen.shape[1] == 1 != self.channels:
            seen = seen.expand(-1, self.channels, *seen.shape[2:])
        return Standardizer(torch.tensor(self.mean), torch.tensor(self.std))(seen)

    def _resized(self, images: Tensor, *, pixels: bool) -> Tensor:
        smooth = not self.interpolation.startswith("nearest")
        resized: Tensor = torch.nn.functional.interpolate(
            images, size=self.size, mode=self.interpolation, antialias=smooth, align_corners=False if smooth else None
        )
        return resized.clamp(0, 1) if pixels and self.interpolation == "bicubic" else resized


def fits(shape: tuple[int, ...], look: Appearance, *, key: str, value: str) -> None:
    """Refuse a size or a number of channels for what cannot have it.

    Args:
        shape: of one input as it is kept.
        look: the preprocessing.
        key: the setting to name.
        value: its value.

    Raises:
        SettingError: the inputs are no images, or have other channels than grey or those that the model sees.
    """
    if look.size is None and look.channels is None:
        return
    if len(shape) != 3:
        other = "`data`, or left out," if key == "input-size" else "a model without weights for images, or its own"
        raise SettingError(key, value, f"{other} for inputs {list(shape)}, which are no images")
    if look.channels is not None and shape[0] not in (1, look.channels):
        allowed = f"a model that sees images of {shape[0]} channels, as these are, and not of {look.channels}"
        raise SettingError(key, value, allowed)
