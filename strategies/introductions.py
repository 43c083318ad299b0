"""The first exchange of a run: peers check everything they can before anyone trains, and say who they are."""

import time
from collections.abc import Iterable

from fedkd.config import RunConfig
from fedkd.protocol import Mail
from strategies.post import Post, Receipt
from strategies.relay import RelayError, same_said_once
from strategies.roster import Member, member, roster

_NODE_WAIT = 0.1  # seconds between looks at the list of nodes
_SETTLED = 10  # looks without a newcomer after which a federation of unknown size is taken as complete


def introduce(post: Post, config: RunConfig, *, run: str, state_dir: str) -> list[Member]:
    """Wait for the peers and have each introduce itself; return them by index.

    Args:
        post: carries the messages.
        config: the run's settings; ``peers`` says how many take part, and nodes with a higher number stay spare;
            0: as many as the first say there are.
        run: the token of this run.
        state_dir: where simulated peers keep their state.

    Raises:
        FedkdError: a setting is wrong for a peer, the peers do not fit one another, or too few come in time.
    """
    mail = Mail("introduce", 0, config.to_mapping(), run, state_dir=state_dir)
    members: list[Member] = []
    met: set[int] = set()
    missing = config.peers
    while missing > 0 or not met:
        nodes = set(_wait_for_nodes(post, config, len(met) + missing))
        members += _introductions(post, config, nodes - met, mail)
        met |= nodes
        missing = max((m.expected for m in members), default=config.peers) - len(members)
    return roster(members)


def _wait_for_nodes(post: Post, config: RunConfig, count: int) -> list[int]:
    """Wait for ``count`` nodes; for 0, until some are there and no more have come for a while."""
    deadline = time.monotonic() + config.round_timeout
    seen, quiet = -1, 0
    while True:
        nodes = post.nodes()
        quiet = quiet + 1 if len(nodes) == seen else 0
        seen = len(nodes)
        if (count and seen >= count) or (not count and nodes and quiet >= _SETTLED):
            return nodes
        if time.monotonic() > deadline and (count or not nodes):
            raise RelayError(f"{seen} of {count or 'at least 1'} peers connected in time (`round-timeout`)")
        time.sleep(_NODE_WAIT)


def _introductions(post: Post, config: RunConfig, nodes: Iterable[int], mail: Mail) -> list[Member]:
    mails = dict.fromkeys(nodes, mail)
    post.send(mails)
    receipts = list(post.receive(mails, deadline=time.monotonic() + config.round_timeout))
    if problems := [(_sender(receipt), receipt.error) for receipt in receipts if receipt.error]:
        raise RelayError(same_said_once(problems))
    if silent := len(mails) - len(receipts):
        raise RelayError(f"{silent} peers did not introduce themselves in time (`round-timeout`)")
    return [member(r.node, r.answer) for r in receipts if r.answer is not None and "spare" not in r.answer.facts]


def _sender(receipt: Receipt) -> str:
    return receipt.answer.peer if receipt.answer is not None else f"node {receipt.node}"
