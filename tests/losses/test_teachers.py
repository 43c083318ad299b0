"""K teachers in one objective: combination, weights, preparation."""

import math

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import trim_mean

from fedkd.losses import divergences
from fedkd.losses.balanced import balanced
from fedkd.losses.decoupled import cakd, dkd
from fedkd.losses.divergences import get, kl, msed, register
from fedkd.losses.teachers import objective

N, C, K = 12, 6, 4
INF = math.inf


def random_logits(*shape, seed, dtype=torch.float64):
    return (3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).to(dtype)


TEACHERS = random_logits(K, N, C, seed=1)
STUDENT = random_logits(N, C, seed=2)
LABELS = torch.arange(N) % C
WEIGHTS = torch.tensor([1.0, 0.5, 0.0, 2.5], dtype=torch.float64)
ALL = ["ce", "kl", "reverse_kl", "jeffreys", "js", "td", "sed", "msed", "cakd", "dkd", "bdkd"]


def loss_and_gradient(goal, student=STUDENT, teachers=TEACHERS, **prepare):
    student = student.clone().requires_grad_()
    loss = goal(student, goal.prepare(teachers, **prepare))
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    return loss.detach(), gradient


# One teacher: every way is the function itself.


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("combine", ["averaged", "pairwise"])
def test_one_teacher_is_the_function_itself(name, combine):
    labels = {"labels": LABELS} if name in ("cakd", "dkd") else {}
    teacher = TEACHERS[:1] if name == "msed" else TEACHERS[0]
    student = STUDENT.clone().requires_grad_()
    expected = get(name)(student, teacher, temperature=2.0, **labels)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), student)

    loss, gradient = loss_and_gradient(
        objective(name, combine=combine, temperature=2.0), teachers=TEACHERS[:1], labels=LABELS
    )

    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-12, atol=1e-14)


# Several.


@pytest.mark.parametrize("name", [name for name in ALL if name != "msed"])
@pytest.mark.parametrize(("reduction", "factor"), [("mean", 1 / K), ("sum", 1.0)])
def test_pairwise_adds_up_one_divergence_per_teacher(name, reduction, factor):
    labels = {"labels": LABELS} if name in ("cakd", "dkd") else {}
    each = [get(name)(STUDENT, teacher, temperature=2.0, **labels) for teacher in TEACHERS]
    goal = objective(name, combine="pairwise", reduction=reduction, temperature=2.0)
    loss, _ = loss_and_gradient(goal, labels=LABELS)
    torch.testing.assert_close(loss, factor * torch.stack(each).sum(0))


def test_averaged_distils_from_the_mean_prediction():
    q, p = reference.soften(STUDENT.numpy(), 2.0), reference.soften(TEACHERS.numpy(), 2.0)
    expected = [reference.js(q[i], p[:, i].mean(axis=0)) for i in range(N)]
    loss, _ = loss_and_gradient(objective("js", temperature=2.0))
    np.testing.assert_allclose(loss, expected, rtol=1e-10)


def test_averaged_logits_are_a_geometric_mean():
    p = reference.soften(TEACHERS.numpy(), 2.0)
    geometric = np.exp(np.log(p).mean(axis=0))
    geometric /= geometric.sum(axis=-1, keepdims=True)
    combined = objective("kl", average="logits", temperature=2.0).combine(TEACHERS)
    np.testing.assert_allclose((combined / 2.0).softmax(-1), geometric, rtol=1e-10)


@pytest.mark.parametrize("name", ["ce", "kl"])
@given(weights=st.lists(st.floats(0.01, 10), min_size=K, max_size=K), temperature=st.floats(0.3, 20))
@settings(deadline=None, max_examples=40)
def test_linear_divergences_have_one_gradient_pairwise_and_averaged(name, weights, temperature):
    weights = torch.tensor(weights)
    _, pairwise = loss_and_gradient(objective(name, combine="pairwise", temperature=temperature), weights=weights)
    _, averaged = loss_and_gradient(objective(name, temperature=temperature), weights=weights)
    torch.testing.assert_close(pairwise, averaged, rtol=1e-9, atol=1e-12)


