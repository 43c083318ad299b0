"""Information flow: the divergence of likenesses, its schedule, layers by name, projection, transfer."""

import math

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedkd.losses.information_flow import FlowLoss, features, flow_divergence, project, transfer, transfer_via_auxiliary

STUDENT = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]], dtype=torch.float64)
TEACHER = torch.eye(3, dtype=torch.float64)
VARIANTS = ["paper", "code"]


def random_features(*shape, seed, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize(
    ("variant", "cosine", "student_t"), [("code", 0.0211503, 0.0024317), ("paper", 0.0465638, 0.0058875)]
)
def test_known_answers(variant, cosine, student_t):
    found = flow_divergence(STUDENT, TEACHER, variant=variant)
    assert [part.item() for part in found] == pytest.approx([cosine, student_t], abs=5.1e-8)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("batch", "student_width", "teacher_width"), [(2, 1, 3), (8, 5, 3), (32, 64, 200)])
def test_value_is_that_of_the_definition(variant, batch, student_width, teacher_width):
    student, teacher = random_features(batch, student_width, seed=1), random_features(batch, teacher_width, seed=2)
    if student_width == 1:
        student = student.abs()  # one dimension has but parallel and antipodal features
    expected = reference.flow(student.numpy(), teacher.numpy(), variant)
    np.testing.assert_allclose(flow_divergence(student, teacher, variant=variant), expected, rtol=1e-9, atol=1e-10)
    single = flow_divergence(student.float(), teacher.float(), variant=variant)
    np.testing.assert_allclose(single, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradient_is_that_of_the_value(variant):
    student, teacher = random_features(5, 4, seed=1).requires_grad_(), random_features(5, 3, seed=2)
    assert torch.autograd.gradcheck(lambda f: flow_divergence(f, teacher, variant=variant), student)


@pytest.mark.parametrize("variant", VARIANTS)
def test_teacher_gets_no_gradient(variant):
    student, teacher = random_features(5, 4, seed=1).requires_grad_(), random_features(5, 3, seed=2).requires_grad_()
    sum(flow_divergence(student, teacher, variant=variant)).backward()
    assert student.grad.abs().sum() > 0 and teacher.grad is None


# Laws.

seeds = st.integers(0, 2**31)
law = settings(deadline=None, max_examples=30)


@pytest.mark.parametrize("variant", VARIANTS)
@given(seed=seeds, scale=st.floats(0.1, 100))
@law
def test_cosine_ignores_scale_and_student_t_translation(variant, seed, scale):
    student, teacher = random_features(6, 4, seed=seed), random_features(6, 3, seed=seed + 1)
    expected = flow_divergence(student, teacher, variant=variant)
    scaled = flow_divergence(scale * student, teacher, variant=variant)
    moved = flow_divergence(student + 100 * scale, teacher, variant=variant)
    # Up to the 1e-6 that is added to norms.
    torch.testing.assert_close(scaled.cosine, expected.cosine, rtol=1e-3, atol=1e-9)
    torch.testing.assert_close(moved.student_t, expected.student_t, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("variant", VARIANTS)
@given(seed=seeds)
@law
def test_rotation_plays_no_part_and_sides_can_be_changed(variant, seed):
    student, teacher = random_features(6, 4, seed=seed), random_features(6, 3, seed=seed + 1)
    rotation, _ = torch.linalg.qr(random_features(4, 4, seed=seed + 2))
    expected = flow_divergence(student, teacher, variant=variant)
    for found in (
        flow_divergence(student @ rotation, teacher, variant=variant),
        flow_divergence(teacher, student, variant=variant),
        flow_divergence(student.flip(0), teacher.flip(0), variant=variant),
    ):
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-10)
    assert min(expected) >= 0


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equal_features_have_no_distance_and_no_gradient(variant, dtype):
    student = random_features(9, 20, seed=1, dtype=dtype).requires_grad_()
    found = flow_divergence(student, student.detach().clone(), variant=variant)
    sum(found).backward()
    assert [part.item() for part in found] == [0.0, 0.0]
    assert student.grad.abs().max().item() == 0.0
    assert found.cosine.dtype == torch.float32


# Extremes.


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "student",
    [
        torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]]),  # antipodal
        torch.tensor([[0.0, 0.0], [0.0, 0.0], [1.0, 1.0]]),  # dead
        torch.zeros(3, 2),
        torch.full((3, 2), 1e4),  # all alike
        1e4 * torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 1e-4]]),
    ],
)
def test_extremes_stay_finite(variant, student):
    student = student.clone().requires_grad_()
    found = flow_divergence(student, TEACHER.float(), variant=variant)
    sum(found).backward()
    assert all(part.isfinite() for part in found) and student.grad.isfinite().all()


def test_far_from_the_origin_single_precision_still_sees_distances():
    student, teacher = random_features(8, 4, seed=1), random_features(8, 4, seed=2)
    expected = flow_divergence(student, teacher).student_t
    found = flow_divergence((student + 1000).float(), teacher.float()).student_t
    assert found.item() == pytest.approx(expected.item(), rel=1e-2)


