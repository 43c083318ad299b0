"""What a strategy decides: who hears whom in a round."""

from abc import ABC, abstractmethod
from collections.abc import Sequence


class Strategy(ABC):
    """Who hears whom. How a peer combines what it hears follows from the settings, on the peer's side.

    Args:
        peers: how many there are; they are numbered 0 .. peers − 1.
    """

    def __init__(self, peers: int) -> None:
        self.peers = peers

    @abstractmethod
    def teachers(self, peer: int, round: int) -> Sequence[int]:
        """Return the peers that one peer hears in a round (counted from 1), ascending, itself not among them."""
