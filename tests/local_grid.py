"""An in-process Flower grid: runs ServerApp and ClientApp without SuperLink or Ray, in milliseconds a message."""

import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

Fault = Callable[[int, Message], Any]


class LocalGrid(Grid):
    """Nodes are called when they are pushed to; their replies wait to be pulled.

    Args:
        app: the ClientApp of every node.
        nodes: how many.
        state_dir: each node keeps its state there.
        node_config: by partition, what a node's own configuration adds.

    Attributes:
        fault: called with (partition, message) first: may return a reply of its own, ``nothing`` for none, raise (an
            error reply), or return None for the app's own answer.
        silent: partitions that never answer.
    """

    nothing = object()
    state = None  # as in Flower's own simulation, whose messages do not leave the process

    def __init__(
        self, app: ClientApp, nodes: int, state_dir: Path, *, node_config: dict[int, dict[str, Any]] | None = None
    ) -> None:
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1  # else no message can be made
        self.app = app
        self.fault: Fault | None = None
        self.silent: set[int] = set()
        self.sent: list[Message] = []  # everything the relay pushed
        self.replies: list[Message] = []  # everything the nodes answered
        self._ids = [1000 + 7 * i for i in range(nodes)]
        self._contexts = {
            id_: Context(
                run_id=1,
                node_id=id_,
                node_config={
                    "partition-id": i, "num-partitions": nodes, "state-dir": str(state_dir), "simulated": True,
                    **(node_config or {}).get(i, {}),
                },
                state=RecordDict(),
                run_config={},
            )
            for i, id_ in enumerate(self._ids)
        }  # fmt: skip
        self._waiting: dict[str, Message] = {}

    def set_run(self, run: Run) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Run:
        raise NotImplementedError

    def create_message(self, content, message_type, dst_node_id, group_id, ttl=None) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        return list(self._ids)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            id_ = uuid.uuid4().hex
            message.metadata.__dict__["_message_id"] = id_
            ids.append(id_)
            self.sent.append(message)
            reply = self._reply(message)
            if reply is not None:
                self.replies.append(reply)
                self._waiting[id_] = reply
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self._waiting.pop(id_) for id_ in message_ids if id_ in self._waiting]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        return self.pull_messages(self.push_messages(messages))

    def answer(self, partition: int, message: Message) -> Message:
        """Return what the app of a node really answers."""
        return self.app(message, self._contexts[self._ids[partition]])

    def forget(self) -> None:
        """Lose the replies that wait, as a SuperLink's are lost to a new run."""
        self._waiting.clear()

    def deliver(self, message: Message, reply: Message) -> None:
        """Let a held-back reply arrive."""
        self._waiting[message.metadata.message_id] = reply

    def _reply(self, message: Message) -> Message | None:
        partition = self._ids.index(message.metadata.dst_node_id)
        if partition in self.silent:
            return None
        try:
            faulty = self.fault(partition, message) if self.fault else None
            if faulty is self.nothing:
                return None
            return faulty or self.answer(partition, message)
        except Exception as error:
            return Message(Error(code=2, reason=str(error)), reply_to=message)