def test_other_divergences_do_not():
    _, pairwise = loss_and_gradient(objective("js", combine="pairwise"))
    _, averaged = loss_and_gradient(objective("js"))
    assert (pairwise - averaged).abs().max() > 1e-3


@pytest.mark.parametrize("combine", ["averaged", "pairwise"])
def test_msed_compares_all_at_once_either_way(combine):
    loss, _ = loss_and_gradient(objective("msed", combine=combine, temperature=2.0))
    torch.testing.assert_close(loss, msed(STUDENT, TEACHERS, temperature=2.0))


def test_options_reach_their_divergence():
    teacher = TEACHERS[0]
    for goal, expected in [
        (
            objective("cakd", alpha=0.5, beta=2.0, strong="top-k", top_k=2, mode="scaled", temperature=3.0),
            cakd(STUDENT, teacher, LABELS, alpha=0.5, beta=2.0, strong="top-k", top_k=2, mode="scaled", temperature=3),
        ),
        (objective("dkd", alpha=2.0, beta=1.0), dkd(STUDENT, teacher, LABELS, alpha=2.0, beta=1.0, temperature=1.0)),
        (objective("bdkd", delta=5.0, rule="opposite"), balanced(STUDENT, teacher, delta=5.0, rule="opposite")),
    ]:
        torch.testing.assert_close(loss_and_gradient(goal, teachers=TEACHERS[:1], labels=LABELS)[0], expected)


# Weights.


@pytest.mark.parametrize("name", ["kl", "js", "msed", "cakd"])
@pytest.mark.parametrize("combine", ["averaged", "pairwise"])
def test_only_the_ratio_of_weights_counts(name, combine):
    goal = objective(name, combine=combine)
    loss, gradient = loss_and_gradient(goal, weights=WEIGHTS, labels=LABELS)
    scaled_loss, scaled_gradient = loss_and_gradient(goal, weights=7 * WEIGHTS.float(), labels=LABELS)
    torch.testing.assert_close(loss, scaled_loss)
    torch.testing.assert_close(gradient, scaled_gradient)


@pytest.mark.parametrize("name", ["kl", "js", "msed", "cakd"])
@pytest.mark.parametrize("settings", [{}, {"combine": "pairwise"}, {"combine": "pairwise", "reduction": "sum"}])
def test_equal_weights_are_no_weights(name, settings):
    goal = objective(name, **settings)
    loss, _ = loss_and_gradient(goal, labels=LABELS)
    weighted, _ = loss_and_gradient(goal, weights=torch.full((K,), 3.0), labels=LABELS)
    torch.testing.assert_close(loss, weighted)


@pytest.mark.parametrize("name", ["kl", "js", "msed", "cakd"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"average": "logits"},
        {"robust": "median"},
        {"robust": "trimmed-mean"},
        {"combine": "pairwise"},
        {"combine": "pairwise", "reduction": "sum"},
    ],
)
def test_teacher_of_weight_zero_is_not_heard(name, settings):
    if name == "msed":
        settings = {key: value for key, value in settings.items() if key != "robust"}
    goal = objective(name, **settings)
    unheard = TEACHERS.clone()
    unheard[2] = -INF  # even if it made no sense at all
    loss, gradient = loss_and_gradient(goal, teachers=unheard, weights=WEIGHTS, labels=LABELS)
    others, others_gradient = loss_and_gradient(
        goal, teachers=TEACHERS[[0, 1, 3]], weights=WEIGHTS[[0, 1, 3]], labels=LABELS
    )
    torch.testing.assert_close(loss, others)
    torch.testing.assert_close(gradient, others_gradient)


