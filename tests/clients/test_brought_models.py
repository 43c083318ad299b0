"""Models of other libraries and checkpoints for other classes, at a deployed peer that tells nobody where they lie."""

import os

import numpy as np
import pytest
import torch
from federation import SMALL, federate
from safetensors.torch import load_file, save_file
from sites import make_sites

from clients.answering import answer
from clients.configuration import PeerConfig
from clients.own_settings import own_settings, without_paths
from clients.peer import Peer
from fedkd import models
from fedkd.errors import SettingError
from fedkd.settings.config import RunConfig
from fedkd.wire.messages import Mail, pack_mail, unpack_answer


@pytest.fixture
def site(tmp_path):
    return make_sites(tmp_path / "sites", peers=2)[0]


def ask(site, root, kind, *, run="run", **settings):
    """Send a mail to a deployed peer that lives in this process, as in its worker."""
    config = RunConfig.from_mapping({**SMALL, "pretrain-epochs": 0, **settings})
    place = PeerConfig.of_own(own_settings(site), name=site["name"], root=root, simulated=False)
    return unpack_answer(answer(pack_mail(Mail(kind, 0, config.to_mapping(), run)), place, Peer))


@pytest.fixture
def of_seven_classes(tmp_path):
    model = models.build("mlp", input_shape=(1, 8, 8), num_classes=7, seed=1)
    save_file(model.state_dict(), tmp_path / "seven.safetensors")
    return str(tmp_path / "seven.safetensors")


def test_only_its_owner_gives_a_model_a_new_head(site, tmp_path, of_seven_classes):
    site |= {"model": "mlp", "checkpoint": of_seven_classes}

    refused = ask(site, tmp_path, "introduce", **{"replace-head": True})
    taken = ask({**site, "replace-head": True}, tmp_path, "introduce", run="another")

    assert "5.weight [7, 128] instead of [10, 128]" in refused.error and "`replace-head=true`" in refused.error
    assert not taken.error


def test_a_model_of_timm_learns_beside_one_of_the_registry(tmp_path):
    run = federate(tmp_path, 2, models="timm:test_resnet,mlp", pretrain_epochs=1, rounds=1)

    assert {(row["peer"], row["model"]) for row in run.rows()} == {("peer-0", "timm:test_resnet"), ("peer-1", "mlp")}
    assert all(row["test_loss"] > 0 for row in run.rows() if row["round"] == 1)


@pytest.fixture
def vit(tmp_path):
    """Save a classifier for 8×8 images in a folder, from a seed."""
    transformers = pytest.importorskip("transformers")

    def save(seed, folder=tmp_path / "secret place" / "vit"):
        torch.manual_seed(seed)
        form = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        config = transformers.ViTConfig(**form, image_size=8, patch_size=4, num_channels=1, num_labels=10)
        transformers.ViTForImageClassification(config).save_pretrained(folder)
        return folder

    return save


@pytest.mark.slow
def test_a_classifier_of_transformers_takes_part_and_nobody_hears_where_it_lies(site, tmp_path, vit):
    site["model"] = f"hf:{vit(1)}"

    introduced, started = (ask(site, tmp_path, kind) for kind in ("introduce", "start"))

    assert not introduced.error and introduced.facts["model"] == "hf:vit"
    assert started.arrays["logits"].shape[1] == 10


@pytest.mark.slow
def test_another_model_in_the_same_folder_is_the_next_runs_start(site, tmp_path, vit):
    site["model"] = f"hf:{vit(1)}"
    first = ask(site, tmp_path, "start", run="a")
    vit(2)
    second = ask(site, tmp_path, "start", run="b")
    vit(2, tmp_path / "fresh" / "vit")
    fresh = ask({**site, "model": f"hf:{tmp_path}/fresh/vit"}, tmp_path, "start", run="c")

    assert not np.array_equal(first.arrays["logits"], second.arrays["logits"])
    np.testing.assert_array_equal(second.arrays["logits"], fresh.arrays["logits"])


def test_a_folder_in_a_peers_own_file_starts_there(tmp_path):
    (tmp_path / "vit").mkdir()
    file = tmp_path / "peer.toml"
    found = []
    for model in ("hf:vit", "hf:./gone", "hf:google/vit", "timm:resnet18"):
        file.write_text(f'name = "north"\nmodel = "{model}"\nreplace-head = true\n')
        own = own_settings({"peer-config": str(file)})
        assert own["replace-head"] is True
        found.append(own["model"])

    assert found == [f"hf:{tmp_path}/vit", f"hf:{tmp_path}/gone", "hf:google/vit", "timm:resnet18"]


def test_a_folder_is_told_by_its_setting_and_a_name_on_the_hub_as_it_is():
    said = f"no config.json in '{os.sep}ada{os.sep}vit{os.sep}config.json'"

    assert without_paths(said, {"model": "hf:/ada/vit"}) == "no config.json in '<model>'"
    assert without_paths("no google/vit there", {"model": "hf:google/vit"}) == "no google/vit there"


@pytest.mark.parametrize(
    ("settings", "trained"),
    [({}, [False, True]), ({"pretrain": "all"}, [True, True]), ({"replace_head": True}, [True, True])],
)
def test_before_round_1_only_models_that_are_not_finished_train(tmp_path, settings, trained):
    finished = models.build("mlp", input_shape=(1, 8, 8), num_classes=10, seed=5)
    save_file(finished.state_dict(), tmp_path / "own.safetensors")

    run = federate(tmp_path, 2, models="mlp", checkpoints=f"{tmp_path / 'own.safetensors'},-", rounds=1, **settings)

    seen = {row["peer"]: row["samples_seen"] for row in run.rows() if row["round"] == 0}
    assert [seen[f"peer-{index}"] > 0 for index in range(2)] == trained
    start = load_file(next((tmp_path / "state").rglob("peer-0/**/*0.safetensors")))
    assert all(torch.equal(value, start[name]) for name, value in finished.state_dict().items()) != trained[0]


@pytest.mark.parametrize(("key", "value"), [("train", "head,last:2"), ("input-size", "64,96"), ("train", "last:0")])
def test_a_peers_own_way_to_train_is_one_way(site, key, value):
    with pytest.raises(SettingError, match=f"`{key}` to be"):
        own_settings({**site, key: value})
