"""Weights from a file, in the forms that people have, checked against the model before any of them is used."""

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedkd.errors import SettingError, one_line

if TYPE_CHECKING:
    from torch import Tensor, nn

# Of each kind of mismatch this many are named in full, so that the message stays one that can be read.
_NAMED = 12
# Under which a training script keeps its weights, and those averaged over its steps. In this order, the former first.
_RAW = ("state_dict", "model_state_dict", "model_state", "model", "net", "network", "module", "weights")
_AVERAGED = ("state_dict_ema", "ema_state_dict", "model_ema", "ema_model", "model_ema_state_dict", "ema")
_COMPILED = "_orig_mod."
_COUNT = "num_batches_tracked"
_FORBIDDEN = re.compile(r"Unsupported (?:global: GLOBAL|class) (\S+)")

State = dict[str, "Tensor"]


def load_checkpoint(model: "nn.Module", path: Path, *, key: str = "checkpoint", new_head: int | None = None) -> None:
    """Load weights into a model: `.safetensors`, or a file of `torch.save` read with `weights_only=True`.

    A file may hold more than a state dict, and its names may begin otherwise than the model's:

    - Of a dict, what lies under `state_dict`, `model_state_dict`, `model` and the like is taken; what lies under
      `model_ema`, `state_dict_ema` and the like only where nothing else is there.
    - `_orig_mod.` of `torch.compile` is taken off everywhere. Any one prefix (`module.`, `model.`, `net.backbone.`) is
      taken off under which all parameters of the model are; what lies beside it (a loss's weights, a metric) is left.
      Where averaged weights and others fit (`ema_model.`, `model.`), the others are taken.
    - Counts of batches (`num_batches_tracked`), which old files lack, stay the model's.

    The model is left as it was unless everything fits.

    Args:
        model: to load into.
        path: of the file.
        key: the setting that holds the path, for errors.
        new_head: how many classes there are, if a head for another number, or none, is to be replaced: its parameters
            then stay the model's own. None: the head has to fit as well.

    Raises:
        SettingError: on `key`: no such file, one that holds no weights or cannot be read without running code, or one
            that doesn't fit, with every parameter that is missing, unexpected or of another shape.
    """
    state = {name.replace(_COMPILED, ""): tensor for name, tensor in read_state(path, key=key).items()}
    expected: State = model.state_dict()
    head = _head(expected, new_head) if new_head else ()
    tried = [_fit(state, expected, prefix, head) for prefix in _prefixes(state, expected)]
    fitting = [fit for fit in tried if not fit.problems]
    chosen = [fit for fit in fitting if set(_AVERAGED).isdisjoint(fit.prefix.split("."))] or fitting
    if len(chosen) > 1:
        under = ", ".join(fit.prefix for fit in chosen)
        raise SettingError(
            key, str(path), f"a checkpoint with one set of weights for the model, not one each of {under}"
        )
    if not chosen:
        reasons = "; ".join(f"{kind}: {_listed(found)}" for kind, found in tried[0].problems.items())
        lacking = "where the data lack a class, an empty folder or `classes` names it, else `replace-head=true`"
        cure = f"; {lacking} gives it a new head" if tried[0].resized and not new_head else ""
        raise SettingError(key, str(path), f"a checkpoint that fits the model {type(model).__name__} ({reasons}{cure})")
    model.load_state_dict({**expected, **chosen[0].state})


@dataclass(frozen=True)
class _Fit:
    """How weights below a prefix fit a model.

    Attributes:
        prefix: what was taken off their names.
        state: them, without a head that is to be replaced.
        problems: kinds of mismatch and what is so, none of them empty.
        resized: whether all that is wrong is one layer's number of outputs.
    """

    prefix: str
    state: State
    problems: dict[str, list[str]]
    resized: bool


