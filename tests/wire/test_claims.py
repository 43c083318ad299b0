"""What a letter says of itself beside logits: what travels, what comes back, and what is refused from anyone."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedkd.wire.claims import (
    CLAIMS,
    Claims,
    claims_layout,
    decode_claims,
    decode_rows,
    encode_claims,
    encode_rows,
    without_claims,
)
from fedkd.wire.codecs import BadKnowledge, codec, encoded_bytes
from fedkd.wire.features import encode_features, without_features

SAMPLES, CLASSES = 21, 4
SHAPE = (SAMPLES, CLASSES)


def made(seed=0, share=0.5):
    draws = np.random.default_rng(seed)
    sent = draws.random(SAMPLES) < share
    certainty = np.where(sent, draws.random(SAMPLES), 0).astype(np.float32)
    return Claims(draws.integers(0, 99, CLASSES).astype(np.float32), certainty, sent)


@given(seed=st.integers(0, 999), share=st.floats(0, 1), told=st.sets(st.sampled_from(CLAIMS)))
def test_what_is_told_comes_back_and_nothing_else(seed, share, told):
    every = made(seed, share)
    claims = Claims(
        every.counts if "counts" in told else None,
        every.certainty if "density" in told else None,
        every.sent if "mask" in told else None,
    )

    arrays = encode_claims(claims)
    back = decode_claims(arrays, shape=SHAPE, told=told)

    assert encoded_bytes(arrays) <= sum(t.itemsize * np.prod(s) for t, s in claims_layout(SHAPE, told).values())
    assert [back.counts is None, back.certainty is None, back.sent is None] == [
        "counts" not in told, "density" not in told, "mask" not in told,
    ]  # fmt: skip
    if "counts" in told:
        np.testing.assert_array_equal(back.counts, claims.counts)
    if "mask" in told:
        np.testing.assert_array_equal(back.sent, claims.sent)
    if "density" in told:
        np.testing.assert_allclose(back.certainty, claims.certainty, atol=2.0**-11)
        if "mask" in told:
            np.testing.assert_array_equal(back.certainty > 0, claims.sent)
        else:
            assert (back.certainty > 0).all()  # 0 would say that a sample was not sent


@pytest.mark.parametrize("spec", ["fp32", "fp16", "int8", "topk:2", "int8+zstd"])
@pytest.mark.parametrize("share", [0.3, 1.0])
def test_samples_that_are_left_out_do_not_travel_and_the_others_are_what_they_were(spec, share):
    claims, encoding = made(3, share), codec(spec)
    logits = np.random.default_rng(1).normal(size=SHAPE).astype(np.float32)

    arrays = encode_rows(encoding, logits, claims)
    back = decode_rows(encoding, arrays, claims, shape=SHAPE)

    whole = encoding.decode(encoding.encode(logits), shape=SHAPE)
    np.testing.assert_array_equal(back[claims.sent], whole[claims.sent])
    assert not back[~claims.sent].any()
    if "zstd" not in spec:
        rows = int(claims.sent.sum())
        assert encoded_bytes(arrays) * SAMPLES == encoded_bytes(encoding.encode(logits)) * rows


def test_who_leaves_all_samples_out_sends_no_logits():
    nothing = Claims(sent=np.zeros(SAMPLES, bool))
    logits = np.ones(SHAPE, np.float32)

    arrays = {**encode_rows(codec("fp32"), logits, nothing), **encode_claims(nothing)}

    assert set(arrays) == {"about.sent"} and nothing.rows(SAMPLES) == 0
    assert not decode_rows(codec("fp32"), {}, nothing, shape=SHAPE).any()
    with pytest.raises(BadKnowledge, match=r"no logits where no sample is sent, but got \['logits'\]"):
        decode_rows(codec("fp32"), {"logits": logits[:1]}, nothing, shape=SHAPE)


def test_more_or_fewer_rows_than_the_mask_says_are_refused():
    claims, encoding = made(2), codec("fp32")
    arrays = encode_rows(encoding, np.ones(SHAPE, np.float32), claims)
    for logits in (arrays["logits"][1:], np.ones(SHAPE, np.float32)):
        with pytest.raises(BadKnowledge, match="`logits`"):
            decode_rows(encoding, {"logits": logits}, claims, shape=SHAPE)


def changed(**arrays):
    return {**encode_claims(made()), **{f"about.{name}": array for name, array in arrays.items()}}


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({}, r"expected claims \['about.certainty', 'about.counts', 'about.sent'\], but got \[\]"),
        (changed(more=np.zeros(3)), "expected claims .*about.more"),
        (changed(counts=np.zeros(CLASSES)), r"`about.counts` to be float32 \[4\], but got float64 \[4\]"),
        (changed(counts=np.zeros(CLASSES + 1, np.float32)), r"`about.counts` to be float32 \[4\]"),
        (changed(counts=np.full(CLASSES, -1, np.float32)), r"`about.counts` within \[0, 1e\+12\], but got -1"),
        (changed(counts=np.full(CLASSES, np.nan, np.float32)), "`about.counts` within .*nan"),
        (changed(counts=np.full(CLASSES, np.inf, np.float32)), "`about.counts` within .*inf"),
        (changed(certainty=np.zeros(SAMPLES, np.float16)), r"`about.certainty` to be float16 \[\d+\]"),
        (changed(certainty=np.float32(1)), "`about.certainty` to be float16"),
        (changed(sent=np.zeros(2, np.uint8)), r"`about.sent` to be uint8 \[3\], but got uint8 \[2\]"),
        (changed(sent=np.full(3, 255, np.uint8)), "`about.sent` to have 21 bits"),
        (changed(sent=[1, 2, 3]), r"`about.sent` to be uint8 \[3\], but got list"),
    ],
)
def test_what_is_no_claim_is_refused_and_the_error_says_what_was_expected(arrays, message):
    with pytest.raises(BadKnowledge, match=message):
        decode_claims(arrays, shape=SHAPE, told=CLAIMS)


@pytest.mark.parametrize("wrong", [1.5, -0.1, np.nan, np.inf])
def test_a_certainty_is_a_share(wrong):
    said = np.full(SAMPLES, wrong, np.float16)
    with pytest.raises(BadKnowledge, match=r"`about.certainty` within \[0, 1\]"):
        decode_claims({"about.certainty": said}, shape=SHAPE, told=("density",))
    with pytest.raises(BadKnowledge, match=r"`about.certainty` within \[0, 1\]"):
        encode_claims(Claims(certainty=said.astype(np.float32)))


def test_claims_that_nobody_asked_for_are_refused():
    with pytest.raises(BadKnowledge, match=r"expected claims of no kind, but got \['about.sent'\]"):
        decode_claims({"about.sent": np.zeros(3, np.uint8)}, shape=SHAPE, told=())


def test_noised_counts_below_zero_are_told_as_zero():
    arrays = encode_claims(Claims(counts=np.array([-3.5, 2.25], np.float32)))
    assert arrays["about.counts"].tolist() == [0, 2.25] and arrays["about.counts"].dtype == np.float32


def test_features_claims_and_logits_of_a_letter_part_again():
    logits = codec("fp16").encode(np.ones(SHAPE, np.float32))
    letter = {**logits, **encode_features([np.ones(SHAPE, np.float32)]), **encode_claims(made())}
    assert set(without_claims(without_features(letter))) == {"logits"}


def test_claims_about_some_of_the_samples_are_those_of_these_samples():
    claims, some = made(5), np.array([0, 4, 20])
    found = claims.on(some)
    np.testing.assert_array_equal(found.sent, claims.sent[some])
    np.testing.assert_array_equal(found.certainty, claims.certainty[some])
    assert found.counts is claims.counts and found.rows(3) == claims.sent[some].sum()
