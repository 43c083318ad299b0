"""timm's models: their architecture alone, `timm:resnet18`, or with weights, `timm:resnet18@a1_in1k`."""

import difflib
from typing import Any

from torch import nn

from fedkd.errors import SettingError, one_line
from fedkd.models.checkpoint import read_state
from fedkd.models.hub import fetched
from fedkd.models.libraries import library
from fedkd.models.small import image_shape

_FILES = ("model.safetensors", "pytorch_model.bin")


def timm_model(spec: str, *, input_shape: tuple[int, ...], num_classes: int, key: str) -> nn.Module:
    """Build `timm:NAME` or `timm:NAME@TAG`, as `timm.create_model` does it.

    Another number of classes gets a new head; for other than three channels timm sums or repeats the weights of the
    first convolution. An architecture for images of one size (a vision transformer) is built for that of the inputs,
    and its weights are resampled.

    Raises:
        SettingError: on `key`: timm is not installed, has no such model or weights, these can't be had, or the
            architecture takes no images of that size.
    """
    timm = library(spec, key=key)
    about = description(spec, key=key)
    channels, *size = image_shape(input_shape)
    options: dict[str, Any] = {}
    if about.get("fixed_input_size") and tuple(size) != tuple(about["input_size"][1:]):
        options["img_size"] = tuple(size)
    name, _, tag = spec.removeprefix("timm:").partition("@")
    if tag:
        name = f"{name}.{tag}"
        # Read here: timm itself goes through half a minute of attempts where there is no network, and takes a local
        # file of some architectures for one in its authors' own format.
        if about.get("hf_hub_id"):
            files = (about["hf_hub_filename"],) if about.get("hf_hub_filename") else _FILES
            cure = f"say timm:{name.partition('.')[0]} and give its weights as a checkpoint"
            file = fetched(about["hf_hub_id"], files, spec=spec, key=key, cure=cure)
            options["pretrained_cfg_overlay"] = {"state_dict": read_state(file, key=key)}
    try:
        model: nn.Module = timm.create_model(
            name, pretrained=bool(tag), in_chans=channels, num_classes=num_classes, **options
        )
    except OSError as error:  # weights that lie elsewhere than on the hub
        raise SettingError(key, spec, f"weights that can be had from {about.get('url')} ({one_line(error)})") from error
    except TypeError as error:
        if "img_size" not in options or "img_size" not in str(error):
            raise
        own = "×".join(map(str, about["input_size"][1:]))
        raise SettingError(
            key, spec, f"a model for images of {size[0]}×{size[1]}: this one takes {own} alone"
        ) from error
    if (kept := getattr(model, "pretrained_cfg", None)) and kept.get("state_dict"):
        kept["state_dict"] = None  # else every copy of the model would carry the weights twice
    return model


def description(spec: str, *, key: str) -> dict[str, Any]:
    """Return what timm says of an architecture or its weights, its `pretrained_cfg`; empty where it says nothing.

    Raises:
        SettingError: on `key`: timm is not installed, or has no such model or weights.
    """
    timm = library(spec, key=key)
    name, _, tag = spec.removeprefix("timm:").partition("@")
    if not timm.is_model(name):
        near = ", ".join(difflib.get_close_matches(name, timm.list_models())) or "none"
        raise SettingError(key, spec, f"a model of timm {timm.__version__} (nearest: {near})")
    if not tag:
        found = timm.get_pretrained_cfg(name)
        return {} if found is None else dict(found.to_dict())
    if f"{name}.{tag}" not in (known := timm.list_pretrained(f"{name}.*")):
        tags = ", ".join(one.partition(".")[2] for one in known)
        raise SettingError(key, spec, f"timm:{name}@ and one of {tags}" if tags else f"timm:{name}: it has no weights")
    return dict(timm.get_pretrained_cfg(f"{name}.{tag}").to_dict())
