"""What surrounds a convolution, in as few passes over memory as it takes: loops over bfloat16 that numba compiles.

torch has an operator, and so a pass or two over memory, for each of normalisation, shortcut, pooling and ReLU, forward
and backward. These loops take them together. numpy has no bfloat16, so that numbers come and go as their bits,
``uint16``: the upper half of a float32. Arithmetic is in float32; sums of some rows go on in float64.

Maps ``[B, C, H, W]`` in channels-last order are given as their rows, ``[R, M]`` with R = B·H and M = W·C.
"""

from collections.abc import Callable
from typing import TypeVar

import numpy as np
from numba import njit
from numpy.typing import NDArray

Bits = NDArray[np.uint16]
Floats = NDArray[np.float32]
Places = NDArray[np.uint8]
Norm = tuple[Floats, Floats, Floats, Floats, float, float, bool]
"""Batch normalisation: weight, bias, running mean and variance, ``[C]`` each, momentum, ε, whether it is in training.

In training the batch's own moments normalise, and the running ones are moved towards them, the variance towards the
unbiased one.
"""
F = TypeVar("F", bound=Callable[..., object])

_AT_ONCE = 64  # rows that are summed in float32, before their sum goes into one in float64
_P0, _P1, _P2, _P3, _NOWHERE = (np.uint8(place) for place in range(5))


def _loop(function: F) -> F:
    """Have a loop compiled when it is first called, and what was compiled kept where numba may write."""
    try:
        compiled: F = njit(function, cache=True, nogil=True, error_model="numpy", fastmath={"contract", "nsz"})
    except RuntimeError:  # it may write nowhere
        compiled = njit(function, nogil=True, error_model="numpy", fastmath={"contract", "nsz"})
    return compiled


def _part(function: F) -> F:
    """Have a piece of a loop compiled into it."""
    compiled: F = njit(function, inline="always", error_model="numpy", fastmath={"contract", "nsz"})
    return compiled


@_part
def _up(bits: np.uint16) -> np.float32:
    return np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32)


@_part
def _down(value: np.float32) -> np.uint16:
    # To the nearest, ties to even, as torch rounds.
    bits = np.float32(value).view(np.uint32)
    odd = np.uint32(np.uint32(bits >> np.uint32(16)) & np.uint32(1))
    return np.uint16(np.uint32(np.uint32(bits + np.uint32(0x7FFF)) + odd) >> np.uint32(16))


@_part
def _plain(value: np.float32) -> np.float32:
    return np.float32(np.nan) if value != value else value  # others than this NaN might be rounded to a number


@_part
def _above_zero(value: np.float32) -> np.float32:
    return np.float32(0) if value <= np.float32(0) else value  # NaN stays


def compile_all() -> None:
    """Compile every loop, or read it where it is kept compiled: what may fail, fails here."""
    maps, halved, nothing = np.zeros((2, 2), np.uint16), np.zeros((1, 1), np.uint16), np.zeros((0, 0), np.uint16)
    place, one, two = np.zeros((1, 1), np.uint8), np.zeros(1, np.float32), np.zeros((2, 1), np.float32)
    norm = (one, one, one, one, 0.1, 1e-5, True)
    norm_relu(maps, norm, nothing, maps, two)
    norm_relu_back(maps, maps, maps, one, two, maps, nothing, two)
    norm_pool_relu(maps, norm, halved, place, two)
    norm_pool_relu_back(halved, place, maps, one, two, maps, two)
    pool_relu(maps, 1, halved, place)
    pool_relu_back(halved, place, 1, maps)