@pytest.mark.parametrize("name", ["kl", "js", "td"])
@pytest.mark.parametrize(
    "settings", [{}, {"average": "logits"}, {"robust": "median"}, {"robust": "trimmed-mean"}, {"combine": "pairwise"}]
)
def test_weight_two_is_the_teacher_twice(name, settings):
    goal = objective(name, **settings)
    loss, _ = loss_and_gradient(goal, weights=torch.tensor([1.0, 2.0, 1.0, 1.0]))
    twice, _ = loss_and_gradient(goal, teachers=TEACHERS[[0, 1, 1, 2, 3]])
    torch.testing.assert_close(loss, twice)


def test_sum_counts_the_teachers_that_are_heard():
    goal = objective("js", combine="pairwise", reduction="sum")
    loss, _ = loss_and_gradient(goal, weights=torch.tensor([2.0, 2.0, 0.0, 0.0]))
    torch.testing.assert_close(loss, get("js")(STUDENT, TEACHERS[0]) + get("js")(STUDENT, TEACHERS[1]))


def test_weights_of_msed_weigh_the_entropies():
    shares = (WEIGHTS / WEIGHTS.sum()).numpy()
    q, p = reference.soften(STUDENT.numpy(), 1.0), reference.soften(TEACHERS.numpy(), 1.0)
    n = 4  # three teachers of weight > 0, and the student
    expected = []
    for i in range(N):
        mean = q[i] / n + (n - 1) / n * shares @ p[:, i]
        logs = [np.log(reference.complexity(row)) for row in p[:, i]]
        geometric = np.exp(np.log(reference.complexity(q[i])) / n + (n - 1) / n * shares @ logs)
        expected.append((reference.complexity(mean) / geometric - 1) / (n - 1))
    loss, _ = loss_and_gradient(objective("msed"), weights=WEIGHTS)
    np.testing.assert_allclose(loss, expected, rtol=1e-10)


# Robust and sharpened.


@pytest.mark.parametrize("teachers", [3, 4, 5, 10, 26])  # halves of 26 shares fall short of one half by rounding
def test_robust_logits_are_those_of_numpy_and_scipy(teachers):
    logits = random_logits(teachers, N, C, seed=3)
    median = objective("kl", average="logits", robust="median").combine(logits)
    np.testing.assert_allclose(median, np.median(logits.numpy(), axis=0), rtol=1e-12)
    for cut in (0, 1):
        trim = cut / teachers
        trimmed = objective("kl", average="logits", robust="trimmed-mean", trim=trim).combine(logits)
        np.testing.assert_allclose(trimmed, trim_mean(logits.numpy(), trim + 1e-9, axis=0), rtol=1e-10)


def test_robust_probabilities_are_renormalised():
    p = reference.soften(TEACHERS.numpy(), 2.0)
    median = np.median(p, axis=0)
    combined = objective("kl", robust="median", temperature=2.0).combine(TEACHERS)
    np.testing.assert_allclose((combined / 2.0).softmax(-1), median / median.sum(-1, keepdims=True), rtol=1e-10)


@pytest.mark.parametrize("robust", ["median", "trimmed-mean"])
@pytest.mark.parametrize("average", ["probs", "logits"])
def test_one_liar_among_five_moves_a_robust_teacher_little(robust, average):
    honest = random_logits(1, N, C, seed=4) + random_logits(5, N, C, seed=5) / 30
    lying = honest.clone()
    lying[4] = 1e4 * torch.nn.functional.one_hot(honest[0].argmin(-1), C)

    def moved(**settings):
        goal = objective("kl", average=average, **settings)
        return (goal.combine(lying).softmax(-1) - goal.combine(honest).softmax(-1)).abs().max()

    assert moved(robust=robust) < 0.1 < moved()


def test_teachers_without_a_common_class_fall_back_to_their_mean():
    apart = torch.full((3, 1, 3), -INF)
    apart[range(3), 0, range(3)] = 0.0
    combined = objective("kl", robust="median").combine(apart)
    torch.testing.assert_close(combined.softmax(-1), torch.full((1, 3), 1 / 3))


