"""What follows a convolution: in one go, in torch's operators, and in the order of memory that lets gradients be."""

import contextlib
import copy
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedkd.models import build, fused
from fedkd.models.kept import from_its_place
from fedkd.models.layers import NormPoolReLU, NormReLU, PoolReLU, PositionMean, subsampled

ROOT = Path(__file__).parents[2]
LAST = torch.channels_last
NARROW = 2.0**-8  # bfloat16 keeps eight bits
KINDS = ("norm", "shortcut", "norm-pool", "pool")
SHAPES = ((4, 16, 8, 6), (3, 5, 4, 2), (2, 1, 2, 2), (1, 64, 6, 14))


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def maps(shape, *, seed=0, dtype=torch.bfloat16):
    stream = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(shape, generator=stream) + 5).to(dtype).to(memory_format=LAST)


def layer_of(kind, channels):
    if kind == "pool":
        return PoolReLU()
    layer = NormPoolReLU(channels) if kind == "norm-pool" else NormReLU(channels)
    with torch.no_grad():
        layer.weight.copy_(torch.linspace(-1, 2.1, channels))
        layer.bias.copy_(torch.linspace(0.7, -0.3, channels))
    return layer


def plainly(kind, norm, x, shortcut):
    """The same in float64, by torch's operators."""
    if kind == "pool":
        return F.relu(F.max_pool2d(x, 2))
    normalised = nn.BatchNorm2d.forward(norm, x)
    if kind == "norm-pool":
        return F.relu(F.max_pool2d(normalised, 2))
    return F.relu(normalised + shortcut) if kind == "shortcut" else F.relu(normalised)


def applied(kind, layer, x, shortcut):
    return layer(x, shortcut) if kind == "shortcut" else layer(x)


def is_fused(tensor):
    return type(tensor.grad_fn).__name__ in ("_NormReLUBackward", "_NormPoolReLUBackward", "_PoolReLUBackward")


def close(found, expected, *, within):
    assert (found.double() - expected).norm() <= within * expected.norm()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_values_gradients_and_running_moments_are_those_of_torch_in_float64(kind, shape):
    layer = layer_of(kind, shape[1])
    exact = copy.deepcopy(layer).double()
    x, shortcut = maps(shape).requires_grad_(), maps(shape, seed=1).sub(5).requires_grad_()
    x64, shortcut64 = (tensor.detach().double().requires_grad_() for tensor in (x, shortcut))

    out, expected = applied(kind, layer, x, shortcut), plainly(kind, exact, x64, shortcut64)
    gradient = torch.randn_like(out)
    gradient = gradient.masked_fill((expected.abs() < 0.05) & (expected != 0), 0)  # rounded to the other side of zero
    out.backward(gradient)
    expected.backward(gradient.double())

    assert is_fused(out)
    assert out.is_contiguous(memory_format=LAST) and x.grad.is_contiguous(memory_format=LAST)
    close(out, expected, within=NARROW)
    close(x.grad, x64.grad, within=NARROW)
    if kind == "shortcut":
        assert torch.equal(shortcut.grad.double(), shortcut64.grad)
    for found, wanted in zip(layer.parameters(), exact.parameters(), strict=True):
        close(found.grad, wanted.grad, within=1e-5)
    for found, wanted in zip(layer.buffers(), exact.buffers(), strict=True):
        torch.testing.assert_close(found.double(), wanted.double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_predictions_are_normalised_by_the_running_moments_and_leave_them_alone(kind):
    layer = layer_of(kind, 6)
    applied(kind, layer, maps((4, 6, 4, 4)), maps((4, 6, 4, 4), seed=1))
    layer.eval()
    before = copy.deepcopy(layer.state_dict())
    x, shortcut = maps((4, 6, 4, 4), seed=2), maps((4, 6, 4, 4), seed=3)

    with torch.no_grad():
        out = applied(kind, layer, x, shortcut)

    close(out, plainly(kind, copy.deepcopy(layer).double(), x.double(), shortcut.double()), within=NARROW)
    assert all(torch.equal(layer.state_dict()[name], value) for name, value in before.items())


def test_moments_of_far_off_maps_lose_no_digits():
    x = (maps((8, 4, 6, 6), dtype=torch.float32) + 1000).bfloat16()
    layer, exact = NormReLU(4), nn.BatchNorm2d(4).double()

    layer(x.to(memory_format=LAST))
    exact(x.double())

    torch.testing.assert_close(layer.running_var.double(), exact.running_var, rtol=1e-4, atol=0)
    torch.testing.assert_close(layer.running_mean.double(), exact.running_mean, rtol=1e-6, atol=0)


def test_one_of_equal_maxima_gets_the_gradient_and_it_is_torchs():
    x = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.5, 2.0, 2.0, 0.5, -1.0, -1.0, -2.0, -3.0]).bfloat16()
    x = x.reshape(3, 1, 2, 2).contiguous(memory_format=LAST)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()

    PoolReLU()(ours).sum().backward()
    F.relu(F.max_pool2d(theirs, 2)).sum().backward()

    assert torch.equal(ours.grad, theirs.grad)


