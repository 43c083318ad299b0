"""The relay's side of sealed mail: it sees sizes, and hands each receiver the one wrap that is for it.

A sealed letter is one encrypted payload for all and, for every receiver, the payload's key sealed for that
receiver alone (see ``fedkd.wire.sealing``).
"""

import math

from fedkd.wire.codecs import BadKnowledge, Codec, Layout, Zstd
from fedkd.wire.messages import Arrays, Packed

_ENVELOPE = 1024  # bytes: nonce, tag, and the lengths that named arrays begin with
_PER_ARRAY = 256  # bytes: its name, dtype, shape and place among them


def check_sealed(arrays: Arrays, *, receivers: int, most: int) -> None:
    """Refuse what cannot be a sealed letter for all receivers.

    Args:
        arrays: from anyone.
        receivers: how many there are.
        most: bytes of the largest payload that its knowledge can need.

    Raises:
        BadKnowledge: another set of arrays, another dtype or shape, or a larger payload.
    """
    from fedkd.wire.sealing import WRAP_BYTES  # only sealed mail pays for the import of the ciphers

    found = {name: (str(array.dtype), array.shape) for name, array in arrays.items()}
    size = arrays["sealed"].size if "sealed" in arrays else 0
    if found != {"sealed": ("uint8", (size,)), "wraps": ("uint8", (receivers, WRAP_BYTES))} or size > most:
        raise BadKnowledge(
            f"expected a sealed payload of at most {most} bytes and {receivers} wraps of its key, "
            f"but got {str(found)[:200]}"
        )


def most_sealed(
    codec: Codec, shape: tuple[int, int], *, layers: int, dimensions: int, claims: Layout | None = None
) -> int:
    """Return the bytes of the largest payload in which knowledge is sealed.

    Args:
        codec: of the logits.
        shape: theirs, ``[P, C]``.
        layers: whose features, float16 ``[P, dimensions]``, travel beside.
        dimensions: of these features, at most.
        claims: that travel beside, at most; None: none does.
    """
    layout = codec.inner.layout(shape) if isinstance(codec, Zstd) else codec.layout(shape)
    size, claims = _bytes(layout), claims or {}
    if isinstance(codec, Zstd):
        size += size // 128  # what zstd can add to bytes that do not compress
    size += layers * shape[0] * dimensions * 2
    return size + _bytes(claims) + _ENVELOPE + (len(layout) + layers + len(claims)) * _PER_ARRAY


def _bytes(layout: Layout) -> int:
    return sum(dtype.itemsize * math.prod(dims) for dtype, dims in layout.values())


def address(arrays: Arrays, receiver: int) -> Arrays:
    """Return a sealed letter for one receiver; the payload stays the one that all receivers share."""
    wrap = Packed.of({"wrap": arrays["wraps"][receiver]})
    return Packed({"sealed": Packed.of(arrays).wire["sealed"], **wrap.wire})
