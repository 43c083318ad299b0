"""The controls of a run, and its summary: what the peers would be without the exchange, and with all data."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict

from fedkd.config import RunConfig, split_list
from fedkd.results import PeerSummary, Row, Summary
from strategies.relay import Relay
from strategies.roster import Member


def conclude(relay: Relay, config: RunConfig, *, seconds: float, say: Callable[[str], None] = print) -> Summary:
    """Run the controls that a run asks for and sum it up.

    Args:
        relay: after its last round.
        config: the run's settings.
        seconds: wall time of the run so far.
        say: prints one line.
    """
    ledger, chosen = relay.ledger, split_list(config.controls)
    spent = {"bytes_up": ledger.bytes_up, "bytes_down": ledger.bytes_down}  # the controls are not charged
    isolated = _isolated(relay, config, say) if "isolated" in chosen else {}
    pooled = _pooled(relay, config, say) if "pooled" in chosen else math.nan
    peers = [_peer_summary(relay.rows, m, isolated.get(m.index, [])) for m in relay.members]
    topology = relay.strategy.topology
    return Summary(
        peers=peers,
        isolated=_mean([peer.isolated for peer in peers]),
        isolated_by_round=[_mean(column) for column in zip(*isolated.values(), strict=True)],
        pooled=pooled,
        pooled_model=config.pooled_model if math.isfinite(pooled) else "",
        totals={"rounds": max((row.round for row in relay.rows), default=0), **spent, "seconds": seconds},
        round_seconds=ledger.seconds,
        topology={"name": topology.name, **asdict(topology.stats())} if topology else {},
    )


def _isolated(relay: Relay, config: RunConfig, say: Callable[[str], None]) -> dict[int, list[float]]:
    """Run every peer again without teachers; return its test accuracy by round, by index."""
    mails = {m.node: relay.mail("isolated", config.rounds) for m in relay.ready()}
    found: dict[int, list[float]] = {}
    for receipt in relay.exchange(mails):
        if receipt.answer is None or receipt.error:
            say(f"control isolated: no result from {relay.member(receipt).name}: {receipt.error}")
        elif receipt.mail.kind == "isolated":
            found[relay.member(receipt).index] = list(receipt.answer.series["test_accuracy"])
    return found


def _pooled(relay: Relay, config: RunConfig, say: Callable[[str], None]) -> float:
    """Train one model on all private data, where all peers are stand-ins on this machine."""
    ready = relay.ready()
    if not all(m.simulated for m in relay.members) or not ready:
        say("control pooled: left out, since no real peer may see the others' data")
        return math.nan
    for receipt in relay.exchange({ready[0].node: relay.mail("pooled", config.rounds)}):
        if receipt.mail.kind == "pooled" and receipt.answer is not None and not receipt.error:
            return receipt.answer.metrics["test_accuracy"]
        say(f"control pooled: no result: {receipt.error}")
    return math.nan


def _peer_summary(rows: Sequence[Row], m: Member, isolated: Sequence[float]) -> PeerSummary:
    own = [row for row in rows if row.peer == m.name]
    measured = [row for row in own if math.isfinite(row.test_accuracy)]
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
        temperature=own[-1].temperature if own else math.nan,
        kd_weight=own[-1].kd_weight if own else math.nan,
        failures=dict(Counter(row.status for row in own if row.status != "ok")),
    )


def _mean(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan
