"""The relay: a post office that decides who hears whom and carries the mail. It aggregates nothing."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from fedkd.errors import FedkdError
from fedkd.results.folder import Row, RunFolder
from fedkd.results.profile import spent
from fedkd.settings.config import RunConfig
from fedkd.wire.codecs import BadKnowledge
from fedkd.wire.messages import Answer, Kind, Letter, Mail
from strategies.relay.console import round_line
from strategies.relay.ledger import Ledger
from strategies.relay.mailbox import SERVER
from strategies.relay.participation import participants
from strategies.relay.post import Post, Receipt
from strategies.relay.roster import Member
from strategies.strategy import Strategy

_MEASURES = {f.name for f in fields(Row) if f.type in (float, int)} - {"round", "bytes_up", "bytes_down"}
_SHARES = {"test_accuracy", "own_accuracy", "ece"}
_BINS = {"confidence", "accuracy", "samples"}
_MOST_BINS = 64
_LONGEST_TEXT = 500
_MOST_NAMES = 12


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
        began: when the run did, on the clock of ``time.monotonic``; None: now.

    Attributes:
        rows: all rows so far.
        ledger: what it needs to go on.
        late: rows of answers that came after their round had closed, until they are written.

    Raises:
        RelayError: other peers are here than were before the run was stopped.
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
        began: float | None = None,
    ) -> None:
        self.members, self.strategy, self.config, self.post = members, strategy, config, post
        self._folder, self._say, self._run_token = folder, say, run
        self._by_node = {m.node: m for m in members}
        self._keys = {m.name: m.public_key for m in members} if config.sealed else {}
        self._settings = config.to_mapping()
        self.ledger = Ledger.load(folder.path) if resume else Ledger()
        self.rows: list[Row] = folder.rewind(self.ledger.round) if resume else []
        self.late: list[Row] = []
        self._last_rounds: dict[str, int] = {}
        self._note_rounds(self.rows)
        _refuse_other_peers(self.rows, members)
        self._began = (time.monotonic() if began is None else began) - self.ledger.elapsed
        self._bytes_before = self.ledger.bytes_up - post.bytes_up, self.ledger.bytes_down - post.bytes_down
        self._bins: list[tuple[int, str, Mapping[str, Sequence[float]]]] = []
        self._spent: list[Mapping[str, Any]] = []
        if resume:
            say(f"resumed after round {self.ledger.round}")

    def run(self) -> None:
        """Run all rounds that have not closed yet; without a barrier between them under ``mode = "async"``.

        Raises:
            RelayError: too few peers answer.
        """
        rounds = 0 if self.config.mode == "async" else self.config.rounds
        for round in range(self.ledger.round + 1, rounds + 1):
            self._run_round(round)
            if round == 0 and (letters := self.strategy.to_merge(self.ledger.mailbox)) is not None:
                self._merge(letters)

    def seconds(self) -> float:
        """Return the wall time of the run so far, that of the parts before it was resumed included."""
        return time.monotonic() - self._began

    def exchange(self, mails: Mapping[int, Mail]) -> Iterator[Receipt]:
        """Send mails; yield what comes back until all have answered or the round's time is over."""
        self.post.send(mails)
        return self.post.receive(mails, deadline=time.monotonic() + self.config.round_timeout)

    def mail(self, kind: Kind, round: int, letters: tuple[Letter, ...] = ()) -> Mail:
        """Return a mail with this run's settings."""
        state_dir = str(self._folder.path / "peers")
        return Mail(kind, round, self._settings, self._run_token, letters, self._keys, state_dir)

    def round_mail(self, m: Member, round: int) -> Mail:
        """Return a peer's mail of a round: what it is to learn from, or once more the start if it has not started."""
        if m.index not in self.ledger.started:
            return self.mail("start", round)
        return self.mail("learn", round, self.strategy.letters(m.index, round, self.ledger.mailbox))

    def ready(self) -> list[Member]:
        """Return the peers that have a state and owe no reply."""
        busy = self.post.busy()
        return [m for m in self.members if m.index in self.ledger.started and m.node not in busy]

    def last_round(self, m: Member) -> int:
        """Return the last round that a peer has had mail of, by its own count where there is no barrier."""
        return self._last_rounds.get(m.name, 0)

    def member(self, receipt: Receipt) -> Member:
        """Return who sent a reply."""
        return self._by_node[receipt.node]

    def accept(self, receipt: Receipt) -> Row:
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
            return replace(row, status="error", error=receipt.error[:_LONGEST_TEXT])
        if answer.peer != m.name:
            return replace(row, status="refused", error=f"{m.name} answered as {answer.peer}"[:_LONGEST_TEXT])
        row = replace(row, **_measured(answer))
        if self.config.profile and (seconds := spent(answer.metrics, there_and_back=receipt.seconds)):
            self._spent.append({"round": row.round, "peer": m.name, "model": m.model, **seconds})
        try:
            self.strategy.check(answer, kind=receipt.mail.kind)
        except BadKnowledge as error:
            return replace(row, status="refused", error=f"knowledge refused: {error}"[:_LONGEST_TEXT])
        self.ledger.started.add(m.index)
        self.ledger.mailbox.put(m.index, Letter(m.name, answer.round, answer.arrays))
        if set(answer.series) == _BINS and max(map(len, answer.series.values())) <= _MOST_BINS:
            self._bins.append((answer.round, m.name, answer.series))
        return replace(row, error=str(answer.facts.get("refused", ""))[:_LONGEST_TEXT])

    def accept_late(self, receipt: Receipt, *, bytes_up: int = 0) -> None:
        """Accept an answer whose round has closed; what it says goes into the row of that round when rows are written.

        Args:
            receipt: holds the answer.
            bytes_up: what that row is charged; 0 where the bytes count in the round in which they came.
        """
        row = self.accept(receipt)
        missed = f"no answer within {self.config.round_timeout:g} s"
        error = f"{missed}; later: {row.error}" if row.error else f"{missed}, but later"
        self.late.append(replace(row, status="late", error=error[:_LONGEST_TEXT], bytes_up=bytes_up))
        self._note_rounds(self.late[-1:])

    def record(self, rows: Sequence[Row]) -> None:
        """Write rows and what came with them, before anything that could fail."""
        late, self.late = self.late, []
        places = {(row.peer, row.round): place for place, row in enumerate(self.rows)} if late else {}
        found = {place: row for row in late if (place := places.get((row.peer, row.round))) is not None}
        for place, row in found.items():
            self.rows[place] = replace(row, bytes_up=self.rows[place].bytes_up + row.bytes_up)
        if found:
            self._folder.replace_rows({place: self.rows[place] for place in found})
        rows = [*rows, *(row for row in late if (row.peer, row.round) not in places)]
        self.rows += rows
        self._note_rounds(rows)
        self._folder.append(rows)
        for bins in self._bins:
            self._folder.append_reliability(*bins)
        self._folder.append_profile(self._spent)
        self._bins, self._spent = [], []
        up, down = self._bytes_before
        self.ledger.bytes_up, self.ledger.bytes_down = up + self.post.bytes_up, down + self.post.bytes_down

    def _note_rounds(self, rows: Iterable[Row]) -> None:
        for row in rows:
            self._last_rounds[row.peer] = max(row.round, self._last_rounds.get(row.peer, 0))

    def _run_round(self, round: int) -> None:
        began = time.monotonic()
        owing = self.post.busy()
        busy = {m.index for m in self.members if m.node in owing}
        share, seed = self.config.participation, self.config.seed
        drawn = participants(len(self.members), share, seed=seed, round=round, busy=busy)
        mails = {m.node: self.round_mail(m, round) for m in self.members if m.index in drawn}
        late: dict[int, int] = {}
        rows: dict[int, Row] = {}
        for receipt in self.exchange(mails):
            index = self.member(receipt).index
            if receipt.mail.round == round:
                rows[index] = self.accept(receipt)
            else:
                self.accept_late(receipt)
                late[index] = receipt.bytes_up  # its own round has closed; the bytes count where they came
        for m in self.members:
            silent = self._silent(m, round, absent=m.index not in drawn | busy)
            rows.setdefault(m.index, replace(silent, bytes_up=late.get(m.index, 0)))
        for index, why in self.strategy.left_out(round, self.ledger.mailbox).items():
            rows[index] = replace(rows[index], status="refused", error=f"knowledge refused: {why}"[:_LONGEST_TEXT])
        self._close(round, [rows[m.index] for m in self.members], len(drawn), time.monotonic() - began)

    def _close(self, round: int, rows: Sequence[Row], drawn: int, seconds: float) -> None:
        self.record(rows)
        answered = sum(row.status in ("ok", "refused") for row in rows)
        if answered < max(1, min(self.config.min_answers, drawn)):
            problems = same_said_once([(row.peer, row.error) for row in rows if row.error], of=drawn)
            raise RelayError(
                f"round {round}: {answered} of {drawn} peers answered, `min-answers` is "
                f"{self.config.min_answers}: {problems or 'all are busy with earlier rounds'}"
            )
        self.ledger.round = round
        self.ledger.seconds.append(seconds)
        self.ledger.elapsed = self.seconds()
        self.ledger.save(self._folder.path)
        self._say(round_line(round, self.config.rounds, rows, self.ledger.seconds))

    def _merge(self, letters: tuple[Letter, ...]) -> None:
        """Have one peer distil all knowledge into the model that a baseline with a server starts from."""
        if not letters or not (ready := self.ready()):
            raise RelayError(
                "round 0: no knowledge that could be used came in time, and the start is distilled from it"
            )
        merging = ready[0]
        problem = f"no answer within {self.config.round_timeout:g} s"
        for receipt in self.exchange({merging.node: self.mail("merge", 1, letters)}):
            if receipt.mail.kind != "merge":
                self.accept_late(receipt)
            elif receipt.answer is None or receipt.error:
                problem = receipt.error
            else:
                try:
                    self.strategy.check(receipt.answer, kind="merge")
                except BadKnowledge as error:
                    problem = str(error)
                    continue
                self.ledger.mailbox.put(SERVER, Letter("server", 0, receipt.answer.arrays))
                self.ledger.save(self._folder.path)
                return
        raise RelayError(f"{merging.name} could not merge the peers' knowledge: {problem}")

    def _silent(self, m: Member, round: int, *, absent: bool) -> Row:
        row = Row(round=round, peer=m.name, model=m.model, teachers=[], bytes_down=self.post.owed(m.node, round))
        if absent:
            return replace(row, status="absent")
        return replace(row, status="late", error=f"no answer within {self.config.round_timeout:g} s")


