r"""K teachers, one objective: what a peer minimises against the predictions of those it hears.

``averaged`` distils from one combined teacher, ``pairwise`` adds up one divergence per teacher, and ``msed``, which
compares all at once, is the same under both.

Weights w_k(x, c) say how much teacher k counts for class c of sample x; over the teachers they are taken to sum to 1.
The combined teacher is p̄(c|x) ∝ Σ_k w_k(x, c)·p_k(c|x). The same sum is Σ_k s_k(x)·p̃_k(c|x), each teacher tilted to the
classes that it counts for, p̃_k ∝ w_k·p_k, with its share s_k ∝ Σ_c w_k·p_k of the sample: under ``pairwise`` these are
learned from one by one, so that under ``ce`` and ``kl``, unsharpened, the two still have one gradient [ours].

What depends on the teachers alone is computed once for the whole proxy
set (:meth:`Objective.prepare`) and then indexed by every batch of every epoch.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedkd.losses.closed_form import (
    FAR,
    Compare,
    attach,
    check_logits,
    check_temperature,
    compute_dtype,
    differentiable,
    soften,
    tempered,
)
from fedkd.losses.divergences import Divergence, get

__all__ = ["Objective", "Prepared", "objective"]

_MANY_CLASSES = 1000


@dataclass(frozen=True)
class Prepared:
    """The teachers' side of an objective over N samples; ``prepared[index]`` is that of a batch.

    ``terms`` are ``[K, N, *]`` and ``scale``, ``[K, N]`` or ``[K, 1]``, weighs the teachers' divergences, None that of
    the only one by 1; a sample that no teacher counts for has 0. Without ``compare`` the only term is the teachers'
    logits.
    """

    compare: Compare | None
    terms: tuple[Tensor, ...]
    scale: Tensor | None

    def __len__(self) -> int:
        return self.terms[0].shape[1]

    def __getitem__(self, index: Tensor) -> "Prepared":
        """Select the samples of an integer ``index`` ``[B]``."""
        scale = self.scale
        if scale is not None and scale.shape[1] == len(self):
            scale = scale.index_select(1, index)
        return Prepared(self.compare, tuple([term.index_select(1, index) for term in self.terms]), scale)


@dataclass(frozen=True)
class Objective:
    """A divergence, its temperature and options, and the way K teachers enter it; made by :func:`objective`."""

    divergence: Divergence
    pairwise: bool
    average: str
    reduction: str
    robust: str
    trim: float
    sharpen: float | None
    teacher_temperature: float
    temperature: float
    options: Mapping[str, Any]

    def prepare(
        self, teacher_logits: Tensor, *, weights: Tensor | None = None, labels: Tensor | None = None
    ) -> Prepared:
        """Compute all that depends on the teachers alone, for a whole proxy set.

        Args:
            teacher_logits: ``[K, N, C]``.
            weights: ``[K]``, ``[K, C]``, ``[K, N]`` or ``[K, N, C]``, or what broadcasts to that, as ``[K, 1, C]`` does
                (it has to where N = C); non-negative. Of one sample and class only their ratios over the teachers
                count; a teacher of weight 0 is left out, and a sample that none counts for teaches nothing.
            labels: ``[N]`` class indices, for the divergences that ask for them.

        Raises:
            ValueError: a shape, dtype or weight that does not fit.
        """
        check_logits(teacher_logits=teacher_logits)
        if teacher_logits.dim() != 3:
            raise ValueError(
                f"Expected argument `teacher_logits` to have shape [K, N, C], but got {list(teacher_logits.shape)}."
            )
        if labels is not None and labels.shape != teacher_logits.shape[1:2]:
            raise ValueError(
                f"Expected argument `labels` to have shape {list(teacher_logits.shape[1:2])}, "
                f"but got {list(labels.shape)}."
            )
        teacher_logits, spread = _spread(teacher_logits, weights)
        taught = None if spread.dim() == 1 else (spread > 0).any(dim=0).any(dim=-1)
        options, scale = dict(self.options), spread.new_ones(1, 1)
        if self.divergence.multiway or self.pairwise:
            shares = spread
            if taught is not None:
                teacher_logits, shares = _tilted(teacher_logits, spread, self.temperature)
            if self.divergence.multiway:
                options["weights"] = shares
            else:
                scale = (shares * len(shares) if self.reduction == "sum" else shares).reshape(len(shares), -1)
            if self.teacher_temperature != 1:
                teacher_logits = teacher_logits / self.teacher_temperature
        else:
            teacher_logits = self._combine(teacher_logits, spread, self.temperature).unsqueeze(0)
        return self._prepared(teacher_logits, labels, options, _scale(scale, taught, teacher_logits))

    def _prepared(
        self, teacher_logits: Tensor, labels: Tensor | None, options: Mapping[str, Any], scale: Tensor | None
    ) -> Prepared:
        if self.divergence.prepare is None:
            # A copy, as autograd could not save tensors that were made in inference mode.
            return Prepared(None, (teacher_logits.detach().clone(),), scale)
        side = self.divergence.prepare(teacher_logits, temperature=self.temperature, labels=labels, **options)
        return Prepared(side.compare, side.terms, scale)

    def __call__(self, student_logits: Tensor, prepared: Prepared) -> Tensor:
        """Return each sample's loss ``[B]``, without the factor T²; differentiable in ``student_logits`` ``[B, C]``."""
        check_logits(student_logits=student_logits)
        if student_logits.shape != prepared.terms[0].shape[1:]:
            raise ValueError(
                f"Expected argument `student_logits` to have the teachers' shape {list(prepared.terms[0].shape[1:])}, "
                f"but got {list(student_logits.shape)}."
            )
        if prepared.compare is None:
            if self.divergence.multiway:
                losses = self._plain(student_logits, prepared.terms[0]).unsqueeze(0)
            else:
                losses = torch.stack([self._plain(student_logits, teacher) for teacher in prepared.terms[0]])
            return (losses if prepared.scale is None else losses * prepared.scale).sum(dim=0)
        if prepared.scale is None:
            one_teacher = tuple([term.squeeze(0) for term in prepared.terms])
            return differentiable(prepared.compare, student_logits, one_teacher, self.temperature)
        student_logits = student_logits.to(compute_dtype(student_logits))
        value, slope = prepared.compare(tempered(student_logits, self.temperature), *prepared.terms)
        value = (value * prepared.scale).sum(dim=0)
        slope = (slope * prepared.scale.unsqueeze(-1)).sum(dim=0)
        return attach(student_logits, value, slope, self.temperature)

    def combine(
        self, teacher_logits: Tensor, *, weights: Tensor | None = None, temperature: float | None = None
    ) -> Tensor:
        """Return the logits ``[N, C]`` of the one combined teacher of ``teacher_logits`` ``[K, N, C]``.

        Their softmax at ``temperature`` (unless given, the objective's) is the averaged, robust or sharpened one. Where
        no teacher counts for a sample it is as if all did alike; ``weights`` are those of :meth:`prepare`.
        """
        heard, spread = _spread(teacher_logits, weights)
        return self._combine(heard, spread, temperature or self.temperature)

    def gradient_norm(self, student_logits: Tensor, prepared: Prepared) -> float:
        """Return the norm of the mean loss's gradient in the logits, to match divergences at the start of distillation.

        Near agreement kl : td : js : sed are as 4 : 2 : 1 : 1, so a comparison at one weight is in part one of learning
        rates; weights inverse to this norm take that part out.
        """
        student_logits = student_logits.detach().requires_grad_()
        with torch.enable_grad():
            loss = self(student_logits, prepared).mean()
        (gradient,) = torch.autograd.grad(loss, student_logits)
        return float(gradient.norm())

    def _plain(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        return self.divergence(student_logits, teacher_logits, temperature=self.temperature, **self.options)

    def _combine(self, logits: Tensor, spread: Tensor, temperature: float) -> Tensor:
        logits = logits.detach().to(compute_dtype(logits))
        combined = self._combined(logits, spread, temperature)
        if self.teacher_temperature != 1:
            combined = combined / self.teacher_temperature
        if self.sharpen is not None:
            combined = torch.softmax(tempered(combined, temperature), dim=-1) * (temperature / self.sharpen)
        return combined

    def _combined(self, logits: Tensor, shares: Tensor, temperature: float) -> Tensor:
        """Return the combined teacher's logits ``[N, C]``; ``shares`` are those of :func:`_spread`."""
        by_class = shares.dim() == 3 and shares.shape[2] > 1
        if len(logits) == 1 and not by_class:
            return logits[0]
        if shares.dim() == 3:  # where no teacher counts for any class of a sample, all do alike
            silent = shares.sum(dim=(0, 2), keepdim=True) == 0
            shares = torch.where(silent, 1 / len(shares), shares)
        if self.average == "logits":
            # A constant that is added to a teacher's logits must not matter where it counts for some classes alone.
            return self._centre(
                temperature * torch.log_softmax(logits / temperature, -1) if by_class else logits, shares
            )
        if self.robust == "none":
            log_probs = soften(tempered(logits, temperature)).log_probs
            mixed = torch.logsumexp(log_probs + _placed(shares).log().to(logits), dim=0)
            return temperature * (_normal(mixed, log_probs) if by_class else mixed)
        probs = torch.softmax(tempered(logits, temperature), dim=-1)
        robust = self._centre(probs, shares)
        # Where no class has most of the teachers, a coordinate-wise rule can leave nothing: then the mean, and where
        # that is nothing, since none counts for a class that it speaks of, as if all counted alike.
        for instead in (_mean(probs, shares), probs.mean(dim=0)):
            robust = torch.where(robust.sum(dim=-1, keepdim=True) > 0, robust, instead)
        return temperature * (robust / robust.sum(dim=-1, keepdim=True)).log()

    def _centre(self, values: Tensor, shares: Tensor) -> Tensor:
        if self.robust == "median":
            return _median(values, shares)
        if self.robust == "trimmed-mean":
            return _trimmed_mean(values, shares, self.trim)
        return _mean(values, shares)


def objective(
    divergence: str,
    *,
    combine: str = "averaged",
    average: str = "probs",
    reduction: str = "mean",
    robust: str = "none",
    trim: float = 0.2,
    sharpen: float | None = None,
    teacher_temperature: float = 1.0,
    temperature: float = 1.0,
    **options: Any,
) -> Objective:
    """Build the objective of K teachers.

    Args:
        divergence: a name of :func:`fedkd.losses.divergences.names`.
        combine: ``averaged`` (one combined teacher, "holistic") or ``pairwise`` (one divergence per teacher).
        average: of the combined teacher: ``probs`` (the abstract's words [paper]) or ``logits``, a geometric-mean
            teacher [code]. With ``probs``, averaged and pairwise-mean have one gradient under ``ce`` and ``kl`` unless
            teachers are sharpened.
        reduction: of the pairwise divergences: ``mean`` [ours] or ``sum`` [paper].
        robust: of the combined teacher, per coordinate: ``none``, ``median`` or ``trimmed-mean``, as in Cronus,
            https://arxiv.org/abs/1912.11279 [ours].
        trim: the share of the teachers' weight that ``trimmed-mean`` cuts at each end, in [0, 0.5).
        sharpen: temperature τ of entropy-reduction aggregation, softmax(p̄/τ); DS-FL takes 0.1,
            https://arxiv.org/abs/2008.06180 [paper]. ``None`` is off.
        teacher_temperature: τ by which the teacher, each of them under ``pairwise``, is sharpened: p^(1/τ), normalised,
            as MixMatch sharpens a mean of predictions, https://arxiv.org/abs/1905.02249 [paper]. 1 is off.
        temperature: T of student and teachers alike.
        options: the divergence's own, e.g. ``beta`` for ``cakd``.

    Raises:
        ValueError: an argument or option is unknown or out of range.

    >>> student, teachers = torch.zeros(1, 2), torch.tensor([[[2.0, 0.0]], [[0.0, 2.0]]])
    >>> averaged, pairwise = objective("kl"), objective("kl", combine="pairwise")
    >>> averaged(student, averaged.prepare(teachers)), pairwise(student, pairwise.prepare(teachers))
    (tensor([0.]), tensor([0.3278]))
    """
    found = get(divergence)
    _check_choice("combine", combine, ("averaged", "pairwise"))
    _check_choice("average", average, ("probs", "logits"))
    _check_choice("reduction", reduction, ("mean", "sum"))
    _check_choice("robust", robust, ("none", "median", "trimmed-mean"))
    check_temperature(temperature)
    if not 0 <= trim < 0.5:
        raise ValueError(f"Expected argument `trim` to be in [0, 0.5), but got {trim!r}.")
    if sharpen is not None and not 0 < sharpen < math.inf:
        raise ValueError(f"Expected argument `sharpen` to be None or a finite number > 0, but got {sharpen!r}.")
    if not 0 < teacher_temperature < math.inf:
        raise ValueError(
            f"Expected argument `teacher_temperature` to be a finite number > 0, but got {teacher_temperature!r}."
        )
    if (combine == "pairwise" or found.multiway) and (robust != "none" or sharpen is not None):
        raise ValueError(
            "Expected arguments `robust` and `sharpen` to be 'none' and None unless teachers are averaged, "
            f"but got {robust!r} and {sharpen!r} with combine={combine!r}, divergence={divergence!r}."
        )
    _check_options(found, options)
    return Objective(
        found, combine == "pairwise", average, reduction, robust, trim, sharpen, float(teacher_temperature),
        float(temperature), options,
    )  # fmt: skip


def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"Expected argument `{name}` to be one of {list(allowed)}, but got {value!r}.")


