import json
import math
import re
import shlex
from datetime import date
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from experiments import slices
from experiments.analysis.comparison import Comparison
from experiments.analysis.runs import read_run
from experiments.compare.recipe import plan, read
from experiments.compare.running import Compared
from experiments.studies import __main__ as commands
from experiments.studies.__main__ import fill
from experiments.studies.gather import gather, write
from experiments.studies.record import ELSEWHERE, contradictions, read_record, read_trials
from experiments.studies.tables import TABLES, render
from fedkd.errors import FedkdError
from fedkd.models.registry import build
from tests.runs_on_disk import make_run

ROOT = Path(__file__).parents[2]
STUDIES = ROOT / "experiments" / "studies"
PAGE = ROOT / "docs" / "results.md"
CSVS = sorted(PAGE.with_suffix("").glob("*.csv"))
LATER = ("backbones",)
"""Studies that are not of the papers, each of a commit of its own."""


def test_every_table_of_the_page_is_what_its_csv_file_says():
    text = PAGE.read_text()

    assert fill(text, PAGE.with_suffix("")) == text
    assert set(re.findall(r"<!-- table: ([a-z0-9-]+) -->", text)) == set(TABLES)


@pytest.mark.parametrize("recipe", sorted(STUDIES.glob("*.toml")), ids=lambda path: path.stem)
def test_the_csv_file_of_a_study_holds_every_trial_of_its_recipe(recipe):
    trials = plan(read(recipe))
    frame = pd.read_csv(PAGE.with_suffix("") / f"{recipe.stem}.csv")

    assert (frame["round"] == 0).sum() == len(trials)
    assert sorted(frame["seed"].unique()) == ([0, 1, 2, 3, 4] if recipe.stem in LATER else [0, 1, 2])


@pytest.mark.parametrize("recipe", sorted(STUDIES.glob("*.toml")), ids=lambda path: path.stem)
def test_the_record_of_a_study_says_which_commit_made_all_of_it(recipe):
    record = read_record(PAGE.with_suffix("") / f"{recipe.stem}.csv")

    (commit,) = record["commits"]
    assert re.fullmatch(r"[0-9a-f]{40}", commit)
    assert {"fedkd", "python", "torch", "flwr"} <= record["versions"].keys() and len(record["dates"]) == 2
    assert record["trials"] == len(plan(read(recipe)))
    assert f"experiments/studies/{recipe.name}" in record["command"] and "=/" not in record["command"]


def test_all_studies_of_the_papers_are_of_one_commit():
    of_papers = [path for path in CSVS if path.stem not in LATER]
    assert len({commit for path in of_papers for commit in read_record(path)["commits"]}) == 1


def test_one_configuration_has_one_number_on_all_the_page():
    assert contradictions({path.stem: read_trials(path) for path in CSVS}) == []


@pytest.mark.parametrize("recipe", sorted(STUDIES.glob("*.toml")), ids=lambda path: path.stem)
def test_what_a_study_measured_does_not_change_with_how_a_run_learns_by_default(recipe):
    found = read(recipe)
    for axes in found.grids:
        assert found.settings.keys() | axes.keys() >= {"schedule", "divergence", "distill-epochs"}
        assert "kd-weight" in found.settings.keys() | axes.keys() or found.settings["regime"] == "dml"


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32)])
def test_the_fleet_is_eight_different_models(shape):
    names = read(STUDIES / "divergences.toml").settings["models"].split(",")
    sizes = [
        sum(p.numel() for p in build(name, input_shape=shape, num_classes=10, seed=0).parameters()) for name in names
    ]

    assert len(set(sizes)) == 8


def test_a_slice_has_the_promised_size_and_is_always_the_same(tmp_path):
    rng = np.random.default_rng(1)
    y_train, y_test = np.repeat(np.arange(10), 600), np.repeat(np.arange(10), 200)
    whole = {
        "x_train": rng.integers(0, 256, (6000, 2, 2, 3), dtype=np.uint8), "y_train": rng.permutation(y_train),
        "x_test": rng.integers(0, 256, (2000, 2, 2, 3), dtype=np.uint8), "y_test": rng.permutation(y_test),
    }  # fmt: skip
    np.savez(tmp_path / "whole.npz", **whole)

    first, second = slices.cifar10(tmp_path / "whole.npz"), slices.cifar10(tmp_path / "whole.npz")

    assert np.bincount(first["y_train"]).tolist() == [500] * 10
    assert np.bincount(first["y_test"]).tolist() == [150] * 10
    assert all(np.array_equal(first[name], second[name]) for name in first)


