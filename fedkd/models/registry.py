"""Model names and what builds them. Importing it costs nothing: torch comes in with the first model built."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from fedkd.errors import SettingError, one_line
from fedkd.models.libraries import HF, HF_FORM, TIMM_FORM, check_form, is_library_spec, named
from fedkd.plugins import is_callable_spec, load_callable
from fedkd.seeding import derive, seeded

if TYPE_CHECKING:
    from torch import nn

# Called with `input_shape` and `num_classes`, and with `width` where the factory has such a parameter.
Factory = Callable[..., "nn.Module"]
F = TypeVar("F", bound=Factory)

_TORCHVISION = {
    "resnet18": "fedkd.models.torchvision_models:resnet18",
    "mobilenet_v3_small": "fedkd.models.torchvision_models:mobilenet_v3_small",
    "shufflenet_v2_x0_5": "fedkd.models.torchvision_models:shufflenet_v2_x0_5",
    "efficientnet_b0": "fedkd.models.torchvision_models:efficientnet_b0",
}

# A factory given as a string is imported when it is first built.
_factories: dict[str, str | Factory] = {
    "mlp": "fedkd.models.small:mlp",
    "cnn-small": "fedkd.models.small:cnn_small",
    "cnn-wide": "fedkd.models.small:cnn_wide",
    "resnet8": "fedkd.models.resnet:resnet8",
    "resnet14": "fedkd.models.resnet:resnet14",
    "resnet20": "fedkd.models.resnet:resnet20",
    "resnet32": "fedkd.models.resnet:resnet32",
    "resnet44": "fedkd.models.resnet:resnet44",
    "resnet56": "fedkd.models.resnet:resnet56",
    **_TORCHVISION,
}


def names() -> list[str]:
    """Return the names of the registry, in the order of registration."""
    return list(_factories)


def register(name: str) -> Callable[[F], F]:
    """Give a factory a name: a decorator. The factory takes the keywords `input_shape` and `num_classes`.

    A factory that also takes `width` can be widened. A name of the registry may be registered anew.

    Raises:
        ValueError: a name that a list of models could not hold.
    """
    if not name or any(character in name for character in ",:@ "):
        raise ValueError(f"Expected argument `name` to be without commas, colons, @ and spaces, but got {name!r}.")

    def decorate(factory: F) -> F:
        _factories[name] = factory
        return factory

    return decorate


def check(spec: str, *, key: str = "models") -> None:
    """Refuse a model spec that `build` cannot know, without importing torch, the model or its library.

    >>> check("resnet20")
    >>> check("resnet21")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    fedkd.errors.SettingError: Expected setting `models` to be one of mlp, ..., but got 'resnet21'.

    Raises:
        SettingError: on `key`.
    """
    if is_library_spec(spec):
        check_form(spec, key=key)
        return
    name, _, _ = spec.partition("@")
    if spec in _factories or is_callable_spec(spec) or (name != spec and name in _TORCHVISION):
        return
    allowed = (
        f"one of {', '.join(names())}, NAME@WEIGHTS for {', '.join(_TORCHVISION)}, {TIMM_FORM}, {HF_FORM}, "
        "or package.module:factory"
    )
    raise SettingError(key, spec, allowed)


def build(
    spec: str,
    *,
    input_shape: tuple[int, ...],
    num_classes: int,
    seed: int,
    width: float = 1.0,
    key: str = "models",
) -> "nn.Module":
    """Build a model, ``[B, *input_shape]`` -> logits [B, num_classes], initialised by the seed alone.

    Args:
        spec: a name of the registry; `resnet18@IMAGENET1K_V1` for torchvision's weights of that name; `timm:resnet18`
            for an architecture of timm's, `timm:resnet18@a1_in1k` with its weights; `hf:FOLDER` or `hf:NAME` for a
            classifier of transformers; or `package.module:factory`, called with the keywords `input_shape` and
            `num_classes`.
        input_shape: shape of one input, [C, H, W] for images.
        num_classes: number of classes.
        seed: of the initial weights; torch's global generators are left as they were.
        width: factor on the numbers of channels (hidden units), > 0.
        key: the setting that holds the spec, for errors.

    Raises:
        SettingError: unknown spec, a library that is not installed, weights that cannot be had, a model that does not
            take such inputs, or one that cannot be widened.
        ValueError: fewer than two classes, or width ≤ 0.
    """
    if num_classes < 2 or width <= 0:
        raise ValueError(f"Expected num_classes ≥ 2 and width > 0, but got {num_classes} and {width}.")
    check(spec, key=key)
    with seeded(derive(seed, "model", named(spec))):
        return _call(_find(spec, key), spec, input_shape, num_classes, width, key)


def is_ours(spec: str) -> bool:
    """Tell whether a spec names one of the library's own models, torchvision's included.

    >>> is_ours("resnet8"), is_ours("resnet18@IMAGENET1K_V1"), is_ours("my.module:net")
    (True, True, False)
    """
    return isinstance(_factories.get(spec.partition("@")[0]), str)


def parameters_count(model: "nn.Module") -> int:
    """Return the number of trainable parameters."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _find(spec: str, key: str) -> Factory:
    if is_library_spec(spec):
        return _of_library(spec, key)
    if "@" in spec:
        from fedkd.models.torchvision_models import pretrained

        return partial(pretrained, spec, key=key)
    factory = _factories.get(spec, spec)
    return load_callable(factory, key=key) if isinstance(factory, str) else factory


def _of_library(spec: str, key: str) -> Factory:
    if spec.startswith(HF):
        from fedkd.models.hf_models import hf_model

        return partial(hf_model, spec, key=key)
    from fedkd.models.timm_models import timm_model

    return partial(timm_model, spec, key=key)


def _call(
    factory: Factory, spec: str, input_shape: tuple[int, ...], num_classes: int, width: float, key: str
) -> "nn.Module":
    from torch import nn

    widened = {} if width == 1.0 else {"width": width}
    if widened and "width" not in inspect.signature(factory).parameters:
        raise SettingError(key, spec, f"a model that can be widened by {width:g} (a factory with `width`)")
    refused = f"a model for inputs {list(input_shape)} and {num_classes} classes"
    try:
        model = factory(input_shape=input_shape, num_classes=num_classes, **widened)
        if not isinstance(model, nn.Module):
            raise TypeError(f"the factory returned {type(model).__name__}, not a torch.nn.Module")
        logits = _try(model, input_shape)
    except SettingError:
        raise
    except (Exception, SystemExit) as error:  # one's own factory or model may fail in any way
        raise SettingError(key, spec, f"{refused} ({one_line(error)})") from error
    if logits != (2, num_classes):
        raise SettingError(key, spec, f"{refused} (it answers two inputs with {list(logits)})")
    return model


def _try(model: "nn.Module", input_shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of what a model answers to two inputs."""
    import torch

    training = model.training
    with torch.no_grad():
        shape = tuple(model.eval()(torch.zeros(2, *input_shape)).shape)
    model.train(training)
    return shape
