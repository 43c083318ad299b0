r"""Decoupled KL: what a teacher says between and within strongly and weakly correlated classes (CAKD, DKD).

For a set S of strong classes, W its complement and p_S = Σ_{i∈S} p_i, exactly

    KL(p‖q) = BCD + p_S·SCD + (1−p_S)·WCD,
    BCD = KL((p_S, 1−p_S) ‖ (q_S, 1−q_S)),  SCD = KL(p|S ‖ q|S),  WCD = KL(p|W ‖ q|W).

CAKD replaces the weights p_S and 1−p_S, with which a confident teacher silences what it knows of the other classes, by
constants. Masked classes are treated as in :mod:`fedkd.losses.divergences`; a group without teacher mass contributes
nothing.

Sources: CAKD, https://arxiv.org/abs/2410.14741; DKD, https://arxiv.org/abs/2203.08679. The decomposition is [algebra];
CAKD's own mask rule and weights could not be read, so S and the defaults (those of DKD) are [ours].
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fedkd.losses.closed_form import (
    FAR,
    Distribution,
    TeacherTerms,
    attach,
    check_logits,
    check_pair,
    check_temperature,
    compute_dtype,
    soften,
    tempered,
)
from fedkd.losses.divergences import register

__all__ = ["Decoupled", "cakd", "cakd_features", "decouple", "dkd", "warm_up"]


class Decoupled(NamedTuple):
    """The parts of a decoupled KL and the teacher's mass on the strong classes p_S, each ``[B]``; nats."""

    bcd: Tensor
    scd: Tensor
    wcd: Tensor
    strong_mass: Tensor


class _Split(NamedTuple):
    """A prediction between and within the groups; a group without mass holds zeros."""

    strong: Tensor  # 1 on the strong classes, 0 on the weak, [..., B, C]
    log_within: Tensor  # log p|S and log p|W, [..., B, C]
    within: Tensor
    log_mass: Tensor  # of (S, W), [..., B, 2]


class _Parts(NamedTuple):
    bcd: Tensor
    scd: Tensor
    wcd: Tensor
    between: Tensor  # the slope of bcd, [..., B, C]
    within: Tensor  # the slopes of scd on the strong classes and of wcd on the weak, [..., B, C]


def decouple(student_logits: Tensor, teacher_logits: Tensor, strong: Tensor, *, temperature: float = 1.0) -> Decoupled:
    """Split KL(p‖q) by the strong classes ``strong`` (bool).  [B, C], [B, C], [B, C] -> 4 × [B], nats.

    Raises:
        ValueError: a mismatched shape, a dtype, T ≤ 0, or a sample without a strong class.

    >>> student, teacher = torch.tensor([[1.0, 1.5, 0.0, -0.5]]), torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    >>> bcd, scd, wcd, strong_mass = decouple(student, teacher, torch.tensor([[True, True, False, False]]))
    >>> bcd, scd, wcd, strong_mass
    (tensor([0.0149]), tensor([0.2574]), tensor([0.0263]), tensor([0.8808]))
    >>> bcd + strong_mass * scd + (1 - strong_mass) * wcd  # KL
    tensor([0.2447])
    """
    check_pair(student_logits, teacher_logits)
    check_temperature(temperature)
    _check_strong(strong, student_logits)
    student_logits = student_logits.to(compute_dtype(student_logits))
    teacher = soften(tempered(teacher_logits, temperature, student_logits.dtype))
    of_teacher = _split(teacher, strong.to(student_logits.dtype))
    parts = _parts(soften(tempered(student_logits, temperature)), of_teacher)
    slopes = (parts.between, parts.within * of_teacher.strong, parts.within * (1 - of_teacher.strong))
    bcd, scd, wcd = (
        attach(student_logits, value, slope, temperature) for value, slope in zip(parts[:3], slopes, strict=True)
    )
    return Decoupled(bcd, scd, wcd, of_teacher.log_mass[..., 0].exp())


