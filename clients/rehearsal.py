"""A training step before the run: a model that cannot train is an error at the introduction, not in every round."""

import copy
import tempfile
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from safetensors.torch import load_model, save_model
from torch import nn

from clients.answering import by_kind
from fedkd.data.samples import Inputs
from fedkd.errors import SettingError
from fedkd.models import parameters_count
from fedkd.seeding import derive
from fedkd.settings.config import RunConfig
from fedkd.training.loops import Optimization, fit, predict

_passed: set[tuple[object, ...]] = set()  # the process's cache: architectures of which one trained here


def rehearse(
    model: nn.Module, spec: str, inputs: Inputs, config: RunConfig, *, classes: int, key: str, frank: bool = False
) -> None:
    """Train a model by one step, and write and read its state; afterwards it is as it was.

    The inputs are public and the labels made up, so that nothing is learned of anyone's data. Architectures that this
    process has tried already are taken to train: a thousand peers with one architecture cost one step.

    Args:
        model: on the device of the inputs.
        spec: what it was built by, for the cache and for errors.
        inputs: ``[N, ...]`` of the proxy set, N >= 1.
        config: the run's settings.
        classes: how many there are.
        key: the setting that holds the spec.
        frank: whether others may read the text of the model's own error, which can hold anything; else it goes to the
            peer's log.

    Raises:
        SettingError: the model does not train, or its state cannot be stored.
    """
    shape, trains = tuple(inputs.shape[1:]), parameters_count(model)
    once = (spec, trains, shape, classes, config.optimizer, config.fast, config.regime, str(inputs.device))
    if once in _passed:
        return
    two = inputs[[0, -1]]
    labels = torch.arange(2, device=inputs.device) % classes
    try:
        with tempfile.TemporaryDirectory() as folder, _uncompiled(config):
            state = Path(folder) / "state.safetensors"
            save_model(model, str(state))
            if config.regime == "tuned":
                copy.deepcopy(model)  # a search tries every setting on a copy
            how = Optimization.from_config(config)
            fit(model, two, labels, epochs=1, how=how, seed=derive(config.seed, "rehearsal"))
            load_model(model, state)
    except (Exception, SystemExit) as error:  # a user's own model may fail in any way
        reason = f"{type(error).__name__}: {error}".partition("\n")[0] if frank else by_kind(error)
        raise SettingError(
            key, spec, f"a model that one training step and its state's file can do with ({reason})"
        ) from error
    _passed.add(once)


def check_start(model: nn.Module, inputs: Inputs, config: RunConfig, *, path: Path) -> None:
    """Refuse a checkpoint under which a model answers what is no number.

    Raises:
        SettingError: on ``checkpoints``.
    """
    with _uncompiled(config):
        if not bool(predict(model, inputs[[0, -1]], fast=config.fast).isfinite().all()):
            raise SettingError("checkpoints", str(path), "weights under which the model's logits are finite")


def _uncompiled(config: RunConfig) -> AbstractContextManager[object]:
    """Have a model that compiles itself not do so for two samples, which would take minutes."""
    return torch.compiler.set_stance("force_eager") if config.compiled else nullcontext()
