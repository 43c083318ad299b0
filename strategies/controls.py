"""The controls of a run, and its summary: what the peers would be without the exchange, and with all data."""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict

from fedkd.config import RunConfig
from fedkd.privacy import Mechanism
from fedkd.protocol import Kind, Mail, one_line
from fedkd.results import PeerSummary, Row, Summary, mean
from fedkd.rules import split_list
from strategies.post import Receipt
from strategies.relay import Relay
from strategies.roster import Member

Say = Callable[[str], None]


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
    isolated = _isolated(relay, config, say) if "isolated" in chosen else {}
    pooled = _pooled(relay, config, say) if "pooled" in chosen else math.nan
    rows: dict[str, list[Row]] = {m.name: [] for m in relay.members}
    for row in relay.rows:
        rows[row.peer].append(row)
    peers = [_peer_summary(rows[m.name], m, isolated.get(m.index, [])) for m in relay.members]
    topology = relay.strategy.topology
    return Summary(
        peers=peers,
        isolated=mean([peer.isolated for peer in peers]),
        isolated_by_round=[mean(column) for column in zip(*isolated.values(), strict=True)],
        pooled=pooled,
        pooled_model=config.pooled_model if math.isfinite(pooled) else "",
        totals={"rounds": max((row.round for row in relay.rows), default=0), **spent, "seconds": seconds},
        round_seconds=ledger.seconds,
        classes=relay.members[0].classes,
        topology={"name": topology.name, **asdict(topology.stats())} if topology else {},
        caveats=[caveat for m in relay.members if (caveat := m.caveat())],
        privacy=mechanism.statement() if (mechanism := Mechanism.from_config(config)) else {},
    )


def _isolated(relay: Relay, config: RunConfig, say: Say) -> dict[int, list[float]]:
    """Run every peer again without teachers; return its test accuracy by round, by index."""
    attended = relay.attended()
    mails = {m.node: relay.mail("isolated", config.rounds, rounds=attended[m.name]) for m in relay.ready()}
    found: dict[int, list[float]] = {}
    problems = dict.fromkeys(mails, "no answer")
    for receipt in _answers(relay, mails, "isolated", say):
        curve = receipt.answer.series.get("test_accuracy", []) if receipt.answer is not None else []
        if receipt.error:
            problems[receipt.node] = receipt.error
        elif len(curve) != config.rounds + 1 or not all(_possible(value) or math.isnan(value) for value in curve):
            problems[receipt.node] = f"expected an accuracy for each of the rounds 0 to {config.rounds}"
        else:
            problems.pop(receipt.node, None)
            found[relay.member(receipt).index] = list(curve)
    for m in relay.members:
        if m.node in problems:
            say(f"control isolated: no result from {m.name}: {problems[m.node]}")
    return found


def _pooled(relay: Relay, config: RunConfig, say: Say) -> float:
    """Train one model on all private data, where all peers are stand-ins on this machine."""
    ready = relay.ready()
    if not all(m.simulated for m in relay.members) or not ready:
        say("control pooled: left out, since no real peer may see the others' data")
        return math.nan
    problem = "no answer"
    mails = {ready[0].node: relay.mail("pooled", config.rounds)}
    for receipt in _answers(relay, mails, "pooled", say):
        accuracy = receipt.answer.metrics.get("test_accuracy", math.nan) if receipt.answer is not None else math.nan
        if not receipt.error and _possible(accuracy):
            return accuracy
        problem = receipt.error or f"expected a test accuracy in [0, 1], but got {accuracy}"
    say(f"control pooled: no result: {problem}")
    return math.nan


def _answers(relay: Relay, mails: Mapping[int, Mail], kind: Kind, say: Say) -> Iterator[Receipt]:
    """Yield what comes back to a control's mails, and nothing that is late from a round."""
    try:
        for receipt in relay.exchange(mails):
            if receipt.mail.kind == kind:
                yield receipt
    except Exception as error:  # whatever breaks in a control must not cost the rounds before it their summary
        say(f"control {kind}: broken off: {one_line(f'{type(error).__name__}: {error}')}")


def _possible(accuracy: float) -> bool:
    return 0 <= accuracy <= 1


def _peer_summary(own: Sequence[Row], m: Member, isolated: Sequence[float]) -> PeerSummary:
    measured = [row for row in own if math.isfinite(row.test_accuracy)]
    first, last = (measured[0], measured[-1]) if measured else (None, None)
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
        isolated=isolated[-1] if isolated else math.nan,
        temperature=own[-1].temperature if own else math.nan,
        kd_weight=own[-1].kd_weight if own else math.nan,
        failures=dict(Counter(row.status for row in own if row.status != "ok")),
    )
