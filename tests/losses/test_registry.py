"""The registry: divergences by name, the library's and one's own."""

import math

import pytest
import torch

from fedkd.losses import divergences
from fedkd.losses.divergences import ce, get, names, register


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr(divergences, "_REGISTRY", dict(divergences._REGISTRY))


def test_every_name_is_found():
    assert {
        "ce",
        "kl",
        "reverse_kl",
        "jeffreys",
        "js",
        "td",
        "sed",
        "msed",
        "cakd",
        "dkd",
        "bdkd",
    } <= set(names())
    assert [get(name).name for name in names()] == names()
    assert get("ce").function is ce


def test_own_divergence_is_found_by_name(registry):
    @register("half-squared", symmetric=True)
    def half_squared(student_logits, teacher_logits, *, temperature=1.0):
        return (student_logits - teacher_logits.detach()).square().sum(-1) / 2

    logits = torch.tensor([[1.0, 1.5, 0.0, -0.5]])
    assert "half-squared" in names()
    assert get("half-squared").symmetric
    assert get("half-squared")(logits, logits).item() == 0.0


def test_unknown_name_says_which_there_are():
    with pytest.raises(ValueError, match=r"one of \[.*'kl'.*\], but got 'hellinger'"):
        get("hellinger")


@pytest.mark.parametrize("name", ["kl", "bdkd"])
def test_taken_name_is_refused(registry, name):
    with pytest.raises(ValueError, match=f"not yet taken, but got '{name}'"):
        register(name)(lambda student_logits, teacher_logits, *, temperature=1.0: student_logits.sum(-1))


def test_the_absolute_error_of_masked_classes_is_finite():
    masked, plain = torch.tensor([[0.0, -math.inf]], requires_grad=True), torch.tensor([[0.0, 1.0]])
    both, one = get("mae")(masked, masked), get("mae")(masked, plain)
    one.sum().backward()
    assert both.item() == 0
    assert one.item() == pytest.approx(5e29)
    assert masked.grad.isfinite().all()
