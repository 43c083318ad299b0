"""A peer's defence against poisoned knowledge: which teachers does it believe?"""

import torch
from torch import Tensor

from fedkd.metrics import agreement


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
