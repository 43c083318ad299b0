"""Knowledge (logits ``[P, C]``) to and from compact named arrays, with exact byte counts.

A codec's :meth:`Codec.layout` says which arrays it sends for a shape: the receiver knows every name, dtype
and shape before it looks at what arrived, and refuses anything else with :class:`BadKnowledge`.
"""

import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedkd.errors import FedkdError, SettingError

Array = NDArray[Any]
Logits = NDArray[np.float32]
Layout = dict[str, tuple[np.dtype[Any], tuple[int, ...]]]

FP16_MAX = 65504.0
GREATEST = 1e30
"""Logits larger than that, which no model means, would overflow in a softmax at a low temperature."""
_RECEIVED = 2 * GREATEST  # a codec's rounding carries what is sent a little further
ALLOWED = 'one of "fp32", "fp16", "int8" or "topk:K" with K >= 1, each with or without "+zstd"'

_F32, _F16, _U8, _U16 = np.dtype("<f4"), np.dtype("<f2"), np.dtype("u1"), np.dtype("<u2")
_BLOCK_ROWS = 1024
_SMALLEST_SCALE = np.float32(2**-126)
_ZSTD_LEVEL = 3
_ZSTD_WINDOW = 1 << 23


class BadKnowledge(FedkdError):
    """Knowledge that can't be sent, or that arrived and can't be used."""


class Codec(ABC):
    """One way to write logits as arrays; pure, and safe on whatever :meth:`decode` is given."""

    @property
    @abstractmethod
    def name(self) -> str:
        """The codec as the setting ``codec`` writes it."""

    @abstractmethod
    def layout(self, shape: tuple[int, int]) -> Layout:
        """Name -> (dtype, shape) of the arrays that carry logits of ``shape``, in the order they are sent.

        Raises:
            SettingError: this codec can't carry that number of classes.
        """

    def encode(self, logits: Logits) -> dict[str, Array]:
        """Logits ``[P, C]`` float32 -> named arrays, which may share memory with ``logits``.

        Raises:
            BadKnowledge: not float32, not ``[P, C]``, or an entry is NaN or beyond ±1e30.
            SettingError: this codec can't carry that number of classes.
        """
        _check_logits(logits)
        self.layout(_shape_of(logits))
        return self._encode(logits)

    def decode(self, arrays: Mapping[str, Array], *, shape: tuple[int, int]) -> Logits:
        """Named arrays, from anyone -> logits ``[P, C]`` float32 of ``shape``, within ±2e30, in memory of their own.

        Raises:
            BadKnowledge: a name, dtype, shape or value that :meth:`encode` can't have produced for ``shape``.
            SettingError: this codec can't carry that number of classes.
        """
        _check_arrays(arrays, self.layout(shape))
        # What a hostile sender can make overflow is tested for below; a warning would only flood the log.
        with np.errstate(all="ignore"):
            logits = self._decode(arrays, shape)
        _check_size(logits, _RECEIVED)
        return logits

    @abstractmethod
    def _encode(self, logits: Logits) -> dict[str, Array]:
        """Encode finite logits."""

    @abstractmethod
    def _decode(self, arrays: Mapping[str, Array], shape: tuple[int, int]) -> Logits:
        """Decode arrays that follow the layout; their values are anyone's, and so may be what comes out."""


def codec(spec: str) -> Codec:
    """The codec that the setting ``codec`` names: ``fp32``, ``fp16``, ``int8`` or ``topk:K``, and ``+zstd``.

    Raises:
        SettingError: an unknown name, or ``+zstd`` where the package ``zstandard`` is missing.

    >>> codec("topk:5").name
    'topk:5'
    >>> z = np.array([[4.0, 1.0, -2.0]], np.float32)
    >>> codec("fp16").decode(codec("fp16").encode(z), shape=(1, 3))
    array([[ 4.,  1., -2.]], dtype=float32)
    """
    base, plus, extra = spec.partition("+")
    if plus:
        if extra != "zstd":
            raise SettingError("codec", spec, ALLOWED)
        return Zstd(codec(base), _zstandard(spec))
    if match := re.fullmatch(r"topk:([1-9][0-9]{0,4})", base):
        return TopK(int(match[1]))
    simple: dict[str, Codec] = {"fp32": Fp32(), "fp16": Fp16(), "int8": Int8()}
    if base not in simple:
        raise SettingError("codec", spec, ALLOWED)
    return simple[base]


def encoded_bytes(arrays: Mapping[str, Array]) -> int:
    """Σ bytes of the arrays, without the few bytes of framing that a transport adds to each.

    >>> encoded_bytes(codec("int8").encode(np.zeros((10, 100), np.float32)))
    1080
    """
    return sum(array.nbytes for array in arrays.values())