def _check_options(divergence: Divergence, options: Mapping[str, Any]) -> None:
    takes: Callable[..., Any] = divergence.prepare or divergence.function
    own = [
        name
        for name, parameter in inspect.signature(takes).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY and name not in ("temperature", "labels", "weights")
    ]
    for name in options:
        if name not in own:
            raise ValueError(f"Expected options of {divergence.name!r} to be among {own}, but got {name!r}.")
    if divergence.prepare is not None:
        # Values are checked where they are used; used once here, a wrong one is an error before any training. Whether a
        # count of classes is too large, only who knows the classes can tell.
        logits, labels = torch.zeros(1, 1, _MANY_CLASSES), torch.zeros(1, dtype=torch.int64)
        tried = {
            name: min(value, _MANY_CLASSES) if isinstance(value, int) else value for name, value in options.items()
        }
        divergence.prepare(logits, temperature=1.0, labels=labels, **tried)


def _spread(teacher_logits: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the logits of the teachers that count somewhere, and their shares in float64.

    The shares are those of whole teachers, ``[K]``, which sum to 1, or of each sample and class,
    ``[K, N or 1, C or 1]``, which sum to 1 over the teachers, or to 0 where none counts.
    """
    teachers, samples, classes = teacher_logits.shape
    if weights is None:
        return teacher_logits, torch.full((teachers,), 1 / teachers, dtype=torch.float64, device=teacher_logits.device)
    weights = torch.as_tensor(weights, dtype=torch.float64, device=teacher_logits.device)
    by_class, by_sample = weights.shape == (teachers, classes), weights.shape == (teachers, samples)
    if weights.dim() == 2 and by_class != by_sample:
        weights = weights.unsqueeze(1 if by_class else 2)
    fits = weights.shape == (teachers,) or (
        weights.dim() == 3
        and len(weights) == teachers
        and weights.shape[1] in (1, samples)
        and weights.shape[2] in (1, classes)
    )
    if not fits:
        full = f"[{teachers}, {samples} or 1, {classes} or 1]"
        raise ValueError(
            f"Expected argument `weights` to have shape [{teachers}] or {full}, of which a 1 may be left out unless "
            f"there are as many samples as classes, but got {list(weights.shape)}."
        )
    if not bool(torch.isfinite(weights).all() and (weights >= 0).all() and (weights > 0).any()):
        told = weights.tolist() if weights.dim() == 1 else f"{float(weights.min())} to {float(weights.max())}"
        raise ValueError(f"Expected argument `weights` to be finite, non-negative and not all 0, but got {told}.")
    if weights.dim() == 3 and weights.shape[1:] == (1, 1):
        weights = weights.flatten()
    counts = (weights.reshape(teachers, -1) > 0).any(dim=1)
    if weights.dim() == 1:
        return teacher_logits[counts], weights[counts] / weights.sum()
    total = weights.sum(dim=0)
    return teacher_logits[counts], weights[counts] / torch.where(total > 0, total, 1)


def _scale(scale: Tensor, taught: Tensor | None, like: Tensor) -> Tensor | None:
    """Return what weighs the teachers' divergences, of a sample that none counts for by 0; None where that is 1."""
    if taught is not None and not bool(taught.all()):
        return (scale * taught.expand(like.shape[1])).to(compute_dtype(like))
    return None if len(scale) == 1 else scale.to(compute_dtype(like))


def _tilted(teacher_logits: Tensor, shares: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Split a weighted sum of teachers into one distribution of each and its share of a sample.

    Args:
        teacher_logits: ``[K, N, C]``.
        shares: ``[K, N or 1, C or 1]``, w of the module's docstring.
        temperature: T.

    Returns:
        Logits whose softmax at T is ∝ w_k·p_k, or p_k where that is nothing; and the shares s_k ∝ Σ_c w_k·p_k,
        ``[K, N]``, all alike where no teacher counts.
    """
    if shares.shape[2] == 1:
        log_mass = shares.log().expand(-1, teacher_logits.shape[1], 1).squeeze(-1)
    else:
        log_probs = soften(tempered(teacher_logits, temperature)).log_probs
        joint = log_probs + shares.log().to(log_probs)
        log_mass = torch.logsumexp(joint, dim=-1).double()
        speaks = (log_mass > -FAR / 2).unsqueeze(-1)
        tilted = torch.where(speaks, joint - log_mass.to(joint).unsqueeze(-1), log_probs)
        teacher_logits = (temperature * tilted).to(teacher_logits)
        log_mass = log_mass.masked_fill(~speaks.squeeze(-1), -math.inf)
    taught = log_mass.amax(dim=0) > -math.inf
    return teacher_logits, torch.softmax(torch.where(taught, log_mass, 0), dim=0)


def _mean(values: Tensor, shares: Tensor) -> Tensor:
    return (values * _placed(shares).to(values)).sum(dim=0)


def _normal(mixed: Tensor, log_probs: Tensor) -> Tensor:
    """Return log probabilities ``[N, C]`` in proportion to ``mixed``, or the teachers' mean where that is nothing."""
    nothing = mixed.amax(dim=-1, keepdim=True) < -FAR / 2
    return torch.log_softmax(torch.where(nothing, torch.logsumexp(log_probs, dim=0), mixed), dim=-1)


def _placed(shares: Tensor) -> Tensor:
    """Return shares, ``[K]`` or ``[K, N or 1, C or 1]``, with three dimensions."""
    return shares.reshape(-1, 1, 1) if shares.dim() == 1 else shares


def _ranked(values: Tensor, shares: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sort each coordinate over the teachers; return the values and where their shares start and end in [0, 1]."""
    ordered, order = values.sort(dim=0)
    shares = _placed(shares).expand(values.shape).gather(0, order)
    ends = shares.cumsum(dim=0)
    return ordered, ends - shares, ends


def _median(values: Tensor, shares: Tensor) -> Tensor:
    """Weighted median over the teachers; the midpoint where two values share the middle."""
    ordered, _, ends = _ranked(values, shares)
    # The tolerance keeps ten shares of 0.1 from missing one half.
    lower = (ends < 0.5 - 1e-9).sum(dim=0, keepdim=True)
    upper = (ends <= 0.5 + 1e-9).sum(dim=0, keepdim=True)
    return (ordered.gather(0, lower) / 2 + ordered.gather(0, upper) / 2).squeeze(0)


def _trimmed_mean(values: Tensor, shares: Tensor, trim: float) -> Tensor:
    """Mean of what lies within the weight quantiles [trim, 1 − trim], parts of a teacher included."""
    ordered, starts, ends = _ranked(values, shares)
    kept = (ends.clamp(trim, 1 - trim) - starts.clamp(trim, 1 - trim)) / (1 - 2 * trim)
    out = kept < 1e-9  # but for rounding, and maybe −∞
    return (kept.to(values) * ordered).masked_fill(out, 0).sum(dim=0)