def _refuse_other_peers(rows: Sequence[Row], members: Sequence[Member]) -> None:
    """Refuse to go on among others: a peer's number decides what data it holds, and of how many parts."""
    before, now = dict.fromkeys(row.peer for row in rows), [m.name for m in members]
    if before and before.keys() != set(now):
        raise RelayError(
            f"the run that is resumed had {len(before)} peers ({_named(before)}), but now there are {len(now)} "
            f"({_named(now)}): resume it among the same peers (in a simulation `--peers {len(before)}`)"
        )


def _named(names: Iterable[str]) -> str:
    known = list(names)
    more = len(known) - _MOST_NAMES
    return ", ".join(known[:_MOST_NAMES]) + (f" and {more} more" if more > 0 else "")


def _measured(answer: Answer) -> dict[str, Any]:
    """Return what a peer says it measured, as far as a row has a place for it and it can be true."""
    found: dict[str, Any] = {}
    for name in _MEASURES & answer.metrics.keys():
        value = answer.metrics[name]
        possible = 0 <= value <= 1 if name in _SHARES else abs(value) < 1e12
        found[name] = value if possible else math.nan
    letters = answer.metrics.get("refused_letters", 0.0)
    return found | {"refused_letters": int(letters) if 0 <= letters < 1e6 else 0}


def same_said_once(problems: Sequence[tuple[str, str]], *, of: int) -> str:
    """Join (peer, problem) pairs; what peers have in common is said once, and without names if all of them say it.

    >>> same_said_once([("a", "no such layer"), ("b", "no such layer")], of=2)
    'no such layer'
    >>> same_said_once([("a", "no such layer"), ("b", "no such layer")], of=3)
    'a, b: no such layer'
    """
    by_text: dict[str, list[str]] = {}
    for name, text in problems:
        by_text.setdefault(text, []).append(name)
    if len(by_text) == 1 and len(problems) == of:
        return next(iter(by_text))
    return "; ".join(f"{', '.join(sorted(names))}: {text}" for text, names in by_text.items())
