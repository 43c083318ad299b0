"""What a server averages, in the baselines that have one."""

import numpy as np
import pytest
from flwr.supercore.task_identity import TaskIdentity
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import log_softmax, softmax

from fedkd.settings.config import RunConfig
from fedkd.wire.codecs import BadKnowledge, codec
from fedkd.wire.messages import Answer, Letter, Packed
from strategies.consensus import Consensus
from strategies.fedavg import FedAvg
from strategies.relay.mailbox import SERVER, Mailbox

SHAPE = (4, 3)

TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1  # else Flower makes no message


def config(**settings):
    return RunConfig.from_mapping({"proxy-size": SHAPE[0], **{k.replace("_", "-"): v for k, v in settings.items()}})


def logits(seed):
    return (3 * np.random.default_rng(seed).standard_normal(SHAPE)).astype(np.float32)


def filled(rounds, arrays):
    box = Mailbox()
    for peer, round in rounds.items():
        box.put(peer, Letter(f"peer-{peer}", round, Packed.of(arrays(peer))))
    return box


@pytest.mark.parametrize("kind", ["fedmd", "ds-fl"])
@given(rounds=st.dictionaries(st.integers(0, 4), st.integers(0, 5), min_size=1))
def test_the_consensus_is_the_mean_of_all_weighed_down_by_age(kind, rounds):
    made = Consensus(config(strategy="consensus", consensus=kind, max_staleness=3, staleness_decay=0.5), 5, SHAPE[1])
    box = filled(rounds, lambda peer: codec("fp32").encode(logits(peer)))

    letters = [made.letters(peer, 6, box) for peer in range(5)]

    usable = {peer: 0.5 ** (5 - sent) for peer, sent in rounds.items() if 5 - sent <= 3}
    if not usable:
        assert letters == [()] * 5
        return
    assert all(one == letters[0] for one in letters)  # one mean for everyone, each peer's own knowledge in it
    (letter,) = letters[0]
    assert (letter.sender, letter.round, letter.weight) == ("server", 5, 1.0)
    found = codec("fp32").decode(letter.arrays, shape=SHAPE)
    each = [
        logits(peer).astype(float) if kind == "fedmd" else softmax(logits(peer).astype(float), -1) for peer in usable
    ]
    mean = np.average(each, axis=0, weights=list(usable.values()))
    expected = mean if kind == "fedmd" else softmax(mean / 0.1, -1)  # 0.1: Itahara et al. [paper]
    np.testing.assert_allclose(found if kind == "fedmd" else softmax(found, -1), expected, atol=1e-5)


def test_a_consensus_is_computed_anew_in_each_round_and_of_certain_peers_stays_finite():
    made = Consensus(config(strategy="consensus", consensus="ds-fl"), 2, SHAPE[1])
    certain = np.where(np.arange(3) == 1, 1e4, -1e4).astype(np.float32) * np.ones(SHAPE, np.float32)
    box = filled({0: 0, 1: 0}, lambda peer: codec("fp32").encode(certain))

    first = codec("fp32").decode(made.letters(0, 1, box)[0].arrays, shape=SHAPE)
    np.testing.assert_allclose(log_softmax(first, -1).argmax(-1), 1)
    np.testing.assert_allclose(softmax(first, -1), softmax(np.array([0.0, 10.0, 0.0])) * np.ones(SHAPE), atol=1e-6)
    for peer in (0, 1):
        box.put(peer, Letter(f"peer-{peer}", 1, Packed.of(codec("fp32").encode(logits(peer)))))
    assert not np.allclose(codec("fp32").decode(made.letters(0, 2, box)[0].arrays, shape=SHAPE), first)


def weights(value):
    return {"w": np.full((2, 2), value, np.float32), "b": np.full(3, 2 * value, np.float32)}


def fedavg(**settings):
    return FedAvg(config(strategy="fedavg", rounds=3, **settings), 3, SHAPE[1])


def answer(peer, round, arrays, **metrics):
    return Answer(f"peer-{peer}", round, metrics=metrics, arrays=Packed.of(arrays))


