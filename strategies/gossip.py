"""Gossip: every peer draws a few neighbours a round."""

from collections.abc import Sequence
from functools import lru_cache

from fedkd.settings.config import RunConfig
from strategies.matching import gossip_draw, hears
from strategies.strategy import Strategy


class Gossip(Strategy):
    """Each peer draws ``fanout`` neighbours from (seed, round, peer) alone.

    ``pull``: it hears them; ``push``: they hear it; ``push-pull``: both. With ``mode = "async"`` a peer's own count
    of updates takes the place of the round, and it pulls.

    Source: randomised gossip, Demers et al. 1987 and Boyd et al. 2006; on knowledge instead of weights [ours].
    """

    def __init__(self, config: RunConfig, peers: int, classes: int) -> None:
        super().__init__(config, peers, classes)
        self._heard = lru_cache(maxsize=4)(self._hear)

    def teachers(self, peer: int, round: int) -> Sequence[int]:
        """Return whom this peer hears in a round."""
        if self.config.mode == "async":
            return self._draw(peer, round)
        return self._heard(round)[peer]

    def _hear(self, round: int) -> dict[int, tuple[int, ...]]:
        draws = {peer: self._draw(peer, round) for peer in range(self.peers)}
        return hears(self.config.gossip_style, draws)

    def _draw(self, peer: int, round: int) -> tuple[int, ...]:
        neighbours = self.neighbours(peer, round)
        return gossip_draw(neighbours, self.config.fanout, seed=self.config.seed, round=round, peer=peer)
