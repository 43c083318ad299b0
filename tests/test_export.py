"""The improved model is the user's: it is left, it is as good as was said, and it loads without fedkd."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from federation import federate, local_grid
from PIL import Image
from sites import make_sites
from torch import nn
from typer.testing import CliRunner

from clients.configuration import PeerConfig
from clients.final_model import Final
from experiments.cli import app
from experiments.examples import use_model
from experiments.export import ExportError, export, find
from fedkd.data.sources import load_source
from fedkd.errors import FedkdError, SettingError
from fedkd.models.card import Card
from fedkd.settings.config import RunConfig
from fedkd.wire.messages import Mail

PEERS = 2

MEASURE = """
import sys, numpy as np, torch
model, data = sys.argv[1:]
found = np.load(data)
inputs, labels = torch.from_numpy(found["x"]).float() / 255, torch.from_numpy(found["y"])
if model.endswith(".pt"):
    logits = torch.jit.load(model)(inputs)
elif model.endswith(".pt2"):
    logits = torch.export.load(model).module()(inputs)
else:
    import onnxruntime
    logits = torch.from_numpy(onnxruntime.InferenceSession(model).run(None, {"inputs": inputs.numpy()})[0])
assert "fedkd" not in sys.modules
print((logits.argmax(dim=1) == labels).double().mean().item())
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return federate(tmp_path_factory.mktemp("run"), PEERS, rounds=2, models="mlp,resnet8")


def measured(model, tmp_path):
    """Measure a file on the raw test set by a program that knows torch and numpy alone."""
    test = load_source("digits", data_dir=tmp_path).test
    np.savez(tmp_path / "test.npz", x=test.inputs.numpy(), y=test.labels.numpy())
    command = [sys.executable, "-W", "ignore", "-c", MEASURE, str(model), str(tmp_path / "test.npz")]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.parametrize(
    "form", ["torchscript", pytest.param("pt2", marks=pytest.mark.slow), pytest.param("onnx", marks=pytest.mark.slow)]
)
def test_before_and_after_measured_again_from_disk_are_the_summarys(tmp_path, finished, form):
    if form == "onnx":
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")
    for said in finished.summary()["peers"][:: 1 if form == "torchscript" else -2]:  # the exporters of torch are slow
        states = finished.folder.parent / "state" / said["peer"]
        (start,) = states.rglob("round-000000.safetensors")
        for when, source in (("before", start), ("after", finished.folder)):
            done = export(source, peer=said["peer"], form=form, out=tmp_path / f"{said['peer']}-{when}.{form}")
            suffixed = done.file.rename(done.file.with_suffix({"torchscript": ".pt"}.get(form, f".{form}")))

            assert measured(suffixed, tmp_path) == said[when]
        about = json.loads(done.about.read_text())
        assert (about["before"], about["after"]) == (said["before"], said["after"])
        assert (
            about["classes"] == list("0123456789")
            and about["run"] == Card.read(find(finished.folder, said["peer"])).run
        )


def test_weights_alone_come_with_what_scales_their_inputs(tmp_path, finished):
    from safetensors.torch import load_file

    done = export(finished.folder, peer="peer-0", form="safetensors", out=tmp_path / "m.safetensors")

    about, weights = json.loads(done.about.read_text()), load_file(done.file)
    test = load_source("digits", data_dir=tmp_path).test
    x = (test.inputs.float() / 255 - torch.tensor(about["mean"])) / torch.tensor(about["std"])
    mine = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
    )
    mine.load_state_dict(weights)
    right = (mine(x).argmax(dim=1) == test.labels).double().mean().item()
    assert right == finished.summary()["peers"][0]["after"]


def test_the_example_classifies_an_image_without_fedkd(tmp_path, finished):
    done = export(finished.folder, peer="peer-0", form="torchscript", out=tmp_path / "model.pt")
    test = load_source("digits", data_dir=tmp_path).test
    Image.fromarray(test.inputs[0, 0].numpy()).save(tmp_path / "image.png")

    command = [sys.executable, "-W", "ignore", use_model.__file__, str(done.file), str(tmp_path / "image.png")]
    said = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path).stdout

    with torch.no_grad():
        best = torch.jit.load(str(done.file))(test.inputs[:1].float() / 255).argmax().item()
    assert said.startswith(f"{best} (")
    imports = [line for line in Path(use_model.__file__).read_text().splitlines() if "import" in line.split()]
    assert imports and not any("fedkd" in line for line in imports)


def test_nothing_is_overwritten(tmp_path, finished):
    for taken in ("model.pt", "model.pt.json"):
        place = tmp_path / taken.replace(".", "-")
        place.mkdir()
        (place / taken).write_text("mine")

        with pytest.raises(SettingError, match="not there yet"):
            export(finished.folder, peer="peer-0", form="torchscript", out=place / "model.pt")

        assert [path.read_text() for path in place.iterdir()] == ["mine"]


def test_the_command_line_says_whose_model_and_where(tmp_path, finished, monkeypatch):
    monkeypatch.chdir(tmp_path)

    done = CliRunner().invoke(app, ["export", str(finished.folder), "--peer", "peer-1"], catch_exceptions=False)

    assert done.exit_code == 0 and (tmp_path / "peer-1.pt").exists() and (tmp_path / "peer-1.pt.json").exists()
    after = finished.summary()["peers"][1]["after"]
    assert f"{after:.1%}" in done.output and "resnet8" in done.output


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"peer": None, "form": "pt2"}, "`--peer` to be one of peer-0, peer-1"),
        ({"peer": "ada", "form": "pt2"}, "`--peer` to be one of peer-0, peer-1.*'ada'"),
        ({"peer": "peer-0", "form": "pickle"}, "`--format` to be one of safetensors, torchscript, pt2, onnx"),
    ],
)
def test_what_cannot_be_exported_is_named(finished, options, words):
    with pytest.raises(SettingError, match=words):
        export(finished.folder, **options)


