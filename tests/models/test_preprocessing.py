"""What a model says of its images is what its library makes of them."""

import numpy as np
import pytest
import torch
from PIL import Image

from fedkd.errors import SettingError
from fedkd.models import Preprocessing, own_preprocessing


def picture(height, width):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels), torch.from_numpy(pixels).permute(2, 0, 1)


def scaled(pixels, how):
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (how.mean, how.std))
    return (pixels / 255 - mean) / std


@pytest.mark.parametrize("spec", ["resnet18@IMAGENET1K_V1", "efficientnet_b0@IMAGENET1K_V1"])
def test_torchvisions_weights_say_it(spec):
    from torchvision.models import get_model_weights

    name, _, weights = spec.partition("@")
    transforms = get_model_weights(name)[weights].transforms()
    how = own_preprocessing(spec)
    image, pixels = picture(*transforms.resize_size * 2)  # of a size that is not resized, only cut
    top = (pixels.shape[1] - how.size[0]) // 2
    cut = pixels[:, top : top + how.size[0], top : top + how.size[1]]

    torch.testing.assert_close(transforms(image), scaled(cut, how))
    assert (how.channels, how.interpolation) == (3, transforms.interpolation.value)


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("timm:resnet18", "resnet18"),
        ("timm:test_vit", "test_vit"),
        ("timm:vit_base_patch16_224@dino", "vit_base_patch16_224.dino"),
        ("timm:vit_base_patch16_224@augreg2_in21k_ft_in1k", "vit_base_patch16_224.augreg2_in21k_ft_in1k"),
    ],
)
def test_timm_says_it_of_an_architecture_and_of_weights(spec, name):
    import timm

    about = timm.get_pretrained_cfg(name)
    transforms = timm.data.create_transform(
        about.input_size, interpolation=about.interpolation, mean=about.mean, std=about.std, crop_pct=1
    )
    how = own_preprocessing(spec)
    image, pixels = picture(*how.size)

    torch.testing.assert_close(transforms(image), scaled(pixels, how))
    assert how.channels == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "options", "size", "interpolation"),
    [
        ("ViTImageProcessor", {"size": {"height": 12, "width": 20}}, (12, 20), "bilinear"),
        ("ConvNextImageProcessor", {"size": {"shortest_edge": 384}}, (384, 384), "bicubic"),
        (
            "EfficientNetImageProcessor",
            {"size": {"height": 16, "width": 16}, "rescale_factor": 1 / 127.5, "rescale_offset": True},
            (16, 16),
            "bicubic",
        ),
        ("EfficientNetImageProcessor", {"size": {"height": 9, "width": 9}, "include_top": False}, (9, 9), "bicubic"),
        ("ViTImageProcessor", {"size": {"height": 8, "width": 8}, "do_normalize": False}, (8, 8), "bilinear"),
        ("ViTImageProcessor", {"size": {"height": 8, "width": 8}, "do_rescale": False}, (8, 8), "bilinear"),
        (
            "CLIPImageProcessor",
            {"size": {"shortest_edge": 24}, "crop_size": {"height": 24, "width": 24}},
            (24, 24),
            "bicubic",
        ),
    ],
)
def test_the_image_processor_beside_a_classifier_says_it(tmp_path, kind, options, size, interpolation):
    import transformers

    getattr(transformers, kind)(**options).save_pretrained(tmp_path)
    how = own_preprocessing(f"hf:{tmp_path}")
    image, pixels = picture(*how.size)

    theirs = transformers.AutoImageProcessor.from_pretrained(tmp_path)(image, return_tensors="pt")["pixel_values"][0]

    torch.testing.assert_close(theirs, scaled(pixels, how), atol=1e-4, rtol=1e-4)
    assert (how.size, how.channels, how.interpolation) == (size, 3, interpolation)


@pytest.mark.slow
def test_a_classifier_without_an_image_processor_says_nothing(tmp_path):
    assert own_preprocessing(f"hf:{tmp_path}") is None


@pytest.mark.parametrize("spec", ["mlp", "resnet18", "my.module:factory"])
def test_the_registrys_models_and_ones_own_say_nothing(spec):
    assert own_preprocessing(spec) is None


@pytest.mark.parametrize("spec", ["resnet18@NOTHING", "timm:nothing", "timm:resnet18@nothing"])
def test_what_there_is_not_is_an_error_that_names_the_key(spec):
    with pytest.raises(SettingError) as caught:
        own_preprocessing(spec, key="model")
    assert (caught.value.key, caught.value.value) == ("model", spec)


def test_it_is_a_value():
    form = {"size": (8, 8), "channels": 1, "mean": (0.5,), "std": (0.5,), "interpolation": "bilinear"}
    assert Preprocessing(**form) == Preprocessing(**form)
