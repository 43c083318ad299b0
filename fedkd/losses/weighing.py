r"""How much each teacher counts, for each proxy sample and class: the ways to weigh them, as pure functions.

The one teacher of a peer that averages is

    p̄(c|x) ∝ Σ_k w_k(x, c) · p_k(c|x),   Σ_k w_k(x, c) = 1,

normalised over the classes c, with p_k = softmax(z_k/T) the K teachers' predictions; :mod:`fedkd.losses.teachers` says
what the same weights w mean where each teacher is learned from by itself. A way returns w in a shape that broadcasts to
``[K, N, C]``, non-negative; they are divided by their sum over the teachers there. Without that, a class that all speak
of would gain by it, and weights by class do harm.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from torch import Tensor

from fedkd.losses.closed_form import check_logits, check_temperature, compute_dtype

__all__ = [
    "WAYS",
    "Evidence",
    "Way",
    "class_counts",
    "confidence",
    "density",
    "discrimination",
    "energy",
    "entropy",
    "kt_pfl",
    "predicted_prior",
    "similarity",
    "uniform",
    "variance",
]

_KT_PFL_STEPS, _KT_PFL_REGULARIZER = 200, 0.7


@dataclass(frozen=True)
class Evidence:
    """What a peer can weigh its teachers by.

    Attributes:
        logits: the teachers', ``[K, N, C]``.
        temperature: T of the setting; a peer that searches for one weighs by the setting's all the same.
        own_logits: the peer's own at the start of the round, ``[N, C]``; None unless the way asks for them.
        counts: how many private samples of each class a teacher says that it has, ``[K, C]``; None if it is not told.
        certainty: how much a teacher says that it trusts itself on a sample, ``[K, N]`` in [0, 1]; None if it is not
            told.
    """

    logits: Tensor
    temperature: float = 1.0
    own_logits: Tensor | None = None
    counts: Tensor | None = None
    certainty: Tensor | None = None

    @property
    def sent(self) -> Tensor | None:
        """The samples whose logits a teacher sent, a mask ``[K, N]``; None: all."""
        return None if self.certainty is None else self.certainty > 0

    def of(self, chosen: Tensor) -> "Evidence":
        """Return what there is of some of the teachers, by a mask ``[K]``."""
        counts = None if self.counts is None else self.counts[chosen]
        certainty = None if self.certainty is None else self.certainty[chosen]
        return replace(self, logits=self.logits[chosen], counts=counts, certainty=certainty)


@dataclass(frozen=True)
class Way:
    """A way to weigh, by the name that the setting ``weighing`` gives it.

    Attributes:
        weigh: ``Evidence -> w``, which broadcasts to ``[K, N, C]``.
        needs_own: whether it compares the teachers with the peer's own logits.
        told: what it needs the senders to tell beside their logits, an attribute of :class:`Evidence`; empty: nothing.
    """

    weigh: Callable[[Evidence], Tensor]
    needs_own: bool = False
    told: str = ""


def uniform(teacher_logits: Tensor) -> Tensor:
    """Every teacher counts alike: FedMD, FedDF, the SISAP papers.  [K, N, C] -> [K, 1, 1].

    Source: FedMD, Li and Wang 2019, arXiv 1910.03581 [paper].

    >>> uniform(torch.zeros(2, 3, 4)).flatten()
    tensor([1., 1.])
    """
    check_logits(teacher_logits=teacher_logits)
    return teacher_logits.new_ones(len(teacher_logits), 1, 1, dtype=compute_dtype(teacher_logits))


def predicted_prior(teacher_logits: Tensor, *, temperature: float = 1.0, sent: Tensor | None = None) -> Tensor:
    """Weigh a teacher in a class by the class's share in all that it predicts.  [K, N, C] -> [K, 1, C].

    w_kc = 1/N Σ_x p_k(c|x), over the samples that it ``sent``, a mask ``[K, N]``, all unless given: a teacher that was
    never taught a class hardly ever speaks of it, and so hardly counts where others do. It is the estimate of the
    teacher's class prior by its mean prediction; nothing more is sent.

    Source: [ours].

    >>> z = torch.tensor([[[9.0, 0.0, 0.0]] * 3, [[0.0, 9.0, 0.0]] * 3])  # each speaks of one class alone
    >>> predicted_prior(z).squeeze(1).round(decimals=2)
    tensor([[1., 0., 0.],
            [0., 1., 0.]])
    """
    probs = _probs(teacher_logits, temperature)
    if sent is None:
        return probs.mean(dim=1, keepdim=True)
    told = sent.to(probs).unsqueeze(-1)
    return (probs * told).sum(dim=1, keepdim=True) / told.sum(dim=1, keepdim=True).clamp_min(1)


def discrimination(teacher_logits: Tensor, *, temperature: float = 1.0, sent: Tensor | None = None) -> Tensor:
    """Weigh a teacher in a class by how well it tells the class apart.  [K, N, C] -> [K, 1, C].

    w_kc is the standard deviation of p_k(c|x) over the samples x (those that it ``sent``, a mask ``[K, N]``): 0 for a
    teacher that never speaks of the class, as under :func:`predicted_prior`, and 0 for one that speaks of it always, as
    a model does that has seen nothing else, or that boasts.

    Source: [ours].

    >>> z = torch.tensor([[[9.0, 0.0], [9.0, 0.0]], [[9.0, 0.0], [0.0, 9.0]]])  # always class 0; either
    >>> discrimination(z).squeeze(1).round(decimals=2)
    tensor([[0.0000, 0.0000],
            [0.5000, 0.5000]])
    """
    probs = _probs(teacher_logits, temperature)
    told = torch.ones_like(probs[..., :1]) if sent is None else sent.to(probs).unsqueeze(-1)
    count = told.sum(dim=1, keepdim=True).clamp_min(1)
    mean = (probs * told).sum(dim=1, keepdim=True) / count
    return (((probs - mean).square() * told).sum(dim=1, keepdim=True) / count).sqrt()


def confidence(teacher_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Weigh a teacher on a sample by its largest probability, max_c p_k(c|x).  [K, N, C] -> [K, N, 1].

    Source: a common choice of federated distillation, studied as a baseline by Selective-FD, arXiv 2304.01731 [ours].

    >>> confidence(torch.tensor([[[0.0, 0.0]], [[9.0, 0.0]]])).flatten()
    tensor([0.5000, 0.9999])
    """
    return _probs(teacher_logits, temperature).amax(dim=-1, keepdim=True)