def a_comparison(path, *, commit="c0ffee", commits=None):
    """Make a comparison's folder: two divergences under two seeds each."""
    for divergence, end in [("kl", 0.6), ("sed", 0.8)]:
        for seed in (0, 1):
            run = make_run(path / "trials" / f"{divergence}-{seed}", [[0.2, 0.4], [end, end + 0.1]],
                           divergence=divergence, seed=seed, dataset="npz:/home/me/digits.npz")  # fmt: skip
            config = json.loads((run / "config.json").read_text())
            config["environment"]["commit"] = (commits or {}).get((divergence, seed), commit)
            (run / "config.json").write_text(json.dumps(config))
    return path


def test_a_comparison_becomes_one_row_for_each_trial_and_measured_round(tmp_path):
    frame, _ = gather(a_comparison(tmp_path))

    assert list(frame["divergence"]) == ["kl"] * 4 + ["sed"] * 4
    last = frame[(frame["divergence"] == "sed") & (frame["seed"] == 1) & (frame["round"] == 1)].iloc[0]
    assert last["accuracy"] == pytest.approx(0.85) and last["worst"] == 0.8 and last["spread"] == pytest.approx(0.05)
    assert last["nll"] == pytest.approx(0.15) and last["bytes"] == 4000 and last["isolated"] == 0.4
    assert [last[f"isolated_{name}"] for name in ("ece", "nll", "brier")] == pytest.approx([0.2, 0.6, 0.6])
    assert last["samples"] == 20


def test_what_was_gathered_is_read_back_as_whole_configurations_with_the_controls_that_serve_them(tmp_path):
    frame, record = gather(a_comparison(tmp_path / "study"))
    write(frame, record, tmp_path / "study.csv")

    trials = read_trials(tmp_path / "study.csv")

    runs = [read_run(path) for path in sorted((tmp_path / "study" / "trials").iterdir())]
    free = ELSEWHERE | {"dataset", "peers"}
    for run, trial in zip(runs, trials, strict=True):
        used = {key: value for key, value in trial.settings.items() if key not in free}
        assert used == {key: value for key, value in run.settings.items() if key not in free}
        assert [p.accuracy for p in trial.curve()] == [pytest.approx(p.accuracy) for p in run.curve()]
        assert trial.controls["isolated"] == 0.4 and trial.samples == 20
    assert trials[0].settings["dataset"] == "npz:digits.npz"


def test_a_record_says_commit_versions_dates_and_command_without_this_machines_folders(tmp_path):
    a_comparison(tmp_path)
    command = "fedkd compare experiments/studies/kl.toml --out /home/me/kl data-dir=/home/me/slices"
    Comparison("KL", "", (), None, command, "", {}).write(tmp_path)

    _, record = gather(tmp_path)

    assert record["commits"] == {"c0ffee": 4} and record["trials"] == 4 and record["versions"]["torch"]
    assert record["command"] == "fedkd compare experiments/studies/kl.toml --out kl data-dir=slices"
    assert record["dates"] == [str(date.today())] * 2 or len(set(record["dates"])) == 2  # midnight in between
    assert "/home" not in json.dumps(record)


@pytest.mark.parametrize("folder", ["/home/ada", "/home/Ada L/old", "~ada", "~", "../ada"])
def test_no_folder_of_a_user_is_written_into_a_record(tmp_path, monkeypatch, folder):
    monkeypatch.setenv("HOME", "/home/ada")
    for path in (a_comparison(tmp_path) / "trials").iterdir():
        config = json.loads((path / "config.json").read_text())
        config["settings"] |= {"dataset": f"npz:{folder}/x.npz", "checkpoints": f"-, {folder}/a.pt,{folder}/b.pt"}
        (path / "config.json").write_text(json.dumps(config))
    words = [f"{folder}/kl.toml", "--out", "/home/ada", f"data-dir={folder}/slices/", f"dataset=npz:{folder}/x"]
    Comparison("KL", "", (), None, shlex.join(["fedkd", "compare", *words]), "", {}).write(tmp_path)

    _, record = gather(tmp_path)

    assert record["settings"]["dataset"] == "npz:x.npz" and record["settings"]["checkpoints"] == "-,a.pt,b.pt"
    assert shlex.split(record["command"])[2:] == ["kl.toml", "--out", "~", "data-dir=slices", "dataset=npz:x"]
    assert "ada" not in json.dumps(record).lower().replace("adam", "")


