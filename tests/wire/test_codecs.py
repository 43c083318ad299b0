import sys

import numpy as np
import pytest
import zstandard
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedkd.errors import SettingError
from fedkd.wire.codecs import GREATEST, BadKnowledge, Codec, codec, encoded_bytes

BASES = ["fp32", "fp16", "int8", "topk:2"]
SPECS = BASES + [f"{base}+zstd" for base in BASES]
SHAPES = st.tuples(st.integers(1, 20), st.integers(3, 12))


def finite(width: float = float(np.float32(GREATEST))) -> st.SearchStrategy[np.ndarray]:
    """Logits of any size that is sent: subnormal, tied, all equal, or up to `width`."""
    entries = st.floats(-width, width, width=32)
    return hnp.arrays(np.float32, SHAPES, elements=entries)


def random_logits(samples: int, classes: int, *, scale: float = 4.0) -> np.ndarray:
    return (np.random.default_rng(0).standard_normal((samples, classes)) * scale).astype(np.float32)


def round_trip(spec: str, logits: np.ndarray) -> np.ndarray:
    return codec(spec).decode(codec(spec).encode(logits), shape=logits.shape)


def probabilities(logits: np.ndarray) -> np.ndarray:
    shifted = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)


FLOAT = np.finfo(np.float32)
EXTREMES = np.array(
    [
        [GREATEST, -GREATEST, 0, 1],
        [GREATEST] * 4,
        [FLOAT.smallest_subnormal, 0, 0, -FLOAT.smallest_subnormal],
        [FLOAT.tiny, 0, 0, 0],
        [65519, 65520, -65520, 1e-8],
    ],
    np.float32,
)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("spec", SPECS)
@given(logits=finite())
@example(logits=EXTREMES)
def test_whatever_is_finite_arrives_finite_and_in_shape(spec: str, logits: np.ndarray) -> None:
    arrived = round_trip(spec, logits)
    assert arrived.shape == logits.shape and arrived.dtype == np.float32
    assert np.isfinite(arrived).all()
    arrived += 1  # the receiver's own memory, writable


@given(logits=finite())
def test_fp32_is_exact(logits: np.ndarray) -> None:
    np.testing.assert_array_equal(round_trip("fp32", logits), logits)


@given(logits=finite())
def test_fp16_keeps_its_bound_and_saturates(logits: np.ndarray) -> None:
    z = logits.astype(np.float64)
    arrived = round_trip("fp16", logits).astype(np.float64)
    clipped = np.clip(z, -65504, 65504)
    assert (np.abs(arrived - clipped) <= np.maximum(2.0**-11 * np.abs(clipped), 2.0**-25)).all()


@given(logits=finite())
def test_int8_keeps_its_bound(logits: np.ndarray) -> None:
    z = logits.astype(np.float64)
    error = np.abs(round_trip("int8", logits) - z)
    size, width = np.abs(z).max(axis=1), z.max(axis=1) - z.min(axis=1)
    assert (error <= (width / 510 + 2.0**-20 * size + 2.0**-118)[:, None]).all()


def test_int8_uses_all_its_steps() -> None:
    logits = random_logits(200, 100)
    width = logits.max(axis=1) - logits.min(axis=1)
    error = np.abs(round_trip("int8", logits) - logits).max(axis=1)
    assert (error > width / 510 * 0.8).all()  # a coarser grid would be worse, an exact one is not 8 bits


@given(logits=finite(60.0), k=st.integers(1, 2))
def test_topk_keeps_the_mass_of_the_kept_and_of_the_rest(logits: np.ndarray, k: int) -> None:
    sent = codec(f"topk:{k}").encode(logits)
    arrived = codec(f"topk:{k}").decode(sent, shape=logits.shape)
    p, q = probabilities(logits), probabilities(arrived)
    kept = np.zeros(p.shape, bool)
    np.put_along_axis(kept, sent["classes"].astype(np.intp), True, axis=1)
    shape = (len(p), k)
    factor = np.exp(2 * (2.0**-11 * np.abs(logits).max(axis=1, keepdims=True) + 2.0**-16))
    for ours, theirs in (
        (q[kept].reshape(shape), p[kept].reshape(shape)),
        ((q * ~kept).sum(axis=1, keepdims=True), (p * ~kept).sum(axis=1, keepdims=True)),
    ):
        assert (ours <= theirs * factor * (1 + 1e-12)).all() and (theirs <= ours * factor * (1 + 1e-12)).all()
    rest = arrived[~kept].reshape(len(p), -1)
    assert (rest == rest[:, :1]).all()


