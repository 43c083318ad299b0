"""Nothing is chosen on what was trained on: every private sample that a model sees is counted by its index."""

import itertools
import json
from collections import Counter

import numpy as np
import pytest
import torch
from federation import federate, local_grid
from runs_on_disk import make_run
from torch import nn

from experiments.report.page import describe, write_report
from experiments.report.terminal import show
from fedkd.errors import FedkdError

PRIVATE, PROXY, TEST = 1, 2, 3
COUNT = 40
seen: dict[str, Counter] = {}
"""By "training" and "predicting": how often which private sample came by."""


class Diary(nn.Module):
    """A linear model of samples whose pixels say which they are: the kind, and the index in 1/1000."""

    def __init__(self, classes):
        super().__init__()
        self.linear = nn.Linear(4, classes)

    def forward(self, inputs):
        kinds, indices = inputs[:, 0, 0, 0].round().int(), (1000 * inputs[:, 0, 0, 1]).round().int()
        phase = seen.setdefault("training" if self.training else "predicting", Counter())
        phase.update(indices[kinds == PRIVATE].tolist())
        return self.linear(inputs.flatten(1))


def diary(*, input_shape, num_classes):
    return Diary(num_classes)


@pytest.fixture
def marked(tmp_path):
    """A data set, a proxy set and a checkpoint, all of marked samples of two classes."""
    seen.clear()

    def images(kind, count):
        found = np.zeros((count, 2, 2, 1), np.float32)
        found[:, 0, 0, 0], found[:, 0, 1, 0] = kind, np.arange(count) / 1000
        return found

    labels, test = np.arange(COUNT) % 2, images(TEST, 8)
    common = {"x_test": test, "y_test": np.arange(8) % 2, "classes": np.array(["a", "b"])}
    np.savez(tmp_path / "data.npz", x_train=images(PRIVATE, COUNT), y_train=labels, **common)
    np.savez(tmp_path / "proxy.npz", x_train=images(PROXY, 12), y_train=np.arange(12) % 2, **common)
    torch.save(Diary(2).state_dict(), tmp_path / "own.pt")
    return {
        "dataset": f"npz:{tmp_path / 'data.npz'}",
        "proxy": f"npz:{tmp_path / 'proxy.npz'}",
        "models": "test_held_out:diary",
        "pooled_model": "test_held_out:diary",
        "normalize": "none",
        "proxy_size": 12,
        "tune_temperatures": "1,4",
        "tune_weights": "0.3,0.9",
    }


def test_a_tuned_peer_and_its_controls_never_train_on_what_it_chooses_by(tmp_path, marked):
    run = federate(tmp_path, 2, regime="tuned", rounds=2, tune_every=1, controls="isolated,pooled", **marked)

    chosen_by, trained = set(seen["predicting"]), set(seen["training"])
    assert chosen_by and trained and not chosen_by & trained
    assert chosen_by | trained == set(range(COUNT))
    peers = run.summary()["peers"]
    assert sum(peer["samples"] for peer in peers) == len(trained)
    assert sum(peer["held_out"] for peer in peers) == len(chosen_by) == pytest.approx(0.2 * COUNT, abs=1)


@pytest.mark.parametrize("schedule", ["alternate", "mixed"])
@pytest.mark.parametrize("control", ["isolated", "pooled"])
def test_a_control_trains_on_no_sample_that_its_peers_held_out(tmp_path, marked, schedule, control):
    weights = {"tune_weights": "1"} if schedule == "alternate" else {}
    settings = {**marked, "regime": "tuned", "schedule": schedule, **weights}
    federate(tmp_path / "without", 2, **settings)
    by_peers = set(seen["training"])
    federate(tmp_path / "with", 2, **settings, controls=control)

    assert set(seen["training"]) == by_peers


def test_an_untuned_peer_trains_on_all_it_has(tmp_path, marked):
    run = federate(tmp_path, 2, **marked)

    assert set(seen["training"]) == set(range(COUNT)) and not seen["predicting"]
    assert [peer["held_out"] for peer in run.summary()["peers"]] == [0, 0]


def test_starts_that_trials_share_are_not_shared_with_peers_that_hold_out(tmp_path, marked):
    starts = [
        [row["test_loss"] for row in federate(tmp_path / regime, 2, regime=regime, rounds=0, **marked).rows()]
        for regime in ("vanilla", "tuned", "dml")
    ]

    assert starts[0] == starts[2] != starts[1]


@pytest.mark.parametrize("settings", [{"regime": "tuned"}, {"evaluate_on": "validation"}])
def test_a_checkpoint_without_a_known_held_out_part_is_told_with_all_results(tmp_path, marked, capsys, settings):
    run = federate(tmp_path, 2, checkpoints=f"{tmp_path / 'own.pt'},-", **settings, **marked)

    caveat = "checkpoint of peer peer-0: no held-out part is known; what is chosen on it may have been trained on"
    assert caveat in capsys.readouterr().out
    assert run.summary()["caveats"] == [caveat]
    assert json.loads((run.folder / "config.json").read_text())["caveats"] == [caveat]
    show(run.folder)
    assert caveat in capsys.readouterr().out
    page = write_report([run.folder], tmp_path / "report", describe([run.folder], command="", target=None))
    assert caveat[1:] in page.read_text()


@pytest.mark.parametrize(
    "settings",
    [
        {"checkpoints": "{}/own.pt"},
        {"regime": "tuned"},
        {"evaluate_on": "validation"},
        {"checkpoints": "{}/own.pt", "held_out": "{}/kept.txt", "regime": "tuned"},
    ],
)
def test_nothing_is_said_where_nothing_is_chosen_or_what_is_chosen_on_was_held_out(tmp_path, marked, settings):
    (tmp_path / "kept.txt").write_text("\n".join(map(str, range(20))))
    placed = {name: value.format(tmp_path) for name, value in settings.items()}

    assert federate(tmp_path, 2, **placed, **marked).summary()["caveats"] == []