def _split(softened: Distribution, strong: Tensor) -> _Split:
    log_probs, weak = softened.log_probs, 1 - strong
    highest = torch.stack([(log_probs - other * FAR).amax(dim=-1) for other in (weak, strong)], dim=-1)
    has_mass = highest > -FAR / 2
    highest = torch.where(has_mass, highest, 0)
    log_within = log_probs - _of_group(strong, highest)
    within = log_within.exp()
    mass = torch.stack([(within * group).sum(dim=-1) for group in (strong, weak)], dim=-1)
    mass = torch.where(has_mass, mass, 1)
    log_mass = torch.where(has_mass, mass.log() + highest, -FAR)
    return _Split(
        strong, log_within.sub_(_of_group(strong, mass.log())), within.div_(_of_group(strong, mass)), log_mass
    )


def _of_group(strong: Tensor, pair: Tensor) -> Tensor:
    """Give each class the number of its group, of a pair for (S, W).  [..., B, C], [..., B, 2] -> [..., B, C]."""
    # By arithmetic and not by `where`, which is several times slower on a CPU; with 0 and 1 as exact.
    return torch.addcmul(pair[..., 1:] * (1 - strong), strong, pair[..., :1])


def _parts(student: Distribution, teacher: _Split) -> _Parts:
    strong, log_within, within, log_mass = teacher
    _, log_within_q, within_q, log_mass_q = _split(student, strong)
    mass = log_mass.exp()
    terms = (log_within - log_within_q).mul_(within)
    return _Parts(
        bcd=(mass * (log_mass - log_mass_q)).sum(dim=-1).clamp_min_(0),
        scd=(terms * strong).sum(dim=-1).clamp_min_(0),
        wcd=(terms * (1 - strong)).sum(dim=-1).clamp_min_(0),
        between=within_q * _of_group(strong, log_mass_q.exp() - mass),
        within=(within_q - within).mul_(_of_group(strong, (log_mass > -FAR / 2).to(mass))),
    )


def _compare(student: Tensor, *terms: Tensor) -> tuple[Tensor, Tensor]:
    *of_teacher, factors = terms
    split = _Split(*of_teacher)
    parts = _parts(soften(student), split)
    value = (factors * torch.stack(parts[:3], dim=-1)).sum(dim=-1)
    within = parts.within.mul_(_of_group(split.strong, factors[..., 1:]))
    return value, within.addcmul_(parts.between, factors[..., :1])


def _terms(
    teacher_logits: Tensor, strong: Tensor, temperature: float, factors: tuple[float, float, float], mode: str = "free"
) -> TeacherTerms:
    softened = soften(tempered(teacher_logits, temperature))
    split = _split(softened, strong.to(softened.probs.dtype))
    weights = split.log_mass.new_tensor(factors).expand(*split.log_mass.shape[:-1], 3)
    if mode == "scaled":
        weights = weights * torch.nn.functional.pad(split.log_mass.exp(), (1, 0), value=1.0)
    return TeacherTerms(_compare, (*split, weights), temperature)


def _prepare_cakd(
    teacher_logits: Tensor,
    *,
    temperature: float,
    labels: Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 8.0,
    mode: str = "free",
    strong: str = "label",
    top_k: int = 5,
) -> TeacherTerms:
    _check_factors(alpha, beta, mode)
    if strong == "label":
        chosen = _one_hot(teacher_logits, labels)
    elif strong == "top-k":
        classes = teacher_logits.shape[-1]
        if not 1 <= top_k <= classes:
            raise ValueError(f"Expected argument `top_k` to be from 1 to {classes} classes, but got {top_k!r}.")
        chosen = torch.zeros_like(teacher_logits, dtype=torch.bool)
        chosen.scatter_(-1, teacher_logits.topk(top_k, dim=-1).indices, True)
        if labels is not None:
            chosen |= _one_hot(teacher_logits, labels)
    else:
        raise ValueError(f"Expected argument `strong` to be one of ['label', 'top-k'], but got {strong!r}.")
    return _terms(teacher_logits, chosen, temperature, (1.0, alpha, beta), mode)


