r"""Which public samples a peer knows something about, judged by its private samples: scores, ratios, thresholds.

Everything here compares rows of features: what the peer's own model makes of private samples and of public ones.
Nothing is drawn but the starts of k-means, from a seed. Computed in float64.
"""

import math

import torch
from torch import Tensor

_STEPS = 500  # of L-BFGS, each with a line search; a few dozen are enough
_CHUNK = 1024  # rows of a matrix of distances at once


def bounded(private: Tensor, public: Tensor) -> tuple[Tensor, Tensor]:
    """Scale features so that no row is longer than 1.  ``[n, d]``, ``[m, d]`` -> the same shapes, float64.

    Divided by the longest public row; private rows that are longer still are shortened to 1 [ours]. The scale so
    depends on nothing private; FedAUX divides by the longest row of both [code].

    >>> bounded(torch.tensor([[8.0, 0.0], [1.0, 0.0]]), torch.tensor([[0.0, 4.0]]))
    (tensor([[1.0000, 0.0000],
            [0.2500, 0.0000]], dtype=torch.float64), tensor([[0., 1.]], dtype=torch.float64))
    """
    private, public = private.double(), public.double()
    longest = public.norm(dim=1).max().clamp_min(torch.finfo(torch.float64).tiny)
    private = private / longest
    return private / private.norm(dim=1, keepdim=True).clamp_min(1), public / longest


