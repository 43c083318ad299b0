"""BD-KD: the balance of forward and reverse KL, and the online pair of losses."""

import math

import numpy as np
import pytest
import reference
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.distributions import Categorical

from fedkd.losses.balanced import balanced, online
from fedkd.losses.divergences import jeffreys, kl, reverse_kl

TEACHER = torch.tensor([[3.0, 2.0, 1.0, 0.0]], dtype=torch.float64)
FLAT = torch.tensor([[1.0, 1.5, 0.0, -0.5]], dtype=torch.float64)
SHARP = torch.tensor([[6.0, 1.0, 0.0, -1.0]], dtype=torch.float64)

rows = st.lists(st.floats(-20, 20), min_size=4, max_size=4).map(lambda row: torch.tensor([row], dtype=torch.float64))
law = settings(deadline=None, max_examples=80)


def random_logits(*shape, seed):
    return 3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("student", "known"), [(FLAT, 0.734588), (SHARP, 2.378466)])
def test_known_answers(student, known):
    assert balanced(student, TEACHER).item() == pytest.approx(known, abs=5.1e-7)


@pytest.mark.parametrize("rule", ["sharpen_if_flat", "opposite", "none"])
@pytest.mark.parametrize("temperature", [0.5, 4.0])
def test_value_is_that_of_the_definition(rule, temperature):
    student, teacher = random_logits(32, 10, seed=1), random_logits(32, 10, seed=2)
    q, p = reference.soften(student.numpy(), temperature), reference.soften(teacher.numpy(), temperature)
    expected = [reference.balanced(q[i], p[i], 3.3, rule) for i in range(32)]
    options = {"delta": 3.3, "rule": rule, "temperature": temperature}
    np.testing.assert_allclose(balanced(student, teacher, **options), expected, rtol=1e-10)
    np.testing.assert_allclose(balanced(student.float(), teacher.float(), **options), expected, rtol=1e-5)


@given(student=rows, teacher=rows, temperature=st.floats(0.1, 50), delta=st.floats(0.1, 10))
@law
def test_without_a_rule_it_is_jeffreys(student, teacher, temperature, delta):
    expected = jeffreys(student, teacher, temperature=temperature)
    for options in ({"rule": "none", "delta": delta}, {"delta": 1.0}, {"rule": "opposite", "delta": 1.0}):
        torch.testing.assert_close(balanced(student, teacher, temperature=temperature, **options), expected)


@given(student=rows, teacher=rows, delta=st.floats(0.1, 10))
@law
def test_the_two_rules_share_the_weights_between_them(student, teacher, delta):
    both = balanced(student, teacher, delta=delta) + balanced(student, teacher, delta=delta, rule="opposite")
    torch.testing.assert_close(both, (1 + delta) * jeffreys(student, teacher), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("student", "favoured"), [(FLAT, reverse_kl), (SHARP, kl)])
def test_flat_students_are_sharpened_and_sharp_ones_widened(student, favoured):
    more = balanced(student, TEACHER, delta=3.0) - balanced(student, TEACHER, delta=2.0)
    torch.testing.assert_close(more, favoured(student, TEACHER))


@pytest.mark.parametrize("rule", ["sharpen_if_flat", "opposite", "none"])
def test_gradient_is_that_of_the_value(rule):
    student, teacher = random_logits(8, 5, seed=1).requires_grad_(), random_logits(8, 5, seed=2)
    assert torch.autograd.gradcheck(lambda z: balanced(z, teacher, rule=rule, temperature=2.0), student)


@pytest.mark.parametrize("temperature", [0.05, 1.0, 100.0])
@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        ([1e4, -1e4, 0.0], [-1e4, 1e4, 0.0]),
        ([0.0, 1.0, -math.inf], [2.0, 1.0, 0.0]),
        ([0.0, 1.0, 2.0], [-math.inf, 1.0, 0.0]),
        ([0.0, 1.0, -math.inf], [0.5, 0.0, -math.inf]),
    ],
)
def test_extremes_stay_finite(student, teacher, temperature):
    student = torch.tensor([student], requires_grad=True)
    value = balanced(student, torch.tensor([teacher]), temperature=temperature)
    value.sum().backward()
    assert value.isfinite().all() and student.grad.isfinite().all()


