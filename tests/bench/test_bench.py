"""Every benchmark runs at a small size and leaves figures that can be read by a program; never how fast it was."""

import json
import math
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from runs_on_disk import make_run

from experiments.analysis.settings import control_group
from experiments.bench import accuracy as bench_accuracy
from experiments.bench import augment as bench_augment
from experiments.bench import bytes as bench_bytes
from experiments.bench import losses as bench_losses
from experiments.bench import measuring
from experiments.bench import robust as bench_robust
from experiments.bench import scale as bench_scale
from experiments.bench.benchmarks import bench
from experiments.compare.recipe import plan
from fedkd.errors import FedkdError, SettingError
from fedkd.settings.config import RunConfig
from fedkd.wire.codecs import codec, encoded_bytes


def figures(name, path):
    bench(name, path / "figures.json", quick=True)
    found = json.loads((path / "figures.json").read_text())
    assert found["machine"]["cpus"] >= 1 and found["machine"]["memory_gib"] > 0
    assert {"fedkd", "python", "numpy", "flwr", "torch"} <= found["versions"].keys() and "commit" in found
    assert math.isfinite(found["ratio"]) and found["ratio"] > 0
    return found


def test_wire_times_every_codec_and_tells_the_bytes_it_really_sends(tmp_path, capsys):
    import numpy as np

    found = figures("wire", tmp_path)

    shape = tuple(found["shape"])
    for row in found["rows"]:
        assert all(row[f"{step}_gb_s"] > 0 for step in ("encode", "decode", "travel"))
        if "zstd" not in row["codec"]:
            sent = codec(row["codec"]).encode(np.zeros(shape, np.float32))
            assert row["bytes"] == encoded_bytes(sent)
    assert {"fp32", "fp16", "int8", "topk:5"} <= {row["codec"] for row in found["rows"]}
    assert "topk:5" in capsys.readouterr().out


def test_what_augmenting_adds_is_told_for_each_way(tmp_path, capsys):
    found = figures("augment", tmp_path)

    assert [row["way"] for row in found["rows"]] == list(bench_augment.WAYS)
    assert found["rows"][0]["ratio"] == 1 and found["ratio"] == found["rows"][1]["ratio"]
    assert "crop-flip" in capsys.readouterr().out


def test_losses_leave_the_facts_and_how_the_slowest_stands_beside_plain_pytorch(tmp_path, capsys):
    found = figures("losses", tmp_path)

    assert {row["loss"] for row in found["rows"]} == set(bench_losses.LOSSES)
    assert found["ratio"] == max(row["ours_to_plain"] for row in found["rows"])
    assert "bdkd" in capsys.readouterr().out


def trial(attack, attackers, robust, accuracy, weighing="uniform"):
    return {"attack": attack, "attackers": attackers, "weighing": weighing, "robust": robust, "accuracy": accuracy}


def test_the_ratio_of_defences_is_that_of_the_attack_against_which_they_help_least():
    rows = [
        trial("none", 0.0, "none", 0.8),
        trial("flip", 0.2, "none", 0.79),
        trial("flip", 0.2, "median", 0.6),
        trial("flip", 0.2, "agreement", 0.72),
        trial("flip", 0.4, "median", 0.4),
        trial("flip", 0.4, "agreement", 0.2),
    ]

    assert bench_robust._kept(rows) == pytest.approx(0.5)


def test_a_trial_of_the_benchmark_of_liars_is_not_run_again_and_never_taken_for_another(tmp_path):
    place = tmp_path / "flip-0.2-uniform-none"
    assert not bench_robust._finished(place, {"rounds": 1})

    make_run(place, [[0.1], [0.5]])
    settings = json.loads((place / "config.json").read_text())["settings"]

    assert bench_robust._finished(place, {"rounds": settings["rounds"]})
    with pytest.raises(FedkdError, match=r"was run with rounds=.*, not 77: take another --folder"):
        bench_robust._finished(place, {"rounds": 77})


def test_the_tables_of_liars_hold_every_trial_whatever_their_order(tmp_path, monkeypatch, capsys):
    def finished(place, settings):
        return True

    monkeypatch.setattr(bench_robust, "_finished", finished)
    monkeypatch.setattr(bench_robust, "_honest", lambda place, plan: 0.25 + 0.5 * plan["attackers"])
    monkeypatch.setattr(bench_robust, "read_run", lambda place: SimpleNamespace(environment={"commit": "c"}))

    bench("robust", tmp_path / "f.json", quick=False, options={"folder": tmp_path / "kept"})

    rows = json.loads((tmp_path / "f.json").read_text())["rows"]
    scenes = 1 + len(bench_robust.ATTACKS) * len(bench_robust.SHARES)
    assert len(rows) == scenes * (len(bench_robust.DEFENCES) + 3 * (len(bench_robust.WAYS) - 1))
    shown = capsys.readouterr().out
    assert shown.count("45.0%") == sum(row["attackers"] == 0.4 for row in rows)


