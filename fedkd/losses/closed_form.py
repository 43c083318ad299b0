r"""What the divergences share: softened predictions, and a gradient that comes in closed form with the value.

A divergence compares a student with *terms* that its teacher alone decides, and gives values and slopes, the gradients
in z_s/T; ``differentiable`` makes of them one node of autograd's graph.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Distribution", "TeacherTerms"]  # the rest is for the modules of divergences

_LOG2_E = math.log2(math.e)

# −log 0, far above any other −log p and far below overflow, even summed over a batch.
FAR = 1e30


class Distribution(NamedTuple):
    """A softened prediction of one softmax: ``log_probs``, −1e30 or more, and ``probs``, each ``[..., B, C]``."""

    log_probs: Tensor
    probs: Tensor


# (z_s/T, *terms of the teacher) -> values [..., B] and slopes ∂D/∂(z_s/T) [..., B, C], both new tensors. The memory of
# z_s/T, [B, C], is the function's own, to be written over; that of the terms is not.
Compare = Callable[..., tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class TeacherTerms:
    """All of a divergence that the teacher alone decides: made once, used at every step of a student.

    ``compare`` gives values ``[..., B]`` and slopes ``[..., B, C]`` of a student and ``terms``, which are
    ``[..., B, *]`` like the teacher logits that they are made from. Called with student logits ``[B, C]``, it gives the
    divergence ``[B]`` of one teacher.
    """

    compare: Compare
    terms: tuple[Tensor, ...]
    temperature: float

    def __call__(self, student_logits: Tensor) -> Tensor:
        """Return the divergence ``[B]``, differentiable in the student logits."""
        return differentiable(self.compare, student_logits, self.terms, self.temperature)


def check_temperature(temperature: float) -> None:
    """Raise ``ValueError`` unless the temperature is a finite number > 0."""
    if not 0 < temperature < math.inf:
        raise ValueError(f"Expected argument `temperature` to be a finite number > 0, but got {temperature!r}.")


def check_logits(**logits: Tensor) -> None:
    """Raise ``ValueError`` unless all are floating-point ``[..., B, C]`` with B, C ≥ 1; keywords name them."""
    for name, tensor in logits.items():
        if not tensor.is_floating_point():
            raise ValueError(f"Expected argument `{name}` to have a floating-point dtype, but got {tensor.dtype}.")
        if tensor.dim() < 2 or tensor.numel() == 0:
            raise ValueError(
                f"Expected argument `{name}` to be logits of shape [B, C] with B, C >= 1, but got {list(tensor.shape)}."
            )


def check_pair(student_logits: Tensor, teacher_logits: Tensor) -> None:
    """Raise ``ValueError`` unless both are floating-point logits of one shape ``[B, C]``."""
    check_logits(student_logits=student_logits, teacher_logits=teacher_logits)
    if student_logits.dim() != 2 or student_logits.shape != teacher_logits.shape:
        raise ValueError(
            "Expected arguments `student_logits` and `teacher_logits` to have one shape [B, C], "
            f"but got {list(student_logits.shape)} and {list(teacher_logits.shape)}."
        )


def compute_dtype(logits: Tensor) -> torch.dtype:
    """Return the dtype to compute in: float64 for float64, float32 for all others."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


@lru_cache(maxsize=64)
def _scalar(number: float, dtype: torch.dtype) -> Tensor:
    """Keep a number as the tensor that PyTorch otherwise makes and casts at every use: half of a small division."""
    return torch.tensor(number, dtype=dtype, device="cpu")


def tempered(logits: Tensor, temperature: float, dtype: torch.dtype | None = None) -> Tensor:
    """Return z/T of the detached logits, in memory of its own and in ``dtype``: unless given, the one to compute in."""
    dtype = dtype or compute_dtype(logits)
    if logits.requires_grad:
        logits = logits.detach()
    if logits.dtype != dtype:
        logits = logits.to(dtype)
    return logits / _scalar(temperature, dtype)


