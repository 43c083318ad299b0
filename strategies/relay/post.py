"""The post office's counter: pushes messages, pulls replies, keeps one outstanding message per peer.

Flower runs two messages of one node at once, on stale state, if it is given them, and maps some error
replies to the wrong node; both are settled here.
"""

import math
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from flwr.app import Message
from flwr.serverapp import Grid

from fedkd.wire.messages import PEER_MESSAGE, Answer, BadMessage, Mail, pack_mail, unpack_answer, wire_bytes
from strategies.relay.hosts import Hosts, OwnNodes, SharedNodes
from strategies.relay.window import Window

_LONGEST_RUN = 30 * 24 * 3600.0  # seconds
QUIET = 5.0
"""Seconds without an answer after which one more mail may be under way."""

_FIRST_POLL, _LAST_POLL = 0.02, 0.25  # seconds; the pause grows while nothing comes


@dataclass(frozen=True)
class Receipt:
    """What came back from one peer.

    Attributes:
        node: the peer's address: Flower's node id, or its number where peers share nodes.
        mail: what it was sent.
        answer: the answer, or None if there was none that could be read.
        bytes_up: bytes of the encoded arrays in the reply.
        bytes_down: bytes of the encoded arrays in the message it replies to.
        error: why there is no usable answer; empty if there is.
        seconds: from the moment the mail was handed in to the receipt of the reply; NaN if there was none.
    """

    node: int
    mail: Mail
    answer: Answer | None
    bytes_up: int
    bytes_down: int
    error: str = ""
    seconds: float = math.nan


@dataclass(frozen=True)
class _Sent:
    node: int
    host: int  # the Flower node that works on it
    mail: Mail
    bytes_down: int
    at: float