def entropy(teacher_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Weigh a teacher on a sample by exp(−H(p_k)), one over its number of likely classes.  [K, N, C] -> [K, N, 1].

    Source: [ours]; 1/exp(H) is 1 for a certain teacher and 1/C for one that knows nothing.

    >>> entropy(torch.tensor([[[0.0, 0.0]], [[99.0, 0.0]]])).flatten()
    tensor([0.5000, 1.0000])
    """
    probs = _probs(teacher_logits, temperature)
    likely: Tensor = torch.special.entr(probs).sum(dim=-1, keepdim=True)
    return likely.neg().exp()


def energy(teacher_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Weigh teachers on a sample by the softmax of their negative energies.  [K, N, C] -> [K, N, 1].

    w_k(x) = softmax_k(log Σ_c exp(z_k(c|x)/T)): the free energy E = −T·lse(z/T) is low where a model has seen much.
    Unlike the other ways it feels a constant that is added to a teacher's logits, and their scale.

    Source: Liu et al. 2020, arXiv 2010.03759, for one model [paper]; as a weight of teachers [ours].

    >>> energy(torch.tensor([[[0.0, 0.0]], [[3.0, 0.0]]])).flatten()
    tensor([0.0866, 0.9134])
    """
    check_logits(teacher_logits=teacher_logits)
    check_temperature(temperature)
    scaled = teacher_logits.detach().to(compute_dtype(teacher_logits)) / temperature
    return torch.softmax(torch.logsumexp(scaled, dim=-1, keepdim=True), dim=0)


def variance(teacher_logits: Tensor) -> Tensor:
    """Weigh a teacher on a sample by the variance of its logits over the classes.  [K, N, C] -> [K, N, 1].

    Source: Fed-ET, Cho et al., IJCAI 2022, arXiv 2204.12703 [paper].

    >>> variance(torch.tensor([[[1.0, -1.0]], [[2.0, -2.0]]])).flatten().float()
    tensor([1., 4.])
    """
    check_logits(teacher_logits=teacher_logits)
    logits = teacher_logits.detach().double()  # the square of a logit may be beyond float32
    return logits.var(dim=-1, keepdim=True, correction=0)


def similarity(teacher_logits: Tensor, own_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Weigh a teacher by how alike it and the peer itself predict.  [K, N, C], [N, C] -> [K, 1, 1].

    w_k = 1 − mean over x of JS(p_k, p_own)/ln 2, in [0, 1].

    Source: [ours], after the similarity of soft predictions by which KTA and its like group clients.

    >>> z = torch.tensor([[9.0, 0.0], [0.0, 9.0]])
    >>> similarity(torch.stack([z, z.flip(0)]), z).flatten().round(decimals=2)
    tensor([1., 0.])
    """
    theirs, own = _probs(teacher_logits, temperature), _probs(own_logits, temperature)
    middle = torch.special.entr((theirs + own) / 2)
    apart = middle.sum(dim=-1) - (torch.special.entr(theirs) + torch.special.entr(own)).sum(dim=-1) / 2
    alike: Tensor = 1 - apart.mean(dim=1) / torch.log(apart.new_tensor(2.0))
    return alike.clamp(0, 1).reshape(-1, 1, 1)


def kt_pfl(
    teacher_logits: Tensor,
    own_logits: Tensor,
    *,
    temperature: float = 1.0,
    regularizer: float = _KT_PFL_REGULARIZER,
    steps: int = _KT_PFL_STEPS,
) -> Tensor:
    """Learn a row of weights: who helps whom.  [K, N, C], [N, C] -> [K, 1, 1], which sums to 1.

    The row c of the simplex that minimises  mean over x of KL(Σ_k c_k·p_k ‖ p_own) + ρ·‖c − 1/K‖², a convex problem, by
    exponentiated gradient.

    Args:
        teacher_logits: of the K teachers.
        own_logits: the peer's own.
        temperature: T of both.
        regularizer: ρ; the larger, the more alike the weights.
        steps: of the descent.

    Source: the knowledge coefficient matrix of KT-pFL, Zhang et al., NeurIPS 2021, arXiv 2111.02862 [paper]; there a
    server learns all rows, with a peer's own knowledge among the teachers, by plain gradient steps; here each peer
    learns its own row, to the minimum [ours].

    >>> z = torch.tensor([[5.0, 0.0], [0.0, 5.0]])
    >>> bool(kt_pfl(torch.stack([z, z.flip(0)]), z)[0] > 0.8)
    True
    """
    theirs, own = _probs(teacher_logits, temperature), _probs(own_logits, temperature)
    log_own = own.clamp_min(torch.finfo(own.dtype).tiny).log()
    count = len(theirs)
    row, rate = theirs.new_full((count,), 1 / count), 0.5
    for _ in range(steps):
        mean = torch.einsum("k,knc->nc", row, theirs).clamp_min(torch.finfo(own.dtype).tiny)
        slope = torch.einsum("knc,nc->k", theirs, mean.log() - log_own) / theirs.shape[1]
        slope = slope + 2 * regularizer * (row - 1 / count)
        row = torch.softmax(row.clamp_min(torch.finfo(row.dtype).tiny).log() - rate * slope, dim=0)
    return row.reshape(-1, 1, 1)


def class_counts(counts: Tensor) -> Tensor:
    """Weigh a teacher in a class by its number of private samples of it.  [K, C] -> [K, 1, C].

    A class of which nobody has a sample counts for all alike.

    Source: [ours]; cf. the aggregation by class of federated distillation.

    >>> class_counts(torch.tensor([[30.0, 0.0, 0.0], [10.0, 5.0, 0.0]])).squeeze(1)
    tensor([[30.,  0.,  1.],
            [10.,  5.,  1.]])
    """
    if counts.dim() != 2 or not bool((counts >= 0).all()):
        raise ValueError(f"Expected argument `counts` to be [K, C] numbers >= 0, but got {counts}.")
    counts = counts if counts.is_floating_point() else counts.float()
    return torch.where(counts.sum(dim=0) > 0, counts, torch.ones_like(counts)).unsqueeze(1)


def density(certainty: Tensor) -> Tensor:
    """Weigh a teacher on a sample by how much it says that the sample is like its own.  [K, N] -> [K, N, 1].

    Source: FedAUX, Sattler et al. 2021, arXiv 2102.02514: the score of a logistic regression of private against public
    features [code].

    >>> density(torch.tensor([[0.5, 0.0]])).shape
    torch.Size([1, 2, 1])
    """
    if certainty.dim() != 2 or not bool((certainty >= 0).all()):
        raise ValueError(f"Expected argument `certainty` to be [K, N] numbers >= 0, but got {list(certainty.shape)}.")
    return certainty.unsqueeze(-1)


def _probs(logits: Tensor, temperature: float) -> Tensor:
    check_logits(logits=logits)
    check_temperature(temperature)
    return torch.softmax(logits.detach().to(compute_dtype(logits)) / temperature, dim=-1)


def _told(found: Tensor | None, what: str) -> Tensor:
    if found is None:
        raise ValueError(f"Expected the teachers to have told their {what}, but they told none.")
    return found


WAYS: Mapping[str, Way] = MappingProxyType(
    {
        "uniform": Way(lambda e: uniform(e.logits)),
        "predicted-prior": Way(lambda e: predicted_prior(e.logits, temperature=e.temperature, sent=e.sent)),
        "discrimination": Way(lambda e: discrimination(e.logits, temperature=e.temperature, sent=e.sent)),
        "confidence": Way(lambda e: confidence(e.logits, temperature=e.temperature)),
        "entropy": Way(lambda e: entropy(e.logits, temperature=e.temperature)),
        "energy": Way(lambda e: energy(e.logits, temperature=e.temperature)),
        "variance": Way(lambda e: variance(e.logits)),
        "similarity": Way(
            lambda e: similarity(e.logits, _told(e.own_logits, "own logits"), temperature=e.temperature),
            needs_own=True,
        ),
        "kt-pfl": Way(
            lambda e: kt_pfl(e.logits, _told(e.own_logits, "own logits"), temperature=e.temperature), needs_own=True
        ),
        "counts": Way(lambda e: class_counts(_told(e.counts, "class counts")), told="counts"),
        "density": Way(lambda e: density(_told(e.certainty, "certainty")), told="certainty"),
    }
)
"""The library's ways by name."""
