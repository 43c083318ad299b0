r"""Divergences between a teacher's and a student's softened predictions, and the registry that names them.

Notation: student logits ``z_s`` and teacher logits ``z_t`` are ``[B, C]``; ``q = softmax(z_s/T)``,
``p = softmax(z_t/T)``, ``m = (p+q)/2``; ``H`` is the Shannon entropy in nats and ``C(v) = exp H(v)``. Every
function returns one number per sample, ``[B]``, detaches the teacher and leaves the factor ``T²`` to the caller.

Numerics. A divergence is computed together with its gradient ∂D/∂z_s in closed form, and one autograd node
hands that gradient on. This gives what autograd through the formula cannot: at p = q the gradient is exactly
zero, it stays finite where classes are masked (logits of −∞) or probabilities underflow, and a backward pass
costs one multiplication. The price is that there is no second derivative, and no ``torch.func``. bfloat16 and float16
are computed, and returned, in float32. Each operand goes through one softmax, and what follows is written into memory
already at hand, as a large new tensor costs as much as several passes over an old one.

Masked classes. log 0 counts as −1e30, so every value is finite. A class with p = q = 0 contributes nothing. Where
p > 0 = q, ``ce``, ``kl`` and ``jeffreys``, infinite by definition, are p·1e30, and their gradient is that of a q which
is only very small (for ``kl``, (q − p)/T as ever). Where q > 0 = p, ``reverse_kl`` and ``jeffreys`` are q·1e30; no
finite step mends that, so such a class carries no gradient of reverse KL, and the others theirs. The bounded
divergences take any mask in their stride. NaN and +∞ logits give NaN.

Sources: Molo et al., SISAP 2024, https://doi.org/10.1007/978-3-031-75823-2_12, and its extension in FGCS 176,
https://doi.org/10.1016/j.future.2025.108171, for the choice of measures.
"""

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from fedkd.losses.closed_form import (
    FAR,
    Compare,
    TeacherTerms,
    check_logits,
    check_pair,
    check_temperature,
    compute_dtype,
    differentiable,
    into,
    log_ratio,
    preparing,
    reverse,
    soften,
    tempered,
    tilt,
)

__all__ = [
    "Divergence",
    "TeacherTerms",
    "ce",
    "get",
    "jeffreys",
    "js",
    "kl",
    "msed",
    "names",
    "register",
    "reverse_kl",
    "sed",
    "td",
]


@dataclass(frozen=True)
class Divergence:
    """A divergence and what is known of it; called like the function it holds.

    Args:
        name: what a run's settings call it.
        function: ``f(student_logits, teacher_logits, *, temperature) -> Tensor[B]``.
        bound: its supremum, in the function's unit.
        symmetric: D(p, q) = D(q, p).
        root_is_metric: its square root obeys the triangle inequality.
        multiway: takes all teachers at once, ``[K, B, C]``.
        prepare: ``(teacher_logits, *, temperature, labels, **options) -> TeacherTerms``; ``None`` for a plain
            function, whose gradient is autograd's.
    """

    name: str
    function: Callable[..., Tensor]
    bound: float = math.inf
    symmetric: bool = False
    root_is_metric: bool = False
    multiway: bool = False
    prepare: Callable[..., TeacherTerms] | None = None

    def __call__(self, student_logits: Tensor, teacher_logits: Tensor, **options: Any) -> Tensor:
        """Return the divergence ``[B]``."""
        return self.function(student_logits, teacher_logits, **options)


_REGISTRY: dict[str, Divergence] = {}
_ELSEWHERE = {
    "cakd": "fedkd.losses.decoupled",
    "dkd": "fedkd.losses.decoupled",
    "bdkd": "fedkd.losses.balanced",
    "mae": "fedkd.training.distillation",
}
_Function = TypeVar("_Function", bound=Callable[..., Tensor])


def register(
    name: str,
    *,
    bound: float = math.inf,
    symmetric: bool = False,
    root_is_metric: bool = False,
    multiway: bool = False,
    prepare: Callable[..., TeacherTerms] | None = None,
) -> Callable[[_Function], _Function]:
    """Name a function ``f(student_logits, teacher_logits, *, temperature) -> Tensor[B]``, in a run's settings too.

    The options declare what is known of it: see :class:`Divergence`. The function is returned unchanged. A name
    that another function has is a ``ValueError``.

    >>> @register("total-variation", bound=1.0, symmetric=True)
    ... def total_variation(student_logits, teacher_logits, *, temperature=1.0):
    ...     q = torch.softmax(student_logits / temperature, dim=-1)
    ...     p = torch.softmax(teacher_logits.detach() / temperature, dim=-1)
    ...     return (p - q).abs().sum(dim=-1) / 2
    >>> get("total-variation")(torch.zeros(1, 3), torch.zeros(1, 3))
    tensor([0.])
    """

    def add(function: _Function) -> _Function:
        home = (function.__module__, function.__qualname__)
        known = _REGISTRY.get(name)
        # A module that is imported again registers again; that is no conflict.
        taken = known is not None and (known.function.__module__, known.function.__qualname__) != home
        if taken or _ELSEWHERE.get(name, function.__module__) != function.__module__:
            raise ValueError(f"Expected argument `name` to be a name not yet taken, but got {name!r}.")
        _REGISTRY[name] = Divergence(name, function, bound, symmetric, root_is_metric, multiway, prepare)
        return function

    return add