def test_of_the_ways_to_weigh_some_can_be_chosen_and_their_trials_kept_with_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_robust, "_finished", lambda place, settings: True)
    monkeypatch.setattr(bench_robust, "_honest", lambda place, plan: 0.5)
    monkeypatch.setattr(bench_robust, "read_run", lambda place: SimpleNamespace(environment={"commit": "c"}))
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "bench.json").write_text(json.dumps({"fedkd bench": "robust"}))
    (tmp_path / "kept" / "flip-0.4-entropy-none").mkdir()

    options = {"folder": tmp_path / "kept", "ways": ("discrimination",)}
    bench("robust", tmp_path / "f.json", quick=False, options=options)

    rows = json.loads((tmp_path / "f.json").read_text())["rows"]
    assert {row["weighing"] for row in rows} == {"uniform", "discrimination"}
    with pytest.raises(SettingError, match=r"`--ways` to be some of uniform, .*, but got 'loudness'"):
        bench("robust", None, quick=False, options={"ways": ("discrimination", "loudness")})


def test_a_folder_of_somebody_elses_or_of_another_benchmark_is_refused(tmp_path):
    (tmp_path / "trials.jsonl").write_text("mine")
    with pytest.raises(SettingError, match="`--folder` to be a folder without files of others"):
        bench("robust", None, quick=True, options={"folder": tmp_path})
    assert (tmp_path / "trials.jsonl").read_text() == "mine"

    with measuring.trials_folder(tmp_path / "a", "accuracy") as folder:
        (folder / "trials").mkdir()
    with measuring.trials_folder(tmp_path / "a", "accuracy", "trials") as again:
        assert again == folder
    with pytest.raises(SettingError, match="--folder"), measuring.trials_folder(tmp_path / "a", "robust"):
        pass


def test_the_folder_of_a_benchmark_is_of_those_that_keep_their_trials():
    with pytest.raises(SettingError, match="`--folder` to be left out: it is of `bench accuracy` and `bench robust`"):
        bench("losses", None, quick=True, options={"folder": "x"})


@pytest.mark.flower
def test_start_stands_beside_an_empty_app(tmp_path):
    found = figures("start", tmp_path)

    assert [row["app"] for row in found["rows"]] == ["empty", "fedkd"]
    seconds = {row["app"]: row["seconds"] for row in found["rows"]}
    assert found["more_seconds"] == pytest.approx(seconds["fedkd"] - seconds["empty"])
    assert found["ratio"] == pytest.approx(seconds["fedkd"] / seconds["empty"])
    assert all(row["cpu_seconds"] > 0 for row in found["rows"])


@pytest.mark.flower
def test_scale_tells_time_and_memory_by_the_number_of_peers(tmp_path):
    found = figures("scale", tmp_path)

    small, large = found["rows"]
    assert (small["peers"], large["peers"]) == bench_scale.QUICK_PEERS
    for row in found["rows"]:
        assert row["seconds_per_round"] == pytest.approx(row["peers"] * row["seconds_per_peer_round"])
        assert 2**20 < row["driver_peak_bytes"] < row["all_peak_bytes"]
        assert row["actor_peak_bytes"] > 2**20 and row["disk_bytes"] > 0


@pytest.mark.flower
def test_bytes_compares_codecs_with_federated_averaging(tmp_path):
    found = bench_bytes.run(quick=True)

    rows = {row["way"]: row for row in found["rows"]}
    assert rows.keys() == {
        "fp32", "fp16", *(f"fedavg, {start}, {epochs} epochs" for start in ("pretrained", "cold") for epochs in (2, 5))
    }  # fmt: skip
    assert found["targets"] == {0: pytest.approx(rows["fp32"]["best"] - bench_bytes.MARGIN)}
    assert rows["fp32"]["lost"] == 0 and rows["fp32"]["bytes"] > 0
    assert all(0 < row["best"] <= 1 for row in rows.values())


@pytest.mark.flower
def test_accuracy_tells_which_share_of_the_way_to_true_labels_each_way_to_weigh_goes(tmp_path):
    found = figures("accuracy", tmp_path)

    assert [row["way"] for row in found["rows"]] == list(bench_accuracy.WAYS)
    assert sum(found["trials_of_commits"].values()) == len(bench_accuracy.WAYS)
    for row in found["rows"]:
        assert row["seeds"] == [0] and 0 <= row["worst"] <= row["accuracy"] <= 1
        share = (row["accuracy"] - row["isolated"]) / (row["channel"] - row["isolated"])
        assert row["share"] is None if row["channel"] <= row["isolated"] else row["share"] == pytest.approx(share)
    mean, ours, counts = found["rows"]
    assert mean["before"] == ours["before"] == counts["before"] and mean["channel"] == ours["channel"]
    assert mean["bytes"] == ours["bytes"] < counts["bytes"]  # logits alone; and ten numbers a letter


