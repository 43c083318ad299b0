"""The divergences: values, gradients, extremes and laws."""

import math

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedkd.losses.divergences import get, jeffreys, js, kl, msed, reverse_kl, sed, td

PAIRWISE = ["ce", "kl", "reverse_kl", "jeffreys", "js", "td", "sed"]
BOUNDED = ["js", "td", "sed"]
DISTANCES = ["kl", "reverse_kl", "jeffreys", *BOUNDED]  # zero at equality, as `ce` is not
SYMMETRIC = ["jeffreys", *BOUNDED]

INF = math.inf
STUDENT = torch.tensor([[1.0, 1.5, 0.0, -0.5]], dtype=torch.float64)
TEACHER = torch.tensor([[3.0, 2.0, 1.0, 0.0]], dtype=torch.float64)


def as_multiway(name):
    """`name` as a function of one teacher, so that `msed` can join the tests of pairs."""
    if name == "msed":
        return lambda student, teacher, **options: msed(student, teacher.unsqueeze(0), **options)
    return get(name).function


def random_logits(*shape, seed=0, scale=3.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)


def value_and_gradient(name, student, teacher, **options):
    student = student.clone().requires_grad_()
    value = as_multiway(name)(student, teacher, **options)
    (gradient,) = torch.autograd.grad(value.sum(), student)
    return value.detach(), gradient


logit = st.floats(-30, 30, allow_nan=False, width=64)


@st.composite
def logits(draw, members=2):
    """`members` rows of logits over the same 2 to 6 classes."""
    classes = draw(st.integers(2, 6))
    return [torch.from_numpy(draw(arrays(np.float64, (1, classes), elements=logit))) for _ in range(members)]


temperatures = st.floats(0.05, 100)
law = settings(deadline=None, max_examples=60)


