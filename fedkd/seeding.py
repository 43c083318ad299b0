"""Random streams derived from what they are for, never from the order in which things happen to run."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager


def derive(seed: int, purpose: str, *keys: int | str) -> int:
    """Return a 63-bit seed for one purpose, e.g. ``derive(seed, "local", peer, round)``.

    The same arguments give the same stream on every machine, in every process and in any order of calls.

    >>> derive(0, "local", 3, 1) == derive(0, "local", 3, 1) != derive(0, "local", 1, 3)
    True
    """
    text = "\x1f".join([str(seed), purpose, *map(str, keys)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run a block with torch's global generators (CPU and current CUDA device) seeded; restore them afterwards."""
    import torch

    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
