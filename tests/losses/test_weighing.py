"""How much each teacher counts: the ways to weigh them, and what weights by sample and class do to an objective."""

import math

import numpy as np
import pytest
import scipy.optimize
import scipy.special
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkd.losses import weighing
from fedkd.losses.teachers import objective
from fedkd.losses.weighing import WAYS, Evidence
from fedkd.settings.rules import WEIGHINGS

K, N, C, T = 4, 7, 5, 2.0
SHAPES = [(K,), (K, 1, 1), (K, C), (K, 1, C), (K, N), (K, N, 1), (K, N, C)]
ONE_BY_ONE = ["ce", "kl", "reverse_kl", "jeffreys", "js", "td", "sed", "bdkd"]


def random(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


TEACHERS, STUDENT = 3 * random(K, N, C, seed=1), random(N, C, seed=2)
P = scipy.special.softmax(TEACHERS.numpy() / T, axis=-1)
EVIDENCE = Evidence(TEACHERS, T, STUDENT, counts=random(K, C, seed=3).abs(), certainty=random(K, N, seed=4).abs())


def some(shape, seed=5):
    return random(*shape, seed=seed).abs()


def full(weights):
    """Spell weights out as ``[K, N, C]``, in numpy."""
    array = weights.numpy()
    if array.ndim == 1:
        array = array[:, None, None]
    elif array.ndim == 2:
        array = array[:, None, :] if array.shape[1] == C else array[:, :, None]
    return np.broadcast_to(array, (K, N, C))


def combined(weights, tau=1.0):
    """Return the combined teacher as the module's docstring has it, one sample and class at a time."""
    teacher = np.zeros((N, C))
    for x in range(N):
        for c in range(C):
            total = sum(weights[k, x, c] for k in range(K))
            teacher[x, c] = sum(weights[k, x, c] * P[k, x, c] for k in range(K)) / total if total else 0
        teacher[x] = (teacher[x] / teacher[x].sum()) ** (1 / tau)
        teacher[x] /= teacher[x].sum()
    return teacher


def loss_and_gradient(goal, **prepare):
    student = STUDENT.clone().requires_grad_()
    loss = goal(student, goal.prepare(TEACHERS, **prepare))
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    return loss.detach(), gradient


# --- what weights do --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tau", [1.0, 0.5, 3.0])
def test_the_combined_teacher_is_the_weighted_sum_of_its_definition(shape, tau):
    weights = some(shape)
    goal = objective("kl", temperature=T, teacher_temperature=tau)
    teacher = combined(full(weights), tau)

    found = torch.softmax(goal.combine(TEACHERS, weights=weights) / T, dim=-1)
    loss, _ = loss_and_gradient(goal, weights=weights)

    np.testing.assert_allclose(found, teacher, rtol=1e-9)
    q = scipy.special.log_softmax(STUDENT.numpy() / T, axis=-1)
    np.testing.assert_allclose(loss, (teacher * (np.log(teacher) - q)).sum(-1), rtol=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["ce", "kl"])
def test_linear_divergences_have_one_gradient_pairwise_and_averaged(shape, name):
    weights = some(shape)

    _, averaged = loss_and_gradient(objective(name, temperature=T), weights=weights)
    _, pairwise = loss_and_gradient(objective(name, temperature=T, combine="pairwise"), weights=weights)

    torch.testing.assert_close(averaged, pairwise, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ONE_BY_ONE)
@pytest.mark.parametrize("tau", [1.0, 0.5])
def test_pairwise_learns_from_each_teacher_as_far_as_it_counts(name, tau):
    weights = some((K, N, C))
    spread = full(weights) / full(weights).sum(axis=0)
    mass = (spread * P).sum(axis=-1)
    tilted = spread * P / mass[..., None]
    sharp = tilted ** (1 / tau)
    teachers = torch.from_numpy(np.log(sharp / sharp.sum(-1, keepdims=True))) * T
    plain = objective(name, temperature=T)
    each = torch.stack([plain(STUDENT, plain.prepare(teacher.unsqueeze(0))) for teacher in teachers])
    expected = (each * torch.from_numpy(mass / mass.sum(axis=0))).sum(dim=0)

    goal = objective(name, temperature=T, combine="pairwise", teacher_temperature=tau)
    loss, _ = loss_and_gradient(goal, weights=weights)

    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-12)


