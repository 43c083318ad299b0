"""What a letter says of itself beside logits: how many samples of each class, how sure of which, which it left out.

Samples that a sender leaves out do not travel: the logits' codec then encodes the rows that are sent, in their order,
and a bit for each sample says which those are. Every claim is a peer's own word: that it has the form is checked here,
that it is true nobody can tell.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedkd.wire.codecs import BadKnowledge, Codec, Layout, Logits

Arrays = Mapping[str, NDArray[Any]]

COUNTS, DENSITY, MASK = "counts", "density", "mask"
CLAIMS = (COUNTS, DENSITY, MASK)
"""What can be told, in the words of a peer's own setting ``tell``."""

_PREFIX = "about."
_COUNTS, _CERTAINTY, _SENT = f"{_PREFIX}counts", f"{_PREFIX}certainty", f"{_PREFIX}sent"
_F32, _F16, _U8 = np.dtype("<f4"), np.dtype("<f2"), np.dtype("u1")
_LEAST_CERTAINTY = 2.0**-14  # fp16's smallest normal number: 0 is kept for what is not sent
_MOST_COUNTED = 1e12  # of a class; more would be a number that float32 sums cannot weigh


@dataclass(frozen=True)
class Claims:
    """What a peer says of itself beside its logits; None: it says nothing of that.

    Attributes:
        counts: samples of each class that it trained on, ``[C]`` float32, >= 0; noised, they are no whole numbers.
        certainty: how much it trusts itself on each sample of the proxy subset, ``[P]`` float32 in [0, 1]; 0 on samples
            that it left out.
        sent: whether it sent each sample, ``[P]`` bool.
    """

    counts: NDArray[np.float32] | None = None
    certainty: NDArray[np.float32] | None = None
    sent: NDArray[np.bool_] | None = None

    def rows(self, samples: int) -> int:
        """Return how many of so many samples were sent."""
        return samples if self.sent is None else int(np.count_nonzero(self.sent))

    def on(self, samples: NDArray[np.int64]) -> "Claims":
        """Return what is said of some of the samples, given by their indices ``[P']``."""
        return replace(
            self,
            certainty=None if self.certainty is None else self.certainty[samples],
            sent=None if self.sent is None else self.sent[samples],
        )


