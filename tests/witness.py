"""Watches a federation in this process: on which private batches peers and controls train; and a clock of its own."""

import hashlib
import time
import types
from collections import defaultdict

import clients.learner
import fedkd.losses.calibration
import fedkd.training.loops
import strategies.relay.asynchronous
import strategies.relay.controls
import strategies.relay.introductions
import strategies.relay.post
import strategies.relay.rounds
import strategies.relay.trials


class Clock:
    """The relay's clock, which goes on where the relay waits."""

    def __init__(self, monkeypatch):
        self.now = time.monotonic()
        clock = types.SimpleNamespace(monotonic=lambda: self.now, sleep=self.sleep, perf_counter=lambda: self.now)
        at_work = (
            strategies.relay.introductions,
            strategies.relay.post,
            strategies.relay.rounds,
            strategies.relay.asynchronous,
            strategies.relay.controls,
            strategies.relay.trials,
        )
        for module in at_work:
            monkeypatch.setattr(module, "time", clock, raising=False)

    def sleep(self, seconds):
        self.now += max(seconds, 1e-3)


class Witness:
    """Sees every private batch that a model is trained on, and who is at work on which mail."""

    def __init__(self, monkeypatch):
        self.batches, self.inputs = [], ""
        self.states = defaultdict(dict)  # by peer: the private batches that went into the state of a round
        self.alone = {}  # by peer: those of its isolated control
        self.shown = {}  # by peer: those of its channel control
        forward, search = fedkd.training.loops.forward, clients.learner.Learner._search

        def seen(model, inputs, **how):
            self.inputs = hashlib.sha1(inputs.numpy().tobytes()).hexdigest()
            return forward(model, inputs, **how)

        def labelled(logits, labels, **smoothed):
            self.batches.append((self.inputs, tuple(labels.tolist())))
            return cross_entropy(logits, labels, **smoothed)

        def trials(*arguments):
            before = len(self.batches)
            search(*arguments)
            del self.batches[before:]  # of models that are thrown away

        cross_entropy = fedkd.training.loops.F.cross_entropy
        monkeypatch.setattr(fedkd.training.loops, "forward", seen)
        for module in (fedkd.training.loops, fedkd.losses.calibration):
            monkeypatch.setattr(module, "F", types.SimpleNamespace(cross_entropy=labelled))
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
        if kind == "channel" and "left-out" not in reply.content["facts"]:
            self.shown[partition] = self.batches
        if kind in ("start", "learn"):
            earlier = [r for r in states if r < round] if kind == "learn" else []
            before = states[max(earlier)] if earlier else []
            said = message.content["settings"]
            cold = said["strategy"] == "fedavg" and said["fedavg-start"] == "cold"  # its start is its first training
            own = self.batches if kind == "learn" or cold else []
            kept = {r: states[r] for r in earlier}
            self.states[partition] = {**kept, round: before + own}
        return reply

    def check(self):
        for peer in self.alone:
            states = self.states[peer]
            assert self.alone[peer] == states[max(states)], f"peer {peer}"
        for peer in self.shown:
            states = self.states[peer]
            assert self.shown[peer] == states[max(states)], f"peer {peer}, with true labels"