def test_msed_weighs_the_entropies_sample_by_sample():
    weights = some((K, N, 1))
    shares = full(weights)[..., 0] / full(weights)[..., 0].sum(axis=0)
    q = scipy.special.softmax(STUDENT.numpy() / T, axis=-1)
    members = np.concatenate([P, q[None]])
    share = np.concatenate([shares * K, np.ones((1, N))]) / (K + 1)
    mean = (share[..., None] * members).sum(axis=0)
    within = (share * scipy.stats.entropy(members, axis=-1)).sum(axis=0)
    expected = (np.exp(scipy.stats.entropy(mean, axis=-1) - within) - 1) / K

    loss, _ = loss_and_gradient(objective("msed", temperature=T), weights=weights)

    np.testing.assert_allclose(loss, expected, rtol=1e-8)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "settings",
    [{}, {"average": "logits"}, {"robust": "median"}, {"robust": "trimmed-mean"}, {"combine": "pairwise"}],
    ids=str,
)
@pytest.mark.parametrize("name", ["kl", "msed"])
def test_equal_weights_of_any_shape_are_no_weights(shape, settings, name):
    if name == "msed" and "robust" in settings:
        pytest.skip("msed has no one teacher")
    goal = objective(name, temperature=T, **settings)

    with_weights, without = loss_and_gradient(goal, weights=torch.full(shape, 0.3)), loss_and_gradient(goal)

    torch.testing.assert_close(with_weights, without, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "settings", [{}, {"average": "logits"}, {"robust": "median"}, {"robust": "trimmed-mean"}, {"combine": "pairwise"}]
)
def test_a_teacher_that_counts_twice_is_the_teacher_twice(shape, settings):
    weights = some(shape)
    goal = objective("js", temperature=T, **settings)
    double = weights.clone()
    double[1] *= 2

    twice, again = torch.cat([TEACHERS, TEACHERS[1:2]]), torch.cat([weights, weights[1:2]])
    found = goal(STUDENT, goal.prepare(TEACHERS, weights=double))

    torch.testing.assert_close(found, goal(STUDENT, goal.prepare(twice, weights=again)), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "settings", [{}, {"average": "logits"}, {"robust": "median"}, {"robust": "trimmed-mean"}, {"combine": "pairwise"}]
)
def test_a_factor_common_to_all_teachers_of_a_sample_and_class_changes_nothing(settings):
    weights, factor = some((K, N, C)), some((1, N, C), seed=9)
    goal = objective("kl", temperature=T, **settings)

    torch.testing.assert_close(
        loss_and_gradient(goal, weights=weights),
        loss_and_gradient(goal, weights=weights * factor),
        rtol=1e-9,
        atol=1e-9,
    )


@pytest.mark.parametrize("combine", ["averaged", "pairwise"])
@pytest.mark.parametrize("name", ["kl", "js", "msed"])
def test_a_sample_that_no_teacher_counts_for_teaches_nothing(combine, name):
    weights = some((K, N, 1))
    weights[:, 3] = 0
    goal = objective(name, temperature=T, combine=combine)

    loss, gradient = loss_and_gradient(goal, weights=weights)
    batch = goal.prepare(TEACHERS, weights=weights)[torch.tensor([3, 0])]

    assert loss[3] == 0 and bool((gradient[3] == 0).all())
    assert bool((loss[torch.arange(N) != 3] > 0).all()) and bool((gradient.abs().sum(-1) > 0).sum() == N - 1)
    torch.testing.assert_close(goal(STUDENT[[3, 0]], batch), loss[[3, 0]])
    alone = goal.prepare(TEACHERS, weights=weights)[torch.tensor([3])]
    assert goal(STUDENT[[3]], alone).item() == 0


@pytest.mark.parametrize("combine", ["averaged", "pairwise"])
def test_a_class_that_no_teacher_counts_for_has_no_probability(combine):
    weights = some((K, 1, C))
    weights[:, :, 2] = 0
    goal = objective("kl", temperature=T, combine=combine)

    loss, gradient = loss_and_gradient(goal, weights=weights)

    assert bool(loss.isfinite().all()) and bool(gradient.isfinite().all())
    assert bool((gradient[:, 2] > 0).all())  # it only loses
    assert bool((torch.softmax(goal.combine(TEACHERS, weights=weights), -1)[:, 2] == 0).all())


def test_a_class_of_a_teachers_own_needs_no_other_teacher():
    weights = torch.zeros(K, C, dtype=torch.float64)
    weights[torch.arange(C) % K, torch.arange(C)] = 1
    found = torch.softmax(objective("kl").combine(TEACHERS, weights=weights), -1).numpy()
    own = np.stack([scipy.special.softmax(TEACHERS.numpy(), -1)[c % K, :, c] for c in range(C)], axis=-1)

    np.testing.assert_allclose(found, own / own.sum(-1, keepdims=True), rtol=1e-9)


