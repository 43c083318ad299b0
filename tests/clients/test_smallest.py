"""The smallest federations work under every strategy, schedule and regime, or are refused by a setting's name."""

import numpy as np
import pytest
from federation import federate, local_grid
from torch import nn

from fedkd.errors import FedkdError
from strategies.relay.rounds import RelayError

STRATEGIES = {
    "averaged": {},
    "pairwise": {},
    "gossip": {},
    "fedmd": {"strategy": "consensus", "consensus": "fedmd"},
    "ds-fl": {"strategy": "consensus", "consensus": "ds-fl"},
    "fedavg": {"fedavg_model": "test_smallest:normalised"},
    "distilled fedavg": {
        "strategy": "fedavg", "fedavg_start": "distilled", "merge_epochs": 1,
        "fedavg_model": "test_smallest:normalised",
    },
}  # fmt: skip
REGIMES = ("vanilla", "dml", "partitioned", "tuned")
FEATURES = 4


def normalised(*, input_shape, num_classes):
    """A model whose batch normalisation has one value per sample and channel."""
    return nn.Sequential(nn.Linear(*input_shape, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, num_classes))


def sites(path, labels, *, classes):
    """Write one file a peer, with these private labels, and the public file; return the settings that name them."""
    generator = np.random.default_rng(0)

    def drawn(of):
        of = np.asarray(of)
        return generator.normal(size=(len(of), FEATURES)).astype(np.float32) + of[:, None], of

    test = drawn(np.arange(12) % classes)
    names = np.array([f"class {c}" for c in range(classes)])
    for name, own in [*enumerate(labels), ("public", np.arange(8) % classes)]:
        x, y = drawn(own)
        np.savez(path / f"{name}.npz", x_train=x, y_train=y, x_test=test[0], y_test=test[1], classes=names)
    return {"dataset": f"npz:{path}/{{peer}}.npz", "proxy": f"npz:{path}/public.npz", "proxy_size": 8}


SITUATIONS = {
    "one sample": ([[1], [0, 1, 2] * 3], 3),
    "one class": ([[1] * 5, [0, 1, 2] * 3], 3),
    "two classes": ([[0, 1] * 4, [1, 0] * 4], 2),
    "one peer": ([[0, 1, 2] * 3], 3),
}


def run_smallest(path, labels, classes, strategy, **settings):
    """Run one round under a strategy; return it and what was sent."""
    path.mkdir()
    grid = local_grid(path, len(labels))
    small = {"models": "test_smallest:normalised", "pretrain_epochs": 1, "rounds": 1, "controls": "isolated"}
    small |= {"tune_temperatures": "1,2", "tune_weights": "0.5" if settings["schedule"] == "mixed" else "1"}
    chosen = {"strategy": strategy, **STRATEGIES[strategy]}
    data = sites(path, labels, classes=classes)
    return federate(path, len(labels), grid=grid, **{**small, **data, **chosen, **settings})


@pytest.mark.parametrize("schedule", ["mixed", "alternate"])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("situation", SITUATIONS)
def test_the_smallest_federations_work_under_every_strategy_schedule_and_regime(
    tmp_path, situation, strategy, schedule
):
    labels, classes = SITUATIONS[situation]
    for regime in ("vanilla",) if "fedavg" in strategy else REGIMES:
        if (situation, regime) == ("one sample", "tuned"):
            continue

        run = run_smallest(tmp_path / regime, labels, classes, strategy, schedule=schedule, regime=regime)

        assert [(row["status"], row["error"]) for row in run.rows()] == [("ok", "")] * 2 * len(labels), regime
        assert all(peer["isolated"] is not None for peer in run.summary()["peers"]), regime


@pytest.mark.parametrize("schedule", ["mixed", "alternate"])
def test_a_search_takes_two_samples_and_refuses_one_by_name(tmp_path, schedule):
    of = {"classes": 3, "strategy": "averaged", "schedule": schedule, "regime": "tuned"}

    run = run_smallest(tmp_path / "two", [[1, 2], [0, 1, 2] * 3], **of)
    assert {row["status"] for row in run.rows()} == {"ok"}

    with pytest.raises(RelayError, match=r"`regime`.*peer-0 has no two samples"):
        run_smallest(tmp_path / "one", [[1], [0, 1, 2] * 3], **of)


def test_one_class_in_all_is_refused_by_name(tmp_path):
    with pytest.raises(FedkdError, match=r"Expected setting `dataset`.*two classes"):
        run_smallest(tmp_path / "run", [[0] * 4, [0] * 4], 1, "averaged", schedule="mixed")
