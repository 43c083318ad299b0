"""Normalisation, shortcut, pooling and ReLU as one differentiable operator, for bfloat16 on a CPU.

The arithmetic is in :mod:`fedkd.models.kernels`, which needs numba; without it, torch's operators do the same.
"""

import importlib.util
import warnings
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


def norm_relu(maps: Tensor, norm: nn.BatchNorm2d, shortcut: Tensor | None = None) -> Tensor | None:
    """Return ReLU(norm(maps) + shortcut), ``[B, C, H, W]``, or None where torch's operators have to do it.

    Theirs are maps that are not bfloat16 in channels-last order on a CPU, processes that compute in several threads,
    compilers that look, a normalisation that is not torch's default one with all it has in float32, gradients through
    one in evaluation mode, and a shortcut of another form. In training a batch's moments go into the running ones.
    """
    if not (_takes(maps) and _can_normalise(maps, norm)):
        return None
    if shortcut is not None and (shortcut.shape, shortcut.dtype, shortcut.device) != (
        maps.shape,
        maps.dtype,
        maps.device,
    ):
        return None
    _count_batch(norm)
    out: Tensor = _NormReLU.apply(maps, norm.weight, norm.bias, shortcut, norm)
    return out


def norm_pool_relu(maps: Tensor, norm: nn.BatchNorm2d) -> Tensor | None:
    """Return ReLU of the maxima of norm(maps) over 2×2 windows, ``[B, C, H/2, W/2]``.

    None as :func:`norm_relu` has it, and where H or W is odd.
    """
    if not (_takes(maps) and _is_even(maps) and _can_normalise(maps, norm)):
        return None
    _count_batch(norm)
    out: Tensor = _NormPoolReLU.apply(maps, norm.weight, norm.bias, norm)
    return out


def pool_relu(maps: Tensor) -> Tensor | None:
    """Return ReLU of the maxima of maps over 2×2 windows, ``[B, C, H/2, W/2]``; None as in :func:`norm_pool_relu`."""
    if not (_takes(maps) and _is_even(maps)):
        return None
    out: Tensor = _PoolReLU.apply(maps)
    return out


def lies_well(maps: Tensor) -> bool:
    """Tell whether maps ``[B, C, H, W]`` lie in channels-last order."""
    return maps.is_contiguous(memory_format=torch.channels_last)


def _takes(maps: Tensor) -> bool:
    if (
        torch.compiler.is_compiling()
        or maps.dtype is not torch.bfloat16
        or maps.device.type != "cpu"
        or maps.dim() != 4
        or maps.numel() == 0
    ):
        return False
    return lies_well(maps) and torch.get_num_threads() == 1 and _kernels() is not None


def _is_even(maps: Tensor) -> bool:
    return maps.shape[2] % 2 == 0 and maps.shape[3] % 2 == 0


def _can_normalise(maps: Tensor, norm: nn.BatchNorm2d) -> bool:
    if norm.momentum is None:
        return False
    for part in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        # The loops look at nothing; and what is wrong here, torch explains.
        if (
            part is None
            or part.dtype is not torch.float32
            or part.shape != maps.shape[1:2]
            or part.device != maps.device
        ):
            return False
    return maps.numel() > maps.shape[1] if norm.training else not torch.is_grad_enabled()


def _count_batch(norm: nn.BatchNorm2d) -> None:
    if norm.training and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)


@lru_cache(maxsize=1)
def _kernels() -> ModuleType | None:
    """Return the loops, compiled, or None without numba, or if it cannot compile them here, which is said once."""
    if importlib.util.find_spec("numba") is None:
        return None
    try:
        loops = from_its_place("fedkd.models.kernels")
        loops.compile_all()
    except Exception as error:  # another numpy, a full disk: training goes on without
        warnings.warn(f"numba cannot be used, and fast = true is slower: {type(error).__name__}: {error}", stacklevel=2)
        return None
    return loops


