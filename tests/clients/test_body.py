"""Peers of whose models the head alone trains, on features that are computed once."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from federation import federate, killed, local_grid
from safetensors.torch import load_file, save_file
from torch import nn

import clients.body
import clients.builder
from clients.body import Body
from clients.learner import Learner
from clients.peer import Peer
from fedkd import models
from fedkd.data.appearance import Appearance
from fedkd.errors import SettingError
from fedkd.models.card import Card
from fedkd.models.resnet import resnet8
from fedkd.models.small import cnn_small
from fedkd.settings.config import RunConfig
from strategies.relay.rounds import RelayError

HEADS = {
    "models": "test_body:cnn,test_body:resnet",
    "train": "head",
    "controls": "isolated,pooled,channel",
    "pooled_model": "test_body:resnet",
}
LOOK = Appearance((0.5,), (0.5,))


def cnn(*, input_shape, num_classes):
    """Stand for a model that somebody trained: of one's own factories nobody knows."""
    return cnn_small(input_shape=input_shape, num_classes=num_classes)


def resnet(*, input_shape, num_classes):
    return resnet8(input_shape=input_shape, num_classes=num_classes)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    clients.body._memory.clear()
    yield tmp_path / "home"
    clients.body._memory.clear()


@pytest.fixture
def computed(monkeypatch):
    """How many samples went through a body."""
    counts: list[int] = []
    real = clients.body.features

    def counted(model, head, inputs, **how):
        counts.append(len(inputs))
        return real(model, head, inputs, **how)

    monkeypatch.setattr(clients.body, "features", counted)
    return counts


def images(count: int = 9) -> torch.Tensor:
    return torch.randint(256, (count, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def build(seed: int = 0) -> nn.Module:
    return models.build("cnn-small", input_shape=(1, 8, 8), num_classes=3, seed=seed)


def body(folder: Path, seed: int = 0, make=build) -> Body:
    return Body.of(lambda: make(seed), torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1)), folder)


def test_a_federation_of_heads_leaves_whole_models_whose_bodies_are_as_they_came(tmp_path):
    run = federate(tmp_path, 3, keep_models=True, **HEADS)
    summary = run.summary()
    assert all(peer["isolated"] is not None and peer["channel"] is not None for peer in summary["peers"])
    assert summary["pooled"] is not None
    for peer in summary["peers"]:
        kept = load_file(run.folder / "models" / f"{peer['peer']}.safetensors")
        index = int(peer["peer"].rpartition("-")[2])
        start = load_file(next((tmp_path / "state").rglob(f"{peer['peer']}/**/*0.safetensors")))
        changed = {name for name in kept if not torch.equal(kept[name], start[name])}
        layers = {name.rpartition(".")[0] for name in changed}
        assert len(layers) == 1, f"peer {index} changed {layers}"


def test_the_numbers_do_not_depend_on_where_features_come_from(tmp_path, home, computed):
    first = federate(tmp_path / "first", 2, **HEADS)
    assert sum(computed) > 4  # beside the probes
    on_disk = sorted(path.stat().st_mtime_ns for path in (home / ".cache/fedkd/features").glob("*.safetensors"))
    clients.body._memory.clear()
    computed.clear()
    second = federate(tmp_path / "second", 2, **HEADS)
    assert set(computed) == {2}  # nothing but probes
    assert len(on_disk) == len(list((home / ".cache/fedkd/features").glob("*.safetensors")))
    assert first.timeless_rows() == second.timeless_rows()


def test_heads_can_be_resumed(tmp_path):
    asked = {"rounds": 3, "models": "test_body:cnn", "train": "head"}
    whole = federate(tmp_path / "whole", 2, **asked)
    grid = killed(tmp_path / "cut", 2, peer=1, round=2, **asked)
    cut = federate(tmp_path / "cut", 2, grid=grid, resume=str(tmp_path / "cut" / "run"), **asked)
    assert whole.timeless_rows() == cut.timeless_rows()


def test_each_peer_trains_what_it_is_dealt(tmp_path):
    run = federate(tmp_path, 3, models="test_body:cnn", train="head,all,last:2")
    parameters = {row["peer"]: row["parameters"] for row in run.summary()["peers"]}
    whole = models.parameters_count(models.build("cnn-small", input_shape=(1, 8, 8), num_classes=10, seed=0))
    assert parameters["peer-0"] < parameters["peer-2"] < parameters["peer-1"] == whole


def test_another_way_through_the_same_weights_is_another_body(tmp_path):
    class Doubled(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.features, self.head = model[:-1], model[-1]

        def forward(self, x):
            return self.head(2 * self.features(x))

    def chain(seed):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.Linear(5, 3))

    class Plain(Doubled):
        def forward(self, x):
            return self.head(self.features(x))

    plain, doubled = (body(tmp_path, make=lambda seed, kind=kind: kind(chain(seed))) for kind in (Plain, Doubled))
    assert plain != doubled
    assert body(tmp_path) == body(tmp_path) != body(tmp_path, seed=1)


def test_features_are_of_the_weights_the_images_and_how_they_are_seen(tmp_path, computed):
    device, one = torch.device("cpu"), body(tmp_path)
    computed.clear()
    found = one.features(images(), LOOK, device)
    others = [
        body(tmp_path, seed=1).features(images(), LOOK, device),
        one.features(images().flip(0), LOOK, device),
        one.features(images(), Appearance((0.4,), (0.5,)), device),
    ]
    assert not any(torch.equal(found, other) for other in others)
    assert computed.count(9) == 4
    assert torch.equal(one.features(images(), LOOK, device), found)
    assert computed.count(9) == 4