@given(logits=finite(), k=st.integers(1, 2))
def test_topk_keeps_the_greatest_and_the_lower_class_of_a_tie(logits: np.ndarray, k: int) -> None:
    classes = codec(f"topk:{k}").encode(logits)["classes"]
    expected = np.sort(np.argsort(-logits, axis=1, kind="stable")[:, :k], axis=1)
    np.testing.assert_array_equal(classes, expected)


@given(logits=finite(), k=st.integers(1, 2))
def test_topk_keeps_the_most_probable_class(logits: np.ndarray, k: int) -> None:
    arrived = round_trip(f"topk:{k}", logits)
    rows = np.arange(len(logits))
    assert (arrived[rows, logits.argmax(axis=1)] == arrived.max(axis=1)).all()


@pytest.mark.parametrize("classes", range(3, 40))
def test_topk_of_equal_logits_prefers_no_class_of_the_rest(classes: int) -> None:
    arrived = round_trip("topk:2", np.zeros((1, classes), np.float32))
    assert arrived[0, 0] == arrived.max()


def test_topk_rest_weighs_more_at_a_higher_temperature() -> None:
    logits = random_logits(50, 20)
    top = logits.argmax(axis=1)
    rows = np.arange(50)
    for temperature in (2.0, 4.0):
        before = probabilities(logits / temperature)[rows, top]
        after = probabilities(round_trip("topk:1", logits) / temperature)[rows, top]
        assert (after < before).all()


@pytest.mark.parametrize("samples", [1, 1023, 1024, 1025, 3000])
@pytest.mark.parametrize("spec", SPECS)
def test_samples_do_not_depend_on_how_many_travel_together(spec: str, samples: int) -> None:
    logits = random_logits(3000, 7)
    np.testing.assert_array_equal(round_trip(spec, logits[:samples]), round_trip(spec, logits)[:samples])


@pytest.mark.parametrize("spec", SPECS)
def test_the_sender_keeps_its_logits(spec: str) -> None:
    for samples in (1, 3000):
        logits = random_logits(samples, 7)
        codec(spec).encode(logits)
        np.testing.assert_array_equal(logits, random_logits(samples, 7))


@pytest.mark.parametrize("spec", SPECS)
def test_a_view_travels_like_its_copy(spec: str) -> None:
    view = random_logits(50, 40)[::2, ::-3]
    np.testing.assert_array_equal(round_trip(spec, view), round_trip(spec, view.copy()))


@pytest.mark.parametrize(("classes", "index_bytes"), [(256, 1), (257, 2)])
def test_bytes_are_what_the_layout_says(classes: int, index_bytes: int) -> None:
    P, K = 10, 5
    logits = random_logits(P, classes)
    expected = {
        "fp32": 4 * P * classes,
        "fp16": 2 * P * classes,
        "int8": P * (classes + 8),
        f"topk:{K}": P * (K * (2 + index_bytes) + 2),
    }
    for spec, size in expected.items():
        assert encoded_bytes(codec(spec).encode(logits)) == size
        layout = codec(spec).layout(logits.shape)
        assert sum(dtype.itemsize * int(np.prod(dims)) for dtype, dims in layout.values()) == size


@pytest.mark.parametrize("base", BASES)
def test_zstd_changes_nothing_but_the_bytes(base: str) -> None:
    logits = np.round(random_logits(500, 30))
    np.testing.assert_array_equal(round_trip(f"{base}+zstd", logits), round_trip(base, logits))
    packed = encoded_bytes(codec(f"{base}+zstd").encode(logits))
    assert packed < encoded_bytes(codec(base).encode(logits))


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e31])
def test_the_sender_of_an_impossible_logit_is_told_where(spec: str, bad: float) -> None:
    logits = random_logits(5, 4)
    logits[3, 2] = bad
    with pytest.raises(BadKnowledge, match=r"`logits`.*sample 3, class 2"):
        codec(spec).encode(logits)


