"""The benchmarks of training: that they run and what they leave, never how fast it was."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from processes import still_running

from experiments.bench import gpu as bench_gpu
from experiments.bench import gpu_rows
from experiments.bench import loop as bench_loop
from experiments.bench.benchmarks import bench
from experiments.bench.gpu_watch import Watch
from experiments.launch.project import OWN_FOLDER
from experiments.launch.runner import COMPLETED, Outcome
from fedkd.errors import SettingError

HAS_FASHION = Path(os.environ.get("FEDKD_DATA", "-"), "FashionMNIST").is_dir()
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def figures(path: Path) -> dict[str, object]:
    content = json.loads(path.read_text())
    assert {"machine", "versions", "ratio"} <= content.keys()
    return content


@pytest.mark.slow
def test_the_plain_loop_learns_patterns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEDKD_DATA", raising=False)
    arrays, origin = bench_loop.images({"proxy": 100, "peers": 2, "private": 100, "test": 100})
    np.savez(tmp_path / "data.npz", **arrays)
    command = [
        sys.executable,
        "-m",
        "experiments.bench.plain_loop",
        str(tmp_path / "data.npz"),
        "--models=mlp,cnn-small",
    ]
    options = ["--peers=2", "--proxy=100", "--rounds=3", "--seed=0", "--batch=16"]
    said = json.loads(subprocess.check_output([*command, *options], text=True, cwd=OWN_FOLDER))
    assert origin == "patterns under noise"
    assert len(said["cpu_seconds"]) == len(said["seconds"]) == 3
    assert said["accuracy"] > 0.5


@pytest.mark.skipif(not HAS_FASHION, reason="FEDKD_DATA does not name a folder with FashionMNIST/")
def test_images_are_those_of_fashion_mnist_where_they_are() -> None:
    arrays, origin = bench_loop.images({"proxy": 30, "peers": 2, "private": 10, "test": 20})
    assert origin == "Fashion-MNIST"
    assert arrays["x_train"].shape == (50, 28, 28) and arrays["y_test"].shape == (20,)


@no_gpu
def test_without_a_gpu_the_benchmark_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench_gpu.main(tmp_path / "gpu.json", actors=[1, 4], fleets=["resnet18"], compiled=False)
    assert "no GPU" in capsys.readouterr().out
    content = figures(tmp_path / "gpu.json")
    assert content["ratio"] is None
    assert list(content["missing"]) == ["bare", "resnet18/4", "resnet18/1", "trace"]
    assert "32 peers of resnet18" in content["missing"]["bare"]
    assert content["rows"] == [] and content["bare"] is content["plain"] is None  # what reads the file finds its keys


def test_the_bare_loop_of_the_gpu_runs_on_a_cpu() -> None:
    assert gpu_rows.bare_loop(gpu_rows.QUICK, "cpu") > 0


def test_the_plain_loop_and_a_run_are_counted_over_the_same_rounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = {**gpu_rows.QUICK, "peers": 2, "proxy": 30, "private": 20}
    said = json.dumps({"seconds": [9.0, 1.0, 3.0]})
    monkeypatch.setattr(gpu_rows.subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, 0, said, ""))

    def launch(app: Path, settings: dict[str, Any], federation: Any, out: Any) -> Any:
        place = Path(settings["out-dir"])
        place.mkdir()
        (place / "summary.json").write_text(json.dumps({"round_seconds": [5.0, 9.0, 1.0, 3.0]}))
        return Outcome("1", COMPLETED, "", {}, ())

    monkeypatch.setattr(gpu_rows, "launch", launch)
    for row in (gpu_rows.Row("plain"), gpu_rows.Row("fleet", "mixed", 1)):
        found = gpu_rows.measure(row, tmp_path, size, "cpu")
        assert found["images_per_second"] == 2 * 2 * (30 + 20) / (1 + 3)


def test_the_telling_rows_come_first_and_a_figure_after_what_it_is_set_against() -> None:
    found = gpu_rows.rows(gpu_rows.FULL, actors=(1, 2, 4, 8), fleets=("resnet18", "mixed"), compiled=(False, True))
    names = [row.name for row in found]
    assert names[0] == "bare" and names[-1] == "trace"
    assert names.index("plain") < min(i for i, name in enumerate(names) if name.startswith("mixed/"))
    compiled = [row.compiled for row in found if row.kind == "fleet"]
    assert compiled == sorted(compiled)  # minutes of compiling cost no other row its time
    assert len(names) == len(set(names)) == 2 * 2 * 4 + 3
    assert [gpu_rows.Row.parse(name) for name in names] == found


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"fleets": ["resnet19"]}, "`--fleet` to be of mixed"),
        ({"actors": [4, 0]}, "`--actors` to be whole numbers >= 1"),
        ({"seconds": 0.0}, "`--seconds` to be a number above 0"),
    ],
)
def test_a_row_that_does_not_exist_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingError) as refused:
        bench_gpu.main(quick=True, **options)
    assert said in str(refused.value)


def test_what_does_not_fit_is_said_to_be_missing_and_the_rest_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measured = {"bare": {"images_per_second": 200.0}, "plain": {"images_per_second": 50.0}, "mixed/2": "out of memory"}
    left: list[Any] = []

    def run(row: gpu_rows.Row, folder: Path, size: gpu_rows.Size, device: str, limit: float) -> Any:
        path = tmp_path / "gpu.json"
        left.append(json.loads(path.read_text()) if path.exists() else None)
        return measured.get(row.name, {"images_per_second": 100.0})

    monkeypatch.setattr(bench_gpu, "_run", run)
    monkeypatch.setitem(bench_gpu._LEAST, "trace", 1e9)
    bench_gpu.main(tmp_path / "gpu.json", quick=True, actors=[1, 2], seconds=1000)
    content = json.loads((tmp_path / "gpu.json").read_text())
    assert content["ratio"] == 0.5 and content["plain_ratio"] == 2.0
    assert content["missing"]["mixed/2"] == "out of memory" and content["missing"]["trace"].startswith("no time: ")
    assert [(row["fleet"], row["actors"]) for row in content["rows"]] == [("mixed", 1)]
    before, bare, plain, failed = left  # a row's figures lie in the file before the next one runs
    assert before is None and (bare["bare"], bare["plain"], plain["plain"]) == (200.0, None, 50.0)
    assert list(failed["missing"]) == ["mixed/2"] and failed["rows"] == []
    assert "MISSING: out of memory" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("option", "typed"),
    [({"actors": [1]}, "--actors"), ({"fleets": ["mixed"]}, "--fleet"), ({"compiled": False}, "--plain")],
)
def test_options_of_one_benchmark_are_refused_by_the_others(option: dict[str, Any], typed: str) -> None:
    with pytest.raises(SettingError, match=f"`{typed}` to be left out: it is of `bench gpu`"):
        bench("losses", None, quick=True, options=option)


def test_a_fleet_that_is_named_twice_is_measured_once() -> None:
    asked = {"actors": (1,), "compiled": (False,)}
    assert gpu_rows.rows(gpu_rows.FULL, fleets=("mixed", "mixed"), **asked) == gpu_rows.rows(
        gpu_rows.FULL, fleets=("mixed",), **asked
    )


def test_nothing_watches_the_gpu_any_more_when_a_benchmark_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nvidia-smi").write_text(
        f"#!/bin/sh\necho $$ > {tmp_path}/pid\necho '[N/A], 3'\necho 100, 7\nexec sleep 600\n"
    )
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with Watch() as watch:
        while not watch.samples:
            pass
    assert watch.since(0)["peak_mib"] == 100
    assert not psutil.pid_exists(int((tmp_path / "pid").read_text()))


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_row_ends_with_its_time_or_with_the_benchmark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interrupted: bool
) -> None:
    begun: list[Any] = []
    communicate = subprocess.Popen.communicate

    def once(process: Any, *arguments: Any, **options: Any) -> Any:
        begun.append(process)
        if interrupted and len(begun) == 1:
            raise KeyboardInterrupt
        return communicate(process, *arguments, **options)

    (tmp_path / "row").write_text("#!/bin/sh\nexec sleep 600\n")
    (tmp_path / "row").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "row"))
    monkeypatch.setattr(subprocess.Popen, "communicate", once)
    measured = (gpu_rows.Row("plain"), tmp_path, gpu_rows.QUICK, "cpu", 0.01)
    if interrupted:
        with pytest.raises(KeyboardInterrupt):
            bench_gpu._run(*measured)
    else:
        assert bench_gpu._run(*measured) == "not done in 0 s"
    alive = begun[0].poll() is None
    begun[0].kill()
    assert not alive


def title(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []


def test_a_row_that_is_given_up_leaves_no_loop_behind(tmp_path: Path) -> None:
    size = {**gpu_rows.QUICK, "rounds": 10**9}
    np.savez(tmp_path / "data.npz", **gpu_rows.images(size))
    command = [
        sys.executable,
        "-m",
        "experiments.bench.gpu_rows",
        "--row=plain",
        f"--folder={tmp_path}",
        "--device=cpu",
    ]
    with subprocess.Popen([*command, f"--size={json.dumps(size)}"], cwd=OWN_FOLDER) as row:
        while not (
            loops := [
                child for child in psutil.Process(row.pid).children() if "experiments.bench.plain_loop" in title(child)
            ]
        ):
            assert row.poll() is None
        row.terminate()
    alive = still_running(loops)
    for process in alive:
        process.kill()
    assert not alive


@pytest.mark.flower
def test_bench_loop_sets_two_runs_against_the_plain_loop(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench_loop.main(tmp_path / "loop.json", quick=True)
    content = figures(tmp_path / "loop.json")
    (turn,) = content["turns"]
    assert content["ratio"] == turn["default"]["cpu_seconds"] / turn["plain"]["cpu_seconds"]
    assert content["fast_ratio"] == turn["fast"]["cpu_seconds"] / turn["plain"]["cpu_seconds"]
    assert all(0 < turn[way]["accuracy"] <= 1 for way in bench_loop.WAYS)
    assert "over plain" in capsys.readouterr().out


@no_gpu
@pytest.mark.flower
def test_bench_gpu_exercises_its_code_on_the_cpu_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bench_gpu.main(tmp_path / "gpu.json", quick=True)
    content = figures(tmp_path / "gpu.json")
    (row,) = content["rows"]
    assert content["ratio"] == row["images_per_second"] / content["bare"]
    assert content["plain_ratio"] == row["images_per_second"] / content["plain"]
    assert content["missing"] == {} and {line["phase"] for line in content["trace"]} == {
        "train", "distil", "both", "predict",
    }  # fmt: skip
    assert "the figures say nothing about" in str(content["device"]) and "no GPU" in capsys.readouterr().out