# Values.


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("shape", [(1, 2), (7, 10), (3, 1000)])
@pytest.mark.parametrize("name", PAIRWISE)
def test_value_is_that_of_the_definition(name, shape, temperature):
    student, teacher = random_logits(*shape, seed=1), random_logits(*shape, seed=2)
    q, p = (reference.soften(z.numpy(), temperature) for z in (student, teacher))
    expected = [getattr(reference, name)(a, b) for a, b in zip(q, p, strict=True)]

    exact = get(name)(student, teacher, temperature=temperature)
    single = get(name)(student.float(), teacher.float(), temperature=temperature)

    np.testing.assert_allclose(exact, expected, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(single, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("teachers", [1, 2, 5])
def test_msed_is_that_of_the_definition(teachers):
    student, many = random_logits(6, 10, seed=1), random_logits(teachers, 6, 10, seed=2)
    q, p = reference.soften(student.numpy(), 2.0), reference.soften(many.numpy(), 2.0)
    expected = [reference.msed(q[i], p[:, i]) for i in range(6)]

    np.testing.assert_allclose(msed(student, many, temperature=2.0), expected, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(msed(student.float(), many.float(), temperature=2.0), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "known"),
    [("kl", 0.244744), ("reverse_kl", 0.244922), ("js", 0.0598309), ("td", 0.1170537), ("sed", 0.0616570)],
)
def test_known_answer(name, known):
    digits = len(str(known)) - 2
    assert get(name)(STUDENT, TEACHER).item() == pytest.approx(known, abs=0.51 * 10**-digits)


def test_known_answer_of_kl_at_temperature_4():
    assert kl(STUDENT, TEACHER, temperature=4.0).item() == pytest.approx(0.013461, abs=5.1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [*PAIRWISE, "msed"])
def test_half_precision_is_computed_in_single(name, dtype):
    student, teacher = random_logits(5, 10, seed=1, dtype=dtype), random_logits(5, 10, seed=2, dtype=dtype)

    value, gradient = value_and_gradient(name, student, teacher, temperature=2.0)
    exact, _ = value_and_gradient(name, student.double(), teacher.double(), temperature=2.0)

    assert value.dtype == torch.float32
    assert gradient.dtype == dtype and gradient.isfinite().all()
    torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=1e-6)


def test_teacher_of_another_precision_is_taken_as_it_is():
    student, teacher = random_logits(5, 10, seed=1, dtype=torch.float32), random_logits(5, 10, seed=2)
    value, gradient = value_and_gradient("js", student, teacher)
    assert value.dtype == gradient.dtype == torch.float32
    torch.testing.assert_close(value, js(student, teacher.float()))


# Gradients.


@pytest.mark.parametrize("temperature", [0.7, 1.0, 4.0])
@pytest.mark.parametrize("name", [*PAIRWISE, "msed"])
def test_gradient_is_that_of_the_value(name, temperature):
    student, teacher = random_logits(3, 5, seed=1).requires_grad_(), random_logits(3, 5, seed=2)
    divergence = as_multiway(name)
    assert torch.autograd.gradcheck(lambda z: divergence(z, teacher, temperature=temperature), student)


def test_gradient_of_msed_with_many_teachers():
    student, teachers = random_logits(3, 5, seed=1).requires_grad_(), random_logits(4, 3, 5, seed=2)
    assert torch.autograd.gradcheck(lambda z: msed(z, teachers, temperature=2.0), student)


@pytest.mark.parametrize("name", [*PAIRWISE, "msed"])
def test_gradient_is_that_of_the_value_where_classes_are_masked(name):
    teacher = random_logits(3, 5, seed=2)
    teacher[0, 1] = teacher[2, 4] = -INF
    student = random_logits(3, 5, seed=1)
    if name in ("reverse_kl", "jeffreys"):  # infinite unless the student's mask covers the teacher's
        student[teacher == -INF] = -INF
    seen = student > -INF
    free = student[seen].requires_grad_()
    divergence = as_multiway(name)
    masked = torch.full_like(student, -INF)
    assert torch.autograd.gradcheck(lambda z: divergence(masked.masked_scatter(seen, z), teacher), free)


@pytest.mark.parametrize("name", [*PAIRWISE, "msed"])
def test_teacher_gets_no_gradient(name):
    student, teacher = random_logits(3, 5, seed=1).requires_grad_(), random_logits(3, 5, seed=2).requires_grad_()
    as_multiway(name)(student, teacher).sum().backward()
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None


def test_gradient_scales_with_what_follows():
    student, teacher = random_logits(3, 5, seed=1), random_logits(3, 5, seed=2)
    _, gradient = value_and_gradient("js", student, teacher)
    student.requires_grad_()
    factors = torch.tensor([0.0, 2.0, -1.0], dtype=torch.float64)
    (scaled,) = torch.autograd.grad((js(student, teacher) * factors).sum(), student)
    torch.testing.assert_close(scaled, gradient * factors.unsqueeze(1))


def test_second_derivative_is_refused_not_wrong():
    student = STUDENT.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(kl(student, TEACHER).square().sum(), student, create_graph=True)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("name", [*PAIRWISE, "msed"])
def test_logits_are_left_as_they_are(name, temperature):
    pair = random_logits(3, 5, seed=1), random_logits(3, 5, seed=2)
    before = [z.clone() for z in pair]
    value_and_gradient(name, *pair, temperature=temperature)
    as_multiway(name)(*pair, temperature=temperature)
    assert all(torch.equal(z, kept) for z, kept in zip(pair, before, strict=True))


def test_teacher_may_come_from_inference_mode():
    with torch.inference_mode():
        teacher = TEACHER.clone()
    student = STUDENT.clone().requires_grad_()
    jeffreys(student, teacher).sum().backward()
    assert student.grad.isfinite().all()


# Extremes.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [0.05, 1.0, 100.0])
@pytest.mark.parametrize("name", [*PAIRWISE, "msed"])
def test_huge_logits_stay_finite(name, temperature, dtype):
    student = torch.tensor([[1e4, -1e4, 0.0], [1e4, 1e4, -1e4], [0.0, 0.0, 0.0]], dtype=dtype)
    teacher = torch.tensor([[-1e4, 1e4, 0.0], [-1e4, -1e4, 1e4], [1e4, -1e4, 1e4]], dtype=dtype)
    value, gradient = value_and_gradient(name, student, teacher, temperature=temperature)
    assert value.isfinite().all() and gradient.isfinite().all()
    assert (value >= 0).all()


@pytest.mark.parametrize("temperature", [0.05, 1.0, 100.0])
@pytest.mark.parametrize("shape", [(1, 2), (1, 1000), (16, 10)])
@pytest.mark.parametrize("name", [*DISTANCES, "msed"])
def test_equal_predictions_have_no_distance_and_no_gradient(name, shape, temperature):
    student = random_logits(*shape, seed=1, scale=10.0, dtype=torch.float32)
    student[0, 0] = -INF
    value, gradient = value_and_gradient(name, student, student.clone(), temperature=temperature)
    assert value.tolist() == [0.0] * shape[0]
    assert gradient.abs().max().item() == 0.0


@pytest.mark.parametrize("teachers", [2, 3, 7])
def test_many_equal_teachers_have_no_distance_and_no_gradient(teachers):
    student = random_logits(16, 10, seed=1, dtype=torch.float32).requires_grad_()
    value = msed(student, student.detach().expand(teachers, 16, 10), temperature=2.0)
    value.sum().backward()
    assert value.tolist() == [0.0] * 16 and student.grad.abs().max().item() == 0.0


@pytest.mark.parametrize("apart", [1e4, INF])
@pytest.mark.parametrize(("name", "supremum"), [("js", math.log(2)), ("td", 1.0), ("sed", 1.0), ("msed", 1.0)])
def test_disjoint_predictions_reach_the_bound(name, supremum, apart):
    student = torch.tensor([[0.0, 1.0, -apart, -apart]])
    teacher = torch.tensor([[-apart, -apart, 2.0, 0.0]])
    value, gradient = value_and_gradient(name, student, teacher)
    assert value.item() == pytest.approx(supremum, abs=1e-6)
    assert gradient.isfinite().all()
    assert get(name).bound == pytest.approx(supremum)


@pytest.mark.parametrize("teachers", [2, 4])
def test_disjoint_members_reach_the_bound_of_msed(teachers):
    members = torch.full((teachers + 1, 1, teachers + 1), -INF)
    members[range(teachers + 1), 0, range(teachers + 1)] = 0.0
    assert msed(members[0], members[1:]).item() == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("name", PAIRWISE)
def test_class_masked_on_both_sides_plays_no_part(name):
    student, teacher = random_logits(4, 5, seed=1), random_logits(4, 5, seed=2)
    expected, expected_gradient = value_and_gradient(name, student, teacher)
    nothing = torch.full((4, 1), -INF, dtype=torch.float64)

    value, gradient = value_and_gradient(name, torch.cat([student, nothing], 1), torch.cat([teacher, nothing], 1))

    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradient[:, :-1], expected_gradient)
    assert gradient[:, -1].tolist() == [0.0] * 4