def test_a_robust_teacher_takes_each_classes_weights():
    weights = torch.ones(3, 1, C, dtype=torch.float64)
    weights[0, :, 1] = 9  # in class 1 the median is the first teacher
    found = torch.softmax(objective("kl", robust="median").combine(TEACHERS[:3], weights=weights), -1).numpy()
    probs = scipy.special.softmax(TEACHERS[:3].numpy(), -1)
    expected = np.median(probs, axis=0)
    expected[:, 1] = probs[0, :, 1]

    np.testing.assert_allclose(found, expected / expected.sum(-1, keepdims=True), rtol=1e-9)


def test_averaged_logits_do_not_feel_what_is_added_to_a_teachers_logits():
    weights, shifted = some((K, 1, C)), TEACHERS + random(K, N, 1, seed=11)
    goal = objective("kl", average="logits", temperature=T)

    one, other = (goal(STUDENT, goal.prepare(teachers, weights=weights)) for teachers in (TEACHERS, shifted))

    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), zeros=st.floats(0, 0.9), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_any_weights_give_finite_losses_that_stay_within_the_bound(seed, zeros, dtype):
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(K, N, C, generator=generator) ** 20
    weights[torch.rand(K, N, C, generator=generator) < zeros] = 0
    weights[0, 0, 0] = 1.0
    teachers = (30 * torch.randn(K, N, C, generator=generator)).to(dtype)
    for name, bound in (("kl", math.inf), ("js", math.log(2)), ("td", 1.0), ("sed", 1.0), ("msed", 1.0)):
        for combine in ("averaged", "pairwise"):
            goal = objective(name, combine=combine)
            student = STUDENT.to(dtype).clone().requires_grad_()
            loss = goal(student, goal.prepare(teachers, weights=weights))
            (gradient,) = torch.autograd.grad(loss.sum(), student)
            assert bool(gradient.isfinite().all()) and bool((loss >= 0).all()) and bool((loss <= bound + 1e-6).all())


@pytest.mark.parametrize(
    ("weights", "complaint"),
    [
        (torch.ones(K + 1), "shape"),
        (torch.ones(K, 3), "shape"),
        (torch.ones(K, N, 2), "shape"),
        (-torch.ones(K, N), "non-negative"),
        (torch.zeros(K, N, C), "not all 0"),
        (torch.full((K, C), math.nan), "finite"),
    ],
)
def test_wrong_weights_are_named(weights, complaint):
    with pytest.raises(ValueError, match=complaint):
        objective("kl").prepare(TEACHERS, weights=weights)


def test_where_samples_are_as_many_as_classes_the_shape_must_say_which():
    with pytest.raises(ValueError, match="as many samples as classes"):
        objective("kl").prepare(TEACHERS[:, :C], weights=torch.ones(K, C))


# --- the ways ---------------------------------------------------------------------------------------------------------


def test_the_settings_names_are_the_registrys():
    assert tuple(WAYS) == WEIGHINGS


