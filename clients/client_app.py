"""The Flower ClientApp: unpacks mail, hands it to a peer, packs the answer.

Imports no torch at the top: a deployed SuperNode starts a process for every message. A handler catches
everything and always answers, because one that raises, exits or returns nothing wedges or poisons Flower.
"""

import sys
import traceback
from pathlib import Path

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedkd.errors import FedkdError
from fedkd.protocol import Answer, BadMessage, Mail, pack_answer, unpack_mail

app = ClientApp()


@app.train("mail")
def on_mail(message: Message, context: Context) -> Message:
    """Answer one mail."""
    return Message(pack_answer(_answer(message.content, context)), reply_to=message)


def _answer(content: RecordDict, context: Context) -> Answer:
    name = peer_name(context)
    try:
        mail = unpack_mail(content)
    except BadMessage as error:
        return Answer(name, 0, error=str(error))
    try:
        return _peer_answer(mail, context)
    except FedkdError as error:
        return Answer(name, mail.round, error=str(error))
    except Exception as error:
        traceback.print_exc()
        return Answer(name, mail.round, error=f"{type(error).__name__}: {error}")


def _peer_answer(mail: Mail, context: Context) -> Answer:
    from clients.peer import Peer
    from clients.site import Place
    from fedkd.config import RunConfig

    config = RunConfig.from_mapping(mail.settings)
    own = context.node_config
    name = peer_name(context)
    root = Path(str(own["state-dir"])) if "state-dir" in own else _state_root(mail)
    place = Place(
        name=name,
        index=int(own.get("partition-id", 0)),
        of=int(own.get("num-partitions", 1)),
        state_dir=root / name,
        cache_dir=root,
        simulated=_in_simulation() or bool(own.get("simulated", False)),
        model=str(own.get("model", "")),
        checkpoint=str(own.get("checkpoint", "")),
        dataset=str(own.get("dataset", "")),
    )
    return Peer(place, config, mail.run).answer(mail)


def peer_name(context: Context) -> str:
    """Return a peer's name: its own choice, else its partition's number, else Flower's node id."""
    own = context.node_config
    if "name" in own:
        return str(own["name"])
    return f"peer-{own['partition-id']}" if "partition-id" in own else f"node-{context.node_id}"


def _in_simulation() -> bool:
    """Tell whether this process is a Ray worker: the process knows, the server is not asked."""
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())


def _state_root(mail: Mail) -> Path:
    if _in_simulation():
        return Path(mail.state_dir)
    return Path("~/.local/state/fedkd").expanduser()