def with_dataset_of_its_own(folder, path):
    """Change where the data of the trials with sed lie; return the comparison's folder."""
    for config in folder.glob("trials/sed-*/config.json"):
        config.write_text(config.read_text().replace("/home/me/digits.npz", path))
    return folder


def test_files_that_trials_vary_are_told_by_name_alone(tmp_path):
    frame, record = gather(with_dataset_of_its_own(a_comparison(tmp_path / "one"), "/home/me/other.npz"))

    assert set(frame["dataset"]) == {"npz:digits.npz", "npz:other.npz"} and "dataset" not in record["settings"]

    with pytest.raises(FedkdError, match="files under `dataset` of different names"):
        gather(with_dataset_of_its_own(a_comparison(tmp_path / "two"), "/home/you/digits.npz"))


@pytest.mark.parametrize(
    "made", [{"commit": "c0ffee+"}, {"commit": ""}, {"commits": {("kl", 1): "beef"}}], ids=["changed", "none", "two"]
)
def test_trials_that_no_one_commit_made_are_gathered_only_when_asked_for(tmp_path, made):
    a_comparison(tmp_path, **made)

    with pytest.raises(FedkdError, match=r"one commit without changes.*--as-they-are"):
        gather(tmp_path)

    _, record = gather(tmp_path, as_they_are=True)
    assert sum(record["commits"].values()) == 4 and list(record["commits"]) != ["c0ffee"]


def test_a_table_that_was_changed_by_hand_is_noticed(tmp_path):
    write(*gather(a_comparison(tmp_path / "study")), tmp_path / "study.csv")
    text = (tmp_path / "study.csv").read_text()
    (tmp_path / "study.csv").write_text(text.replace("0.85", "0.95"))

    with pytest.raises(FedkdError, match=r"study\.json to be of study\.csv"):
        read_trials(tmp_path / "study.csv")


def study_files(folder, name, rows, **settings):
    """Write a study's files; columns that say nothing are filled in."""
    blank = {"worst": 0.1, "spread": 0.1, "ece": 0.1, "nll": 1.0, "brier": 0.5, "bytes": 1e6, "samples": 20}
    write(pd.DataFrame([{**blank, **row} for row in rows]), {"settings": settings}, folder / f"{name}.csv")


def curve(accuracies, **settings):
    return [{**settings, "round": round, "accuracy": accuracy} for round, accuracy in enumerate(accuracies)]


def test_two_numbers_for_one_configuration_are_found_whatever_else_a_study_varies(tmp_path):
    long = {"divergence": ["kl", "js"], "seed": [0, 1]}
    rows = [row for d in long["divergence"] for seed in long["seed"]
            for row in curve([0.1, 0.2, 0.3], divergence=d, seed=seed)]  # fmt: skip
    study_files(tmp_path, "long", rows, rounds=2, temperature=2.0)
    study_files(tmp_path, "short", curve([0.1, 0.2], temperature=2.0, seed=1), rounds=1, divergence="js")
    studies = {path.stem: read_trials(path) for path in tmp_path.glob("*.csv")}
    assert contradictions(studies) == []

    study_files(tmp_path, "other", curve([0.1, 0.21], temperature=2.0, seed=1), rounds=1, divergence="js")
    (sentence,) = contradictions({**studies, "other": read_trials(tmp_path / "other.csv")})
    assert "'js'" in sentence and "round 1" in sentence and "0.21" in sentence

    study_files(tmp_path, "apart", curve([0.1, 0.21], temperature=4.0, seed=1), rounds=1, divergence="js")
    assert contradictions({**studies, "apart": read_trials(tmp_path / "apart.csv")}) == []


