"""BD-KD: forward and reverse KL, balanced sample by sample by which of student and teacher is the flatter.

L = a·KL(p‖q) + r·KL(q‖p). Forward KL makes a student cover all the teacher's classes, reverse KL makes it sharpen.

Source: BD-KD, https://arxiv.org/abs/2212.12965: sample-wise weights, guided by the gap of entropies [paper]; which
direction the gap favours, here a switch, and δ are [ours].
"""

import math
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from fedkd.losses.closed_form import (
    Distribution,
    TeacherTerms,
    check_pair,
    check_temperature,
    compute_dtype,
    into,
    log_ratio,
    reverse,
    soften,
    tempered,
)
from fedkd.losses.divergences import kl, register

__all__ = ["OnlineLosses", "balanced", "online"]


class OnlineLosses(NamedTuple):
    """What student and teacher each minimise when they train together; ``[B]`` each, nats."""

    student: Tensor
    teacher: Tensor


# (a, r) where the student is flatter than the teacher, and where it is not.
_Weights = tuple[tuple[float, float], tuple[float, float]]


def _compare(
    student: Tensor, log_p: Tensor, p: Tensor, entropy_p: Tensor, *, weights: _Weights
) -> tuple[Tensor, Tensor]:
    softened = soften(student)
    flat = (_entropy(softened) > entropy_p).to(p)
    log_q, q = softened
    log_p_over_q = log_ratio(log_p, log_q)
    forward = (p * log_p_over_q).sum(dim=-1).clamp_min_(0)
    backward, slope = reverse(q, log_p_over_q)
    (a_flat, r_flat), (a_sharp, r_sharp) = weights
    a = a_sharp + (a_flat - a_sharp) * flat
    r = r_sharp + (r_flat - r_sharp) * flat
    value = a * forward + r * backward
    return value, slope.mul_(r.unsqueeze(-1)).addcmul_(a.unsqueeze(-1), torch.sub(q, p, out=into(q, p)))


def _entropy(softened: Distribution) -> Tensor:
    return -(softened.probs * softened.log_probs).sum(dim=-1)


def _prepare(
    teacher_logits: Tensor,
    *,
    temperature: float,
    labels: Tensor | None = None,
    delta: float = 2.0,
    rule: str = "sharpen_if_flat",
) -> TeacherTerms:
    if not 0 < delta < math.inf:
        raise ValueError(f"Expected argument `delta` to be a finite number > 0, but got {delta!r}.")
    rules: dict[str, _Weights] = {
        "sharpen_if_flat": ((1.0, delta), (delta, 1.0)),
        "opposite": ((delta, 1.0), (1.0, delta)),
        "none": ((1.0, 1.0), (1.0, 1.0)),
    }
    if rule not in rules:
        raise ValueError(f"Expected argument `rule` to be one of {list(rules)}, but got {rule!r}.")
    teacher = soften(tempered(teacher_logits, temperature))
    compare = partial(_compare, weights=rules[rule])
    return TeacherTerms(compare, (*teacher, _entropy(teacher)), temperature)


@register("bdkd", prepare=_prepare)
def balanced(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    delta: float = 2.0,
    rule: str = "sharpen_if_flat",
    temperature: float = 1.0,
) -> Tensor:
    """Balanced divergence, a·KL(p‖q) + r·KL(q‖p), unbounded.  [B, C], [B, C] -> [B], nats.

    Under ``sharpen_if_flat``, (a, r) is (1, δ) where H(q) > H(p) and (δ, 1) elsewhere; ``opposite`` swaps the two cases
    and ``none`` is (1, 1), the Jeffreys divergence. The weights carry no gradient, so the value jumps where the
    entropies cross; the gradient is that of the side taken.

    Args:
        student_logits: ``[B, C]``.
        teacher_logits: ``[B, C]``, detached.
        delta: δ > 0, the weight of the favoured direction; 1 is Jeffreys.
        rule: ``sharpen_if_flat``, ``opposite`` or ``none``.
        temperature: T.

    Source: BD-KD, https://arxiv.org/abs/2212.12965 [paper; direction and δ ours].

    >>> student = torch.tensor([[1.0, 1.5, 0.0, -0.5], [6.0, 1.0, 0.0, -1.0]])
    >>> balanced(student, torch.tensor([[3.0, 2.0, 1.0, 0.0]]).expand(2, 4))
    tensor([0.7346, 2.3785])
    """
    check_pair(student_logits, teacher_logits)
    check_temperature(temperature)
    teacher_logits = teacher_logits.detach().to(compute_dtype(student_logits))
    return _prepare(teacher_logits, temperature=temperature, delta=delta, rule=rule)(student_logits)


def online(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    weight: float = 1.0,
    teacher_weight: float = 1.0,
    delta: float = 2.0,
    rule: str = "sharpen_if_flat",
    temperature: float = 1.0,
) -> OnlineLosses:
    """Losses of a student and a teacher that train together.  [B, C], [B, C], [B] -> 2 × [B], nats.

    L_S = CE(z_s, y) + λ·balanced(z_s, z_t) and L_T = CE(z_t, y) + λ_T·KL(q‖p), with λ = ``weight``, λ_T =
    ``teacher_weight``. Each sends gradient to its own model only. A factor T² belongs into the weights.

    Source: BD-KD, https://arxiv.org/abs/2212.12965 [paper].

    >>> logits, labels = torch.tensor([[2.0, 0.0]]), torch.tensor([0])
    >>> online(logits, logits, labels)  # equal predictions: only the cross-entropies are left
    OnlineLosses(student=tensor([0.1269]), teacher=tensor([0.1269]))
    """
    to_teacher = balanced(student_logits, teacher_logits, delta=delta, rule=rule, temperature=temperature)
    to_student = kl(teacher_logits, student_logits, temperature=temperature)
    if labels.shape != student_logits.shape[:1]:
        raise ValueError(
            f"Expected argument `labels` to have shape {list(student_logits.shape[:1])}, but got {list(labels.shape)}."
        )
    own_student, own_teacher = (
        torch.nn.functional.cross_entropy(logits.to(compute_dtype(logits)), labels, reduction="none")
        for logits in (student_logits, teacher_logits)
    )
    return OnlineLosses(own_student + weight * to_teacher, own_teacher + teacher_weight * to_student)
