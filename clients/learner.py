"""How a peer learns in a round: from its teachers on the proxy set, and from its own labels."""

import copy
import itertools
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from clients.data import Site, proxy_samples, proxy_subset
from clients.flow import Flow
from fedkd import metrics
from fedkd.data.augment import Augmentation
from fedkd.data.samples import Inputs
from fedkd.errors import SettingError
from fedkd.losses.calibration import Calibration, class_shares
from fedkd.losses.decoupled import warm_up
from fedkd.losses.weighing import Evidence
from fedkd.results.profile import Stopwatch
from fedkd.seeding import derive
from fedkd.settings.config import RunConfig
from fedkd.settings.rules import numbers
from fedkd.training.belief import Belief
from fedkd.training.distillation import Distillation, label_logits, more_confident, teacher_or_self, toward_labels
from fedkd.training.loops import (
    Beside,
    Diverged,
    Drawn,
    Labelling,
    Optimization,
    distil,
    fit,
    fit_alone,
    fit_and_distil,
    predict,
)

Memo = dict[str, float]
"""What a peer remembers beside its model: numbers it chose itself."""


@dataclass(frozen=True)
class Heard:
    """What a peer heard in a round.

    Attributes:
        logits: the teachers' logits on this round's proxy samples, ``[K, P, C]``.
        weights: of whole teachers, ``[K]``.
        counts: how many private samples of each class each teacher says that it has, ``[K, C]``; None if none is told.
        certainty: how much each teacher says that it trusts itself on each sample, ``[K, P]``, >= 0, 0 where it said
            nothing of the sample; None if it is not told.
        placed: how much each teacher counts by sample and class, ``[K, P or 1, C or 1]``; None where ``weights`` are
            all there is.
        features: of each teacher the features ``[P, d]`` of its layers; empty unless they travel.
        flow_weights: of the features' teachers, where those are not the logits'.
    """

    logits: Tensor
    weights: Tensor
    counts: Tensor | None = None
    certainty: Tensor | None = None
    placed: Tensor | None = None
    features: Sequence[Sequence[Tensor]] = ()
    flow_weights: Sequence[float] | None = None

    @property
    def logit_weights(self) -> Tensor:
        """How much the teachers' logits count, as far as it is known: by sample and class, or whole teachers'."""
        return self.weights if self.placed is None else self.placed