def test_two_levels_of_one_control_are_found(tmp_path):
    for name, divergence, level in (("one", "kl", 0.4), ("other", "js", 0.5)):
        rows = curve([0.1, 0.2], seed=0, isolated=level)
        study_files(tmp_path, name, rows, rounds=1, divergence=divergence)

    (sentence,) = contradictions({name: read_trials(tmp_path / f"{name}.csv") for name in ("one", "other")})
    assert sentence.startswith("control isolated")


def test_controls_of_different_starts_are_no_two_levels_of_one(tmp_path):
    starts = (("cold", 0.4), ("pretrained", 0.5), ("distilled", math.nan))
    rows = [row for start, level in starts
            for row in curve([0.1, 0.2], seed=0, isolated=level, **{"fedavg-start": start})]  # fmt: skip
    rows += curve([0.1, 0.2], seed=0, strategy="averaged", isolated=0.6)
    study_files(tmp_path, "starts", [{"strategy": "fedavg", **row} for row in rows], rounds=1, schedule="alternate")

    trials = read_trials(tmp_path / "starts.csv")

    assert contradictions({"starts": trials}) == []
    assert [trial.controls["isolated"] for trial in trials] == [0.6] * 4  # what peers' own models reach by themselves


def fedavg(seeds, **curves):
    ways = [("cold", curves["cold"]), ("distilled", curves["distilled"])]
    return [
        {**row, "bytes": 1e6 * (row["round"] + 1)}
        for partition in ("iid", "dirichlet") for start, found in ways for seed in seeds
        for row in curve(found, partition=partition, seed=seed, **{"fedavg-start": start})
    ]  # fmt: skip


def test_a_target_that_was_never_reached_stays_in_the_table(tmp_path):
    rows = fedavg((0, 1), cold=[0.1, 0.5, 1.0], distilled=[0.1, 0.2, 0.3])
    rows += [row for seed in (0, 1) for row in curve([0.1, 0.2, 0.3], partition="iid", seed=seed, strategy="averaged")]
    study_files(tmp_path, "rounds", [{"strategy": "fedavg", **row} for row in rows], rounds=2, codec="fp16")

    text = render("rounds-iid", tmp_path)

    cold, distilled = (line for line in text.splitlines() if line.startswith("| FedAvg"))
    assert "| 2 | 3.00 MB |" in cold
    assert distilled.count("not reached") == 4
    assert "2 → not reached" in render("saved", tmp_path)


def test_a_distilled_start_is_counted_from_the_merged_model_and_its_exchange_once(tmp_path):
    rows = fedavg((0,), cold=[0.1, 0.5, 0.8, 1.0], distilled=[0.9, 0.75, 0.75, 1.0])
    study_files(tmp_path, "rounds", [{"strategy": "fedavg", **row} for row in rows], rounds=3)

    lines = render("saved", tmp_path).splitlines()

    assert "| iid | 70.0 % | 2 → 1 | 50 % | 100 % |" in lines
    assert "| iid | 90.0 % | 3 → 3 | 0 % | 33 % |" in lines


def test_calibration_without_exchange_stands_beside_that_with_it(tmp_path):
    alone = {"isolated": 0.35, "isolated_ece": 0.2, "isolated_nll": 2.0, "isolated_brier": 0.9}
    ways = [("bdkd", rule) for rule in ("sharpen_if_flat", "opposite", "none")]
    ways += [(name, "sharpen_if_flat") for name in ("jeffreys", "kl", "reverse_kl")]
    rows = [
        {**row, "ece": 0.1 + 0.01 * seed, **(alone if name == "kl" else {})}
        for name, rule in ways for seed in range(3)
        for row in curve([0.3, 0.5 + 0.01 * seed], divergence=name, seed=seed, **{"bdkd-rule": rule})
    ]  # fmt: skip
    study_files(tmp_path, "balanced", rows, rounds=1, regime="dml")

    (line,) = (line for line in render("balance", tmp_path).splitlines() if line.startswith("| isolated"))

    assert line.startswith("| isolated | 35.0 ± 0.0 | **-16.0 [") and "| 20.0 ± 0.0 | **+9.0 [" in line
    assert line.endswith("| 2.000 | 0.900 |")