def test_every_trial_of_the_benchmark_of_accuracy_belongs_to_one_scenario_and_way(tmp_path):
    """Else a row is the mean of other strategies' runs too, as of gossip's in the row of all that hear all."""
    ours = bench_accuracy
    for name in ("fashion-mnist", "cifar10"):
        (tmp_path / f"{name}.npz").touch()
    planned = plan(ours._recipe(ours.SCENARIOS, ours.SEEDS, tmp_path, quick=False))
    runs = [
        SimpleNamespace(name=trial.name, settings=RunConfig.from_mapping(trial.settings).effective().to_mapping())
        for trial in planned
    ]

    found = [
        run.name
        for scenario in ours.SCENARIOS.values()
        for way in ours.WAYS.values()
        for run in ours._of(runs, {**ours.COMMON, **scenario, **way})
    ]

    for name in ("isolated", "channel"):  # which one scenario's trials may run for another's
        having = {control_group(run.settings, name) for run in runs if name in str(run.settings["controls"]).split(",")}
        assert all(control_group(run.settings, name) in having for run in runs)
        assert any(
            not any(name in str(run.settings["controls"]).split(",") for run in ours._of(runs, {**ours.COMMON, **one}))
            for one in ours.SCENARIOS.values()
        )
    assert len(planned) == len(ours.SCENARIOS) * len(ours.WAYS) * len(ours.SEEDS)
    assert sorted(found) == sorted(run.name for run in runs)


def test_without_the_images_the_benchmark_of_accuracy_says_where_they_should_lie(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDKD_DATA", str(tmp_path))

    with pytest.raises(FedkdError, match=r"FEDKD_DATA names the folder with FashionMNIST/raw"):
        bench_accuracy.run()


def row(way, *, bytes, lost=0.0):
    return {"way": way, "bytes": bytes, "lost": lost}


def test_the_ratio_of_bytes_is_that_of_the_cheapest_codec_that_costs_no_accuracy():
    codecs = [row("fp32", bytes=100.0), row("int8", bytes=25.0, lost=0.009), row("topk:1", bytes=5.0, lost=0.03)]

    assert bench_bytes._over(1000.0, codecs) == 40
    assert bench_bytes._over(None, codecs) is None
    assert bench_bytes._over(1000.0, [row("fp32", bytes=None)]) is None


def test_without_the_images_the_benchmark_of_bytes_says_where_they_should_lie(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDKD_DATA", str(tmp_path))

    with pytest.raises(FedkdError, match=r"FEDKD_DATA.*FashionMNIST/raw"):
        bench_bytes.run()


def test_marks_note_when_a_file_has_so_many_lines_even_at_the_very_end(tmp_path):
    path = tmp_path / "rounds.jsonl"

    def write(text):
        with path.open("a") as file:
            file.write(text)

    with measuring.Marks(path, [2, 3, 6], lambda: path.read_text().count("\n")) as marks:
        write("line\n")
        write("line\n")
        deadline = time.monotonic() + 60
        while not marks.noted and time.monotonic() < deadline:
            time.sleep(0.01)
        write("line\nline\nno line yet")

    assert marks.noted == [2, 4]


def test_a_watch_counts_what_descendants_cost_even_after_their_end():
    work = """
import time
held, end = bytearray(64 * 2**20), time.process_time() + 0.2
while time.process_time() < end:
    pass
input()
"""
    with measuring.Watch() as watch:
        child = subprocess.Popen([sys.executable, "-c", work], stdin=subprocess.PIPE)
        while watch.cpu_seconds() < 0.2:
            pass
        child.communicate(b"\n")

    assert watch.costs[child.pid].cpu_seconds >= 0.2
    assert watch.peak(lambda title: "process_time" in title) > 64 * 2**20


@pytest.mark.parametrize("place", ["missing/figures.json", "."])
def test_figures_that_could_not_be_written_are_refused_before_anything_runs(tmp_path, monkeypatch, place):
    monkeypatch.setattr(bench_losses, "run", lambda quick: pytest.fail("it ran"))

    with pytest.raises(SettingError, match=r"`--json` to be a file in a folder that exists"):
        bench("losses", tmp_path / place, quick=True)


def test_an_unknown_benchmark_is_refused_with_the_known_ones():
    with pytest.raises(SettingError, match="wire"):
        bench("speed", None, quick=True)
