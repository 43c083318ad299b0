"""`import fedkd` in a notebook: the same runs as on the command line, opened as tables and pictures."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from federation import federate
from nbclient import NotebookClient
from runs_on_disk import make_run

import fedkd
from experiments.export import ExportError
from experiments.launch.runner import COMPLETED, Outcome
from experiments.simulation import simulate
from fedkd.data.sources import load_source
from fedkd.errors import FedkdError, SettingError
from fedkd.results.folder import RunFolder
from fedkd.settings.config import RunConfig
from strategies.relay.trials import read_trials

ROOT = Path(__file__).parent.parent.parent
EXAMPLE = ROOT / "experiments" / "examples" / "notebook.ipynb"
ACCURACIES = [[0.25, 0.35], [0.5, 0.75]]


@pytest.fixture
def launched(tmp_path, monkeypatch):
    """Stand in a new folder; `flwr run` leaves a made-up run. Return what it was given."""
    seen = []

    def launch(app, settings, federation, *, out, **options):
        seen.append((settings, federation))
        out("round 1")
        make_run(Path(settings["out-dir"]), ACCURACIES)
        return Outcome("1", COMPLETED, "", {"app": 1.0}, ())

    monkeypatch.setattr("experiments.launch.runner.launch", launch)
    monkeypatch.chdir(tmp_path)
    return seen


@pytest.fixture
def trials(tmp_path, monkeypatch):
    """Stand in a new folder; `flwr run` leaves made-up trials, the divergence td fails. Return which were run."""
    ran = []

    def launch(app, settings, federation, **options):
        for trial in read_trials(Path(settings["trials"]), RunConfig()):
            if trial.finished():
                continue
            ran.append(trial.name)
            shared = {"isolated": 0.4} if trial.config.controls else {"isolated": math.nan}
            folder = RunFolder(make_run(trial.folder, [[0.25, 0.35]] * trial.config.rounds + [[0.5, 0.75]], **shared))
            folder.write_config(trial.config.effective().to_mapping(), {"run": "feed"})
            if trial.config.divergence == "td":
                folder.write_error("Traceback\nValueError: <broken>")
                (trial.folder / "summary.json").unlink()
        return Outcome("1", COMPLETED, "", {"app": 1.0}, ())

    monkeypatch.setattr("experiments.compare.running.launch", launch)
    monkeypatch.setattr("experiments.report.page._save", lambda figure, path, note: "")
    monkeypatch.chdir(tmp_path)
    return ran


def end(**outcome):
    """Replace `flwr run` by a run that leaves a started one and ends so."""

    def launch(app, settings, federation, **options):
        folder = make_run(Path(settings["out-dir"]), ACCURACIES)
        (folder / "summary.json").unlink()
        return Outcome(**{"run_id": "1", "status": "finished:failed", "phases": {"app": 1.0}, "tail": (), **outcome})

    return launch


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return federate(tmp_path_factory.mktemp("run"), 2, models="mlp,resnet8", controls="isolated,pooled", pictures=True)


# --- a run ------------------------------------------------------------------------------------------------------------


def test_keywords_are_the_command_lines_words(launched, tmp_path):
    fedkd.run(
        divergence="sed", peers=4, models=["mlp", "cnn-small"], kd_weight=0.5, sealed=True, rounds=np.int64(1),
        data_dir=Path("data"), actors=2, quiet=True,
    )  # fmt: skip
    simulate(
        ["divergence=sed", "models=mlp,cnn-small", "kd-weight=0.5", "sealed=true", "rounds=1", "data-dir=data"],
        peers=4, actors=2, out=lambda line: None,
    )  # fmt: skip

    (settings, federation), (typed, same) = launched
    assert {**settings, "out-dir": ""} == {**typed, "out-dir": ""} and federation == same
    assert federation.peers == settings["peers"] == 4 and settings["data-dir"] == str(tmp_path / "data")


def test_a_run_is_opened_where_it_lies_and_prints_unless_it_is_quiet(launched, tmp_path, capsys):
    run = fedkd.run(rounds=1)
    said = capsys.readouterr().out
    fedkd.run(rounds=1, quiet=True)

    assert said == "round 1\n" and capsys.readouterr().out == ""
    assert run.folder.parent == tmp_path / "runs"
    assert run.settings["rounds"] == 1 and run.summary["mean"]["after"] == 0.625


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"temprature": 2}, r"`temprature` to be a known key \(nearest: temperature"),
        ({"partition_alpha": -1}, "`partition-alpha` to be a number > 0, but got -1.0"),
        ({"rounds": 2.5}, "`rounds` to be a whole number, but got '2.5'"),
        ({"rounds": [1, 2]}, "`rounds` to be a whole number, but got '1,2'"),
        ({"divergence": None}, "`divergence` to be a text, a number"),
        ({"dataset": "npz:none.npz"}, "`dataset` to be npz:PATH of a file"),
        ({"peers": 1}, "at least 2 under strategy averaged"),
        ({"trials": "t.jsonl"}, r"`trials` to be left out here: fedkd\.compare"),
    ],
)
def test_a_mistake_is_found_before_anything_starts(launched, tmp_path, settings, complaint):
    with pytest.raises(SettingError, match=complaint):
        fedkd.run(**settings)

    assert launched == [] and list(tmp_path.iterdir()) == []


def test_a_run_that_fails_says_why_and_where_it_lies(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("experiments.launch.runner.launch", end(reason="peer-1 broke"))

    with pytest.raises(FedkdError, match=r"peer-1 broke") as found:
        fedkd.run(out_dir="mine", rounds=1)

    assert str(tmp_path / "mine") in str(found.value)
    assert f"fedkd.run(resume={str(tmp_path / 'mine')!r})" in str(found.value)
    assert "not finished" in repr(fedkd.open_run("mine"))


def test_a_run_that_left_nothing_says_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    failed = Outcome("", "finished:failed", "no Ray", {"app": 1.0}, ())
    monkeypatch.setattr("experiments.launch.runner.launch", lambda *a, **o: failed)

    with pytest.raises(FedkdError, match="left nothing: no Ray"):
        fedkd.run()


def test_a_complete_run_that_is_resumed_is_opened(launched, tmp_path):
    make_run(tmp_path / "done", ACCURACIES, rounds=1)

    run = fedkd.run(resume="done")

    assert run.folder == tmp_path / "done" and launched == []


def test_rounds_and_peers_are_those_of_the_files(finished):
    run = fedkd.open_run(finished.folder)

    rows = [json.loads(line) for line in (finished.folder / "rounds.jsonl").read_text().splitlines()]
    assert list(run.rounds.columns) == list(rows[0])
    assert run.rounds["test_accuracy"].tolist() == [row["test_accuracy"] for row in rows]
    entries = {entry["peer"]: entry for entry in finished.summary()["peers"]}
    for name in ("model", "samples", "before", "after", "own_after", "isolated", "gain"):
        assert run.peers[name].to_dict() == {peer: entry[name] for peer, entry in entries.items()}
    assert run.peers.loc["peer-0", "isolated_measures.ece"] == entries["peer-0"]["isolated_measures"]["ece"]
    assert pd.api.types.is_float_dtype(run.peers["isolated"])


def test_what_was_not_measured_is_no_number(tmp_path):
    run = fedkd.open_run(make_run(tmp_path / "run", ACCURACIES, isolated=math.nan))

    assert run.peers["isolated"].isna().all() and pd.api.types.is_float_dtype(run.peers["isolated"])
    assert "–" in run._repr_html_()


def test_a_run_that_did_not_finish_shows_how_far_it_came(tmp_path):
    folder = make_run(tmp_path / "run", ACCURACIES)
    (folder / "summary.json").unlink()
    (folder / "error.txt").write_text("ValueError: <b>1 & 2</b>")

    run = fedkd.open_run(folder)

    assert run.peers["after"].to_dict() == {"peer-0": 0.5, "peer-1": 0.75} and run.summary == {}
    assert "&lt;b&gt;1 &amp; 2&lt;/b&gt;" in run._repr_html_() and "<b>1" not in run._repr_html_()
    assert "ValueError: <b>1 & 2</b>" in repr(run)


def test_a_run_without_any_row_is_shown_too(tmp_path):
    RunFolder(tmp_path / "run").write_config(RunConfig().to_mapping(), {"run": "feed"})

    run = fedkd.open_run(tmp_path / "run")

    assert len(run.peers) == len(run.rounds) == len(run.figures) == 0
    assert "not finished" in run._repr_html_() and "not finished" in repr(run)


def test_a_folder_that_is_no_runs_is_refused(tmp_path):
    with pytest.raises(FedkdError, match=r"Expected the folder of a run with its config.json"):
        fedkd.open_run(tmp_path)


def test_pictures_show_themselves(finished):
    run = fedkd.open_run(finished.folder)

    assert set(run.figures) == {"accuracy", "topology"}
    for name, picture in run.figures.items():
        assert picture._repr_png_() == (finished.folder / f"{name}.png").read_bytes()
    assert run._repr_html_().count('src="data:image/png;base64,') == 1
    assert run.figures._repr_html_().count('src="data:image/png;base64,') == 2
    page = run._repr_html_()
    assert all(word in page for word in ("resnet8", "peer-1", "divergence kl", "pooled", "own classes"))


# --- its models -------------------------------------------------------------------------------------------------------


def test_a_model_is_as_good_on_raw_inputs_as_the_summary_says(finished, tmp_path):
    run = fedkd.open_run(finished.folder)
    test = load_source("digits", data_dir=tmp_path).test
    for peer in run.peers.index:
        for place in (run, finished.folder, str(finished.folder)):
            model = fedkd.load_model(place, peer)
            with torch.no_grad():
                right = (model(test.inputs / 255).argmax(dim=1) == test.labels).double().mean().item()
            assert right == run.peers.loc[peer, "after"] and not model.training


def test_a_model_that_is_not_there_is_named(finished, tmp_path):
    with pytest.raises(SettingError, match="one of peer-0, peer-1, but got 'peer-7'"):
        fedkd.load_model(finished.folder, "peer-7")
    with pytest.raises(ExportError, match=r"keep-models"):
        fedkd.load_model(fedkd.open_run(make_run(tmp_path / "run", ACCURACIES)), "peer-0")


# --- a comparison -----------------------------------------------------------------------------------------------------


def test_lists_are_crossed_and_every_trial_has_a_line(trials, tmp_path):
    compared = fedkd.compare(divergence=["kl", "js"], seed=range(2), rounds=1, peers=2, quiet=True)

    names = ["divergence=kl,seed=0", "divergence=js,seed=0", "divergence=kl,seed=1", "divergence=js,seed=1"]
    assert trials == names == list(compared.runs.index) and compared.failed == {}
    assert compared.runs["divergence"].tolist() == ["kl", "js"] * 2 and compared.runs["seed"].tolist() == [0, 0, 1, 1]
    assert "rounds" not in compared.runs.columns
    line = compared.runs.loc[names[1]]
    assert (line["before"], line["accuracy"], line["worst"]) == (0.3, 0.625, 0.5)
    assert line["isolated"] == 0.4  # though another trial ran that control
    assert line["bytes"] == 4000 and (line["folder"] / "rounds.jsonl").exists()
    assert compared.report == compared.folder / "report.html" and compared.report.exists()
    assert "fedkd.compare(divergence=[&#39;kl&#39;, &#39;js&#39;], seed=range(0, 2)" in compared.report.read_text()
    assert compared.folder.parent == tmp_path / "runs"


def test_the_same_call_runs_nothing_twice_and_another_has_a_folder_of_its_own(trials):
    first = fedkd.compare(divergence=["kl", "js"], rounds=1, peers=2, quiet=True)
    again = fedkd.compare(divergence=["kl", "js"], rounds=1, peers=2, quiet=True)
    other = fedkd.compare(divergence=["kl", "js"], rounds=2, peers=2, quiet=True)

    assert first.folder == again.folder != other.folder and len(trials) == 4
    pd.testing.assert_frame_equal(first.runs, again.runs)


def test_what_the_report_says_of_the_recipe_can_be_run_as_one(trials, tmp_path):
    compared = fedkd.compare(divergence=["kl", "js"], rounds=1, models=("mlp", "cnn-small"), sealed=True, quiet=True)
    (tmp_path / "again.toml").write_text(json.loads((compared.folder / "comparison.json").read_text())["recipe"])

    fedkd.compare("again.toml", folder=compared.folder, quiet=True)

    assert len(trials) == 2  # all that it asks for was there


def test_a_recipe_is_found_by_name_and_keywords_win_over_it(trials, tmp_path):
    changed = {"strategy": "averaged", "codec": "fp32", "seed": 0, "rounds": 2, "temperature": [1.0, 2.0]}

    compared = fedkd.compare("rounds", quick=True, **changed, folder=tmp_path / "out", quiet=True)

    assert compared.folder == tmp_path / "out" and trials == ["temperature=1.0", "temperature=2.0"]
    assert compared.runs["temperature"].tolist() == [1.0, 2.0]
    assert len(fedkd.open_run(compared.runs["folder"].iloc[0]).rounds) == 3 * 2


def test_a_setting_without_an_effect_on_a_trial_has_no_value_there(trials):
    compared = fedkd.compare(
        topology=["ring", "erdos-renyi"], topology_probability=[0.4, 0.8], rounds=1, peers=4, quiet=True
    )

    told = compared.runs.set_index("topology")["topology-probability"]
    assert len(trials) == 3 and math.isnan(told["ring"]) and set(told["erdos-renyi"]) == {0.4, 0.8}


def test_what_failed_is_told_beside_what_finished(trials):
    compared = fedkd.compare(divergence=["kl", "td"], rounds=1, peers=2, quiet=True)

    assert compared.failed == {"divergence=td": "ValueError: <broken>"}
    assert math.isnan(compared.runs.loc["divergence=td", "accuracy"])
    assert "ValueError: &lt;broken&gt;" in compared._repr_html_() and "62.5%" in compared._repr_html_()
    assert "ValueError: <broken>" in repr(compared)


def test_a_comparison_without_any_result_is_an_error_with_the_reason(trials):
    with pytest.raises(FedkdError, match="<broken>"):
        fedkd.compare(divergence=["td"], rounds=1, peers=2, quiet=True)


def test_a_comparison_that_is_interrupted_says_how_it_goes_on(trials, monkeypatch):
    stopped = Outcome("1", "finished:stopped", "stopped by SIGINT", {"app": 1.0}, (), signal=2)
    monkeypatch.setattr("experiments.compare.running.launch", lambda *a, **o: stopped)

    with pytest.raises(FedkdError, match=r"SIGINT: 0 trials .* call again"):
        fedkd.compare(divergence=["kl", "js"], rounds=1, peers=2, quiet=True)


@pytest.mark.parametrize(
    ("words", "settings", "complaint"),
    [
        ((), {"rounds": 3}, "a list of values for at least one setting"),
        ((), {"seed": []}, "`seed` to be at least one value"),
        ((), {"divergance": ["kl"]}, r"`divergance` to be a known key \(nearest: divergence"),
        ((), {"divergence": ["kl", "telepathy"]}, "`divergence`.*'telepathy'"),
        ((), {"seed": [0], "quick": True}, "`quick` to be left out without a recipe"),
        ((), {"seed": [0], "out_dir": "here"}, "`out-dir` belongs to the comparison"),
        (("nowhere",), {}, "Expected RECIPE to be a TOML file or one of .*rounds.*'nowhere'"),
    ],
)
def test_a_wrong_comparison_is_refused_before_anything_runs(trials, tmp_path, words, settings, complaint):
    with pytest.raises(FedkdError, match=complaint):
        fedkd.compare(*words, **settings)

    assert trials == [] and list(tmp_path.iterdir()) == []


# --- how it is imported -----------------------------------------------------------------------------------------------


def python(code, cwd, path=ROOT):
    """Run a line without the clone that may be installed here; return what it prints, or its error."""
    alone = "import sys, pathlib; sys.path[:] = [p for p in sys.path if not pathlib.Path(p, 'hatch_build.py').exists()]"
    command = [sys.executable, "-c", code if path == ROOT else f"{alone}\n{code}"]
    done = subprocess.run(command, cwd=cwd, env={"PYTHONPATH": str(path)}, capture_output=True, text=True, check=False)
    return done.stdout.strip() or done.stderr.strip().splitlines()[-1]


@pytest.fixture
def shipped(tmp_path):
    """A folder as a wheel leaves it: the app inside of the package."""
    library = tmp_path / "site" / "fedkd"
    plain = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "fedkd", library, ignore=plain)
    for room in ("experiments", "clients", "strategies"):
        shutil.copytree(ROOT / room, library / "flower-app" / room, ignore=plain)
    shutil.copy(ROOT / "pyproject.toml", library / "flower-app")
    return library.parent


def test_importing_fedkd_loads_nothing_heavy_and_leaves_the_path_alone(tmp_path):
    heavy = {"torch", "flwr", "ray", "numpy", "pandas", "matplotlib", "experiments"}
    code = f"import sys; before = [*sys.path]; import fedkd; print(sys.path == before, {heavy} & set(sys.modules))"

    assert python(code, tmp_path) == "True set()"


def test_from_a_wheel_the_app_comes_last_on_the_path(shipped, tmp_path):
    folder = make_run(tmp_path / "run", ACCURACIES)
    app = shipped / "fedkd" / "flower-app"
    code = f"import sys, fedkd; print(len(fedkd.open_run({str(folder)!r}).rounds), sys.path[-1] == {str(app)!r})"

    assert python(code, tmp_path, shipped) == "4 True"


@pytest.mark.parametrize("room", ["experiments", "strategies"])
@pytest.mark.parametrize("before", ["", "import {room}; "])
def test_another_package_of_the_same_name_is_not_taken_for_fedkds(shipped, tmp_path, room, before):
    (tmp_path / "work" / room).mkdir(parents=True)
    (tmp_path / "work" / room / "__init__.py").write_text("")
    code = f"{before.format(room=room)}import fedkd; fedkd.open_run('run')"

    said = python(code, tmp_path / "work", shipped)

    assert said.startswith(f"fedkd.errors.FedkdError: Python finds another {room!r} before fedkd's")
    assert str(tmp_path / "work" / room) in said and "sys.path.insert(0, " in said


def test_a_folder_beside_the_notebook_that_is_no_package_is_in_nobodys_way(shipped, tmp_path):
    (tmp_path / "work" / "experiments").mkdir(parents=True)
    make_run(tmp_path / "work" / "run", ACCURACIES)

    assert python("import fedkd; print(len(fedkd.open_run('run').rounds))", tmp_path / "work", shipped) == "4"


# --- the notebook of the examples -------------------------------------------------------------------------------------


def test_the_example_is_kept_without_outputs():
    content = nbformat.read(EXAMPLE, as_version=4)

    nbformat.validate(content)
    assert all(not cell.outputs and cell.execution_count is None for cell in content.cells if cell.cell_type == "code")


@pytest.mark.slow
@pytest.mark.flower
def test_the_example_runs_and_shows_tables_and_pictures(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    content = nbformat.read(EXAMPLE, as_version=4)

    NotebookClient(content, timeout=500, resources={"metadata": {"path": str(tmp_path)}}).execute()

    shown = {
        cell.id: [output.get("data", {}) for output in cell.outputs] for cell in content.cells if "outputs" in cell
    }
    assert "data:image/png" in shown["run"][-1]["text/html"] and "cnn-wide" in shown["run"][-1]["text/html"]
    assert "image/png" in shown["figures"][-1]
    accuracy, said = shown["use"][-1]["text/plain"].strip("'").split(", in the summary ")
    assert accuracy == said
    assert "data:image/png" in shown["trials"][-1]["text/html"] and "sed" in shown["best"][-1]["text/html"]
    assert len(list((tmp_path / "runs").iterdir())) == 2
