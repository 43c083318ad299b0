"""How a model sees the data: as who trained it says, unless the settings say something else."""

from dataclasses import replace

import pytest
import torch
from torchvision.models import ResNet18_Weights

from clients.eyes import Eyes
from fedkd.data.normalize import standardizer
from fedkd.errors import SettingError

TRAINED = "resnet18@IMAGENET1K_V1"


def images(channels: int = 3) -> torch.Tensor:
    return torch.randint(256, (6, channels, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def look(spec=TRAINED, *, checkpoint=False, size="", normalize="auto", proxy=None):
    return Eyes(spec, checkpoint, size, normalize).look(images() if proxy is None else proxy)


def test_a_model_with_weights_sees_what_they_were_trained_on():
    expected = ResNet18_Weights.IMAGENET1K_V1.transforms()
    found = look()
    assert found.size == (224, 224)
    assert (list(found.mean), list(found.std)) == (expected.mean, expected.std)
    assert found.interpolation == expected.interpolation.value
    assert found(images()).shape == (6, 3, 224, 224)


def test_a_grey_image_is_shown_to_it_in_three_colours_each_on_its_scale():
    seen = look(proxy=images(1), size="32")(images(1))
    expected = ResNet18_Weights.IMAGENET1K_V1.transforms()
    grey = images(1)[:, 0].float() / 255
    for channel in range(3):
        torch.testing.assert_close(seen[:, channel], (grey - expected.mean[channel]) / expected.std[channel])


@pytest.mark.parametrize("spec", ["resnet8", "resnet18", "timm:resnet18", "my.module:net"])
def test_a_model_that_nobody_trained_takes_the_data_as_they_are(spec):
    scale = standardizer("auto", images())
    found = look(spec)
    assert (found.size, found.channels) == (None, None)
    assert torch.equal(found(images()), scale(images()))


def test_with_a_checkpoint_an_architecture_of_timm_is_one_that_somebody_trained():
    pytest.importorskip("timm")
    assert look("timm:resnet18", checkpoint=True).size == (224, 224)
    assert look("timm:resnet18").size is None


@pytest.mark.parametrize(
    ("settings", "size", "mean"),
    [
        ({"size": "data"}, None, "own"),
        ({"size": "data", "normalize": "proxy"}, None, "proxy"),
        ({"size": "96"}, (96, 96), "own"),
        ({"normalize": "proxy"}, (224, 224), "proxy"),
        ({"normalize": "none"}, (224, 224), "none"),
        ({"size": "data", "normalize": "imagenet"}, None, "own"),
    ],
)
def test_settings_come_before_what_a_model_says(settings, size, mean):
    found = look(**settings)
    means = {"own": ResNet18_Weights.IMAGENET1K_V1.transforms().mean, "none": [0.0] * 3}
    means["proxy"] = standardizer("auto", images()).mean.tolist()
    assert found.size == size
    assert list(found.mean) == pytest.approx(means[mean])


def test_images_of_other_channels_than_a_model_was_trained_on_are_refused():
    with pytest.raises(SettingError, match=r"`models` to be a model that sees images of 2 channels"):
        look(proxy=images(2))


def test_a_table_has_no_size():
    table = torch.rand(6, 5)
    with pytest.raises(SettingError, match=r"`input-size` to be `data`, or left out, for inputs \[5\]"):
        look("mlp", size="32", proxy=table)


def test_a_table_is_no_input_of_a_model_for_images():
    with pytest.raises(SettingError, match=r"`models` to be a model without weights for images, .* for inputs \[5\]"):
        look(proxy=torch.rand(6, 5))


def test_the_scale_of_pixels_is_not_put_on_other_numbers():
    numbers = images().float() / 255 * 2 - 1
    with pytest.raises(SettingError, match=r"`normalize` to be proxy or none for the model resnet18@.*go from -1 to 1"):
        look(proxy=numbers)
    assert look(proxy=numbers, normalize="none").mean == (0.0, 0.0, 0.0)
    assert look(proxy=(numbers + 1) / 2).mean == look().mean


def test_numbers_that_are_no_pixels_are_not_cut():
    found = look("my.module:net", size="16", proxy=torch.full((2, 3, 8, 8), -2.0), normalize="none")
    assert replace(found, interpolation="bicubic")(torch.full((2, 3, 8, 8), -2.0)).max() < -1.9
