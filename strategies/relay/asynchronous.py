"""Asynchronous gossip: no barrier, and slow peers slow nobody."""

import math
import time
from collections.abc import Callable

from fedkd.results.folder import Row
from strategies.relay.console import round_line
from strategies.relay.post import QUIET, Receipt
from strategies.relay.roster import Member
from strategies.relay.rounds import Relay

_LONGEST_REST = 60.0  # seconds that a peer which only errs is left alone


class Asynchronous:
    """Gives a peer that answers new mail at once, from the freshest knowledge of its neighbours.

    The run ends after ``updates`` good answers of all peers together, or after ``max-seconds``. A peer's round is its
    own count of mails. A peer that errs is left alone for a second, then two, then four; one that has not started
    is asked to start again.

    Args:
        relay: after the start, round 0.
        say: prints one line.
    """

    def __init__(self, relay: Relay, *, say: Callable[[str], None]) -> None:
        self._relay, self._config, self._say = relay, relay.config, say
        self._rounds = dict.fromkeys((m.index for m in relay.members), 0)
        self._failures = dict.fromkeys(self._rounds, 0)
        self._rests_until = dict.fromkeys(self._rounds, 0.0)
        self._given_up: set[int] = set()  # nodes that owed an answer when nobody had answered for long
        self._batch: list[Row] = []
        self._done = 0

    def run(self) -> None:
        """Run until the end."""
        total = self._config.updates or len(self._relay.members) * self._config.rounds
        began = time.monotonic()
        ends = began + self._config.max_seconds if self._config.max_seconds else math.inf
        heard = began
        while self._done < total and (now := time.monotonic()) < ends:
            self._send(total)
            wake = min([ends, heard + self._config.round_timeout, *(t for t in self._rests_until.values() if t > now)])
            if self._relay.post.room() == 0:  # peers may wait for it behind some that hang
                wake = min(wake, now + 2 * QUIET)
            receipts = self._relay.post.next(deadline=wake)
            for receipt in receipts:
                self._take(receipt)
            if receipts:
                heard = time.monotonic()
            elif time.monotonic() >= heard + self._config.round_timeout:
                self._given_up |= self._relay.post.busy()
                heard = time.monotonic()
                if not self._free():
                    self._say(f"no peer answered within {self._config.round_timeout:g} s: the run ends here")
                    break
            elif not self._relay.post.busy():
                time.sleep(max(0.0, wake - time.monotonic()))  # all rest
            if len(self._batch) >= len(self._relay.members):
                self._flush(total, began)
        self._relay.post.recall()
        if self._batch:
            self._flush(total, began)

    def _free(self) -> list[Member]:
        """Return the peers that may get mail: they owe nothing and do not rest."""
        busy, now = self._relay.post.busy(), time.monotonic()
        return [m for m in self._relay.members if m.node not in busy and self._rests_until[m.index] <= now]

    def _send(self, total: int) -> None:
        """Send no more mail than answers are wanted; those given up on do not count as under way.

        Where there is not room for all at once, those come first who have had the fewest.
        """
        under_way = len(self._relay.post.busy() - self._given_up)
        most = min(total - self._done - under_way, self._relay.post.room())
        for m in sorted(self._free(), key=lambda m: self._rounds[m.index])[: max(0, int(most))]:
            self._rounds[m.index] += 1
            self._relay.post.send({m.node: self._relay.round_mail(m, self._rounds[m.index])})

    def _take(self, receipt: Receipt) -> None:
        m = self._relay.member(receipt)
        self._given_up.discard(m.node)
        if receipt.mail.round == 0:  # the start has closed, with a row of its own
            self._relay.accept_late(receipt, bytes_up=receipt.bytes_up)
            return
        row = self._relay.accept(receipt)
        self._batch.append(row)
        if row.status == "ok":
            self._done += 1
            self._relay.ledger.mailbox.updates += 1
            self._failures[m.index] = 0
        else:
            self._rests_until[m.index] = time.monotonic() + min(_LONGEST_REST, 2.0 ** self._failures[m.index])
            self._failures[m.index] += 1

    def _flush(self, total: int, began: float) -> None:
        rows, self._batch = self._batch, []
        self._relay.record(rows)
        seconds = time.monotonic() - began
        self._say(round_line(self._done, total, rows, [0.0, seconds / max(1, self._done)], unit="update"))