@pytest.mark.parametrize("settings", [{}, {"average": "logits"}, {"robust": "median"}, {"robust": "trimmed-mean"}])
@pytest.mark.parametrize("name", ["kl", "js"])
def test_masked_classes_stay_finite(settings, name):
    teachers = TEACHERS.float().clone()
    teachers[:, :, 0] = -INF
    teachers[1, :, 3] = -INF
    loss, gradient = loss_and_gradient(objective(name, **settings), student=STUDENT.float(), teachers=teachers)
    assert loss.isfinite().all() and gradient.isfinite().all()


def test_trimmed_mean_does_without_a_teacher_that_masks_a_class_alone():
    teachers = TEACHERS.clone()
    teachers[1, :, 3] = -INF
    combined = objective("kl", average="logits", robust="trimmed-mean", trim=0.25).combine(teachers)
    expected = TEACHERS[[0, 2, 3], :, 3].sort(0).values[:2].mean(0)
    torch.testing.assert_close(combined[:, 3], expected)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("teachers", [1, K])
def test_sharpening_takes_the_softmax_of_the_probabilities(temperature, teachers):
    p = reference.soften(TEACHERS[:teachers].numpy(), temperature).mean(axis=0)
    q = reference.soften(STUDENT.numpy(), temperature)
    sharp = reference.soften(p, 0.1)
    goal = objective("kl", sharpen=0.1, temperature=temperature)
    loss, _ = loss_and_gradient(goal, teachers=TEACHERS[:teachers])
    np.testing.assert_allclose(loss, [reference.kl(q[i], sharp[i]) for i in range(N)], rtol=1e-10)


def test_combined_teacher_at_another_temperature():
    expected = TEACHERS.softmax(-1).mean(0)
    combined = objective("kl", temperature=4.0).combine(TEACHERS, temperature=1.0)
    torch.testing.assert_close(combined.softmax(-1), expected)


# Preparation.


@pytest.mark.parametrize("teachers", [TEACHERS, TEACHERS[:1]], ids=["many", "one"])
@pytest.mark.parametrize("combine", ["averaged", "pairwise"])
@pytest.mark.parametrize("name", ALL)
def test_prepared_teachers_serve_every_step_alike(name, combine, teachers):
    goal = objective(name, combine=combine, temperature=2.0)
    prepared = goal.prepare(teachers, labels=LABELS)
    before = [term.clone() for term in prepared.terms]
    first = goal(STUDENT, prepared)
    goal(STUDENT.flip(0), prepared)
    assert torch.equal(goal(STUDENT, prepared), first)
    assert all(torch.equal(term, kept) for term, kept in zip(prepared.terms, before, strict=True))


@pytest.mark.parametrize("teachers", [TEACHERS, TEACHERS[:1]], ids=["many", "one"])
@pytest.mark.parametrize("name", ALL)
def test_teachers_may_be_of_a_higher_precision_than_the_student(name, teachers):
    goal = objective(name, combine="pairwise", temperature=2.0)
    exact, exact_gradient = loss_and_gradient(goal, teachers=teachers, labels=LABELS)
    loss, gradient = loss_and_gradient(goal, STUDENT.float(), teachers, labels=LABELS)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient.double(), exact_gradient, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("combine", ["averaged", "pairwise"])
def test_prepared_batch_is_the_batch_prepared(name, combine):
    goal = objective(name, combine=combine, temperature=2.0)
    index = torch.tensor([7, 0, 3])
    batch = goal.prepare(TEACHERS, weights=WEIGHTS, labels=LABELS)[index]
    alone = goal.prepare(TEACHERS[:, index], weights=WEIGHTS, labels=LABELS[index])
    assert len(batch) == 3
    torch.testing.assert_close(goal(STUDENT[index], batch), goal(STUDENT[index], alone))