def test_autocast_does_not_reach_in():
    student, teacher = (random_features(8, 4, seed=seed, dtype=torch.float32) for seed in (1, 2))
    expected = flow_divergence(student, teacher)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = flow_divergence(student, teacher)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_sample_is_compared_with_itself_or_refused(variant):
    if variant == "code":
        assert flow_divergence(STUDENT[:1], TEACHER[:1], variant=variant).cosine.item() == 0.0
    else:
        with pytest.raises(ValueError, match=r"B >= 2.*variant='paper'.*\[1, 2\]"):
            flow_divergence(STUDENT[:1], TEACHER[:1], variant=variant)


@pytest.mark.parametrize(
    ("student", "teacher", "variant", "message"),
    [
        (STUDENT, TEACHER[:2], "paper", r"same B samples.*\[3, 2\] and \[2, 3\]"),
        (STUDENT[0], TEACHER, "paper", r"`student_features`.*\[B, D\].*\[2\]"),
        (STUDENT, TEACHER.long(), "paper", r"`teacher_features`.*floats.*int64"),
        (STUDENT[:, :0], TEACHER, "paper", r"`student_features`.*\[3, 0\]"),
        (STUDENT, TEACHER, "book", r"`variant`.*'paper', 'code'.*'book'"),
    ],
)
def test_wrong_input_is_named(student, teacher, variant, message):
    with pytest.raises(ValueError, match=message):
        flow_divergence(student, teacher, variant=variant)


# The loss over layers.


def test_intermediate_layers_fade_and_the_last_stays():
    loss = FlowLoss(initial=100.0, decay=0.7, variant="code")
    student = [random_features(6, width, seed=width) for width in (8, 4, 2)]
    teacher = [random_features(6, width, seed=width) for width in (9, 5, 3)]
    flows = [sum(flow_divergence(s, t, variant="code")) for s, t in zip(student, teacher, strict=True)]
    for epoch, weight in [(0, 100.0), (1, 70.0), (3, 34.3)]:
        expected = weight * (flows[0] + flows[1]) + flows[2]
        torch.testing.assert_close(loss(student, teacher, epoch=epoch), expected)
    assert loss(student[-1:], teacher[-1:], epoch=0).item() == pytest.approx(flows[2].item())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: FlowLoss(initial=-1.0), r"`initial`.*>= 0.*-1\.0"),
        (lambda: FlowLoss(decay=0.0), r"`decay`.*\(0, 1\].*0\.0"),
        (lambda: FlowLoss(decay=1.5), r"`decay`.*\(0, 1\].*1\.5"),
        (lambda: FlowLoss(variant="book"), r"`variant`.*'book'"),
        (lambda: FlowLoss()([STUDENT], [TEACHER, TEACHER], epoch=0), r"equally many layers.*1 and 2"),
        (lambda: FlowLoss()([], [], epoch=0), r"at least 1.*0 and 0"),
    ],
)
def test_wrong_loss_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# Layers by name.


def small_cnn(width=4, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(width * 16, 3),
    )


IMAGES = random_features(24, 1, 4, 4, seed=0, dtype=torch.float32)


def test_layers_are_taken_by_name_from_every_pass():
    model = small_cnn().eval()
    with features(model, ["2", "4"]) as found:
        model(IMAGES[:5])
        first = dict(found)
        logits = model(IMAGES)
    assert first["2"].shape == (5, 64) and found["2"].shape == (24, 64)
    torch.testing.assert_close(found["4"], logits)
    with features(model, ["2"], pool="mean") as pooled:
        model(IMAGES)
    torch.testing.assert_close(pooled["2"], found["2"].reshape(24, 4, 16).mean(-1))


def test_layer_before_an_inplace_activation_is_taken_as_it_was():
    model = small_cnn().eval()
    with features(model, ["1"]) as found:
        model(IMAGES)
    assert (found["1"] < 0).any()


def test_features_carry_gradient_to_the_model():
    model = small_cnn()
    with features(model, ["2"]) as found:
        model(IMAGES)
    found["2"].sum().backward()
    assert model[0].weight.grad.abs().sum() > 0


def test_hooks_are_gone_after_the_block_even_if_it_fails():
    model = small_cnn()
    with pytest.raises(RuntimeError), features(model, ["0", "2"]) as found:
        model(torch.zeros(1, 2, 4, 4))
    assert not found
    model(IMAGES)
    assert not found
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("layers", "pool", "message"),
    [
        (["layer2"], "none", r"`layers`.*'0'.*'layer2'"),
        ([""], "none", r"`layers`.*''"),
        (["0"], "max", r"`pool`.*'none', 'mean'.*'max'"),
    ],
)
def test_wrong_layers_are_named(layers, pool, message):
    with pytest.raises(ValueError, match=message), features(small_cnn(), layers, pool=pool):
        pass


def test_layer_without_a_batch_of_features_is_named():
    model = nn.Sequential(nn.LSTM(4, 2))
    with pytest.raises(ValueError, match=r"layer '0'.*tuple"), features(model, ["0"]):
        model(torch.zeros(3, 1, 4))


# Projection.