@_loop
def norm_relu(maps: Bits, norm: Norm, shortcut: Bits, out: Bits, moments: Floats) -> None:
    """Write ReLU(batch normalisation of maps + shortcut).

    Args:
        maps: ``[R, M]``.
        norm: the normalisation.
        shortcut: ``[R, M]``; ``[0, 0]`` if there is none.
        out: ``[R, M]``, written.
        moments: ``[2, C]``, written: the mean, and 1 / the standard deviation.
    """
    rows, width = maps.shape
    factor, offset = _normalisation(maps, norm, moments)
    a, b = _repeated(factor, width // len(factor)), _repeated(offset, width // len(offset))
    if shortcut.size:
        for i in range(rows):
            for j in range(width):
                out[i, j] = _down(_above_zero(_up(maps[i, j]) * a[j] + b[j] + _up(shortcut[i, j])))
    else:
        for i in range(rows):
            for j in range(width):
                out[i, j] = _down(_above_zero(_up(maps[i, j]) * a[j] + b[j]))


@_loop
def norm_relu_back(
    gradient: Bits,
    out: Bits,
    maps: Bits,
    weight: Floats,
    moments: Floats,
    to_maps: Bits,
    to_shortcut: Bits,
    to_norm: Floats,
) -> None:
    """Write the gradients of :func:`norm_relu` in training.

    Args:
        gradient: of the output.
        out: the output.
        maps: as they were given.
        weight: the same.
        moments: as they were written.
        to_maps: written.
        to_shortcut: written; ``[0, 0]`` if there was none.
        to_norm: ``[2, C]``, written: of the weight and of the bias.
    """
    rows, width = maps.shape
    columns = width // len(weight)
    middle = _repeated(moments[0], columns)
    total, product = np.zeros(width), np.zeros(width)
    some, products = np.empty(width, np.float32), np.empty(width, np.float32)
    for start in range(0, rows, _AT_ONCE):
        some[:], products[:] = 0, 0
        for i in range(start, min(start + _AT_ONCE, rows)):
            for j in range(width):
                slope = _up(gradient[i, j]) if out[i, j] else np.float32(0)
                some[j] += slope
                products[j] += slope * (_up(maps[i, j]) - middle[j])
        for j in range(width):
            total[j] += some[j]
            product[j] += products[j]
    a, b, c = _coefficients(rows * columns, total, product, weight, moments, to_norm)
    if to_shortcut.size:
        for i in range(rows):
            for j in range(width):
                passed = gradient[i, j] if out[i, j] else np.uint16(0)
                to_shortcut[i, j] = passed
                to_maps[i, j] = _down(a[j] * _up(passed) + b[j] * _up(maps[i, j]) + c[j])
    else:
        for i in range(rows):
            for j in range(width):
                slope = _up(gradient[i, j]) if out[i, j] else np.float32(0)
                to_maps[i, j] = _down(a[j] * slope + b[j] * _up(maps[i, j]) + c[j])


@_loop
def norm_pool_relu(maps: Bits, norm: Norm, out: Bits, place: Places, moments: Floats) -> None:
    """Write ReLU(max over 2×2 windows of the batch normalisation of maps), and the place of each maximum.

    Maps are of an even height and width; out and place are ``[R/2, M/2]``. A place is 0 to 3, row by row, of the first
    of equals in its window, and 4 where out is 0. All else is as in :func:`norm_relu`.
    """
    factor, offset = _normalisation(maps, norm, moments)
    _pool(maps, factor, offset, out, place)


@_loop
def norm_pool_relu_back(
    gradient: Bits, place: Places, maps: Bits, weight: Floats, moments: Floats, to_maps: Bits, to_norm: Floats
) -> None:
    """Write the gradients of :func:`norm_pool_relu` in training; arguments as in :func:`norm_relu_back`."""
    rows, width = gradient.shape
    channels = len(weight)
    total, product = np.zeros(channels), np.zeros(channels)
    of_row, products = np.empty(channels, np.float32), np.empty(channels, np.float32)
    for i in range(rows):
        of_row[:], products[:] = 0, 0
        for start in range(0, width, channels):
            left, middle, right = 2 * start, 2 * start + channels, 2 * (start + channels)
            slope, where = gradient[i, start : start + channels], place[i, start : start + channels]
            _gather(slope, where, _P0, maps[2 * i, left:middle], moments[0], of_row, products)
            _gather(slope, where, _P1, maps[2 * i, middle:right], moments[0], of_row, products)
            _gather(slope, where, _P2, maps[2 * i + 1, left:middle], moments[0], of_row, products)
            _gather(slope, where, _P3, maps[2 * i + 1, middle:right], moments[0], of_row, products)
        for c in range(channels):
            total[c] += of_row[c]
            product[c] += products[c]
    a, b, o = _coefficients(4 * rows * (width // channels), total, product, weight, moments, to_norm)
    for i in range(rows):
        for start in range(0, width, channels):
            left, middle, right = 2 * start, 2 * start + channels, 2 * (start + channels)
            slope, where = gradient[i, start : start + channels], place[i, start : start + channels]
            _scatter(slope, where, _P0, maps[2 * i, left:middle], a, b, o, to_maps[2 * i, left:middle])
            _scatter(slope, where, _P1, maps[2 * i, middle:right], a, b, o, to_maps[2 * i, middle:right])
            _scatter(slope, where, _P2, maps[2 * i + 1, left:middle], a, b, o, to_maps[2 * i + 1, left:middle])
            _scatter(slope, where, _P3, maps[2 * i + 1, middle:right], a, b, o, to_maps[2 * i + 1, middle:right])


@_loop
def pool_relu(maps: Bits, channels: int, out: Bits, place: Places) -> None:
    """Write ReLU(max over 2×2 windows of maps); arguments as in :func:`norm_pool_relu`."""
    _pool(maps, np.ones(channels, np.float32), np.zeros(channels, np.float32), out, place)


@_loop
def pool_relu_back(gradient: Bits, place: Places, channels: int, to_maps: Bits) -> None:
    """Write the gradient of :func:`pool_relu`."""
    rows, width = gradient.shape
    for i in range(rows):
        for start in range(0, width, channels):
            left, middle, right = 2 * start, 2 * start + channels, 2 * (start + channels)
            slope, where = gradient[i, start : start + channels], place[i, start : start + channels]
            _return(slope, where, _P0, to_maps[2 * i, left:middle])
            _return(slope, where, _P1, to_maps[2 * i, middle:right])
            _return(slope, where, _P2, to_maps[2 * i + 1, left:middle])
            _return(slope, where, _P3, to_maps[2 * i + 1, middle:right])


@_loop
def _normalisation(maps: Bits, norm: Norm, moments: Floats) -> tuple[Floats, Floats]:
    """Return factor and offset of batch normalisation, ``[C]``."""
    weight, bias, running_mean, running_variance, momentum, epsilon, training = norm
    channels = len(weight)
    factor, offset = np.empty(channels, np.float32), np.empty(channels, np.float32)
    mean, variance = running_mean, running_variance
    if training:
        mean, variance = _moments(maps, channels)
        count = maps.size // channels
        for c in range(channels):
            running_mean[c] += momentum * (mean[c] - running_mean[c])
            running_variance[c] += momentum * (variance[c] * count / (count - 1) - running_variance[c])
    for c in range(channels):
        moments[0, c], moments[1, c] = mean[c], 1 / np.sqrt(variance[c] + epsilon)
        factor[c] = _plain(weight[c] * moments[1, c])
        offset[c] = _plain(bias[c] - mean[c] * factor[c])
    return factor, offset


@_loop
def _moments(maps: Bits, channels: int) -> tuple[Floats, Floats]:
    """Return the mean and the biased variance of each channel, ``[C]``."""
    rows, width = maps.shape
    columns = width // channels
    # About a mean of some rows, so that the squares of maps far from zero lose no digits.
    shift = np.zeros(width, np.float32)
    sampled = min(rows, _AT_ONCE)
    for i in range(sampled):
        for j in range(width):
            shift[j] += _up(maps[i, j]) / np.float32(sampled)
    total, square = np.zeros(width), np.zeros(width)
    some, squares = np.empty(width, np.float32), np.empty(width, np.float32)
    for start in range(0, rows, _AT_ONCE):
        some[:], squares[:] = 0, 0
        for i in range(start, min(start + _AT_ONCE, rows)):
            for j in range(width):
                away = _up(maps[i, j]) - shift[j]
                some[j] += away
                squares[j] += away * away
        for j in range(width):
            total[j] += some[j]
            square[j] += squares[j]
    mean, variance = np.empty(channels, np.float32), np.empty(channels, np.float32)
    for c in range(channels):
        middle = 0.0
        for j in range(c, width, channels):
            middle += shift[j] + total[j] / rows
        middle /= columns
        spread = 0.0
        for j in range(c, width, channels):
            off = total[j] / rows
            spread += square[j] / rows - off * off + (shift[j] + off - middle) ** 2
        mean[c], variance[c] = middle, max(spread / columns, 0.0)
    return mean, variance


@_loop
def _pool(maps: Bits, factor: Floats, offset: Floats, out: Bits, place: Places) -> None:
    rows, width = out.shape
    channels = len(factor)
    for i in range(rows):
        for start in range(0, width, channels):
            left, middle, right = 2 * start, 2 * start + channels, 2 * (start + channels)
            first, second = maps[2 * i, left:middle], maps[2 * i, middle:right]
            third, fourth = maps[2 * i + 1, left:middle], maps[2 * i + 1, middle:right]
            best_of, place_of = out[i, start : start + channels], place[i, start : start + channels]
            for c in range(channels):
                best, where = _up(first[c]) * factor[c] + offset[c], _P0
                best, where = _better(_up(second[c]) * factor[c] + offset[c], _P1, best, where)
                best, where = _better(_up(third[c]) * factor[c] + offset[c], _P2, best, where)
                best, where = _better(_up(fourth[c]) * factor[c] + offset[c], _P3, best, where)
                best_of[c] = _down(_above_zero(best))
                place_of[c] = _NOWHERE if best <= np.float32(0) else where


@_part
def _better(value: np.float32, there: np.uint8, best: np.float32, where: np.uint8) -> tuple[np.float32, np.uint8]:
    wins = (value > best) | (value != value)  # NaN wins, as in torch
    return value if wins else best, there if wins else where


@_part
def _return(slope: Bits, where: Places, here: np.uint8, to_maps: Bits) -> None:
    for c in range(len(slope)):
        to_maps[c] = slope[c] if where[c] == here else np.uint16(0)


@_part
def _gather(
    slope: Bits, where: Places, here: np.uint8, maps: Bits, mean: Floats, total: Floats, product: Floats
) -> None:
    for c in range(len(slope)):
        value = _up(slope[c]) if where[c] == here else np.float32(0)
        total[c] += value
        product[c] += value * (_up(maps[c]) - mean[c])


@_part
def _scatter(
    slope: Bits, where: Places, here: np.uint8, maps: Bits, a: Floats, b: Floats, o: Floats, to_maps: Bits
) -> None:
    for c in range(len(slope)):
        value = _up(slope[c]) if where[c] == here else np.float32(0)
        to_maps[c] = _down(a[c] * value + b[c] * _up(maps[c]) + o[c])


@_loop
def _repeated(values: Floats, times: int) -> Floats:
    channels = len(values)
    out = np.empty(channels * times, np.float32)
    for j in range(len(out)):
        out[j] = values[j % channels]
    return out


@_loop
def _coefficients(
    count: int,
    total: NDArray[np.floating],
    product: NDArray[np.floating],
    weight: Floats,
    moments: Floats,
    to_norm: Floats,
) -> tuple[Floats, Floats, Floats]:
    """Write the gradients of weight and bias; return a, b, c of a·gradient + b·maps + c, the gradient of the maps.

    ``total`` and ``product`` are the sums of the gradient and of its product with maps − mean, for each column.
    """
    width, channels = len(total), len(weight)
    a, b, c = np.empty(width, np.float32), np.empty(width, np.float32), np.empty(width, np.float32)
    for k in range(channels):
        summed, paired = 0.0, 0.0
        for j in range(k, width, channels):
            summed += total[j]
            paired += product[j]
        mean, inverse = moments[0, k], moments[1, k]
        to_norm[0, k], to_norm[1, k] = paired * inverse, summed
        factor = weight[k] * inverse
        slant = -factor * inverse * inverse * paired / count
        level = -factor * summed / count - slant * mean
        for j in range(k, width, channels):
            a[j], b[j], c[j] = _plain(factor), _plain(slant), _plain(level)
    return a, b, c
