"""Decoupled KL: the exact identity, CAKD and DKD, and the feature-level form."""

import math

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkd.losses.decoupled import cakd, cakd_features, decouple, dkd, warm_up
from fedkd.losses.divergences import kl

STUDENT = torch.tensor([[1.0, 1.5, 0.0, -0.5]], dtype=torch.float64)
TEACHER = torch.tensor([[3.0, 2.0, 1.0, 0.0]], dtype=torch.float64)
INF = math.inf

law = settings(deadline=None, max_examples=80)


def random_logits(*shape, seed=0, scale=3.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)


def mask(classes, *strong):
    return torch.tensor([[c in strong for c in range(classes)]])


@st.composite
def problems(draw):
    """Student, teacher, a strong set that is neither empty nor everything, and a temperature."""
    classes = draw(st.integers(2, 6))
    row = st.lists(st.floats(-20, 20), min_size=classes, max_size=classes)
    student, teacher = (torch.tensor([draw(row)], dtype=torch.float64) for _ in range(2))
    strong = draw(st.sets(st.integers(0, classes - 1), min_size=1, max_size=classes - 1))
    return student, teacher, mask(classes, *strong), draw(st.floats(0.3, 20))


# The known answers: T, S, p_S, BCD, SCD, WCD, KL.
@pytest.mark.parametrize(
    ("temperature", "strong", "known"),
    [
        (1.0, (0,), (0.643914, 0.237226, 0.0, 0.021114, 0.244744)),
        (1.0, (0, 1), (0.880797, 0.014884, 0.257403, 0.026345, 0.244744)),
        (4.0, (0,), (0.349932, 0.012361, 0.0, 0.001692, 0.013461)),
        (4.0, (0, 1), (0.622459, 0.001854, 0.017476, 0.001932, 0.013461)),
    ],
)
def test_known_answers(temperature, strong, known):
    bcd, scd, wcd, mass = decouple(STUDENT, TEACHER, mask(4, *strong), temperature=temperature)
    whole = bcd + mass * scd + (1 - mass) * wcd
    found = [part.item() for part in (mass, bcd, scd, wcd, whole)]
    assert found == pytest.approx(known, abs=5.1e-7)