def density_coefficients(private: Tensor, public: Tensor, *, penalty: float) -> Tensor:
    r"""Fit the logistic regression that tells private rows from public ones.  ``[n, d]``, ``[m, d]`` -> θ ``[d]``.

    .. math:: \min_θ \frac{1}{n+m} \sum_i \log(1 + e^{-t_i θ·x_i}) + \frac{λ}{2} ‖θ‖²,
              \quad t = 1 \text{ for private rows}, -1 \text{ for public ones}

    Without an intercept, which no penalty would hold [paper]. The authors' code penalises n + m times less, and has an
    intercept [code].

    Args:
        private: rows no longer than 1.
        public: likewise.
        penalty: λ > 0.

    Source: FedAUX, arXiv 2102.02514 [paper].

    >>> density_coefficients(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]), penalty=0.1).round(decimals=3)
    tensor([ 1.1780, -1.1780], dtype=torch.float64)
    """
    signed = torch.cat([private.double(), -public.double()])
    theta = torch.zeros(signed.shape[1], dtype=torch.float64, device=signed.device, requires_grad=True)
    search = torch.optim.LBFGS(
        [theta], max_iter=_STEPS, tolerance_grad=1e-10, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        search.zero_grad()
        found = torch.nn.functional.softplus(-(signed @ theta)).mean() + penalty / 2 * theta @ theta
        found.backward()  # type: ignore[no-untyped-call]
        return found

    with torch.enable_grad():
        search.step(loss)  # type: ignore[no-untyped-call]
    return theta.detach()


def density_sensitivity(rows: int, penalty: float) -> float:
    """Return how far one private row, replaced by another no longer than 1, can move the coefficients: 2/(nλ), in L2.

    It holds for :func:`density_coefficients` of ``rows`` private and public rows together, whose features do not
    themselves depend on the record that is replaced. The authors' code uses it too, beside a penalty that is n times
    smaller than λ [code].

    Source: FedAUX, arXiv 2102.02514 [paper], after Chaudhuri, Monteleoni and Sarwate, JMLR 2011.

    >>> density_sensitivity(1000, 0.01)
    0.2
    """
    return 2 / (rows * penalty)


def density_scores(coefficients: Tensor, rows: Tensor) -> Tensor:
    """Return how private rows look, σ(θ·x).  θ ``[d]``, ``[m, d]`` -> ``[m]`` in (0, 1).

    Source: FedAUX, arXiv 2102.02514 [paper].

    >>> density_scores(torch.tensor([2.0, 0.0]), torch.tensor([[0.0, 1.0], [0.5, 0.0]])).round(decimals=4)
    tensor([0.5000, 0.7311], dtype=torch.float64)
    """
    return torch.sigmoid(rows.double() @ coefficients.double())


def median_distance(rows: Tensor) -> float:
    """Return the median of the distances between different rows ``[n, d]``; 1 where that is 0, or n is 1.

    >>> median_distance(torch.tensor([[0.0], [1.0], [3.0]]))
    2.0
    """
    distances = torch.pdist(rows.double())
    return float(distances.sort().values[len(distances) // 2]) or 1.0 if len(distances) else 1.0


def kulsif(private: Tensor, public: Tensor, rows: Tensor, *, width: float, penalty: float) -> Tensor:
    r"""Estimate how much denser private rows lie than public ones.  ``[n, d]``, ``[m, d]``, ``[q, d]`` -> ``[q]``.

    .. math:: r(x) = \sum_j α_j k(x, y_j) + \frac{1}{nλ} \sum_i k(x, x_i), \quad
              \left(\tfrac{1}{m} K_{yy} + λI\right) α = -\frac{1}{nmλ} K_{yx} 1, \quad
              k(x, y) = e^{-‖x-y‖² / 2σ²}

    It is the r that makes ½ E_public r² − E_private r + λ/2 ‖r‖² least. An estimate: it may be below 0.

    The authors' code multiplies by the matrix where the formula divides by it [code]; here it is solved [paper]. Their
    other sample is uniform over the pixels' range [paper]; here it is the public proxy set, so that r asks what
    the peer knows better than everybody [ours].

    Args:
        private: x.
        public: y.
        rows: at which r is wanted.
        width: σ.
        penalty: λ; m^(-1/2) in the authors' code.

    Source: Kanamori, Suzuki and Sugiyama, Machine Learning 2012; for Selective-FD, arXiv 2304.01731, appendix [paper].

    >>> one = torch.zeros(1, 1)
    >>> kulsif(one, one, torch.tensor([[0.0], [9.0]]), width=1.0, penalty=0.5).round(decimals=4)  # 2 − (2/3)·2
    tensor([0.6667, 0.0000], dtype=torch.float64)
    """
    private, public, rows = private.double(), public.double(), rows.double()
    n, m = len(private), len(public)
    matrix = _kernel(public, public, width) / m + penalty * torch.eye(m, dtype=torch.float64, device=public.device)
    right = -_kernel(public, private, width).sum(dim=1) / (n * m * penalty)
    alpha = torch.linalg.solve(matrix, right)
    return torch.cat(
        [
            _kernel(chunk, public, width) @ alpha + _kernel(chunk, private, width).mean(dim=1) / penalty
            for chunk in torch.split(rows, _CHUNK)
        ]
    )


def k_means(rows: Tensor, count: int, *, seed: int, steps: int = 100) -> Tensor:
    """Return the centres of so many clusters.  ``[n, d]`` -> ``[count, d]``, count <= n, by Lloyd's steps.

    The starts are rows, drawn as k-means++ draws them; a cluster that loses all its rows keeps its centre.

    Source: Lloyd, 1982; Arthur and Vassilvitskii, SODA 2007.

    >>> k_means(torch.tensor([[0.0], [1.0], [10.0], [11.0]]), 2, seed=0).sort(dim=0).values
    tensor([[ 0.5000],
            [10.5000]], dtype=torch.float64)
    """
    rows, draws = rows.double(), torch.Generator().manual_seed(seed)
    centres = rows[torch.randint(len(rows), (1,), generator=draws)]
    while len(centres) < count:
        far = nearest_distance(centres, rows).square().cpu()
        odds = far if bool(far.sum() > 0) else torch.ones_like(far)
        centres = torch.cat([centres, rows[torch.multinomial(odds, 1, generator=draws)]])
    for _ in range(steps):
        belongs = torch.cat([torch.cdist(chunk, centres).argmin(dim=1) for chunk in torch.split(rows, _CHUNK)])
        ones = torch.ones(len(rows), dtype=torch.float64, device=rows.device)
        sizes = torch.zeros(count, dtype=torch.float64, device=rows.device).index_add_(0, belongs, ones)
        sums = torch.zeros_like(centres).index_add_(0, belongs, rows)
        moved = torch.where(sizes[:, None] > 0, sums / sizes[:, None].clamp_min(1), centres)
        if torch.equal(moved, centres):
            break
        centres = moved
    return centres


def nearest_distance(centres: Tensor, rows: Tensor) -> Tensor:
    """Return how far each row is from the nearest centre.  ``[k, d]``, ``[q, d]`` -> ``[q]``.

    >>> nearest_distance(torch.tensor([[0.0], [5.0]]), torch.tensor([[4.0], [-2.0]]))
    tensor([1., 2.], dtype=torch.float64)
    """
    centres = centres.double()
    # Without matrix products: of nearby rows these leave nothing but rounding.
    mode = "donot_use_mm_for_euclid_dist"
    return torch.cat(
        [
            torch.cdist(chunk.double(), centres, compute_mode=mode).min(dim=1).values
            for chunk in torch.split(rows, _CHUNK)
        ]
    )


def at_least_quantile(known: Tensor, scores: Tensor, quantile: float) -> Tensor:
    """Tell which scores are at least a quantile of those of known samples.  ``[n]``, ``[q]`` -> bool ``[q]``.

    The quantile is interpolated linearly, as numpy's.

    Source: Selective-FD, arXiv 2304.01731; at 0.25 [code].

    >>> at_least_quantile(torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0]), torch.tensor([0.9, 1.0, 5.0]), 0.25)
    tensor([False,  True,  True])
    """
    ordered = known.double().sort().values
    place = quantile * (len(ordered) - 1)
    low, high = ordered[math.floor(place)], ordered[math.ceil(place)]
    return scores.double() >= low + (high - low) * (place - math.floor(place))


def roc_threshold(positives: Tensor, negatives: Tensor) -> float:
    """Return the score from which on positives stand out most.  ``[n]``, ``[m]`` -> argmax over t of tpr − fpr.

    A share tpr of the positives, and fpr of the negatives, scores t or more (Youden's index). Of several such t the
    greatest.

    Source: IDKD, arXiv 2304.04326 [code].

    >>> round(roc_threshold(torch.tensor([0.9, 0.8, 0.4]), torch.tensor([0.5, 0.3, 0.2])), 4)
    0.8
    """
    positives, negatives = positives.double().sort().values, negatives.double().sort().values
    everyone = torch.cat([positives, negatives])
    candidates = torch.unique(everyone).flip(0)
    tpr = 1 - torch.searchsorted(positives, candidates).double() / len(positives)
    fpr = 1 - torch.searchsorted(negatives, candidates).double() / len(negatives)
    return float(candidates[(tpr - fpr).argmax()])


def _kernel(left: Tensor, right: Tensor, width: float) -> Tensor:
    return torch.exp(-torch.cdist(left, right).square() / (2 * width**2))
