"""The real thing: `fedkd run` through `flwr run`, a SuperLink and Ray actors."""

import json
import os
import subprocess
import sys
import textwrap

import pytest

pytestmark = pytest.mark.flower

SMALL = ["models=mlp,cnn-small", "proxy-size=60", "pretrain-epochs=2", "rounds=2", "distill-epochs=1", "partition=iid"]


def fedkd(folder, *words):
    return subprocess.run(
        [sys.executable, "-m", "experiments", "run", *words],
        cwd=folder, capture_output=True, text=True, timeout=240, check=False,
        env={**os.environ, "PYTHONPATH": str(folder)},
    )  # fmt: skip


def timeless_rows(folder):
    lines = (folder / "rounds.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in ("seconds", "run")} for line in lines]


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


TRIALS = {
    "averaged": {},
    "averaged-ring-sealed": {"topology": "ring", "sealed": True, "codec": "fp16"},
    "pairwise": {"strategy": "pairwise", "matching": "round-robin", "regime": "dml"},
    "gossip": {"strategy": "gossip", "gossip-style": "push-pull"},
    "gossip-async": {"strategy": "gossip", "mode": "async", "updates": 7},
    "fedmd": {"strategy": "consensus"},
    "ds-fl": {"strategy": "consensus", "consensus": "ds-fl"},
    "fedavg": {"strategy": "fedavg", "fedavg-model": "mlp"},
    "fedavg-distilled": {"strategy": "fedavg", "fedavg-model": "mlp", "fedavg-start": "distilled"},
    "fedavg-pretrained": {"strategy": "fedavg", "fedavg-model": "mlp", "fedavg-start": "pretrained"},
    "infoflow": {"method": "infoflow"},
    "sleeper": {"models": "mlp,sleeper:model", "round-timeout": 4.0, "rounds": 4, "schedule": "alternate"},
}
"""One Ray and one start-up for all strategies; the sleeper comes last, since its actor is busy for long."""

SLEEPER = """
    import time
    import torch
    from torch import nn

    class Sleeper(nn.Module):
        \"\"\"Sleeps once, in the first batch of round 2; counts its batches in its state.\"\"\"

        def __init__(self, inputs, classes):
            super().__init__()
            self.linear = nn.Linear(inputs, classes)
            self.register_buffer("batches", torch.zeros((), dtype=torch.int64))

        def forward(self, x):
            if self.training:
                self.batches += 1
                if self.batches == {batch}:
                    time.sleep(30)
            return self.linear(x.flatten(1))

    def model(*, input_shape, num_classes):
        return Sleeper(torch.Size(input_shape).numel(), num_classes)
"""


def test_every_strategy_runs_on_ray_and_a_peer_that_sleeps_costs_its_round_the_timeout_only(tmp_path):
    batches = -(-460 // 32)  # of a third of the digits that are left for the peers
    first_of_round_2 = 2 * batches + (2 + batches) + 1
    (tmp_path / "sleeper.py").write_text(textwrap.dedent(SLEEPER.replace("{batch}", str(first_of_round_2))))
    lines = [
        {"name": name, "settings": {"out-dir": str(tmp_path / name), "controls": "", **own}}
        for name, own in TRIALS.items()
    ]
    (tmp_path / "trials.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    run = fedkd(tmp_path, "--peers", "3", *SMALL, "trials=trials.jsonl")

    assert run.returncode == 0, run.stdout + run.stderr
    for name in TRIALS:
        rows = timeless_rows(tmp_path / name)
        problems = {(row["peer"], row["round"], row["status"], row["error"]) for row in rows if row["status"] != "ok"}
        if name == "sleeper":
            assert {(peer, status) for peer, _, status, _ in problems} == {("peer-1", "late")}
            assert {round for _, round, _, _ in problems} == {2, 3, 4}
        else:
            assert not problems, name
        assert (tmp_path / name / "summary.json").exists()
    seconds = json.loads((tmp_path / "sleeper" / "summary.json").read_text())["totals"]["seconds"]
    assert 4 < seconds < 30  # one timeout, not the sleep