@pytest.mark.parametrize("temperature", [0.5, 4.0])
def test_parts_are_those_of_the_definition(temperature):
    student, teacher = random_logits(16, 10, seed=1), random_logits(16, 10, seed=2)
    strong = torch.rand(16, 10, generator=torch.Generator().manual_seed(3)) < 0.4
    strong[:, 0] = True
    strong[:, 1] = False
    q, p = reference.soften(student.numpy(), temperature), reference.soften(teacher.numpy(), temperature)
    expected = np.array([reference.decouple(q[i], p[i], strong[i].numpy()) for i in range(16)])

    exact = decouple(student, teacher, strong, temperature=temperature)
    single = decouple(student.float(), teacher.float(), strong, temperature=temperature)

    np.testing.assert_allclose(torch.stack(exact, 1), expected, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(torch.stack(single, 1), expected, rtol=1e-5, atol=1e-5)


@given(problem=problems())
@law
def test_parts_add_up_to_kl(problem):
    student, teacher, strong, temperature = problem
    bcd, scd, wcd, mass = decouple(student, teacher, strong, temperature=temperature)
    torch.testing.assert_close(
        bcd + mass * scd + (1 - mass) * wcd, kl(student, teacher, temperature=temperature), rtol=1e-9, atol=1e-12
    )
    assert min(bcd.item(), scd.item(), wcd.item()) >= 0 and 0 <= mass.item() <= 1 + 1e-12


@given(problem=problems())
@law
def test_gradients_of_the_parts_add_up_to_that_of_kl(problem):
    student, teacher, strong, temperature = problem
    student.requires_grad_()
    bcd, scd, wcd, mass = decouple(student, teacher, strong, temperature=temperature)
    (of_parts,) = torch.autograd.grad(bcd + mass * scd + (1 - mass) * wcd, student)
    (of_kl,) = torch.autograd.grad(kl(student, teacher, temperature=temperature), student)
    torch.testing.assert_close(of_parts, of_kl, rtol=1e-8, atol=1e-11)


@given(problem=problems(), label=st.integers(0, 5))
@law
def test_scaled_at_equal_weights_is_kl_whatever_the_strong_set(problem, label):
    student, teacher, _, temperature = problem
    classes = student.shape[1]
    labels = torch.tensor([label % classes])
    expected = kl(student, teacher, temperature=temperature)
    for options in ({"strong": "label"}, {"strong": "top-k", "top_k": 2}, {"strong": "top-k", "top_k": classes}):
        found = cakd(student, teacher, labels, beta=1.0, mode="scaled", temperature=temperature, **options)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@given(problem=problems(), label=st.integers(0, 5), beta=st.floats(0, 10))
@law
def test_cakd_of_the_label_alone_is_dkd(problem, label, beta):
    student, teacher, _, temperature = problem
    labels = torch.tensor([label % student.shape[1]])
    torch.testing.assert_close(
        cakd(student, teacher, labels, alpha=3.0, beta=beta, temperature=temperature),
        dkd(student, teacher, labels, beta=beta, temperature=temperature),
    )


def test_dkd_is_that_of_its_authors():
    # TCKD and NCKD as in the paper: binary KL of the label, and KL over the rest renormalised.
    student, teacher = random_logits(8, 10, seed=1), random_logits(8, 10, seed=2)
    labels = torch.arange(8)
    q, p = reference.soften(student.numpy(), 4.0), reference.soften(teacher.numpy(), 4.0)
    rest = ~np.eye(8, 10, dtype=bool)
    expected = []
    for i in range(8):
        target = reference.kl(np.array([q[i, i], 1 - q[i, i]]), np.array([p[i, i], 1 - p[i, i]]))
        others_q, others_p = q[i][rest[i]] / q[i][rest[i]].sum(), p[i][rest[i]] / p[i][rest[i]].sum()
        expected.append(2 * target + 8 * reference.kl(others_q, others_p))
    np.testing.assert_allclose(dkd(student, teacher, labels, alpha=2.0), expected, rtol=1e-10)


def test_top_k_takes_the_teachers_first_classes_and_the_label():
    labels = torch.tensor([3])
    bcd, scd, wcd, _ = decouple(STUDENT, TEACHER, mask(4, 0, 1, 3), temperature=4.0)
    found = cakd(STUDENT, TEACHER, labels, alpha=2.0, beta=3.0, strong="top-k", top_k=2)
    torch.testing.assert_close(found, bcd + 2 * scd + 3 * wcd)
    without_label = cakd(STUDENT, TEACHER, alpha=2.0, beta=3.0, strong="top-k", top_k=2)
    bcd, scd, wcd, _ = decouple(STUDENT, TEACHER, mask(4, 0, 1), temperature=4.0)
    torch.testing.assert_close(without_label, bcd + 2 * scd + 3 * wcd)


@pytest.mark.parametrize("mode", ["free", "scaled"])
@pytest.mark.parametrize("strong", ["label", "top-k"])
def test_gradient_is_that_of_the_value(mode, strong):
    student, teacher = random_logits(3, 6, seed=1).requires_grad_(), random_logits(3, 6, seed=2)
    labels = torch.tensor([0, 5, 2])
    options = {"alpha": 0.7, "mode": mode, "strong": strong, "top_k": 3, "temperature": 2.0}
    assert torch.autograd.gradcheck(lambda z: cakd(z, teacher, labels, **options), student)
    assert torch.autograd.gradcheck(lambda z: dkd(z, teacher, labels, alpha=0.5), student)


def test_gradient_of_each_part():
    student, teacher = random_logits(3, 6, seed=1).requires_grad_(), random_logits(3, 6, seed=2)
    strong = torch.tensor([[True, False, True, False, False, False]] * 3)
    assert torch.autograd.gradcheck(lambda z: decouple(z, teacher, strong)[:3], student)


def test_teacher_gets_no_gradient():
    student, teacher = random_logits(2, 4, seed=1).requires_grad_(), random_logits(2, 4, seed=2).requires_grad_()
    cakd(student, teacher, torch.tensor([0, 1])).sum().backward()
    assert student.grad.abs().sum() > 0 and teacher.grad is None


@pytest.mark.parametrize("temperature", [0.05, 4.0, 100.0])
@pytest.mark.parametrize("classes", [2, 1000])
def test_equal_predictions_have_no_distance_and_no_gradient(classes, temperature):
    student = random_logits(2, classes, seed=1, scale=10.0, dtype=torch.float32).requires_grad_()
    value = cakd(student, student.detach().clone(), torch.tensor([0, 1]), temperature=temperature)
    value.sum().backward()
    assert value.tolist() == [0.0, 0.0] and student.grad.abs().max().item() == 0.0


@pytest.mark.parametrize("temperature", [0.05, 1.0, 100.0])
@pytest.mark.parametrize("mode", ["free", "scaled"])
@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        ([1e4, -1e4, 0.0], [-1e4, 1e4, 0.0]),
        ([-1e4, 1e4, 1e4], [1e4, -1e4, -1e4]),
        ([0.0, 1.0, 2.0], [-INF, 1.0, 0.0]),
        ([0.0, 1.0, -INF], [2.0, 1.0, 0.0]),
        ([-INF, 1.0, 0.0], [2.0, 1.0, 0.0]),
        ([-INF, 1.0, 0.0], [-INF, 0.0, 3.0]),
        ([0.0, -INF, -INF], [0.0, -INF, -INF]),
        ([0.0, 1.0, 2.0], [0.0, -INF, -INF]),
    ],
)
def test_extremes_stay_finite(student, teacher, mode, temperature):
    student = torch.tensor([student], requires_grad=True)
    for strong in (mask(3, 0), mask(3, 0, 1), mask(3, 0, 1, 2)):
        parts = decouple(student, torch.tensor([teacher]), strong, temperature=temperature)
        assert torch.stack(parts).isfinite().all()
    value = cakd(student, torch.tensor([teacher]), torch.tensor([0]), mode=mode, temperature=temperature)
    value.sum().backward()
    assert value.isfinite().all() and value.item() >= 0
    assert student.grad.isfinite().all()