def claims_layout(shape: tuple[int, int], told: Collection[str]) -> Layout:
    """Return name -> (dtype, shape) of the arrays that carry claims, at most.

    Args:
        shape: of the logits, ``[P, C]``.
        told: which, of :data:`CLAIMS`.

    >>> claims_layout((60, 10), ("counts", "mask"))
    {'about.counts': (dtype('float32'), (10,)), 'about.sent': (dtype('uint8'), (8,))}
    """
    samples, classes = shape
    found: Layout = {}
    if COUNTS in told:
        found[_COUNTS] = (_F32, (classes,))
    if DENSITY in told:
        found[_CERTAINTY] = (_F16, (samples,))
    if MASK in told:
        found[_SENT] = (_U8, (-(-samples // 8),))
    return found


def encode_claims(claims: Claims) -> dict[str, NDArray[Any]]:
    """Name and encode claims: ``about.counts`` float32, ``about.certainty`` float16, ``about.sent`` a bit a sample.

    Counts are clamped at 0, for noise may carry them below. The certainty is that of the samples sent, no others', and
    at least 2⁻¹⁴, so that 0 means "not sent".

    Raises:
        BadKnowledge: a value that is not finite, counts beyond 10¹², or a certainty outside [0, 1].

    >>> {k: v.tolist() for k, v in encode_claims(Claims(sent=np.array([True, False, True]))).items()}
    {'about.sent': [160]}
    """
    arrays: dict[str, NDArray[Any]] = {}
    if claims.counts is not None:
        arrays[_COUNTS] = np.maximum(_within(_COUNTS, claims.counts.astype(_F32), -_MOST_COUNTED, _MOST_COUNTED), 0)
    if claims.certainty is not None:
        sent = claims.certainty if claims.sent is None else claims.certainty[claims.sent]
        arrays[_CERTAINTY] = np.maximum(_within(_CERTAINTY, sent, 0, 1), _LEAST_CERTAINTY).astype(_F16)
    if claims.sent is not None:
        arrays[_SENT] = np.packbits(claims.sent)
    return arrays


def decode_claims(arrays: Arrays, *, shape: tuple[int, int], told: Collection[str]) -> Claims:
    """Read the claims of a letter, from anyone.

    Args:
        arrays: all of the letter's.
        shape: of the logits of all samples, ``[P, C]``.
        told: which claims the run's peers make, of :data:`CLAIMS`.

    Raises:
        BadKnowledge: a claim is missing, or there is one too many; another dtype or shape; a number that no claim can
            be; bits behind the last sample.
    """
    samples = shape[0]
    layout = claims_layout(shape, told)
    if (found := sorted(name for name in arrays if name.startswith(_PREFIX))) != sorted(layout):
        raise BadKnowledge(f"expected claims {sorted(layout) or 'of no kind'}, but got {str(found)[:200]}")
    counts = certainty = sent = None
    if _SENT in layout:
        bits = _checked(arrays, _SENT, *layout[_SENT])
        unpacked = np.unpackbits(bits).astype(bool)
        sent = unpacked[:samples]
        if unpacked[samples:].any():
            raise BadKnowledge(f"expected `{_SENT}` to have {samples} bits, but got more that are set")
    if _COUNTS in layout:
        counts = _within(_COUNTS, _checked(arrays, _COUNTS, *layout[_COUNTS]).astype(np.float32), 0, _MOST_COUNTED)
    if _CERTAINTY in layout:
        rows = samples if sent is None else int(np.count_nonzero(sent))
        said = _within(_CERTAINTY, _checked(arrays, _CERTAINTY, _F16, (rows,)).astype(np.float32), 0, 1)
        certainty = said if sent is None else _spread(said, sent)
    return Claims(counts, certainty, sent)


def without_claims(arrays: Arrays) -> dict[str, NDArray[Any]]:
    """Return the rest of a letter."""
    return {name: array for name, array in arrays.items() if not name.startswith(_PREFIX)}


def encode_rows(codec: Codec, logits: Logits, claims: Claims) -> dict[str, NDArray[Any]]:
    """Encode the logits ``[P, C]`` of the samples that are sent; nothing where none is.

    Raises:
        BadKnowledge: as :meth:`fedkd.wire.codecs.Codec.encode`.
    """
    sent = logits if claims.sent is None else logits[claims.sent]
    return codec.encode(sent) if len(sent) else {}


def decode_rows(codec: Codec, arrays: Arrays, claims: Claims, *, shape: tuple[int, int]) -> Logits:
    """Read the logits of a letter, from anyone; rows of samples that were not sent are 0.

    Args:
        codec: the run's.
        arrays: the logits' alone.
        claims: of the same letter.
        shape: of the logits of all samples, ``[P, C]``.

    Raises:
        BadKnowledge: as :meth:`fedkd.wire.codecs.Codec.decode`, for as many rows as the claims say; logits where no
            sample was sent.
    """
    rows = claims.rows(shape[0])
    if not rows:
        if arrays:
            raise BadKnowledge(f"expected no logits where no sample is sent, but got {str(sorted(arrays))[:200]}")
        return np.zeros(shape, np.float32)
    found = codec.decode(arrays, shape=(rows, shape[1]))
    return found if claims.sent is None else _spread(found, claims.sent)


def _spread(rows: NDArray[np.float32], sent: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Put rows ``[n, ...]`` at the places of the samples that were sent, and 0 elsewhere."""
    whole = np.zeros((len(sent), *rows.shape[1:]), np.float32)
    whole[sent] = rows
    return whole


def _checked(arrays: Arrays, name: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    array = arrays[name]
    if not isinstance(array, np.ndarray) or array.dtype != dtype or array.shape != shape:
        got = f"{array.dtype} {list(array.shape)}" if isinstance(array, np.ndarray) else type(array).__name__
        raise BadKnowledge(f"expected `{name}` to be {dtype} {list(shape)}, but got {got}")
    return array


def _within(name: str, array: NDArray[Any], low: float, high: float) -> NDArray[Any]:
    inside = (array >= low) & (array <= high)
    if not inside.all():
        wrong = array[~inside]
        raise BadKnowledge(f"expected `{name}` within [{low:g}, {high:g}], but got {wrong[0]} ({wrong.size} such)")
    return array
