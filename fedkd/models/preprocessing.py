"""What a model with somebody's weights expects of its images, as those say who trained it."""

from dataclasses import dataclass
from importlib import import_module
from typing import Any

from fedkd.errors import SettingError
from fedkd.models.libraries import HF, is_library_spec, library
from fedkd.plugins import is_callable_spec

_GREYS = 255  # of a pixel of 8 bits
_PROCESSOR = "a classifier of transformers with its image processor's preprocessor_config.json"


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes the input of a model: resized, its pixels divided by 255, then (x − mean) / std.

    Attributes:
        size: height and width, in pixels.
        channels: 3 for colours. A model may be built for others all the same: its weights are adapted then.
        mean: for each channel, in units of a pixel divided by 255.
        std: likewise.
        interpolation: how to resize, as torchvision and Pillow call it: `bilinear`, `bicubic`, `lanczos`, `nearest`,
            `nearest-exact`, `box` or `hamming`.
    """

    size: tuple[int, int]
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str


def own_preprocessing(spec: str, *, key: str = "models") -> Preprocessing | None:
    """Return what a model of another library expects of its images, or None: it says nothing of it.

    torchvision's weights say it (`NAME@WEIGHTS`), timm's architectures (of their default weights) and weights, and the
    image processor that lies with a model of transformers. The registry's models and one's own take what they get.

    Args:
        spec: as :func:`fedkd.models.registry.build` takes it.
        key: the setting that holds it, for errors.

    Raises:
        SettingError: the library is not installed, has no such model or weights, or its description can't be had.
    """
    if spec.startswith(HF):
        return _of_transformers(spec, key)
    if is_library_spec(spec):
        return _of_timm(spec, key)
    if "@" in spec and not is_callable_spec(spec):
        return _of_torchvision(spec, key)
    return None


def _of_timm(spec: str, key: str) -> Preprocessing | None:
    from fedkd.models.timm_models import description

    about = description(spec, key=key)
    if not about:
        return None
    found = import_module("timm.data").resolve_data_config(pretrained_cfg=about)
    channels, height, width = found["input_size"]
    interpolation = "bilinear" if found["interpolation"] == "random" else found["interpolation"]
    return Preprocessing((height, width), channels, tuple(found["mean"]), tuple(found["std"]), interpolation)


def _of_torchvision(spec: str, key: str) -> Preprocessing:
    from fedkd.models.torchvision_models import weights_of

    found = weights_of(spec, key=key).transforms()
    (size,) = found.crop_size
    return Preprocessing((size, size), len(found.mean), tuple(found.mean), tuple(found.std), found.interpolation.value)


def _of_transformers(spec: str, key: str) -> Preprocessing | None:
    from fedkd.models.hf_models import has_processor, loaded, quiet

    transformers = library(spec, key=key)
    if not has_processor(spec, key=key):
        return None
    with quiet(transformers):
        processor = loaded(transformers.AutoImageProcessor.from_pretrained, spec, key=key, what=_PROCESSOR, options={})
    return _read(processor.to_dict(), spec=spec, key=key)


def _read(said: dict[str, Any], *, spec: str, key: str) -> Preprocessing:
    """Read what an image processor of transformers says of itself (its `to_dict`).

    Its factor on pixels, what it takes off after that, and EfficientNet's second division by the standard deviation
    (`include_top`) become part of mean and standard deviation.
    """
    crop = said.get("crop_size") if said.get("do_center_crop") else None
    size = crop or said.get("size")
    factor = float(said.get("rescale_factor") or 1 / _GREYS) if said.get("do_rescale", True) else 1.0
    off = 1.0 if said.get("rescale_offset") else 0.0
    normalises = said.get("do_normalize", True)
    mean = said["image_mean"] if normalises else [0.0] * 3
    std = said["image_std"] if normalises else [1.0] * 3
    again = said["image_std"] if said.get("include_top") else [1.0] * len(std)
    unit = _GREYS * factor
    return Preprocessing(
        _size(size, spec=spec, key=key),
        len(mean),
        tuple((value + off) / unit for value in mean),
        tuple(value * further / unit for value, further in zip(std, again, strict=True)),
        _interpolation(said.get("resample")),
    )


def _size(size: Any, *, spec: str, key: str) -> tuple[int, int]:
    """Read a size in the forms that image processors have known; what scales the shorter side is cut to a square."""
    if isinstance(size, int):
        return size, size
    said = size if isinstance(size, dict) else {}
    if said.get("height") and said.get("width"):
        return int(said["height"]), int(said["width"])
    if side := said.get("shortest_edge"):
        return int(side), int(side)
    raise SettingError(key, spec, f"a classifier whose image processor says its images' height and width, not {size}")


def _interpolation(resample: Any) -> str:
    from PIL.Image import Resampling

    return Resampling.BILINEAR.name.lower() if resample is None else Resampling(int(resample)).name.lower()


def comes_trained(spec: str) -> bool:
    """Tell whether a model of this name comes with somebody's weights, whose description of its images then holds.

    >>> comes_trained("resnet18@IMAGENET1K_V1"), comes_trained("timm:resnet18"), comes_trained("hf:my/model")
    (True, False, True)
    """
    return spec.startswith(HF) or ("@" in spec and not is_callable_spec(spec))
