"""Loops over in-memory samples on one device: fit, distil, predict.

The data of a site fit in memory as they are kept, so a batch is an index: no loader, no workers.
An optimiser lives for one phase: its moments would be stale after the other phase moved the weights, and a
peer's state stays the size of its model.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import chain, repeat

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_

from fedkd.data.samples import Inputs
from fedkd.errors import FedkdError
from fedkd.losses.teachers import Prepared
from fedkd.seeding import derive, seeded
from fedkd.settings.training import Training
from fedkd.training.distillation import Distillation
from fedkd.training.fast import forward
from fedkd.training.optimizers import Descent
from fedkd.training.rates import Rates
from fedkd.training.statistics import StillStatistics

Beside = Callable[[Tensor], Tensor]
"""A further loss of a batch of proxy indices ``[B]``, called right after the model has seen that batch."""


Drawn = Callable[[Tensor], object]
"""Told the indices ``[B]`` of every batch of labelled data, as it is drawn."""

Labelling = Callable[[Tensor, Tensor], Tensor]
"""The loss of a batch of labelled data, a scalar, from its logits ``[B, C]`` and its indices ``[B]``."""

Losses = tuple[Tensor, Tensor]
"""The loss of a batch to descend on, and the one to report; both scalars."""

PREDICTED_AT_ONCE = (128, 1024)
"""Samples in one forward pass without gradients, on a CPU, whose caches hold no more, and on a GPU."""

_CONSTANT = Rates()


class Diverged(FedkdError):
    """Training has driven a model to where it answers no numbers any more.

    Args:
        what: what is not finite.
        learning_rate: of the steps that led there.
        round: in which it was noticed; None: in none.

    >>> raise Diverged("the model's logits", learning_rate=1e30, round=3)
    Traceback (most recent call last):
    fedkd.training.loops.Diverged: round 3: the model's logits are not finite; learning-rate = 1e30
    """

    def __init__(self, what: str, *, learning_rate: float, round: int | None = None) -> None:
        where = "" if round is None else f"round {round}: "
        rate = f"{learning_rate:g}".replace("e+", "e")
        super().__init__(f"{where}{what} are not finite; learning-rate = {rate}")


@dataclass(frozen=True)
class Optimization:
    """How every training phase descends.

    Attributes:
        name: ``adam``, ``adamw`` or ``sgd``.
        learning_rate: step size.
        momentum: of ``sgd``; ignored by the others.
        weight_decay: decoupled for ``adamw``, as an L2 term otherwise.
        batch_size: samples per step.
        fast: whether models compute as :func:`fedkd.training.fast.forward` has it, with fused steps.
        gradient_clip: the largest Euclidean norm of a step's gradient over all parameters; 0: any.
        rates: factors of the learning rate.
        own_statistics: whether batch normalisation takes its running statistics from private batches alone.
    """

    name: str = "adam"
    learning_rate: float = 1e-3
    momentum: float = 0.9
    weight_decay: float = 0.0
    batch_size: int = 32
    fast: bool = False
    gradient_clip: float = 0.0
    rates: Rates = _CONSTANT
    own_statistics: bool = False

    @classmethod
    def from_config(cls, config: Training) -> "Optimization":
        """Take the settings of a run, for a phase whose learning rate has a schedule of its own."""
        return cls(
            config.optimizer, config.learning_rate, config.momentum, config.weight_decay, config.batch_size,
            config.fast, config.gradient_clip, Rates(config.learning_rate_schedule, config.learning_rate_warm_up),
        )  # fmt: skip

    def within(self, begin: float, end: float) -> "Optimization":
        """Return the same for a phase that is a part of what the schedule goes over, given as shares in [0, 1]."""
        return replace(self, rates=self.rates.within(begin, end))

    def optimizer(self, model: nn.Module) -> Descent:
        """Return a fresh optimiser over a model's trainable parameters."""
        return Descent(
            self.name,
            model.parameters(),
            learning_rate=self.learning_rate,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            fused=self.fast,
        )