class _NormReLU(Function):
    @staticmethod
    def forward(
        ctx: Any, maps: Tensor, weight: Tensor, bias: Tensor, shortcut: Tensor | None, norm: nn.BatchNorm2d
    ) -> Tensor:
        out, ctx.moments = _new(*maps.shape), np.empty((2, maps.shape[1]), np.float32)
        beside = _NO_ROWS if shortcut is None else _rows(shortcut)
        _loops().norm_relu(_rows(maps), _settings(norm), beside, _rows(out), ctx.moments)
        ctx.save_for_backward(maps, out, weight)
        ctx.has_shortcut = shortcut is not None
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        maps, out, weight = ctx.saved_tensors
        to_maps, to_shortcut = _new(*maps.shape), _new(*maps.shape) if ctx.has_shortcut else None
        to_norm = torch.empty(2, len(weight), dtype=torch.float32, device="cpu")
        _loops().norm_relu_back(
            _rows(gradient), _rows(out), _rows(maps), _floats(weight), ctx.moments, _rows(to_maps),
            _NO_ROWS if to_shortcut is None else _rows(to_shortcut), _floats(to_norm),
        )  # fmt: skip
        return to_maps, to_norm[0], to_norm[1], to_shortcut, None


class _NormPoolReLU(Function):
    @staticmethod
    def forward(ctx: Any, maps: Tensor, weight: Tensor, bias: Tensor, norm: nn.BatchNorm2d) -> Tensor:
        (out, ctx.places), ctx.moments = _pooled(maps), np.empty((2, maps.shape[1]), np.float32)
        _loops().norm_pool_relu(_rows(maps), _settings(norm), _rows(out), ctx.places, ctx.moments)
        ctx.save_for_backward(maps, weight)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        maps, weight = ctx.saved_tensors
        to_maps, to_norm = _new(*maps.shape), torch.empty(2, len(weight), dtype=torch.float32, device="cpu")
        _loops().norm_pool_relu_back(
            _rows(gradient), ctx.places, _rows(maps), _floats(weight), ctx.moments, _rows(to_maps),
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
        _loops().pool_relu_back(_rows(gradient), ctx.places, ctx.shape[1], _rows(to_maps))
        return to_maps


def _loops() -> ModuleType:
    kernels = _kernels()
    if kernels is None:
        raise RuntimeError("fedkd.models.fused needs numba: its functions say so by None.")
    return kernels


def _settings(norm: nn.BatchNorm2d) -> tuple[Any, ...]:
    """Return a normalisation as the loops take it; the running moments are written where they lie."""
    mean, variance = norm.running_mean, norm.running_var
    assert mean is not None and variance is not None  # `_can_normalise` saw to it
    return (
        *map(_floats, (norm.weight, norm.bias, mean, variance)), norm.momentum, norm.eps, norm.training
    )  # fmt: skip


def _floats(tensor: Tensor) -> NDArray[np.float32]:
    values: NDArray[np.float32] = tensor.detach().numpy()
    return values


def _rows(maps: Tensor) -> NDArray[np.uint16]:
    """Return maps ``[B, C, H, W]`` as bits, ``[B·H, W·C]``: the memory of those in channels-last order, else a copy."""
    batch, channels, height, width = maps.shape
    rows: NDArray[np.uint16] = (
        maps.detach().permute(0, 2, 3, 1).reshape(batch * height, width * channels).view(torch.uint16).numpy()
    )
    return rows


def _new(batch: int, channels: int, height: int, width: int) -> Tensor:
    return torch.empty(
        batch, channels, height, width, dtype=torch.bfloat16, device="cpu", memory_format=torch.channels_last
    )


def _pooled(maps: Tensor) -> tuple[Tensor, NDArray[np.uint8]]:
    """Return new maps of half the height and width, and as many numbers, ``[R, M]``, for the places of maxima."""
    batch, channels, height, width = maps.shape
    places = np.empty((batch * height // 2, width // 2 * channels), np.uint8)
    return _new(batch, channels, height // 2, width // 2), places
