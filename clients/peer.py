"""One site's life: it introduces itself, starts, learns from what it hears, and answers with what it knows.

A :class:`Peer` knows nothing of Flower: it turns a :class:`~fedkd.wire.messages.Mail` into an
:class:`~fedkd.wire.messages.Answer`. Its data and its weights stay with it; only encoded logits on the public
proxy set and numbers about itself go out.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from clients import warm
from clients.attacks import is_attacker, poison
from clients.averaging import load_weights, weights
from clients.builder import Builder, body_of
from clients.configuration import PeerConfig
from clients.data import (
    Site,
    file_versions,
    open_pool,
    open_site,
    proxy_samples,
    proxy_subset,
    seen_shape,
)
from clients.device import pick_device
from clients.final_model import Final
from clients.flow import Flow
from clients.hearing import Hearing
from clients.learner import Learner, Memo
from clients.pretrained import pretrain
from clients.rehearsal import check_start, rehearse
from clients.releases import Private, withhold
from clients.runs import close, make_room, refuse_other_data, remember_data, run_folder, use
from clients.scores import Series, reliability, scores
from clients.state import Store, Taught, Trained
from clients.telling import Telling
from fedkd import models
from fedkd.data.samples import Inputs
from fedkd.models.libraries import named
from fedkd.results.profile import Stopwatch
from fedkd.settings.config import RunConfig
from fedkd.settings.rules import split_list
from fedkd.source import source_hash, source_root
from fedkd.training.loops import Diverged, predict
from fedkd.training.memory import keep_freed_memory
from fedkd.wire.claims import Claims, encode_claims, encode_rows
from fedkd.wire.codecs import BadKnowledge, codec
from fedkd.wire.messages import Answer, Arrays, Mail

if TYPE_CHECKING:
    from clients.keys import Secrets

NO_ROUND = -1
_TOLD = {"refused_letters", "epsilon"}
"""The metrics that do not depend on private data, told under a budget too."""

_UNLABELLED = "the labels of the proxy set are not known, or its classes are not the peers'"


class Peer:
    """One site in one run.

    Args:
        peer_config: who and where the peer is.
        config: the run's settings.
        run: the run's token.

    Raises:
        SettingError: the settings ask for what this peer does not have.
    """

    def __init__(self, peer_config: PeerConfig, config: RunConfig, run: str) -> None:
        torch.set_num_threads(config.threads)
        keep_freed_memory()
        self.peer_config, self.asked = peer_config, config
        self.device = pick_device(config.device, repeatable=not config.fast)
        self.versions = file_versions(peer_config, run)
        shape, self.classes = seen_shape(config, peer_config, self.device, self.versions)
        self.models = Builder(config, peer_config, shape, self.classes, self.device)
        body = body_of(self.models, run)
        self.site: Site = open_site(config, peer_config, self.device, self.versions, body)
        config = self.config = config.knowing(len(self.site.commons.proxy_inputs))
        if not peer_config.simulated:  # by how much its own proxy set has, where the server asks for all of it
            peer_config.limits.bounds.check(config)
        self.watch = Stopwatch(partial(torch.cuda.synchronize, self.device) if self._waits_to_measure else None)
        self.learner = self._learner()
        self.codec = codec(config.codec)
        self.store = Store(run_folder(peer_config.state_dir, run), run)
        refuse_other_data(self.store.folder, self.site.fingerprints)
        if not peer_config.simulated:
            make_room(self.store.folder)
        self.secrets = _secrets(peer_config, self.store) if config.sealed else None
        self.final = Final(peer_config, config, self.site.commons)
        self.private = Private.of(config, peer_config, run)
        self.telling = self._telling() if config.told else None
        self.flow = Flow.from_config(config, self.models.bare()) if config.method == "infoflow" else None
        self.hearing = Hearing(
            config, peer_config, classes=self.classes, device=self.device, flow=self.flow, secrets=self.secrets
        )

    def answer(self, mail: Mail) -> Answer:
        """Do what a mail asks for."""
        started = time.perf_counter()
        use(self.store.folder)
        try:
            with self.watch.phase("other"):
                answer: Answer = getattr(self, f"_{mail.kind}")(mail)
        finally:
            spent = self.watch.take()  # after an error too: it is not the next mail's
        seconds = time.perf_counter() - started
        if mail.kind == self._last and (mail.kind == "isolated" or mail.round == self.config.rounds):
            close(self.store.folder)
        if self.peer_config.withholds:  # here, where every kind of answer passes
            answer, spent = self._withheld(answer, mail), {}
        told = spent if self.config.profile else {}
        return replace(answer, metrics={**answer.metrics, "seconds": seconds, **told})

    def _withheld(self, answer: Answer, mail: Mail) -> Answer:
        """Keep what was measured at this peer, and return the rest of an answer."""
        measured = {name: value for name, value in answer.metrics.items() if name not in _TOLD}
        if measured:
            withhold(self.peer_config, mail.run, mail.round, measured)
        told = {name: value for name, value in answer.metrics.items() if name in _TOLD}
        return replace(answer, metrics=told, series={})

    def _introduce(self, mail: Mail) -> Answer:
        """Check all that can be checked before training, and say who came with what."""
        own, name = self.models.own(), named(self.peer_config.model_spec(self.config))
        model = own
        if checkpoint := self.peer_config.checkpoint_path(self.config):
            check_start(model, self.site.commons.proxy_inputs, self.config, path=checkpoint)
        if not self.final.path(mail).exists():  # else it goes on
            self.final.check_room()
        if self.private:
            self.private.check_budget()
        if self.config.flow_auxiliary and self.flow:
            self.models.widened()  # a model that cannot be widened is an error before any training
        if self.config.strategy == "fedavg":
            model, merged = self.models.common(), self.config.fedavg_start == "distilled"
            name = f"{name} → {self.config.fedavg_model}" if merged else self.config.fedavg_model
            self._rehearse(model, self.config.fedavg_model, key="fedavg-model")
        if self.config.strategy != "fedavg" or self.config.fedavg_start == "distilled":
            self.codec.layout((self.config.travelling, self.classes))
            self.learner.check()
            self._rehearse(own, self.peer_config.model_spec(self.config), key="models")
        commons = self.site.commons
        return self._reply(
            mail,
            facts={
                "model": name,
                "parameters": models.parameters_count(model),
                "samples": len(self.site.labels),
                "held-out": len(self.site.held_out.labels),
                "chosen-unseen": int(self._chosen_unseen),
                "classes": json.dumps(commons.source.classes),
                "fingerprint": commons.fingerprint,
                "proxy-shape": json.dumps(commons.proxy_shape),
                "source": source_hash(),
                "source-root": str(source_root()) if self.peer_config.simulated else "",
                "peers": self.peer_config.of,
                "index": self.peer_config.index,
                "simulated": int(self.peer_config.simulated and not self.peer_config.dataset),  # own data are real data
                "device": str(self.device),
                "public-key": self.secrets.public if self.secrets else "",
            },
        )

    def _start(self, mail: Mail) -> Answer:
        """Round 0: load or make the model, pre-train it on private data, and answer with its first knowledge."""
        self.final.begin(mail)
        self.store.begin()
        remember_data(self.store.folder, self.site.fingerprints)
        if self.secrets:
            self.secrets.pin(mail.keys)
        averages = self.config.strategy == "fedavg"
        cold = averages and self.config.fedavg_start == "cold"
        common = averages and self.config.fedavg_start != "distilled"
        model = self.models.common() if common else self.models.own()
        trained = Trained() if cold else Trained(samples=self._pretrain(model, common=common))
        if mail.round > 0:  # a late start: the controls still look for round 0
            self.store.save(0, model, trained=trained)
        if cold:
            return self._average(mail, model)
        found, bins = self._examine(mail.round, model)
        if common:
            self._save(mail, model, self.config.fedavg_model, found, trained=trained)
            found |= {"samples": len(self.site.labels), "samples_seen": trained.samples}
            return self._reply(mail, metrics=found, arrays=weights(model), series=bins)
        return self._close(mail, model, found, bins, memo={}, trained=trained)

    def _pretrain(self, model: nn.Module, *, common: bool) -> int:
        """Train a model before round 1; return on how many private samples."""

        def train() -> int:
            seen = self.learner.seen
            self.learner.ahead(model, epochs=0 if finished else self.config.pretrain_epochs)
            return self.learner.seen - seen

        brought = self.peer_config.checkpoint_path(self.config) is not None and not common
        finished = brought and not self.config.replace_head and self.config.pretrain == "fresh"

        return pretrain(model, self.config, self.peer_config, self.versions, train, common=common)

    def _learn(self, mail: Mail) -> Answer:
        """A round: distil from the teachers, train on private data, measure, and answer with new knowledge."""
        if self.secrets:
            self.secrets.pin(mail.keys)
        if self.config.strategy == "fedavg":
            return self._average(mail, self._given(mail))
        model, memo, own = self._recall(mail.round)
        with self.watch.phase("decode"):
            heard, refused = self.hearing.hear(mail, memo)
        trained, seen = self.store.trained(before=mail.round), self.learner.seen
        found = self.learner.learn(model, heard, round=mail.round, memo=memo, own=own)
        taught = Taught(mail.round, found["temperature"], found["kd_weight"]) if heard is not None else None
        trained = trained.then(mail.round, self.learner.seen - seen, taught)
        bins: Series = {}
        if self.config.evaluates(mail.round):
            measured, bins = self._examine(mail.round, model)
            found |= measured
        return self._close(mail, model, found, bins, memo=memo, trained=trained, refused=refused)

    def _average(self, mail: Mail, model: nn.Module) -> Answer:
        """Federated averaging, the baseline: measure what the server averaged, train it, and send its weights.

        The state is the average, as it was measured.
        """
        found, bins = self._examine(mail.round, model) if self.config.evaluates(mail.round) else ({}, {})
        found["samples"] = len(self.site.labels)
        trained, arrays = self.store.trained(before=mail.round), {}
        if mail.round < self.config.rounds:
            average = {name: value.clone() for name, value in model.state_dict().items()}
            seen = self.learner.seen
            found["local_loss"] = self.learner.local(model, round=mail.round, epochs=self.config.local_epochs)
            trained = trained.then(mail.round, self.learner.seen - seen)
            arrays = weights(model)
            if not all(np.isfinite(array).all() for array in arrays.values()):
                raise self._diverged("the model's weights", mail.round)
            model.load_state_dict(average)
        self._save(mail, model, self.config.fedavg_model, found, trained=trained)
        found["samples_seen"] = trained.samples
        return self._reply(mail, metrics=found, arrays=arrays, series=bins)

    def _merge(self, mail: Mail) -> Answer:
        """Distil all peers' knowledge into the common model that federated averaging starts from."""
        model = self.models.common()
        heard, refused = self.hearing.hear(mail, {})
        if heard is None:
            raise BadKnowledge(f"no peer's knowledge can be used: {'; '.join(refused)}")
        self.learner.merge(model, heard)
        return self._reply(mail, metrics=self._measure(model), arrays=weights(model))

    def _isolated(self, mail: Mail) -> Answer:
        """The control: the same start and the same private batches, without any teacher.

        In which rounds a peer drew private batches nobody knows but the peer: an answer may be late, lost or refused,
        and a round done over. So the control goes by what the peer's state says.
        """
        rounds = self.store.trained(before=mail.round + 1).rounds
        return self._again(mail, rounds, lambda model, round: self.learner.alone(model, round=round))

    def _channel(self, mail: Mail) -> Answer:
        """What the channel carries from the truth: the same again, the proxy set's labels in the teachers' place.

        In the rounds in which the peer had teachers, as its state says, with the temperature and the weight that it
        used then; in its other rounds it trains as the isolated control does.
        """
        commons, memo = self.site.commons, Memo()
        if why := self.config.without_channel or ("" if commons.proxy_labels is not None else _UNLABELLED):
            return self._reply(mail, facts={"left-out": why})
        trained = self.store.trained(before=mail.round + 1)
        taught = {one.round: one for one in trained.taught}

        def step(model: nn.Module, round: int) -> None:
            if one := taught.get(round):
                self.learner.shown_labels(model, round=round, temperature=one.temperature, weight=one.weight, memo=memo)
            else:
                self.learner.alone(model, round=round)

        return self._again(mail, sorted({*trained.rounds, *taught}), step)

    def _again(self, mail: Mail, rounds: Sequence[int], step: Callable[[nn.Module, int], object]) -> Answer:
        """Go through rounds again from the peer's start, and answer with what was measured whenever it was due."""
        fedavg = self.config.strategy == "fedavg"
        model = self.models.common() if fedavg and self.config.fedavg_start != "distilled" else self.models.own()
        self.store.load(0, model)
        curve = [(0, self._measure(model))]
        shown = [round + fedavg for round in rounds]  # an average is measured before it is trained
        for round, (since, until) in zip(rounds, pairwise([*shown, mail.round + 1]), strict=True):
            step(model, round)
            if any(self.config.evaluates(measured) for measured in range(since, until)):
                curve.append((since, self._measure(model)))
        series = {name: [found[name] for _, found in curve] for name in curve[0][1]}
        series["round"] = [float(round) for round, _ in curve]
        return self._reply(mail, series=series)

    def _pooled(self, mail: Mail) -> Answer:
        """The ceiling: one model on the private data of all, in a simulation; a deployed peer's limits refuse it.

        It goes through as many epochs of all data as peers that take turns do of their own, which need not be as many
        samples as these peers saw together: its number is told beside theirs.
        """
        like = self.peer_config.as_pooled(self.config)
        shape, _ = seen_shape(self.asked, like, self.device, pooled=True)
        builder = replace(self.models, peer_config=like, shape=shape, key="pooled-model")
        self.site = open_pool(self.asked, like, self.device, builder.body())
        model = builder.own()
        epochs = self.config.pretrain_epochs + self.config.rounds * self.config.local_epochs
        learner = self._learner()
        learner.ahead(model, epochs=epochs)
        found = self._measure(model) | {"samples_seen": learner.seen}
        return self._reply(mail, metrics=found, facts={"model": self.config.pooled_model})

    @property
    def _chosen_unseen(self) -> bool:
        """Whether all that is chosen by accuracy at this peer, if anything, is known to be chosen on unseen data."""
        common = self.config.strategy == "fedavg" and self.config.fedavg_start != "distilled"
        brought = self.peer_config.checkpoint_path(self.config) is not None and not common
        return not (self.config.holds_out and brought and not self.peer_config.held_out_path(self.config))

    @property
    def _last(self) -> str:
        """The kind of the last mail of a run; none that could be told comes last in one without a barrier."""
        if "isolated" in split_list(self.config.controls):
            return "isolated"
        return "learn" if self.config.mode == "sync" else ""

    @property
    def _warm_key(self) -> tuple[str, str]:
        return str(self.store.folder), self.store.run

    @property
    def _waits_to_measure(self) -> bool:
        """Whether the device works on by itself while this process goes on, and somebody wants to know for how long."""
        return self.config.profile and self.device.type == "cuda"

    def _learner(self) -> Learner:
        return Learner(self.config, self.site, self.peer_config.index, auxiliary=self.models.widened, watch=self.watch)

    def _telling(self) -> Telling:
        config, index = self.config, self.peer_config.index
        return Telling(config, self.site, index, self.store.folder, self.private, self.peer_config.simulated)

    def _given(self, mail: Mail) -> nn.Module:
        """Return the common model with the weights that the server sent."""
        model = self.models.common()
        if len(mail.letters) != 1:
            raise BadKnowledge(f"expected one letter with the server's weights, but got {len(mail.letters)}")
        load_weights(model, mail.letters[0].arrays)
        return model

    def _recall(self, round: int) -> tuple[nn.Module, Memo, Tensor | None]:
        """Return the model as it stood before a round, from this process if it ran last here, else from disk.

        And what it says of the round's proxy samples, if this process knows that already.
        """
        before = self.store.latest(before=round)
        kept = warm.take(self._warm_key)
        if kept is not None and kept.round == before:
            same_samples = kept.round == round - 1 or self.config.travelling == self.config.public_size
            return kept.model, dict(kept.memo), kept.logits if same_samples else None
        model = self.models.bare()
        return model, self.store.load(before, model), None

    def _close(
        self,
        mail: Mail,
        model: nn.Module,
        found: dict[str, float],
        bins: Series,
        *,
        memo: Memo,
        trained: Trained,
        refused: list[str] | None = None,
    ) -> Answer:
        """Predict what travels next, save the state and remember the model.

        In this order: a model whose logits cannot be encoded, since they are not finite, does not become the state.
        """
        with self.watch.phase("encode"):
            subset = proxy_subset(self.config, mail.round + 1, self.device)
            with self.watch.phase("predict"):
                logits = self._logits(model, self._public(mail.round + 1), mail.round)
            arrays = self._knowledge(mail, model, logits, subset)
        with self.watch.phase("store"):
            self._save(mail, model, self.peer_config.model_spec(self.config), found, memo, trained=trained)
        said = logits if self.learner.compares else None
        warm.keep(self._warm_key, warm.Warm(mail.round, model, dict(memo), said))
        found |= {"refused_letters": len(refused or []), "samples_seen": trained.samples}
        if self.private:
            found["epsilon"] = self.private.epsilon
        facts: dict[str, str | int] = {"refused": "; ".join(refused or [])}
        return self._reply(mail, metrics=found, arrays=arrays, facts=facts, series=bins)

    def _save(
        self,
        mail: Mail,
        model: nn.Module,
        spec: str,
        found: Mapping[str, float],
        memo: Memo | None = None,
        *,
        trained: Trained,
    ) -> None:
        """Save the state of a round, which is also what the run leaves unless another round follows."""
        card = self.final.card(mail, spec, found)
        state = self.store.save(mail.round, model, memo, trained, said=card.head() if card else None)
        if card:
            self.final.keep(mail, state)

    def _knowledge(self, mail: Mail, model: nn.Module, logits: Tensor, subset: Tensor) -> Arrays:
        """Return what a model knows about a subset of the proxy samples, encoded and, if asked for, sealed."""
        claims = Claims()
        if self.telling:
            with self.watch.phase("predict"):
                claims = self.telling.claims(lambda: self._began(mail, model)).on(subset.cpu().numpy())
        if self.peer_config.simulated and is_attacker(self.config, self.peer_config.index, self.peer_config.of):
            logits = poison(logits, self.config, index=self.peer_config.index, round=mail.round)
        published = logits.cpu().numpy()
        if self.private:
            published = self.private.publish(published, round=mail.round)
        arrays: Arrays = {**encode_rows(self.codec, published, claims), **encode_claims(claims)}
        if self.flow:
            arrays = {**arrays, **self.flow.encode(model, self._public(mail.round + 1))}
        return self.secrets.seal(arrays, round=mail.round) if self.secrets else arrays

    def _began(self, mail: Mail, model: nn.Module) -> nn.Module:
        """Return the model with which this peer started, given the one that it has now."""
        if mail.kind == "start":
            return model
        began = self.models.bare()
        self.store.load(0, began)
        return began

    def _measure(self, model: nn.Module) -> dict[str, float]:
        return self._examine(NO_ROUND, model)[0]

    def _examine(self, round: int, model: nn.Module) -> tuple[dict[str, float], Series]:
        """Return what a model scores on the test set, and at the start and the end of a run its reliability diagram."""
        with self.watch.phase("evaluate"):
            logits = self._logits(model, self.site.commons.test_inputs, round)
            labels, bins = self.site.commons.test_labels, round in (0, self.config.rounds)
            return scores(logits, labels, self.site.label_share), reliability(logits, labels) if bins else {}

    def _public(self, round: int) -> Inputs:
        return proxy_samples(self.config, round, self.site.commons.proxy_inputs)

    def _logits(self, model: nn.Module, inputs: Inputs, round: int) -> Tensor:
        """Predict; what is no number is a model that training has ruined, and nothing to measure or publish."""
        logits = predict(model, inputs, fast=self.config.fast)
        if not bool(logits.isfinite().all()):
            raise self._diverged("the model's logits", round)
        return logits

    def _diverged(self, what: str, round: int) -> Diverged:
        return Diverged(what, learning_rate=self.config.learning_rate, round=None if round == NO_ROUND else round)

    def _rehearse(self, model: nn.Module, spec: str, *, key: str) -> None:
        inputs, frank = self.site.commons.proxy_inputs, self.peer_config.simulated
        rehearse(model, spec, inputs, self.config, classes=self.classes, key=key, frank=frank)

    def _reply(
        self,
        mail: Mail,
        *,
        facts: dict[str, str | int] | None = None,
        metrics: dict[str, float] | None = None,
        series: dict[str, list[float]] | None = None,
        arrays: Arrays | None = None,
    ) -> Answer:
        return Answer(self.peer_config.name, mail.round, facts or {}, metrics or {}, series or {}, arrays or {})


def _secrets(peer_config: PeerConfig, store: Store) -> "Secrets":
    from clients.keys import Secrets  # only sealed mail pays for the import of the ciphers

    return Secrets(
        store.folder, peer_config.name, store.run, identity=peer_config.identity, trusted=peer_config.trusted_keys
    )
