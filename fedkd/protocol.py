"""The messages between relay and peers: the one file that both sides of the wire import.

A :class:`Mail` goes from the relay to a peer, an :class:`Answer` comes back; a :class:`Letter` is one
peer's encoded knowledge inside a mail. Everything is checked while it is unpacked: a message that does not
have exactly this form raises :class:`BadMessage`, which names what was found and what was expected.
Nothing is unpickled: arrays are npy without objects, everything else is text and numbers.
"""

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fedkd.errors import FedkdError

PEER_MESSAGE = "train.mail"
Kind = Literal["introduce", "start", "learn", "isolated", "pooled", "merge"]
Scalar = str | int | float | bool
Arrays = Mapping[str, np.ndarray]

_LETTER = "letter."
_MAX_ARRAYS = 4096


class BadMessage(FedkdError):
    """A message that does not have the form this protocol gives it."""


@dataclass(frozen=True)
class Letter:
    """One peer's knowledge.

    Attributes:
        sender: the peer's name.
        round: the round at whose end the sender predicted it.
        arrays: its logits as the codec encoded them.
        weight: how much it counts among the receiver's teachers, >= 0.
    """

    sender: str
    round: int
    arrays: Arrays
    weight: float = 1.0


@dataclass(frozen=True)
class Mail:
    """What the relay sends to one peer.

    Attributes:
        kind: what the peer is asked to do.
        round: the round, counted from 1; 0 is the start.
        settings: the run's settings.
        run: a token of this run, the same when it is resumed: state and sealed mail of another run are refused.
        letters: the knowledge of the peer's teachers.
        keys: the public keys of all peers in hex, by name in the order of their indices, when mail is sealed.
        state_dir: where a simulated peer keeps its state; a deployed peer uses its own folder and ignores it.
    """

    kind: Kind
    round: int
    settings: Mapping[str, Scalar]
    run: str = ""
    letters: tuple[Letter, ...] = ()
    keys: Mapping[str, str] = field(default_factory=dict)
    state_dir: str = ""


@dataclass(frozen=True)
class Answer:
    """What a peer sends back.

    Attributes:
        peer: the peer's name.
        round: the round of the mail it answers.
        facts: text and whole numbers about the peer (its introduction).
        metrics: numbers it measured; NaN stands for "not measured in this round".
        series: metrics by round (the isolated control's curve).
        arrays: its knowledge as the codec encoded it; empty where none was asked for.
        error: why the peer refused the mail; empty if it did not.
    """

    peer: str
    round: int
    facts: Mapping[str, str | int] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    series: Mapping[str, Sequence[float]] = field(default_factory=dict)
    arrays: Arrays = field(default_factory=dict)
    error: str = ""


def wire_bytes(content: RecordDict) -> int:
    """Return the bytes of all encoded arrays in a message, as they travel (npy headers included)."""
    return sum(len(array.data) for record in content.array_records.values() for array in record.values())


def pack_mail(mail: Mail) -> RecordDict:
    """Turn a mail into a Flower message's content."""
    content = RecordDict(
        {
            "mail": ConfigRecord(
                {"kind": mail.kind, "round": mail.round, "run": mail.run, "state-dir": mail.state_dir}
            ),
            "settings": ConfigRecord(dict(mail.settings)),
            "keys": ConfigRecord(dict(mail.keys)),
            "senders": ConfigRecord(
                {
                    "names": [letter.sender for letter in mail.letters],
                    "rounds": [letter.round for letter in mail.letters],
                    "weights": [float(letter.weight) for letter in mail.letters],
                }
            ),
        }
    )
    for position, letter in enumerate(mail.letters):
        content[f"{_LETTER}{position}"] = _to_record(letter.arrays)
    return content


def unpack_mail(content: RecordDict) -> Mail:
    """Read a mail; raise :class:`BadMessage` if it does not have the form."""
    head, senders = _config(content, "mail"), _config(content, "senders")
    kind = _text(head, "kind")
    if kind not in get_args(Kind):
        raise BadMessage(f"Expected `kind` to be one of {', '.join(get_args(Kind))}, but got {kind!r}.")
    names, rounds, weights = (
        _list(senders, name, type_) for name, type_ in (("names", str), ("rounds", int), ("weights", float))
    )
    if not len(names) == len(rounds) == len(weights):
        raise BadMessage(
            f"Expected one name, round and weight per letter, but got {len(names)}, {len(rounds)}, {len(weights)}."
        )
    letters = tuple(
        Letter(name, _round(sent), _from_record(content, f"{_LETTER}{position}"), _weight(weight))
        for position, (name, sent, weight) in enumerate(zip(names, rounds, weights, strict=True))
    )
    keys = _config(content, "keys")
    settings: dict[str, Scalar] = {}
    for name, value in _config(content, "settings").items():
        if not isinstance(value, str | int | float | bool):
            raise BadMessage(f"Expected setting `{name}` to be text or a number, but got {type(value).__name__}.")
        settings[name] = value
    return Mail(
        kind,  # type: ignore[arg-type]
        _round(head.get("round")),
        settings,
        _text(head, "run"),
        letters,
        {name: _text(keys, name) for name in keys},
        _text(head, "state-dir"),
    )


