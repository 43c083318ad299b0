"""What follows a convolution in the library's own models, as one module each.

In bfloat16 on a CPU it is computed in one go, if numba is installed (:mod:`fedkd.models.fused`); everywhere else by
torch's operators of those names, one after another. Parameters and buffers are named as in
:class:`torch.nn.BatchNorm2d`. What replaces layers of that class by others, as ``convert_sync_batchnorm`` does, takes
the rest of these away.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from fedkd.models import fused


class NormReLU(nn.BatchNorm2d):
    """Batch normalisation, the addition of a shortcut if there is one, and ReLU."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)

    def forward(self, maps: Tensor, shortcut: Tensor | None = None) -> Tensor:
        """Return ``[B, C, H, W]`` for maps, and perhaps a shortcut, of that shape."""
        out = fused.norm_relu(maps, self, shortcut)
        if out is not None:
            return out
        normalised = super().forward(maps)
        return F.relu(normalised if shortcut is None else normalised + shortcut)


class NormPoolReLU(nn.BatchNorm2d):
    """Batch normalisation, the maximum over 2×2 windows, smaller ones at an odd edge, and ReLU."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)

    def forward(self, maps: Tensor) -> Tensor:
        """Return ``[B, C, ⌈H/2⌉, ⌈W/2⌉]``."""
        out = fused.norm_pool_relu(maps, self)
        return _pool_relu(super().forward(maps)) if out is None else out


class PoolReLU(nn.Module):
    """The maximum over 2×2 windows, smaller ones at an odd edge, and ReLU."""

    def forward(self, maps: Tensor) -> Tensor:
        """Return ``[B, C, ⌈H/2⌉, ⌈W/2⌉]``."""
        out = fused.pool_relu(maps)
        return _pool_relu(maps) if out is None else out


class PositionMean(nn.Module):
    """The mean over image positions, [B, C, H, W] -> [B, C]."""

    def forward(self, maps: Tensor) -> Tensor:
        """Average."""
        if not fused.lies_well(maps):
            return maps.mean(dim=(2, 3))
        # Along [B, H, W, C], in which order the gradient comes as well: in another it would have to be brought into it.
        return maps.permute(0, 2, 3, 1).flatten(1, 2).mean(dim=1)


def subsampled(maps: Tensor, stride: int, padding: tuple[int, int]) -> Tensor:
    """Take every ``stride``-th position, and put channels of zeros before and after the others.

    Args:
        maps: ``[B, C, H, W]``.
        stride: 1 or more.
        padding: how many channels before, and after.

    Returns:
        ``[B, C + sum(padding), ⌈H/stride⌉, ⌈W/stride⌉]``, in the order of memory of ``maps``; so is the gradient.
    """
    if not fused.lies_well(maps):
        return F.pad(maps[:, :, ::stride, ::stride], (0, 0, 0, 0, *padding))
    return F.pad(maps.permute(0, 2, 3, 1)[:, ::stride, ::stride], padding).permute(0, 3, 1, 2)


def _pool_relu(maps: Tensor) -> Tensor:
    # ReLU after the maximum is ReLU before it, values and gradients alike, of a quarter of the numbers.
    return F.relu(F.max_pool2d(maps, 2, ceil_mode=True))
