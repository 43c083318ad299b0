"""`fedkd tune`: a search that goes on where it stopped, and that never looks at the test set."""

import json
from pathlib import Path

import pytest
from federation import federate
from runs_on_disk import make_run
from typer.testing import CliRunner

from experiments.cli import app
from experiments.compare import tuning
from experiments.launch.runner import COMPLETED, STOPPED, Federation, Outcome
from fedkd.errors import FedkdError, SettingError

optuna = pytest.importorskip("optuna")


@pytest.fixture
def launched(monkeypatch):
    """Replace `flwr run`: a trial's accuracy is best at temperature 4 and does not depend on the rest."""
    seen = []

    def launch(app, settings, federation, **options):
        for line in Path(settings["trials"]).read_text().splitlines():
            trial = json.loads(line)["settings"]
            seen.append(trial)
            accuracy = 1 / (1 + abs(trial["temperature"] - 4))
            make_run(Path(trial["out-dir"]), [[0.1], [accuracy]], seed=trial["seed"])
        return Outcome("1", COMPLETED, "", {"app": 1.0}, ())

    monkeypatch.setattr(tuning, "launch", launch)
    return seen


def search(folder, trials, settings=None, **options):
    return tuning.tune(settings or {}, Federation(peers=2), folder, trials=trials, out=lambda line: None, **options)


def test_the_best_is_found_and_told_with_a_command_for_the_test_set(tmp_path, launched):
    found = search(tmp_path, 24)

    best = min(launched, key=lambda trial: abs(trial["temperature"] - 4))
    assert found.trials == len(launched) == 24
    assert found.settings["temperature"] == best["temperature"]
    assert {trial["evaluate-on"] for trial in launched} == {"validation"}
    assert f"temperature={best['temperature']}" in found.command and "validation" not in found.command


def test_a_search_goes_on_where_it_stopped(tmp_path, launched):
    search(tmp_path, 3)
    search(tmp_path, 5)

    assert len(launched) == 5
    assert len({trial["temperature"] for trial in launched}) == 5
    assert search(tmp_path, 5).trials == 5 and len(launched) == 5


def test_what_a_killed_search_had_finished_counts(tmp_path, launched, monkeypatch):
    launch = tuning.launch

    def killed(app, settings, federation, **options):
        launch(app, settings, federation, **options)
        (tmp_path / "trials" / "0002-0" / "summary.json").unlink()  # in which it was killed
        raise KeyboardInterrupt

    monkeypatch.setattr(tuning, "launch", killed)
    with pytest.raises(KeyboardInterrupt):
        search(tmp_path, 3)
    monkeypatch.setattr(tuning, "launch", launch)

    assert search(tmp_path, 3).trials == 3
    assert len(launched) == 4


def test_ctrl_c_ends_a_search_with_the_status_of_its_signal(tmp_path, monkeypatch):
    stopped = Outcome("1", STOPPED, "stopped by SIGINT", {"app": 1.0}, (), signal=2)
    monkeypatch.setattr(tuning, "launch", lambda *a, **o: stopped)

    result = CliRunner().invoke(app, ["tune", "--out", str(tmp_path)])

    assert (result.exit_code, result.stderr) == (130, "error: stopped by SIGINT\n")


def test_every_trial_runs_under_every_seed(tmp_path, launched):
    search(tmp_path, 2, {"seed": 7}, seeds=3)

    assert sorted(trial["seed"] for trial in launched) == [7, 7, 8, 8, 9, 9]


def test_a_study_about_other_settings_is_not_mixed_up(tmp_path, launched):
    search(tmp_path, 1)

    with pytest.raises(FedkdError, match=r"other settings: rounds.*--out"):
        search(tmp_path, 2, {"rounds": 3})


def test_a_study_from_before_a_default_changed_is_not_gone_on_with(tmp_path, launched, monkeypatch):
    """It wrote down only what was typed: the rest were the defaults of its time."""
    monkeypatch.setattr(tuning, "_meant", lambda settings: {"weighing": settings.get("weighing", "discrimination")})
    search(tmp_path, 1)
    studied = optuna.load_study(
        study_name="fedkd",
        storage=optuna.storages.JournalStorage(
            optuna.storages.journal.JournalFileBackend(str(tmp_path / tuning._STUDY))
        ),
    )
    studied.set_user_attr("meant", None)

    with pytest.raises(FedkdError, match=r"other settings: weighing\. Take another --out"):
        search(tmp_path, 2)

    assert len(launched) == 1


def test_a_weight_is_searched_only_where_it_has_an_effect(tmp_path, launched):
    search(tmp_path / "mixed", 1)
    search(tmp_path / "alone", 1, {"schedule": "alternate"})
    search(tmp_path / "sgd", 1, {"schedule": "alternate", "optimizer": "sgd"})
    search(tmp_path / "published", 1, {"strategy": "consensus", "optimizer": "sgd"})  # a weight would mix its losses

    assert ["kd-weight" in trial for trial in launched] == [True, False, True, False]


@pytest.mark.parametrize(
    ("settings", "options", "complaint"),
    [
        ({"evaluate-on": "test"}, {}, "`evaluate-on`.*validation"),
        ({"regime": "tuned"}, {}, "`regime`.*vanilla"),
        ({"divergence": 3}, {}, "`divergence`"),
        ({}, {"seeds": 0}, "`--seeds`.*>= 1"),
    ],
)
def test_a_mistake_is_refused_before_anything_runs(tmp_path, launched, settings, options, complaint):
    with pytest.raises(SettingError, match=complaint):
        search(tmp_path, 1, settings, **options)
    assert not launched


def test_a_search_in_which_nothing_finishes_says_where_to_look(tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "launch", lambda *a, **o: Outcome("1", COMPLETED, "", {"app": 1.0}, ()))

    with pytest.raises(FedkdError, match=r"no trial finished.*error\.txt"):
        search(tmp_path, 1)


def test_validation_samples_are_taken_from_the_peers_and_differ_from_the_test_set(tmp_path):
    test = federate(tmp_path / "a", 2, rounds=0)
    held_out = federate(tmp_path / "b", 2, rounds=0, evaluate_on="validation", validation_share=0.25)

    samples = [sum(peer["samples"] for peer in run.summary()["peers"]) for run in (test, held_out)]
    assert samples[1] == pytest.approx(0.75 * samples[0], abs=1)
    assert [sum(json.loads((run.folder / "reliability.jsonl").read_text().splitlines()[0])["samples"]) for run in
            (test, held_out)] == [359, samples[0] - samples[1]]  # fmt: skip
