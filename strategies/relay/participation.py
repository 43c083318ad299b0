"""Who takes part in a round, where not everyone does."""

import math
from collections.abc import Collection

import numpy as np

from fedkd.seeding import derive


def participants(peers: int, share: float, *, seed: int, round: int, busy: Collection[int] = ()) -> set[int]:
    """Draw ⌈share · peers⌉ peers from (seed, round), of those that are not busy; in round 0, the start, everyone.

    >>> participants(4, 1.0, seed=0, round=3), len(participants(25, 0.28, seed=0, round=1))
    ({0, 1, 2, 3}, 7)
    """
    if share >= 1 or round == 0:
        return set(range(peers)).difference(busy)
    order = np.random.default_rng(derive(seed, "participation", round)).permutation(peers).tolist()
    count = math.ceil(share * peers - 1e-9)  # 0.28 · 25 is 7 and a rounding error
    return set([peer for peer in order if peer not in busy][:count])
