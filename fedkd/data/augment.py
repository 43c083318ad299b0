"""Augmented images: what training sees in place of an image, drawn anew for each time that the image is used.

All of it works on images as they are kept, before they are enlarged and standardised, and on batches: ``[B, C, H, W]``
to the same shape and type.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import count

import torch
from torch import Tensor

from fedkd.data.samples import Inputs, Samples, View
from fedkd.errors import SettingError
from fedkd.plugins import load_callable
from fedkd.seeding import derive, seeded

_SHIFT = 8  # a shift is at most this part of a side: 4 of CIFAR's 32 pixels, as it was published
_OWN = "a function of images [B, C, H, W] that returns others of the same shape and type"


def crop_flip(images: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    """Shift each image by up to an eighth of its sides, and mirror it left to right half the time.

    [B, C, H, W] -> [B, C, H, W], of the same type. What a shift uncovers is the image's own mirrored edge: unlike black
    it is in range whatever the numbers mean.

    Args:
        images: ``[B, C, H, W]``, on any device.
        generator: on the CPU; None: torch's global one.

    Source: He et al. 2015, arXiv 1512.03385, §4.2 [paper], with black there; mirrored edges are [ours].

    >>> crop_flip(torch.zeros(2, 3, 8, 8, dtype=torch.uint8)).shape
    torch.Size([2, 3, 8, 8])
    """
    # One gather for the batch: torchvision's classes draw once for all of it, and image by image they took twenty times
    # as long on batches of 32 of CIFAR's size.
    number, channels, height, width = images.shape
    down, right = (
        torch.randint(-(side // _SHIFT), side // _SHIFT + 1, (number, 1), generator=generator)
        for side in (height, width)
    )
    mirrored = torch.rand(number, 1, generator=generator) < 0.5
    rows, columns = _reflected(down, height), _reflected(right, width)
    columns = torch.where(mirrored, columns.flip(1), columns)
    pixels = (rows.unsqueeze(2) * width + columns.unsqueeze(1)).reshape(number, 1, height * width)
    index = pixels.to(images.device, non_blocking=True).expand(-1, channels, -1)
    return images.reshape(number, channels, height * width).gather(2, index).reshape(images.shape)


def each(transform: View) -> View:
    """Return what applies a transform of one image ``[C, H, W]`` to each of a batch, with draws of its own.

    What torchvision's ``transforms.v2`` offers draws once for whatever it is given.
    """

    def of_batch(images: Tensor) -> Tensor:
        return torch.stack([transform(image) for image in images]) if len(images) else images

    return of_batch


@dataclass(frozen=True)
class Augmentation:
    """What a setting asks for, tried on images of the kind that it will see.

    Attributes:
        transform: of a batch of kept images, with draws that a seed decides.
    """

    transform: Callable[[Tensor, int], Tensor]

    @classmethod
    def named(cls, spec: str, inputs: Inputs, *, key: str) -> "Augmentation | None":
        """Return an augmentation of inputs; None for ``none``.

        Args:
            spec: ``none``, ``crop-flip``, ``randaugment`` or ``package.module:function``.
            inputs: those that it is for, as they are kept; of them only shape, type and device are looked at.
            key: the setting that holds the spec.

        Raises:
            SettingError: the inputs are features computed once, no images, or none of which the augmentation can be
                made; one's own function cannot be loaded, or does not do what it should.
        """
        if spec == "none":
            return None
        if not isinstance(inputs, Samples):
            raise SettingError(key, spec, "none where a model's head trains alone (`train`), on features computed once")
        kept = inputs.kept
        if kept.ndim != 4:
            raise SettingError(key, spec, f"none for inputs {list(kept.shape[1:])}, which are no images")
        if spec == "crop-flip":
            # Seeding torch's global generators for a batch takes as long as all the rest.
            return cls(lambda images, seed: crop_flip(images, generator=torch.Generator().manual_seed(seed)))
        if spec == "randaugment":
            if kept.dtype != torch.uint8 or kept.shape[1] not in (1, 3):
                kind = f"{str(kept.dtype).removeprefix('torch.')} images of {kept.shape[1]} channels"
                raise SettingError(key, spec, f"none, crop-flip or {_OWN} for {kind}: it is of 8-bit grey or RGB ones")
            return cls(_seeded(_randaugment()))
        function = load_callable(spec, key=key)
        _try(function, kept, spec, key=key)
        return cls(_seeded(function))

    def of(self, inputs: Inputs, seed: int) -> Samples:
        """Return the inputs of one phase of training: each batch that is asked for is augmented anew.

        The n-th batch's draws depend on the seed and n alone, and leave torch's generators, of which dropout draws, as
        they were.

        Args:
            inputs: as they are kept.
            seed: of the phase.
        """
        places = count()

        def transform(images: Tensor) -> Tensor:
            return self.transform(images, derive(seed, "batch", next(places)))

        if not isinstance(inputs, Samples):
            raise ValueError("Expected samples as they are kept, for these alone can be augmented.")
        return inputs.through(transform)


def _seeded(transform: View) -> Callable[[Tensor, int], Tensor]:
    """Return what has a transform draw from torch's global generators, for it knows no others."""

    def of_batch(images: Tensor, seed: int) -> Tensor:
        with seeded(seed):
            return transform(images)

    return of_batch


def _reflected(shift: Tensor, side: int) -> Tensor:
    """Return from which place along a side each pixel comes under a shift.  [B, 1] -> [B, side], int64."""
    return (side - 1) - ((side - 1) - (torch.arange(side) + shift).abs()).abs()


def _randaugment() -> View:
    """RandAugment after :func:`crop_flip`, as its authors have it: two operations of magnitude 9 of 30.

    Source: Cubuk et al. 2019, arXiv 1909.13719 [paper], by torchvision.
    """
    from torchvision.transforms import v2  # loads torch's compiler, seconds that nobody else should pay

    operations = each(v2.RandAugment(num_ops=2, magnitude=9))
    return lambda images: operations(crop_flip(images))


def _try(function: Callable[[Tensor], object], kept: Tensor, spec: str, *, key: str) -> None:
    """Call a user's function on made-up images: what it cannot do is an error before any training.

    Raises:
        SettingError: it fails, or returns something else than such images, or what a seed does not decide.
    """
    made_up = torch.arange(2 * kept.shape[1:].numel(), device=kept.device) % 256
    images = made_up.reshape(2, *kept.shape[1:])
    images = images.to(torch.uint8) if kept.dtype == torch.uint8 else (images / 255).to(kept.dtype)

    def tried() -> object:
        with seeded(0):
            return function(images.clone())

    try:
        first, again = tried(), tried()
    except (Exception, SystemExit) as error:  # one's own function may fail in any way
        raise SettingError(key, spec, f"{_OWN} ({type(error).__name__}: {error})") from error
    if not isinstance(first, Tensor):
        raise SettingError(key, spec, f"{_OWN} (it returned {type(first).__name__})")
    if first.shape != images.shape or first.dtype != images.dtype or first.device != images.device:
        given, found = (f"{one.dtype} {list(one.shape)} on {one.device}" for one in (images, first))
        raise SettingError(key, spec, f"{_OWN} (for {given} it returned {found})")
    if not (isinstance(again, Tensor) and torch.equal(first, again)):
        raise SettingError(key, spec, f"{_OWN}, with draws from torch's global generator alone (it drew elsewhere)")
