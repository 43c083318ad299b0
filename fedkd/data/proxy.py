"""The public proxy set: inputs that all peers share, and on which they compare what they know.

No peer learns from its labels. Where they are known they are kept for one thing: the control that says what peers
would be whose teachers were right about every sample (``controls=channel``).
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedkd.data.shape import match_images
from fedkd.data.sources import Dataset, Public
from fedkd.errors import SettingError
from fedkd.seeding import derive


@dataclass(frozen=True)
class Proxy:
    """Proxy inputs [P, ...] in the order that knowledge refers to, and their fingerprint.

    Attributes:
        inputs: ``[P, ...]``.
        fingerprint: hash of the inputs alone.
        labels: ``[P]`` int64, for the channel control alone; None where they are not known.
    """

    inputs: Tensor
    fingerprint: str
    labels: Tensor | None = None


def split_proxy(train: Dataset, size: int, *, seed: int) -> tuple[Proxy, npt.NDArray[np.int64]]:
    """Take the proxy set out of a training set, uniformly at random; return it and the sorted indices that remain.

    Raises:
        SettingError: on `proxy-size`, unless 1 ≤ size < number of training samples.
    """
    chosen = _draw(len(train), size, largest=len(train) - 1, seed=seed)
    remaining = np.setdiff1d(np.arange(len(train)), chosen, assume_unique=True)
    index = torch.from_numpy(chosen)
    return _proxy(train.inputs[index], train.labels[index]), remaining


def foreign_proxy(public: Public, size: int, *, like: Tensor, seed: int, classes: Sequence[str] | None = None) -> Proxy:
    """Draw the proxy set from other data and give it the form of the peers' inputs.

    Images are resized (bilinear, antialiased) and turned from RGB to grey (ITU-R 601 luma) or from grey to RGB
    in integer arithmetic, so that every site computes the same bytes and hence the same fingerprint.

    Args:
        public: the other data, with or without labels.
        size: number of proxy inputs P; 0: all there are, in the order in which as many would be drawn.
        like: one input of the peers, [C, H, W] for images.
        seed: of the run.
        classes: the peers', if their names mean something. The labels are known where the source's are called the same,
            in the same order; and not where all that are drawn are one class, as of data that came without labels.

    Raises:
        SettingError: on `proxy-size` unless 0 ≤ size ≤ number of samples; on `proxy` if the forms cannot be matched.
    """
    count = len(public.inputs)
    index = torch.from_numpy(_draw(count, size or count, largest=count, seed=seed))
    inputs, labels = public.inputs[index], None if public.labels is None else public.labels[index]
    named_alike = classes is not None and list(public.classes) == list(classes)
    known = labels if labels is not None and named_alike and bool((labels != labels[0]).any()) else None
    if inputs.dtype == like.dtype and inputs.shape[1:] == like.shape:
        return _proxy(inputs, known)
    if not (inputs.dtype == like.dtype == torch.uint8 and inputs.ndim == 4 and like.ndim == 3):
        raise SettingError(
            "proxy",
            public.name,
            f"a source of images, or of inputs like the peers' own, {like.dtype} {list(like.shape)}; "
            f"its inputs are {inputs.dtype} {list(inputs.shape[1:])}",
        )
    if not {inputs.shape[1], like.shape[0]} <= {1, 3}:
        raise SettingError(
            "proxy",
            public.name,
            f"a source of images with the peers' {like.shape[0]} channels, or grey and RGB on both sides; "
            f"its images have {inputs.shape[1]}",
        )
    return _proxy(match_images(inputs, tuple(like.shape)), known)


def fingerprint(inputs: Tensor) -> str:
    """Return 32 hexadecimal digits over type, shape, content and order of a tensor (BLAKE2b, 16 bytes).

    >>> a = torch.tensor([[1, 2], [3, 4]])
    >>> fingerprint(a) == fingerprint(a.clone()), fingerprint(a) == fingerprint(a.flip(0))
    (True, False)
    """
    array = inputs.detach().cpu().contiguous().numpy()
    digest = hashlib.blake2b(f"{array.dtype.str} {array.shape} ".encode(), digest_size=16)
    digest.update(array.data)
    return digest.hexdigest()


def _proxy(inputs: Tensor, labels: Tensor | None) -> Proxy:
    return Proxy(inputs, fingerprint(inputs), labels)


def _draw(samples: int, size: int, *, largest: int, seed: int) -> npt.NDArray[np.int64]:
    if not 1 <= size <= largest:
        raise SettingError("proxy-size", size, f"from 1 to {largest}, as there are {samples} samples")
    return np.random.default_rng(derive(seed, "proxy")).permutation(samples)[:size]