@dataclass(frozen=True)
class Fp32(Codec):
    """``logits`` as they are: 4 bytes a class, no error."""

    name = "fp32"

    def layout(self, shape: tuple[int, int]) -> Layout:
        """See :meth:`Codec.layout`."""
        return {"logits": (_F32, _checked(shape))}

    def _encode(self, logits: Logits) -> dict[str, Array]:
        return {"logits": np.ascontiguousarray(logits)}

    def _decode(self, arrays: Mapping[str, Array], shape: tuple[int, int]) -> Logits:
        return np.array(arrays["logits"], order="C")


@dataclass(frozen=True)
class Fp16(Codec):
    """``logits`` as IEEE half floats: 2 bytes a class.

    |error| ≤ max(2⁻¹¹·|z|, 2⁻²⁵) for |z| ≤ 65504; larger logits are clipped to ±65504.
    """

    name = "fp16"

    def layout(self, shape: tuple[int, int]) -> Layout:
        """See :meth:`Codec.layout`."""
        return {"logits": (_F16, _checked(shape))}

    def _encode(self, logits: Logits) -> dict[str, Array]:
        return {"logits": _half(logits)}

    def _decode(self, arrays: Mapping[str, Array], shape: tuple[int, int]) -> Logits:
        return _single(arrays["logits"])


@dataclass(frozen=True)
class Int8(Codec):
    """``codes`` of 8 bits on a grid of 256 steps per sample: 1 byte a class and 8 bytes a sample.

    Sample i sends its least logit as ``zero`` and (greatest − least)/255 as ``scale``; z ≈ zero + scale·code.
    |error| ≤ range/510 + 2⁻²⁰·max|z| + 2⁻¹¹⁸ per sample, the two small terms being float32's own rounding
    and the range below which a sample is sent as constant.
    """

    name = "int8"

    def layout(self, shape: tuple[int, int]) -> Layout:
        """See :meth:`Codec.layout`."""
        rows = (_checked(shape)[0],)
        return {"codes": (_U8, shape), "scale": (_F32, rows), "zero": (_F32, rows)}

    def _encode(self, logits: Logits) -> dict[str, Array]:
        P, C = logits.shape
        codes, scale, zero = np.empty((P, C), _U8), np.empty(P, _F32), np.empty(P, _F32)
        for rows in _blocks(P):
            # Classes first: numpy then works along many samples, not few classes, three times as fast.
            block = np.array(logits[rows].T, order="C")  # a copy: what follows works in place
            low = block.min(axis=0)
            step = (block.max(axis=0) - low) / np.float32(255)
            step[step < _SMALLEST_SCALE] = 0
            inverse = np.divide(1, step, out=np.zeros_like(step), where=step > 0)
            block -= low
            block *= inverse
            np.rint(block, out=block)
            codes[rows] = block.astype(_U8).T
            scale[rows], zero[rows] = step, low
        return {"codes": codes, "scale": scale, "zero": zero}

    def _decode(self, arrays: Mapping[str, Array], shape: tuple[int, int]) -> Logits:
        scale, zero = _finite("scale", arrays["scale"]), _finite("zero", arrays["zero"])
        if np.min(scale) < 0:
            raise _refusal("scale", "at least 0", np.min(scale))
        _finite("scale", np.float32(255) * scale + zero, "such that zero + 255·scale is finite")
        logits = np.multiply(arrays["codes"], scale[:, None], dtype=np.float32, order="C")
        logits += zero[:, None]
        return logits


