import tempfile

import pytest
from typer.testing import CliRunner

from experiments import doctor
from experiments.cli import app
from fedkd.losses import divergences


def lines():
    found = []
    fine = doctor.doctor(out=found.append)
    return fine, found


@pytest.fixture
def good_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)


def test_a_good_installation_has_nothing_wrong(good_home, tmp_path):
    fine, found = lines()

    assert fine, [line for line in found if "WRONG" in line]
    assert found[-1].strip() == "nothing is wrong"
    assert any(str(tmp_path / "runs") in line for line in found)
    assert any("flwr" in line and "needs" in line for line in found)


def test_every_loss_of_the_library_has_a_known_answer(good_home):
    answers = {finding.name for finding in doctor.examine() if finding.part == "losses" and finding.fine}
    ours = {name for name in divergences.names() if divergences.get(name).function.__module__.startswith("fedkd.")}

    assert ours - {"total-variation"} <= answers  # the docstring's own, where the doctests ran in this process


def test_a_wrong_loss_is_named_and_the_command_fails(good_home, monkeypatch):
    wrong = divergences.Divergence("js", lambda student, teacher, **options: student.sum(dim=-1))
    monkeypatch.setitem(divergences._REGISTRY, "js", wrong)

    done = CliRunner().invoke(app, ["doctor"])

    assert done.exit_code == 1
    assert "2.000000 instead of 0.059831" in done.output
    assert done.output.strip().endswith("wrong: losses js")


def test_a_missing_package_is_named(good_home, monkeypatch):
    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda package: None if package == "scipy" else real(package))

    fine, found = lines()

    assert not fine
    assert any("scipy" in line and "not installed" in line and "WRONG" in line for line in found)


def test_a_missing_extra_says_how_to_get_it_and_is_no_fault(good_home, monkeypatch):
    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda package: None if package == "optuna" else real(package))

    fine, found = lines()

    assert fine
    assert any("not installed: optuna" in line and "pip install 'fedkd[tune]'" in line for line in found)


def test_a_part_that_breaks_is_a_finding_and_the_others_go_on(good_home, monkeypatch):
    def broken():
        raise OSError("no such device")

    monkeypatch.setattr(doctor, "_machine", broken)

    fine, found = lines()

    assert not fine
    assert any("no such device" in line for line in found)
    assert any(line.strip().startswith("ok") and "bdkd" in line for line in found)


def test_another_ray_on_the_machine_is_mentioned(good_home, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text("10.0.0.1:6379")

    fine, found = lines()

    assert fine
    assert any("10.0.0.1:6379" in line and "RAY_ADDRESS=local" in line for line in found)