def pack_answer(answer: Answer) -> RecordDict:
    """Turn an answer into a Flower message's content."""
    content = RecordDict(
        {
            "answer": ConfigRecord({"peer": answer.peer, "round": answer.round, "error": answer.error}),
            "facts": ConfigRecord(dict(answer.facts)),
            "metrics": MetricRecord({name: float(value) for name, value in answer.metrics.items()}),
            "series": MetricRecord({name: [float(v) for v in values] for name, values in answer.series.items()}),
        }
    )
    if answer.arrays:
        content["knowledge"] = _to_record(answer.arrays)
    return content


def unpack_answer(content: RecordDict) -> Answer:
    """Read an answer; raise :class:`BadMessage` if it does not have the form."""
    head = _config(content, "answer")
    facts = dict(_config(content, "facts"))
    for name, value in facts.items():
        if not isinstance(value, str | int):
            raise BadMessage(f"Expected fact `{name}` to be text or a whole number, but got {type(value).__name__}.")
    metrics: dict[str, float] = {}
    series: dict[str, list[float]] = {}
    for name, number in _metrics(content, "metrics").items():
        if isinstance(number, list):
            raise BadMessage(f"Expected metric `{name}` to be a number, but got a list.")
        metrics[name] = float(number)
    for name, numbers in _metrics(content, "series").items():
        if not isinstance(numbers, list):
            raise BadMessage(f"Expected series `{name}` to be a list, but got a number.")
        series[name] = [float(v) for v in numbers]
    arrays = _from_record(content, "knowledge") if "knowledge" in content else {}
    return Answer(
        _text(head, "peer"),
        _round(head.get("round")),
        facts,
        metrics,
        series,
        arrays,
        _text(head, "error"),
    )


def _to_record(arrays: Arrays) -> ArrayRecord:
    return ArrayRecord({name: Array(np.ascontiguousarray(array)) for name, array in arrays.items()})


def _from_record(content: RecordDict, name: str) -> dict[str, np.ndarray]:
    record = content.array_records.get(name)
    if record is None:
        raise BadMessage(f"Expected an array record `{name}`, but the message has {sorted(content)}.")
    if len(record) > _MAX_ARRAYS:
        raise BadMessage(f"Expected at most {_MAX_ARRAYS} arrays in `{name}`, but got {len(record)}.")
    arrays: dict[str, np.ndarray] = {}
    for array_name, array in record.items():
        try:
            arrays[array_name] = _read_npy(array.data)
        except (ValueError, EOFError, TypeError, MemoryError) as error:
            raise BadMessage(f"Expected array `{array_name}` of `{name}` to be npy data: {error}") from error
    return arrays


def _read_npy(data: bytes) -> np.ndarray:
    """Read npy bytes without objects, believing no header that the bytes do not back."""
    stream = io.BytesIO(data)
    version = np.lib.format.read_magic(stream)
    if version != (1, 0):
        raise ValueError(f"npy version {version}")
    shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(stream)
    body = len(data) - stream.tell()
    if dtype.hasobject or fortran_order or dtype.kind not in "fiu":
        raise ValueError(f"dtype {dtype}, fortran_order {fortran_order}")
    if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != body:
        raise ValueError(f"shape {shape} of {dtype} needs {math.prod(shape) * dtype.itemsize} bytes, {body} came")
    return np.frombuffer(data, dtype=dtype, offset=stream.tell()).reshape(shape)


def _config(content: RecordDict, name: str) -> Mapping[str, Any]:
    record = content.config_records.get(name)
    if record is None:
        raise BadMessage(f"Expected a record `{name}`, but the message has {sorted(content)}.")
    return record


def _metrics(content: RecordDict, name: str) -> Mapping[str, Any]:
    record = content.metric_records.get(name)
    if record is None:
        raise BadMessage(f"Expected a record `{name}`, but the message has {sorted(content)}.")
    return record


def _text(record: Mapping[str, Any], name: str) -> str:
    value = record.get(name)
    if not isinstance(value, str):
        raise BadMessage(f"Expected `{name}` to be text, but got {value!r}.")
    return value


def _round(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise BadMessage(f"Expected `round` to be a whole number >= 0, but got {value!r}.")
    return value


def _weight(value: float) -> float:
    if not math.isfinite(value) or value < 0:
        raise BadMessage(f"Expected a letter's `weight` to be a number >= 0, but got {value!r}.")
    return value


def _list(record: Mapping[str, Any], name: str, kind: type) -> list[Any]:
    values = record.get(name)
    if not isinstance(values, list) or not all(type(value) is kind for value in values):
        raise BadMessage(f"Expected `{name}` to be a list of {kind.__name__}, but got {values!r}.")
    return values
