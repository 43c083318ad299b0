"""The image classifiers of transformers, `hf:FOLDER` or `hf:NAME`: with their weights, and logits as their output."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from fedkd.errors import SettingError, one_line
from fedkd.models.hub import check_reachable, holds
from fedkd.models.libraries import HF, folder, library
from fedkd.models.small import image_shape

_NAMED = 6
_CLASSIFIER = "an image classifier of transformers with its weights and a config.json"
_PROCESSOR = ("preprocessor_config.json", "processor_config.json")
_CURE = "name the folder of a local copy"


class Logits(nn.Module):
    """A classifier of transformers, ``[B, C, H, W]`` -> logits ``[B, num_labels]``.

    Its state dict has the classifier's own names. Grey images are given to a classifier of colours three times over.
    """

    def __init__(self, model: nn.Module, *, channels: int) -> None:
        super().__init__()
        self.model = model
        self.channels = channels
        self.register_state_dict_post_hook(_without_prefix)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_with_prefix)  # type: ignore[no-untyped-call]

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of the classifier's output."""
        if x.shape[1] == 1 != self.channels:
            x = x.expand(-1, self.channels, -1, -1)
        logits: Tensor = self.model(pixel_values=x).logits
        return logits


def _without_prefix(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    for name in [name for name in state if name.startswith(f"{prefix}model.")]:
        state[prefix + name.removeprefix(f"{prefix}model.")] = state.pop(name)


def _with_prefix(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    for name in [name for name in state if name.startswith(prefix)]:
        state[f"{prefix}model.{name.removeprefix(prefix)}"] = state.pop(name)


def hf_model(spec: str, *, input_shape: tuple[int, ...], num_classes: int, key: str) -> nn.Module:
    """Build `hf:FOLDER` or `hf:NAME` by `AutoModelForImageClassification`; code that lies with a model is never run.

    Another number of classes gets a new head. What the hub's cache has is not looked for on the hub again.

    Raises:
        SettingError: on `key`: transformers is not installed, there is no such classifier or it can't be had, it takes
            other channels, or parameters beside its head are missing or of another shape.
    """
    transformers = library(spec, key=key)
    channels, _, _ = image_shape(input_shape)
    options = {"num_labels": num_classes, "ignore_mismatched_sizes": True, "output_loading_info": True}
    with quiet(transformers):
        load = transformers.AutoModelForImageClassification.from_pretrained
        model, found = loaded(load, spec, key=key, what=_CLASSIFIER, options=options)
    expected = getattr(model.config, "num_channels", 3)
    if channels not in (1, expected):
        allowed = f"a model for images of {channels} channels (this one is for {expected}, or grey)"
        raise SettingError(key, spec, allowed)
    if anew := _beside_head(model, found, num_classes):
        rest = f" and {len(anew) - _NAMED} more" if len(anew) > _NAMED else ""
        allowed = f"a classifier whose weights lack nothing but a head ({', '.join(anew[:_NAMED])}{rest} would be new)"
        raise SettingError(key, spec, allowed)
    return Logits(model.float().train(), channels=expected)


def loaded(load: Any, spec: str, *, key: str, what: str, options: dict[str, Any]) -> Any:
    """Return what a `from_pretrained` of transformers makes of a spec: of its folder, the hub's cache, or the hub.

    Args:
        load: the function.
        spec: `hf:FOLDER` or `hf:NAME`.
        key: the setting that holds it.
        what: it should lead to, for errors.
        options: of the function.

    Raises:
        SettingError: on `key`: it can't be had, or is none that `load` takes.
    """
    options = {**options, "trust_remote_code": False}
    local = folder(spec)
    name = str(local) if local else spec.removeprefix(HF)
    try:
        try:
            return load(name, local_files_only=True, **options)
        except OSError:
            if local:
                raise
        check_reachable(name, spec=spec, key=key, cure=_CURE)
        return load(name, **options)
    except SettingError:
        raise
    except Exception as error:  # no weights, another kind of model, code of its own, a file that is damaged
        raise SettingError(key, spec, f"{what} ({one_line(error)})") from error


def has_processor(spec: str, *, key: str) -> bool:
    """Tell whether an image processor lies with a model: in its folder, in the hub's cache, or on the hub.

    Raises:
        SettingError: on `key`: the hub cannot be asked, and its cache does not say.
    """
    local = folder(spec)
    if local:
        return any((local / file).is_file() for file in _PROCESSOR)
    return holds(spec.removeprefix(HF), _PROCESSOR, spec=spec, key=key, cure=_CURE)


def _beside_head(model: Any, found: dict[str, Any], classes: int) -> list[str]:
    """Return what was initialised anew and is no part of the head.

    A head is what lies outside of the model's base, or has a number for each class in the place of another number.
    """
    state, base = model.state_dict(), f"{model.base_model_prefix}."
    if any(name.startswith(base) for name in state):
        missing = [name for name in found["missing_keys"] if name.startswith(base)]
    else:
        missing = [name for name in found["missing_keys"] if state[name].shape[:1] != (classes,)]
    others = [
        f"{name} {list(was)} instead of {list(now)}"
        for name, was, now in found["mismatched_keys"]
        if tuple(now) != (classes, *was[1:])
    ]
    return sorted([*missing, *others])


@contextmanager
def quiet(transformers: Any) -> Iterator[None]:
    """Keep transformers from writing progress bars and a table about the new head into a run's log."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