@pytest.mark.parametrize(
    "logits",
    [np.zeros((2, 3)), np.zeros(3, np.float32), np.zeros((0, 3), np.float32), [[1.0, 2.0]]],
    ids=["float64", "one dimension", "empty", "a list"],
)
def test_what_is_not_logits_is_refused_at_the_sender(logits: object) -> None:
    with pytest.raises(BadKnowledge, match="`logits`"):
        codec("fp32").encode(logits)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "spec",
    ["", "fp8", "FP16", "topk", "topk:", "topk:0", "topk:-1", "topk:1.5", "topk:٣", "topk:999999999",
     "int8+", "int8+gzip", "+zstd", "int8+zstd+zstd"],
)  # fmt: skip
def test_unknown_codecs_are_refused_by_key(spec: str) -> None:
    with pytest.raises(SettingError, match="`codec`"):
        codec(spec)


def test_zstd_compresses_at_its_own_default_level() -> None:
    """Level 3 is what zstandard takes for a balance of size and time; bytes in published tables are of it."""
    logits = np.random.default_rng(0).standard_normal((400, 10)).astype(np.float32)
    plain, frame = codec("fp16").encode(logits), codec("fp16+zstd").encode(logits)["frame"]
    sizes = {level: len(zstandard.ZstdCompressor(level=level).compress(_raw(frame))) for level in (1, 3, 19)}
    assert len(frame) == sizes[3] == len(zstandard.compress(_raw(frame)))
    assert plain.keys() == {"logits"}


def _raw(frame: np.ndarray) -> bytes:
    return zstandard.decompress(frame.tobytes())


def test_zstd_without_the_package_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(SettingError, match=r"pip install .fedkd\[zstd\]"):
        codec("int8+zstd")
    codec("int8")


def test_topk_needs_more_classes_than_it_keeps() -> None:
    with pytest.raises(SettingError, match="number of classes, 3"):
        codec("topk:3").encode(random_logits(4, 3))
    with pytest.raises(SettingError, match="number of classes, 3"):
        codec("topk:3").decode({}, shape=(4, 3))


def refused(carrier: Codec, arrays: dict[str, object], *words: str) -> None:
    with pytest.raises(BadKnowledge) as error:
        carrier.decode(arrays, shape=(6, 5))  # type: ignore[arg-type]
    assert all(word in str(error.value) for word in words), str(error.value)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("spec", SPECS)
def test_wrong_names_dtypes_and_shapes_are_refused_by_name(spec: str) -> None:
    carrier = codec(spec)
    good = carrier.encode(random_logits(6, 5))
    refused(carrier, {})
    refused(carrier, good | {"weights": np.zeros(3)}, "weights")
    refused(carrier, good | {f"{i}" * 99: np.zeros(3) for i in range(999)})
    for name, array in good.items():
        refused(carrier, {key: value for key, value in good.items() if key != name}, name)
        refused(carrier, good | {name: array.astype(np.float64)}, name, "float64", str(array.dtype))
        refused(carrier, good | {name: array.astype(object)}, name, "object")
        refused(carrier, good | {name: array.astype(array.dtype.newbyteorder(">"), copy=True).view("V1")}, name)
        refused(carrier, good | {name: array[None]}, name)
        refused(carrier, good | {name: array[1:]}, name)
        refused(carrier, good | {name: array.tolist()}, name, "list")
        refused(carrier, good | {name: np.float32(0)}, name)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("fp32", "logits"),
        ("fp16", "logits"),
        ("int8", "scale"),
        ("int8", "zero"),
        ("topk:2", "values"),
        ("topk:2", "rest"),
    ],
)
def test_numbers_that_are_not_finite_are_refused(spec: str, name: str, bad: float) -> None:
    arrays = codec(spec).encode(random_logits(6, 5))
    arrays[name].flat[2] = bad
    refused(codec(spec), arrays, f"`{name}`", "finite")


@pytest.mark.filterwarnings("error")
def test_scales_that_are_negative_or_overflow_are_refused() -> None:
    carrier = codec("int8")
    for scale, zero in ((-1.0, 0.0), (3e38, 0.0), (1e36, 3e38)):
        arrays = carrier.encode(random_logits(6, 5))
        arrays["scale"][4], arrays["zero"][4] = scale, zero
        refused(carrier, arrays, "`scale`")


