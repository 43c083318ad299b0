"""Sealed mail in whole federations: what the relay sees, and what a dishonest one can do."""

import numpy as np
import pytest
from federation import federate, killed, local_grid
from flwr.app import Array, ArrayRecord, ConfigRecord

from fedkd.wire.claims import CLAIMS, Claims, claims_layout, encode_claims
from fedkd.wire.codecs import BadKnowledge, codec
from fedkd.wire.features import encode_features
from fedkd.wire.messages import Packed
from fedkd.wire.sealing import Keys, Sealer, pack
from strategies.relay.sealed import address, check_sealed, most_sealed

SERVER_FREE = ["averaged", "pairwise", "gossip"]


@pytest.mark.parametrize("strategy", SERVER_FREE)
def test_sealed_runs_learn_the_same_as_plain_ones(tmp_path, strategy):
    plain = federate(tmp_path / "plain", 3, strategy=strategy)
    sealed = federate(tmp_path / "sealed", 3, strategy=strategy, sealed=True)

    def learned(run):
        return [(row["peer"], row["round"], row["test_accuracy"], row["kd_loss"]) for row in run.rows()]

    assert learned(sealed) == learned(plain)
    assert all(row["refused_letters"] == 0 for row in sealed.rows())


def test_the_relay_sees_no_two_bytes_of_knowledge_alike(tmp_path):
    """Constant logits would show in any encoding; sealed, they are noise."""
    run = federate(tmp_path, 3, sealed=True, rounds=1)

    for message in run.grid.sent + run.grid.replies:
        for record in message.content.array_records.values():
            assert set(record) in ({"sealed", "wraps"}, {"sealed", "wrap"})
            payload = record["sealed"].numpy()
            counts = np.bincount(payload, minlength=256)
            expected = len(payload) / 256
            chi_square = float(((counts - expected) ** 2 / expected).sum())
            assert chi_square < 400  # 255 degrees of freedom: 1e-8 of random bytes exceed it


def spoil(grid, what):
    """Have the relay tamper with everything peer 0 gets in round 2."""
    seen = {}

    def fault(partition, message):
        mail = message.content["mail"]
        if partition != 0 or mail["kind"] != "learn":
            return
        if mail["round"] == 1:
            seen["old"] = message.content["letter.0"]
            seen["other"] = message.content["letter.1"]
            return
        if what == "tampered":
            arrays = {name: array.numpy().copy() for name, array in message.content["letter.0"].items()}
            arrays["sealed"][20] ^= 1
            message.content["letter.0"] = ArrayRecord({name: Array(a) for name, a in arrays.items()})
        elif what == "replayed as new":
            message.content["letter.0"] = seen["old"]
        elif what == "misattributed":
            message.content["letter.0"] = message.content["letter.1"]
        elif what == "plain":
            message.content["letter.0"] = ArrayRecord({"logits": Array(np.zeros((60, 10), dtype=np.float32))})

    grid.fault = fault


@pytest.mark.parametrize("what", ["tampered", "replayed as new", "misattributed", "plain"])
def test_what_a_dishonest_relay_changes_is_refused_by_the_senders_name(tmp_path, what):
    grid = local_grid(tmp_path, 3)
    spoil(grid, what)

    run = federate(tmp_path, 3, grid=grid, sealed=True)

    row = next(row for row in run.rows() if row["peer"] == "peer-0" and row["round"] == 2)
    assert row["refused_letters"] == 1 and row["error"].startswith("peer-1: ")
    assert np.isfinite(row["kd_loss"])  # the other teacher was heard


def test_a_letter_older_than_one_already_heard_is_a_replay(tmp_path):
    grid = local_grid(tmp_path, 3)
    late = {}

    def fault(partition, message):
        mail = message.content["mail"]
        if partition == 0 and mail["kind"] == "learn" and mail["round"] in (1, 3):
            if mail["round"] == 1:
                late["letter"] = message.content["letter.0"]
            else:
                message.content["letter.0"] = late["letter"]
                senders = message.content["senders"]
                message.content["senders"] = ConfigRecord({**senders, "rounds": [0, *senders["rounds"][1:]]})

    grid.fault = fault
    run = federate(tmp_path, 3, grid=grid, sealed=True, rounds=3)

    row = next(row for row in run.rows() if row["peer"] == "peer-0" and row["round"] == 3)
    assert row["refused_letters"] == 1 and "replay" in row["error"]


def test_a_relay_that_swaps_a_key_later_is_refused(tmp_path):
    grid = local_grid(tmp_path, 3)

    def swap(partition, message):
        if partition == 0 and message.content["mail"]["round"] == 2:
            forged = {**message.content["keys"], "peer-1": Keys.generate().public_bytes.hex()}
            message.content["keys"] = ConfigRecord(forged)

    grid.fault = swap
    run = federate(tmp_path, 3, grid=grid, sealed=True)

    row = next(row for row in run.rows() if row["peer"] == "peer-0" and row["round"] == 2)
    assert row["status"] == "error" and "another public key for peer-1" in row["error"]