@pytest.mark.parametrize("combine", ["averaged", "pairwise"])
@pytest.mark.parametrize("name", ALL)
def test_gradient_is_that_of_the_value(name, combine):
    goal = objective(name, combine=combine, temperature=1.5)
    prepared = goal.prepare(TEACHERS, weights=WEIGHTS, labels=LABELS)[torch.tensor([0, 1, 2])]
    assert torch.autograd.gradcheck(lambda z: goal(z, prepared), STUDENT[:3].clone().requires_grad_())


@pytest.mark.parametrize("name", ["kl", "msed", "cakd"])
def test_training_can_start_from_predictions_made_in_inference_mode(name):
    with torch.inference_mode():
        teachers, labels = TEACHERS.float().clone(), LABELS.clone()
    _, gradient = loss_and_gradient(objective(name), student=STUDENT.float(), teachers=teachers, labels=labels)
    assert gradient.isfinite().all()


def test_half_precision_student_gets_a_single_precision_loss():
    goal = objective("js", combine="pairwise")
    student = STUDENT.bfloat16().requires_grad_()
    loss = goal(student, goal.prepare(TEACHERS.float()))
    loss.sum().backward()
    assert loss.dtype == torch.float32 and student.grad.dtype == torch.bfloat16


def test_gradient_norm_is_that_of_the_mean_loss():
    goal = objective("js", temperature=2.0)
    _, gradient = loss_and_gradient(goal)
    assert goal.gradient_norm(STUDENT, goal.prepare(TEACHERS)) == pytest.approx((gradient / N).norm().item())
    with torch.no_grad():
        assert goal.gradient_norm(STUDENT, goal.prepare(TEACHERS)) > 0


def test_gradient_norms_near_agreement_are_as_4_to_2_to_1():
    close = (STUDENT + 1e-4 * TEACHERS[0]).unsqueeze(0)
    norms = [objective(n).gradient_norm(STUDENT, objective(n).prepare(close)) for n in ("kl", "td", "js", "sed")]
    assert [norm / norms[2] for norm in norms] == pytest.approx([4, 2, 1, 1], rel=1e-2)


# A user's own divergence.


@pytest.fixture
def own(monkeypatch):
    monkeypatch.setattr(divergences, "_REGISTRY", dict(divergences._REGISTRY))

    @register("power", symmetric=True)
    def power(student_logits, teacher_logits, *, temperature=1.0, exponent=2.0):
        q, p = ((z / temperature).softmax(-1) for z in (student_logits, teacher_logits))
        return (p - q).abs().pow(exponent).sum(-1)

    @register("farthest", multiway=True)
    def farthest(student_logits, teachers_logits, *, temperature=1.0):
        return torch.stack([kl(student_logits, t, temperature=temperature) for t in teachers_logits]).amax(0)

    return power, farthest


def test_own_divergence_works_by_name(own):
    power, _ = own
    pairwise, gradient = loss_and_gradient(objective("power", combine="pairwise", exponent=3.0, temperature=2.0))
    each = [power(STUDENT, teacher, temperature=2.0, exponent=3.0) for teacher in TEACHERS]
    torch.testing.assert_close(pairwise, torch.stack(each).mean(0))
    assert gradient.abs().sum() > 0

    goal = objective("power", temperature=2.0)
    averaged, _ = loss_and_gradient(goal)
    torch.testing.assert_close(averaged, power(STUDENT, goal.combine(TEACHERS), temperature=2.0))


def test_own_divergence_trains_from_inference_mode_in_batches(own):
    register("product")(lambda student_logits, teacher_logits, *, temperature: (student_logits * teacher_logits).sum(1))
    goal = objective("product")
    with torch.inference_mode():
        teachers = TEACHERS[:1].clone()
    student = STUDENT.clone().requires_grad_()
    goal(student, goal.prepare(teachers)).sum().backward()
    torch.testing.assert_close(student.grad, TEACHERS[0])
    goal(student[:2], goal.prepare(teachers)[torch.tensor([0, 1])]).sum().backward()
    torch.testing.assert_close(student.grad[:2], 2 * TEACHERS[0, :2])


