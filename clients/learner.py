"""How a peer learns in a round: from its teachers on the proxy set, and from its own labels."""

import copy
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from clients.site import Site, proxy_subset
from fedkd import metrics
from fedkd.config import RunConfig, numbers
from fedkd.distillation import Distillation, teacher_or_self
from fedkd.robust import agreement_weights
from fedkd.seeding import derive
from fedkd.training import Optimization, distil, fit, fit_and_distil, predict

Memo = dict[str, float]
"""What a peer remembers beside its model: numbers it chose itself."""


@dataclass(frozen=True)
class Heard:
    """What a peer heard in a round.

    Attributes:
        logits: the teachers' logits on this round's proxy samples, ``[K, P, C]``.
        weights: ``[K]``.
    """

    logits: Tensor
    weights: Tensor


@dataclass(frozen=True)
class _Labelled:
    inputs: Tensor
    labels: Tensor


class Learner:
    """One peer's way of learning.

    Args:
        config: the run's settings.
        site: its data.
        index: its number, of which its random streams are derived.
    """

    def __init__(self, config: RunConfig, site: Site, index: int) -> None:
        self.config, self.site, self.index = config, site, index
        self.how = Optimization.from_config(config)
        Distillation.from_config(config)  # a wrong setting is an error before any training

    def local(self, model: nn.Module, *, round: int, epochs: int) -> float:
        """Train on private labels alone; return the loss."""
        return self._fit(model, _Labelled(self.site.inputs, self.site.labels), round, epochs)

    def learn(self, model: nn.Module, heard: Heard | None, *, round: int, memo: Memo) -> dict[str, float]:
        """Train a model by one round, in place.

        Args:
            model: on the site's device.
            heard: the teachers; None if there was none.
            round: counted from 1.
            memo: what the peer chose in earlier rounds; choices of this round are added.

        Returns:
            ``kd_loss``, ``local_loss``, and the ``temperature`` and ``kd_weight`` that were used.
        """
        private = _Labelled(self.site.inputs, self.site.labels)
        if heard is None:
            return {"kd_loss": math.nan, "local_loss": self._fit(model, private, round, self.config.local_epochs)}
        heard = self._judge(model, heard, round)
        if self.config.regime == "tuned" and self._search_is_due(round, memo):
            self._search(model, heard, round, memo)
        distillation = self._distillation(memo)
        if self.config.match_gradients and "gradient_factor" not in memo:
            own = predict(model, self._proxy(round))
            memo["gradient_factor"] = distillation.matched(own, heard.logits, heard.weights)
            distillation = self._distillation(memo)
        kd_loss, local_loss = self._step(model, private, heard, distillation, round)
        return {
            "kd_loss": kd_loss,
            "local_loss": local_loss,
            "temperature": distillation.objective.temperature,
            "kd_weight": distillation.weight,
        }

    def merge(self, model: nn.Module, heard: Heard) -> None:
        """Distil teachers into a fresh model on the proxy set, for as long as a peer pre-trains."""
        distillation = Distillation.from_config(self.config)
        teachers = distillation.prepare(heard.logits, heard.weights)
        seed, epochs = derive(self.config.seed, "merge"), self.config.pretrain_epochs
        distil(model, self._proxy(1), teachers, distillation, epochs=epochs, how=self.how, seed=seed)

    def _judge(self, model: nn.Module, heard: Heard, round: int) -> Heard:
        """Decide whom to believe: whole teachers (``robust = agreement``) and sample by sample (``regime = dp``)."""
        if self.config.robust != "agreement" and self.config.regime != "dp":
            return heard
        own, weights, logits = predict(model, self._proxy(round)), heard.weights, heard.logits
        if self.config.robust == "agreement":
            weights = weights * agreement_weights(logits, own)
        if self.config.regime == "dp":
            logits = teacher_or_self(logits, own)
        return Heard(logits, weights)

    def _step(
        self, model: nn.Module, private: _Labelled, heard: Heard, distillation: Distillation, round: int
    ) -> tuple[float, float]:
        teachers = distillation.prepare(heard.logits, heard.weights)
        seed, proxy = derive(self.config.seed, "distil", self.index, round), self._proxy(round)
        epochs = self.config.distill_epochs
        if self.config.schedule == "mixed" or self.config.regime == "dml":
            own = (private.inputs, private.labels)
            loss = fit_and_distil(model, own, proxy, teachers, distillation, epochs=epochs, how=self.how, seed=seed)
            return loss, math.nan
        kd_loss = distil(model, proxy, teachers, distillation, epochs=epochs, how=self.how, seed=seed)
        return kd_loss, self._fit(model, private, round, self.config.local_epochs)

    def _fit(self, model: nn.Module, private: _Labelled, round: int, epochs: int) -> float:
        seed = derive(self.config.seed, "local", self.index, round)
        return fit(model, private.inputs, private.labels, epochs=epochs, how=self.how, seed=seed)

    def _distillation(self, memo: Memo) -> Distillation:
        found = Distillation.from_config(self.config, temperature=memo.get("temperature"), weight=memo.get("kd_weight"))
        return found.times(memo.get("gradient_factor", 1.0))

    def _search_is_due(self, round: int, memo: Memo) -> bool:
        if "temperature" not in memo:
            return True
        return self.config.tune_every > 0 and (round - 1) % self.config.tune_every == 0

    def _search(self, model: nn.Module, heard: Heard, round: int, memo: Memo) -> None:
        """Try every temperature and weight on a copy for one round; keep the best on held-out private samples.

        Source: ``tuned`` of arXiv 2402.14922 [paper]; this grid and the held-out split are [ours].
        """
        part, held_out = self._held_out()
        best: tuple[float, float] | None = None
        for temperature, weight in itertools.product(
            numbers(self.config.tune_temperatures), numbers(self.config.tune_weights)
        ):
            candidate = copy.deepcopy(model)
            distillation = Distillation.from_config(self.config, temperature=temperature, weight=weight)
            self._step(candidate, part, heard, distillation, round)
            logits = predict(candidate, held_out.inputs)
            score = (metrics.accuracy(logits, held_out.labels), -metrics.nll(logits, held_out.labels))
            if best is None or score > best:
                best = score
                memo["temperature"], memo["kd_weight"] = temperature, weight

    def _held_out(self) -> tuple[_Labelled, _Labelled]:
        """Split the private data into a part to train on and a held-out one, the same in every search."""
        count = len(self.site.labels)
        order = torch.randperm(
            count, generator=torch.Generator().manual_seed(derive(self.config.seed, "validation", self.index))
        ).to(self.site.labels.device)
        size = min(max(1, round(self.config.validation_share * count)), count - 1)
        return _take(self.site, order[size:]), _take(self.site, order[:size])

    def _proxy(self, round: int) -> Tensor:
        inputs = self.site.commons.proxy_inputs
        return inputs[proxy_subset(self.config, round, inputs.device)]


def _take(site: Site, index: Tensor) -> _Labelled:
    return _Labelled(site.inputs[index], site.labels[index])


def stack(logits: Sequence[Tensor], weights: Sequence[float]) -> Heard | None:
    """Return what was heard, or None if nothing was."""
    if not logits:
        return None
    return Heard(torch.stack(list(logits)), torch.tensor(weights, device=logits[0].device))
