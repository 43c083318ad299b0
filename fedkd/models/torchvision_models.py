"""torchvision's models: with a stem that suits small images, or as they are with torchvision's own weights."""

from typing import Any

import torch
from torch import nn

from fedkd.errors import SettingError
from fedkd.models.small import image_shape

# Up to this height and width a stem that divides the resolution by two or four would leave too little of it.
_SMALL = 64


def resnet18(*, input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """ResNet-18; small images get a 3×3 stem without stride and no pooling."""
    model = _make("resnet18", num_classes=num_classes)
    _fit_stem(model, "conv1", input_shape)
    if _is_small(input_shape):
        model.maxpool = nn.Identity()
    return model


def mobilenet_v3_small(*, input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """MobileNetV3-Small; small images get a stem without stride."""
    model = _make("mobilenet_v3_small", num_classes=num_classes)
    _fit_stem(model, "features.0.0", input_shape)
    return model


def shufflenet_v2_x0_5(*, input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """ShuffleNetV2 ×0.5; small images get a stem without stride and no pooling."""
    model = _make("shufflenet_v2_x0_5", num_classes=num_classes)
    _fit_stem(model, "conv1.0", input_shape)
    if _is_small(input_shape):
        model.maxpool = nn.Identity()
    return model


def efficientnet_b0(*, input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """EfficientNet-B0; small images get a stem without stride."""
    model = _make("efficientnet_b0", num_classes=num_classes)
    _fit_stem(model, "features.0.0", input_shape)
    return model


def pretrained(spec: str, *, input_shape: tuple[int, ...], num_classes: int, key: str) -> nn.Module:
    """Build `NAME@WEIGHTS`, e.g. `resnet18@IMAGENET1K_V1`, with torchvision's stem, which the weights need.

    Another number of classes gets a new head. Grey inputs get a first convolution whose weights are summed over
    RGB: what it would answer to the grey channel three times over.

    Raises:
        SettingError: torchvision has no such weights, they can't be had, or the inputs are not grey or RGB images.
    """
    weights, name = weights_of(spec, key=key), spec.partition("@")[0]
    channels, _, _ = image_shape(input_shape)
    if channels not in (1, 3):
        raise SettingError(
            key,
            spec,
            f"a model without torchvision's weights for images of {channels} channels (they are for RGB or grey)",
        )
    model = _make(name, num_classes=len(weights.meta["categories"]))
    model.load_state_dict(_fetch(weights, spec, key=key))
    if channels == 1:
        stem_name, stem = next((n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d))
        grey = _convolution_like(stem, channels=1, small=False)
        with torch.no_grad():
            grey.weight.copy_(stem.weight.sum(dim=1, keepdim=True))
        model.set_submodule(stem_name, grey)
    if num_classes != len(weights.meta["categories"]):
        head_name, head = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)][-1]
        model.set_submodule(head_name, nn.Linear(head.in_features, num_classes))
    return model


def weights_of(spec: str, *, key: str) -> Any:
    """Return what torchvision knows of the weights `NAME@WEIGHTS`, a member of its `WeightsEnum`.

    Raises:
        SettingError: on `key`: there are none of that name.
    """
    from torchvision.models import get_model_weights

    name, _, weights_name = spec.partition("@")
    choices = get_model_weights(name)
    if weights_name not in choices.__members__:
        raise SettingError(key, spec, f"{name}@ and one of {', '.join(choices.__members__)}")
    return choices[weights_name]


def _fetch(weights: Any, spec: str, *, key: str) -> dict[str, torch.Tensor]:
    """Return the weights from torch's hub folder, where they are downloaded to once."""
    try:
        state: dict[str, torch.Tensor] = weights.get_state_dict(
            progress=False, check_hash=True, weights_only=True, map_location="cpu"
        )
    except (OSError, RuntimeError) as error:  # no network, no such address, a damaged download
        raise SettingError(
            key,
            spec,
            f"weights that can be downloaded from {weights.url} or lie in {torch.hub.get_dir()}/checkpoints ({error})",
        ) from error
    return state


def _make(name: str, *, num_classes: int) -> nn.Module:
    from torchvision.models import get_model

    model: nn.Module = get_model(name, weights=None, num_classes=num_classes)
    return model


def _is_small(input_shape: tuple[int, ...]) -> bool:
    return max(input_shape[1:]) <= _SMALL


def _fit_stem(model: nn.Module, name: str, input_shape: tuple[int, ...]) -> None:
    """Put a first convolution in place that takes the inputs' channels, and small images without stride."""
    channels, _, _ = image_shape(input_shape)
    stem = model.get_submodule(name)
    if not isinstance(stem, nn.Conv2d):
        raise TypeError(f"{name} of {type(model).__name__} is no convolution: this torchvision is not supported")
    if channels == stem.in_channels and not _is_small(input_shape):
        return
    fitted = _convolution_like(stem, channels=channels, small=_is_small(input_shape))
    nn.init.kaiming_normal_(fitted.weight, mode="fan_out", nonlinearity="relu")
    model.set_submodule(name, fitted)


def _convolution_like(stem: nn.Conv2d, *, channels: int, small: bool) -> nn.Conv2d:
    size = 3 if small else stem.kernel_size[0]
    stride = 1 if small else stem.stride[0]
    return nn.Conv2d(channels, stem.out_channels, size, stride=stride, padding=size // 2, bias=stem.bias is not None)