def test_what_a_peer_trains_on_stands_beside_what_it_reached(tmp_path):
    rows = fedavg((0, 1), cold=[0.1, 0.5], distilled=[0.1, 0.2])
    rows += [row for seed in (0, 1) for row in curve([0.1, 0.3], partition="iid", seed=seed, strategy="averaged")]
    settings = {"rounds": 1, "codec": "fp16", "proxy-size": 60, "distill-epochs": 2, "pretrain-epochs": 3}
    study_files(tmp_path, "rounds", [{"strategy": "fedavg", **row} for row in rows], **settings)

    text = render("rounds-iid", tmp_path)

    assert re.search(r"FedAvg, cold .*\| 0 \| 20 \+ 0 \|", text)
    assert re.search(r"FedAvg, distilled .*\| 3, and 20 of one peer on the public images \| 20 \+ 0 \|", text)
    assert re.search(r"averaged, fp16 .*\| 3 \| 120 \+ 120 \|", text)


def fake_compare(made):
    """Return what leaves finished trials where a comparison would."""

    def compare(recipe, federation, folder, *, command):
        made.append(str(recipe.settings["data-dir"]))
        a_comparison(folder)
        Comparison(recipe.title, "", (), None, command, "", {}).write(folder)
        return Compared(folder, None, 4, (), 0)

    return compare


def test_one_command_runs_the_studies_and_writes_their_files_and_the_page(tmp_path, monkeypatch):
    (tmp_path / "kl.toml").write_text("[[grid]]\nseed = [0, 1]\n")
    (tmp_path / "page.md").write_text("# Page\n")
    made = []
    monkeypatch.setattr(commands, "RECIPES", tmp_path)
    monkeypatch.setattr(commands, "git_commit", lambda folder: "c0ffee")
    monkeypatch.setattr(commands, "compare", fake_compare(made))

    words = ["run", "--slices", str(tmp_path / "slices"), "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(commands.app, [*words, "--page", str(tmp_path / "page.md")], catch_exceptions=False)

    assert done.exit_code == 0 and made == [str(tmp_path / "slices")]
    assert len(read_trials(tmp_path / "page" / "kl.csv")) == 4
    record = read_record(tmp_path / "page" / "kl.csv")
    assert record["command"] == "fedkd compare experiments/studies/kl.toml --out kl data-dir=slices"


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["slices", "out"], "`--fashion-mnist` to be given, or --cifar10"),
        (["slices", "out", "--cifar10", "none.npz"], "`--cifar10` to be a file, but got 'none.npz'"),
        (["slices", "out", "--fashion-mnist", "none"], "`--fashion-mnist` to be a folder"),
        (["gather", "none", "--out", "out"], "none has no trials"),
        (["tables", "none.md"], "`PAGE` to be a page that is there"),
        (
            ["run", "speed", "--slices", ".", "--out", "out", "--page", "page.md"],
            "`NAMES` to be of backbones, .*'speed'",
        ),
        (["run", "--slices", ".", "--out", "out"], "`--page` to be a page that is there.*docs/results.md"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_run_or_written(tmp_path, monkeypatch, words, complaint):
    (tmp_path / "page.md").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(commands, "git_commit", lambda folder: "c0ffee")
    monkeypatch.setattr(commands, "compare", lambda *args, **kwargs: pytest.fail("it ran"))

    with pytest.raises(FedkdError, match=complaint):
        CliRunner().invoke(commands.app, words, catch_exceptions=False)
    assert [path.name for path in tmp_path.iterdir()] == ["page.md"]


@pytest.mark.parametrize("commit", ["c0ffee+", ""])
def test_studies_of_a_changed_clone_are_refused_before_anything_runs(tmp_path, monkeypatch, commit):
    monkeypatch.setattr(commands, "git_commit", lambda folder: commit)
    monkeypatch.setattr(commands, "compare", lambda *args, **kwargs: pytest.fail("it ran"))

    with pytest.raises(FedkdError, match="clone without changes"):
        CliRunner().invoke(
            commands.app, ["run", "--slices", ".", "--out", str(tmp_path / "out")], catch_exceptions=False
        )
