"""A Flower message's content on a local socket: a JSON head, then the arrays' bytes. Nothing is pickled."""

import json
import socket
import struct
from collections.abc import Mapping
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fedkd.errors import FedkdError

_LENGTHS = struct.Struct("!QQ")  # of the head and of the body, in bytes
_MAX_HEAD = 64 * 2**20


class BadFrame(FedkdError):
    """The other side closed the connection, or sent something else than a frame."""


def send(connection: socket.socket, note: Mapping[str, Any], content: RecordDict) -> None:
    """Send a content, and a note to it.

    Args:
        connection: a connected stream socket.
        note: anything that JSON can hold.
        content: a mail or an answer.

    Raises:
        OSError: the other side is gone.
        BadFrame: the content holds raw bytes outside its arrays.
    """
    arrays = {name: dict(record) for name, record in content.array_records.items()}
    head = {
        "note": dict(note),
        "configs": {name: dict(record) for name, record in content.config_records.items()},
        "metrics": {name: dict(record) for name, record in content.metric_records.items()},
        "arrays": {
            name: [[key, a.dtype, a.shape, a.stype, len(a.data)] for key, a in record.items()]
            for name, record in arrays.items()
        },
    }
    try:
        encoded = json.dumps(head).encode()
    except TypeError as error:
        raise BadFrame(f"expected text and numbers in a message's records: {error}") from error
    bodies = [array.data for record in arrays.values() for array in record.values()]
    connection.sendall(_LENGTHS.pack(len(encoded), sum(map(len, bodies))) + encoded)
    for body in bodies:
        connection.sendall(body)


def receive(connection: socket.socket) -> tuple[dict[str, Any], RecordDict]:
    """Receive what :func:`send` sent: the note and the content.

    Raises:
        OSError: the connection broke, or its time is over.
        BadFrame: it was closed, or this is no frame.
    """
    head_size, body_size = _LENGTHS.unpack(_exactly(connection, _LENGTHS.size))
    if head_size > _MAX_HEAD:
        raise BadFrame(f"expected a head of at most {_MAX_HEAD} bytes, but got {head_size}")
    encoded, body = _exactly(connection, head_size), memoryview(_exactly(connection, body_size))
    try:
        head = json.loads(bytes(encoded))
        content = RecordDict()
        for name, values in head["configs"].items():
            content[name] = ConfigRecord(values)
        for name, values in head["metrics"].items():
            content[name] = MetricRecord(values)
        at = 0
        for name, entries in head["arrays"].items():
            record = ArrayRecord()
            for key, dtype, shape, stype, size in entries:
                record[key] = Array(dtype=dtype, shape=tuple(shape), stype=stype, data=bytes(body[at : at + size]))
                at += size
            content[name] = record
        return dict(head["note"]), content
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadFrame(f"expected a frame: {error!r}") from error


def _exactly(connection: socket.socket, size: int) -> bytearray:
    received = bytearray(size)
    view, at = memoryview(received), 0
    while at < size:
        count = connection.recv_into(view[at:])
        if count == 0:
            raise BadFrame(f"the connection was closed after {at} of {size} bytes")
        at += count
    return received