@dataclass(frozen=True)
class TopK(Codec):
    """The K greatest logits of a sample; the other C − K classes share their probability equally.

    ``classes`` holds the kept indices in rising order (ties: the lower class), ``values`` their logits as
    fp16, and ``rest`` as fp16 the level ρ = log[ (1/(C−K)) Σ_rest exp z_c ] that every other class is
    given: 3 bytes a kept class (4 when C > 256) and 2 bytes a sample. [ours]

    With |z| ≤ 65504 and δ = 2⁻¹¹·max|z| + 2⁻¹⁶, the probability (at temperature 1) of each kept class, and of
    the rest together, is right within a factor exp(±2δ); the most probable class stays a most probable one.
    At a temperature T > 1 the rest weighs at least what it did in the original (Jensen), and more the more
    uneven it was.
    """

    k: int

    @property
    def name(self) -> str:
        """``topk:K``."""
        return f"topk:{self.k}"

    def layout(self, shape: tuple[int, int]) -> Layout:
        """See :meth:`Codec.layout`."""
        P, C = _checked(shape)
        if self.k >= C:
            raise SettingError("codec", self.name, f"topk:K with K below the number of classes, {C}")
        if C > 2**16:
            raise SettingError("codec", self.name, f"another one for {C} classes (topk carries up to 65536)")
        kept = (P, self.k)
        return {"values": (_F16, kept), "classes": (_index_dtype(C), kept), "rest": (_F16, (P,))}

    def _encode(self, logits: Logits) -> dict[str, Array]:
        P, C = logits.shape
        others = C - self.k
        sent = {name: np.empty(size, dtype) for name, (dtype, size) in self.layout((P, C)).items()}
        average = np.zeros(C, np.float32)
        average[:others] = 1 / others
        for rows in _blocks(P):
            block = np.ascontiguousarray(logits[rows])
            split = np.partition(block, others - 1, axis=1)  # the rest, its greatest, then the K kept
            highest = split[:, others - 1].copy()
            split[:, others:] = highest[:, None]  # of no weight below; numpy is faster over whole rows
            # Far below the greatest, exp is 0, as it should be; z − highest may itself overflow to −inf.
            with np.errstate(over="ignore", under="ignore"):
                split -= highest[:, None]
                share = np.exp(split, out=split) @ average
            sent["rest"][rows] = _half(highest + np.log(np.minimum(share, 1)))
            found = np.flatnonzero(_greatest(block, self.k, highest)).reshape(-1, self.k)
            sent["values"][rows] = _half(block.ravel()[found])
            sent["classes"][rows] = found - np.arange(0, block.size, C)[:, None]
        return sent

    def _decode(self, arrays: Mapping[str, Array], shape: tuple[int, int]) -> Logits:
        P, C = shape
        classes = arrays["classes"].astype(np.intp)
        if np.max(classes) >= C:
            raise _refusal("classes", f"indices below {C}", np.max(classes))
        if (classes[:, 1:] <= classes[:, :-1]).any():
            raise _refusal("classes", "rising along each row", "a row where it does not")
        values = _finite("values", arrays["values"].astype(np.float32))
        rest = _finite("rest", arrays["rest"].astype(np.float32))
        logits = np.empty((P, C), np.float32)
        logits[:] = rest[:, None]
        logits.ravel()[(classes + np.arange(0, P * C, C)[:, None]).ravel()] = values.ravel()
        return logits


@dataclass(frozen=True)
class Zstd(Codec):
    """Another codec's arrays in one zstd ``frame``, without further error: its bytes depend on the logits."""

    inner: Codec
    zstandard: Any

    @property
    def name(self) -> str:
        """The inner codec's name and ``+zstd``."""
        return f"{self.inner.name}+zstd"

    def layout(self, shape: tuple[int, int]) -> Layout:
        """One array; the length −1 stands for one that only the content decides."""
        self.inner.layout(shape)
        return {"frame": (_U8, (-1,))}

    def _encode(self, logits: Logits) -> dict[str, Array]:
        raw = b"".join(_planes(array) for array in self.inner.encode(logits).values())
        return {"frame": np.frombuffer(self.zstandard.ZstdCompressor(level=_ZSTD_LEVEL).compress(raw), _U8)}

    def _decode(self, arrays: Mapping[str, Array], shape: tuple[int, int]) -> Logits:
        layout = self.inner.layout(shape)
        size = sum(dtype.itemsize * int(np.prod(dims)) for dtype, dims in layout.values())
        raw = self._decompress(arrays["frame"], size)
        unpacked, start = {}, 0
        for name, (dtype, dims) in layout.items():
            stop = start + dtype.itemsize * int(np.prod(dims))
            planes = np.frombuffer(raw[start:stop], _U8).reshape(dtype.itemsize, -1)
            unpacked[name] = np.ascontiguousarray(planes.T).view(dtype).reshape(dims)
            start = stop
        return self.inner.decode(unpacked, shape=shape)

    def _decompress(self, frame: Array, size: int) -> memoryview:
        # Everything that costs memory is read from the header and compared before a byte is decompressed.
        if frame.size > size + size // 128 + 1024:
            raise _refusal("frame", f"smaller than the {size} bytes it compresses", f"{frame.size} bytes")
        data = frame.tobytes()
        wanted = f"a zstd frame of {size} bytes"
        try:
            header = self.zstandard.get_frame_parameters(data)
            if header.content_size != size:
                found = f"one of {header.content_size}"
            elif header.window_size > max(size, _ZSTD_WINDOW):
                found = f"one that asks for a window of {header.window_size} bytes"
            else:
                decompressor = self.zstandard.ZstdDecompressor()
                raw = decompressor.decompress(data, max_output_size=size, allow_extra_data=False)
                if len(raw) == size:
                    return memoryview(raw)
                found = f"one of {len(raw)}"
        except self.zstandard.ZstdError as error:
            raise _refusal("frame", wanted, f"another ({error})") from error
        raise _refusal("frame", wanted, found)


def _refusal(name: str, expected: str, got: object) -> BadKnowledge:
    """The error of every array, kept short however long what a sender wrote."""
    text = str(got)
    text = text if len(text) <= 200 else f"{text[:200]}…"
    return BadKnowledge(f"Expected array `{name}` to be {expected}, but got {text}.")


