import contextlib
import io
import json
import pickle
from collections.abc import Callable

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedkd.wire.codecs import BadKnowledge, codec
from fedkd.wire.sealing import WRAP_BYTES, Keys, Sealer, SealError, pack, unpack

KEYS = {name: Keys.generate() for name in ("ada", "bob", "eve")}
PUBLIC = {name: keys.public_bytes for name, keys in KEYS.items()}
PLAIN = bytes(range(256)) * 2

# The u-coordinates of the points of order 1, 2, 4 and 8 of Curve25519 and of its twist (RFC 7748, section 6.1).
LOW_ORDER = [
    bytes(32),
    (1).to_bytes(32, "little"),
    bytes.fromhex("e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800"),
    bytes.fromhex("5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157"),
    (2**255 - 20).to_bytes(32, "little"),
    (2**255 - 19).to_bytes(32, "little"),
    (2**255 - 18).to_bytes(32, "little"),
]


def sealer(name: str, run: str = "run-1", **options: str) -> Sealer:
    return Sealer(KEYS[name], name, run, **options)


def letter(**options: object) -> bytes:
    return sealer("ada").seal(PLAIN, to="bob", to_public=PUBLIC["bob"], round=3, **options)  # type: ignore[arg-type]


def open_letter(sealed: bytes, reader: Sealer | None = None, **changed: object) -> bytes:
    arguments = {"sender": "ada", "sender_public": PUBLIC["ada"], "round": 3} | changed
    return (reader or sealer("bob")).open(sealed, **arguments)  # type: ignore[arg-type]


@given(plain=st.binary(max_size=300), round=st.integers(0, 10**6))
def test_what_is_sealed_opens_for_its_receiver(plain: bytes, round: int) -> None:
    sealed = sealer("ada").seal(plain, to="bob", to_public=PUBLIC["bob"], round=round)
    assert open_letter(sealed, round=round) == plain


@given(plain=st.binary(min_size=16, max_size=300))
def test_the_plaintext_is_not_in_the_mail_and_no_two_letters_are_alike(plain: bytes) -> None:
    first, second = (sealer("ada").seal(plain, to="bob", to_public=PUBLIC["bob"], round=3) for _ in range(2))
    assert plain not in first
    assert first != second and first[:12] != second[:12]
    assert len(first) == len(plain) + 28


def test_a_change_of_any_byte_is_refused() -> None:
    sealed = letter()
    for position in range(len(sealed)):
        changed = bytearray(sealed)
        changed[position] ^= 1 << position % 8
        with pytest.raises(SealError, match="'ada' for round 3"):
            open_letter(bytes(changed))


@pytest.mark.parametrize(
    "change", [lambda m: b"", lambda m: m[:27], lambda m: m[:-1], lambda m: m + b"\0", lambda m: m[1:]]
)
def test_other_lengths_are_refused(change: Callable[[bytes], bytes]) -> None:
    with pytest.raises(SealError, match="'ada'"):
        open_letter(change(letter()))


@pytest.mark.parametrize(
    ("reader", "changed"),
    [
        (sealer("bob"), {"round": 4}),
        (sealer("bob"), {"round": 2}),
        (sealer("bob"), {"sender": "eve"}),
        (sealer("bob"), {"sender_public": PUBLIC["eve"]}),
        (sealer("bob"), {"sender": "eve", "sender_public": PUBLIC["eve"]}),
        (sealer("bob"), {"bound": b"more"}),
        (sealer("eve"), {}),
        (Sealer(KEYS["eve"], "bob", "run-1"), {}),
        (Sealer(KEYS["bob"], "eve", "run-1"), {}),
        (sealer("bob", run="run-2"), {}),
        (sealer("bob", context="int8"), {}),
        (sealer("ada"), {"sender": "bob", "sender_public": PUBLIC["bob"]}),
    ],
    ids=["later round", "earlier round", "name", "key", "sender", "bound", "misaddressed", "stolen name",
         "renamed receiver", "another run", "another context", "sent back"],
)  # fmt: skip
def test_mail_opens_only_as_what_it_was_sealed(reader: Sealer, changed: dict[str, object]) -> None:
    sealed = letter()
    assert open_letter(sealed) == PLAIN
    with pytest.raises(SealError):
        open_letter(sealed, reader, **changed)