def test_what_was_not_used_for_longest_is_forgotten(tmp_path, monkeypatch):
    device, one = torch.device("cpu"), body(tmp_path)
    one.features(images(9), LOOK, device)
    (first,) = tmp_path.glob("*.safetensors")
    monkeypatch.setattr(clients.body, "_MOST_ON_DISK", 2 * first.stat().st_size)
    os.utime(first, (1, 1))
    for count in (8, 7):
        one.features(images(count), LOOK, device)
    assert not first.exists()
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    clients.body._memory.clear()
    assert one.features(images(9), LOOK, device).shape[0] == 9


def test_features_of_private_data_are_for_their_owner_alone(tmp_path):
    folder = tmp_path / "features"
    body(folder).features(images(), LOOK, torch.device("cpu"))
    assert folder.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"train": "tail"}, "`train` to be all, head or last:N"),
        ({"train": "last:0"}, "`train` to be all, head or last:N"),
        ({"train": "head", "strategy": "fedavg"}, "`train` to be all under fedavg"),
        ({"train": "all,head", "method": "infoflow"}, "`train` to be all or last:N under infoflow"),
        ({"input-size": "32,64", "strategy": "fedavg"}, "`input-size` to be one for all under fedavg"),
        ({"input-size": "0"}, "`input-size` to be data, a number of pixels from 1 to 2048"),
    ],
)
def test_what_cannot_be_is_an_error_at_once(settings, said):
    with pytest.raises(SettingError, match=said):
        RunConfig.from_mapping(settings)


def test_a_model_without_a_head_is_an_error_before_training(tmp_path):
    with pytest.raises(RelayError, match=r"`train` to be all for the model .*headless.*no linear layer"):
        federate(tmp_path, 2, models="test_body:headless", train="head", grid=local_grid(tmp_path, 2))


def headless(*, input_shape, num_classes):
    return nn.Sequential(nn.Conv2d(input_shape[0], num_classes, input_shape[1]), nn.Flatten())


def test_peers_see_the_same_images_each_in_its_own_size(tmp_path):
    run = federate(tmp_path, 2, models="cnn-small,mlp", input_size="16,-", keep_models=True, rounds=1)
    cards = [Card.read(run.folder / "models" / f"peer-{index}.safetensors") for index in range(2)]
    assert [card.input_shape for card in cards] == [(1, 16, 16), (1, 8, 8)]
    assert np.isfinite([peer["after"] for peer in run.summary()["peers"]]).all()


def test_the_pooled_model_starts_from_the_body_that_its_peer_brought(tmp_path, monkeypatch):
    """A ceiling with a linear layer on random features is none."""
    brought = models.build("test_body:cnn", input_shape=(1, 8, 8), num_classes=10, seed=7)
    save_file(brought.state_dict(), tmp_path / "own.safetensors")
    ended = {}
    real = Peer._pooled

    def watched(peer, mail):
        monkeypatch.setattr(Learner, "ahead", lambda learner, model, epochs: ended.update(model.state_dict()))
        return real(peer, mail)

    monkeypatch.setattr(Peer, "_pooled", watched)
    asked = {"models": "test_body:cnn,mlp", "train": "head,all", "pooled_model": "test_body:cnn", "controls": "pooled"}
    federate(tmp_path, 2, checkpoints=f"{tmp_path / 'own.safetensors'},-", rounds=1, **asked)
    assert ended.keys() == brought.state_dict().keys()
    assert all(torch.equal(value, ended[name]) for name, value in brought.state_dict().items())


@pytest.mark.parametrize("train", ["head", "last:1"])
def test_a_model_that_nobody_trained_has_no_part_to_keep(tmp_path, train):
    with pytest.raises(RelayError, match=r"`train` to be all for the model resnet8: nobody trained it"):
        federate(tmp_path, 2, models="resnet8", train=train)


def test_a_run_is_not_resumed_with_another_body(tmp_path):
    asked = {"models": "test_body:cnn", "train": "head", "rounds": 3}
    for seed in (7, 8):
        model = models.build("test_body:cnn", input_shape=(1, 8, 8), num_classes=10, seed=seed)
        save_file(model.state_dict(), tmp_path / f"{seed}.safetensors")
    own = tmp_path / "own.safetensors"
    shutil.copy(tmp_path / "7.safetensors", own)
    asked["checkpoints"] = str(own)
    grid = killed(tmp_path / "cut", 2, peer=1, round=2, **asked)
    shutil.copy(tmp_path / "8.safetensors", own)
    clients.builder.body_of.cache_clear()
    with pytest.raises(RelayError, match="the part of the model that does not train changed since this run began"):
        federate(tmp_path / "cut", 2, grid=grid, resume=str(tmp_path / "cut" / "run"), **asked)


def test_a_head_with_another_name_in_the_state_dict_is_no_part_of_the_body(tmp_path):
    """As of transformers' models, whose wrapper keeps the names of what it wraps."""

    class Renamed(nn.Module):
        def __init__(self, seed):
            super().__init__()
            torch.manual_seed(3)
            self.model = nn.Sequential(nn.Flatten(), nn.Linear(64, 5))
            torch.manual_seed(seed)
            self.model.append(nn.Linear(5, 3))

        def forward(self, x):
            return self.model(x)

        def state_dict(self, *args, **kwargs):
            return self.model.state_dict(*args, **kwargs)

    assert body(tmp_path, seed=0, make=Renamed) == body(tmp_path, seed=1, make=Renamed)


def test_where_features_cannot_be_kept_they_are_computed(tmp_path, caplog):
    (tmp_path / "file").write_text("no folder")
    found = body(tmp_path / "file" / "features").features(images(), LOOK, torch.device("cpu"))
    assert torch.equal(found, body(tmp_path).features(images(), LOOK, torch.device("cpu")))
    assert "features are not kept" in caplog.text