def _fit(state: State, expected: State, prefix: str, head: tuple[str, ...]) -> _Fit:
    found = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    replaced: set[str] = set()
    for layer in head:
        theirs, ours = ({n: t.shape for n, t in each.items() if _layer(n) == layer} for each in (found, expected))
        if theirs != ours:
            replaced |= theirs.keys() | ours.keys()
    found = {name: tensor for name, tensor in found.items() if name not in replaced}
    others = [name for name in expected if name in found and found[name].shape != expected[name].shape]
    absent = (name for name in expected if name not in found and name not in replaced)
    problems = {
        "missing": [name for name in absent if name.rpartition(".")[2] != _COUNT],
        "unexpected": [name for name in found if name not in expected],
        "of another shape": [
            f"{name} {list(found[name].shape)} instead of {list(expected[name].shape)}" for name in others
        ],
    }
    problems = {kind: names for kind, names in problems.items() if names}
    same = all(found[name].shape[1:] == expected[name].shape[1:] for name in others)
    resized = list(problems) == ["of another shape"] and len({_layer(name) for name in others}) == 1 and same
    return _Fit(prefix, found, problems, resized)


def _prefixes(state: State, expected: State) -> list[str]:
    """Return what names of a file begin with before a name of the model, what comes before most of them first."""
    counted = Counter({"": 0})
    for name in state:
        parts = name.split(".")
        for length in range(len(parts)):
            if ".".join(parts[length:]) in expected:
                counted["".join(f"{part}." for part in parts[:length])] += 1
    return sorted(counted, key=lambda prefix: (-counted[prefix], len(prefix)))


def _head(expected: State, classes: int) -> tuple[str, ...]:
    """Return the layers at a model's end of which each has an output for each class: a model may have two heads."""
    layers: dict[str, list[Any]] = {}
    for name, tensor in expected.items():
        layers.setdefault(_layer(name), []).append(tensor)
    found: list[str] = []
    for layer, tensors in reversed(layers.items()):
        if any(tensor.shape[:1] != (classes,) for tensor in tensors) or all(tensor.dim() < 2 for tensor in tensors):
            break
        found.append(layer)
    return tuple(found)


def _layer(name: str) -> str:
    return name.rpartition(".")[0]


def read_state(path: Path, *, key: str) -> State:
    """Return the state dict that a file is, or holds in one of the places above; nothing in it is executed.

    Raises:
        SettingError: on `key`: no such file, or none with weights alone.
    """
    import torch
    from safetensors.torch import load_file

    if not path.is_file():
        raise SettingError(key, str(path), f"an existing file; there is none at {path.absolute()}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        loaded: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a file that holds anything may be refused by any of several parsers
        raise SettingError(key, str(path), _unreadable(error)) from error
    state = _weights_in(loaded)
    if state is None:
        places = ", ".join((*_RAW, *_AVERAGED))
        allowed = f"a state dict, names of parameters and their tensors, or a dict that holds one under any of {places}"
        raise SettingError(key, str(path), allowed)
    return state


def _weights_in(loaded: Any, deep: int = 4) -> State | None:
    """Return the state dict that something is, or holds in one of the known places; None: there is none."""
    import torch

    if not isinstance(loaded, dict) or not deep:
        return None
    if loaded and all(isinstance(value, torch.Tensor) for value in loaded.values()):
        return {str(name): tensor for name, tensor in loaded.items()}
    found = (_weights_in(loaded.get(place), deep - 1) for place in (*_RAW, *_AVERAGED))
    return next((state for state in found if state is not None), None)


def _unreadable(error: BaseException) -> str:
    """Return what a file should have been, and what to do where it holds more than weights."""
    if found := _FORBIDDEN.search(str(error)):
        return (
            f"a state dict alone, which loads without running code ({found[1]} is in the file too); if you trust the "
            "file, save its weights in Python: `it = torch.load(FILE, map_location='cpu', weights_only=False)`, and "
            "`torch.save(it['state_dict'] if isinstance(it, dict) else it.state_dict(), 'weights.pt')`"
        )
    said = one_line(error).split(". ")[0]  # torch goes on to advise against what keeps code from running
    reason = "it is neither" if said.startswith("Weights only load failed") else said
    return f"a safetensors file or a state dict that loads with weights_only=True ({reason})"


def _listed(found: list[str]) -> str:
    rest = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    return ", ".join(found[:_NAMED]) + rest
