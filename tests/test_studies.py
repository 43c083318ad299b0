import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from experiments.recipe import plan, read
from experiments.studies import slices
from experiments.studies.__main__ import fill
from experiments.studies.gather import gather
from experiments.studies.tables import TABLES, render
from fedkd.models.registry import build
from tests.runs_on_disk import make_run

ROOT = Path(__file__).parent.parent
STUDIES = ROOT / "experiments" / "studies"
PAGE = ROOT / "docs" / "results.md"


def test_every_table_of_the_page_is_what_its_csv_file_says():
    text = PAGE.read_text()

    assert fill(text, PAGE.with_suffix("")) == text
    assert set(re.findall(r"<!-- table: ([a-z0-9-]+) -->", text)) == set(TABLES)


@pytest.mark.parametrize("recipe", sorted(STUDIES.glob("*.toml")), ids=lambda path: path.stem)
def test_the_csv_file_of_a_study_holds_every_trial_of_its_recipe(recipe):
    trials = plan(read(recipe))
    frame = pd.read_csv(PAGE.with_suffix("") / f"{recipe.stem}.csv")

    assert (frame["round"] == 0).sum() == len(trials)
    assert sorted(frame["seed"].unique()) == [0, 1, 2]


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


def test_a_comparison_becomes_one_row_for_each_trial_and_measured_round(tmp_path):
    for divergence, end in [("kl", 0.6), ("sed", 0.8)]:
        for seed in (0, 1):
            path = tmp_path / "trials" / f"{divergence}-{seed}"
            make_run(path, [[0.2, 0.4], [end, end + 0.1]], divergence=divergence, seed=seed)

    frame = gather(tmp_path)

    assert list(frame["divergence"]) == ["kl"] * 4 + ["sed"] * 4
    last = frame[(frame["divergence"] == "sed") & (frame["seed"] == 1) & (frame["round"] == 1)].iloc[0]
    assert last["accuracy"] == pytest.approx(0.85) and last["worst"] == 0.8 and last["spread"] == pytest.approx(0.05)
    assert last["nll"] == pytest.approx(0.15) and last["bytes"] == 4000 and last["isolated"] == 0.4
    assert [last[f"isolated_{name}"] for name in ("ece", "nll", "brier")] == pytest.approx([0.2, 0.6, 0.6])


def test_a_target_that_was_never_reached_stays_in_the_table(tmp_path):
    ways = [("cold", [0.1, 0.5, 1.0]), ("distilled", [0.1, 0.2, 0.3])]
    rows = [
        {"partition": partition, "strategy": "fedavg", "fedavg-start": start, "codec": None, "seed": seed,
         "round": round, "accuracy": accuracy, "bytes": 1e6 * (round + 1)}
        for partition in ("iid", "dirichlet")
        for start, curve in ways
        for seed in (0, 1)
        for round, accuracy in enumerate(curve)
    ]  # fmt: skip
    pd.DataFrame(rows).to_csv(tmp_path / "rounds.csv", index=False)

    text = render("rounds-iid", tmp_path)

    cold, distilled = (line for line in text.splitlines() if line.startswith("| FedAvg"))
    assert "| 2 | 3.00 MB |" in cold
    assert distilled.count("not reached") == 4
    assert "2 → not reached" in render("saved", tmp_path)


def test_a_distilled_start_is_counted_from_the_merged_model_and_its_exchange_once(tmp_path):
    ways = [("cold", [0.1, 0.5, 0.8, 1.0]), ("distilled", [0.9, 0.75, 0.75, 1.0])]
    rows = [
        {"partition": partition, "strategy": "fedavg", "fedavg-start": start, "codec": None, "seed": 0,
         "round": round, "accuracy": accuracy, "bytes": 1e6}
        for partition in ("iid", "dirichlet") for start, curve in ways for round, accuracy in enumerate(curve)
    ]  # fmt: skip
    pd.DataFrame(rows).to_csv(tmp_path / "rounds.csv", index=False)

    lines = render("saved", tmp_path).splitlines()

    assert "| iid | 70.0 % | 2 → 1 | 50 % | 100 % |" in lines
    assert "| iid | 90.0 % | 3 → 3 | 0 % | 33 % |" in lines
