import io

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from fedkd.settings.config import RunConfig
from fedkd.wire.messages import (
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
    sent = Answer(
        "peer-0", 3, {"model": "mlp", "samples": 7}, {"ece": 0.1}, {"accuracy": [0.5, 1.0]}, {"logits": LOGITS}
    )

    came = unpack_answer(pack_answer(sent))

    np.testing.assert_array_equal(came.arrays["logits"], LOGITS)
    assert (came.peer, came.round, came.facts, came.metrics, came.series, came.error) == (
        "peer-0", 3, {"model": "mlp", "samples": 7}, {"ece": 0.1}, {"accuracy": [0.5, 1.0]}, "",
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


def with_header(header):
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + LOGITS.tobytes()


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
        npy(LOGITS).replace(b"(4, 3)", b"(-4, -3)"),
        npy(LOGITS).replace(b"(4, 3)", b"(4, 3.0)"),
        npy(LOGITS).replace(b"'<f4'", b"'>f4'"),
        npy(LOGITS).replace(b"'<f4'", b"(('<f4',),)"),
        npy(LOGITS)[:8],
        with_header(b'"""\n'),
        with_header(b"{'descr': (('<f4',),), 'fortran_order': False, 'shape': (4, 3), }\n"),
        with_header(b"{" * 60000),
        with_header(b"{'descr': '<f4', 'fortran_order': False, 'shape': (" + b"1, " * 40 + b"1), }\n"),
        with_header(b"{'descr': '<f4', 'fortran_order': False, 'shape': (" + b"9" * 5000 + b",), }\n"),
    ],
)
def test_arrays_that_are_not_plain_numbers_are_refused(data):
    content = pack_answer(Answer("peer-0", 1))
    content["knowledge"] = ArrayRecord(
        {"logits": Array(dtype="float32", shape=(4, 3), stype="numpy.ndarray", data=data)}
    )

    with pytest.raises(BadMessage, match="`logits` of `knowledge`"):
        unpack_answer(content)


@pytest.mark.parametrize("dtype", ["<f2", "<f4", "<f8", "|u1", "|i1", "<u2", "<i8"])
@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 1, 3), (0, 3), ()])
def test_every_plain_array_that_numpy_writes_is_read(dtype, shape):
    array = np.ones(shape, dtype=dtype)
    content = pack_answer(Answer("peer-0", 1))
    content["knowledge"] = ArrayRecord({"logits": Array(dtype="x", shape=(1,), stype="x", data=npy(array))})

    came = unpack_answer(content).arrays["logits"]

    assert came.dtype == array.dtype and came.shape == array.shape
    np.testing.assert_array_equal(came, array)


HEADER_WORDS = [
    b"{", b"}", b"'descr'", b": ", b"'<f4'", b"'|O'", b"'fortran_order'", b"False", b"True", b"'shape'", b"(", b")",
    b"4", b"3", b", ", b"-1", b'"""', b"\\", b"\n", b" ", b"[", b"lambda", b"0x", b"\0", b"\xff",
]  # fmt: skip


@given(st.one_of(st.binary(max_size=200), st.lists(st.sampled_from(HEADER_WORDS), max_size=40).map(b"".join)))
def test_a_header_of_anything_is_never_anything_but_refused_or_numbers(header):
    refused_or_numbers(with_header(header))


@given(st.integers(0, 200), st.binary(max_size=400))
def test_random_bytes_are_never_anything_but_refused_or_numbers(kept, noise):
    refused_or_numbers(npy(LOGITS)[:kept] + noise)


def refused_or_numbers(data):
    content = pack_answer(Answer("peer-0", 1))
    content["knowledge"] = ArrayRecord({"logits": Array(dtype="x", shape=(1,), stype="x", data=data)})
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


def spoiled_answer(record, value):
    content = pack_answer(Answer("peer-0", 3))
    content[record] = value
    return content


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (spoiled_answer("answer", ConfigRecord({"peer": "", "round": 3, "error": ""})), "`peer`"),
        (spoiled_answer("answer", ConfigRecord({"peer": "x" * 10**6, "round": 3, "error": ""})), "`peer`"),
        (spoiled_answer("answer", ConfigRecord({"peer": "a\nb", "round": 3, "error": ""})), "`peer`"),
        (spoiled_answer("facts", ConfigRecord({str(i): 1 for i in range(1000)})), "at most 64 facts"),
        (spoiled_answer("facts", ConfigRecord({"samples": [1, 2]})), "fact `samples`"),
        (spoiled_answer("metrics", MetricRecord({str(i): 1.0 for i in range(1000)})), "at most 64 metrics"),
        (spoiled_answer("metrics", MetricRecord({"ece": 10**400})), "metric `ece`"),
        (spoiled_answer("series", MetricRecord({"weights": [1.0]})), "series `weights`"),
        (spoiled_answer("series", MetricRecord({"accuracy": [1.0] * 65})), "series `accuracy`"),
        (spoiled_answer("series", MetricRecord({"accuracy": 1.0})), "series `accuracy`"),
        (spoiled_answer("knowledge", ArrayRecord({"x" * 300: Array(LOGITS)})), "`knowledge`"),
    ],
)
def test_an_answer_of_more_than_an_answer_holds_is_refused(content, complaint):
    with pytest.raises(BadMessage, match=complaint) as refused:
        unpack_answer(content)
    assert len(str(refused.value)) <= 2000


def test_what_a_peer_says_is_one_short_line():
    said = "power\ncut \x1b[2J" + "x" * 10**6

    came = unpack_answer(pack_answer(Answer("peer-0", 1, {"refused": said}, error=said)))

    for text in (came.error, came.facts["refused"]):
        assert len(text) <= 2000 and text.isprintable() and text.startswith("power cut")


def test_the_names_of_a_thousand_classes_are_not_cut():
    names = "[" + ", ".join(f'"class number {i}"' for i in range(1000)) + "]"

    assert unpack_answer(pack_answer(Answer("peer-0", 0, {"classes": names}))).facts["classes"] == names


def test_a_curve_has_a_number_for_each_round_of_a_long_run():
    curve = [0.5] * 201

    assert unpack_answer(pack_answer(Answer("peer-0", 200, series={"test_accuracy": curve}))).series == {
        "test_accuracy": curve
    }
    with pytest.raises(BadMessage, match="at most 200 numbers"):
        unpack_answer(pack_answer(Answer("peer-0", 199, series={"test_accuracy": curve})))