def test_sealed_mail_opens_without_rounds_too(tmp_path):
    run = federate(tmp_path, 3, sealed=True, strategy="gossip", mode="async", updates=12, models="mlp")

    assert all(row["refused_letters"] == 0 for row in run.rows())


def test_private_keys_stay_with_the_peer_and_are_readable_by_it_alone(tmp_path):
    run = federate(tmp_path, 2, sealed=True, rounds=1)

    keys = list((tmp_path / "state").rglob("key.json"))
    assert len(keys) == 2
    for key in keys:
        assert key.stat().st_mode & 0o077 == 0
        private = key.read_text().split('"private": "')[1][:64]
        for message in run.grid.sent + run.grid.replies:
            assert private not in str(message.content)


def test_a_sealed_run_that_is_resumed_ends_as_an_uninterrupted_one(tmp_path):
    whole = federate(tmp_path / "whole", 3, sealed=True, rounds=3)
    grid = killed(tmp_path / "cut", 3, peer=1, round=2, sealed=True, rounds=3)

    resumed = federate(tmp_path / "cut", 3, grid=grid, resume=str(tmp_path / "cut" / "run"), sealed=True, rounds=3)

    assert resumed.timeless_rows() == whole.timeless_rows()


@pytest.mark.parametrize("spec", ["fp32", "fp16", "int8", "topk:2", "fp32+zstd", "int8+zstd", "topk:2+zstd"])
@pytest.mark.parametrize(("layers", "dimensions"), [(0, 8), (1, 8), (3, 64)])
@pytest.mark.parametrize("told", [(), CLAIMS])
def test_the_largest_sealed_letter_fits_its_bound_and_no_much_larger_one_does(spec, layers, dimensions, told):
    shape, names = (300, 10), ("a", "b", "c")
    made = codec(spec)
    stream = np.random.default_rng(0)  # of numbers that nothing compresses
    bits = np.nan_to_num(stream.integers(0, 2**32, shape, np.uint32).view(np.float32), posinf=1, neginf=1)
    logits = bits.clip(-1e30, 1e30) if spec.startswith("fp32") else stream.random(shape, np.float32)
    arrays = dict(made.encode(logits))
    arrays |= encode_features([np.ones((shape[0], dimensions), np.float32)] * layers)
    if told:
        every = np.ones(shape[0], np.float32)
        arrays |= encode_claims(Claims(np.ones(shape[1], np.float32), every, every.astype(bool)))
    keys = {name: Keys.generate() for name in names}
    sealer = Sealer(keys["a"], "a", "run")
    payload, wraps = sealer.seal_for(pack(arrays), to={name: keys[name].public_bytes for name in names}, round=1)
    letter = {
        "sealed": np.frombuffer(payload, np.uint8),
        "wraps": np.stack([np.frombuffer(w, np.uint8) for w in wraps]),
    }

    most = most_sealed(made, shape, layers=layers, dimensions=dimensions, claims=claims_layout(shape, told))

    check_sealed(letter, receivers=3, most=most)
    # What the bound leaves beyond that are the names and the frame, not another letter.
    assert len(payload) <= most < len(payload) + 4096 + 0.02 * len(payload)
    check_sealed({**letter, "sealed": np.zeros(most, np.uint8)}, receivers=3, most=most)
    for wrong in (
        {**letter, "sealed": np.zeros(most + 1, np.uint8)},
        {**letter, "sealed": letter["sealed"].astype(np.uint16)},
        {**letter, "sealed": letter["sealed"][None]},
        {**letter, "wraps": letter["wraps"][:2]},
        {**letter, "wraps": letter["wraps"][:, 1:]},
        {**letter, "more": letter["sealed"]},
        {"wraps": letter["wraps"]},
        {"sealed": letter["sealed"]},
        {},
    ):
        with pytest.raises(BadKnowledge, match=f"at most {most} bytes and 3 wraps"):
            check_sealed(wrong, receivers=3, most=most)


def test_each_receiver_gets_the_one_wrap_that_is_for_it():
    arrays = Packed.of({"sealed": np.arange(9, dtype=np.uint8), "wraps": np.arange(180, dtype=np.uint8).reshape(3, 60)})

    for receiver in range(3):
        mine = address(arrays, receiver)
        assert set(mine) == {"sealed", "wrap"}
        np.testing.assert_array_equal(mine["wrap"], arrays["wraps"][receiver])
        np.testing.assert_array_equal(mine["sealed"], arrays["sealed"])


@pytest.mark.parametrize("dimensions", [1, 16])
def test_the_bound_grows_with_every_layer_by_at_least_what_it_adds(dimensions):
    shape, made = (50, 10), codec("fp16")
    arrays = dict(made.encode(np.zeros(shape, np.float32)))

    def both(layers):
        features = encode_features([np.ones((shape[0], dimensions), np.float32)] * layers)
        return most_sealed(made, shape, layers=layers, dimensions=dimensions), len(pack({**arrays, **features}))

    for layers in range(40):
        (bound, real), (next_bound, next_real) = both(layers), both(layers + 1)
        assert next_bound - bound >= next_real - real > 0 and bound >= real