@pytest.mark.parametrize("nan", [float("nan"), -float("nan")])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_a_number_stays_so(kind, nan):
    x = maps((2, 3, 4, 4))
    x[0, 1, 2, 3] = nan
    found = applied(kind, layer_of(kind, 3), x, torch.zeros_like(x)).isnan()

    assert found[0, 1].any() and not found[:, 0].any()
    assert torch.equal(found, plainly(kind, layer_of(kind, 3).double(), x.double(), torch.zeros_like(x)).isnan())


def test_a_gradient_in_another_order_of_memory_is_brought_into_this():
    x = maps((2, 4, 4, 6)).requires_grad_()
    out = NormReLU(4)(x)
    gradient = torch.randn(2, 4, 4, 6).bfloat16()
    (found,) = torch.autograd.grad(out, x, gradient, retain_graph=True)
    (same,) = torch.autograd.grad(out, x, gradient.to(memory_format=LAST))

    assert torch.equal(found, same)


def left_to_torch(x, layer=None):
    out = (layer or NormReLU(x.shape[1]))(x)
    return not is_fused(out) and out.shape[0] == x.shape[0]


def test_everything_else_is_left_to_torch(monkeypatch):
    x = maps((2, 4, 4, 4)).requires_grad_()
    assert not left_to_torch(x)
    assert left_to_torch(x.float())
    assert left_to_torch(x.half())
    assert left_to_torch(x.contiguous())
    assert left_to_torch(x, NormReLU(4).eval())
    assert left_to_torch(x, NormReLU(4).bfloat16())
    assert left_to_torch(maps((2, 4, 3, 4)).requires_grad_(), NormPoolReLU(4))
    assert left_to_torch(maps((2, 4, 4, 5)).requires_grad_(), PoolReLU())
    torch.set_num_threads(2)
    assert left_to_torch(x)
    torch.set_num_threads(1)
    monkeypatch.setattr(fused, "_kernels", lambda: None)
    assert left_to_torch(x)


def changed(**parts):
    """Return a normalisation of four channels, some of it replaced."""
    layer = NormReLU(4)
    for name, value in parts.items():
        setattr(layer, name, nn.Parameter(value) if name in ("weight", "bias") and value is not None else value)
    return layer


def test_normalisations_that_are_not_torchs_default_are_left_to_torch():
    x = maps((2, 4, 4, 4)).requires_grad_()
    assert left_to_torch(x, changed(momentum=None))
    assert left_to_torch(x, changed(running_mean=None, running_var=None))
    assert left_to_torch(x, changed(weight=None))
    for wrong in ({"bias": torch.zeros(2)}, {"weight": torch.zeros(8)}, {"running_var": torch.ones(1)}):
        with pytest.raises(RuntimeError, match="4 elements"):
            changed(**wrong)(x)


def test_an_empty_batch_is_left_to_torch():
    assert PoolReLU()(torch.zeros(0, 4, 4, 4).bfloat16().to(memory_format=LAST)).shape == (0, 4, 2, 2)


def test_what_is_frozen_gets_no_gradient_and_the_rest_the_same():
    x, shortcut = maps((2, 4, 4, 4)), maps((2, 4, 4, 4), seed=1).requires_grad_()
    whole, frozen = NormReLU(4), NormReLU(4)
    frozen.weight.requires_grad_(False)
    for layer in (whole, frozen):
        layer(x, shortcut).square().sum().backward(retain_graph=True)
    assert frozen.weight.grad is None and x.grad is None
    assert torch.equal(frozen.bias.grad, whole.bias.grad)


def test_moments_are_exact_though_the_first_row_lies_far_off():
    x = maps((16, 4, 28, 28)).sub(5)
    x[0, :, 0] = 100
    layer, exact = NormReLU(4), nn.BatchNorm2d(4).double()
    layer(x)
    exact(x.double())
    torch.testing.assert_close(layer.running_var.double(), exact.running_var, rtol=1e-5, atol=0)


