"""Who takes part in a round, where not everyone does."""

import math

import numpy as np

from fedkd.seeding import derive


def participants(peers: int, share: float, *, seed: int, round: int) -> set[int]:
    """Draw ⌈share · peers⌉ peers from (seed, round); in round 0, the start, everyone takes part.

    >>> participants(4, 1.0, seed=0, round=3), len(participants(10, 0.25, seed=0, round=1))
    ({0, 1, 2, 3}, 3)
    """
    if share >= 1 or round == 0:
        return set(range(peers))
    generator = np.random.default_rng(derive(seed, "participation", round))
    return set(generator.choice(peers, size=math.ceil(share * peers), replace=False).tolist())
