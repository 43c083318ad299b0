"""A control does what its peer did, exactly: the same private batches, as many and in the same order."""

import hashlib
import math
import time
import types
from collections import defaultdict

import pytest
from federation import federate, local_grid
from flwr.app import Array, ArrayRecord
from hypothesis import Phase, example, given, reject, settings
from hypothesis import strategies as st

import clients.learner
import fedkd.training
import strategies.asynchronous
import strategies.controls
import strategies.post
import strategies.relay
from strategies.relay import RelayError

PEERS = 3
SMALL = {"models": "mlp", "pretrain_epochs": 1, "proxy_size": 64, "round_timeout": 8.0, "batch_size": 64}


class Killed(BaseException):
    """Not an Exception: nothing catches it, as nothing catches SIGKILL."""


class Clock:
    """The relay's clock, which goes on where the relay waits."""

    def __init__(self, monkeypatch):
        self.now = time.monotonic()
        clock = types.SimpleNamespace(monotonic=lambda: self.now, sleep=self.sleep, perf_counter=lambda: self.now)
        for module in (strategies.post, strategies.relay, strategies.asynchronous, strategies.controls):
            monkeypatch.setattr(module, "time", clock, raising=False)

    def sleep(self, seconds):
        self.now += max(seconds, 1e-3)


class Witness:
    """Sees every private batch that a model is trained on, and who is at work on which mail."""

    def __init__(self, monkeypatch):
        self.batches, self.inputs = [], ""
        self.states = defaultdict(dict)  # by peer: the private batches that went into the state of a round
        self.alone = {}  # by peer: those of its control
        forward, search = fedkd.training.forward, clients.learner.Learner._search

        def seen(model, inputs, **how):
            self.inputs = hashlib.sha1(inputs.numpy().tobytes()).hexdigest()
            return forward(model, inputs, **how)

        def labelled(logits, labels):
            self.batches.append((self.inputs, tuple(labels.tolist())))
            return cross_entropy(logits, labels)

        def trials(*arguments):
            before = len(self.batches)
            search(*arguments)
            del self.batches[before:]  # of models that are thrown away

        cross_entropy = fedkd.training.F.cross_entropy
        monkeypatch.setattr(fedkd.training, "forward", seen)
        monkeypatch.setattr(fedkd.training, "F", types.SimpleNamespace(cross_entropy=labelled))
        monkeypatch.setattr(clients.learner.Learner, "_search", trials)

    def answer(self, grid, partition, message):
        """Have a node work on a mail; an error leaves its state as it was."""
        mail, self.batches = message.content["mail"], []
        reply = grid.answer(partition, message)
        if reply.content["answer"]["error"]:
            return reply
        kind, round, states = mail["kind"], mail["round"], self.states[partition]
        if kind == "isolated":
            self.alone[partition] = self.batches
        if kind in ("start", "learn"):
            earlier = [r for r in states if r < round] if kind == "learn" else []
            before = states[max(earlier)] if earlier else []
            fedavg = message.content["settings"]["strategy"] == "fedavg"
            own = self.batches if kind == "learn" or (fedavg and states is not None) else []
            kept = {r: states[r] for r in earlier}
            self.states[partition] = {**kept, round: before + own}
        return reply

    def check(self, peers=range(PEERS)):
        for peer in peers:
            states = self.states[peer]
            assert self.alone[peer] == states[max(states)], f"peer {peer}"


@pytest.fixture
def instruments():
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield Clock(monkeypatch), Witness(monkeypatch)


def spoiled(reply):
    knowledge = reply.content["knowledge"] if "knowledge" in reply.content else {}
    reply.content["knowledge"] = ArrayRecord(
        {name: Array(array.numpy() * math.nan) for name, array in knowledge.items()}
    )
    return reply