def test_own_multiway_divergence_gets_all_teachers(own):
    _, farthest = own
    loss, _ = loss_and_gradient(objective("farthest", temperature=2.0))
    torch.testing.assert_close(loss, farthest(STUDENT, TEACHERS, temperature=2.0))


# Wrong input.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"divergence": "hellinger"}, r"'kl'.*'hellinger'"),
        ({"combine": "holistic"}, r"`combine`.*'averaged', 'pairwise'.*'holistic'"),
        ({"average": "logit"}, r"`average`.*'probs', 'logits'.*'logit'"),
        ({"reduction": "max"}, r"`reduction`.*'mean', 'sum'.*'max'"),
        ({"robust": "mean"}, r"`robust`.*'median'.*'mean'"),
        ({"trim": 0.5}, r"`trim`.*\[0, 0.5\).*0\.5"),
        ({"trim": -0.1}, r"`trim`.*\[0, 0.5\).*-0\.1"),
        ({"sharpen": 0.0}, r"`sharpen`.*> 0.*0\.0"),
        ({"sharpen": INF}, r"`sharpen`.*finite.*inf"),
        ({"temperature": 0.0}, r"`temperature`.*> 0.*0\.0"),
        ({"combine": "pairwise", "robust": "median"}, r"`robust` and `sharpen`.*'median'.*combine='pairwise'"),
        ({"divergence": "msed", "sharpen": 0.1}, r"`robust` and `sharpen`.*0\.1.*'msed'"),
        ({"alpha": 1.0}, r"options of 'kl'.*'alpha'"),
        ({"student_logits": 1.0}, r"options of 'kl'.*'student_logits'"),
        ({"teacher_logits": 1.0}, r"options of 'kl'.*'teacher_logits'"),
        ({"divergence": "cakd", "labels": 1.0}, r"options of 'cakd'.*'labels'"),
        ({"divergence": "cakd", "gamma": 1.0}, r"options of 'cakd'.*'beta'.*'gamma'"),
        ({"divergence": "cakd", "beta": -1.0}, r"`beta`.*-1\.0"),
        ({"divergence": "bdkd", "rule": "flat"}, r"`rule`.*'flat'"),
    ],
)
def test_wrong_settings_are_named_before_anything_runs(arguments, message):
    with pytest.raises(ValueError, match=message):
        objective(**{"divergence": "kl", **arguments})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"teacher_logits": TEACHERS[0]}, r"`teacher_logits`.*\[K, N, C\].*\[12, 6\]"),
        ({"teacher_logits": TEACHERS.long()}, r"`teacher_logits`.*floating.*int64"),
        ({"teacher_logits": TEACHERS[:0]}, r"`teacher_logits`.*\[0, 12, 6\]"),
        ({"weights": torch.ones(3)}, r"`weights`.*\[4\].*\[3\]"),
        ({"weights": torch.zeros(4)}, r"`weights`.*not all 0.*0\.0, 0\.0"),
        ({"weights": torch.tensor([1.0, -1.0, 1.0, 1.0])}, r"`weights`.*non-negative.*-1\.0"),
        ({"weights": torch.tensor([1.0, INF, 1.0, 1.0])}, r"`weights`.*finite.*inf"),
        ({"labels": LABELS[:5]}, r"`labels`.*\[12\].*\[5\]"),
    ],
)
def test_wrong_teachers_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        objective("kl").prepare(**{"teacher_logits": TEACHERS, **arguments})


def test_student_of_another_shape_is_named():
    goal = objective("kl")
    with pytest.raises(ValueError, match=r"`student_logits`.*\[12, 6\].*\[3, 6\]"):
        goal(STUDENT[:3], goal.prepare(TEACHERS))


def test_unlabelled_samples_need_a_divergence_without_labels():
    with pytest.raises(ValueError, match=r"`labels`.*None.*top-k"):
        objective("dkd").prepare(TEACHERS)
    loss, _ = loss_and_gradient(objective("cakd", strong="top-k", top_k=2))
    assert loss.isfinite().all()
