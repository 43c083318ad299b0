"""The scripts for a GPU machine without a network, beside commands that stand in for those of such a machine."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from processes import still_running

KIT = Path(__file__).parents[2] / "experiments" / "bench" / "gpu_kit"


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Return a folder with the kit, whose packages need not be unpacked, and with commands that do nothing."""
    for name in ("check.sh", "judge.py"):
        shutil.copy(KIT / name, tmp_path)
    (tmp_path / "unpack.sh").touch()
    (tmp_path / "bin").mkdir()
    command(tmp_path, "nvidia-smi", "exit 9")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path


def command(machine, name, text):
    path = machine / "bin" / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@pytest.mark.parametrize(
    ("said", "verdict"),
    [("nothing is wrong", "ok: nothing is wrong"), ("wrong: no torch", "wrong: no torch"), ("Traceback", "NO END")],
)
def test_the_summary_has_the_doctors_verdict_or_that_there_is_none(machine, said, verdict):
    command(machine, "fedkd", f"echo '{said}'")

    done = subprocess.run(["bash", str(machine / "check.sh"), "60", "b"], capture_output=True, text=True)

    summary = (machine / "out" / "summary.txt").read_text().splitlines()
    assert [line.strip() for line in summary[1:]] == [verdict] and verdict in done.stdout


def test_a_check_that_is_stopped_leaves_nothing_that_watches_the_gpu(machine):
    command(machine, "nvidia-smi", f"echo $$ > {machine}/pid\nexec sleep 600")
    command(machine, "fedkd", f"touch {machine}/began\nexec sleep 2")
    with subprocess.Popen(["bash", str(machine / "check.sh"), "60", "b"], stdout=subprocess.DEVNULL) as check:
        while not (machine / "pid").exists() or not (machine / "began").exists():
            assert check.poll() is None
        watching = psutil.Process(int((machine / "pid").read_text()))
        check.terminate()
    alive = still_running([watching])
    for process in alive:
        process.kill()
    assert not alive


def run_of(folder, *rows):
    folder.mkdir()
    (folder / "rounds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def row(accuracy, *, round=0, **more):
    return {"round": round, "peer": "a", "test_accuracy": accuracy, "ece": 0.1, "seconds": 1.0, "run": "x", **more}


def judged(*words):
    return subprocess.check_output([sys.executable, KIT / "judge.py", *words], text=True)


def test_two_runs_are_the_same_but_for_times_or_the_first_difference_is_named(tmp_path):
    one = run_of(tmp_path / "one", row(0.5), row(0.6, round=1))
    again = run_of(tmp_path / "again", row(0.5, seconds=9.0, run="y"), row(0.6, round=1))
    other = run_of(tmp_path / "other", row(0.5), row(0.6, round=1, ece=0.2))
    short = run_of(tmp_path / "short", row(0.5))

    assert judged("same", again, one).startswith("ok: again against one: 2 rows")
    assert "the first in round 1, a, ece: 0.2 and 0.1" in judged("same", other, one)
    assert judged("same", other, one, "0").startswith("ok")
    assert judged("same", short, one).startswith("DIFFERS")
    assert judged("same", tmp_path / "none", one).startswith("NOT JUDGED")


def test_accuracies_are_set_side_by_side_at_the_start_and_at_the_last_common_round(tmp_path):
    one = run_of(tmp_path / "one", row(0.5), row(0.6, round=1))
    longer = run_of(tmp_path / "longer", row(0.5), row(0.62, round=1), row(0.99, round=2))
    worse = run_of(tmp_path / "worse", row(0.5), row(0.4, round=1))

    assert judged("accuracy", longer, one).startswith("ok: longer against one")
    assert "round 1: 62.0 % against 60.0 %" in judged("accuracy", longer, one)
    assert judged("accuracy", worse, one).startswith("LOOK")