def test_no_weight_makes_a_number_of_what_is_none():
    layer = NormReLU(2)
    with torch.no_grad():
        layer.weight.view(torch.int32).fill_(0x7FFFFFFF)
    assert layer(maps((2, 2, 4, 4))).isnan().all()


@pytest.mark.parametrize("at_default", ["device", "dtype"])
def test_torchs_defaults_do_not_matter(at_default):
    x, layer = maps((2, 4, 4, 4)).requires_grad_(), NormReLU(4)
    dtype = torch.get_default_dtype()
    try:
        if at_default == "dtype":
            torch.set_default_dtype(torch.bfloat16)
        with torch.device("meta") if at_default == "device" else contextlib.nullcontext():
            layer(x).backward(torch.ones_like(x, device="cpu"))
    finally:
        torch.set_default_dtype(dtype)
    assert x.grad.dtype is torch.bfloat16 and layer.weight.grad.dtype is torch.float32


@pytest.mark.parametrize("fault", [OSError("no library"), AttributeError("another numpy"), ImportError("no numpy")])
def test_numba_that_cannot_be_used_is_said_once_and_done_without(fault, monkeypatch):
    def broken(name):
        raise fault

    fused._kernels.cache_clear()
    monkeypatch.setattr(fused, "from_its_place", broken)
    try:
        with pytest.warns(UserWarning, match="numba cannot be used"):
            assert left_to_torch(maps((2, 4, 4, 4)).requires_grad_())
        assert left_to_torch(maps((2, 4, 4, 4)).requires_grad_())
    finally:
        fused._kernels.cache_clear()


def test_a_compiler_that_looks_sees_torchs_operators(monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert left_to_torch(maps((2, 4, 4, 4)).requires_grad_())


def test_a_shortcut_of_another_form_is_left_to_torch():
    x, shortcut = maps((2, 4, 4, 4)).requires_grad_(), maps((2, 4, 1, 1), seed=1)
    for other in (shortcut, shortcut.float(), torch.ones_like(x, dtype=torch.float32)):
        out = NormReLU(4)(x, other)
        assert not is_fused(out)
        torch.testing.assert_close(
            out.double(), plainly("shortcut", nn.BatchNorm2d(4), x.float(), other).double(), rtol=0.02, atol=0.02
        )


@pytest.mark.parametrize("wrong", [maps((2, 5, 4, 4)), torch.zeros(2, 4, 4).bfloat16()])
@pytest.mark.parametrize("layer", [NormReLU(4), NormPoolReLU(4)])
def test_maps_of_another_form_are_refused_as_torch_refuses_them(layer, wrong):
    with pytest.raises((RuntimeError, ValueError), match=r"expected 4D|should contain 5 elements"):
        layer(wrong)


def test_one_number_of_a_channel_is_refused_as_torch_refuses_it():
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        NormReLU(4)(maps((1, 4, 1, 1)))


@pytest.mark.parametrize("name", ["cnn-small", "cnn-wide", "resnet8"])
def test_a_model_computes_the_same_with_and_without(name, monkeypatch):
    model = build(name, input_shape=(1, 12, 12), num_classes=5, seed=0).to(memory_format=LAST)
    x = maps((8, 1, 12, 12), dtype=torch.float32) - 5

    def outcome():
        mine = copy.deepcopy(model)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = mine(x)
        logits.float().square().mean().backward()
        return logits.detach().double(), torch.cat([p.grad.flatten() for p in mine.parameters()]).double()

    logits, gradients = outcome()
    monkeypatch.setattr(fused, "_kernels", lambda: None)
    expected, slopes = outcome()

    close(logits, expected, within=8 * NARROW)
    close(gradients, slopes, within=16 * NARROW)
    assert torch.equal(gradients, slopes) == (name == "cnn-small")  # pooling alone rounds nothing


def assert_succeeds(script):
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_without_numba_a_fast_model_still_learns():
    script = (
        "import sys, torch\n"
        "sys.modules['numba'] = None\n"
        "from fedkd import models\n"
        "from fedkd.training import fast, loops\n"
        "fast.bfloat16_pays = lambda device: True\n"
        "model = fast.arranged(models.build('cnn-wide', input_shape=(1, 8, 8), num_classes=2, seed=0))\n"
        "x, y = torch.randn(40, 1, 8, 8), torch.arange(40) % 2\n"
        "loss = loops.fit(model, x, y, epochs=1, how=loops.Optimization(fast=True), seed=0)\n"
        "sys.exit(not 0 < loss < 9)\n"
    )
    assert_succeeds(script)


def test_numba_is_not_imported_by_what_does_not_need_it():
    script = (
        "import sys, torch\n"
        "from fedkd import models\n"
        "from fedkd.training import loops\n"
        "model = models.build('resnet8', input_shape=(1, 8, 8), num_classes=2, seed=0)\n"
        "x, y, how = torch.randn(9, 1, 8, 8), torch.arange(9) % 2, loops.Optimization()\n"
        "loops.fit(model, x, y, epochs=1, how=how, seed=0)\n"
        "sys.exit('numba' in sys.modules)\n"
    )
    assert_succeeds(script)


def test_a_second_process_finds_the_loops_compiled_though_its_code_lies_elsewhere(tmp_path):
    script = (
        "from fedkd.models import fused, layers\n"
        "import torch\n"
        "torch.set_num_threads(1)\n"
        "layers.PoolReLU()(torch.zeros(1, 2, 2, 2).bfloat16().to(memory_format=torch.channels_last))\n"
        "loops = fused._kernels()\n"
        "found = (loops.pool_relu.stats.cache_hits, loops.pool_relu.stats.cache_misses)\n"
        "print(fused.__file__, loops.__file__, *(sum(counts.values()) for counts in found))\n"
    )
    said = []
    for name in ("first", "second"):
        shutil.copytree(ROOT / "fedkd", tmp_path / name / "fedkd", ignore=shutil.ignore_patterns("__pycache__"))
        surroundings = {**os.environ, "HOME": str(tmp_path), "PYTHONPATH": str(tmp_path / name)}
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, env=surroundings, cwd=tmp_path, check=True
        )
        said.append(done.stdout.split())

    assert [code for code, *_ in said] == [
        str(tmp_path / name / "fedkd/models/fused.py") for name in ("first", "second")
    ]
    assert said[0][1] == said[1][1] and said[0][1].startswith(str(tmp_path / ".cache"))
    assert [counts for _, _, *counts in said] == [["0", "1"], ["1", "0"]]