def test_equal_predictions_have_no_distance_and_no_gradient():
    student = random_logits(4, 10, seed=1).float().requires_grad_()
    value = balanced(student, student.detach().clone(), temperature=3.0)
    value.sum().backward()
    assert value.tolist() == [0.0] * 4 and student.grad.abs().max().item() == 0.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"delta": 0.0}, r"`delta`.*> 0.*0\.0"),
        ({"delta": math.inf}, r"`delta`.*> 0.*inf"),
        ({"rule": "flat"}, r"`rule`.*'sharpen_if_flat'.*'flat'"),
        ({"temperature": -2.0}, r"`temperature`.*> 0.*-2\.0"),
    ],
)
def test_wrong_input_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        balanced(FLAT, TEACHER, **options)


# Student and teacher together.


def test_online_losses_are_those_of_the_definition():
    student, teacher = random_logits(6, 5, seed=1), random_logits(6, 5, seed=2)
    labels = torch.tensor([0, 1, 2, 3, 4, 0])
    q, p = reference.soften(student.numpy(), 2.0), reference.soften(teacher.numpy(), 2.0)
    own_q, own_p = reference.soften(student.numpy(), 1.0), reference.soften(teacher.numpy(), 1.0)

    losses = online(student, teacher, labels, weight=0.5, teacher_weight=0.25, delta=3.0, temperature=2.0)

    for i, label in enumerate(labels):
        of_student = -np.log(own_q[i, label]) + 0.5 * reference.balanced(q[i], p[i], 3.0, "sharpen_if_flat")
        of_teacher = -np.log(own_p[i, label]) + 0.25 * reference.kl(p[i], q[i])
        assert losses.student[i].item() == pytest.approx(of_student, rel=1e-10)
        assert losses.teacher[i].item() == pytest.approx(of_teacher, rel=1e-10)


def test_each_online_loss_trains_its_own_model_alone():
    student, teacher = random_logits(6, 5, seed=1).requires_grad_(), random_logits(6, 5, seed=2).requires_grad_()
    losses = online(student, teacher, torch.zeros(6, dtype=torch.int64))
    assert torch.autograd.grad(losses.student.sum(), teacher, allow_unused=True, retain_graph=True) == (None,)
    assert torch.autograd.grad(losses.teacher.sum(), student, allow_unused=True, retain_graph=True) == (None,)
    (losses.student.sum() + losses.teacher.sum()).backward()
    assert student.grad.abs().sum() > 0 and teacher.grad.abs().sum() > 0


def test_online_wants_a_label_for_each_sample():
    with pytest.raises(ValueError, match=r"`labels`.*\[1\].*\[2\]"):
        online(FLAT, TEACHER, torch.tensor([0, 1]))


@given(student=rows, teacher=rows, shifts=st.tuples(st.floats(-50, 50), st.floats(-50, 50)))
@law
def test_neither_a_shift_of_the_logits_nor_the_order_of_classes_matters(student, teacher, shifts):
    gap = Categorical(logits=student).entropy() - Categorical(logits=teacher).entropy()
    assume(gap.abs().min() > 1e-6)  # where the entropies are equal, rounding takes the side
    order = torch.tensor([2, 0, 3, 1])
    for rule in ("opposite", "none"):
        expected = balanced(student, teacher, rule=rule)
        shifted = balanced(student + shifts[0], teacher + shifts[1], rule=rule)
        torch.testing.assert_close(balanced(student[:, order], teacher[:, order], rule=rule), expected)
        torch.testing.assert_close(shifted, expected, rtol=1e-7, atol=1e-9)