@pytest.mark.parametrize("name", WEIGHINGS)
def test_every_way_gives_weights_that_do_not_know_the_teachers_order(name):
    order = torch.tensor([2, 0, 3, 1])
    shuffled = Evidence(TEACHERS[order], T, STUDENT, EVIDENCE.counts[order], EVIDENCE.certainty[order])

    found, again = WAYS[name].weigh(EVIDENCE), WAYS[name].weigh(shuffled)

    assert found.dim() == 3 and torch.broadcast_shapes(found.shape, TEACHERS.shape) == TEACHERS.shape
    assert bool(found.isfinite().all()) and bool((found >= 0).all()) and bool((found > 0).any())
    torch.testing.assert_close(again, found[order], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", [name for name in WEIGHINGS if name not in ("energy", "variance")])
def test_ways_by_probabilities_do_not_feel_what_is_added_to_logits(name):
    shifted = Evidence(
        TEACHERS + random(K, N, 1, seed=12), T, STUDENT + 3, counts=EVIDENCE.counts, certainty=EVIDENCE.certainty
    )

    torch.testing.assert_close(WAYS[name].weigh(EVIDENCE), WAYS[name].weigh(shifted), rtol=1e-6, atol=1e-9)


def test_each_way_is_its_formula():
    assert WAYS["uniform"].weigh(EVIDENCE).unique().tolist() == [1.0]
    for name, expected in {
        "predicted-prior": np.stack([[P[k, EVIDENCE.certainty[k] > 0].mean(axis=0)] for k in range(K)]),
        "discrimination": np.stack([[P[k, EVIDENCE.certainty[k] > 0].std(axis=0)] for k in range(K)]),
        "confidence": P.max(axis=-1, keepdims=True),
        "entropy": np.exp(-scipy.stats.entropy(P, axis=-1))[..., None],
        "energy": scipy.special.softmax(scipy.special.logsumexp(TEACHERS.numpy() / T, axis=-1), axis=0)[..., None],
        "variance": TEACHERS.numpy().var(axis=-1)[..., None],
        "counts": EVIDENCE.counts.numpy()[:, None],
        "density": EVIDENCE.certainty.numpy()[..., None],
    }.items():
        np.testing.assert_allclose(WAYS[name].weigh(EVIDENCE), expected, rtol=1e-6, err_msg=name)


def test_similarity_is_one_less_the_mean_jensen_shannon_divergence_in_bits():
    own = scipy.special.softmax(STUDENT.numpy() / T, axis=-1)
    middle = (P + own) / 2
    js = (
        scipy.stats.entropy(P, middle, base=2, axis=-1)
        + scipy.stats.entropy(own[None] + 0 * P, middle, base=2, axis=-1)
    ) / 2

    np.testing.assert_allclose(WAYS["similarity"].weigh(EVIDENCE).flatten(), 1 - js.mean(axis=1), rtol=1e-6)


@pytest.mark.parametrize("regularizer", [0.0, 0.05, 0.7])
def test_kt_pfl_finds_the_minimum_that_scipy_finds(regularizer):
    own = scipy.special.softmax(STUDENT.numpy() / T, axis=-1)

    def cost(row):
        mean = np.einsum("k,knc->nc", row, P)
        return scipy.stats.entropy(mean, own, axis=-1).mean() + regularizer * ((row - 1 / K) ** 2).sum()

    found = weighing.kt_pfl(TEACHERS, STUDENT, temperature=T, regularizer=regularizer, steps=2000).flatten().numpy()
    best = scipy.optimize.minimize(
        cost, np.full(K, 1 / K), bounds=[(0, 1)] * K, constraints={"type": "eq", "fun": lambda row: row.sum() - 1},
        options={"ftol": 1e-14, "maxiter": 1000},
    )  # fmt: skip

    assert found.sum() == pytest.approx(1)
    assert cost(found) == pytest.approx(best.fun, abs=1e-6)
    np.testing.assert_allclose(found, best.x, atol=5e-3)


def test_a_class_that_nobody_has_counts_for_all_alike():
    found = weighing.class_counts(torch.tensor([[4.0, 0.0], [1.0, 0.0]]))

    assert found.tolist() == [[[4.0, 1.0]], [[1.0, 1.0]]]


def test_a_predicted_prior_looks_at_what_was_sent_alone():
    certainty = torch.zeros(K, N, dtype=torch.float64)
    certainty[:, :3] = 0.5
    evidence = Evidence(TEACHERS, T, certainty=certainty)

    np.testing.assert_allclose(WAYS["predicted-prior"].weigh(evidence).squeeze(1), P[:, :3].mean(axis=1), rtol=1e-6)
    np.testing.assert_allclose(WAYS["discrimination"].weigh(evidence).squeeze(1), P[:, :3].std(axis=1), rtol=1e-6)


def test_a_teacher_that_says_one_thing_of_all_tells_nothing_apart():
    boaster = 40 * torch.nn.functional.one_hot(torch.full((1, N), 2), C).double()
    found = weighing.discrimination(torch.cat([TEACHERS, boaster]))

    assert bool((found[:-1] > 0).all()) and float(found[-1].max()) < 1e-9
    assert weighing.predicted_prior(boaster)[0, 0, 2] > 0.99


@pytest.mark.parametrize("counts", [torch.tensor([[1.0, -0.5]]), torch.tensor([1.0, 2.0])])
def test_wrong_counts_are_named(counts):
    with pytest.raises(ValueError, match="`counts`"):
        weighing.class_counts(counts)


@pytest.mark.parametrize(("name", "what"), [("counts", "class counts"), ("density", "certainty"), ("kt-pfl", "own")])
def test_what_was_not_told_cannot_be_weighed_by(name, what):
    with pytest.raises(ValueError, match=what):
        WAYS[name].weigh(Evidence(TEACHERS))
