"""The relay: a post office that decides who hears whom and carries the mail. It aggregates nothing."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from fedkd.codec import BadKnowledge
from fedkd.config import RunConfig
from fedkd.errors import FedkdError
from fedkd.protocol import Kind, Letter, Mail
from fedkd.results import Row, RunFolder
from strategies.console import round_line
from strategies.ledger import Ledger
from strategies.mailbox import SERVER
from strategies.participation import participants
from strategies.post import Post, Receipt
from strategies.roster import Member
from strategies.strategy import Strategy

_MEASURES = {f.name for f in fields(Row) if f.type in (float, int)} - {"round", "bytes_up", "bytes_down"}


class RelayError(FedkdError):
    """The run cannot go on."""


class Relay:
    """Runs the rounds of one run, on peers that have been introduced.

    Args:
        post: carries the messages.
        members: the peers, by index.
        config: the run's settings.
        strategy: who hears whom.
        folder: where the results go, and where simulated peers keep their state.
        run: the token of this run.
        say: prints one line.
        resume: go on after the last round that closed in this folder.

    Attributes:
        rows: all rows so far.
        ledger: what it needs to go on.
    """

    def __init__(
        self,
        post: Post,
        members: Sequence[Member],
        config: RunConfig,
        strategy: Strategy,
        folder: RunFolder,
        *,
        run: str,
        say: Callable[[str], None] = print,
        resume: bool = False,
    ) -> None:
        self.members, self.strategy = members, strategy
        self._post, self._config, self._folder, self._say = post, config, folder, say
        self._run_token = run
        self._settings = strategy.peer_settings().to_mapping()
        self._by_node = {m.node: m for m in members}
        self._keys = {m.name: m.public_key for m in members} if config.sealed else {}
        self.ledger = Ledger.load(folder.path) if resume else Ledger()
        self.rows: list[Row] = []
        if self.ledger.round >= 0:
            self.rows = folder.rewind(self.ledger.round)
            say(f"resumed after round {self.ledger.round}")
        else:
            folder.begin_rounds()

    def run(self) -> None:
        """Run all rounds that have not closed yet.

        Raises:
            RelayError: too few peers answer.
        """
        last = 0 if self._config.mode == "async" else self._config.rounds
        for round in range(self.ledger.round + 1, last + 1):
            self._run_round(round)
            if round == 0 and (letters := self.strategy.to_merge(self.ledger.mailbox)):
                self._merge(letters)
        if self._config.mode == "async":
            self._run_async()

    def exchange(self, mails: Mapping[int, Mail]) -> Iterator[Receipt]:
        """Send mails; yield what comes back until all have answered or the round's time is over."""
        self._post.send(mails)
        deadline = time.monotonic() + self._config.round_timeout
        for receipt in self._post.receive(mails, deadline=deadline):
            self._count(receipt)
            yield receipt

    def mail(self, kind: Kind, round: int, letters: tuple[Letter, ...] = ()) -> Mail:
        """Return a mail with this run's settings."""
        state_dir = str(self._folder.path / "peers")
        return Mail(kind, round, self._settings, self._run_token, letters, self._keys, state_dir)

    def ready(self) -> list[Member]:
        """Return the peers that have a state and owe no reply."""
        busy = self._post.busy()
        return [m for m in self.members if m.index in self.ledger.started and m.node not in busy]

    def member(self, receipt: Receipt) -> Member:
        """Return who sent a reply."""
        return self._by_node[receipt.node]

    def _run_round(self, round: int) -> None:
        began = time.monotonic()
        busy = self._post.busy()
        drawn = participants(len(self.members), self._config.participation, seed=self._config.seed, round=round)
        mails = {m.node: self._round_mail(m, round) for m in self.members if m.index in drawn and m.node not in busy}
        rows = {m.index: self._silent(m, round, absent=m.index not in drawn) for m in self.members}
        for receipt in self.exchange(mails):
            row = self._accept(receipt)
            if receipt.mail.round == round:
                rows[self.member(receipt).index] = row
        self._close(round, list(rows.values()), time.monotonic() - began)

    def _merge(self, letters: tuple[Letter, ...]) -> None:
        """Have one peer distil all knowledge into the model that a baseline with a server starts from."""
        ready = self.ready()
        for receipt in self.exchange({ready[0].node: self.mail("merge", 1, letters)}):
            if receipt.answer is None or receipt.error:
                raise RelayError(f"{self.member(receipt).name} could not merge the peers' knowledge: {receipt.error}")
            self.ledger.mailbox.put(SERVER, Letter("server", 0, receipt.answer.arrays))
        self.ledger.save(self._folder.path)

    def _close(self, round: int, rows: Sequence[Row], seconds: float) -> None:
        self.rows += rows
        self._folder.append(rows)
        answered = sum(row.status in ("ok", "refused") for row in rows)
        if answered < min(self._config.min_answers, len(self.members)):
            problems = same_said_once([(row.peer, row.error) for row in rows if row.error])
            raise RelayError(
                f"round {round}: {answered} of {len(rows)} peers answered, `min-answers` is "
                f"{self._config.min_answers}: {problems}"
            )
        self.ledger.round = round
        self.ledger.seconds.append(seconds)
        self.ledger.save(self._folder.path)
        self._say(round_line(round, self._config.rounds, rows, self.ledger.seconds))

    def _run_async(self) -> None:
        """No barrier: a peer that answers gets new mail at once, from the freshest knowledge of its neighbours."""
        total = self._config.updates or len(self.members) * self._config.rounds
        began = time.monotonic()
        ends = began + self._config.max_seconds if self._config.max_seconds else math.inf
        rounds = dict.fromkeys((m.index for m in self.members), 0)
        given_up: set[int] = set()  # nodes that owed an answer when nobody had answered for long
        batch: list[Row] = []
        done = 0
        while done < total and time.monotonic() < ends:
            owed = len(self._post.busy() - given_up)
            for m in self.ready()[: total - done - owed]:
                rounds[m.index] += 1
                self._post.send({m.node: self._round_mail(m, rounds[m.index])})
            receipts = self._post.next(deadline=min(ends, time.monotonic() + self._config.round_timeout))
            for receipt in receipts:
                self._count(receipt)
                batch.append(self._accept(receipt))
                given_up.discard(receipt.node)
            done += len(receipts)
            if len(batch) >= len(self.members) or (batch and not receipts) or done >= total:
                self._close_batch(batch, done, total, time.monotonic() - began)
                batch = []
            if not receipts:
                given_up |= self._post.busy()
                if not self.ready():
                    self._say(f"no peer answered within {self._config.round_timeout:g} s: the run ends here")
                    return

    def _close_batch(self, rows: list[Row], done: int, total: int, seconds: float) -> None:
        self.rows += rows
        self._folder.append(rows)
        self._say(round_line(done, total, rows, [0.0, seconds / done], unit="update"))

    def _round_mail(self, m: Member, round: int) -> Mail:
        if m.index not in self.ledger.started:
            return self.mail("start", round)
        return self.mail("learn", round, self.strategy.letters(m.index, round, self.ledger.mailbox))

    def _accept(self, receipt: Receipt) -> Row:
        """Put an answer's knowledge in the mailbox, late or not; refuse what cannot be used. Return its row."""
        m, answer = self.member(receipt), receipt.answer
        row = Row(
            round=receipt.mail.round,
            peer=m.name,
            model=m.model,
            teachers=[letter.sender for letter in receipt.mail.letters],
            bytes_up=receipt.bytes_up,
            bytes_down=receipt.bytes_down,
        )
        if answer is None or answer.error:
            return replace(row, status="error", error=receipt.error)
        if answer.peer != m.name:
            return replace(row, status="refused", error=f"{m.name} answered as {answer.peer}")
        self.ledger.started.add(m.index)
        measured: dict[str, Any] = {name: value for name, value in answer.metrics.items() if name in _MEASURES}
        row = replace(row, **measured)
        if answer.series:
            self._folder.append_reliability(answer.round, m.name, answer.series)
        try:
            self.strategy.check(answer)
        except BadKnowledge as error:
            return replace(row, status="refused", error=f"knowledge refused: {error}")
        self.ledger.mailbox.put(m.index, Letter(m.name, answer.round, answer.arrays))
        return replace(row, error=str(answer.facts.get("refused", "")))

    def _silent(self, m: Member, round: int, *, absent: bool) -> Row:
        row = Row(round=round, peer=m.name, model=m.model, teachers=[])
        if absent:
            return replace(row, status="absent")
        return replace(row, status="late", error=f"no answer within {self._config.round_timeout:g} s")

    def _count(self, receipt: Receipt) -> None:
        self.ledger.bytes_up += receipt.bytes_up
        self.ledger.bytes_down += receipt.bytes_down


def same_said_once(problems: Sequence[tuple[str, str]]) -> str:
    """Join (peer, problem) pairs; peers mostly stumble over the same thing, so a shared problem is said once."""
    by_text: dict[str, list[str]] = {}
    for name, text in problems:
        by_text.setdefault(text, []).append(name)
    if len(by_text) == 1:
        return next(iter(by_text))
    return "; ".join(f"{', '.join(sorted(names))}: {text}" for text, names in by_text.items())
