"""Where a peer's time goes: counted once, believed only where it can be true, and left with the run."""

import json
from pathlib import Path

import pytest
from federation import federate

from fedkd.results import profile
from fedkd.results.folder import RunFolder
from fedkd.results.picture import profile_png
from fedkd.results.profile import PHASES, Stopwatch, by_peer, profile_table, spent


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that stands still until the test turns it."""
    now = [100.0]
    monkeypatch.setattr(profile.time, "perf_counter", lambda: now[0])
    return now


def line(peer: str, round: int, **seconds: float) -> dict[str, object]:
    return {"round": round, "peer": peer, "model": "mlp", **dict.fromkeys(PHASES, 0.0), **seconds}


def test_a_phase_within_another_counts_for_itself_alone(clock: list[float]) -> None:
    watch = Stopwatch()
    with watch.phase("other"):
        clock[0] += 1
        with watch.phase("distil"):
            clock[0] += 2
            with watch.phase("predict"):
                clock[0] += 4
            clock[0] += 8
        clock[0] += 16
    watch.add("start-up", 0.5)
    taken = {"seconds-other": 17, "seconds-distil": 10, "seconds-predict": 4, "seconds-start-up": 0.5}
    assert watch.take() == taken
    assert watch.take() == {}


def test_a_phase_counts_when_it_ends_in_an_error(clock: list[float]) -> None:
    watch = Stopwatch()
    with pytest.raises(ValueError, match="no"), watch.phase("other"), watch.phase("train"):
        clock[0] += 3
        raise ValueError("no")
    assert watch.take() == {"seconds-other": 0, "seconds-train": 3}


def test_a_device_that_works_on_is_waited_for_at_every_turn() -> None:
    settled: list[int] = []
    watch = Stopwatch(lambda: settled.append(1))
    with watch.phase("other"), watch.phase("train"):
        pass
    assert len(settled) == 4


def test_what_is_left_of_the_round_trip_is_waiting() -> None:
    found = spent({"seconds-train": 2.0, "seconds-start-up": 1.0, "accuracy": 0.5}, there_and_back=5.0)
    assert found == {**dict.fromkeys(PHASES, 0.0), "train": 2.0, "start-up": 1.0, "waiting": 2.0}
    assert spent({"seconds-train": 2.0}, there_and_back=1.0)["waiting"] == 0


@pytest.mark.parametrize("said", [-1.0, float("nan"), float("inf"), 1e300])
def test_times_that_cannot_be_are_not_believed(said: float) -> None:
    assert spent({"seconds-train": said, "seconds-distil": 1.0}, there_and_back=5.0) == {}


def test_a_peer_that_measured_nothing_has_no_profile() -> None:
    assert spent({"seconds": 3.0}, there_and_back=5.0) == {}


def test_the_table_is_a_mean_over_rounds_without_the_start() -> None:
    lines = [line("a", 0, train=99.0), line("a", 1, train=1.0), line("a", 2, train=3.0), line("b", 1, waiting=4.0)]
    assert by_peer(lines)["a"]["train"] == 2
    first, *rows = profile_table(lines).splitlines()
    assert first.split()[3:] == list(PHASES)
    assert [row.split()[0] for row in rows] == ["a", "b", "mean"]
    assert rows[-1].split()[1 + PHASES.index("train")] == "1.00"
    assert profile_table([line("a", 0)]) == ""


def test_a_run_leaves_where_its_time_went(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # A seed of its own: no start is at hand from before. Taking turns: else labels are learned in the phase `distil`.
    run = federate(tmp_path, 2, profile=True, rounds=2, seed=41, schedule="alternate", pictures=True)
    lines = RunFolder(run.folder).read_profile()
    assert [(found["round"], found["peer"]) for found in lines] == [
        (round, f"peer-{i}") for round in range(3) for i in range(2)
    ]
    for found, row in zip(lines, run.rows(), strict=True):
        own = sum(found[phase] for phase in PHASES if phase not in ("start-up", "waiting"))
        assert 0 < own <= row["seconds"]
        assert found["waiting"] >= 0 and found["start-up"] > 0
    assert all(found["distil"] > 0 and found["decode"] > 0 for found in lines if found["round"] > 0)
    assert all(found[phase] > 0 for found in lines for phase in ("train", "evaluate", "predict", "encode", "store"))
    assert (run.folder / "profile.png").stat().st_size > 1000
    assert "seconds a round" in capsys.readouterr().out


def test_nothing_is_measured_unless_asked_for(tmp_path: Path) -> None:
    run = federate(tmp_path, 2, rounds=1)
    assert not list(run.folder.glob("profile.*"))


def test_a_profile_changes_no_result(tmp_path: Path) -> None:
    measured, plain = federate(tmp_path / "a", 2, profile=True), federate(tmp_path / "b", 2)
    assert measured.timeless_rows() == plain.timeless_rows()


def test_a_resumed_run_drops_what_came_after_its_last_round(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.append_profile([line("a", 0), line("a", 1), line("a", 2)])
    with (tmp_path / "profile.jsonl").open("a") as file:
        file.write('{"round": 3, "peer": "a", "tr')
    folder.rewind(1)
    assert [found["round"] for found in folder.read_profile()] == [0, 1]


def test_the_figure_takes_any_name(tmp_path: Path) -> None:
    lines = [json.loads(json.dumps(line("$\\alpha$", 1, train=1.0)))]
    profile_png(tmp_path / "profile.png", lines, title="$x^")
    assert (tmp_path / "profile.png").exists()
