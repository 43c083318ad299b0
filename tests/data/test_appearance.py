"""How a model sees images, compared with Pillow and with what torchvision does."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from fedkd.data.appearance import Appearance, fits
from fedkd.data.normalize import standardizer
from fedkd.errors import SettingError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def images(channels: int = 3, side: int = 32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    smooth = torch.nn.functional.interpolate(torch.rand(4, channels, 5, 5, generator=generator), size=side)
    return (smooth * 255).to(torch.uint8)


@pytest.mark.parametrize("kind", ["bilinear", "bicubic"])
@pytest.mark.parametrize("side", [20, 48, 160])
def test_images_are_resized_and_scaled_as_torchvision_does(kind, side):
    look = Appearance(MEAN, STD, size=(side, side), interpolation=kind)
    resized = tv.resize(images().float() / 255, [side, side], InterpolationMode(kind), antialias=True).clamp(0, 1)
    torch.testing.assert_close(look(images()), tv.normalize(resized, list(MEAN), list(STD)), rtol=0, atol=1e-5)


def test_images_are_resized_as_pillow_does_to_a_grey_level():
    look = Appearance((0.0,) * 3, (1.0,) * 3, size=(48, 48))
    for image, seen in zip(images(), look(images()), strict=True):
        pillow = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((48, 48), Image.Resampling.BILINEAR)
        assert np.abs(np.asarray(pillow) / 255 - seen.permute(1, 2, 0).numpy()).max() <= 1.01 / 255


def test_grey_images_are_shown_three_times_each_in_its_own_scale():
    look = Appearance(MEAN, STD, channels=3)
    seen, grey = look(images(1)), images(1).float() / 255
    for channel, (mean, std) in enumerate(zip(MEAN, STD, strict=True)):
        torch.testing.assert_close(seen[:, channel], (grey[:, 0] - mean) / std)


def test_as_they_are_they_are_only_standardised_bit_by_bit_as_before():
    scale = standardizer("auto", images())
    look = Appearance(tuple(scale.mean.tolist()), tuple(scale.std.tolist()))
    assert torch.equal(look(images()), scale(images()))


def test_what_a_batch_holds_beside_an_image_changes_nothing():
    look = Appearance(MEAN, STD, size=(96, 96), interpolation="bicubic")
    assert torch.equal(look(images())[2:3], look(images()[2:3]))


@pytest.mark.parametrize(
    ("shape", "look", "said"),
    [
        ((64,), Appearance((0.0,), (1.0,), size=(32, 32)), r"inputs \[64\], which are no images"),
        ((4, 32, 32), Appearance(MEAN, STD, channels=3), "images of 4 channels, as these are, and not of 3"),
    ],
)
def test_what_cannot_be_seen_so_is_refused(shape, look, said):
    with pytest.raises(SettingError, match=f"`input-size`.*{said}"):
        fits(shape, look, key="input-size", value="32")
