"""The relay: a post office that decides who hears whom and carries the mail. It aggregates nothing."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from fedkd.codec import BadKnowledge, codec
from fedkd.config import RunConfig, split_list
from fedkd.errors import FedkdError
from fedkd.protocol import Kind, Letter, Mail
from fedkd.results import PeerSummary, Row, RunFolder, Summary
from strategies.console import round_line
from strategies.post import Post, Receipt
from strategies.roster import Member, member, roster
from strategies.strategy import Strategy

_NODE_WAIT = 0.1  # seconds between looks at the list of nodes
_SETTLED = 10  # looks without a newcomer after which a federation of unknown size is taken as complete


class RelayError(FedkdError):
    """The run cannot go on."""


@dataclass
class _Tally:
    """What the run has cost so far."""

    bytes_up: int = 0
    bytes_down: int = 0
    began: float = field(default_factory=time.monotonic)


class Relay:
    """Runs the rounds of one run.

    Args:
        post: carries the messages.
        config: the run's settings.
        strategy: makes the strategy for a number of peers.
        folder: where the results go, and where simulated peers keep their state.
        say: prints one line.
    """

    def __init__(
        self,
        post: Post,
        config: RunConfig,
        strategy: Callable[[int], Strategy],
        folder: RunFolder,
        say: Callable[[str], None] = print,
    ) -> None:
        self._post, self._config, self._folder, self._say = post, config, folder, say
        self._make_strategy = strategy
        self._codec = codec(config.codec)
        self._members: list[Member] = []
        self._mailbox: dict[int, Letter] = {}  # the newest knowledge of each peer, by index
        self._started: set[int] = set()
        self._rows: list[Row] = []
        self._durations: list[float] = []
        self._tally = _Tally()

    @property
    def members(self) -> Sequence[Member]:
        """The peers, by index."""
        return self._members

    @property
    def rows(self) -> Sequence[Row]:
        """All rows so far."""
        return self._rows

    def run(self) -> Summary:
        """Introduce, start, run all rounds and the controls; return what came of it.

        Raises:
            FedkdError: the peers cannot work together, or none of them answers.
        """
        self._introduce()
        strategy = self._make_strategy(len(self._members))
        self._folder.begin_rounds()
        for round in range(self._config.rounds + 1):
            self._run_round(round, strategy)
        return self._conclude()

    def _introduce(self) -> None:
        """Learn who is there. Peers check everything they can before anyone trains."""
        nodes = self._wait_for_nodes(self._config.peers)
        members = self._introductions(nodes)
        expected = max(m.expected for m in members)
        if expected > len(members):
            late = set(self._wait_for_nodes(expected)) - set(nodes)
            members += self._introductions(late)
        self._members = roster(members)
        for m in self._members:
            self._say(f"{m.name}: {m.model}, {m.parameters:,} parameters, {m.samples:,} private samples")

    def _wait_for_nodes(self, count: int) -> list[int]:
        """Wait for ``count`` nodes; for 0, until some are there and no more have come for a while."""
        deadline = time.monotonic() + self._config.round_timeout
        seen, quiet = -1, 0
        while True:
            nodes = self._post.nodes()
            quiet = quiet + 1 if len(nodes) == seen else 0
            seen = len(nodes)
            if (count and seen >= count) or (not count and nodes and quiet >= _SETTLED):
                return nodes
            if time.monotonic() > deadline:
                raise RelayError(f"only {seen} of {count or 'at least 1'} peers connected in time (`round-timeout`)")
            time.sleep(_NODE_WAIT)

    def _introductions(self, nodes: Iterable[int]) -> list[Member]:
        receipts = list(self._exchange(dict.fromkeys(nodes, self._mail("introduce", 0))))
        problems = [(_sender(receipt), receipt.error) for receipt in receipts if receipt.error]
        if problems:
            raise RelayError(_same_said_once(problems))
        silent = len(set(nodes)) - len(receipts)
        if silent:
            raise RelayError(f"{silent} peers did not introduce themselves in time (`round-timeout`)")
        return [member(r.node, r.answer) for r in receipts if r.answer is not None]

    def _run_round(self, round: int, strategy: Strategy) -> None:
        began = time.monotonic()
        mails: dict[int, Mail] = {}
        for m in self._members:
            if m.node in self._post.busy():
                continue
            if m.index in self._started:
                mails[m.node] = self._mail("learn", round, self._letters(m.index, round, strategy))
            else:
                mails[m.node] = self._mail("start", round)
        receipts: dict[int, Receipt] = {}
        for receipt in self._exchange(mails):
            self._accept(receipt)
            if receipt.mail.round == round:
                receipts[receipt.node] = receipt
        rows = [self._row(m, round, receipts.get(m.node)) for m in self._members]
        if not self._started:
            raise RelayError("no peer could start: " + _same_said_once([(row.peer, row.error) for row in rows]))
        self._rows += rows
        self._folder.append(rows)
        self._durations.append(time.monotonic() - began)
        self._say(round_line(round, self._config.rounds, rows, self._durations))

    def _letters(self, peer: int, round: int, strategy: Strategy) -> tuple[Letter, ...]:
        return tuple(self._mailbox[t] for t in strategy.teachers(peer, round) if t in self._mailbox)

    def _accept(self, receipt: Receipt) -> None:
        """Put an answer's knowledge in the mailbox, late or not; refuse what cannot be used."""
        answer, index = receipt.answer, self._index(receipt)
        if answer is None or answer.error or answer.peer != self._members[index].name:
            return
        self._started.add(index)
        try:
            shape = (self._config.proxy_size, len(self._members[0].classes))
            self._codec.decode(answer.arrays, shape=shape)
        except BadKnowledge as error:
            self._say(f"refused the knowledge of {answer.peer} in round {answer.round}: {error}")
        else:
            self._mailbox[index] = Letter(answer.peer, answer.round, answer.arrays)

    def _row(self, m: Member, round: int, receipt: Receipt | None) -> Row:
        heard = () if receipt is None else [letter.sender for letter in receipt.mail.letters]
        row = Row(round=round, peer=m.name, model=m.model, teachers=heard)
        if receipt is None:
            return replace(row, error=f"no answer within {self._config.round_timeout:g} s")
        row = replace(row, bytes_up=receipt.bytes_up, bytes_down=receipt.bytes_down, error=receipt.error)
        if receipt.answer is None:
            return row
        names = (
            "test_accuracy",
            "own_accuracy",
            "test_loss",
            "ece",
            "brier",
            "kd_loss",
            "local_loss",
            "seconds",
        )
        found = {name: receipt.answer.metrics[name] for name in names if name in receipt.answer.metrics}
        return replace(row, **found)  # type: ignore[arg-type]

    def _mail(self, kind: Kind, round: int, letters: tuple[Letter, ...] = ()) -> Mail:
        return Mail(kind, round, self._config.to_mapping(), letters, str(self._folder.path / "peers"))

    def _exchange(self, mails: Mapping[int, Mail]) -> Iterator[Receipt]:
        """Send mails; yield what comes back until all have answered or the round's time is over."""
        self._post.send(mails)
        deadline = time.monotonic() + self._config.round_timeout
        for receipt in self._post.receive(mails, deadline=deadline):
            self._tally.bytes_up += receipt.bytes_up
            self._tally.bytes_down += receipt.bytes_down
            yield receipt

    def _conclude(self) -> Summary:
        controls = split_list(self._config.controls)
        isolated = self._isolated() if "isolated" in controls else {}
        pooled = self._pooled() if "pooled" in controls else math.nan
        peers = [self._peer_summary(m, isolated.get(m.index, [])) for m in self._members]
        return Summary(
            peers=peers,
            isolated=_mean([peer.isolated for peer in peers]),
            isolated_by_round=[_mean(column) for column in zip(*isolated.values(), strict=True)],
            pooled=pooled,
            pooled_model=self._config.pooled_model if math.isfinite(pooled) else "",
            totals={
                "rounds": self._config.rounds,
                "bytes_up": self._tally.bytes_up,
                "bytes_down": self._tally.bytes_down,
                "seconds": time.monotonic() - self._tally.began,
            },
        )

    def _isolated(self) -> dict[int, list[float]]:
        """Run every peer again without teachers; return its test accuracy by round, by index."""
        mails = {m.node: self._mail("isolated", self._config.rounds) for m in self._ready()}
        found: dict[int, list[float]] = {}
        for receipt in self._exchange(mails):
            if receipt.answer is None or receipt.error:
                self._say(f"control isolated: no result from {self._name(receipt)}: {receipt.error}")
            elif receipt.mail.kind == "isolated":
                found[self._index(receipt)] = list(receipt.answer.series["test_accuracy"])
        return found

    def _pooled(self) -> float:
        """Train one model on all private data, where all peers are stand-ins on this machine."""
        ready = self._ready()
        if not all(m.simulated for m in self._members) or not ready:
            self._say("control pooled: left out, since no real peer may see the others' data")
            return math.nan
        for receipt in self._exchange({ready[0].node: self._mail("pooled", self._config.rounds)}):
            if receipt.mail.kind == "pooled" and receipt.answer is not None and not receipt.error:
                return receipt.answer.metrics["test_accuracy"]
            self._say(f"control pooled: no result: {receipt.error}")
        return math.nan

    def _ready(self) -> list[Member]:
        busy = self._post.busy()
        return [m for m in self._members if m.index in self._started and m.node not in busy]

    def _peer_summary(self, m: Member, isolated: Sequence[float]) -> PeerSummary:
        measured = [row for row in self._rows if row.peer == m.name and math.isfinite(row.test_accuracy)]
        first, last = (measured[0], measured[-1]) if measured else (None, None)
        return PeerSummary(
            peer=m.name,
            model=m.model,
            parameters=m.parameters,
            samples=m.samples,
            before=first.test_accuracy if first else math.nan,
            after=last.test_accuracy if last else math.nan,
            own_before=first.own_accuracy if first else math.nan,
            own_after=last.own_accuracy if last else math.nan,
            isolated=isolated[-1] if isolated else math.nan,
        )

    def _index(self, receipt: Receipt) -> int:
        return next(m.index for m in self._members if m.node == receipt.node)

    def _name(self, receipt: Receipt) -> str:
        return self._members[self._index(receipt)].name


def _mean(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan


def _sender(receipt: Receipt) -> str:
    return receipt.answer.peer if receipt.answer is not None else f"node {receipt.node}"


def _same_said_once(problems: Sequence[tuple[str, str]]) -> str:
    """Join (peer, problem) pairs; peers mostly stumble over the same setting, so a shared problem is said once."""
    by_text: dict[str, list[str]] = {}
    for name, text in problems:
        by_text.setdefault(text, []).append(name)
    if len(by_text) == 1:
        return next(iter(by_text))
    return "; ".join(f"{', '.join(sorted(names))}: {text}" for text, names in by_text.items())
