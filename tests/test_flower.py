"""The real thing: `fedkd run` through `flwr run`, a SuperLink and Ray actors."""

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.flower

SMALL = ["models=mlp,cnn-small", "proxy-size=60", "pretrain-epochs=2", "rounds=2", "distill-epochs=1", "partition=iid"]


def fedkd(folder, *words):
    return subprocess.run(
        [sys.executable, "-m", "experiments", "run", *words],
        cwd=folder, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip


def timeless_rows(folder):
    lines = (folder / "rounds.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def test_one_actor_and_two_give_the_same_numbers_and_the_results_lie_where_the_user_stood(tmp_path):
    one = fedkd(tmp_path, "--peers", "3", "--actors", "1", *SMALL, "out-dir=one")
    two = fedkd(tmp_path, "--peers", "3", "--actors", "2", *SMALL, "out-dir=two")

    assert one.returncode == two.returncode == 0, one.stdout + one.stderr + two.stdout + two.stderr
    assert timeless_rows(tmp_path / "one") == timeless_rows(tmp_path / "two")
    assert {path.name for path in (tmp_path / "one").iterdir()} >= {
        "config.json", "rounds.jsonl", "summary.json", "accuracy.png", "topology.png",
    }  # fmt: skip
    assert "flwr run" in one.stdout and "isolated" in one.stdout and "pooled" in one.stdout


def test_what_only_a_peer_can_know_is_one_clean_line_at_the_end_and_exit_status_1(tmp_path):
    run = fedkd(tmp_path, "--peers", "2", *SMALL, "partition=classes", "classes-per-peer=11")

    last = (run.stdout + run.stderr).strip().splitlines()[-1]
    assert run.returncode == 1
    assert "`classes-per-peer`" in last and "11" in last and "10" in last
    assert "Traceback" not in run.stdout + run.stderr
