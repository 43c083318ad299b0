"""Standardised inputs: each channel (or feature) shifted and scaled, once, by statistics that are public."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedkd.data.sources import as_float
from fedkd.errors import SettingError

KINDS = ("auto", "imagenet", "symmetric", "none")

_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)

# A standard deviation below this share of the mean is rounding: the channel is constant and is only shifted.
_CONSTANT = 1e-6


@dataclass(frozen=True)
class Standardizer:
    """(x − mean) / std along dimension 1: mean, std [C], per channel of images, per feature of [N, D] inputs.

    >>> Standardizer(torch.tensor([0.5]), torch.tensor([0.25]))(torch.tensor([[0.5], [1.0]]))
    tensor([[0.],
            [2.]])
    """

    mean: Tensor
    std: Tensor

    def __call__(self, inputs: Tensor) -> Tensor:
        """Return standardised float32 inputs of the same shape, [N, C, ...]; uint8 is first brought into [0, 1]."""
        shape = (1, -1) + (1,) * (inputs.ndim - 2)
        mean, std = (statistic.to(inputs.device).view(shape) for statistic in (self.mean, self.std))
        return (as_float(inputs) - mean) / std


def standardizer(kind: str, proxy: Tensor, *, key: str = "normalize") -> Standardizer:
    """Make the standardizer of a kind: `auto` (statistics of the proxy set), `imagenet`, `symmetric` or `none`.

    `symmetric` makes -1 to 1 of 8-bit pixels, `none` 0 to 1. `auto` reads the public proxy inputs [P, C, ...] alone, so
    that a peer's scaling tells nothing of its data and all peers scale alike.

    Raises:
        SettingError: unknown kind, or `imagenet` for inputs that have not three channels.
    """
    channels = proxy.shape[1]
    if kind == "none":
        return Standardizer(torch.zeros(channels), torch.ones(channels))
    if kind == "symmetric":
        return Standardizer(torch.full((channels,), 0.5), torch.full((channels,), 0.5))
    if kind == "imagenet":
        if channels != 3 or proxy.ndim != 4:
            raise SettingError(key, kind, f"auto or none for inputs {list(proxy.shape[1:])}, which are not RGB images")
        return Standardizer(torch.tensor(_IMAGENET_MEAN), torch.tensor(_IMAGENET_STD))
    if kind == "auto":
        # NumPy in float64: torch's sums depend on the number of threads, and the same seed must give the same numbers.
        by_channel = proxy.detach().cpu().transpose(0, 1).flatten(1).numpy()
        scale = 255.0 if proxy.dtype == torch.uint8 else 1.0
        mean = [np.mean(values, dtype=np.float64) / scale for values in by_channel]
        std = [np.std(values, dtype=np.float64) / scale for values in by_channel]
        return Standardizer(
            torch.tensor(mean, dtype=torch.float32),
            torch.tensor(
                [s if s > _CONSTANT * abs(m) else 1.0 for m, s in zip(mean, std, strict=True)], dtype=torch.float32
            ),
        )
    raise SettingError(key, kind, f"one of {', '.join(KINDS)}")
