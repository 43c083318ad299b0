"""The messages between relay and peers: the one file that both sides of the wire import.

A :class:`Mail` goes from the relay to a peer, an :class:`Answer` comes back; a :class:`Letter` is one
peer's encoded knowledge inside a mail. Everything is checked while it is unpacked: a message that does not
have exactly this form raises :class:`BadMessage`, which names what was found and what was expected.
Nothing is unpickled: arrays are npy without objects, everything else is text and numbers, and an answer holds only so
much of them.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fedkd.errors import FedkdError

PEER_MESSAGE = "train.mail"
Kind = Literal["introduce", "start", "learn", "isolated", "pooled", "channel", "merge"]
Scalar = str | int | float | bool
Arrays = Mapping[str, np.ndarray]

SERIES = (
    "round", "test_accuracy", "own_accuracy", "test_loss", "ece", "brier", "confidence", "accuracy", "samples",
)  # fmt: skip
"""What an answer may hold series of: the isolated control's curve, and the bins of a reliability diagram."""

_LETTER = "letter."
_MAX_ARRAYS = 4096
_MAX_FACTS, _MAX_METRICS = 64, 64
_MAX_NAME, _MAX_TEXT, _MAX_CLASSES = 200, 2000, 10**6  # characters
_MAX_WHOLE = 2**63 - 1
_MAX_BINS = 64
_NPY_MAGIC = b"\x93NUMPY\x01\x00"
_NPY_HEADER = re.compile(  # what numpy writes for plain little-endian numbers; its own reader evaluates Python
    rb"\{'descr': '(<f[248]|<[iu][248]|\|[iu]1)', 'fortran_order': False, "
    rb"'shape': \((|[0-9]{1,15},|[0-9]{1,15}(?:, [0-9]{1,15}){1,31})\), \} *\n"
)


def one_line(text: str, limit: int = _MAX_TEXT) -> str:
    r"""Return text that anyone may have written as one printable line of at most ``limit`` characters.

    >>> one_line("power\ncut\x1b[2J", 10)
    'power cut…'
    """
    text = text if len(text) <= limit else f"{text[: limit - 1]}…"
    return text if text.isprintable() else "".join(c if c.isprintable() else " " for c in text)


