"""What a run's folder tells of how it came about, and what it must not tell."""

from datetime import UTC, datetime, timedelta

import pytest
from federation import federate

from fedkd.errors import SettingError
from fedkd.results.folder import RunFolder, environment

SECRET = "eyJhbGciOiJIUzI1NiJ9"


@pytest.mark.parametrize(
    "words", [["--token", SECRET], [f"--token={SECRET}"], ["--auth-secret", SECRET, "--run-id", "7"]]
)
def test_no_file_of_a_run_holds_what_flower_started_it_with(tmp_path, monkeypatch, words):
    monkeypatch.setattr("sys.argv", ["flwr-simulation", *words, "--insecure"])

    run = federate(tmp_path, 2, rounds=1, pretrain_epochs=0, models="mlp")

    holding = [path for path in run.folder.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]
    assert not holding
    command = RunFolder(run.folder).read_config()["environment"]["command"]
    assert command[0] == "flwr-simulation" and command[-1] == "--insecure" and len(command) == len(words) + 2


def test_a_run_tells_when_it_began(tmp_path):
    RunFolder(tmp_path).write_config({}, {"run": "feed"})

    date = datetime.fromisoformat(RunFolder(tmp_path).read_config()["environment"]["date"])
    assert timedelta(0) <= datetime.now(UTC) - date < timedelta(minutes=1)


@pytest.mark.parametrize("content", ["", "[1]", "{", '{"settings": {}}', '{"run": "a"}', '{"settings": 3, "run": "a"}'])
def test_a_config_that_cannot_be_read_is_named_by_its_folder(tmp_path, content):
    (tmp_path / "config.json").write_text(content)

    with pytest.raises(SettingError, match=r"the folder of a run with a config\.json"):
        RunFolder(tmp_path).read_config()


def test_a_runs_environment_names_what_its_numbers_depend_on():
    versions = environment()["versions"]

    assert {"fedkd", "python", "torch", "numpy", "flwr", "ray"} <= versions.keys()
    assert all(versions.values())