def test_a_named_part_is_what_peers_choose_by_and_never_train_on(tmp_path, marked):
    named = set(range(0, COUNT, 5))
    (tmp_path / "kept.txt").write_text(" ".join(map(str, named)))
    kept = {"checkpoints": f"{tmp_path / 'own.pt'}", "held_out": f"{tmp_path / 'kept.txt'}"}

    federate(tmp_path, 2, regime="tuned", **kept, **marked)

    assert set(seen["predicting"]) == named
    assert set(seen["training"]) == set(range(COUNT)) - named


def test_validation_measures_on_the_named_part_alone(tmp_path, marked):
    named = set(range(0, COUNT, 5))
    (tmp_path / "kept.txt").write_text(" ".join(map(str, named)))
    kept = {"checkpoints": f"{tmp_path / 'own.pt'}", "held_out": f"{tmp_path / 'kept.txt'}"}

    federate(tmp_path, 2, evaluate_on="validation", validation_share=0.1, **kept, **marked)

    assert len(seen["predicting"]) == 4 and set(seen["predicting"]) <= named
    assert set(seen["training"]) == set(range(COUNT)) - named


def test_a_real_peer_names_its_own_part(tmp_path, marked):
    (tmp_path / "kept.txt").write_text("0 1 2 3")
    (tmp_path / "peer.toml").write_text('held-out = "kept.txt"\n')
    own = {"dataset": marked["dataset"], "proxy": marked["proxy"], "checkpoint": str(tmp_path / "own.pt")}
    grid = local_grid(tmp_path, 2, node_config={0: {**own, "peer-config": str(tmp_path / "peer.toml")}, 1: own})
    settings = {**marked, "dataset": "digits", "proxy": "digits"}
    run = federate(tmp_path, 2, grid=grid, regime="tuned", **settings)

    peers = {peer["peer"]: peer for peer in run.summary()["peers"]}
    assert [peers[name]["held_out"] for name in ("peer-0", "peer-1")] == [4, 8]
    assert [caveat.partition(":")[0] for caveat in run.summary()["caveats"]] == ["checkpoint of peer peer-1"]


@pytest.mark.parametrize(
    ("text", "settings", "complaint"),
    [
        ("", {}, "a file of whole numbers from 0 to 39"),
        ("1 -2", {}, "number 2 of its 2 is none"),
        ("1\n40 3", {}, "number 2 of its 3 is none"),
        ("1 9" + "9" * 5000, {}, "number 2 of its 2 is none"),
        ("1 Ada,diabetes", {}, "number 2 of its 2 is none"),
        (" ".join(map(str, range(COUNT))), {}, "some of peer-0's samples, not all"),
        ("0", {"regime": "tuned"}, "the indices of some samples of peer-"),
        ("0", {"regime": "tuned", "evaluate_on": "validation"}, "beyond what evaluate-on validation takes"),
        (None, {}, "No such file"),
    ],
)
def test_a_named_part_that_cannot_be_is_refused_in_one_line(tmp_path, marked, text, settings, complaint):
    if text is not None:
        (tmp_path / "kept.txt").write_text(text)

    with pytest.raises(FedkdError, match="`held-out`") as caught:
        federate(tmp_path, 2, held_out=f"{tmp_path / 'kept.txt'}", **settings, **marked)
    assert complaint in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 500
    assert "diabetes" not in str(caught.value)


def test_one_sample_cannot_be_held_out_and_trained_on(tmp_path, marked):
    with np.load(tmp_path / "data.npz") as all_:
        one = {name: all_[name][:1] if name in ("x_train", "y_train") else all_[name] for name in all_.files}
    np.savez(tmp_path / "one.npz", **one)
    grid = local_grid(tmp_path, 2, node_config={1: {"dataset": f"npz:{tmp_path / 'one.npz'}"}})

    with pytest.raises(FedkdError, match="`regime` to be another one: peer-1 has no two samples"):
        federate(tmp_path, 2, grid=grid, regime="tuned", **marked)


def test_a_tuned_trial_has_controls_of_its_own():
    from experiments.analysis.settings import control_group
    from fedkd.settings.config import RunConfig

    settings = RunConfig().to_mapping()
    tuned, other, more = (
        {**settings, **changed}
        for changed in ({"regime": "tuned"}, {"regime": "dml"}, {"regime": "tuned", "validation-share": 0.5})
    )
    for control, (first, second) in itertools.product(
        ("isolated", "pooled"), ((settings, tuned), (other, tuned), (tuned, more))
    ):
        assert control_group(first, control) != control_group(second, control)


def test_a_search_says_what_its_best_trial_says(tmp_path, monkeypatch):
    pytest.importorskip("optuna")
    from experiments.compare import tuning
    from experiments.launch.runner import COMPLETED, Federation, Outcome
    from fedkd.results.folder import RunFolder

    def launch(app, settings, federation, **options):
        from pathlib import Path

        for line in Path(settings["trials"]).read_text().splitlines():
            folder = make_run(Path(json.loads(line)["settings"]["out-dir"]), [[0.1], [0.5]])
            RunFolder(folder).add_facts({"caveats": ["checkpoint of peer a: doubtful"]})
        return Outcome("1", COMPLETED, "", {"app": 1.0}, ())

    monkeypatch.setattr(tuning, "launch", launch)
    lines: list[str] = []
    tuning.tune({}, Federation(peers=2), tmp_path, trials=2, out=lines.append)

    assert lines[-1] == "checkpoint of peer a: doubtful"