class BadMessage(FedkdError):
    """A message that does not have the form this protocol gives it."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class Packed(Mapping[str, np.ndarray]):
    """Named arrays together with the bytes they travel as, so that several messages can hold them once.

    What arrives is read without a copy, and sent on as the bytes that came.

    Args:
        wire: by name, in Flower's form; dtype and shape are read from the bytes, what else it says is not believed.
        record: what they are part of, for errors.

    Raises:
        BadMessage: bytes that are no npy data of plain numbers in C order.
    """

    def __init__(self, wire: Mapping[str, Array], record: str = "letter") -> None:
        self._arrays: dict[str, np.ndarray] = {}
        self.wire: dict[str, Array] = {}
        for name, packed in wire.items():
            try:
                array = _read_npy(packed.data)
            except ValueError as error:
                raise BadMessage(f"Expected array `{name}` of `{record}` to be npy data: {error}") from error
            self._arrays[name] = array
            self.wire[name] = Array(str(array.dtype), array.shape, "numpy.ndarray", packed.data)

    @classmethod
    def of(cls, arrays: Arrays) -> "Packed":
        """Pack arrays, or return them where they are packed already."""
        if isinstance(arrays, Packed):
            return arrays
        return cls({name: Array(np.ascontiguousarray(array)) for name, array in arrays.items()})

    def __getitem__(self, name: str) -> np.ndarray:
        return self._arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)


@dataclass(frozen=True)
class Letter:
    """One peer's knowledge.

    Attributes:
        sender: the peer's name.
        round: the round at whose end the sender predicted it.
        arrays: its logits as the codec encoded them, and what travels beside them.
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
        round: the round, counted from 1; 0 is the start. Of the isolated control the last one it may go up to.
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
        series: metrics by `round` (the isolated control's curve).
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


def pack_mail(mail: Mail, *, seat: int | None = None) -> RecordDict:
    """Turn a mail into a Flower message's content.

    Args:
        mail: the mail.
        seat: the number of the simulated peer that it is for, where the node that gets it works for several.
    """
    content = RecordDict(
        {
            "mail": ConfigRecord(
                {
                    "kind": mail.kind,
                    "round": mail.round,
                    "run": mail.run,
                    "state-dir": mail.state_dir,
                }
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
    if seat is not None:
        content["seat"] = ConfigRecord({"partition-id": seat})
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


def seat_of(content: RecordDict) -> dict[str, Scalar]:
    """Return the number of the simulated peer that a mail is for, as its own configuration would say it; else nothing.

    >>> seat_of(pack_mail(Mail("learn", 1, {}), seat=3))
    {'partition-id': 3}
    """
    record = content.config_records.get("seat")
    seat = record.get("partition-id") if record is not None else None
    return {"partition-id": seat} if type(seat) is int else {}


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
    """Read an answer; raise :class:`BadMessage` if it does not have the form.

    Free text (facts, the error) is cut to one line of 2,000 characters. At most 64 facts and metrics are read; a series
    has a name among ``SERIES`` and at most 64 numbers, or one for each round up to the answer's.
    """
    head = _config(content, "answer")
    peer, round = _text(head, "peer"), _round(head.get("round"))
    if not (0 < len(peer) <= _MAX_NAME and peer.isprintable()):
        raise BadMessage(f"Expected `peer` to be a printable name of at most {_MAX_NAME} characters, but got {peer!r}.")
    return Answer(
        peer,
        round,
        _facts(_config(content, "facts")),
        {
            name: _number(f"metric `{name}`", value)
            for name, value in _few(_metrics(content, "metrics"), "metrics", _MAX_METRICS)
        },
        _series(_metrics(content, "series"), longest=max(_MAX_BINS, round + 1)),
        _from_record(content, "knowledge") if "knowledge" in content else {},
        one_line(_text(head, "error")),
    )


def _facts(record: Mapping[str, Any]) -> dict[str, str | int]:
    facts: dict[str, str | int] = {}
    for name, value in _few(record, "facts", _MAX_FACTS):
        if isinstance(value, str):
            # The classes are a list to be read, not a text to be shown: cut, they would be neither.
            facts[name] = one_line(value, _MAX_CLASSES if name == "classes" else _MAX_TEXT)
        elif isinstance(value, int) and abs(value) <= _MAX_WHOLE:
            facts[name] = value
        else:
            kind = type(value).__name__
            raise BadMessage(f"Expected fact `{name}` to be text or a whole number of 64 bits, but got {kind}.")
    return facts


def _series(record: Mapping[str, Any], *, longest: int) -> dict[str, list[float]]:
    series: dict[str, list[float]] = {}
    for name, numbers in record.items():
        if name not in SERIES or not isinstance(numbers, list) or len(numbers) > longest:
            found = f"{len(numbers)} numbers" if isinstance(numbers, list) else "a number"
            allowed = f"a list of at most {longest} numbers, named one of {', '.join(SERIES)}"
            raise BadMessage(f"Expected series `{name}` to be {allowed}, but got {found}.")
        series[name] = [_number(f"series `{name}`", number) for number in numbers]
    return series


def _few(record: Mapping[str, Any], what: str, most: int) -> list[tuple[str, Any]]:
    if len(record) > most:
        raise BadMessage(f"Expected at most {most} {what}, but got {len(record)}.")
    return list(record.items())


def _number(what: str, value: object) -> float:
    if not isinstance(value, int | float) or (isinstance(value, int) and abs(value) > _MAX_WHOLE):
        raise BadMessage(f"Expected {what} to be a number of 64 bits, but got {type(value).__name__}.")
    return float(value)


def _to_record(arrays: Arrays) -> ArrayRecord:
    return ArrayRecord(dict(Packed.of(arrays).wire))


def _from_record(content: RecordDict, name: str) -> Packed:
    record = content.array_records.get(name)
    if record is None:
        raise BadMessage(f"Expected an array record `{name}`, but the message has {sorted(content)}.")
    if len(record) > _MAX_ARRAYS:
        raise BadMessage(f"Expected at most {_MAX_ARRAYS} arrays in `{name}`, but got {len(record)}.")
    for array_name in record:
        if len(array_name) > _MAX_NAME or not array_name.isprintable():
            raise BadMessage(f"Expected names of at most {_MAX_NAME} characters in `{name}`, but got {array_name!r}.")
    return Packed(record, name)


def _read_npy(data: bytes) -> np.ndarray:
    """Read npy bytes of plain numbers in C order, believing no header that the bytes do not back.

    Raises:
        ValueError: anything else.
    """
    start = len(_NPY_MAGIC) + 2
    end = start + int.from_bytes(data[len(_NPY_MAGIC) : start], "little")
    header = _NPY_HEADER.fullmatch(data, start, end)
    if not data.startswith(_NPY_MAGIC) or header is None or end > len(data):
        raise ValueError(f"no npy 1.0 header of plain numbers in C order, but {bytes(data[:end])[:200]!r}")
    dtype = np.dtype(header[1].decode())
    shape = tuple(int(size) for size in header[2].decode().split(",") if size)
    size = math.prod(shape) * dtype.itemsize
    if size != len(data) - end:
        raise ValueError(f"shape {shape} of {dtype} needs {size} bytes, {len(data) - end} came")
    return np.frombuffer(data, dtype=dtype, offset=end).reshape(shape)


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