def test_everything_strong_leaves_kl_to_the_strong_part():
    student, teacher = random_logits(4, 5, seed=1), random_logits(4, 5, seed=2)
    bcd, scd, wcd, mass = decouple(student, teacher, torch.ones(4, 5, dtype=torch.bool))
    torch.testing.assert_close(scd, kl(student, teacher))
    torch.testing.assert_close(mass, torch.ones(4, dtype=torch.float64))
    assert bcd.abs().max() < 1e-12 and wcd.tolist() == [0.0] * 4


def test_group_of_which_the_teacher_rules_out_all_says_nothing():
    student = torch.tensor([[0.0, 1.0, 2.0, 0.5]], requires_grad=True)
    _, scd, _, mass = decouple(student, torch.tensor([[-INF, -INF, 0.0, 1.0]]), mask(4, 0, 1))
    scd.sum().backward()
    assert mass.item() == scd.item() == 0.0
    assert student.grad.tolist() == [[0.0] * 4]


def test_conditionals_of_a_group_with_next_to_no_mass_are_exact():
    # p_S is e^-500 here, 0 in any float: only log-sum-exp within the group keeps SCD.
    teacher = torch.tensor([[-500.0, -501.0, 0.0]])
    student = torch.tensor([[-501.0, -500.0, 0.0]])
    expected = kl(student[:, :2], teacher[:, :2])
    torch.testing.assert_close(decouple(student, teacher, mask(3, 0, 1)).scd, expected)


def test_half_precision_is_computed_in_single():
    student, teacher = (random_logits(4, 6, seed=s, dtype=torch.bfloat16) for s in (1, 2))
    value = cakd(student, teacher, torch.tensor([0, 1, 2, 3]))
    assert value.dtype == torch.float32
    torch.testing.assert_close(
        value.double(), cakd(student.double(), teacher.double(), torch.tensor([0, 1, 2, 3])), rtol=1e-5, atol=1e-5
    )


# Features.


def test_feature_level_takes_the_features_that_speak_loudest():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(3, 10, generator=generator, dtype=torch.float64) for _ in range(2))
    head, predicted = torch.randn(4, 10, generator=generator, dtype=torch.float64), torch.tensor([1, 0, 3])
    strong = torch.zeros(3, 10, dtype=torch.bool)
    for i, answer in enumerate(predicted):
        loudness = [abs(float(head[answer, j] * teacher[i, j])) for j in range(10)]
        for j in sorted(range(10), key=loudness.__getitem__)[-3:]:
            strong[i, j] = True
    bcd, scd, wcd, _ = decouple(student, teacher, strong, temperature=2.0)

    found = cakd_features(student, teacher, head, predicted, share=0.25, alpha=0.5, beta=2.0, temperature=2.0)

    torch.testing.assert_close(found, bcd + 0.5 * scd + 2 * wcd)


