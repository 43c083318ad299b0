"""Models that cannot train are found before anyone does; training that fails or diverges says so."""

import json

import pytest
import torch
from federation import federate, local_grid
from sites import make_sites
from torch import nn

from clients import learner, rehearsal
from fedkd import models
from fedkd.errors import SettingError
from fedkd.settings.config import RunConfig
from strategies.relay.rounds import RelayError

HERE = "test_untrainable"


class Whole(nn.Module):
    """A linear model of any input, to be spoilt."""

    def __init__(self, input_shape, num_classes):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.LazyLinear(num_classes))
        self.body(torch.zeros(1, *input_shape))

    def forward(self, x):
        return self.body(x)


class Tuple(Whole):
    def forward(self, x):
        logits = super().forward(x)
        return (logits, logits) if self.training else logits


class ExtraState(Whole):
    def get_extra_state(self):
        return {"epoch": 3}

    def set_extra_state(self, state):
        pass


class FailsLater(Whole):
    """It trains on two samples, and not on private batches."""

    def forward(self, x):
        if self.training and len(x) > 2:
            raise RuntimeError("no such layer")
        return super().forward(x)


def returns_a_tuple(*, input_shape, num_classes):
    return Tuple(input_shape, num_classes)


def has_an_extra_state(*, input_shape, num_classes):
    return ExtraState(input_shape, num_classes)


def needs_no_gradient(*, input_shape, num_classes):
    return Whole(input_shape, num_classes).requires_grad_(False)


def fails_later(*, input_shape, num_classes):
    return FailsLater(input_shape, num_classes)


def cannot_keep_a_secret(*, input_shape, num_classes):
    class Telling(Whole):
        def forward(self, x):
            if self.training:
                raise RuntimeError("no weights at smb://ada:hunter2@nas")
            return super().forward(x)

    return Telling(input_shape, num_classes)


def drops_out(*, input_shape, num_classes):
    return nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, num_classes))


@pytest.mark.parametrize("strategy", ["averaged", "fedavg"])
@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("returns_a_tuple", "'tuple' object"),
        ("has_an_extra_state", "."),
        ("needs_no_gradient", "does not require grad"),
    ],
)
def test_a_model_that_cannot_train_is_found_before_anyone_trains(tmp_path, strategy, model, words):
    grid = local_grid(tmp_path, 2)
    own = {"models": f"mlp,{HERE}:{model}"} if strategy == "averaged" else {"fedavg_model": f"{HERE}:{model}"}

    with pytest.raises(
        RelayError, match=rf"{'models' if strategy == 'averaged' else 'fedavg-model'}`.*{words}.*{model}"
    ):
        federate(tmp_path, 2, grid=grid, strategy=strategy, **own)

    assert {sent.content["mail"]["kind"] for sent in grid.sent} == {"introduce"}


def test_a_checkpoint_of_no_numbers_is_found_before_anyone_trains(tmp_path):
    model = models.build("mlp", input_shape=(1, 8, 8), num_classes=10, seed=0)
    model[1].weight.data[0, 0] = torch.nan
    torch.save(model.state_dict(), tmp_path / "nan.pt")

    with pytest.raises(RelayError, match=r"peer-0: .*`checkpoints`.*finite"):
        federate(tmp_path, 2, models="mlp", checkpoints=f"{tmp_path}/nan.pt,-")


@pytest.mark.parametrize("model", ["cnn-small", "resnet8", f"{HERE}:drops_out"])
def test_the_rehearsal_leaves_weights_and_random_streams_as_they_were(model):
    rehearsal._passed.clear()
    built = models.build(model, input_shape=(1, 8, 8), num_classes=10, seed=0)
    weights = {name: value.clone() for name, value in built.state_dict().items()}
    random = torch.random.get_rng_state()

    rehearsal.rehearse(built, model, torch.ones(1, 1, 8, 8), RunConfig(), classes=10, key="models")

    assert torch.equal(torch.random.get_rng_state(), random)
    assert all(torch.equal(value, weights[name]) for name, value in built.state_dict().items())


def test_an_architecture_is_rehearsed_once_in_a_process(monkeypatch):
    rehearsal._passed.clear()
    steps = []
    monkeypatch.setattr(rehearsal, "fit", lambda model, *given, **named: steps.append(model))
    built = models.build("mlp", input_shape=(1, 8, 8), num_classes=10, seed=0)

    for _ in range(3):
        rehearsal.rehearse(built, "mlp", torch.rand(4, 1, 8, 8), RunConfig(), classes=10, key="models")
    rehearsal.rehearse(built, "cnn", torch.rand(4, 1, 8, 8), RunConfig(), classes=10, key="models")

    assert len(steps) == 2


