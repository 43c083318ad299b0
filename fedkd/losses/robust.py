"""A peer's defence against poisoned knowledge: which teachers does it believe?"""

from collections.abc import Iterator

import torch
from torch import Tensor

from fedkd.losses.closed_form import check_logits, check_temperature, compute_dtype
from fedkd.metrics import agreement

_NOTHING, _TINY = 1e-6, torch.finfo(torch.float64).tiny
_BLOCK = 2**20
"""Numbers that are looked at together: letters may be large."""


def agreement_weights(teacher_logits: Tensor, own_logits: Tensor) -> Tensor:
    """Weigh teachers by how much the typical other peer agrees with them.

    A teacher's score is the median (the upper one of two), over the other teachers and the peer itself, of the share
    of proxy samples on which both have the same top class, beyond chance (1/C). A colluding minority of copies
    agrees with itself, but the median is an honest peer's. Teachers that score less than half of the best are left
    out.

    Args:
        teacher_logits: ``[K, N, C]``.
        own_logits: ``[N, C]``, the peer's own, which it trusts.

    Returns:
        ``[K]``, 1 for a teacher that is believed and 0 for one that is not; at least one is.

    Source: [ours].

    >>> z = torch.eye(3).repeat(4, 1)
    >>> agreement_weights(torch.stack([z, z, z.roll(1, 1)]), z)
    tensor([1., 1., 0.])
    """
    teachers, _, classes = teacher_logits.shape
    shared = agreement(torch.cat([teacher_logits, own_logits.unsqueeze(0)]))
    others = ~torch.eye(teachers + 1, dtype=torch.bool, device=shared.device)
    scores = torch.stack([shared[k][others[k]].sort().values[teachers // 2] for k in range(teachers)]) - 1 / classes
    return (scores >= scores.max() / 2).float() if scores.max() > 0 else torch.ones_like(scores)


def eigentrust(
    teacher_logits: Tensor, own_logits: Tensor, *, temperature: float = 1.0, own_share: float = 0.2
) -> Tensor:
    """Trust teachers as far as those agree with them whom the peer trusts itself.

    How far two agree is the correlation of what they say, in the classes in which both say something,
    r_jk = Σ_xc d_j·d_k / Σ_c s_jc·s_kc with d_k(x, c) = p_k(c|x) − mean over the samples x, s_kc² = Σ_x d_k(x, c)². An
    expert for a few classes is not asked about the others, so that teachers of skewed data, whose top classes seldom
    are the same, still vouch for each other; to say always the same vouches for nobody. Each gives its trust away in
    proportion to a_jk = max(0, r_jk)², one that agrees with nobody gives it back to where it began:
    t = a·b + (1 − a)·Aᵀt.

    Trust begins at the peer itself, b = κ·e_own + (1 − κ)/K, with the less for all teachers alike the less those agree
    with it: κ = min(1, 2·mean_k a_own,k / median_j mean_k a_jk). A peer that agrees with the others half as much as
    they do among themselves, and more, begins alone, so that liars who agree with one another have only what honest
    peers give them; one that knows nothing yet begins at all alike.

    Args:
        teacher_logits: ``[K, N, C]``.
        own_logits: ``[N, C]``, the peer's own.
        temperature: T of the predictions p = softmax(z/T).
        own_share: a, by which trust returns to where it begins, at each step.

    Returns:
        ``[K]``, >= 0, of which the largest is 1: to one teacher alone there is nothing to compare.

    Source: EigenTrust, Kamvar, Schlosser and Garcia-Molina, WWW 2003 [paper], the peer itself being the pre-trusted
    one; squared correlations as the local trust, and κ [ours].

    >>> z = 9 * torch.eye(3).repeat(4, 1)
    >>> eigentrust(torch.stack([z, z, z.roll(1, 1)]), z)
    tensor([1., 1., 0.])
    """
    check_logits(teacher_logits=teacher_logits, own_logits=own_logits)
    check_temperature(temperature)
    if not 0 < own_share <= 1:
        raise ValueError(f"Expected argument `own_share` to be in (0, 1], but got {own_share}.")
    local = _agreed(teacher_logits, own_logits, temperature)
    teachers = len(teacher_logits)
    vouched = local.sum(dim=1)
    typical = vouched[:-1].median()
    own_part = (2 * vouched[-1] / typical).clamp(max=1) if typical > 0 else (vouched[-1] > 0).to(vouched)
    begin = torch.cat([((1 - own_part) / teachers).expand(teachers), own_part.reshape(1)])
    steps = torch.where(vouched.unsqueeze(1) > 0, local / vouched.clamp_min(_TINY).unsqueeze(1), begin)
    trust = torch.linalg.solve(torch.eye(teachers + 1).to(steps) - (1 - own_share) * steps.T, own_share * begin)
    trust = trust[:-1].clamp_min(0)
    best = trust.max()
    return (trust / best if best > 0 else torch.ones_like(trust)).to(compute_dtype(teacher_logits))


def _agreed(teacher_logits: Tensor, own_logits: Tensor, temperature: float) -> Tensor:
    """Return max(0, r)² of all teachers and, last, the peer itself, ``[K+1, K+1]`` float64 with 0 on the diagonal."""
    samples, classes = own_logits.shape
    everybody, device = len(teacher_logits) + 1, teacher_logits.device
    size = max(1, _BLOCK // (everybody * classes))

    def said() -> Iterator[Tensor]:
        """Yield what all say of a block of samples, ``[K+1, B, C]``."""
        for begin in range(0, samples, size):
            block = slice(begin, begin + size)
            logits = torch.cat([teacher_logits[:, block], own_logits[None, block]]).detach()
            yield torch.softmax(logits.to(compute_dtype(logits)) / temperature, dim=-1).double()

    together, total, spread = (
        torch.zeros(everybody, columns, dtype=torch.float64, device=device) for columns in (everybody, classes, classes)
    )
    for probs in said():
        total += probs.sum(dim=1)
    for probs in said():
        centred = probs - total.unsqueeze(1) / samples
        together += centred.flatten(1) @ centred.flatten(1).T
        spread += centred.square().sum(dim=1)
    # Rounding leaves a teacher that always says the same a spread of almost nothing: that is none.
    spread = torch.where(spread > _NOTHING**2 * samples, spread, 0).sqrt()
    shared = spread @ spread.T
    found = torch.where(shared > 0, together / shared.clamp_min(_TINY), 0).clamp(0, 1).square()
    return found.fill_diagonal_(0)