def test_feature_maps_are_flattened():
    student, teacher = torch.randn(2, 3, 2, 2), torch.randn(2, 3, 2, 2)
    head, predicted = torch.randn(5, 12), torch.tensor([0, 4])
    torch.testing.assert_close(
        cakd_features(student, teacher, head, predicted),
        cakd_features(student.flatten(1), teacher.flatten(1), head, predicted),
    )


def test_feature_level_gradient_reaches_the_student_alone():
    student = torch.randn(2, 8, requires_grad=True)
    teacher, head = torch.randn(2, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True)
    cakd_features(student, teacher, head, torch.tensor([0, 4])).sum().backward()
    assert student.grad.abs().sum() > 0 and teacher.grad is None and head.grad is None


def test_warm_up_rises_linearly_to_one():
    assert [warm_up(epoch, 4) for epoch in (1, 2, 4, 9)] == [0.25, 0.5, 1.0, 1.0]
    assert warm_up(1, 0) == 1.0


# Wrong input.


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: decouple(STUDENT, TEACHER, mask(4)), r"`strong`.*at least one class.*\[0\]"),
        (lambda: decouple(STUDENT, TEACHER, mask(3, 0)), r"`strong`.*\[1, 4\].*\[1, 3\]"),
        (lambda: decouple(STUDENT, TEACHER, mask(4, 0).int()), r"`strong`.*bool.*int32"),
        (lambda: decouple(STUDENT, TEACHER, mask(4, 0), temperature=0.0), r"`temperature`.*0\.0"),
        (lambda: decouple(STUDENT, TEACHER[:, :3], mask(4, 0)), r"\[1, 4\] and \[1, 3\]"),
        (lambda: cakd(STUDENT, TEACHER), r"`labels`.*None.*top-k"),
        (lambda: cakd(STUDENT, TEACHER, torch.tensor([4])), r"`labels`.*0 to 3.*\[4\]"),
        (lambda: cakd(STUDENT, TEACHER, torch.tensor([0, 1])), r"`labels`.*\[1\].*\[2\]"),
        (lambda: cakd(STUDENT, TEACHER, torch.tensor([0.0])), r"`labels`.*class indices.*float32"),
        (lambda: cakd(STUDENT, TEACHER, torch.tensor([0]), strong="weak"), r"`strong`.*'top-k'.*'weak'"),
        (lambda: cakd(STUDENT, TEACHER, strong="top-k", top_k=5), r"`top_k`.*1 to 4.*5"),
        (lambda: cakd(STUDENT, TEACHER, strong="top-k", top_k=0), r"`top_k`.*1 to 4.*0"),
        (lambda: cakd(STUDENT, TEACHER, torch.tensor([0]), mode="tied"), r"`mode`.*'scaled'.*'tied'"),
        (lambda: cakd(STUDENT, TEACHER, torch.tensor([0]), beta=-1.0), r"`beta`.*>= 0.*-1\.0"),
        (lambda: dkd(STUDENT, TEACHER, torch.tensor([0]), alpha=math.nan), r"`alpha`.*>= 0.*nan"),
        (lambda: cakd_features(STUDENT, TEACHER, torch.zeros(3, 5), torch.tensor([0])), r"\[C, D\].*\[3, 5\]"),
        (
            lambda: cakd_features(STUDENT, TEACHER, torch.zeros(3, 4), torch.tensor([0]), share=0.0),
            r"`share`.*\(0, 1\].*0\.0",
        ),
    ],
)
def test_wrong_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@given(problem=problems(), shifts=st.tuples(st.floats(-50, 50), st.floats(-50, 50)), seed=st.integers(0, 99))
@law
def test_neither_a_shift_of_the_logits_nor_the_order_of_classes_matters(problem, shifts, seed):
    student, teacher, strong, temperature = problem
    parts = decouple(student, teacher, strong, temperature=temperature)
    order = torch.randperm(student.shape[1], generator=torch.Generator().manual_seed(seed))

    shifted = decouple(student + shifts[0], teacher + shifts[1], strong, temperature=temperature)
    reordered = decouple(student[:, order], teacher[:, order], strong[:, order], temperature=temperature)

    for found in (shifted, reordered):
        for part, expected in zip(found, parts, strict=True):
            torch.testing.assert_close(part, expected, rtol=1e-7, atol=1e-10)
