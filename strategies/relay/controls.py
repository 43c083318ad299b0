"""The controls of a run, and its summary: what the peers would be without the exchange, and with other help.

``isolated`` is the floor, without any teacher; ``channel`` has the proxy set's true labels in the teachers' place: what
this way of learning carries from teachers who are right about every sample; ``pooled`` is one model on the data of all.
"""

import math
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import pairwise

from fedkd.privacy import promise
from fedkd.results.folder import Measures, PeerSummary, Row, Summary, mean
from fedkd.settings.config import RunConfig
from fedkd.settings.rules import split_list
from fedkd.wire.messages import Answer, Kind, Mail, one_line
from strategies.relay.post import Receipt
from strategies.relay.roster import Member
from strategies.relay.rounds import Relay

Say = Callable[[str], None]

_MEASURES = tuple(f.name for f in fields(Measures))
_SHARES = {"test_accuracy", "own_accuracy", "ece"}
_MOST = 1e12
_LONGEST_REASON = 200  # characters


@dataclass(frozen=True)
class Curve:
    """What a peer's isolated or channel control came to.

    Attributes:
        rounds: those after which it was measured, ascending from 0.
        found: what was measured then.
    """

    rounds: Sequence[int] = ()
    found: Sequence[Measures] = ()

    def at(self, round: int) -> Measures:
        """Return what was last measured up to a round: it stands there until it trains again."""
        place = bisect_right(self.rounds, round)
        return self.found[place - 1] if place else Measures()


def conclude(relay: Relay, config: RunConfig, *, say: Say = print) -> Summary:
    """Run the controls that a run asks for and sum it up.

    Args:
        relay: after its last round.
        config: the run's settings.
        say: prints one line.
    """
    seconds = relay.seconds()
    ledger, chosen = relay.ledger, split_list(config.controls)
    spent = {"bytes_up": ledger.bytes_up, "bytes_down": ledger.bytes_down}  # the controls are not charged
    isolated = _again(relay, "isolated", say) if "isolated" in chosen else {}
    channel = _channel(relay, config, say) if "channel" in chosen else {}
    pooled, pooled_seen = _pooled(relay, config, say) if "pooled" in chosen else (math.nan, math.nan)
    spent["bytes_up"] += sum(row.bytes_up for row in relay.late)
    relay.record(())  # what was late from the rounds
    rows: dict[str, list[Row]] = {m.name: [] for m in relay.members}
    for row in relay.rows:
        rows[row.peer].append(row)
    nothing = Curve()
    peers = [
        _peer_summary(rows[m.name], m, isolated.get(m.index, nothing), channel.get(m.index, nothing))
        for m in relay.members
    ]
    topology = relay.strategy.topology
    return Summary(
        peers=peers,
        isolated=mean([peer.isolated for peer in peers]),
        isolated_by_round=_by_round(list(isolated.values()), config),
        channel=mean([peer.channel for peer in peers]),
        channel_by_round=_by_round(list(channel.values()), config),
        pooled=pooled,
        pooled_model=config.pooled_model if math.isfinite(pooled) else "",
        pooled_samples_seen=pooled_seen,
        samples_seen=sum(peer.samples_seen for peer in peers),
        totals={"rounds": max((row.round for row in relay.rows), default=0), **spent, "seconds": seconds},
        round_seconds=ledger.seconds,
        classes=relay.members[0].classes,
        topology={"name": topology.name, **asdict(topology.stats())} if topology else {},
        caveats=[caveat for m in relay.members if (caveat := m.caveat())],
        privacy=promise(config),
    )


def _channel(relay: Relay, config: RunConfig, say: Say) -> dict[int, Curve]:
    """Run every peer again with true labels for teachers, in a simulation of an exchange of logits."""
    if not relay.post.simulated:
        say("control channel: left out, since real peers learn no labels of the proxy set")
        return {}
    if config.without_channel:
        say(f"control channel: left out, since {config.without_channel}")
        return {}
    return _again(relay, "channel", say)


def _again(relay: Relay, kind: Kind, say: Say) -> dict[int, Curve]:
    """Run every peer's rounds again, without its teachers; return what its control came to, by index.

    A peer that still works on a round gets its mail when it has answered, if it does while the others are waited for.
    """
    found: dict[int, Curve] = {}
    reasons: set[str] = set()
    problems = {m.node: "it has never started" for m in relay.members}
    problems |= dict.fromkeys(relay.post.busy(), "it still works on a round")

    def mails(members: Sequence[Member]) -> dict[int, Mail]:
        problems.update((m.node, "no answer") for m in members)
        return {m.node: relay.mail(kind, relay.last_round(m)) for m in members}

    for receipt in _answers(relay, mails, relay.ready(), kind, say):
        problem, curve = receipt.error, None
        if receipt.answer is not None and not problem and (why := receipt.answer.facts.get("left-out")):
            reasons.add(one_line(str(why), _LONGEST_REASON))
            problems[receipt.node] = ""
            continue
        if receipt.answer is not None and not problem:
            curve = _curve(receipt.answer)
            problem = "" if curve else f"expected what was measured in rounds from 0 up to {receipt.mail.round}"
        problems[receipt.node] = problem
        if curve:
            found[relay.member(receipt).index] = curve
    for reason in sorted(reasons):
        say(f"control {kind}: left out, since {reason}")
    for m in relay.members:
        if problem := problems[m.node]:
            say(f"control {kind}: no result from {m.name}: {problem}")
    return found