def get(name: str) -> Divergence:
    """Return the divergence of that name; a name that is not among :func:`names` is a ``ValueError``.

    >>> get("js").symmetric, get("js").root_is_metric, round(get("js").bound, 6)
    (True, True, 0.693147)
    """
    if name not in _REGISTRY and name in _ELSEWHERE:
        importlib.import_module(_ELSEWHERE[name])
    if name not in _REGISTRY:
        raise ValueError(f"Expected argument `name` to be one of {names()}, but got {name!r}.")
    return _REGISTRY[name]


def names() -> list[str]:
    """Return the names of all divergences, a user's own included, in alphabetical order.

    >>> [name for name in names() if name.endswith("kl")]
    ['kl', 'reverse_kl']
    """
    return sorted(_REGISTRY.keys() | _ELSEWHERE.keys())


def _compute(
    compare: Compare,
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float,
    terms: Callable[[Tensor], tuple[Tensor, ...]] = soften,
) -> Tensor:
    check_pair(student_logits, teacher_logits)
    check_temperature(temperature)
    teacher = terms(tempered(teacher_logits, temperature, compute_dtype(student_logits)))
    return differentiable(compare, student_logits, teacher, temperature)


def _probs(scaled: Tensor) -> tuple[Tensor]:
    """Return the terms of a teacher whose log p is not asked for."""
    return (torch.softmax(scaled, dim=-1),)


# Values and slopes. Near p = q rounding alone can take a divergence below zero: hence the clamps of finished values.