def soften(scaled: Tensor) -> Distribution:
    """Return softmax(z/T) of ``scaled``, z/T ``[..., C]``, which is written over."""
    # By exp2, which PyTorch computes several times as fast as exp on a CPU.
    log_probs = torch.log_softmax(scaled, dim=-1).clamp_min_(-FAR)
    return Distribution(log_probs, torch.mul(log_probs, _LOG2_E, out=scaled).exp2_())


def into(own: Tensor, like: Tensor) -> Tensor | None:
    """Return ``own`` as the ``out`` of what comes out like ``like``; ``None``, new memory, where it does not fit.

    With K teachers, a student's ``[B, C]`` is too small; with teachers in float64, one in float32 is too coarse.
    """
    return own if own.shape == like.shape and own.dtype == like.dtype else None


def tilt(probs: Tensor, score: Tensor) -> Tensor:
    """Return q·(score − Σ q·score), the gradient in z where ``score``, overwritten, is that in q = softmax(z).

    All are ``[..., B, C]``.
    """
    weighted = score.mul_(probs)
    return weighted.addcmul_(probs, weighted.sum(dim=-1, keepdim=True), value=-1)


def log_ratio(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return log(p/q) ``[..., B, C]`` of log p ``[..., B, C]`` and log q, in the memory of the latter where it fits."""
    return torch.sub(log_p, log_q, out=into(log_q, log_p))


def reverse(q: Tensor, log_p_over_q: Tensor) -> tuple[Tensor, Tensor]:
    """Return KL(q‖p) ``[..., B]``, in nats, and its slope ``[..., B, C]``, of log(p/q), which is written over."""
    value = (q * log_p_over_q).sum(dim=-1).neg_().clamp_min_(0)
    return value, tilt(q, torch.threshold_(log_p_over_q, -FAR / 2, 0)).neg_()


def _read_constants() -> None:
    """Have log1p read a constant that it keeps for −0.

    It lies on a page of PyTorch's library that nothing else needs, and log1p loads it for every vector, under a mask.
    As long as the page is not mapped in this process, a processor with AVX-512 does that in microcode, and log1p takes
    twenty times as long.
    """
    for dtype in (torch.float32, torch.float64):
        torch.log1p(torch.full((64,), -0.0, dtype=dtype, device="cpu"))


_read_constants()


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, result: tuple[Tensor, Tensor], temperature: float) -> Tensor:
        value, slope = result  # as one argument, for autograd makes a view of a tensor that is handed through
        ctx.save_for_backward(slope)
        ctx.temperature = temperature
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        if torch.is_grad_enabled():  # as under `create_graph`; autograd's own check costs a tenth of a small loss
            raise RuntimeError("The divergences have no second derivative: their gradient is made with their value.")
        (slope,) = ctx.saved_tensors
        return (grad / _scalar(ctx.temperature, grad.dtype)).unsqueeze(-1) * slope, None, None


def attach(student_logits: Tensor, value: Tensor, slope: Tensor, temperature: float) -> Tensor:
    """Return ``value`` ``[B]``, a new tensor, as a function of student logits ``[B, C]`` with gradient ``slope/T``.

    A second derivative is a ``RuntimeError`` when it is asked for.
    """
    attached: Tensor = _Attach.apply(student_logits, (value, slope), temperature)
    return attached


def differentiable(compare: Compare, student_logits: Tensor, terms: tuple[Tensor, ...], temperature: float) -> Tensor:
    """Return the divergence ``[B]`` from one teacher's ``terms``, differentiable in the student logits ``[B, C]``."""
    dtype = compute_dtype(student_logits)
    if student_logits.dtype != dtype:
        student_logits = student_logits.to(dtype)
    value, slope = compare(tempered(student_logits, temperature, dtype), *terms)
    return attach(student_logits, value, slope, temperature)


def preparing(compare: Compare, terms: Callable[[Tensor], tuple[Tensor, ...]] = soften) -> Callable[..., TeacherTerms]:
    """Return the ``prepare`` of a divergence whose teacher terms are made of z_t/T alone: unless given, log p and p."""

    def prepare(teacher_logits: Tensor, *, temperature: float, labels: Tensor | None = None) -> TeacherTerms:
        return TeacherTerms(compare, terms(tempered(teacher_logits, temperature)), temperature)

    return prepare