class Fate:
    """What becomes of every mail of a round: drawn by hypothesis for (peer, round).

    ``late n``: the answer comes with the n-th message after it. ``refused``: the peer trains, the relay cannot use what
    it says. ``unheard``: it trains, and Flower reports an error. ``errs``: it never gets to work.
    """

    def __init__(self, grid, witness, fates, *, killed_at=None):
        self.grid, self.witness, self.fates, self.killed_at = grid, witness, fates, killed_at
        self.held, self.messages = [], 0
        grid.fault = self

    def __call__(self, partition, message):
        self.messages += 1
        if self.messages == self.killed_at:
            raise Killed
        for entry in list(self.held):
            entry[0] -= 1
            if entry[0] <= 0:
                self.held.remove(entry)
                self.grid.deliver(*entry[1:])
        mail = message.content["mail"]
        fate = self.fates.get((partition, mail["round"]), "ok") if mail["kind"] in ("start", "learn") else "ok"
        if fate == "errs":
            raise RuntimeError("not now")
        reply = self.witness.answer(self.grid, partition, message)
        if fate == "unheard":
            raise RuntimeError("lost on the way")
        if fate.startswith("late"):
            self.held.append([int(fate[-1]), message, reply])
            return self.grid.nothing
        return spoiled(reply) if fate == "refused" else reply


FATES = st.dictionaries(
    st.tuples(st.integers(0, PEERS - 1), st.integers(0, 5)),
    st.sampled_from(["errs", "refused", "unheard", "late 1", "late 3", "late 6"]),
    max_size=8,
)
WAYS = st.sampled_from(
    [
        {},
        {"schedule": "alternate", "local_epochs": 2},
        {"participation": 0.5},
        {"regime": "dml", "eval_every": 2},
        {"proxy_per_round": 32},
        {"regime": "tuned", "tune_temperatures": "1", "tune_weights": "0.5,1"},
        {"strategy": "gossip", "mode": "async", "updates": 14, "rounds": 2},
    ]
)


def run(tmp_path_factory, witness, fates, *, killed_at=None, **settings):
    path = tmp_path_factory.mktemp("run")
    grid = local_grid(path, PEERS)
    given_ = {**SMALL, "rounds": 4, "controls": "isolated", **settings}
    fate = Fate(grid, witness, fates, killed_at=killed_at)
    try:
        return federate(path, PEERS, grid=grid, **given_), fate
    except Killed:
        fate.killed_at = None
        fate.held.clear()
        grid.forget()
        if not (path / "run" / "relay.safetensors").exists():
            return federate(path, PEERS, grid=grid, **given_), fate
        return federate(path, PEERS, grid=grid, resume=str(path / "run"), **given_), fate


@settings(max_examples=12, phases=[Phase.explicit, Phase.generate])
@given(FATES, WAYS, st.one_of(st.none(), st.integers(4, 24)))
@example({}, {"strategy": "gossip", "mode": "async", "updates": 14, "rounds": 2}, None)
@example({(1, 1): "late 6", (1, 4): "late 3"}, {}, None)
@example({(0, 2): "unheard", (2, 1): "refused"}, {"schedule": "alternate"}, 10)
@example({}, {"participation": 0.5}, 9)
@example({(1, 0): "errs"}, {"regime": "tuned", "tune_temperatures": "1", "tune_weights": "1"}, None)
def test_a_control_sees_the_private_batches_that_its_peer_saw_under_any_schedule(
    tmp_path_factory, fates, way, killed_at
):
    if way.get("mode") == "async":
        killed_at = None  # not resumed
    with pytest.MonkeyPatch.context() as monkeypatch:
        Clock(monkeypatch)
        witness = Witness(monkeypatch)
        try:
            finished, fate = run(tmp_path_factory, witness, fates, killed_at=killed_at, **way)
        except RelayError:  # nobody answered in a round
            reject()

        working = {int(message.metadata.dst_node_id - 1000) // 7 for _, message, _ in fate.held}
        for peer, entry in enumerate(finished.summary()["peers"]):
            assert (entry["isolated"] is None) == (peer in working or entry["after"] is None)
        witness.check(witness.alone)
        assert set(witness.alone) >= set(range(PEERS)) - working
