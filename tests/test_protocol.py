import io

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from fedkd.config import RunConfig
from fedkd.protocol import (
    Answer,
    BadMessage,
    Letter,
    Mail,
    pack_answer,
    pack_mail,
    unpack_answer,
    unpack_mail,
    wire_bytes,
)

LOGITS = np.arange(12, dtype=np.float32).reshape(4, 3)


def mail(**changes):
    letters = (Letter("peer-1", 2, {"logits": LOGITS}, 0.5), Letter("peer-2", 1, {"logits": -LOGITS}))
    return Mail(**{"kind": "learn", "round": 3, "settings": RunConfig().to_mapping(), "letters": letters, **changes})


def test_a_mail_arrives_as_it_was_sent():
    sent = mail()

    came = unpack_mail(pack_mail(sent))

    assert (came.kind, came.round, dict(came.settings)) == (sent.kind, sent.round, dict(sent.settings))
    assert [(x.sender, x.round, x.weight) for x in came.letters] == [("peer-1", 2, 0.5), ("peer-2", 1, 1.0)]
    np.testing.assert_array_equal(came.letters[1].arrays["logits"], -LOGITS)


def test_an_answer_arrives_as_it_was_sent():
    sent = Answer("peer-0", 3, {"model": "mlp", "samples": 7}, {"ece": 0.1}, {"a": [0.5, 1.0]}, {"logits": LOGITS})

    came = unpack_answer(pack_answer(sent))

    np.testing.assert_array_equal(came.arrays["logits"], LOGITS)
    assert (came.peer, came.round, came.facts, came.metrics, came.series, came.error) == (
        "peer-0", 3, {"model": "mlp", "samples": 7}, {"ece": 0.1}, {"a": [0.5, 1.0]}, "",
    )  # fmt: skip


def test_bytes_are_those_of_the_npy_data_that_travel():
    buffer = io.BytesIO()
    np.save(buffer, LOGITS)

    assert wire_bytes(pack_mail(mail())) == 2 * len(buffer.getvalue())


def spoiled_mail(record, **changes):
    content = pack_mail(mail())
    content[record] = ConfigRecord({**content[record], **changes})
    return content


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (RecordDict(), "record `mail`"),
        (spoiled_mail("mail", kind="explode"), "introduce, start, learn"),
        (spoiled_mail("mail", round=-1), "`round`"),
        (spoiled_mail("mail", round="3"), "`round`"),
        (spoiled_mail("senders", names=["peer-1"]), "one name, round and weight per letter"),
        (spoiled_mail("senders", weights=[float("nan"), 1.0]), "`weight`"),
        (spoiled_mail("senders", names=["a", "b", "c"], rounds=[1, 1, 1], weights=[1.0] * 3), "letter.2"),
        (spoiled_mail("settings", rounds=[1, 2]), "setting `rounds`"),
    ],
)
def test_a_mail_without_the_form_is_refused_by_what_is_wrong(content, complaint):
    with pytest.raises(BadMessage, match=complaint):
        unpack_mail(content)


def npy(array, **options):
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not npy",
        npy(LOGITS)[:-1],
        npy(LOGITS) + b"\0",
        npy(np.array([{"a": 1}], dtype=object), allow_pickle=True),
        npy(np.array(["text"])),
        npy(np.asfortranarray(LOGITS)),
        npy(LOGITS).replace(b"(4, 3)", b"(9, 9)"),
    ],
)
def test_arrays_that_are_not_plain_numbers_are_refused(data):
    content = pack_answer(Answer("peer-0", 1))
    content["knowledge"] = ArrayRecord(
        {"logits": Array(dtype="float32", shape=(4, 3), stype="numpy.ndarray", data=data)}
    )

    with pytest.raises(BadMessage, match="`logits` of `knowledge`"):
        unpack_answer(content)


@given(st.binary(max_size=400))
def test_random_bytes_are_never_anything_but_refused_or_numbers(noise):
    content = pack_answer(Answer("peer-0", 1))
    content["knowledge"] = ArrayRecord(
        {"logits": Array(dtype="x", shape=(1,), stype="x", data=npy(LOGITS)[:80] + noise)}
    )

    try:
        arrays = unpack_answer(content).arrays
    except BadMessage:
        return
    assert arrays["logits"].dtype.kind in "fiu"


def test_a_metric_that_is_a_list_is_refused():
    content = pack_answer(Answer("peer-0", 1))
    content["metrics"] = MetricRecord({"ece": [0.1, 0.2]})

    with pytest.raises(BadMessage, match="metric `ece`"):
        unpack_answer(content)