def batches(count: int, size: int, generator: torch.Generator, device: torch.device | None = None) -> Iterator[Tensor]:
    """Yield a random permutation of ``range(count)`` in chunks of ``size``, moved to a device in one piece.

    A last chunk of one is joined to the one before it: batch normalisation has no variance over one sample.

    >>> [len(batch) for batch in batches(9, 4, torch.Generator().manual_seed(0))]
    [4, 5]
    """
    order = torch.randperm(count, generator=generator)
    if device is not None and device.type == "cuda":
        order = order.pin_memory().to(device, non_blocking=True)
    chunks = list(torch.split(order, size))
    if len(chunks) > 1 and len(chunks[-1]) == 1:
        chunks[-2:] = [torch.cat(chunks[-2:])]
    yield from chunks


def fit(
    model: nn.Module,
    inputs: Inputs,
    labels: Tensor,
    *,
    epochs: int,
    how: Optimization,
    seed: int,
    drawn: Drawn | None = None,
    labelling: Labelling | None = None,
) -> float:
    """Train on labelled data, in place.

    Args:
        model: on the device of the data.
        inputs: ``[N, ...]`` float.
        labels: ``[N]`` int64.
        epochs: passes over the data.
        how: the optimiser and its settings.
        seed: of the batch order and of dropout.
        drawn: see :data:`Drawn`.
        labelling: the loss; None: cross-entropy.

    Returns:
        The mean loss of the last epoch in nats; NaN if there was none.
    """

    def losses(batch: Tensor) -> Losses:
        if drawn is not None:
            drawn(batch)
        loss = _of_labels(forward(model, inputs[batch], fast=how.fast), labels, batch, labelling)
        return loss, loss

    return _descend(model, losses, count=len(inputs), epochs=epochs, how=how, seed=seed, device=inputs.device)


def distil(
    model: nn.Module,
    inputs: Inputs,
    teachers: Prepared,
    distillation: Distillation,
    *,
    epochs: int,
    how: Optimization,
    seed: int,
    beside: Beside | None = None,
) -> float:
    """Train towards teachers on unlabelled proxy inputs, in place.

    Args:
        model: the student, on the device of the inputs.
        inputs: ``[N, ...]`` float, the proxy samples that the teachers' logits belong to.
        teachers: the teachers' side of the objective, prepared once for all N samples.
        distillation: the loss.
        epochs: passes over the proxy samples.
        how: the optimiser and its settings.
        seed: of the batch order and of dropout.
        beside: a loss that is added, see :data:`Beside`.

    Returns:
        The mean divergence of the last epoch, in its own unit, whatever its weight; NaN if there was none.
    """
    still = _on_public(model, how)

    def losses(batch: Tensor) -> Losses:
        with still:
            logits = forward(model, inputs[batch], fast=how.fast)
        divergence = distillation(logits, teachers[batch])
        loss = distillation.scale * divergence
        return loss if beside is None else loss + beside(batch), divergence

    return _descend(model, losses, count=len(inputs), epochs=epochs, how=how, seed=seed, device=inputs.device)


def fit_and_distil(
    model: nn.Module,
    private: tuple[Inputs, Tensor],
    proxy: Inputs,
    teachers: Prepared,
    distillation: Distillation,
    *,
    epochs: int,
    how: Optimization,
    seed: int,
    beside: Beside | None = None,
    drawn: Drawn | None = None,
    labelling: Labelling | None = None,
) -> float:
    """Train on labels and towards teachers in every step, in place.

    A step takes a batch of the proxy set and one of the private data, which are gone through again and again.

    Args:
        model: the student, on the device of the data.
        private: inputs ``[M, ...]`` and labels ``[M]``.
        proxy: ``[N, ...]``, the proxy samples that the teachers' logits belong to.
        teachers: the teachers' side of the objective, prepared once for all N samples.
        distillation: the loss, with the weight of the labels' loss beside it.
        epochs: passes over the proxy samples.
        how: the optimiser and its settings.
        seed: of the batch orders and of dropout.
        beside: a loss that is added, see :data:`Beside`.
        drawn: see :data:`Drawn`; where the labels' loss weighs nothing none is drawn.
        labelling: the labels' loss; None: cross-entropy.

    Returns:
        The mean divergence of the last epoch, in its own unit, whatever its weight; NaN if there was none.
    """
    own_loss = _endless_labels(model, *private, how=how, seed=seed, drawn=drawn, labelling=labelling)
    still = _on_public(model, how)

    def losses(batch: Tensor) -> Losses:
        with still:
            logits = forward(model, proxy[batch], fast=how.fast)
        divergence = distillation(logits, teachers[batch])
        loss = distillation.scale * divergence
        if beside is not None:
            loss = loss + beside(batch)
        if distillation.label_weight > 0:
            loss = loss + distillation.label_weight * own_loss()
        return loss, divergence

    return _descend(model, losses, count=len(proxy), epochs=epochs, how=how, seed=seed, device=proxy.device)


