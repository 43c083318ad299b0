"""Pairwise distillation: one divergence per teacher, from every neighbour or from one partner a round."""

from collections.abc import Sequence

from fedkd.errors import SettingError
from fedkd.settings.config import RunConfig
from strategies.matching import round_robin
from strategies.strategy import Strategy


class Pairwise(Strategy):
    """Every peer hears every neighbour, or the partner that a round-robin tournament gives it.

    In a tournament everyone meets everyone once in N − 1 rounds (N rounds for an odd N, with a bye each).

    Source: the "pairwise" combination of Molo et al., SISAP 2024 [paper]; the tournament is [ours].

    Raises:
        SettingError: a tournament on a topology that does not let everyone meet.
    """

    def __init__(self, config: RunConfig, peers: int, classes: int) -> None:
        super().__init__(config, peers, classes)
        if config.matching == "round-robin" and config.topology != "complete":
            raise SettingError("topology", config.topology, "complete under matching round-robin")

    def teachers(self, peer: int, round: int) -> Sequence[int]:
        """Return the neighbours, or the one partner of this round."""
        if self.config.matching == "all" or self.peers < 2:
            return self.neighbours(peer, round)
        return [a if b == peer else b for a, b in round_robin(self.peers, round) if peer in (a, b)]
