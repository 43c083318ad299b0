"""Who takes part: the peers as they introduced themselves, checked against one another."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from fedkd.errors import FedkdError
from fedkd.protocol import Answer
from fedkd.source import source_hash, source_root


class RosterError(FedkdError):
    """The peers cannot work together."""


@dataclass(frozen=True)
class Member:
    """One peer as the relay knows it.

    Attributes:
        node: Flower's node id, good for this run only.
        name: the peer's own.
        index: its number among the peers.
        model: the name of its model.
        parameters: the size of its model.
        samples: how many private samples it holds.
        classes: the names of its classes, in order.
        fingerprint: hash of its proxy set.
        expected: how many peers it was told there are.
        simulated: whether it is a stand-in on this machine.
        public_key: to seal mail for it, in hex; empty unless mail is sealed.
    """

    node: int
    name: str
    index: int
    model: str
    parameters: int
    samples: int
    classes: tuple[str, ...]
    fingerprint: str
    expected: int
    simulated: bool
    public_key: str = ""


def member(node: int, answer: Answer) -> Member:
    """Read an introduction.

    Raises:
        RosterError: it lacks something, or the peer runs other code than the relay.
    """
    facts = answer.facts
    try:
        if facts["source"] != source_hash():
            raise RosterError(
                f"{answer.peer} runs other code than the relay: {facts['source']} from {facts['source-root']}, "
                f"here {source_hash()} from {source_root()}. Stop the SuperLink that was started elsewhere, or use "
                "`fedkd run`, which starts one of its own."
            )
        return Member(
            node=node,
            name=answer.peer,
            index=int(facts["index"]),
            model=str(facts["model"]),
            parameters=int(facts["parameters"]),
            samples=int(facts["samples"]),
            classes=tuple(json.loads(str(facts["classes"]))),
            fingerprint=str(facts["fingerprint"]),
            expected=int(facts["peers"]),
            simulated=bool(facts["simulated"]),
            public_key=str(facts.get("public-key", "")),
        )
    except (KeyError, ValueError, TypeError) as error:
        raise RosterError(f"{answer.peer} introduced itself incompletely: {error!r}") from error


def roster(members: Sequence[Member]) -> list[Member]:
    """Return the members in the order of their indices.

    Raises:
        RosterError: two share a name or an index, or a peer's proxy set or classes differ from those of the
            majority; every such peer is named with what differs.
    """
    for what in ("name", "index"):
        counts = Counter(getattr(m, what) for m in members)
        twice = sorted(str(value) for value, count in counts.items() if count > 1)
        if twice:
            raise RosterError(f"two peers share the {what} {', '.join(twice)}")
    complaints = []
    for what, label in (("fingerprint", "proxy set"), ("classes", "classes")):
        (common, _), *others = Counter(getattr(m, what) for m in members).most_common()
        if others:
            complaints += [
                f"{m.name}'s {label} {getattr(m, what)} differ from the others' {common}"
                for m in members
                if getattr(m, what) != common
            ]
    if complaints:
        raise RosterError("; ".join(complaints))
    return sorted(members, key=lambda m: m.index)
