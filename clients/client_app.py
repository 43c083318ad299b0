"""The Flower ClientApp: hands a mail to a peer, in this process or in the peer's resident worker.

Imports no torch at the top: a deployed SuperNode starts a process for every message. A handler catches
everything and always answers, because one that raises, exits or returns nothing wedges or poisons Flower.
"""

import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from clients.answering import always, answer, check, discreetly, frankly, round_of, telling
from clients.configuration import PeerConfig
from clients.own_settings import Own, own_settings, without_paths
from fedkd.settings.config import RunConfig
from fedkd.wire.messages import seat_of

if TYPE_CHECKING:
    from clients.peer import Peer

app = ClientApp()


@app.train("mail")
def on_mail(message: Message, context: Context) -> Message:
    """Answer one mail."""
    content, simulated = message.content, _in_simulation() or bool(context.node_config.get("simulated", False))
    node_config: Own = {**context.node_config, **(seat_of(content) if simulated else {})}
    tell = frankly if simulated else partial(discreetly, conceal=partial(without_paths, own=node_config))
    reply = always(
        lambda: _reply(content, node_config, context.node_id, message.metadata.ttl, simulated=simulated),
        peer_name(node_config, context.node_id),  # for when its own configuration cannot be read
        round_of(content),
        tell,
    )
    return Message(reply, reply_to=message)


def _reply(content: RecordDict, node_config: Own, node_id: int, time_to_live: float, *, simulated: bool) -> RecordDict:
    own = own_settings(node_config)
    peer_config = PeerConfig.of_own(
        own, name=peer_name(own, node_id), root=_state_root(content, simulated), simulated=simulated
    )
    if simulated or not peer_config.worker:
        return answer(content, peer_config, _peer)
    work = partial(_ask_worker, content, peer_config, own, time_to_live)
    return always(work, peer_config.name, round_of(content), telling(peer_config))


def _ask_worker(content: RecordDict, peer_config: PeerConfig, own: Own, time_to_live: float) -> RecordDict:
    from clients.worker_client import ask

    check(content, peer_config)  # what is refused needs no worker
    return ask(content, peer_config, own, seconds=min(time_to_live, peer_config.limits.seconds))


def _peer(peer_config: PeerConfig, config: RunConfig, run: str) -> "Peer":
    from clients.peer import Peer

    return Peer(peer_config, config, run)


def peer_name(own: Own, node_id: int) -> str:
    """Return a peer's name: its own choice, else its partition's number, else Flower's node id."""
    if "name" in own:
        return str(own["name"])
    return f"peer-{own['partition-id']}" if "partition-id" in own else f"node-{node_id}"


def _in_simulation() -> bool:
    """Tell whether this process is a Ray worker: the process knows, the server is not asked."""
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())


def _state_root(content: RecordDict, simulated: bool) -> Path:
    """Return where a peer's state goes that names no folder itself."""
    head = content.config_records.get("mail")
    if simulated and head is not None:
        return Path(str(head.get("state-dir", "")))
    return Path("~/.local/state/fedkd").expanduser()