class Post:
    """Carries messages between the relay and the nodes.

    Args:
        grid: Flower's.
        time_to_live: seconds after which an unanswered message is dropped, by Flower, and by the peer, which ends what
            still works on it. In a simulation nothing ends that work, so messages live as long as the run: a peer
            that were given another one meanwhile would work on both at once. It is that of a round's mail.
        window: how many messages may be under way at once; None: as many as suit a simulation, in a simulation, and
            no bound where messages travel.

    Attributes:
        simulated: whether Flower holds all messages in this process, as in a simulation.
        bytes_up: bytes of all encoded arrays that came; ``bytes_down``: that were sent.
    """

    def __init__(self, grid: Grid, *, time_to_live: float, window: Window | None = None) -> None:
        self._grid = grid
        self._hosts: Hosts = OwnNodes(grid)
        self.simulated = hasattr(grid, "state")
        self._time_to_live = _LONGEST_RUN if self.simulated else time_to_live
        self._window = window or (Window() if self.simulated else Window.unbounded())
        self._outbox: dict[int, tuple[Mail, float]] = {}  # by node, with its time to live, until there is room for it
        self._handed_in: dict[int, float] = {}  # by node, when the last mail came to be sent
        self._pending: dict[str, _Sent] = {}  # by message id
        self._undelivered: list[Receipt] = []
        self.bytes_up = 0
        self.bytes_down = 0

    def share_nodes(self, peers: int) -> None:
        """Have a number of simulated peers take turns on the Flower nodes that there are."""
        self._hosts = SharedNodes(self._grid, peers)

    def nodes(self) -> list[int]:
        """Return the addresses of the peers that can be written to, in ascending order."""
        return sorted(self._hosts.peers())

    def busy(self) -> set[int]:
        """Return the peers that still owe a reply, or have mail that waits to be sent."""
        return {sent.node for sent in self._pending.values()} | self._outbox.keys()

    def room(self) -> float:
        """Return how many more mails would be sent at once."""
        return max(0.0, min(self._window.size - len(self._pending), self._hosts.free()) - len(self._outbox))

    def keep_to(self, nodes: Iterable[int]) -> None:
        """Expect nothing more of any peer but these: what others still owe is not read."""
        kept = set(nodes)
        self._pending = {id_: sent for id_, sent in self._pending.items() if sent.node in kept}

    def recall(self) -> None:
        """Forget the mail that waits to be sent."""
        self._outbox.clear()

    def owed(self, node: int, round: int) -> int:
        """Return the bytes of the mail of a round to which a node owes a reply; 0 if it owes none."""
        return sum(s.bytes_down for s in self._pending.values() if s.node == node and s.mail.round == round)

    def send(self, mails: Mapping[int, Mail], *, rounds: int = 1) -> None:
        """Push one mail to each peer, as far as there is room; the rest follows while replies are waited for.

        None of the peers may be busy. A message that Flower does not take (the node has gone, or it is too large) comes
        back as an error.

        Args:
            mails: by address.
            rounds: for the work of how many rounds a mail asks: it lives as much longer.
        """
        if owing := self.busy() & mails.keys():
            raise ValueError(f"peers {sorted(owing)} still owe a reply")
        self._outbox.update(
            {node: (mail, min(_LONGEST_RUN, rounds * self._time_to_live)) for node, mail in mails.items()}
        )
        self._handed_in.update(dict.fromkeys(mails, time.monotonic()))
        self._fill()

    def _fill(self) -> None:
        while self._outbox and len(self._pending) < self._window.size:
            node = next(iter(self._outbox))
            if (host := self._hosts.take(node)) is None:
                break
            self._push(node, host, *self._outbox.pop(node))

    def _push(self, node: int, host: int, mail: Mail, time_to_live: float) -> None:
        content = pack_mail(mail, seat=self._hosts.seat(node))
        sent = _Sent(node, host, mail, wire_bytes(content), time.monotonic())
        message = Message(content, host, PEER_MESSAGE, ttl=time_to_live)
        # One by one: where Flower leaves out a message of many, it does not say which.
        ids = list(self._grid.push_messages([message]))
        if len(ids) == 1 and ids[0]:
            self._pending[ids[0]] = sent
            self.bytes_down += sent.bytes_down
        else:
            self._hosts.give(host)
            self._undelivered.append(Receipt(node, mail, None, 0, 0, "Flower did not take the message"))

    def next(self, *, deadline: float) -> list[Receipt]:
        """Wait for at least one reply; return all that are there, or none once the deadline has passed.

        Args:
            deadline: on the clock of ``time.monotonic``.
        """
        pause, quiet_since = _FIRST_POLL, time.monotonic()
        while not (receipts := self._pull()):
            now = time.monotonic()
            if now - quiet_since >= QUIET:  # all that is under way may hang
                quiet_since = now
                self._window.nothing_heard()
            left = deadline - now
            if left <= 0 or not self._pending:
                break
            time.sleep(min(pause, left))
            pause = min(pause * 1.5, _LAST_POLL)
        return receipts

    def receive(self, awaited: Iterable[int], *, deadline: float) -> Iterator[Receipt]:
        """Yield replies as they come, until every awaited peer has replied or the deadline has passed.

        Replies of other peers that were still owed are yielded too: they are late, not lost.

        Args:
            awaited: peers' addresses.
            deadline: on the clock of ``time.monotonic``.
        """
        missing = set(awaited)
        while missing and (receipts := self.next(deadline=deadline)):
            for receipt in receipts:
                missing.discard(receipt.node)
                yield receipt
        self.recall()

    def _pull(self) -> list[Receipt]:
        receipts, self._undelivered = self._undelivered, []
        full, waits = self._window.size <= len(self._pending) + len(self._outbox), []
        for message in self._grid.pull_messages(list(self._pending)):
            # The node in an error reply can be wrong (codes 3 and 5 come from node 1): the message id is not.
            sent = self._pending.pop(message.metadata.reply_to_message_id, None)
            if sent is not None:
                self._hosts.give(sent.host)
                receipts.append(replace(_receipt(message, sent), seconds=time.monotonic() - self._handed_in[sent.node]))
                self.bytes_up += receipts[-1].bytes_up
                waits.append(_waited(receipts[-1], sent))
        if full and (waited := min(filter(math.isfinite, waits), default=None)) is not None:
            self._window.heard(waited)
        self._fill()
        return receipts


def _waited(receipt: Receipt, sent: _Sent) -> float:
    """Return the seconds between a mail's push and its answer in which the peer did not work on it."""
    worked = receipt.answer.metrics.get("seconds", math.nan) if receipt.answer is not None else math.nan
    return time.monotonic() - sent.at - worked if math.isfinite(worked) else math.inf


def _receipt(message: Message, sent: _Sent) -> Receipt:
    def failed(why: str, bytes_up: int = 0) -> Receipt:
        return Receipt(sent.node, sent.mail, None, bytes_up, sent.bytes_down, why)

    if message.has_error():
        return failed(f"Flower error {message.error.code}: {message.error.reason}")
    bytes_up = wire_bytes(message.content)
    try:
        answer = unpack_answer(message.content)
    except BadMessage as error:
        return failed(str(error), bytes_up)
    if answer.round != sent.mail.round and not answer.error:
        return failed(f"expected an answer to round {sent.mail.round}, but got one to round {answer.round}", bytes_up)
    return Receipt(sent.node, sent.mail, answer, bytes_up, sent.bytes_down, answer.error)
