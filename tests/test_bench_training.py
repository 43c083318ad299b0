"""The benchmarks of training: that they run and what they leave, never how fast it was."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments import bench_gpu, bench_loop
from experiments.project import OWN_FOLDER

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
    command = [sys.executable, "-m", "experiments.plain_loop", str(tmp_path / "data.npz"), "--models=mlp,cnn-small"]
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
    bench_gpu.main(tmp_path / "gpu.json")
    assert "no GPU" in capsys.readouterr().out
    content = figures(tmp_path / "gpu.json")
    assert content["ratio"] is None and "32 peers of resnet18" in str(content["missing"])


def test_the_bare_loop_of_the_gpu_runs_on_a_cpu() -> None:
    assert bench_gpu.bare_loop(bench_gpu.QUICK, "cpu") > 0


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
    assert "the figures say nothing about" in str(content["device"]) and "no GPU" in capsys.readouterr().out