def fit_alone(
    model: nn.Module,
    private: tuple[Inputs, Tensor],
    *,
    proxy_count: int,
    epochs: int,
    how: Optimization,
    seed: int,
    drawn: Drawn | None = None,
    labelling: Labelling | None = None,
) -> float:
    """Train as :func:`fit_and_distil` does, on the same private batches, without teachers: the control beside it.

    Args:
        model: on the device of the data.
        private: inputs ``[M, ...]`` and labels ``[M]``.
        proxy_count: N, the number of proxy samples that the other goes through.
        epochs: passes over those.
        how: the optimiser and its settings.
        seed: that of the other.
        drawn: see :data:`Drawn`.
        labelling: that of the other.

    Returns:
        The mean loss of the last pass in nats; NaN if there was none.
    """
    own_loss = _endless_labels(model, *private, how=how, seed=seed, drawn=drawn, labelling=labelling)

    def losses(batch: Tensor) -> Losses:
        loss = own_loss()
        return loss, loss

    return _descend(model, losses, count=proxy_count, epochs=epochs, how=how, seed=seed, device=private[0].device)


def _on_public(model: nn.Module, how: Optimization) -> AbstractContextManager[None]:
    return StillStatistics(model) if how.own_statistics else nullcontext()


def _of_labels(logits: Tensor, labels: Tensor, batch: Tensor, labelling: Labelling | None) -> Tensor:
    return F.cross_entropy(logits, labels[batch]) if labelling is None else labelling(logits, batch)


def _endless_labels(
    model: nn.Module,
    inputs: Inputs,
    labels: Tensor,
    *,
    how: Optimization,
    seed: int,
    drawn: Drawn | None,
    labelling: Labelling | None,
) -> Callable[[], Tensor]:
    """Return what gives the labels' loss of one private batch after another, the data gone through again and again.

    A peer's only sample goes through the model in evaluation mode, as in :func:`fit`: batch normalisation has no
    variance over one sample.
    """
    order = torch.Generator().manual_seed(derive(seed, "private"))
    endless = chain.from_iterable(batches(len(inputs), how.batch_size, order, inputs.device) for _ in repeat(None))

    def loss() -> Tensor:
        own, training = next(endless), model.training
        if drawn is not None:
            drawn(own)
        model.train(training and len(own) > 1)
        logits = forward(model, inputs[own], fast=how.fast)
        model.train(training)
        return _of_labels(logits, labels, own, labelling)

    return loss


@torch.no_grad()
def predict(model: nn.Module, inputs: Inputs, *, fast: bool = False) -> Tensor:
    """Return a model's logits ``[N, C]`` in float32, in evaluation mode; ``fast`` as in :mod:`fedkd.training.fast`."""
    model.eval()
    size = PREDICTED_AT_ONCE[inputs.device.type == "cuda"]
    starts = range(0, max(len(inputs), 1), size)  # of no samples too there are logits, [0, C]
    # Copies, for a CUDA graph writes its next output over the last one.
    return torch.cat([forward(model, inputs[start : start + size], fast=fast).clone() for start in starts])


def _descend(
    model: nn.Module,
    losses: Callable[[Tensor], Losses],
    *,
    count: int,
    epochs: int,
    how: Optimization,
    seed: int,
    device: torch.device,
) -> float:
    if epochs == 0 or count == 0:
        return float("nan")
    model.train(count > 1)
    optimizer = how.optimizer(model)
    order = torch.Generator().manual_seed(seed)
    total = torch.zeros((), device=device)
    with seeded(seed):
        for epoch in range(epochs):
            total.zero_()
            chunks = list(batches(count, how.batch_size, order, device))
            for step, batch in enumerate(chunks, start=epoch * len(chunks)):
                loss, reported = losses(batch)
                optimizer.zero_grad()
                torch.autograd.backward(loss)
                if how.gradient_clip > 0:
                    clip_grad_norm_(optimizer.parameters, how.gradient_clip)
                optimizer.learning_rate = how.learning_rate * how.rates.factor(step, epochs * len(chunks))
                optimizer.step()
                total += reported.detach() * len(batch)
    model.eval()
    return float(total) / count
