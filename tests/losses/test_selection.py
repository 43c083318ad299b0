"""Which samples a peer knows: every formula against an independent route, and the laws it has to obey."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize
from sklearn.cluster import KMeans
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_curve

from fedkd.losses import selection


def rows(count, dimensions=3, seed=0, at=0.0):
    return at + torch.randn(count, dimensions, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def loss(theta, private, public, penalty):
    signed = np.vstack([private, -public])
    return np.logaddexp(0, -signed @ theta).mean() + penalty / 2 * theta @ theta


@pytest.mark.parametrize("penalty", [1.0, 0.01, 1e-4])
def test_the_regression_is_that_of_two_other_solvers(penalty):
    private, public = selection.bounded(rows(40, at=0.6), rows(70, seed=1))
    count = len(private) + len(public)

    found = selection.density_coefficients(private, public, penalty=penalty).numpy()

    x, y = np.vstack([private, public]), np.r_[np.ones(len(private)), np.zeros(len(public))]
    theirs = LogisticRegression(C=1 / (count * penalty), fit_intercept=False, tol=1e-12, max_iter=10_000).fit(x, y)
    np.testing.assert_allclose(found, theirs.coef_[0], rtol=1e-4, atol=1e-6)
    scipys = minimize(loss, np.zeros(3), (private.numpy(), public.numpy(), penalty), method="BFGS", tol=1e-12)
    np.testing.assert_allclose(found, scipys.x, rtol=1e-3, atol=1e-5)
    scores = selection.density_scores(torch.from_numpy(found), public)
    np.testing.assert_allclose(scores, theirs.predict_proba(public.numpy())[:, 1], rtol=1e-3)


@given(seed=st.integers(0, 500), penalty=st.floats(1e-3, 1.0))
def test_no_replaced_row_moves_the_coefficients_further_than_their_sensitivity(seed, penalty):
    private, public = selection.bounded(rows(6, seed=seed), rows(9, seed=seed + 1))
    other = private.clone()
    other[0] = torch.nn.functional.normalize(rows(1, seed=seed + 2))[0]

    before, after = (selection.density_coefficients(p, public, penalty=penalty) for p in (private, other))

    assert float((before - after).norm()) <= selection.density_sensitivity(15, penalty) * (1 + 1e-6)


@given(seed=st.integers(0, 500), scale=st.floats(0.01, 100))
def test_bounded_rows_are_no_longer_than_one_and_their_scale_knows_public_rows_alone(seed, scale):
    private, public = scale * rows(5, seed=seed), rows(4, seed=seed + 1)

    found, others = selection.bounded(private, public)

    assert float(found.norm(dim=1).max()) <= 1 + 1e-12 and float(others.norm(dim=1).max()) == pytest.approx(1)
    np.testing.assert_allclose(selection.bounded(private[:1], public)[1], others)
    cosine = torch.nn.functional.cosine_similarity(found, private)
    np.testing.assert_allclose(cosine, 1, atol=1e-9)


def test_the_density_ratio_is_that_of_a_brute_force_solution():
    """Not by the closed form: the coefficients of all kernels together, by the least of what KuLSIF minimises."""
    private, public, width, penalty = rows(7, at=0.5).numpy(), rows(9, seed=1).numpy(), 1.3, 0.2
    centres = np.vstack([public, private])

    def kernel(left, right):
        return np.array([[np.exp(-((a - b) @ (a - b)) / (2 * width**2)) for b in right] for a in left])

    on_public, on_private, gram = kernel(public, centres), kernel(private, centres), kernel(centres, centres)
    # ½ mean (on_public β)² − mean on_private β + λ/2 βᵀ gram β: where its gradient is 0.
    matrix = on_public.T @ on_public / len(public) + penalty * gram
    beta = np.linalg.lstsq(matrix, on_private.mean(axis=0), rcond=None)[0]
    at = rows(20, seed=2, at=0.2).numpy()

    found = selection.kulsif(*map(torch.from_numpy, (private, public, at)), width=width, penalty=penalty)

    np.testing.assert_allclose(found, kernel(at, centres) @ beta, atol=1e-8)


def test_the_density_ratio_is_high_where_private_samples_lie_and_near_the_true_one():
    """N(0.5, 1) against N(0, 1) has the ratio exp(x/2 − 1/8)."""
    private, public = rows(1500, 1, at=0.5), rows(1500, 1, seed=1)
    at = torch.linspace(-1.5, 1.5, 7, dtype=torch.float64)[:, None]

    found = selection.kulsif(private, public, at, width=1.0, penalty=0.005)

    assert (found.diff() > 0).all()
    np.testing.assert_allclose(found, torch.exp(at[:, 0] / 2 - 1 / 8), atol=0.25)


@pytest.mark.parametrize("seed", range(5))
def test_k_means_ends_where_another_implementation_stays(seed):
    groups = torch.cat([rows(30, 2, seed=i, at=8.0 * i) for i in range(3)])

    centres = selection.k_means(groups, 3, seed=seed)

    theirs = KMeans(3, init=centres.numpy(), n_init=1).fit(groups.numpy())
    np.testing.assert_allclose(centres, theirs.cluster_centers_, atol=1e-6)
    np.testing.assert_allclose(
        selection.nearest_distance(centres, groups), theirs.transform(groups.numpy()).min(axis=1), atol=1e-6
    )
    assert torch.equal(centres, selection.k_means(groups, 3, seed=seed))


def test_k_means_of_rows_that_are_all_alike_is_that_row():
    assert selection.k_means(torch.ones(5, 2), 3, seed=0).unique().tolist() == [1.0]


@given(
    positives=st.lists(st.integers(0, 20), min_size=1, max_size=30),
    negatives=st.lists(st.integers(0, 20), min_size=1, max_size=30),
)
def test_the_threshold_is_one_of_the_best_of_another_roc_curve(positives, negatives):
    found = selection.roc_threshold(torch.tensor(positives), torch.tensor(negatives))

    labels = np.r_[np.ones(len(positives)), np.zeros(len(negatives))]
    scores = np.r_[positives, negatives]
    fpr, tpr, thresholds = roc_curve(labels, scores, drop_intermediate=False)
    mine = (scores[labels == 1] >= found).mean() - (scores[labels == 0] >= found).mean()
    # The curve also has "none at all", at infinity: of worth 0, and no score of a sample.
    assert mine == pytest.approx((tpr - fpr)[np.isfinite(thresholds)].max())


@given(known=st.lists(st.floats(-5, 5), min_size=1, max_size=40), quantile=st.floats(0, 1))
def test_the_quantile_is_numpys(known, quantile):
    scores = np.linspace(-6, 6, 50)
    found = selection.at_least_quantile(torch.tensor(known), torch.from_numpy(scores), quantile)
    edge = np.quantile(np.float32(known).astype(np.float64), quantile)
    clear = np.abs(scores - edge) > 1e-9
    np.testing.assert_array_equal(found.numpy()[clear], (scores >= edge)[clear])


def test_the_median_distance_is_scipys():
    from scipy.spatial.distance import pdist

    assert selection.median_distance(rows(31)) == pytest.approx(np.median(pdist(rows(31).numpy())))
    assert selection.median_distance(torch.zeros(4, 2)) == selection.median_distance(torch.zeros(1, 2)) == 1.0
