"""Normalisation, shortcut, pooling and ReLU as one differentiable operator, for bfloat16 on a CPU.

The arithmetic is in :mod:`fedkd.models.kernels`, which needs numba; without it, torch's operators do the same.
"""

from functools import lru_cache
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.autograd.function import Function, once_differentiable

from fedkd.models.kept import from_its_place

_NO_ROWS = np.empty((0, 0), np.uint16)


def takes(maps: Tensor, norm: nn.BatchNorm2d | None = None, *, even: bool = False) -> bool:
    """Tell whether maps ``[B, C, H, W]`` can be given to the functions below.

    Args:
        maps: have to be bfloat16, in channels-last order, on a CPU, in a process that computes in one thread.
        norm: the normalisation that is to be applied; in training it needs more than one number of a channel, in
            evaluation there are no gradients through it.
        even: whether height and width have to be even.
    """
    if torch.compiler.is_compiling() or maps.dtype is not torch.bfloat16 or maps.device.type != "cpu":
        return False
    if maps.dim() != 4 or maps.numel() == 0 or not lies_well(maps) or torch.get_num_threads() > 1:
        return False
    if even and (maps.shape[2] % 2 or maps.shape[3] % 2):
        return False
    if norm is not None and not _can_normalise(maps, norm):
        return False
    return _kernels() is not None


def _can_normalise(maps: Tensor, norm: nn.BatchNorm2d) -> bool:
    if maps.shape[1] != norm.num_features:  # an error, which torch explains; the loops do not look
        return False
    if norm.weight.dtype is not torch.float32 or norm.running_mean is None or norm.momentum is None:
        return False
    return maps.numel() > norm.num_features if norm.training else not torch.is_grad_enabled()


def lies_well(maps: Tensor) -> bool:
    """Tell whether maps lie in channels-last order."""
    return maps.is_contiguous(memory_format=torch.channels_last)


def norm_relu(maps: Tensor, norm: nn.BatchNorm2d, shortcut: Tensor | None = None) -> Tensor:
    """Return ReLU(norm(maps) + shortcut), ``[B, C, H, W]``; a batch's moments go into the running ones in training."""
    if shortcut is not None:
        shortcut = _laid_well(shortcut)
    out: Tensor = _NormReLU.apply(maps, norm.weight, norm.bias, shortcut, norm)
    return out


def norm_pool_relu(maps: Tensor, norm: nn.BatchNorm2d) -> Tensor:
    """Return ReLU of the maxima of norm(maps) over 2×2 windows, ``[B, C, H/2, W/2]``; H and W are even."""
    out: Tensor = _NormPoolReLU.apply(maps, norm.weight, norm.bias, norm)
    return out


def pool_relu(maps: Tensor) -> Tensor:
    """Return ReLU of the maxima of maps over 2×2 windows, ``[B, C, H/2, W/2]``; H and W are even."""
    out: Tensor = _PoolReLU.apply(maps)
    return out


@lru_cache(maxsize=1)
def _kernels() -> ModuleType | None:
    try:
        return from_its_place("fedkd.models.kernels")
    except ImportError:  # numba is not installed, or not for this numpy
        return None


class _NormReLU(Function):
    @staticmethod
    def forward(
        ctx: Any, maps: Tensor, weight: Tensor, bias: Tensor, shortcut: Tensor | None, norm: nn.BatchNorm2d
    ) -> Tensor:
        out, ctx.moments = _new(*maps.shape), np.empty((2, maps.shape[1]), np.float32)
        beside = _NO_ROWS if shortcut is None else _rows(shortcut)
        _loops().norm_relu(_rows(maps), *_settings(norm), beside, _rows(out), ctx.moments)
        ctx.save_for_backward(maps, out, weight)
        ctx.has_shortcut = shortcut is not None
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        maps, out, weight = ctx.saved_tensors
        to_maps, to_shortcut = _new(*maps.shape), _new(*maps.shape) if ctx.has_shortcut else None
        to_norm = torch.empty(2, len(weight))
        _loops().norm_relu_back(
            _rows(_laid_well(gradient)), _rows(out), _rows(maps), _floats(weight), ctx.moments, _rows(to_maps),
            _NO_ROWS if to_shortcut is None else _rows(to_shortcut), _floats(to_norm),
        )  # fmt: skip
        return to_maps, to_norm[0], to_norm[1], to_shortcut, None


class _NormPoolReLU(Function):
    @staticmethod
    def forward(ctx: Any, maps: Tensor, weight: Tensor, bias: Tensor, norm: nn.BatchNorm2d) -> Tensor:
        (out, ctx.places), ctx.moments = _pooled(maps), np.empty((2, maps.shape[1]), np.float32)
        _loops().norm_pool_relu(_rows(maps), *_settings(norm), _rows(out), ctx.places, ctx.moments)
        ctx.save_for_backward(maps, weight)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        maps, weight = ctx.saved_tensors
        to_maps, to_norm = _new(*maps.shape), torch.empty(2, len(weight))
        _loops().norm_pool_relu_back(
            _rows(_laid_well(gradient)), ctx.places, _rows(maps), _floats(weight), ctx.moments, _rows(to_maps),
            _floats(to_norm),
        )  # fmt: skip
        return to_maps, to_norm[0], to_norm[1], None


class _PoolReLU(Function):
    @staticmethod
    def forward(ctx: Any, maps: Tensor) -> Tensor:
        out, ctx.places = _pooled(maps)
        ctx.shape = maps.shape
        _loops().pool_relu(_rows(maps), maps.shape[1], _rows(out), ctx.places)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        to_maps = _new(*ctx.shape)
        _loops().pool_relu_back(_rows(_laid_well(gradient)), ctx.places, ctx.shape[1], _rows(to_maps))
        return to_maps


def _loops() -> ModuleType:
    kernels = _kernels()
    if kernels is None:
        raise RuntimeError("fedkd.models.fused needs numba: ask `takes` first.")
    return kernels


def _settings(norm: nn.BatchNorm2d) -> tuple[Any, ...]:
    """Return what the loops ask of a normalisation; running moments are written where they lie."""
    if norm.training and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
    mean, variance = norm.running_mean, norm.running_var
    assert mean is not None and variance is not None  # `takes` saw to it
    return (
        *map(_floats, (norm.weight, norm.bias, mean, variance)), norm.momentum, norm.eps, norm.training
    )  # fmt: skip


def _floats(tensor: Tensor) -> NDArray[np.float32]:
    values: NDArray[np.float32] = tensor.detach().numpy()
    return values


def _rows(maps: Tensor) -> NDArray[np.uint16]:
    """Return the memory of channels-last maps ``[B, C, H, W]`` as bits, ``[B·H, W·C]``."""
    batch, channels, height, width = maps.shape
    rows: NDArray[np.uint16] = (
        maps.detach().permute(0, 2, 3, 1).reshape(batch * height, width * channels).view(torch.uint16).numpy()
    )
    return rows


def _new(batch: int, channels: int, height: int, width: int) -> Tensor:
    return torch.empty(batch, height, width, channels, dtype=torch.bfloat16).permute(0, 3, 1, 2)


def _pooled(maps: Tensor) -> tuple[Tensor, NDArray[np.uint8]]:
    """Return new maps of half the height and width, and as many numbers, ``[R, M]``, for the places of maxima."""
    batch, channels, height, width = maps.shape
    places = np.empty((batch * height // 2, width // 2 * channels), np.uint8)
    return _new(batch, channels, height // 2, width // 2), places


def _laid_well(maps: Tensor) -> Tensor:
    return maps.contiguous(memory_format=torch.channels_last)
