"""The post office's counter: pushes messages, pulls replies, keeps one outstanding message per node.

Flower runs two messages of one node at once, on stale state, if it is given them, and maps some error
replies to the wrong node; both are settled here.
"""

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from flwr.app import Message
from flwr.serverapp import Grid

from fedkd.protocol import PEER_MESSAGE, Answer, BadMessage, Mail, pack_mail, unpack_answer, wire_bytes

_FIRST_POLL, _LAST_POLL = 0.02, 0.25  # seconds; the pause grows while nothing comes


@dataclass(frozen=True)
class Receipt:
    """What came back from one node.

    Attributes:
        node: Flower's node id.
        mail: what it was sent.
        answer: the answer, or None if there was none that could be read.
        bytes_up: bytes of the encoded arrays in the reply.
        bytes_down: bytes of the encoded arrays in the message it replies to.
        error: why there is no usable answer; empty if there is.
    """

    node: int
    mail: Mail
    answer: Answer | None
    bytes_up: int
    bytes_down: int
    error: str = ""


@dataclass(frozen=True)
class _Sent:
    node: int
    mail: Mail
    bytes_down: int


class Post:
    """Carries messages between the relay and the nodes.

    Args:
        grid: Flower's.
        time_to_live: seconds after which Flower drops an unanswered message.

    Attributes:
        bytes_up: bytes of all encoded arrays that came; ``bytes_down``: that were sent.
    """

    def __init__(self, grid: Grid, *, time_to_live: float) -> None:
        self._grid = grid
        self._time_to_live = time_to_live
        self._pending: dict[str, _Sent] = {}  # by message id
        self._undelivered: list[Receipt] = []
        self.bytes_up = 0
        self.bytes_down = 0

    def nodes(self) -> list[int]:
        """Return the connected nodes, in ascending order."""
        return sorted(self._grid.get_node_ids())

    def busy(self) -> set[int]:
        """Return the nodes that still owe a reply."""
        return {sent.node for sent in self._pending.values()}

    def owed(self, node: int, round: int) -> int:
        """Return the bytes of the mail of a round to which a node owes a reply; 0 if it owes none."""
        return sum(s.bytes_down for s in self._pending.values() if s.node == node and s.mail.round == round)

    def send(self, mails: Mapping[int, Mail]) -> None:
        """Push one mail to each node. None of them may be busy.

        A message that Flower does not take (the node has gone, or it is too large) comes back as an error.
        """
        if owing := self.busy() & mails.keys():
            raise ValueError(f"nodes {sorted(owing)} still owe a reply")
        for node, mail in mails.items():
            content = pack_mail(mail)
            sent = _Sent(node, mail, wire_bytes(content))
            message = Message(content, node, PEER_MESSAGE, ttl=self._time_to_live)
            # One by one: where Flower leaves out a message of many, it does not say which.
            ids = list(self._grid.push_messages([message]))
            if len(ids) == 1 and ids[0]:
                self._pending[ids[0]] = sent
                self.bytes_down += sent.bytes_down
            else:
                self._undelivered.append(Receipt(node, mail, None, 0, 0, "Flower did not take the message"))

    def next(self, *, deadline: float) -> list[Receipt]:
        """Wait for at least one reply; return all that are there, or none once the deadline has passed.

        Args:
            deadline: on the clock of ``time.monotonic``.
        """
        pause = _FIRST_POLL
        while not (receipts := self._pull()):
            left = deadline - time.monotonic()
            if left <= 0 or not self._pending:
                break
            time.sleep(min(pause, left))
            pause = min(pause * 1.5, _LAST_POLL)
        return receipts

    def receive(self, awaited: Iterable[int], *, deadline: float) -> Iterator[Receipt]:
        """Yield replies as they come, until every awaited node has replied or the deadline has passed.

        Replies of other nodes that were still owed are yielded too: they are late, not lost.

        Args:
            awaited: node ids.
            deadline: on the clock of ``time.monotonic``.
        """
        missing = set(awaited)
        while missing and (receipts := self.next(deadline=deadline)):
            for receipt in receipts:
                missing.discard(receipt.node)
                yield receipt

    def _pull(self) -> list[Receipt]:
        receipts, self._undelivered = self._undelivered, []
        for message in self._grid.pull_messages(list(self._pending)):
            # The node in an error reply can be wrong (codes 3 and 5 come from node 1): the message id is not.
            sent = self._pending.pop(message.metadata.reply_to_message_id, None)
            if sent is not None:
                receipts.append(_receipt(message, sent))
                self.bytes_up += receipts[-1].bytes_up
        return receipts


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
