"""The objective that a peer minimises on the proxy set: divergence, teachers, weight, temperature and regime."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fedkd.errors import SettingError
from fedkd.losses import divergences
from fedkd.losses.closed_form import FAR
from fedkd.losses.divergences import register
from fedkd.losses.teachers import Objective, Prepared, objective
from fedkd.plugins import is_callable_spec, load_callable
from fedkd.settings.config import RunConfig
from fedkd.settings.learning import Learning

_SURE = 0.99
_ONE_HOT = 200.0  # exp(−200) is 0 in float32
_ROBUST = {"trimmed": "trimmed-mean", "agreement": "none", "eigentrust": "none"}  # these two weigh whole teachers


@register("mae", symmetric=True, root_is_metric=True)
def mean_absolute_error(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Mean absolute difference of the logits, 1/C Σ |z_t − z_s| / T.  [B, C], [B, C] -> [B], in logits.

    A masked class, of logit −∞, counts as −1e30.

    Source: FedMD, Li and Wang 2019, arXiv 1910.03581, §3 [paper].

    >>> mean_absolute_error(torch.zeros(1, 2), torch.tensor([[1.0, -3.0]]))
    tensor([2.])
    """
    student, teacher = (logits.clamp_min(-FAR) for logits in (student_logits, teacher_logits.detach()))
    return (teacher - student).abs().mean(dim=-1) / temperature


@dataclass(frozen=True)
class Distillation:
    """Batch mean of an objective, times its weight.

    Attributes:
        objective: per-sample loss of a student against its teachers.
        weight: of the distillation loss; α of (1−α)·CE + α·KD where both losses share a step.
        factor: T² under ``t2-scaling`` (Hinton et al., 2015): the gradient of a softmax at temperature T shrinks by
            1/T²; times what ``match-gradients`` asks for.
        label_weight: weight of the private cross-entropy where both losses share a step.
    """

    objective: Objective
    weight: float
    factor: float = 1.0
    label_weight: float = 1.0

    @classmethod
    def from_config(
        cls, config: RunConfig, *, temperature: float | None = None, weight: float | None = None
    ) -> "Distillation":
        """Build what a run's settings ask for.

        Args:
            config: the settings.
            temperature: instead of the setting's.
            weight: instead of the settings'.

        Raises:
            SettingError: the divergence does not exist, or not with these options.
        """
        temperature, weight = temperature or config.temperature, weight or config.distillation_weight
        _make_known(config.divergence)
        try:
            found = objective(
                config.divergence,
                combine=config.combination,
                average=config.average,
                reduction=config.reduction,
                robust=_ROBUST.get(config.robust, config.robust),
                trim=config.trim,
                sharpen=config.sharpen or None,
                teacher_temperature=config.combined_temperature,
                temperature=temperature,
                **_options(config),
            )
        except ValueError as error:
            raise SettingError("divergence", config.divergence, f"possible with these settings ({error})") from error
        # Deep mutual learning adds the divergence to the labels' loss; the others trade one for the other.
        label_weight = 1.0 if config.regime == "dml" else 1.0 - weight
        return cls(found, weight, temperature**2 if config.t2_scaling else 1.0, label_weight)

    def times(self, factor: float) -> "Distillation":
        """Return the same loss, times a factor."""
        return replace(self, factor=self.factor * factor)

    def matched(self, student_logits: Tensor, teacher_logits: Tensor, weights: Tensor) -> float:
        """Return the factor that gives this objective's gradient the norm of forward KL's at these logits.

        Args:
            student_logits: ``[N, C]``.
            teacher_logits: ``[K, N, C]``.
            weights: as :meth:`prepare` takes them.

        Source: [ours]; near agreement kl : td : js : sed are as 4 : 2 : 1 : 1.
        """
        reference = replace(self.objective, divergence=divergences.get("kl"), options={})
        own = self.objective.gradient_norm(student_logits, self.prepare(teacher_logits, weights))
        kl = reference.gradient_norm(student_logits, reference.prepare(teacher_logits, weights=weights))
        return kl / own if own > 0 else 1.0

    def prepare(self, teacher_logits: Tensor, weights: Tensor) -> Prepared:
        """Compute what depends on the teachers alone, once for the whole proxy set.

        Where a divergence asks for labels, the class that the combined teacher finds most likely takes their place:
        nobody uses the proxy set's own [ours].

        Args:
            teacher_logits: ``[K, N, C]``.
            weights: ``[K]``, or by sample and class, as :meth:`~fedkd.losses.teachers.Objective.prepare` takes them.
        """
        labels = None
        if self.objective.divergence.name in ("cakd", "dkd"):
            labels = self.objective.combine(teacher_logits, weights=weights).argmax(dim=-1)
        return self.objective.prepare(teacher_logits, weights=weights, labels=labels)

    @property
    def scale(self) -> float:
        """What the divergence is multiplied by."""
        return self.weight * self.factor

    def __call__(self, student_logits: Tensor, teachers: Prepared) -> Tensor:
        """Return the batch mean of the divergence, a scalar, not yet multiplied by :attr:`scale`."""
        return self.objective(student_logits, teachers).mean()