@pytest.mark.parametrize("name", [*BOUNDED, "msed"])
@pytest.mark.parametrize("masked", ["student", "teacher"])
def test_bounded_divergences_take_a_class_masked_on_one_side(name, masked):
    student, teacher = random_logits(4, 5, seed=1), random_logits(4, 5, seed=2)
    (student if masked == "student" else teacher)[:, 2] = -INF
    value, gradient = value_and_gradient(name, student, teacher)
    q, p = reference.soften(student.numpy(), 1.0), reference.soften(teacher.numpy(), 1.0)
    expected = [
        reference.sed(*pair) if name == "msed" else getattr(reference, name)(*pair) for pair in zip(q, p, strict=True)
    ]
    np.testing.assert_allclose(value, expected, atol=1e-10)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("name", ["ce", "kl", "jeffreys"])
def test_class_the_student_rules_out_is_as_far_as_can_be_and_its_gradient_as_ever(name):
    student, teacher = torch.tensor([[0.0, 1.0, -INF]]), torch.tensor([[0.0, 1.0, 0.0]])
    value, gradient = value_and_gradient(name, student, teacher)
    assert value.item() == pytest.approx(teacher.softmax(1)[0, 2].item() * 1e30)
    assert gradient.isfinite().all()
    if name != "jeffreys":
        torch.testing.assert_close(gradient, student.softmax(1) - teacher.softmax(1))
    assert reverse_kl(student, teacher).isfinite().all()


