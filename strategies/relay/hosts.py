"""Which Flower node a peer's mail goes to: its own, or one of the few that the peers of a simulation share.

Flower's simulation looks for every node through all messages under way, ten times a second, so that a thousand nodes
cost more than a thousand peers. A stand-in needs no node of its own: its state is on disk, and any actor can play it.
"""

import math
from typing import Protocol

from flwr.serverapp import Grid


class Hosts(Protocol):
    """Gives out Flower nodes. A peer is addressed by a number that stays its own for the whole run."""

    def peers(self) -> set[int]:
        """Return the addresses of the peers that can be written to now."""

    def take(self, peer: int) -> int | None:
        """Return a node that is to work for a peer alone until it is given back; None if all are taken."""

    def give(self, node: int) -> None:
        """Take a node back."""

    def free(self) -> float:
        """Return how many peers could be given a node now."""

    def seat(self, peer: int) -> int | None:
        """Return a peer's number, if its node cannot know it; else None."""


class OwnNodes:
    """A node for each peer, whose address it is."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid

    def peers(self) -> set[int]:
        """Return the nodes that are connected."""
        return set(self._grid.get_node_ids())

    def take(self, peer: int) -> int | None:
        """Return the peer's own node."""
        return peer

    def give(self, node: int) -> None:
        """Do nothing: nobody else waits for it."""

    def free(self) -> float:
        """Return infinity: no peer waits for another's node."""
        return math.inf

    def seat(self, peer: int) -> int | None:
        """Return None: the node knows its number."""
        return None


class SharedNodes:
    """Whichever node is free works for a peer, whose address is its number among all of them."""

    def __init__(self, grid: Grid, count: int) -> None:
        self._grid, self._count = grid, count
        self._taken: set[int] = set()

    def peers(self) -> set[int]:
        """Return the numbers of all peers."""
        return set(range(self._count))

    def take(self, peer: int) -> int | None:
        """Return a free node, if there is one."""
        node = next((node for node in self._grid.get_node_ids() if node not in self._taken), None)
        if node is not None:
            self._taken.add(node)
        return node

    def give(self, node: int) -> None:
        """Take a node back."""
        self._taken.discard(node)

    def free(self) -> float:
        """Return how many nodes are not taken."""
        return len(set(self._grid.get_node_ids()) - self._taken)

    def seat(self, peer: int) -> int | None:
        """Return the peer's number."""
        return peer