@given(samples=st.lists(st.integers(1, 10**9), min_size=3, max_size=3), came=st.sets(st.integers(0, 2), min_size=1))
def test_weights_are_averaged_by_samples_of_whoever_answered_in_the_round_before(samples, came):
    made = fedavg()
    for peer in range(3):
        made.check(answer(peer, 0, weights(peer), samples=samples[peer]))
    box = filled(dict.fromkeys(came, 0), weights)

    (letter,) = made.letters(0, 1, box)

    mean = np.average(sorted(came), weights=[samples[peer] for peer in sorted(came)])
    assert (letter.sender, letter.round) == ("server", 0) and list(made.teachers(0, 1)) == [0, 1, 2]
    np.testing.assert_allclose(letter.arrays["w"], mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(letter.arrays["b"], 2 * mean, rtol=1e-5, atol=1e-6)
    assert made.letters(1, 1, box)[0] is letter  # held once, however many hear it
    # Nobody answers in round 1: the average of the round before is what there is.
    assert made.letters(1, 2, box) == (letter,)
    assert fedavg().letters(0, 1, Mailbox()) == ()


@pytest.mark.parametrize(
    ("arrays", "metrics", "complaint"),
    [
        ({}, {"samples": 5}, "got no array"),
        (weights(np.nan), {"samples": 5}, "`w` to be finite float32"),
        (weights(np.inf), {"samples": 5}, "`w` to be finite float32"),
        ({"w": np.ones((2, 2))}, {"samples": 5}, "`w` to be finite float32, but got float64"),
        (weights(1), {}, "`samples` to be a whole number"),
        (weights(1), {"samples": 0}, "`samples` to be a whole number"),
        (weights(1), {"samples": 1.5}, "`samples` to be a whole number"),
        (weights(1), {"samples": 10**9 + 1}, "`samples` to be a whole number"),
    ],
)
def test_weights_that_cannot_be_averaged_are_refused(arrays, metrics, complaint):
    for round in (0, 1, 2):
        with pytest.raises(BadKnowledge, match=complaint):
            fedavg().check(answer(0, round, arrays, **metrics))


def test_after_the_last_average_nothing_has_to_come_and_what_comes_fits_it():
    made = fedavg()
    for peer in range(3):
        made.check(answer(peer, 0, weights(peer), samples=1))
    made.letters(0, 1, filled(dict.fromkeys(range(3), 0), weights))

    made.check(answer(0, 3, {}))
    made.check(answer(0, 1, weights(1), samples=1))
    with pytest.raises(BadKnowledge, match="no array"):
        made.check(answer(0, 2, {}))
    for other in (
        {"w": weights(1)["w"]},
        {**weights(1), "b": np.ones(4, np.float32)},
        {**weights(1), "c": np.ones(1, np.float32)},
    ):
        with pytest.raises(BadKnowledge, match="like the average's"):
            made.check(answer(0, 2, other, samples=1))


def test_at_the_start_those_are_left_out_whose_weights_are_not_like_most_peers():
    def odd(peer):
        return weights(peer) if peer else {"w": np.ones(7, np.float32)}

    box = filled({0: 0, 1: 0, 2: 0}, odd)
    box.put(SERVER, Letter("server", 0, Packed.of({"odd": np.ones(1, np.float32)})))

    assert list(fedavg().left_out(0, box)) == [0] and "other names or shapes" in fedavg().left_out(0, box)[0]
    assert fedavg().left_out(1, box) == {} and fedavg(fedavg_start="distilled").left_out(0, box) == {}
    made = fedavg()
    for peer in range(3):
        made.check(answer(peer, 0, weights(peer), samples=1))
    (letter,) = made.letters(0, 1, filled({0: 0, 1: 0, 2: 0}, odd))
    np.testing.assert_allclose(letter.arrays["w"], 1.5)


def test_a_distilled_start_sends_all_logits_to_one_peer_and_its_model_to_everyone():
    made = fedavg(fedavg_start="distilled")
    sent = {peer: codec("fp32").encode(logits(peer)) for peer in range(3)}
    for peer in range(3):
        made.check(answer(peer, 0, sent[peer]), kind="start")
    box = filled(dict.fromkeys(range(3), 0), sent.__getitem__)

    assert [one.sender for one in made.to_merge(box)] == ["peer-0", "peer-1", "peer-2"]
    assert fedavg().to_merge(box) is None
    with pytest.raises(BadKnowledge):
        made.check(answer(0, 0, weights(1), samples=1), kind="start")
    with pytest.raises(BadKnowledge, match="no array"):
        made.check(answer(0, 3, {}), kind="merge")  # the merged model itself is asked for
    made.check(answer(0, 3, weights(4)), kind="merge")  # whose samples do not count
    box.put(SERVER, Letter("peer-0", 0, Packed.of(weights(4))))
    assert [len(box), {peer for peer, _ in box}] == [4, {SERVER, 0, 1, 2}]
    for peer in range(3):
        (letter,) = made.letters(peer, 1, box)
        np.testing.assert_array_equal(letter.arrays["w"], 4)
    for peer in range(3):
        made.check(answer(peer, 1, weights(peer), samples=1 + peer))
        box.put(peer, Letter(f"peer-{peer}", 1, Packed.of(weights(peer))))
    (letter,) = made.letters(0, 2, box)
    np.testing.assert_allclose(letter.arrays["w"], (0 * 1 + 1 * 2 + 2 * 3) / 6, rtol=1e-6)


@pytest.mark.parametrize("late", [(0,), (0, 1)])
def test_the_logits_of_peers_that_start_late_are_neither_refused_nor_averaged(late):
    made = fedavg(fedavg_start="distilled")
    box = Mailbox()
    box.put(SERVER, Letter("server", 0, Packed.of(weights(4))))
    made.letters(2, 1, box)
    for peer in range(3):
        kind, arrays = ("start", codec("fp32").encode(logits(peer))) if peer in late else ("learn", weights(peer))
        made.check(answer(peer, 1, arrays, samples=1 + peer), kind=kind)
        box.put(peer, Letter(f"peer-{peer}", 1, Packed.of(arrays)))
    (letter,) = made.letters(0, 2, box)
    learned = [peer for peer in range(3) if peer not in late]
    mean = np.average(learned, weights=[1 + peer for peer in learned])
    np.testing.assert_allclose(letter.arrays["w"], mean, rtol=1e-6)