class Learner:
    """One peer's way of learning.

    Args:
        config: the run's settings.
        site: its data.
        index: its number, of which its random streams are derived.
        auxiliary: makes the peer's model at double width.
        watch: told what the time goes to.

    Attributes:
        seen: private samples that models were trained on so far, each as often as it was drawn; those of a search's
            trials, whose models are thrown away, are not among them.
        shares: smoothed, of the classes in what it trains on, ``[C]``.
    """

    def __init__(
        self, config: RunConfig, site: Site, index: int, *, auxiliary: Callable[[], nn.Module], watch: Stopwatch
    ) -> None:
        self.config, self.site, self.index, self.auxiliary, self.watch = config, site, index, auxiliary, watch
        self.how = replace(Optimization.from_config(config), own_statistics=config.norm_statistics == "private")
        self.seen = 0
        self.belief = Belief.from_config(config)
        self.shares = class_shares(site.labels, len(site.label_share))
        self.augment = Augmentation.named(config.augment, site.inputs, key="augment")
        proxy = site.commons.proxy_inputs
        self.augment_proxy = Augmentation.named(config.augment_proxy, proxy, key="augment-proxy")
        Distillation.from_config(config)  # a wrong setting is an error before any training

    @property
    def compares(self) -> bool:
        """Whether it compares what it hears with what the model says itself."""
        return self.belief.needs_own or self.config.regime == "partitioned"

    def check(self) -> None:
        """Try the distillation on as many classes as there are: it depends on them whether it is possible.

        Raises:
            SettingError: it is not.
        """
        nothing = torch.zeros(2, 2, len(self.site.label_share))
        distillation = Distillation.from_config(self.config)
        try:
            distillation(nothing[0], distillation.prepare(nothing, torch.ones(2)))
        except ValueError as error:
            cakd = self.config.divergence == "cakd"
            key, value = ("cakd-top-k", self.config.cakd_top_k) if cakd else ("divergence", self.config.divergence)
            raise SettingError(key, value, f"possible with {nothing.shape[-1]} classes ({error})") from error

    def ahead(self, model: nn.Module, *, epochs: int) -> float:
        """Train on private labels before the rounds or in their place, a phase of its own; return the loss."""
        return self._fit(model, 0, epochs, self._see, self.how)

    def local(self, model: nn.Module, *, round: int, epochs: int) -> float:
        """Train on private labels alone, in a round; return the loss."""
        return self._fit(model, round, epochs, self._see, self._how(round))

    def shown_labels(self, model: nn.Module, *, round: int, temperature: float, weight: float, memo: Memo) -> None:
        """Train as in a round with teachers, with the proxy set's true labels in their place: the channel control.

        Args:
            model: on the site's device.
            round: whose private batches, proxy samples and order these are.
            temperature: the one that the peer used in that round.
            weight: likewise.
            memo: of the control; the factor of ``match-gradients``, by which labels are matched, is added.

        Raises:
            ValueError: the labels are not known.
        """
        labels = self.site.commons.proxy_labels
        if labels is None:
            raise ValueError("Expected the proxy set's labels to be known.")
        found = Distillation.from_config(toward_labels(self.config), temperature=temperature, weight=weight)
        shown = labels[proxy_subset(self.config, round, labels.device)]
        divergence, classes = found.objective.divergence.name, len(self.site.label_share)
        logits = label_logits(shown, classes, divergence=divergence, temperature=temperature)
        teacher = Heard(logits.unsqueeze(0), torch.ones(1, device=logits.device))
        if self.config.match_gradients and "gradient_factor" not in memo:
            own = predict(model, self._proxy(round), fast=self.how.fast)
            memo["gradient_factor"] = found.matched(own, teacher.logits, teacher.weights)
        found = found.times(memo.get("gradient_factor", 1.0)).times(warm_up(round, self.config.kd_warm_up))
        self._step(model, teacher, found, round)

    def alone(self, model: nn.Module, *, round: int) -> float:
        """Train as in a round, on the same private batches, without teachers: the isolated control."""
        if not self.config.joint:
            return self.local(model, round=round, epochs=self.config.local_epochs)
        seed, epochs = derive(self.config.seed, "distil", self.index, round), self.config.distill_epochs
        with self.watch.phase("train"):
            return fit_alone(
                model, self._private(round), proxy_count=self.config.travelling, epochs=epochs, how=self._how(round),
                seed=seed, drawn=self._see, labelling=self._labelling(model, round),
            )  # fmt: skip

    def learn(
        self, model: nn.Module, heard: Heard | None, *, round: int, memo: Memo, own: Tensor | None = None
    ) -> dict[str, float]:
        """Train a model by one round, in place.

        Args:
            model: on the site's device.
            heard: the teachers; None if there was none.
            round: counted from 1.
            memo: what the peer chose in earlier rounds; choices of this round are added.
            own: the model's logits on the round's proxy samples; None: predicted if they are needed.

        Returns:
            ``kd_loss``, ``local_loss``, and the ``temperature`` and ``kd_weight`` that were used.
        """
        if heard is None:
            return {"kd_loss": math.nan, "local_loss": self.alone(model, round=round)}
        with self.watch.phase("distil"):
            return self._taught(model, heard, round, memo, own)

    def _taught(self, model: nn.Module, heard: Heard, round: int, memo: Memo, own: Tensor | None) -> dict[str, float]:
        heard = self._judge(model, heard, round, own)
        if heard.features and self.config.flow_auxiliary:
            heard = self._through_auxiliary(heard, round)
        if self.config.regime == "tuned" and self._search_is_due(round, memo):
            self._search(model, heard, round, memo)
        if self.config.match_gradients and "gradient_factor" not in memo:
            own = predict(model, self._proxy(round), fast=self.how.fast)
            memo["gradient_factor"] = self._distillation(memo).matched(own, heard.logits, heard.logit_weights)
        distillation = self._distillation(memo).times(warm_up(round, self.config.kd_warm_up))
        kd_loss, local_loss = self._step(model, heard, distillation, round, self._see)
        return {
            "kd_loss": kd_loss,
            "local_loss": local_loss,
            "temperature": distillation.objective.temperature,
            "kd_weight": distillation.weight,
        }

    def merge(self, model: nn.Module, heard: Heard) -> None:
        """Distil teachers into a fresh model on the proxy set."""
        distillation = Distillation.from_config(self.config)
        teachers = distillation.prepare(heard.logits, heard.weights)
        seed, epochs = derive(self.config.seed, "merge"), self.config.merge_epochs
        proxy = self._shown(1, "augment-merge")
        distil(model, proxy, teachers, distillation, epochs=epochs, how=self.how, seed=seed)

    def _judge(self, model: nn.Module, heard: Heard, round: int, own: Tensor | None) -> Heard:
        """Decide whom to believe: whole teachers, samples and classes, oneself (``regime = partitioned``)."""
        logits = heard.logits
        if not self.compares:
            own = None
        elif own is None:
            own = predict(model, self._proxy(round), fast=self.how.fast)
        evidence = Evidence(logits, self.belief.temperature, own, heard.counts, heard.certainty)
        weights = self.belief.whole(heard.weights, evidence)
        placed = self.belief.by_place(weights, evidence)
        if own is not None and self.config.regime == "partitioned":
            if placed is not None:  # what it says itself it does not weigh by the classes that a teacher knows
                placed = torch.where(more_confident(logits, own), placed, placed.mean(dim=-1, keepdim=True))
            logits = teacher_or_self(logits, own)
        return replace(heard, logits=logits, weights=weights, placed=placed)

    def _see(self, batch: Tensor) -> None:
        self.seen += len(batch)

    def _step(
        self,
        model: nn.Module,
        heard: Heard,
        distillation: Distillation,
        round: int,
        drawn: Drawn | None = None,
    ) -> tuple[float, float]:
        teachers = distillation.prepare(heard.logits, heard.logit_weights)
        seed = derive(self.config.seed, "distil", self.index, round)
        proxy = self._shown(round, "augment-proxy", self.index, round)
        how, epochs = self._how(round), self.config.distill_epochs
        with self._beside(model, heard, round) as beside:
            if self.config.joint:
                loss = fit_and_distil(
                    model, self._private(round), proxy, teachers, distillation,
                    epochs=epochs, how=how, seed=seed, beside=beside, drawn=drawn,
                    labelling=self._labelling(model, round),
                )  # fmt: skip
                return loss, math.nan
            loss = distil(model, proxy, teachers, distillation, epochs=epochs, how=how, seed=seed, beside=beside)
        return loss, self._fit(model, round, self.config.local_epochs, drawn, how)

    def _beside(self, model: nn.Module, heard: Heard, round: int) -> AbstractContextManager[Beside | None]:
        if not heard.features:
            return nullcontext()
        weights = heard.flow_weights or heard.weights.tolist()
        return Flow.from_config(self.config, model).beside(model, heard.features, weights, round=round)

    def _fit(self, model: nn.Module, round: int, epochs: int, drawn: Drawn | None, how: Optimization) -> float:
        seed = derive(self.config.seed, "local", self.index, round)
        with self.watch.phase("train"):
            return fit(
                model, *self._private(round), epochs=epochs, how=how, seed=seed, drawn=drawn,
                labelling=self._labelling(model, round),
            )  # fmt: skip

    def _labelling(self, model: nn.Module, round: int) -> Labelling | None:
        """Return the labels' loss of a phase that begins with a model; None: cross-entropy.

        What the model says of vacant classes is kept from where it stands now, which is after its teachers spoke where
        the losses take turns [ours]. Before round 1 there is nothing to keep yet.
        """
        config, site = self.config, self.site
        keeps = config.vacant_classes > 0 and round > 0
        adjusts = config.logit_adjustment > 0 or config.logit_suppression > 0 or config.label_smoothing > 0
        if not (keeps or adjusts):
            return None
        return Calibration(
            site.labels,
            self.shares,
            config.logit_adjustment,
            config.vacant_classes,
            config.logit_suppression,
            predict(model, site.inputs, fast=self.how.fast) if keeps else None,
            config.label_smoothing,
        )

    def _distillation(self, memo: Memo) -> Distillation:
        found = Distillation.from_config(self.config, temperature=memo.get("temperature"), weight=memo.get("kd_weight"))
        return found.times(memo.get("gradient_factor", 1.0))

    def _through_auxiliary(self, heard: Heard, round: int) -> Heard:
        """Put an auxiliary teacher between: it learns the teachers' last layer, the student then learns all of its own.

        The auxiliary is the peer's model at double width, made anew in each round: a peer keeps one model.

        Source: heterogeneous information flow, arXiv 2005.00727 §3 [paper]; from several teachers at once, on the
        proxy set and with their logits beside [ours].
        """
        auxiliary = self.auxiliary()
        teachers = Distillation.from_config(self.config)
        last = [[layers[-1]] for layers in heard.features]
        flow = Flow.from_config(self.config, auxiliary)
        seed, proxy = derive(self.config.seed, "auxiliary", self.index, round), self._proxy(round)
        shown = self._shown(round, "augment-auxiliary", self.index, round)
        with flow.beside(auxiliary, last, heard.weights.tolist(), round=round) as beside:
            distil(
                auxiliary, shown, teachers.prepare(heard.logits, heard.logit_weights), teachers,
                epochs=self.config.flow_auxiliary_epochs, how=self.how, seed=seed, beside=beside,
            )  # fmt: skip
        return replace(heard, features=[flow.of(auxiliary, proxy)], flow_weights=[1.0])

    def _search_is_due(self, round: int, memo: Memo) -> bool:
        if "temperature" not in memo:
            return True
        return self.config.tune_every > 0 and (round - 1) % self.config.tune_every == 0

    def _search(self, model: nn.Module, heard: Heard, round: int, memo: Memo) -> None:
        """Try every temperature and weight on a copy for one round; keep the best on the held-out private samples.

        Source: ``tuned`` of arXiv 2402.14922 [paper]; this grid and what is held out are [ours].
        """
        held_out = self.site.held_out
        best: tuple[float, float] | None = None
        for temperature, weight in itertools.product(
            numbers(self.config.tune_temperatures), numbers(self.config.tune_weights)
        ):
            candidate = copy.deepcopy(model)
            distillation = Distillation.from_config(self.config, temperature=temperature, weight=weight)
            self._step(candidate, heard, distillation, round)
            logits = predict(candidate, held_out.inputs, fast=self.how.fast)
            if not bool(logits.isfinite().all()):
                continue
            score = (metrics.accuracy(logits, held_out.labels), -metrics.nll(logits, held_out.labels))
            if best is None or score > best:
                best = score
                memo["temperature"], memo["kd_weight"] = temperature, weight
        if best is None:
            what = "the model's logits, with every temperature and weight that was tried,"
            raise Diverged(what, learning_rate=self.how.learning_rate, round=round)

    def _how(self, round: int) -> Optimization:
        """Return how a round's phases descend, of which each has the learning rates of all of the round."""
        over_run = self.config.learning_rate_over == "run"
        return self.how.within(*self.config.share_of_run(round)) if over_run else self.how

    def _private(self, round: int) -> tuple[Inputs, Tensor]:
        """Return inputs and labels of one phase of training in a round.

        Augmented anew by each call, alike: a peer, the trials of its search and its controls see the same.
        """
        inputs, labels = self.site.inputs, self.site.labels
        if self.augment is None:
            return inputs, labels
        return self.augment.of(inputs, derive(self.config.seed, "augment", self.index, round)), labels

    def _shown(self, round: int, purpose: str, *keys: int) -> Inputs:
        """Return a round's proxy samples as a student sees them in one phase of training, with a stream of draws."""
        plain = self._proxy(round)
        if self.augment_proxy is None:
            return plain
        return self.augment_proxy.of(plain, derive(self.config.seed, purpose, *keys))

    def _proxy(self, round: int) -> Inputs:
        """Return a round's proxy samples as they are, of which teachers spoke."""
        return proxy_samples(self.config, round, self.site.commons.proxy_inputs)


def stack(letters: Sequence[tuple[Tensor, float, Sequence[Tensor]]]) -> Heard | None:
    """Return what was heard from (logits, weight, features) of each teacher, or None if there was none."""
    if not letters:
        return None
    logits, told, found = zip(*letters, strict=True)
    weights = torch.tensor(told, device=logits[0].device)
    return Heard(torch.stack(logits), weights, features=found if any(found) else ())
