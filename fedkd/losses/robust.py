"""A peer's defence against poisoned knowledge: which teachers does it believe?"""

from collections.abc import Iterator

import torch
from torch import Tensor

from fedkd.losses.closed_form import check_logits, check_temperature, compute_dtype
from fedkd.metrics import agreement

_NOTHING = 1e-6
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
    teacher_logits: Tensor,
    own_logits: Tensor,
    *,
    temperature: float = 1.0,
    sent: Tensor | None = None,
    own_share: float = 0.2,
) -> Tensor:
    """Trust teachers as far as those agree with them whom the peer trusts itself.

    How far two agree is the correlation of what they say, over the samples x and in the classes in which both say
    something, r_jk = Σ_xc d_j·d_k / Σ_c s_jc·s_kc with d_k(x, c) = p_k(c|x) − mean over x, s_kc² = Σ_x d_k(x, c)². An
    expert for a few classes is not asked about the others, so that teachers of skewed data, whose top classes seldom
    are the same, still vouch for each other; to say always the same vouches for nobody. Each gives its trust away in
    proportion to max(0, r)², so that what two agree on by chance is next to nothing, and one that agrees with nobody
    gives it to the peer itself; all that flows begins at the peer: t = a·e_own + (1 − a)·Aᵀt. Liars that agree among
    themselves have only what honest peers give them.

    Args:
        teacher_logits: ``[K, N, C]``.
        own_logits: ``[N, C]``, the peer's own. One that says the same of everything begins at all teachers alike.
        temperature: T of the predictions p = softmax(z/T).
        sent: the samples whose logits a teacher sent, a mask ``[K, N]``; None: all.
        own_share: a, by which trust returns to the peer at each step.

    Returns:
        ``[K]``, >= 0, of which the largest is 1; all 1 where nobody is trusted.

    Source: EigenTrust, Kamvar, Schlosser and Garcia-Molina, WWW 2003 [paper], the peer itself being the pre-trusted
    one; squared correlations as the local trust [ours].

    >>> z = 9 * torch.eye(3).repeat(4, 1)
    >>> eigentrust(torch.stack([z, z, z.roll(1, 1)]), z)
    tensor([1., 1., 0.])
    """
    check_logits(teacher_logits=teacher_logits, own_logits=own_logits)
    check_temperature(temperature)
    if not 0 < own_share <= 1:
        raise ValueError(f"Expected argument `own_share` to be in (0, 1], but got {own_share}.")
    everybody, own = len(teacher_logits) + 1, own_logits.unsqueeze(0)
    samples, classes = own_logits.shape
    size = max(1, _BLOCK // (everybody * classes))

    def said() -> Iterator[tuple[Tensor, Tensor]]:
        """Yield what all say of a block of samples, ``[K+1, B, C]``, and whether they say it, ``[K+1, B, 1]``."""
        for begin in range(0, samples, size):
            block = slice(begin, begin + size)
            logits = torch.cat([teacher_logits[:, block], own[:, block]]).detach()
            probs = torch.softmax(logits.to(compute_dtype(logits)) / temperature, dim=-1).double()
            told = torch.ones_like(probs[..., :1])
            if sent is not None:
                told[:-1] = sent[:, block].unsqueeze(-1).to(told)
            yield probs, told

    together, total, spread, count = (
        torch.zeros(everybody, columns, dtype=torch.float64, device=teacher_logits.device)
        for columns in (everybody, classes, classes, 1)
    )
    for probs, told in said():
        total += (probs * told).sum(dim=1)
        count += told.sum(dim=1)
    mean = (total / count.clamp_min(1)).unsqueeze(1)
    for probs, told in said():
        centred = (probs - mean) * told
        together += centred.flatten(1) @ centred.flatten(1).T
        spread += centred.square().sum(dim=1)
    # Rounding leaves a teacher that always says the same a spread of almost nothing: that is none.
    spread = torch.where(spread > _NOTHING**2 * samples, spread, 0).sqrt()
    shared = spread @ spread.T
    local = torch.where(shared > 0, together / shared.clamp_min(torch.finfo(shared.dtype).tiny), 0).clamp(0, 1)
    local = local.square().fill_diagonal_(0)
    given = local.sum(dim=1)
    local[given == 0, -1] = 1
    if given[-1] == 0:
        local[-1] = (torch.arange(len(local), device=local.device) < len(local) - 1).to(local)
    steps = local / local.sum(dim=1, keepdim=True)
    begin = torch.zeros_like(given)
    begin[-1] = own_share
    trust = torch.linalg.solve(torch.eye(len(steps)).to(steps) - (1 - own_share) * steps.T, begin)[:-1].clamp_min(0)
    best = trust.max()
    return (trust / best if best > 0 else torch.ones_like(trust)).to(compute_dtype(teacher_logits))