def _prepare_dkd(
    teacher_logits: Tensor,
    *,
    temperature: float,
    labels: Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 8.0,
) -> TeacherTerms:
    _check_factors(alpha, beta)
    return _terms(teacher_logits, _one_hot(teacher_logits, labels), temperature, (alpha, 0.0, beta))


@register("cakd", prepare=_prepare_cakd)
def cakd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    mode: str = "free",
    strong: str = "label",
    top_k: int = 5,
    temperature: float = 4.0,
) -> Tensor:
    """Correlation-aware decoupled KL, BCD + α·SCD + β·WCD, unbounded.  [B, C], [B, C], [B] -> [B], nats.

    Args:
        student_logits: ``[B, C]``.
        teacher_logits: ``[B, C]``, detached.
        labels: ``[B]`` class indices; optional with ``strong="top-k"``.
        alpha: weight of SCD, ≥ 0.
        beta: weight of WCD, ≥ 0.
        mode: ``free``, or ``scaled`` for BCD + α·p_S·SCD + β·(1−p_S)·WCD, which is KL at α = β = 1.
        strong: S = {y} (``label``), or the teacher's ``top_k`` classes and y where known (``top-k``) [ours].
        top_k: how many classes ``top-k`` takes, from 1 to C.
        temperature: T; the default, as those of α and β, is DKD's.

    Source: CAKD, https://arxiv.org/abs/2410.14741 [paper; S and defaults ours].

    >>> student, teacher = torch.tensor([[1.0, 1.5, 0.0, -0.5]]), torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    >>> cakd(student, teacher, strong="top-k", top_k=2, beta=1.0, temperature=1.0)
    tensor([0.2986])
    >>> cakd(student, teacher, torch.tensor([0]), beta=1.0, mode="scaled", temperature=1.0)  # KL
    tensor([0.2447])
    """
    check_pair(student_logits, teacher_logits)
    check_temperature(temperature)
    teacher_logits = teacher_logits.detach().to(compute_dtype(student_logits))
    return _prepare_cakd(
        teacher_logits,
        temperature=temperature,
        labels=labels,
        alpha=alpha,
        beta=beta,
        mode=mode,
        strong=strong,
        top_k=top_k,
    )(student_logits)


@register("dkd", prepare=_prepare_dkd)
def dkd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
) -> Tensor:
    """Decoupled distillation, α·TCKD + β·NCKD: BCD and WCD with S = {y}, unbounded.  [B, C], [B, C], [B] -> [B], nats.

    Source: Zhao et al., CVPR 2022, https://arxiv.org/abs/2203.08679 [paper]; the defaults are theirs.

    >>> student, teacher = torch.tensor([[1.0, 1.5, 0.0, -0.5]]), torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    >>> dkd(student, teacher, torch.tensor([0]), beta=1.0, temperature=1.0)
    tensor([0.2583])
    """
    check_pair(student_logits, teacher_logits)
    check_temperature(temperature)
    teacher_logits = teacher_logits.detach().to(compute_dtype(student_logits))
    return _prepare_dkd(teacher_logits, temperature=temperature, labels=labels, alpha=alpha, beta=beta)(student_logits)


