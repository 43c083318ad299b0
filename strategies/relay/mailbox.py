"""The newest knowledge of every peer."""

from collections.abc import Iterator

from fedkd.wire.messages import Letter

SERVER = -1
"""The index under which a baseline with a server keeps what is the server's."""


class Mailbox:
    """Holds one letter per peer, by the peer's index; older knowledge never replaces newer.

    Attributes:
        updates: how many answers all peers together have given, where there are no rounds.
    """

    def __init__(self) -> None:
        self.updates = 0
        self._letters: dict[int, Letter] = {}
        self._arrived: dict[int, int] = {}

    def put(self, peer: int, letter: Letter) -> None:
        """Keep a letter, unless a newer one of the same peer is there."""
        held = self._letters.get(peer)
        if held is None or letter.round >= held.round:
            self._letters[peer] = letter
            self._arrived[peer] = self.updates

    def get(self, peer: int) -> Letter | None:
        """Return a peer's newest letter, or None."""
        return self._letters.get(peer)

    def updates_since(self, peer: int) -> int:
        """Return how many answers have come, from anyone, since a peer's letter did."""
        return self.updates - self._arrived[peer]

    def __iter__(self) -> Iterator[tuple[int, Letter]]:
        return iter(sorted(self._letters.items()))

    def __len__(self) -> int:
        return len(self._letters)
