"""What depends on the number of classes is an error at the introduction, before anyone trains."""

import numpy as np
import pytest
from federation import federate, local_grid

from fedkd.losses.teachers import objective
from fedkd.settings.rules import DIVERGENCES
from strategies.relay.rounds import RelayError


@pytest.fixture
def few_classes(tmp_path):
    """Return data with four classes."""
    generator = np.random.default_rng(0)
    labels = np.arange(200) % 4
    inputs = generator.normal(size=(200, 6)) + labels[:, None]
    names = {"x_train": inputs, "y_train": labels, "x_test": inputs[:40], "y_test": labels[:40]}
    np.savez(tmp_path / "data.npz", **names)
    return {"dataset": f"npz:{tmp_path / 'data.npz'}", "models": "mlp"}


CAKD = {"divergence": "cakd", "cakd_strong": "top-k"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({**CAKD, "cakd_top_k": 7}, r"`cakd-top-k` to be possible with 4 classes .*from 1 to 4 classes.* got 7"),
        ({"codec": "topk:9"}, r"`codec` to be topk:K with K below the number of classes, 4, but got 'topk:9'"),
        (
            {**CAKD, "cakd_top_k": 7, "strategy": "fedavg", "fedavg_start": "distilled", "fedavg_model": "mlp"},
            "`cakd-top-k` to be possible with 4 classes",
        ),
    ],
)
def test_what_the_classes_are_too_few_for_is_said_before_anyone_trains(tmp_path, few_classes, settings, message):
    grid = local_grid(tmp_path, 2)

    with pytest.raises(RelayError, match=message):
        federate(tmp_path, 2, grid=grid, **few_classes, **settings)

    assert {sent.content["mail"]["kind"] for sent in grid.sent} == {"introduce"}


@pytest.mark.parametrize("divergence", sorted(DIVERGENCES))
def test_every_divergence_is_possible_with_few_classes(tmp_path, few_classes, divergence):
    run = federate(tmp_path, 2, **few_classes, divergence=divergence, rounds=1, pretrain_epochs=0)
    assert {row["status"] for row in run.rows()} == {"ok"}


def test_a_baseline_that_sends_weights_does_not_mind(tmp_path, few_classes):
    cold = {**CAKD, "cakd_top_k": 7, "strategy": "fedavg", "fedavg_model": "mlp"}
    run = federate(tmp_path, 2, **few_classes, **cold, rounds=1)
    assert {row["status"] for row in run.rows()} == {"ok"}


def test_as_many_strong_classes_as_one_likes_are_possible_where_there_are_more():
    import torch

    teachers = torch.randn(1, 3, 2000)
    many = objective("cakd", strong="top-k", top_k=1500)

    loss = many(torch.zeros(3, 2000), many.prepare(teachers, labels=teachers[0].argmax(-1)))

    assert loss.isfinite().all()
    with pytest.raises(ValueError, match="from 1 to 1000 classes"):
        objective("cakd", strong="top-k", top_k=0)