def cakd_features(
    student_features: Tensor,
    teacher_features: Tensor,
    head_weight: Tensor,
    predicted: Tensor,
    *,
    share: float = 0.1,
    alpha: float = 1.0,
    beta: float = 8.0,
    mode: str = "free",
    temperature: float = 4.0,
) -> Tensor:
    """CAKD between softmaxes over flattened features.  [B, D], [B, D], [C, D], [B] -> [B], nats.

    S is the ``share`` ρ of features that speak loudest for the teacher's answer: the top ⌈ρ·D⌉ of |W_ŷ,j · f_j|, with W
    the weight of the teacher's last layer and ŷ = ``predicted`` its class. Features of more dimensions are flattened.

    Source: CAKD, https://arxiv.org/abs/2410.14741 [ours].

    >>> teacher, head = torch.tensor([[1.0, 2.0, 0.0, 0.0]]), torch.ones(3, 4)
    >>> cakd_features(teacher, teacher, head, torch.tensor([2]), share=0.5)
    tensor([0.])
    """
    student_features, teacher_features = student_features.flatten(1), teacher_features.detach().flatten(1)
    check_logits(student_features=student_features, teacher_features=teacher_features, head_weight=head_weight)
    if not student_features.shape == teacher_features.shape == (len(predicted), head_weight.shape[-1]):
        raise ValueError(
            "Expected arguments `student_features`, `teacher_features`, `head_weight` and `predicted` to have shapes "
            f"[B, D], [B, D], [C, D] and [B], but got {list(student_features.shape)}, {list(teacher_features.shape)}, "
            f"{list(head_weight.shape)} and {list(predicted.shape)}."
        )
    if not 0 < share <= 1:
        raise ValueError(f"Expected argument `share` to be in (0, 1], but got {share!r}.")
    check_temperature(temperature)
    _check_factors(alpha, beta, mode)
    loudness = (head_weight.detach()[predicted] * teacher_features).abs()
    strong = torch.zeros_like(loudness, dtype=torch.bool)
    strong.scatter_(-1, loudness.topk(math.ceil(share * loudness.shape[-1]), dim=-1).indices, True)
    teacher_features = teacher_features.to(compute_dtype(student_features))
    return _terms(teacher_features, strong, temperature, (1.0, alpha, beta), mode)(student_features)


def warm_up(epoch: int, epochs: int = 20) -> float:
    """Return DKD's linear warm-up of the distillation weight: ``epoch`` (from 1) over ``epochs``, at most 1 [code].

    >>> warm_up(5), warm_up(30)
    (0.25, 1.0)
    """
    return min(epoch / epochs, 1.0) if epochs > 0 else 1.0


def _one_hot(teacher_logits: Tensor, labels: Tensor | None) -> Tensor:
    classes = teacher_logits.shape[-1]
    if labels is None:
        raise ValueError(
            "Expected argument `labels` to be class indices, but got None: samples without labels need "
            "cakd with strong='top-k'."
        )
    if labels.is_floating_point() or labels.shape != teacher_logits.shape[-2:-1]:
        raise ValueError(
            f"Expected argument `labels` to be class indices of shape {list(teacher_logits.shape[-2:-1])}, "
            f"but got {labels.dtype} of shape {list(labels.shape)}."
        )
    if bool(((labels < 0) | (labels >= classes)).any()):
        raise ValueError(f"Expected argument `labels` to be from 0 to {classes - 1}, but got {labels.tolist()}.")
    chosen = torch.zeros_like(teacher_logits, dtype=torch.bool)
    return chosen.scatter_(-1, labels.long().unsqueeze(-1).expand(*teacher_logits.shape[:-1], 1), True)


def _check_strong(strong: Tensor, student_logits: Tensor) -> None:
    if strong.dtype != torch.bool or strong.shape != student_logits.shape:
        raise ValueError(
            f"Expected argument `strong` to be a bool mask of shape {list(student_logits.shape)}, "
            f"but got {strong.dtype} of shape {list(strong.shape)}."
        )
    empty = (~strong.any(dim=-1)).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"Expected argument `strong` to hold at least one class per sample, but got none for {empty}.")


def _check_factors(alpha: float, beta: float, mode: str = "free") -> None:
    for name, value in (("alpha", alpha), ("beta", beta)):
        if not 0 <= value < math.inf:
            raise ValueError(f"Expected argument `{name}` to be a finite number >= 0, but got {value!r}.")
    if mode not in ("free", "scaled"):
        raise ValueError(f"Expected argument `mode` to be one of ['free', 'scaled'], but got {mode!r}.")