def test_fields_can_not_be_shifted_into_one_another() -> None:
    sealed = Sealer(KEYS["ada"], "ad", "1").seal(PLAIN, to="ab", to_public=PUBLIC["bob"], round=3)
    with pytest.raises(SealError):
        Sealer(KEYS["bob"], "b", "1").open(sealed, sender="ada", sender_public=PUBLIC["ada"], round=3)


def test_one_payload_opens_for_each_receiver_with_its_own_wrap() -> None:
    payload, wraps = sealer("ada").seal_for(PLAIN, to=PUBLIC, round=3)
    assert {len(wrap) for wrap in wraps} == {WRAP_BYTES}
    assert PLAIN not in payload and len(payload) == len(PLAIN) + 28
    for name, wrap in zip(PUBLIC, wraps, strict=True):
        opened = sealer(name).open_from(payload, wrap, sender="ada", sender_public=PUBLIC["ada"], round=3)
        assert opened == PLAIN
    for name, wrap in zip(PUBLIC, wraps[1:] + wraps[:1], strict=True):
        with pytest.raises(SealError, match="'ada'"):
            sealer(name).open_from(payload, wrap, sender="ada", sender_public=PUBLIC["ada"], round=3)


def test_changed_payloads_and_wraps_are_refused() -> None:
    payload, wraps = sealer("ada").seal_for(PLAIN[:64], to=PUBLIC, round=3)
    other_payload, other_wraps = sealer("ada").seal_for(PLAIN[:64], to=PUBLIC, round=4)

    def refused(payload: bytes, wrap: bytes, *, round: int = 3) -> None:
        with pytest.raises(SealError, match="'ada'"):
            sealer("bob").open_from(payload, wrap, sender="ada", sender_public=PUBLIC["ada"], round=round)

    for position in range(len(payload)):
        refused(payload[:position] + bytes([payload[position] ^ 1]) + payload[position + 1 :], wraps[1])
    for position in range(WRAP_BYTES):
        refused(payload, wraps[1][:position] + bytes([wraps[1][position] ^ 1]) + wraps[1][position + 1 :])
    refused(payload, other_wraps[1])
    refused(other_payload, wraps[1])
    refused(payload, wraps[1], round=4)
    refused(b"", wraps[1])
    refused(payload, b"")


def test_a_receiver_can_not_pass_on_a_payload_of_its_own_as_the_senders(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bob learns a payload's key; with the relay's help he sends Eve another payload under it, in Ada's name."""
    key = bytes(range(32))
    monkeypatch.setattr(AESGCM, "generate_key", lambda bits: key, raising=True)
    _, wraps = sealer("ada").seal_for(PLAIN, to=PUBLIC, round=3)
    forged, _ = sealer("ada").seal_for(b"lies", to={}, round=3)  # what Bob can compute, knowing the key
    with pytest.raises(SealError, match="'ada'"):
        sealer("eve").open_from(forged, wraps[2], sender="ada", sender_public=PUBLIC["ada"], round=3)


@pytest.mark.parametrize("public", LOW_ORDER)
def test_public_keys_of_low_order_are_refused_by_name(public: bytes) -> None:
    with pytest.raises(SealError, match=r"'bob'.*low order"):
        sealer("ada").seal(PLAIN, to="bob", to_public=public, round=3)
    with pytest.raises(SealError, match=r"'bob'.*low order"):
        sealer("ada").seal_for(PLAIN, to=PUBLIC | {"bob": public}, round=3)
    with pytest.raises(SealError, match=r"'ada'.*low order"):
        open_letter(letter(), sender_public=public)


@pytest.mark.parametrize("length", [0, 31, 33])
def test_keys_of_another_length_are_refused(length: int) -> None:
    with pytest.raises(SealError, match=f"'bob'.*32.*{length}"):
        sealer("ada").seal(PLAIN, to="bob", to_public=bytes(length), round=3)
    with pytest.raises(SealError, match=f"32.*{length}"):
        Keys.from_bytes(bytes(length))


def test_keys_come_back_from_disk_and_do_not_print_themselves() -> None:
    keys = Keys.generate()
    again = Keys.from_bytes(keys.private_bytes)
    assert again.public_bytes == keys.public_bytes and len(keys.public_bytes) == 32
    assert Keys.generate().public_bytes != keys.public_bytes
    for text in (repr(keys), str(vars(keys)), repr(Sealer(keys, "ada", "run-1"))):
        assert keys.private_bytes.hex() not in text and repr(keys.private_bytes)[2:-1] not in text


NUMBERS = st.sampled_from([np.dtype(t) for t in ("f2", "f4", "f8", "u1", "u2", "i4", "i8", "?")])


@given(
    arrays=st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=5).filter(lambda name: name != "__metadata__"),
        hnp.arrays(NUMBERS, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)),
        max_size=4,
    )
)
def test_arrays_come_out_as_they_went_in(arrays: dict[str, np.ndarray]) -> None:
    found = unpack(pack(arrays))
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype and found[name].shape == array.shape
        assert found[name].tobytes() == array.tobytes()


