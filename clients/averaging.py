"""A model's weights as federated averaging, the baseline, sends and receives them."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import nn

from fedkd.wire.codecs import BadKnowledge


def weights(model: nn.Module) -> dict[str, np.ndarray]:
    """Return a model's floating-point state, which federated averaging averages: a copy, for the model moves on."""
    state = model.state_dict().items()
    return {name: value.cpu().float().numpy().copy() for name, value in state if value.is_floating_point()}


def load_weights(model: nn.Module, arrays: Mapping[str, np.ndarray]) -> None:
    """Put the average into a model, in place.

    Args:
        model: the common architecture.
        arrays: by name, as :func:`weights` returns them.

    Raises:
        BadKnowledge: other names or shapes than the model's.
    """
    expected = {name: tuple(array.shape) for name, array in weights(model).items()}
    found = {name: tuple(array.shape) for name, array in arrays.items()}
    if found != expected:
        wrong = sorted(expected.items() ^ found.items())
        raise BadKnowledge(f"the server's weights do not fit the common model: {wrong[:4]}")
    model.load_state_dict({name: torch.from_numpy(array.copy()) for name, array in arrays.items()}, strict=False)
