"""Samples as they are kept, and as a model sees them.

What a model sees is float32, standardised and perhaps enlarged: up to a hundred times what is kept. So it is made for a
batch when that batch is asked for, unless all of it is small.
"""

from collections.abc import Callable

import torch
from torch import Tensor

View = Callable[[Tensor], Tensor]
"""Turns samples as they are kept, ``[B, ...]``, into what a model sees, ``[B, ...]`` float32 on the same device."""

_SMALL = 256 * 2**20  # bytes of a set that is made at once and kept as a model sees it


class Samples:
    """Samples that a model sees through a view.

    An index gives what a model sees; so it can stand wherever a tensor of samples is gone through batch by batch.

    Args:
        kept: ``[N, ...]``, on the device that computes.
        view: makes of a part of them what a model sees.

    >>> samples = Samples(torch.tensor([[0], [51], [255]], dtype=torch.uint8), lambda kept: kept / 255)
    >>> samples[torch.tensor([2, 0])], len(samples), samples.shape
    (tensor([[1.],
            [0.]]), 3, torch.Size([3, 1]))
    """

    def __init__(self, kept: Tensor, view: View) -> None:
        self.kept, self.view = kept, view
        self._one: torch.Size | None = None

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, index: Tensor | slice | list[int]) -> Tensor:
        return self.view(self.kept[index])

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self.kept.device

    @property
    def shape(self) -> torch.Size:
        """What a tensor of all that a model sees would have: ``[N, ...]``."""
        if self._one is None:
            one = self.kept[:1] if len(self.kept) else self.kept.new_zeros(1, *self.kept.shape[1:])
            self._one = self.view(one).shape[1:]
        return torch.Size([len(self.kept), *self._one])

    def subset(self, index: Tensor) -> "Samples":
        """Return some of them, ``[B]`` int64, seen as they are here."""
        return Samples(self.kept[index], self.view)

    def through(self, transform: View) -> "Samples":
        """Return the same samples, each batch of which goes through a transform before it is seen.

        Args:
            transform: of what is kept, to something of the same kind.
        """
        view = self.view
        return Samples(self.kept, lambda kept: view(transform(kept)))

    def settled(self) -> "Inputs":
        """Return a tensor of all that a model sees, if it is small; else themselves."""
        return self[:] if self.shape.numel() * 4 <= _SMALL else self


Inputs = Tensor | Samples
"""What models are trained and measured on: ``[N, ...]`` float32, gone through by ``inputs[index]``."""


def subset(inputs: Inputs, index: Tensor) -> Inputs:
    """Return some of the samples, ``[B]`` int64."""
    return inputs.subset(index) if isinstance(inputs, Samples) else inputs[index]
