"""The first exchange of a run: peers check everything they can before anyone trains, and say who they are.

Every peer that takes part has to introduce itself: its index is its place in the data partition and in the topology,
so that a run cannot begin around a gap, and what it would have said is a wrong setting that all have to know before
they train. A silent or broken node is left out only where it is one too many.
"""

import time
from collections.abc import Iterable, Sequence

from fedkd.errors import SettingError
from fedkd.settings.config import RunConfig
from fedkd.wire.messages import Mail
from strategies.relay.post import Post
from strategies.relay.roster import Member, expected, member, roster
from strategies.relay.rounds import RelayError, same_said_once

_NODE_WAIT = 0.05  # seconds between looks at the list of nodes
_AT_FIRST, _SETTLED = 2, 20  # looks without a newcomer after which those that came are asked, and taken to be all


def introduce(post: Post, config: RunConfig, *, run: str, state_dir: str) -> list[Member]:
    """Wait for the peers and have each introduce itself; return them by index.

    Args:
        post: carries the messages.
        config: the run's settings; ``peers`` says how many take part, and nodes with a higher number stay spare;
            0: as many as most of them say there are, in a simulation. Where that has fewer nodes, peers share them.
        run: the token of this run.
        state_dir: where simulated peers keep their state.

    Raises:
        FedkdError: a setting is wrong for a peer, the peers do not fit one another, or too few come in time.
    """
    if not config.peers and not post.simulated:
        allowed = "how many take part, between real sites: whoever comes first could say that there are no others"
        raise SettingError("peers", 0, allowed)
    if post.simulated and 0 < _settled_nodes(post, config) < config.peers:
        post.share_nodes(config.peers)
    mail = Mail("introduce", 0, config.to_mapping(), run, state_dir=state_dir)
    members: list[Member] = []
    met: set[int] = set()
    missing = config.peers
    while missing > 0 or not met:
        newcomers = _wait_for_newcomers(post, config, met, missing)
        members += _introductions(post, config, newcomers, mail, known=members)
        met |= newcomers
        missing = _count(members, config) - len(members)
    found = roster(members)
    post.keep_to(m.node for m in found)  # one too many may still introduce itself, and is nobody's member
    return found


def _settled_nodes(post: Post, config: RunConfig) -> int:
    """Return how many nodes a simulation has, or the first enough of them; it makes all of them at its start."""
    deadline = time.monotonic() + config.round_timeout
    seen, quiet = len(post.nodes()), 0
    while seen < config.peers and quiet < _AT_FIRST and time.monotonic() < deadline:
        time.sleep(_NODE_WAIT)
        found = len(post.nodes())
        quiet = quiet + 1 if found == seen > 0 else 0
        seen = found
    return seen


def _count(members: Sequence[Member], config: RunConfig) -> int:
    """Return how many peers take part, as far as is known yet."""
    return config.peers or expected(members)


def _complete(members: Sequence[Member], config: RunConfig) -> bool:
    return 0 < len(members) == _count(members, config) and {m.index for m in members} == set(range(len(members)))


def _wait_for_newcomers(post: Post, config: RunConfig, met: set[int], missing: int) -> set[int]:
    """Wait for nodes that have not been met: as many as are missing.

    Where only the peers know how many they are, the first that come are asked: they know for how many more to wait.
    One that errs must not make the others wait for peers that do not exist: newcomers are returned too once no more
    have come for a while.
    """
    deadline = time.monotonic() + config.round_timeout
    seen, quiet = -1, 0
    while True:
        newcomers = set(post.nodes()) - met
        quiet = quiet + 1 if len(newcomers) == seen else 0
        seen = len(newcomers)
        settled = not config.peers and quiet >= (_SETTLED if met else _AT_FIRST)
        if newcomers and ((missing and seen >= missing) or settled):
            return newcomers
        if time.monotonic() > deadline and (config.peers or not newcomers):
            lack = missing - seen if missing else "at least 1"
            raise RelayError(f"{len(met) + seen} nodes connected in time (`round-timeout`), but {lack} more is needed")
        time.sleep(_NODE_WAIT)


def _introductions(
    post: Post, config: RunConfig, nodes: Iterable[int], mail: Mail, *, known: Sequence[Member]
) -> list[Member]:
    mails = dict.fromkeys(nodes, mail)
    post.send(mails)
    receipts = list(post.receive(mails, deadline=time.monotonic() + config.round_timeout))
    if problems := [(r.answer.peer, r.error) for r in receipts if r.answer is not None and r.error]:
        raise RelayError(same_said_once(problems, of=len(mails)))
    found = [
        member(r.node, r.answer, sealed=config.sealed)
        for r in receipts
        if r.answer is not None and "spare" not in r.answer.facts
    ]
    if _complete([*known, *found], config):
        return found
    silent = mails.keys() - {receipt.node for receipt in receipts}
    problems = [(f"node {receipt.node}", receipt.error) for receipt in receipts if receipt.error]
    problems += [(f"node {node}", "no introduction in time (`round-timeout`)") for node in sorted(silent)]
    if problems:
        raise RelayError(same_said_once(problems, of=len(mails)))
    return found