def test_a_factory_of_ones_own_is_found_where_one_stands(tmp_path, monkeypatch):
    (tmp_path / "nets_of_ada.py").write_text(
        "from torch import nn\n\ndef net(*, input_shape, num_classes):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))\n"
    )
    with monkeypatch.context() as running:
        running.syspath_prepend(str(tmp_path))
        run = federate(tmp_path, 2, models="nets_of_ada:net", rounds=1, keep_models=True)
    monkeypatch.delitem(sys.modules, "nets_of_ada")
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place != str(tmp_path)])
    monkeypatch.chdir(tmp_path)

    done = CliRunner().invoke(app, ["export", str(run.folder), "--peer", "peer-0"], catch_exceptions=False)

    assert done.exit_code == 0 and (tmp_path / "peer-0.pt").is_file()


def test_a_file_that_no_run_left_is_refused(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"no")
    with pytest.raises(FedkdError, match="a run of fedkd left"):
        export(tmp_path / "x.safetensors", peer=None, form="torchscript")
    with pytest.raises(ExportError, match="keep-models"):
        export(tmp_path, peer=None, form="torchscript")


# --- what is left ---


def test_a_peer_that_fails_in_the_last_rounds_leaves_the_last_state_it_reached(tmp_path):
    grid = local_grid(tmp_path, PEERS)

    def fails(partition, message):
        if partition == 1 and message.content["mail"]["round"] >= 2:
            raise RuntimeError("power cut")

    grid.fault = fails
    run = federate(tmp_path, PEERS, grid=grid, rounds=3)

    cards = [Card.read(find(run.folder, f"peer-{i}")) for i in range(PEERS)]
    assert [card.round for card in cards] == [3, 1]
    assert [card.after for card in cards] == [peer["after"] for peer in run.summary()["peers"]]


def test_a_state_that_was_not_measured_says_when_it_last_was(tmp_path):
    grid = local_grid(tmp_path, PEERS)
    grid.fault = lambda partition, message: (
        grid.nothing if message.content["mail"]["round"] >= 4 and partition else None
    )
    run = federate(tmp_path, PEERS, grid=grid, rounds=5, eval_every=2, round_timeout=0.2)

    card = Card.read(find(run.folder, "peer-1"))
    assert (card.round, card.measured_round) == (3, 2)
    assert card.after == run.summary()["peers"][1]["after"]


@pytest.mark.parametrize(
    "settings",
    [
        {"strategy": "gossip", "mode": "async", "updates": 5},
        {"strategy": "fedavg", "fedavg_model": "mlp"},
        {"strategy": "fedavg", "fedavg_model": "mlp", "fedavg_start": "distilled", "merge_epochs": 1},
    ],
    ids=["async", "fedavg", "distilled"],
)
def test_every_mode_leaves_models(tmp_path, settings):
    run = federate(tmp_path, PEERS, **settings)

    for said in run.summary()["peers"]:
        card = Card.read(find(run.folder, said["peer"]))
        assert (card.before, card.after) == (said["before"], said["after"])
        done = export(run.folder, peer=said["peer"], form="torchscript", out=tmp_path / f"{said['peer']}.pt")
        assert measured(done.file, tmp_path) == said["after"]


def test_a_run_may_keep_none(tmp_path):
    run = federate(tmp_path, PEERS, keep_models=False)

    assert not (run.folder / "models").exists() and run.summary()["models"] == ""


def site(path):
    """Return the own configuration of real peers, by their number."""
    own = make_sites(path / "sites", PEERS)
    return {i: {**of, "simulated": False, "worker": False, "state-dir": str(path / "own")} for i, of in enumerate(own)}


def test_a_real_peer_keeps_one_model_a_run_whatever_the_server_says(tmp_path):
    own, kept = site(tmp_path), tmp_path / "own" / "site-0" / "models"
    for n in (1, 2):
        grid = local_grid(tmp_path / str(n), PEERS, node_config=own)
        run = federate(tmp_path / str(n), PEERS, grid=grid, seats=PEERS, keep_models=False, proxy_size=60, rounds=n)
        shutil.rmtree(run.folder)

    assert sorted(Card.read(file).round for file in kept.iterdir()) == [1, 2]
    done = export(kept.parent, peer=None, form="torchscript", out=tmp_path / "newest.pt")
    assert done.card.round == 2
    assert {path.stat().st_mode & 0o077 for path in kept.iterdir()} == {0}


def test_a_start_that_comes_again_replaces_no_model_of_a_real_peer(tmp_path):
    grid = local_grid(tmp_path, PEERS, node_config=site(tmp_path))
    federate(tmp_path, PEERS, grid=grid, seats=PEERS, proxy_size=60, rounds=2)
    (kept,) = (tmp_path / "own" / "site-0" / "models").iterdir()
    before = kept.read_bytes()

    start = next(m for m in grid.sent if m.content["mail"]["kind"] == "start")
    grid.answer(0, start)

    assert before in [file.read_bytes() for file in kept.parent.iterdir()]


def test_a_run_token_that_looks_like_a_path_names_no_other_folder(tmp_path):
    place = PeerConfig("ada", 0, 1, tmp_path / "ada", tmp_path, simulated=False)
    final = Final(place, RunConfig(), None)

    for run in ("../../x", "a/b", "", "\x00", "."):
        assert final.path(Mail("start", 0, {}, run)).parent == tmp_path / "ada" / "models"
        assert final.path(Mail("start", 0, {}, run)).name not in (".safetensors", "..safetensors")
