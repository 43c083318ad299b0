"""The newest knowledge of every peer."""

from collections.abc import Iterator

from fedkd.protocol import Letter

SERVER = -1
"""The index under which a baseline with a server keeps what is the server's."""


class Mailbox:
    """Holds one letter per peer, by the peer's index; older knowledge never replaces newer."""

    def __init__(self) -> None:
        self._letters: dict[int, Letter] = {}

    def put(self, peer: int, letter: Letter) -> None:
        """Keep a letter, unless a newer one of the same peer is there."""
        held = self._letters.get(peer)
        if held is None or letter.round >= held.round:
            self._letters[peer] = letter

    def get(self, peer: int) -> Letter | None:
        """Return a peer's newest letter, or None."""
        return self._letters.get(peer)

    def __iter__(self) -> Iterator[tuple[int, Letter]]:
        return iter(sorted(self._letters.items()))

    def __len__(self) -> int:
        return len(self._letters)