def toward_labels(config: RunConfig) -> RunConfig:
    """Return settings under which a peer learns from the labels of the proxy set as it would from teachers.

    They are one teacher, and sure: nothing is combined, weighed, sharpened or defended against. Weight, temperature,
    schedule, epochs and divergence stay, but for ``mae``, which compares logits: labels have none, and ``kl`` takes
    its place. Of information flow the logits' loss stays: labels have no features.
    """
    divergence = "kl" if config.divergence == "mae" else config.divergence
    return replace(
        config, divergence=divergence, average="probs", robust="none", sharpen=0.0, teacher_temperature=1.0,
        weighing="uniform", regime="dml" if config.regime == "dml" else "vanilla",
    )  # fmt: skip


def label_logits(labels: Tensor, classes: int, *, divergence: str, temperature: float) -> Tensor:
    """Return what a teacher that knows the labels would say.  [N] -> [N, C], float32.

    Under ``kl`` and ``ce`` its softmax at ``temperature`` is one-hot to the last bit, so that the loss is the student's
    cross-entropy to the label at that temperature. Other divergences can be infinite or without a gradient there: for
    them the label has a probability of 0.99 and the other classes share the rest [ours].

    Args:
        labels: ``[N]`` int64.
        classes: C >= 2.
        divergence: its name.
        temperature: T.

    >>> label_logits(torch.tensor([1]), 2, divergence="js", temperature=2.0).div(2.0).softmax(dim=-1)
    tensor([[0.0100, 0.9900]])
    """
    exact = divergence in ("kl", "ce")
    margin = _ONE_HOT if exact else math.log(_SURE * (classes - 1) / (1 - _SURE))
    return torch.nn.functional.one_hot(labels, classes).float() * (margin * temperature)


def _make_known(name: str) -> None:
    """Register a user's own divergence, ``package.module:function``, under that very name.

    Raises:
        SettingError: there is no divergence of that name.
    """
    if name in divergences.names():
        return
    if not is_callable_spec(name):
        known = ", ".join(divergences.names())
        raise SettingError("divergence", name, f"one of {known}, or package.module:function")
    found = load_callable(name, key="divergence")
    _try(found, name)
    divergences.register(name)(found)


def _try(divergence: Callable[..., Any], name: str) -> None:
    """Call a user's divergence once: what it cannot do is an error before any training.

    Raises:
        SettingError: it does not take what it is given, or returns something else than [B], differentiable.
    """
    allowed = "a function (student_logits [B, C], teacher_logits [B, C], *, temperature) -> [B]"
    student, teacher = torch.tensor([[1.0, 0.0, -1.0], [0.0, 0.5, 0.0]], requires_grad=True), torch.eye(2, 3)
    try:
        values = divergence(student, teacher, temperature=2.0)
    except (Exception, SystemExit) as error:  # one's own function may fail in any way
        raise SettingError("divergence", name, f"{allowed} ({type(error).__name__}: {error})") from error
    if not isinstance(values, Tensor) or values.shape != (2,):
        found = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise SettingError("divergence", name, f"{allowed} (for B = 2 it returned {found})")
    if not values.requires_grad:
        raise SettingError("divergence", name, f"{allowed}, differentiable in the student's logits")


def _options(config: Learning) -> dict[str, float | int | str]:
    """Return the divergence's own options."""
    if config.divergence == "bdkd":
        return {"delta": config.bdkd_delta, "rule": config.bdkd_rule}
    if config.divergence == "dkd":
        return {"alpha": config.cakd_alpha, "beta": config.cakd_beta}
    if config.divergence == "cakd":
        parts: dict[str, float | int | str] = {"alpha": config.cakd_alpha, "beta": config.cakd_beta}
        return parts | {"mode": config.cakd_mode, "strong": config.cakd_strong, "top_k": config.cakd_top_k}
    return {}


def teacher_or_self(teacher_logits: Tensor, own_logits: Tensor) -> Tensor:
    """Replace each teacher, sample by sample, by the student's own start where that is the more confident.

    Confidence is the largest probability, since the proxy set's labels are not used.

    Args:
        teacher_logits: ``[K, N, C]``.
        own_logits: ``[N, C]``, a frozen copy of the student's predictions at the start of the round.

    Returns:
        ``[K, N, C]``.

    Source: data partitioning of arXiv 2402.14922 [paper], read as the method of "Fantastic Gains" (ICLR 2024)
    with the start of the round as the frozen self [ours].

    >>> teacher_or_self(torch.tensor([[[3.0, 0.0], [1.0, 0.0]]]), torch.tensor([[2.0, 0.0], [0.0, 2.0]]))
    tensor([[[3., 0.],
             [0., 2.]]])
    """
    return torch.where(more_confident(teacher_logits, own_logits), teacher_logits, own_logits)


def more_confident(teacher_logits: Tensor, own_logits: Tensor) -> Tensor:
    """Tell where a teacher is the more confident, by its largest probability.  [K, N, C], [N, C] -> [K, N, 1].

    >>> more_confident(torch.tensor([[[3.0, 0.0], [1.0, 0.0]]]), torch.tensor([[2.0, 0.0], [0.0, 2.0]])).flatten()
    tensor([ True, False])
    """
    confidence = (logits.softmax(dim=-1).amax(dim=-1, keepdim=True) for logits in (teacher_logits, own_logits))
    return next(confidence) > next(confidence)
