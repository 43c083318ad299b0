"""How many mails are under way at once, where one machine plays all the peers."""

import math

_FIRST, _LEAST = 8, 2
_SHORT, _LONG = 0.3, 1.0  # seconds; Flower and Ray alone take up to the shorter one


class Window:
    """Bounds the mails under way in a simulation; real peers, who work side by side, are all sent theirs at once.

    Flower's simulation looks for every node through all messages under way, ten times a second: a thousand nodes with
    a message each would cost more than a core. And a message that waits for an actor is memory. So the number under way
    follows the time for which mails wait: where it is short actors may be idle, and the number doubles; where it is
    long, it halves.

    Args:
        size: to begin with; ``math.inf``: no bound, ever.
    """

    def __init__(self, size: float = _FIRST) -> None:
        self.size = size

    @classmethod
    def unbounded(cls) -> "Window":
        """Return one that bounds nothing."""
        return cls(math.inf)

    def nothing_heard(self) -> None:
        """Learn that nobody has answered for a while: those whose mail is under way may hang, and others wait."""
        self.size += 1

    def heard(self, waited: float) -> None:
        """Learn how many seconds a mail waited between its push and the peer's work."""
        if waited < _SHORT:
            self.size *= 2
        elif waited > _LONG:
            self.size = max(_LEAST, self.size // 2) if math.isfinite(self.size) else self.size
