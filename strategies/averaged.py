"""Averaged distillation: a peer hears all its neighbours and forms one teacher from what it hears."""

from collections.abc import Sequence

from strategies.strategy import Strategy


class Averaged(Strategy):
    """Every peer hears every neighbour; each computes the mean of its teachers by itself.

    Source: the "holistic" combination of Molo et al., SISAP 2024 [paper]; distilling on a public proxy set
    instead of private batches is [ours].
    """

    def teachers(self, peer: int, round: int) -> Sequence[int]:
        """Return the neighbours."""
        return self.neighbours(peer, round)
