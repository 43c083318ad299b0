"""Who takes part: the peers as they introduced themselves, checked against one another."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedkd.errors import FedkdError
from fedkd.source import source_hash, source_root
from fedkd.wire.messages import Answer, one_line

_MOST = 10**15
_SHOWN = 200  # characters of what a peer said


class RosterError(FedkdError):
    """The peers cannot work together."""


@dataclass(frozen=True)
class Member:
    """One peer as the relay knows it.

    Attributes:
        node: its address for the post, good for this run only: Flower's node id, or its number where peers share nodes.
        name: the peer's own.
        index: its number among the peers.
        model: the name of its model.
        parameters: the size of its model.
        samples: how many private samples it trains on; ``held_out``: how many more it never trains on.
        chosen_unseen: whether what is chosen by accuracy there is known to be chosen on data its model has not seen.
        classes: the names of its classes, in order.
        fingerprint: hash of its proxy set.
        proxy_shape: of that, ``[P, ...]``.
        expected: how many peers it was told there are.
        simulated: whether it is a stand-in on this machine.
        public_key: to seal mail for it, and who vouches for it; empty unless mail is sealed.
    """

    node: int
    name: str
    index: int
    model: str
    parameters: int
    samples: int
    classes: tuple[str, ...]
    fingerprint: str
    proxy_shape: tuple[int, ...]
    expected: int
    simulated: bool
    public_key: str = ""
    held_out: int = 0
    chosen_unseen: bool = True

    def caveat(self) -> str:
        """Return what has to be said beside this peer's results; empty if nothing."""
        if self.chosen_unseen:
            return ""
        known = f"checkpoint of peer {self.name}: no held-out part is known"
        return f"{known}; what is chosen on it may have been trained on"

    def key_fingerprint(self) -> str:
        """Return the fingerprint of who vouches for its key, or of the key itself."""
        from fedkd.wire.identities import Credential

        return Credential.parse(self.public_key).fingerprint


def member(node: int, answer: Answer, *, sealed: bool = False) -> Member:
    """Read an introduction.

    Args:
        node: the address that it came from.
        answer: the introduction.
        sealed: whether mail is sealed, so that the peer needs a public key.

    Raises:
        RosterError: it lacks something or says what cannot be, or the peer runs other code than the relay.
    """
    facts = answer.facts
    try:
        if facts["source"] != source_hash():
            where = facts["source-root"] and f" from {facts['source-root']}"  # real peers keep that to themselves
            raise RosterError(
                f"{answer.peer} runs other code than the relay: {facts['source']}{where}, "
                f"here {source_hash()} from {source_root()}. Stop the SuperLink that was started elsewhere, or use "
                "`fedkd run`, which starts one of its own."
            )
        return Member(
            node=node,
            name=answer.peer,
            index=_whole(facts, "index"),
            model=str(facts["model"]),
            parameters=_whole(facts, "parameters"),
            samples=_whole(facts, "samples"),
            classes=_classes(str(facts["classes"])),
            fingerprint=str(facts["fingerprint"]),
            proxy_shape=_shape(str(facts["proxy-shape"])),
            expected=_whole(facts, "peers"),
            simulated=bool(facts["simulated"]),
            public_key=_public_key(str(facts.get("public-key", ""))) if sealed else "",
            held_out=_whole(facts, "held-out"),
            chosen_unseen=bool(facts["chosen-unseen"]),
        )
    except KeyError as error:
        raise RosterError(f"{answer.peer} introduced itself without {error}") from error
    except ValueError as error:
        raise RosterError(f"{answer.peer} introduced itself wrongly: {error}") from error


def roster(members: Sequence[Member]) -> list[Member]:
    """Return the members in the order of their indices.

    Raises:
        RosterError: there are none, two share a name or an index, the indices are not 0, 1, 2 ..., or a peer's proxy
            set or classes differ from those of the majority; every such peer is named with what differs.
    """
    if not members:
        raise RosterError("no peer takes part: every node's `partition-id` is too high for this run's `peers`")
    for what in ("name", "index"):
        counts = Counter(getattr(m, what) for m in members)
        twice = sorted(value for value, count in counts.items() if count > 1)
        if twice:
            whose = ", ".join(sorted(m.name for m in members if getattr(m, what) == twice[0]))
            raise RosterError(f"two peers share the {what} {twice[0]}: {whose}")
    if beyond := [f"{m.name} has {m.index}" for m in members if m.index >= len(members)]:
        needed = f"{len(members)} peers need the indices 0 to {len(members) - 1} (`partition-id`)"
        raise RosterError(f"{needed}, but {', '.join(beyond)}")
    complaints = []
    named = set()
    for what, label in (("proxy_shape", "proxy set"), ("fingerprint", "proxy set"), ("classes", "classes")):
        (common, _), *others = Counter(getattr(m, what) for m in members).most_common()
        differing = [m for m in members if others and getattr(m, what) != common and (m.name, label) not in named]
        named |= {(m.name, label) for m in differing}
        cure = " (one without samples needs an empty folder, or its name in `classes`)" if what == "classes" else ""
        complaints += [
            f"{m.name}'s {label} {_short(getattr(m, what))} differ from the others' {_short(common)}{cure}"
            for m in differing
        ]
    if complaints:
        raise RosterError("; ".join(complaints))
    return sorted(members, key=lambda m: m.index)


def expected(members: Sequence[Member]) -> int:
    """Return how many peers there are, as most members say; of several answers as common, the smallest."""
    counts = Counter(m.expected for m in members)
    return min(counts, key=lambda value: (-counts[value], value), default=0)


def _whole(facts: Mapping[str, str | int], name: str) -> int:
    value = facts[name]
    if type(value) is not int or not 0 <= value <= _MOST:
        raise ValueError(f"`{name}` is a whole number from 0 to {_MOST}, not {_short(value)}")
    return value


def _classes(text: str) -> tuple[str, ...]:
    try:
        found = json.loads(text)
    except RecursionError as error:
        raise ValueError("`classes` is a list of names, not a tower of brackets") from error
    if not isinstance(found, list) or not found or not all(isinstance(name, str) for name in found):
        raise ValueError(f"`classes` is a list of names, not {_short(text)}")
    return tuple(one_line(name) for name in found)


def _shape(text: str) -> tuple[int, ...]:
    try:
        found = json.loads(text)
    except RecursionError as error:
        raise ValueError("`proxy-shape` is a list of sizes, not a tower of brackets") from error
    if not isinstance(found, list) or not found or not all(type(side) is int and 1 <= side <= _MOST for side in found):
        raise ValueError(f"`proxy-shape` is a list of sizes, not {_short(text)}")
    return tuple(found)


def _public_key(text: str) -> str:
    from fedkd.wire.identities import Credential  # only sealed mail pays for the import of the ciphers
    from fedkd.wire.sealing import Keys, SealError

    try:
        Keys.generate().shared_with(Credential.parse(text).public, whose="the peer")
    except SealError as error:
        raise ValueError(f"`public-key` {_short(text)!r}: {error}") from error
    return text


def _short(value: object) -> str:
    return one_line(str(value), _SHOWN)