def compare_ce(student: Tensor, log_p: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    log_q, q = soften(student)
    value = torch.mul(log_q, p, out=into(log_q, p)).sum(dim=-1).neg_()
    return value, torch.sub(q, p, out=into(q, p))


def compare_kl(student: Tensor, log_p: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    log_q, q = soften(student)
    value = log_ratio(log_p, log_q).mul_(p).sum(dim=-1).clamp_min_(0)
    return value, torch.sub(q, p, out=into(q, p))


def compare_reverse_kl(student: Tensor, log_p: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    log_q, q = soften(student)
    return reverse(q, log_ratio(log_p, log_q))


def compare_jeffreys(student: Tensor, log_p: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    log_q, q = soften(student)
    log_p_over_q = log_ratio(log_p, log_q)
    forward = (p * log_p_over_q).sum(dim=-1).clamp_min_(0)
    backward, slope = reverse(q, log_p_over_q)
    return forward.add_(backward), slope.add_(torch.sub(q, p, out=into(q, p)))


def compare_td(student: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    q = torch.softmax(student, dim=-1)
    total = (p + q).clamp_min_(torch.finfo(q.dtype).tiny)
    gap = torch.sub(q, p, out=into(student, p))
    contrast = torch.div(gap, total, out=total)  # in [−1, 1]
    value = gap.mul_(contrast).sum(dim=-1).div_(2)
    return value, tilt(q, torch.addcmul(contrast, contrast, contrast, value=-0.5, out=gap))


def _skewed_js(student: Tensor, p: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """(1−s)·KL(p‖m) + s·KL(q‖m) with m = (1−s)·p + s·q, s the student's share, and its slope over −s.

    ``js`` at one half. By log1p of the gap, and not as a difference of entropies, for full precision near p = q.
    """
    q = torch.softmax(student, dim=-1)
    tiny = torch.finfo(q.dtype).tiny
    gap = torch.sub(p, q, out=into(student, p))
    floor = p.clamp_min(tiny)
    log_m_over_p = torch.div(gap, floor, out=floor).mul_(-share).log1p_()
    of_teacher = log_m_over_p.mul_(p).sum(dim=-1)
    floor_q = torch.clamp_min(q, tiny, out=into(floor, q))
    log_m_over_q = gap.div_(floor_q).mul_(1 - share).log1p_()
    weighted = log_m_over_q.mul_(q)
    of_student = weighted.sum(dim=-1)
    value = of_teacher.mul_(share - 1).sub_(of_student, alpha=share).clamp_min_(0)
    return value, weighted.addcmul_(q, of_student.unsqueeze(-1), value=-1)


def compare_js(student: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    value, slope = _skewed_js(student, p, 0.5)
    return value, slope.mul_(-0.5)


def compare_sed(student: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    value, slope = _skewed_js(student, p, 0.5)
    value = value.expm1_()
    return value, slope.mul_(((value + 1) * -0.5).unsqueeze(-1))


def compare_msed(student: Tensor, p: Tensor, spread: Tensor, *, teachers: int) -> tuple[Tensor, Tensor]:
    share = 1 / (teachers + 1)
    value, slope = _skewed_js(student, p, share)
    value = value.add_(spread).expm1_()
    return value / teachers, slope.mul_(((value + 1) * (-share / teachers)).unsqueeze(-1))


def _prepare_msed(
    teacher_logits: Tensor, *, temperature: float, labels: Tensor | None = None, weights: Tensor | None = None
) -> TeacherTerms:
    # The entropy of a mixture splits: JS of all n members = JS among the K teachers (their spread, which no
    # student changes) + the skewed JS between the student and the teachers' mean.
    scaled = tempered(teacher_logits, temperature)
    probs = torch.softmax(scaled, dim=-1)
    teachers = len(probs)
    weights = probs.new_ones(teachers) if weights is None else weights  # [K], or [K, N]
    shares = (weights / weights.sum(dim=0)).to(probs).reshape(teachers, -1, 1)
    # From the first teacher on, so that equal teachers have exactly their own mean.
    first, gaps = probs[:1], torch.sub(probs, probs[:1], out=scaled)
    mean = first + gaps.mul_(shares).sum(dim=0, keepdim=True)
    # No member's part of the mean is more than the mean, but for rounding, where the first counts for next to nothing:
    # share · p <= mean, and so log(mean/p) >= log share.
    mean = torch.maximum(mean, torch.mul(probs, shares, out=gaps).amax(dim=0, keepdim=True))
    floor = probs.clamp_min(torch.finfo(probs.dtype).tiny)
    log_mean_over_p = torch.sub(mean, probs, out=gaps).div_(floor).log1p_().clamp_min_(shares.log().clamp_min(-FAR))
    apart = log_mean_over_p.mul_(probs).sum(dim=-1, keepdim=True)
    spread = apart.mul_(shares).sum(dim=0, keepdim=True).squeeze(-1).neg_().clamp_min_(0)
    compare = partial(compare_msed, teachers=teachers)
    return TeacherTerms(compare, (mean, spread * (teachers / (teachers + 1))), temperature)


# The divergences.


@register("ce", prepare=preparing(compare_ce))
def ce(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Cross-entropy to the teacher, −Σ p log q = H(p) + KL(p‖q), unbounded.  [B, C], [B, C] -> [B], nats.

    Its student gradient is that of :func:`kl`: the built-in control of a comparison.

    Source: Hinton et al. 2015, https://arxiv.org/abs/1503.02531 [paper].

    >>> ce(torch.zeros(1, 4), torch.tensor([[3.0, 2.0, 1.0, 0.0]]))
    tensor([1.3863])
    """
    return _compute(compare_ce, student_logits, teacher_logits, temperature)


@register("kl", prepare=preparing(compare_kl))
def kl(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Forward Kullback-Leibler divergence, KL(p‖q) = Σ p log(p/q), unbounded.  [B, C], [B, C] -> [B], nats.

    Source: Molo et al., SISAP 2024, https://doi.org/10.1007/978-3-031-75823-2_12 [paper].

    >>> kl(torch.tensor([[1.0, 1.5, 0.0, -0.5]]), torch.tensor([[3.0, 2.0, 1.0, 0.0]]))
    tensor([0.2447])
    """
    return _compute(compare_kl, student_logits, teacher_logits, temperature)


@register("reverse_kl", prepare=preparing(compare_reverse_kl))
def reverse_kl(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Reverse Kullback-Leibler divergence, KL(q‖p) = Σ q log(q/p), unbounded.  [B, C], [B, C] -> [B], nats.

    Source: one half of BD-KD, https://arxiv.org/abs/2212.12965 [paper].

    >>> reverse_kl(torch.tensor([[1.0, 1.5, 0.0, -0.5]]), torch.tensor([[3.0, 2.0, 1.0, 0.0]]))
    tensor([0.2449])
    """
    return _compute(compare_reverse_kl, student_logits, teacher_logits, temperature)


@register("jeffreys", symmetric=True, prepare=preparing(compare_jeffreys))
def jeffreys(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Jeffreys divergence, KL(p‖q) + KL(q‖p) = Σ (p−q) log(p/q), unbounded.  [B, C], [B, C] -> [B], nats.

    Source: Jeffreys 1946, https://doi.org/10.1098/rspa.1946.0056; BD-KD at equal weights [ours].

    >>> jeffreys(torch.tensor([[1.0, 1.5, 0.0, -0.5]]), torch.tensor([[3.0, 2.0, 1.0, 0.0]]))
    tensor([0.4897])
    """
    return _compute(compare_jeffreys, student_logits, teacher_logits, temperature)


@register("js", bound=math.log(2), symmetric=True, root_is_metric=True, prepare=preparing(compare_js, _probs))
def js(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Jensen-Shannon divergence, H(m) − (H(p) + H(q))/2, bounded by ln 2.  [B, C], [B, C] -> [B], nats.

    Not square-rooted [code]; its root is a metric (Endres & Schindelin 2003, https://doi.org/10.1109/TIT.2003.813506).

    Source: Lin 1991, https://doi.org/10.1109/18.61115; Molo et al., SISAP 2024 [paper].

    >>> js(torch.tensor([[1.0, 1.5, 0.0, -0.5]]), torch.tensor([[3.0, 2.0, 1.0, 0.0]]))
    tensor([0.0598])
    """
    return _compute(compare_js, student_logits, teacher_logits, temperature, _probs)


@register("td", bound=1.0, symmetric=True, root_is_metric=True, prepare=preparing(compare_td, _probs))
def td(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Triangular divergence, ½ Σ (p−q)²/(p+q), bounded by 1.  [B, C], [B, C] -> [B], dimensionless.

    Not square-rooted [code]; its root is a metric.

    Source: Topsøe 2000, https://doi.org/10.1109/18.850703; Molo et al., SISAP 2024 [paper].

    >>> td(torch.tensor([[1.0, 1.5, 0.0, -0.5]]), torch.tensor([[3.0, 2.0, 1.0, 0.0]]))
    tensor([0.1171])
    """
    return _compute(compare_td, student_logits, teacher_logits, temperature, _probs)


@register("sed", bound=1.0, symmetric=True, prepare=preparing(compare_sed, _probs))
def sed(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Structural entropic distance, C(m)/√(C(p)·C(q)) − 1, bounded by 1.  [B, C], [B, C] -> [B].

    Dimensionless; computed as exp(js) − 1, to which it is identical. Its root is no metric: from (1, 0) to (0, 1) it
    is nearer by way of (½, ½).

    Source: Connor et al. 2011, https://doi.org/10.1016/j.is.2010.12.003; Molo et al., SISAP 2024 [paper].

    >>> sed(torch.tensor([[1.0, 1.5, 0.0, -0.5]]), torch.tensor([[3.0, 2.0, 1.0, 0.0]]))
    tensor([0.0617])
    """
    return _compute(compare_sed, student_logits, teacher_logits, temperature, _probs)


@register("msed", bound=1.0, symmetric=True, multiway=True, prepare=_prepare_msed)
def msed(student_logits: Tensor, teachers_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Multi-way structural entropic distance of the student and its K teachers.  [B, C], [K, B, C] -> [B].

    1/(n−1) · [C(mean)/(Π C(p_i))^(1/n) − 1] over the n = K + 1 members, bounded by 1, dimensionless; at n = 2
    it is :func:`sed`.

    Source: Molo et al., FGCS 2025, https://doi.org/10.1016/j.future.2025.108171 [code].

    >>> student, teacher = torch.tensor([[1.0, 1.5, 0.0, -0.5]]), torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    >>> msed(student, teacher.expand(3, 1, 4)), msed(student, teacher.expand(1, 1, 4))
    (tensor([0.0154]), tensor([0.0617]))
    """
    check_logits(student_logits=student_logits, teachers_logits=teachers_logits)
    if teachers_logits.dim() != 3 or student_logits.shape != teachers_logits.shape[1:]:
        raise ValueError(
            "Expected arguments `student_logits` and `teachers_logits` to have shapes [B, C] and [K, B, C], "
            f"but got {list(student_logits.shape)} and {list(teachers_logits.shape)}."
        )
    check_temperature(temperature)
    teachers = _prepare_msed(teachers_logits.to(compute_dtype(student_logits)), temperature=temperature)
    one_teacher = tuple(term.squeeze(0) for term in teachers.terms)
    return TeacherTerms(teachers.compare, one_teacher, temperature)(student_logits)
