"""What a resident worker keeps between runs, and when it looks again."""

import shutil

import numpy as np
import pytest
from federation import SMALL
from safetensors.torch import save_file
from sites import make_sites

import clients.learner
from clients import pretrained
from clients.answering import answer
from clients.configuration import PeerConfig
from clients.data import file_versions
from clients.own_settings import own_settings
from clients.peer import Peer
from fedkd import models
from fedkd.settings.config import RunConfig
from fedkd.wire.messages import Mail, pack_mail, unpack_answer


@pytest.fixture
def site(tmp_path):
    return make_sites(tmp_path / "sites", peers=2)[0]


def ask(site, root, kind, *, run, round=0, **settings):
    """Send a mail to a deployed peer that lives in this process, as in its worker."""
    config = RunConfig.from_mapping({**SMALL, "pretrain-epochs": 1, **settings})
    place = PeerConfig.of_own(own_settings(site), name=site["name"], root=root, simulated=False)
    said = unpack_answer(answer(pack_mail(Mail(kind, round, config.to_mapping(), run)), place, Peer))
    return said


def checkpoint(path, seed):
    model = models.build("mlp", input_shape=(1, 8, 8), num_classes=10, seed=seed)
    save_file(model.state_dict(), path)
    return str(path)


def count_fits(monkeypatch):
    fitted, fit = [], clients.learner.fit
    monkeypatch.setattr(pretrained, "_kept", pretrained.OrderedDict())
    monkeypatch.setattr(clients.learner, "fit", lambda *a, **options: fitted.append(1) or fit(*a, **options))
    return fitted


def test_a_replaced_checkpoint_is_the_next_runs_start(site, tmp_path):
    site["checkpoint"] = checkpoint(tmp_path / "model.safetensors", 1)
    first = ask(site, tmp_path, "start", run="a")

    checkpoint(tmp_path / "model.safetensors", 2)
    second = ask(site, tmp_path, "start", run="b")
    checkpoint(tmp_path / "fresh.safetensors", 2)
    fresh = ask({**site, "checkpoint": str(tmp_path / "fresh.safetensors")}, tmp_path, "start", run="c")

    assert not np.array_equal(first.arrays["logits"], second.arrays["logits"])
    np.testing.assert_array_equal(second.arrays["logits"], fresh.arrays["logits"])


def test_data_that_grew_are_read_again(site, tmp_path):
    before = ask(site, tmp_path, "introduce", run="a").facts["samples"]
    path = site["dataset"].removeprefix("npz:")
    with np.load(path) as file:
        arrays = dict(file)
    arrays |= {name: np.concatenate([arrays[name], arrays[name][:7]]) for name in ("x_train", "y_train")}
    np.savez(path, **arrays)

    assert ask(site, tmp_path, "introduce", run="b").facts["samples"] == before + 7


def test_runs_on_the_same_files_share_what_was_read_and_trained(site, tmp_path, monkeypatch):
    site["checkpoint"] = checkpoint(tmp_path / "model.safetensors", 1)
    fitted = count_fits(monkeypatch)

    logits = [ask(site, tmp_path, "start", run=run).arrays["logits"] for run in ("a", "b")]

    assert len(fitted) == 1
    np.testing.assert_array_equal(*logits)


def test_a_folder_of_images_is_another_one_when_a_file_in_it_is(tmp_path):
    folder = tmp_path / "images"
    (folder / "train" / "cat").mkdir(parents=True)
    (folder / "train" / "cat" / "1.png").write_bytes(b"one")

    def versions(spec=f"folder:{folder}@8", run="a"):
        return file_versions(PeerConfig("north", 0, 1, tmp_path, tmp_path, simulated=False, dataset=spec), run)

    before = versions()
    assert versions(run="b") == before == versions(f"folder:{folder}")
    (folder / "train" / "cat" / "1.png").write_bytes(b"more")
    assert versions() != before
    shutil.rmtree(folder)
    assert versions() != before
    assert versions("hospital.data:load", run="a") != versions("hospital.data:load", run="b")


def test_a_warm_model_answers_its_own_run_alone(site, tmp_path):
    ask(site, tmp_path, "start", run="a")

    said = ask(site, tmp_path, "learn", run="b", round=1)

    assert "no state before round 1" in said.error and not said.arrays
    assert ask(site, tmp_path, "learn", run="a", round=1).error == ""