def test_a_view_is_packed_like_its_copy() -> None:
    view = np.arange(24.0, dtype=np.float32).reshape(4, 6)[::2, ::-1].T
    np.testing.assert_array_equal(unpack(pack({"logits": view}))["logits"], view)


@pytest.mark.parametrize(
    "array",
    [np.array([{}]), np.array(["a"]), np.array([1j]), np.array([1], np.longdouble)],
    ids=["object", "text", "complex", "long double"],
)
def test_only_numbers_are_packed(array: np.ndarray) -> None:
    with pytest.raises(BadKnowledge, match="`logits`"):
        pack({"logits": array})


@given(data=st.binary(max_size=200))
def test_bytes_that_are_no_arrays_are_refused(data: bytes) -> None:
    with contextlib.suppress(BadKnowledge):
        assert all(isinstance(array, np.ndarray) for array in unpack(data).values())


@pytest.mark.parametrize(
    "header",
    [
        {"a": {"dtype": "BF16", "shape": [4], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F8_E4M3", "shape": [8], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [2**62, 8], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 10**9]}},
        {"a": {"dtype": "F32", "shape": [-2, -1], "data_offsets": [0, 8]}},
        {"a": {"dtype": "O", "shape": [1], "data_offsets": [0, 8]}},
        {"a": {}},
        [],
    ],
)
def test_headers_that_lie_are_refused(header: object) -> None:
    text = json.dumps(header).encode()
    with pytest.raises(BadKnowledge, match="named arrays"):
        unpack(len(text).to_bytes(8, "little") + text + bytes(8))


@given(noise=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=4))
def test_arrays_with_changed_bytes_are_arrays_or_refused(noise: list[tuple[int, int]]) -> None:
    data = bytearray(pack({"scale": np.ones(2, np.float32), "codes": np.ones((2, 3), np.uint8)}))
    for position, byte in noise:
        data[position % len(data)] = byte
    try:
        found = unpack(bytes(data))
    except BadKnowledge:
        return
    assert all(isinstance(array, np.ndarray) for array in found.values())


def test_nothing_is_unpickled() -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
            return pytest.fail, ("unpickled",)

    stream = io.BytesIO()
    np.save(stream, np.array([Bomb()], dtype=object), allow_pickle=True)
    for data in (pickle.dumps(Bomb()), stream.getvalue()):
        with pytest.raises(BadKnowledge):
            unpack(data)


def test_knowledge_goes_from_codec_to_codec_under_seal() -> None:
    logits = np.random.default_rng(0).standard_normal((20, 10)).astype(np.float32)
    carrier = codec("topk:3")
    payload, wraps = sealer("ada").seal_for(pack(carrier.encode(logits)), to=PUBLIC, round=1)
    opened = sealer("bob").open_from(payload, wraps[1], sender="ada", sender_public=PUBLIC["ada"], round=1)
    decoded = carrier.decode(unpack(opened), shape=(20, 10))
    np.testing.assert_array_equal(decoded, carrier.decode(carrier.encode(logits), shape=(20, 10)))