@pytest.mark.parametrize("name", ["reverse_kl", "jeffreys"])
def test_class_the_teacher_rules_out_is_as_far_as_can_be_and_the_step_stays_small(name):
    student, teacher = torch.tensor([[0.0, 0.0, 0.0]]), torch.tensor([[0.0, 0.0, -INF]])
    value, gradient = value_and_gradient(name, student, teacher)
    assert value.item() == pytest.approx(1e30 / 3)
    assert gradient.abs().max() < 1
    assert gradient[0, 2] > 0  # down with what the teacher rules out
    assert kl(student, teacher).isfinite().all()


def test_nan_is_not_hidden():
    for name in [*PAIRWISE, "msed"]:
        for at_fault in (0, 1):
            pair = [STUDENT.clone(), TEACHER.clone()]
            pair[at_fault][0, 1] = math.nan
            value, gradient = value_and_gradient(name, *pair)
            assert value.isnan().all() and gradient.isnan().all(), name


def test_masked_class_in_one_sample_leaves_the_gradient_of_the_others_alone():
    student, teacher = random_logits(3, 4, seed=1), random_logits(3, 4, seed=2)
    _, expected = value_and_gradient("kl", student, teacher)
    student[0, 0] = -INF
    _, gradient = value_and_gradient("kl", student, teacher)
    torch.testing.assert_close(gradient[1:], expected[1:])


@pytest.mark.parametrize("name", DISTANCES)
def test_single_precision_near_equality(name):
    student = random_logits(64, 10, seed=1, scale=2.0)
    teacher = student + random_logits(64, 10, seed=2, scale=1e-3)
    exact = get(name)(student, teacher)
    single = get(name)(student.float(), teacher.float())
    assert (single >= 0).all()
    torch.testing.assert_close(single.double(), exact, rtol=0.0, atol=5e-7)


# Laws.


@pytest.mark.parametrize("name", [*PAIRWISE, "msed"])
@given(pair=logits(), temperature=temperatures)
@law
def test_non_negative_and_within_its_bound(name, pair, temperature):
    value = as_multiway(name)(*pair, temperature=temperature).item()
    assert 0 <= value <= get(name).bound * (1 + 1e-12)


@pytest.mark.parametrize("name", PAIRWISE)
@given(pair=logits(), temperature=temperatures)
@law
def test_symmetric_where_declared(name, pair, temperature):
    there, back = get(name)(*pair, temperature=temperature), get(name)(*reversed(pair), temperature=temperature)
    if get(name).symmetric:
        torch.testing.assert_close(there, back, rtol=1e-9, atol=1e-12)


def test_symmetry_is_declared_where_it_holds():
    for name in PAIRWISE:
        holds = get(name)(STUDENT, TEACHER).item() == pytest.approx(get(name)(TEACHER, STUDENT).item(), rel=1e-9)
        assert holds == get(name).symmetric, name


@pytest.mark.parametrize("name", [*PAIRWISE, "msed"])
@given(pair=logits(), shifts=st.tuples(logit, logit), temperature=st.floats(0.5, 100))
@law
def test_shifted_logits_are_the_same(name, pair, shifts, temperature):
    shifted = [z + shift for z, shift in zip(pair, shifts, strict=True)]
    divergence = as_multiway(name)
    torch.testing.assert_close(
        divergence(*shifted, temperature=temperature),
        divergence(*pair, temperature=temperature),
        rtol=1e-8,
        atol=1e-10,
    )


@pytest.mark.parametrize("name", [*PAIRWISE, "msed"])
@given(pair=logits(), order=st.randoms(use_true_random=False))
@law
def test_order_of_classes_plays_no_part(name, pair, order):
    classes = list(range(pair[0].shape[1]))
    order.shuffle(classes)
    divergence = as_multiway(name)
    permuted = divergence(*(z[:, classes] for z in pair))
    torch.testing.assert_close(permuted, divergence(*pair), rtol=1e-10, atol=1e-12)


@given(members=logits(4), order=st.permutations(range(4)))
@law
def test_msed_treats_all_members_alike(members, order):
    student, *teachers = members
    other, *others = (members[i] for i in order)
    torch.testing.assert_close(
        msed(other, torch.stack(others)), msed(student, torch.stack(teachers)), rtol=1e-9, atol=1e-12
    )