def test_loops_are_imported_as_they_are_where_no_copy_can_be_kept(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "lonely_module.py").write_text("value = 3")
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    monkeypatch.syspath_prepend(tmp_path)

    module = from_its_place("lonely_module")

    assert (module.value, module.__file__) == (3, str(tmp_path / "lonely_module.py"))
    del sys.modules["lonely_module"]


def test_a_copy_that_is_not_the_text_is_made_anew(monkeypatch, tmp_path):
    (tmp_path / "lonely_module.py").write_text("value = 3")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    for _ in range(2):
        kept = Path(from_its_place("lonely_module").__file__)
        del sys.modules["lonely_module"]
        assert kept.is_relative_to(tmp_path / ".cache") and kept.read_text() == "value = 3"
        kept.write_text("value = 4")


@pytest.mark.parametrize("order", [torch.contiguous_format, LAST])
def test_means_and_shortcuts_are_plain_ones_with_gradients_in_the_order_of_the_maps(order):
    x = torch.randn(3, 4, 6, 5).to(memory_format=order)
    ways = {
        "mean": (PositionMean(), lambda t: t.mean(dim=(2, 3))),
        "shortcut": (
            lambda t: subsampled(t, 2, (1, 3)),
            lambda t: F.pad(t[:, :, ::2, ::2], (0, 0, 0, 0, 1, 3)),
        ),
    }
    for ours, plain in ways.values():
        mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        found, expected = ours(mine), plain(theirs)
        torch.testing.assert_close(found, expected)
        slope = torch.randn_like(expected)
        (gradient,) = torch.autograd.grad(found, mine, slope)
        torch.testing.assert_close(gradient, torch.autograd.grad(expected, theirs, slope)[0])
        assert gradient.is_contiguous(memory_format=order)


def test_checkpoints_know_the_parameters_by_their_old_names():
    names = {
        name: list(build(name, input_shape=(1, 8, 8), num_classes=3, seed=0).state_dict())
        for name in ("cnn-small", "cnn-wide")
    }

    assert [name for name in names["cnn-small"] if name.endswith("weight")] == [
        "0.weight",
        "3.weight",
        "7.weight",
        "9.weight",
    ]
    assert [name for name in names["cnn-wide"] if name.endswith("weight")] == [
        "0.weight", "1.weight", "4.weight", "5.weight", "8.weight", "9.weight", "12.weight",
    ]  # fmt: skip
