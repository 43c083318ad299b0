"""Your own strategy: who hears whom.

    export PYTHONPATH=experiments/examples
    fedkd run --peers 9 strategy=own_strategy:Tables combine=pairwise

A strategy is a class with one method. It runs at the relay and sees numbers of peers, no models and no data. How a peer
combines what it hears is the peer's own doing, as `combine` says. The relay imports the class and the peers never do: a
deployed one takes part only if its owner writes `allowed-strategies = "own_strategy:Tables"`. Draw from (seed, round)
alone, so that the same seed gives the same run.
"""

from collections.abc import Sequence

import numpy as np

from fedkd.seeding import derive
from strategies.strategy import Strategy


class Tables(Strategy):
    """Every round the peers sit down anew at tables of three, and hear their table."""

    def teachers(self, peer: int, round: int) -> Sequence[int]:
        """Return the others at this peer's table."""
        order = np.random.default_rng(derive(self.config.seed, "tables", round)).permutation(self.peers)
        seat = int(np.flatnonzero(order == peer)[0])
        last = max(self.peers // 3 - 1, 0)  # who would sit at a table of one or two takes a chair there
        tables = [min(place // 3, last) for place in range(self.peers)]
        return sorted(int(p) for p, table in zip(order, tables, strict=True) if table == tables[seat] and p != peer)
