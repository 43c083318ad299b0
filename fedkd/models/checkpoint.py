"""Weights from a file, checked against the model before any of them is used."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedkd.errors import SettingError

if TYPE_CHECKING:
    from torch import Tensor, nn

# Of each kind of mismatch this many are named in full, so that the message stays one that can be read.
_NAMED = 12


def load_checkpoint(model: "nn.Module", path: Path, *, key: str = "checkpoint") -> None:
    """Load a state dict into a model: `.safetensors`, or a file of `torch.save` read with `weights_only=True`.

    A dict that holds the weights under `state_dict` is unwrapped, and the prefix `module.` of DataParallel is
    taken off. The model is left as it was unless everything fits.

    Raises:
        SettingError: on `key`: no such file, not a state dict, or one that doesn't fit, with every parameter that
            is missing, unexpected or of another shape.
    """
    state = _read(path, key=key)
    expected = model.state_dict()
    problems = {
        "missing": [name for name in expected if name not in state],
        "unexpected": [name for name in state if name not in expected],
        "of another shape": [
            f"{name} {list(state[name].shape)} instead of {list(tensor.shape)}"
            for name, tensor in expected.items()
            if name in state and state[name].shape != tensor.shape
        ],
    }
    if any(problems.values()):
        reasons = "; ".join(f"{kind}: {_listed(found)}" for kind, found in problems.items() if found)
        raise SettingError(key, str(path), f"a checkpoint that fits the model {type(model).__name__} ({reasons})")
    model.load_state_dict(state)


def _read(path: Path, *, key: str) -> dict[str, "Tensor"]:
    import pickle

    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise SettingError(key, str(path), f"an existing file; there is none at {path.absolute()}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        loaded: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise SettingError(
            key, str(path), f"a safetensors file or a state dict that loads with weights_only=True ({reason})"
        ) from error
    state = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else loaded
    if not isinstance(state, dict) or not state or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise SettingError(key, str(path), "a state dict: names of parameters and their tensors")
    if all(str(name).startswith("module.") for name in state):
        state = {str(name).removeprefix("module."): tensor for name, tensor in state.items()}
    return {str(name): tensor for name, tensor in state.items()}


def _listed(found: list[str]) -> str:
    rest = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    return ", ".join(found[:_NAMED]) + rest