def test_a_failed_rehearsal_is_repeated():
    broken = needs_no_gradient(input_shape=(4,), num_classes=2)
    for _ in range(2):
        with pytest.raises(SettingError, match="`model`"):
            rehearsal.rehearse(broken, "own", torch.rand(2, 4), RunConfig(), classes=2, key="model")


def test_of_what_a_real_peers_own_model_says_its_kind_alone_leaves_the_peer(tmp_path, capfd):
    sites = make_sites(tmp_path / "sites", 2)
    own = {"simulated": False, "worker": False, "model": f"{HERE}:cannot_keep_a_secret"}
    grid = local_grid(tmp_path, 2, node_config={i: {**site, **own} for i, site in enumerate(sites)})

    with pytest.raises(RelayError, match=r"`models`.*RuntimeError: the peer's log says more"):
        federate(tmp_path, 2, grid=grid, seats=2, proxy_size=60)
    assert "hunter2" not in str([reply.content for reply in grid.replies])
    assert "hunter2" in capfd.readouterr().err


# --- in the rounds ---


def test_a_peer_that_never_trained_fails_the_run_and_the_results_are_there(tmp_path):
    with pytest.raises(RelayError, match=r"^peer-1 never trained: RuntimeError: no such layer$"):
        federate(tmp_path, 3, models=f"mlp,{HERE}:fails_later,mlp", rounds=2)

    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert [peer["after"] is not None for peer in summary["peers"]] == [True, False, True]
    assert summary["peers"][1]["failures"] == {"error": 3}


def test_a_peer_that_trained_once_does_not_fail_the_run(tmp_path):
    grid = local_grid(tmp_path, 2)

    def fails(partition, message):
        if partition == 1 and message.content["mail"]["round"] != 2:
            raise RuntimeError("power cut")

    grid.fault = lambda i, m: fails(i, m) if m.content["mail"]["kind"] == "learn" else None

    assert federate(tmp_path, 2, grid=grid, rounds=3).summary()["peers"][1]["failures"] == {"error": 2}


@pytest.mark.parametrize("eval_every", [1, 10])
@pytest.mark.parametrize("strategy", ["averaged", "fedavg"])
def test_training_that_diverges_says_so_with_its_learning_rate(tmp_path, strategy, eval_every):
    with pytest.raises(RelayError) as failed:
        federate(
            tmp_path, 2, models="mlp", fedavg_model="mlp", strategy=strategy, pretrain_epochs=0, rounds=2,
            learning_rate=1e30, optimizer="sgd", eval_every=eval_every,
        )  # fmt: skip

    assert "are not finite; learning-rate = 1e30" in str(failed.value)
    rows = [json.loads(line) for line in (tmp_path / "run" / "rounds.jsonl").read_text().splitlines()]
    said = [row["error"] for row in rows if row["error"]]
    assert said and all(f"round {row['round']}: the model's" in row["error"] for row in rows if row["error"])


def test_a_real_peer_says_that_it_diverged(tmp_path):
    sites = make_sites(tmp_path / "sites", 2)
    own = {i: {**site, "simulated": False, "worker": False} for i, site in enumerate(sites)}
    grid = local_grid(tmp_path, 2, node_config=own)

    with pytest.raises(RelayError, match=r"round 1: the model's logits are not finite; learning-rate = 1e30"):
        federate(
            tmp_path, 2, grid=grid, seats=2, proxy_size=60, pretrain_epochs=0, rounds=1, learning_rate=1e30,
            optimizer="sgd",
        )  # fmt: skip


def test_a_search_leaves_out_what_diverges(tmp_path, monkeypatch):
    predict, seen = learner.predict, []

    def ruined_at_first(model, inputs, **options):
        seen.append(len(inputs))
        logits = predict(model, inputs, **options)
        return logits * torch.nan if len(seen) == 1 else logits

    monkeypatch.setattr(learner, "predict", ruined_at_first)
    run = federate(tmp_path, 2, regime="tuned", tune_temperatures="1,3", tune_weights="0.5", rounds=1)

    first = next(row for row in run.rows() if row["round"] == 1 and row["peer"] == "peer-0")
    assert first["status"] == "ok" and first["temperature"] == 3.0