def _zstandard(spec: str) -> Any:
    """The package ``zstandard``, an extra, or the error that says how to get it."""
    try:
        import zstandard
    except ImportError as error:
        allowed = 'one without "+zstd" where the package zstandard is missing (pip install "fedkd[zstd]")'
        raise SettingError("codec", spec, allowed) from error
    return zstandard


def _checked(shape: tuple[int, int]) -> tuple[int, int]:
    """The shape, of at least one sample and one class."""
    if len(shape) != 2 or min(shape) < 1:
        raise ValueError(f"Expected argument `shape` to be (samples, classes), both >= 1, but got {shape}.")
    return shape


def _shape_of(logits: Logits) -> tuple[int, int]:
    return logits.shape[0], logits.shape[1]


def _index_dtype(classes: int) -> np.dtype[Any]:
    return _U8 if classes <= 256 else _U16


def _blocks(rows: int) -> Iterator[slice]:
    """Slices of a thousand samples: few enough to stay in the cache, enough to hide numpy's cost per call."""
    return (slice(start, start + _BLOCK_ROWS) for start in range(0, rows, _BLOCK_ROWS))


def _half(values: Logits) -> Array:
    """Round to fp16, to the nearest and ties to even; clip what fp16 cannot hold."""
    if max(-np.min(values), np.max(values)) > FP16_MAX:
        values = np.clip(values, -FP16_MAX, FP16_MAX)
    # numpy converts one number at a time. torch, which peers have loaded anyway, gives the same bits at memory speed.
    if torch := sys.modules.get("torch"):
        return np.asarray(torch.from_numpy(np.ascontiguousarray(values)).half().numpy())
    return values.astype(_F16)


def _single(values: Array) -> Logits:
    """Widen fp16 to float32, exactly, into memory of its own."""
    if torch := sys.modules.get("torch"):
        # A copy first: torch does not take arrays that may not be written to, as those of a message may not.
        return np.asarray(torch.from_numpy(values.copy()).float().numpy())
    return values.astype(np.float32, order="C")


def _greatest(block: Logits, k: int, highest: Logits) -> NDArray[np.bool_]:
    """Mask ``[n, C]`` of the ``k`` greatest in each row, given the ``highest`` ``[n]`` of the others."""
    kept = block > highest[:, None]
    if np.count_nonzero(kept) < k * len(block):
        # A kept logit equals one of the rest: the lower class is kept.
        tied = np.flatnonzero(np.count_nonzero(kept, axis=1) < k)
        order = np.argsort(-block[tied], axis=1, kind="stable")[:, :k]
        kept[tied[:, None], order] = True
    return kept


def _planes(array: Array) -> bytes:
    """All first bytes, then all second bytes, …: exponents lie together, which is what zstd can compress."""
    return np.ascontiguousarray(array.view(_U8).reshape(-1, array.itemsize).T).tobytes()


def _check_logits(logits: Logits) -> None:
    """Refuse what no codec can carry, on the sender's side."""
    if not isinstance(logits, np.ndarray) or logits.dtype != _F32 or logits.ndim != 2 or logits.size == 0:
        raise _refusal("logits", "float32 [P, C], not empty", _kind(logits))
    _check_size(logits, GREATEST)


def _check_size(logits: Logits, most: float) -> None:
    # The extremes propagate NaN, and cost a tenth of looking at each entry.
    if not (np.min(logits) >= -most and np.max(logits) <= most):
        sample, label = np.argwhere(~(np.abs(logits) <= most))[0]
        found = f"{logits[sample, label]} for sample {sample}, class {label}"
        raise _refusal("logits", f"finite and within ±{most:g}", found)


def _check_arrays(arrays: Mapping[str, Array], layout: Layout) -> None:
    """Refuse names, dtypes and shapes other than those of ``layout`` (a dimension of −1 is free)."""
    if set(arrays) != set(layout):
        raise _refusal("` and `".join(layout), "all that is sent", sorted(map(str, arrays)))
    for name, (dtype, shape) in layout.items():
        array = arrays[name]
        if (
            not isinstance(array, np.ndarray)
            or array.dtype != dtype
            or array.ndim != len(shape)
            or any(want not in (-1, got) for want, got in zip(shape, array.shape, strict=True))
        ):
            raise _refusal(name, f"{dtype} {list(shape)}", _kind(array))


def _finite(name: str, array: Array, expected: str = "finite") -> Array:
    if not np.isfinite(array).all():
        wrong = array[~np.isfinite(array)]
        raise _refusal(name, expected, f"{wrong[0]} ({wrong.size} such entries)")
    return array


def _kind(value: object) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, np.ndarray) else type(value).__name__
