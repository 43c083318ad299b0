"""Batch normalisation between two kinds of images."""

from types import TracebackType

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


class StillStatistics:
    """A block in which batch normalisation goes by each batch as ever, but its running statistics stay where they are.

    A model that trains on private and on proxy batches in turns comes to running statistics of a mixture, by which it
    then judges either kind alone. Where a site's images look unlike the proxy set's, darker say, they fit neither.

    Args:
        model: whose layers these are; none may be added later.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers = [module for module in model.modules() if isinstance(module, _BatchNorm)]
        self._momenta: list[float | None] = []

    def __enter__(self) -> None:
        self._momenta = [layer.momentum for layer in self._layers]
        for layer in self._layers:
            layer.momentum = 0.0

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for layer, momentum in zip(self._layers, self._momenta, strict=True):
            layer.momentum = momentum
