"""What a letter holds beside logits: projected features of chosen layers, for distillation by information flow."""

from collections.abc import Mapping, Sequence

import numpy as np

from fedkd.wire.codecs import BadKnowledge, codec

Arrays = Mapping[str, np.ndarray]

_PREFIX = "flow."
_CODEC = codec("fp16")  # half the bytes; the kernels do not feel the rounding


def encode_features(layers: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """Name and encode features, one ``[P, d]`` float32 per layer, as float16.

    Raises:
        BadKnowledge: a value that is not finite.
    """
    return {f"{_PREFIX}{i}": _CODEC.encode(layer)["logits"] for i, layer in enumerate(layers)}


def decode_features(arrays: Arrays, *, count: int, dimensions: int) -> list[np.ndarray]:
    """Read the features of a letter, one ``[count, d]`` float32 per layer, 1 <= d <= ``dimensions``; maybe none.

    Raises:
        BadKnowledge: layers that are not numbered from 0, or an array that cannot be features.
    """
    found = {name: array for name, array in arrays.items() if name.startswith(_PREFIX)}
    layers = []
    for i in range(len(found)):
        array = found.get(f"{_PREFIX}{i}")
        if array is None or array.ndim != 2 or not 1 <= array.shape[1] <= dimensions:
            shape = None if array is None else array.shape
            raise BadKnowledge(f"expected features `{_PREFIX}{i}` [{count}, 1 to {dimensions}], but got {shape}")
        layers.append(_CODEC.decode({"logits": array}, shape=(count, array.shape[1])))
    return layers


def without_features(arrays: Arrays) -> dict[str, np.ndarray]:
    """Return the logits' part of a letter."""
    return {name: array for name, array in arrays.items() if not name.startswith(_PREFIX)}