@pytest.mark.parametrize(("spec", "name"), [("fp32", "logits"), ("int8", "zero")])
def test_logits_that_overflow_in_a_softmax_are_refused(spec: str, name: str) -> None:
    """3e38 is finite, but not at a temperature of one half: it would make every receiver's model NaN."""
    carrier = codec(spec)
    arrays = carrier.encode(random_logits(6, 5))
    arrays[name].flat[2] = 3e38
    refused(carrier, arrays, "`logits`", "2e+30", "e+38 for sample")


def test_classes_out_of_range_or_named_twice_are_refused() -> None:
    carrier = codec("topk:2")
    for pair in ((0, 5), (0, 255), (3, 3), (4, 1)):
        arrays = carrier.encode(random_logits(6, 5))
        arrays["classes"][1] = pair
        refused(carrier, arrays, "`classes`")


def test_a_decompression_bomb_is_refused_unopened(monkeypatch: pytest.MonkeyPatch) -> None:
    zstandard = pytest.importorskip("zstandard")
    carrier = codec("fp32+zstd")
    opened: list[int] = []
    real = zstandard.ZstdDecompressor
    monkeypatch.setattr(zstandard, "ZstdDecompressor", lambda: opened.append(1) or real())

    def frame(data: bytes) -> dict[str, object]:
        return {"frame": np.frombuffer(data, np.uint8)}

    size = 6 * 5 * 4
    compress = zstandard.ZstdCompressor().compress
    refused(carrier, frame(compress(b"\0" * 10**7)), "`frame`", "10000000", str(size))
    refused(carrier, frame(zstandard.ZstdCompressor(write_content_size=False).compress(b"\0" * size)), "`frame`")
    refused(carrier, frame(b"\0" * 5000), "`frame`", "5000")
    refused(carrier, frame(b"no zstd at all"), "`frame`")
    refused(carrier, frame(b""), "`frame`")
    # A valid frame by hand, whose header asks for a window of 128 MiB to hold 120 bytes.
    header = bytes.fromhex("28b52ffd 80") + bytes([(27 - 10) << 3]) + size.to_bytes(4, "little")
    wide = header + (size << 3 | 1).to_bytes(3, "little") + b"\0" * size
    assert real().decompress(wide) == b"\0" * size
    refused(carrier, frame(wide), "`frame`", "window")
    assert not opened
    whole = carrier.encode(random_logits(6, 5))["frame"].tobytes()
    refused(carrier, frame(whole[:-1]), "`frame`")
    refused(carrier, frame(whole + b"\0"), "`frame`")
    refused(carrier, frame(whole + whole), "`frame`")
    refused(carrier, frame(compress(b"\xff" * size)), "`logits`", "finite")


ANY_ARRAY = hnp.arrays(
    st.sampled_from([np.dtype(t) for t in ("f4", "f2", "u1", "u2", "f8", ">f4", "i4", "?", "c8", "U2")]),
    hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=6),
)


@pytest.mark.parametrize("spec", SPECS)
@settings(max_examples=100)
@given(data=st.data())
def test_nothing_that_arrives_raises_anything_else(spec: str, data: st.DataObject) -> None:
    carrier = codec(spec)
    arrays: dict[str, object] = dict(carrier.encode(random_logits(6, 5)))
    for name in data.draw(st.sets(st.sampled_from(sorted(arrays)))):
        array = arrays[name]
        noise = data.draw(st.binary(min_size=array.nbytes, max_size=array.nbytes))
        mask = data.draw(st.sampled_from([0x01, 0xFF]))
        bits = np.frombuffer(array.tobytes(), np.uint8) ^ (np.frombuffer(noise, np.uint8) & mask)
        arrays[name] = data.draw(st.just(bits.view(array.dtype).reshape(array.shape)) | ANY_ARRAY)
    if data.draw(st.booleans()):
        arrays |= data.draw(st.dictionaries(st.text(max_size=3), ANY_ARRAY | st.none(), max_size=2))
    try:
        arrived = carrier.decode(arrays, shape=(6, 5))  # type: ignore[arg-type]
    except BadKnowledge:
        return
    assert arrived.shape == (6, 5) and arrived.dtype == np.float32 and np.isfinite(arrived).all()