@pytest.mark.parametrize("dimensions", [16, 64])
def test_projection_keeps_distances_and_cosines_to_one_over_root_d(dimensions):
    whole = random_features(40, 2000, seed=1)
    whole[:20] += 2 * random_features(1, 2000, seed=3)  # two clusters: something to keep
    small = project(whole, dimensions, seed=0)
    off = ~torch.eye(40, dtype=torch.bool)
    ratio = (torch.cdist(small, small) / torch.cdist(whole, whole))[off]
    cosines, kept = (nn.functional.normalize(f) @ nn.functional.normalize(f).T for f in (whole, small))
    assert ratio.mean().item() == pytest.approx(1, abs=0.1) and ratio.std() < 1 / math.sqrt(dimensions)
    assert (kept - cosines)[off].std() < 1.5 / math.sqrt(dimensions)


def test_projection_depends_on_the_seed_alone():
    sample = random_features(3, 100, seed=1, dtype=torch.float32)
    torch.manual_seed(1)
    first = project(sample, 8, seed=5)
    torch.manual_seed(2)
    torch.testing.assert_close(project(sample, 8, seed=5), first, rtol=0, atol=0)
    assert (project(sample, 8, seed=6) - first).abs().max() > 0.1


def test_few_features_are_left_as_they_are():
    sample = random_features(3, 8, seed=1)
    assert project(sample, 8, seed=0) is sample


@pytest.mark.parametrize(
    ("sample", "dimensions", "message"),
    [
        (torch.zeros(3), 4, r"`features`.*\[N, D\].*\[3\]"),
        (torch.zeros(3, 9, dtype=torch.int64), 4, r"`features`.*floats.*int64"),
        (torch.zeros(3, 9), 0, r"`dimensions`.*>= 1.*0"),
    ],
)
def test_wrong_projection_is_named(sample, dimensions, message):
    with pytest.raises(ValueError, match=message):
        project(sample, dimensions, seed=0)


# Transfer.


def flow_between(student, teacher, student_layer, teacher_layer):
    student.eval(), teacher.eval()
    with (
        torch.no_grad(),
        features(student, [student_layer]) as of_student,
        features(teacher, [teacher_layer]) as of_teacher,
    ):
        student(IMAGES), teacher(IMAGES)
    return sum(flow_divergence(of_student[student_layer], of_teacher[teacher_layer])).item()


def test_transfer_brings_the_student_nearer_and_leaves_the_teacher():
    student, teacher = small_cnn(3, seed=1), small_cnn(8, seed=2).train()
    before = flow_between(student, teacher, "2", "2")
    teacher.train()
    kept = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}

    losses = transfer(
        student, teacher, IMAGES, student_layers=["2", "4"], teacher_layers=["2", "4"], loss=FlowLoss(),
        epochs=12, seed=0, batch_size=12, learning_rate=1e-2,
    )  # fmt: skip

    assert teacher.training and not student.training
    assert all(torch.equal(kept[name], tensor) for name, tensor in teacher.state_dict().items())
    assert len(losses) == 12 and losses[-1] < losses[0]
    assert flow_between(student, teacher, "2", "2") < 0.8 * before


def test_transfer_is_the_same_from_the_same_seed():
    def run(seed):
        return transfer(
            small_cnn(3, seed=1), small_cnn(8, seed=2), IMAGES, student_layers=["2"], teacher_layers=["2"],
            loss=FlowLoss(), epochs=2, seed=seed, batch_size=8,
        )  # fmt: skip

    assert run(0) == run(0) != run(1)


def test_last_batch_of_one_sample_is_left_out():
    losses = transfer(
        small_cnn(3), small_cnn(8), IMAGES[:9], student_layers=["2"], teacher_layers=["2"], loss=FlowLoss(),
        epochs=1, seed=0, batch_size=8,
    )  # fmt: skip
    assert math.isfinite(losses[0])


def test_student_learns_through_an_auxiliary_teacher_of_its_family():
    student = small_cnn(3, seed=1)
    torch.manual_seed(2)
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 3))
    before = flow_between(student, teacher, "4", "3")

    auxiliary = transfer_via_auxiliary(
        student, teacher, lambda: small_cnn(6, seed=3), IMAGES, student_layers=["2", "4"], teacher_layer="3",
        loss=FlowLoss(initial=10.0), auxiliary_epochs=30, epochs=30, seed=0, batch_size=12, learning_rate=1e-2,
    )  # fmt: skip

    assert flow_between(auxiliary, teacher, "4", "3") < before / 2
    assert flow_between(student, teacher, "4", "3") < before / 2


@pytest.mark.parametrize(("inputs", "batch_size"), [(IMAGES[:1], 8), (IMAGES, 1)])
def test_transfer_needs_pairs(inputs, batch_size):
    with pytest.raises(ValueError, match=r"`inputs` and `batch_size`.*pairs"):
        transfer(
            small_cnn(), small_cnn(), inputs, student_layers=["2"], teacher_layers=["2"], loss=FlowLoss(),
            epochs=1, seed=0, batch_size=batch_size,
        )  # fmt: skip