def _curve(answer: Answer) -> Curve | None:
    """Read a control's curve; None if it is none, or holds what cannot be."""
    series = answer.series
    if series.keys() != {"round", *_MEASURES} or len({len(values) for values in series.values()}) != 1:
        return None
    rounds = series["round"]
    ascending = [0.0, *(later for earlier, later in pairwise(rounds) if later > earlier and later.is_integer())]
    if list(rounds) != ascending or rounds[-1] > answer.round or not all(map(_possible, series["test_accuracy"])):
        return None
    columns = ([_believed(name, value) for value in series[name]] for name in _MEASURES)
    return Curve([int(round) for round in rounds], [Measures(*values) for values in zip(*columns, strict=True)])


def _by_round(curves: Sequence[Curve], config: RunConfig) -> list[float]:
    """Return the controls' mean accuracy by round; NaN where no peer is measured."""
    last = max((curve.rounds[-1] for curve in curves), default=-1)
    rounds = range(max(last, -1 if config.mode == "async" else config.rounds) + 1) if curves else ()
    return [
        mean([curve.at(round).test_accuracy for curve in curves]) if config.evaluates(round) else math.nan
        for round in rounds
    ]


def _pooled(relay: Relay, config: RunConfig, say: Say) -> tuple[float, float]:
    """Train one model on all private data, where all peers are stand-ins on this machine.

    Returns:
        Its test accuracy, and on how many private samples it was trained.
    """
    ready = relay.ready()
    if not all(m.simulated for m in relay.members) or not ready:
        say("control pooled: left out, since no real peer may see the others' data")
        return math.nan, math.nan
    problem = "no answer"

    def mails(members: Sequence[Member]) -> dict[int, Mail]:
        return {m.node: relay.mail("pooled", config.rounds) for m in members if m is ready[0]}

    for receipt in _answers(relay, mails, ready, "pooled", say, peers=len(relay.members)):
        metrics = receipt.answer.metrics if receipt.answer is not None else {}
        accuracy = metrics.get("test_accuracy", math.nan)
        if not receipt.error and _possible(accuracy):
            return accuracy, metrics.get("samples_seen", math.nan)
        problem = receipt.error or f"expected a test accuracy in [0, 1], but got {accuracy}"
    say(f"control pooled: no result: {problem}")
    return math.nan, math.nan


def _answers(
    relay: Relay,
    mails: Callable[[Sequence[Member]], Mapping[int, Mail]],
    members: Sequence[Member],
    kind: Kind,
    say: Say,
    *,
    peers: int = 1,
) -> Iterator[Receipt]:
    """Yield what comes back to a control's mails; what is late from a round goes into that round's row.

    What is late from another control is nobody's: that one has been summed up.

    A control does in one mail what took its peers a mail a round, or for ``peers`` of them together: it has as much
    time.

    Args:
        relay: carries the mails.
        mails: makes those of some peers.
        members: who is free to work.
        kind: of the mails.
        say: prints one line.
        peers: whose work it is.
    """
    try:
        sent = mails(members)
        awaited, deadline = set(sent), _send(relay, sent, peers)
        while awaited and (receipts := relay.post.next(deadline=deadline)):
            for receipt in receipts:
                awaited.discard(receipt.node)
                if receipt.mail.kind == kind:
                    yield receipt
                elif receipt.mail.kind in ("start", "learn"):
                    relay.accept_late(receipt, bytes_up=receipt.bytes_up)
                    more = mails([m for m in relay.ready() if m.node == receipt.node])
                    awaited.update(more)
                    deadline = max(deadline, _send(relay, more, peers))
        relay.post.recall()
    except Exception as error:  # whatever breaks in a control must not cost the rounds before it their summary
        say(f"control {kind}: broken off: {one_line(f'{type(error).__name__}: {error}')}")


def _send(relay: Relay, mails: Mapping[int, Mail], peers: int) -> float:
    """Send a control's mails; return until when their answers may take, on the clock of ``time.monotonic``."""
    rounds = max((max(1, mail.round) for mail in mails.values()), default=0) * peers
    relay.post.send(mails, rounds=rounds)
    return time.monotonic() + rounds * relay.config.round_timeout


def _possible(accuracy: float) -> bool:
    return 0 <= accuracy <= 1


def _last(own: Sequence[Row], name: str) -> float:
    """Return the last number that a peer told."""
    return next((value for row in reversed(own) if math.isfinite(value := getattr(row, name))), math.nan)


def _believed(name: str, value: float) -> float:
    return value if (_possible(value) if name in _SHARES else abs(value) < _MOST) else math.nan


def _peer_summary(own: Sequence[Row], m: Member, alone: Curve, shown: Curve) -> PeerSummary:
    measured = [row for row in own if math.isfinite(row.test_accuracy)]
    first, last = (measured[0], measured[-1]) if measured else (None, None)
    isolated = alone.at(last.round) if last else Measures()
    return PeerSummary(
        peer=m.name,
        model=m.model,
        parameters=m.parameters,
        samples=m.samples,
        held_out=m.held_out,
        before=first.test_accuracy if first else math.nan,
        after=last.test_accuracy if last else math.nan,
        own_before=first.own_accuracy if first else math.nan,
        own_after=last.own_accuracy if last else math.nan,
        isolated=isolated.test_accuracy,
        isolated_measures=isolated,
        channel=shown.at(last.round).test_accuracy if last else math.nan,
        **{name: _last(own, name) for name in ("temperature", "kd_weight", "samples_seen")},
        failures=dict(Counter(row.status for row in own if row.status != "ok")),
    )