@given(pair=logits(), temperature=temperatures)
@law
def test_identities_between_divergences(pair, temperature):
    def d(f):
        return f(*pair, temperature=temperature)

    torch.testing.assert_close(d(sed), d(js).expm1())
    torch.testing.assert_close(d(jeffreys), d(kl) + d(reverse_kl))
    torch.testing.assert_close(as_multiway("msed")(*pair, temperature=temperature), d(sed))
    torch.testing.assert_close(kl(pair[1], pair[0], temperature=temperature), d(reverse_kl))


@given(pair=logits(), temperature=temperatures)
@law
def test_cross_entropy_has_the_gradient_of_kl(pair, temperature):
    _, of_ce = value_and_gradient("ce", *pair, temperature=temperature)
    _, of_kl = value_and_gradient("kl", *pair, temperature=temperature)
    torch.testing.assert_close(of_ce, of_kl)


@given(pair=logits(), temperature=temperatures)
@law
def test_known_inequalities(pair, temperature):
    # Topsøe 2000: ½·td ≤ js ≤ ln 2·td in this scale; Pinsker would be looser.
    triangular, shannon = td(*pair, temperature=temperature).item(), js(*pair, temperature=temperature).item()
    assert triangular / 2 - 1e-12 <= shannon <= math.log(2) * triangular + 1e-12


@pytest.mark.parametrize("name", ["js", "td"])
@given(three=logits(3), temperature=temperatures)
@law
def test_root_obeys_the_triangle_inequality_where_declared(name, three, temperature):
    def root(a, b):
        return get(name)(a, b, temperature=temperature).sqrt().item()

    x, y, z = three
    assert root(x, z) <= root(x, y) + root(y, z) + 1e-7
    assert get(name).root_is_metric


def test_root_of_sed_is_no_metric():
    left, middle, right = torch.tensor([[0.0, -INF]]), torch.tensor([[0.0, 0.0]]), torch.tensor([[-INF, 0.0]])
    assert sed(left, middle).sqrt() + sed(middle, right).sqrt() < sed(left, right).sqrt()
    assert not get("sed").root_is_metric


def test_divergences_near_agreement_are_as_4_to_2_to_1_to_1():
    student = random_logits(1, 10, seed=1, scale=1.0)
    teacher = student + random_logits(1, 10, seed=2, scale=1e-4)
    ratios = [(f(student, teacher) / js(student, teacher)).item() for f in (kl, td, js, sed)]
    assert ratios == pytest.approx([4, 2, 1, 1], rel=1e-3)


# Wrong input.


@pytest.mark.parametrize("name", PAIRWISE)
@pytest.mark.parametrize(
    ("student", "teacher", "temperature", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(2, 4), 1.0, r"`teacher_logits`.*\[2, 3\] and \[2, 4\]"),
        (torch.zeros(2, 3), torch.zeros(5, 2, 3), 1.0, r"one shape \[B, C\].*\[2, 3\] and \[5, 2, 3\]"),
        (torch.zeros(3), torch.zeros(3), 1.0, r"`student_logits`.*\[B, C\].*\[3\]"),
        (torch.zeros(0, 3), torch.zeros(0, 3), 1.0, r"B, C >= 1.*\[0, 3\]"),
        (torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3), 1.0, r"`student_logits`.*floating.*int64"),
        (torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.int32), 1.0, r"`teacher_logits`.*floating.*int32"),
        (torch.zeros(2, 3), torch.zeros(2, 3), 0.0, r"`temperature`.*> 0.*0\.0"),
        (torch.zeros(2, 3), torch.zeros(2, 3), -1.0, r"`temperature`.*> 0.*-1\.0"),
        (torch.zeros(2, 3), torch.zeros(2, 3), math.nan, r"`temperature`.*> 0.*nan"),
    ],
)
def test_wrong_input_is_named(name, student, teacher, temperature, message):
    with pytest.raises(ValueError, match=message):
        get(name)(student, teacher, temperature=temperature)


def test_wrong_input_of_msed_is_named():
    with pytest.raises(ValueError, match=r"\[B, C\] and \[K, B, C\].*\[2, 3\] and \[2, 3\]"):
        msed(torch.zeros(2, 3), torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"`teachers_logits`.*\[0, 2, 3\]"):
        msed(torch.zeros(2, 3), torch.zeros(0, 2, 3))
