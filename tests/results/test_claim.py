"""Results are never lost or mixed: whose a folder is, who may write there, and what is never overwritten."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from federation import federate, local_grid
from runs_on_disk import make_run
from typer.testing import CliRunner

from experiments.analysis.comparison import Comparison
from experiments.cli import app
from experiments.launch.preflight import check_folder
from experiments.launch.runner import COMPLETED, Outcome
from experiments.report.page import describe, write_report
from experiments.studies.__main__ import app as studies
from fedkd.errors import FedkdError, SettingError
from fedkd.results.claim import LOCK, InUseError, held, refuse_held
from fedkd.results.folder import RunFolder
from fedkd.settings.config import RunConfig


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def launched(tmp_path, monkeypatch):
    """Stand in a new folder; `flwr run` leaves a run in the folder that it is given, which is returned."""
    seen: list[Path] = []

    def launch(app, settings, federation, **options):
        seen.append(make_run(Path(settings["out-dir"]), [[0.3, 0.3], [0.6, 0.7]]))
        return Outcome("1", COMPLETED, "", {"app": 1.0}, ())

    monkeypatch.setattr("experiments.launch.runner.launch", launch)
    monkeypatch.chdir(tmp_path)
    return seen


def fedkd(*words):
    return CliRunner().invoke(app, list(words), catch_exceptions=False)


def test_runs_that_start_in_the_same_second_have_a_folder_each(launched, tmp_path, monkeypatch):
    monkeypatch.setattr(time, "strftime", lambda form: "20260101-120000")

    for _ in range(3):
        assert fedkd("run").exit_code == 0

    assert [path.relative_to(tmp_path / "runs").as_posix() for path in launched] == [
        "20260101-120000-fedkd", "20260101-120000-fedkd-2", "20260101-120000-fedkd-3",
    ]  # fmt: skip


def test_a_bare_flower_run_has_a_folder_of_its_own_too(tmp_path, monkeypatch):
    monkeypatch.setattr("strategies.server_app.STARTED_IN", tmp_path)
    monkeypatch.setattr(time, "strftime", lambda form: "20260101-120000")

    for name in ("a", "b"):
        federate(tmp_path / name, 2, out_dir="")

    written = sorted(path.parent.name for path in (tmp_path / "runs").glob("*/summary.json"))
    assert written == ["20260101-120000-fedkd", "20260101-120000-fedkd-2"]


def test_a_second_run_in_the_folder_of_one_under_way_is_refused_by_name_and_costs_it_nothing(tmp_path):
    alone = federate(tmp_path / "alone", 2)
    grid = local_grid(tmp_path / "shared", 2)
    refused = []

    def meddle(partition, message):
        if message.content["mail"]["kind"] == "learn" and not refused:
            for way in ({}, {"resume": str(tmp_path / "shared" / "run")}):
                with pytest.raises(FedkdError) as error:
                    federate(tmp_path / "shared", 2, grid=local_grid(tmp_path / "other", 2), **way)
                refused.append(error.value)

    grid.fault = meddle
    run = federate(tmp_path / "shared", 2, grid=grid)

    assert isinstance(refused[0], SettingError)  # it holds rows by then
    assert isinstance(refused[1], InUseError)
    assert f"process {os.getpid()} on " in str(refused[1]) and "take another folder" in str(refused[1])
    assert run.timeless_rows() == alone.timeless_rows()


def test_a_folder_that_is_written_to_is_found_before_flower_starts(launched, tmp_path):
    make_run(tmp_path / "run", [[0.3, 0.3], [0.4, 0.4]])
    (tmp_path / "run" / "summary.json").unlink()

    with held(tmp_path / "run"), held(tmp_path / "new"):
        for word in ("resume=run", "out-dir=new"):
            with pytest.raises(InUseError, match=r"process \d+ on .* writes to .*: end it"):
                fedkd("run", word)
    assert launched == []
    refuse_held(tmp_path / "run")  # its holder has let go


def test_a_killed_process_lets_its_folder_go(tmp_path):
    code = "import sys, os; from pathlib import Path; from fedkd.results.claim import held\n"
    code += "with held(Path(sys.argv[1])):\n"
    code += "    print('held', flush=True); sys.stdin.read()"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
    )
    assert process.stdout.readline() == b"held\n"
    with pytest.raises(InUseError, match=f"process {process.pid} on "), held(tmp_path):
        pass
    process.kill()
    process.communicate()

    with held(tmp_path):
        pass


def test_a_finished_run_is_not_begun_over(launched, tmp_path):
    run = federate(tmp_path, 2)
    before = files(run.folder)

    for settings in ({}, {"seed": 5}, {"divergence": "no_module:telepathy"}):
        with pytest.raises(SettingError, match=r"a run left .*summary\.json there: take another, or resume="):
            federate(tmp_path, 2, **settings)
    with pytest.raises(SettingError, match="a run left"):
        fedkd("run", "out-dir=run")

    assert files(run.folder) == before and launched == []


@pytest.mark.parametrize("name", ["notes.md", "rounds.jsonl", "config.json", "accuracy.png", "peers/notes.md"])
def test_a_file_of_somebody_else_is_neither_overwritten_nor_deleted(launched, tmp_path, name):
    file = tmp_path / "run" / name
    file.parent.mkdir(parents=True)
    file.write_text("mine")

    with pytest.raises(SettingError, match=rf"`out-dir` .*a new or empty folder; it holds {name.partition('/')[0]}: "):
        fedkd("run", "out-dir=run")
    with pytest.raises(SettingError, match="it holds"):
        federate(tmp_path, 2)

    assert launched == [] and files(tmp_path / "run") == {name: b"mine"}


def test_a_run_that_failed_before_its_first_round_is_begun_again_in_its_folder(tmp_path):
    grid = local_grid(tmp_path, 2)
    grid.fault = lambda partition, message: message.content["no such record"]
    with pytest.raises(FedkdError):
        federate(tmp_path, 2, grid=grid)
    assert (tmp_path / "run" / "config.json").exists()

    assert federate(tmp_path, 2, seed=3).summary()["peers"]


def test_a_file_of_trials_is_looked_at_before_flower_starts(tmp_path):
    done = RunFolder(make_run(tmp_path / "done", [[0.1], [0.2]]))
    done.write_config(RunConfig(rounds=1).effective().to_mapping(), {"run": "feed"})
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.md").write_text("mine")

    def check(*names):
        lines = [{"name": name, "settings": {"rounds": 1, "out-dir": str(tmp_path / name)}} for name in names]
        (tmp_path / "trials.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        check_folder(RunConfig(trials=str(tmp_path / "trials.jsonl")))

    check("done", "new")
    with pytest.raises(SettingError, match=r"it holds notes\.md: take another"):
        check("done", "new", "other")


def mixed(path: Path) -> Path:
    """Return the folder of a run that holds rows of another one, as two that wrote there at once left them."""
    one, other = make_run(path / "one", [[0.1], [0.2]]), make_run(path / "other", [[0.1], [0.3]], seed=1)
    RunFolder(other).add_facts({"run": "beef"})
    rows = (other / "rounds.jsonl").read_text().replace('"feed"', '"beef"')
    with (one / "rounds.jsonl").open("a") as file:
        file.write(rows)
    return one


@pytest.mark.parametrize("words", [["show"], ["report"], ["run", "resume"]])
def test_rows_of_two_runs_are_refused_by_whoever_reads_them(launched, tmp_path, words):
    path = mixed(tmp_path)
    (path / "summary.json").unlink()

    last = f"resume={path}" if words[-1] == "resume" else str(path)
    with pytest.raises(FedkdError, match=r"rounds\.jsonl is of run beef.* of run feed: two runs are mixed"):
        fedkd(*words[:1], last)
    assert launched == []


def test_a_mixed_run_is_not_resumed_by_a_bare_flower_run_either(tmp_path):
    run = federate(tmp_path, 2)
    rows = (run.folder / "rounds.jsonl").read_text()
    other = rows.replace(json.loads(rows.splitlines()[0])["run"], "beef")
    (run.folder / "rounds.jsonl").write_text(rows + other)

    with pytest.raises(FedkdError, match="two runs are mixed"):
        federate(tmp_path, 2, grid=run.grid, resume=str(run.folder))
    assert (run.folder / "rounds.jsonl").read_text() == rows + other


def test_a_summary_of_another_run_is_refused(tmp_path):
    path = make_run(tmp_path / "one", [[0.1], [0.2]])
    RunFolder(path).add_facts({"run": "beef"})
    (path / "rounds.jsonl").unlink()

    with pytest.raises(FedkdError, match=r"summary\.json is of run feed.* of run beef"):
        fedkd("show", str(path))


RECIPE = 'title = "T"\n[settings]\npeers = 2\nmodels = "mlp"\nrounds = 1\n[[grid]]\nseed = [0, 1]\n'


@pytest.mark.parametrize(
    "name", ["report.html", "trials.jsonl", "comparison.json", "figures/mine.svg", "trials/seed=0/a"]
)
def test_a_comparison_touches_no_file_of_somebody_else(launched, tmp_path, name):
    (tmp_path / "small.toml").write_text(RECIPE)
    file = tmp_path / "out" / name
    file.parent.mkdir(parents=True)
    file.write_text("mine")

    with pytest.raises(SettingError, match="take another"):
        fedkd("compare", "small.toml", "--out", "out")

    assert launched == [] and files(tmp_path / "out") == {name: b"mine"}


def test_two_comparisons_do_not_write_into_one_folder(launched, tmp_path):
    (tmp_path / "small.toml").write_text(RECIPE)

    with held(tmp_path / "out"), pytest.raises(InUseError):
        fedkd("compare", "small.toml", "--out", "out")

    assert [path.name for path in (tmp_path / "out").iterdir()] == [LOCK]


def test_a_comparison_of_other_trials_does_not_take_the_place_of_one(launched, tmp_path):
    make_run(tmp_path / "out" / "trials" / "divergence=td", [[0.1], [0.2]], divergence="td")
    about = Comparison("T", "", (), None, "", "", {"divergence=td": ""})
    about.write(tmp_path / "out")
    (tmp_path / "small.toml").write_text(RECIPE)
    before = files(tmp_path / "out")

    with pytest.raises(FedkdError, match=r"about other trials: divergence=td\. Take another --out"):
        fedkd("compare", "small.toml", "--out", "out")

    assert files(tmp_path / "out") == before


@pytest.mark.parametrize("name", ["report.html", "figures/accuracy.svg", "tables/trials.csv"])
def test_a_report_is_written_over_a_report_and_over_nothing_else(tmp_path, monkeypatch, name):
    monkeypatch.setattr("experiments.report.page._save", lambda figure, path, note: "")
    run, out = make_run(tmp_path / "run", [[0.1], [0.2]]), tmp_path / "report"
    about = describe([run], command="", target=None)
    write_report([run], out, about)
    write_report([run], out, about)
    other = tmp_path / "other"
    (other / name).parent.mkdir(parents=True)
    (other / name).write_text("mine")

    with pytest.raises(SettingError, match=rf"`--out` .*fedkd has not made the {name.partition('/')[0]} there"):
        write_report([run], other, about)

    assert files(other) == {name: b"mine"}


def test_a_benchmark_refuses_a_file_that_is_not_of_a_benchmark_before_it_runs(tmp_path, monkeypatch):
    monkeypatch.setattr("experiments.bench.losses.main", lambda *arguments, **options: pytest.fail("it ran"))
    (tmp_path / "mine.json").write_text('{"machine": "mine"}')

    with pytest.raises(SettingError, match="`--json` to be a new file, or one that this command made"):
        fedkd("bench", "losses", "--json", str(tmp_path / "mine.json"))


def test_a_benchmarks_figures_take_the_place_of_earlier_ones(tmp_path):
    from experiments.bench.measuring import leave
    from experiments.outputs import is_json_with

    leave({"rows": []}, tmp_path / "figures.json")

    assert is_json_with(tmp_path / "figures.json", ("machine", "versions", "commit"))


def test_a_search_begins_in_no_folder_of_somebody_else(launched, tmp_path):
    pytest.importorskip("optuna")
    (tmp_path / "trials.jsonl").write_text("mine")

    with pytest.raises(SettingError, match=r"fedkd has not made the trials\.jsonl there"):
        fedkd("tune", "--trials", "1", "--out", str(tmp_path))

    assert files(tmp_path) == {"trials.jsonl": b"mine"}


def gathered(tmp_path, *folders):
    words = ["gather", *map(str, folders), "--out", str(tmp_path / "csv")]
    return CliRunner().invoke(studies, words, catch_exceptions=False)


def test_slices_are_written_over_none(tmp_path):
    file = tmp_path / "cifar10.npz"
    file.write_bytes(b"mine")

    with pytest.raises(SettingError, match=r"`OUT` to be a new file; take another, or remove it.*cifar10\.npz"):
        CliRunner().invoke(studies, ["slices", str(tmp_path), "--cifar10", str(file)], catch_exceptions=False)

    assert files(tmp_path) == {"cifar10.npz": b"mine"}


def test_gathered_tables_take_the_place_of_gathered_tables_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDKD_COMMIT", "c0ffee")  # whatever has been changed where this test runs
    for name in ("a", "b/a"):
        make_run(tmp_path / name / "trials" / "seed=0", [[0.1], [0.2]])
    for _ in range(2):
        assert gathered(tmp_path, tmp_path / "a").exit_code == 0
    with pytest.raises(SettingError, match="folders of different names"):
        gathered(tmp_path, tmp_path / "a", tmp_path / "b" / "a")
    (tmp_path / "csv" / "a.csv").write_text("round,mine\n1,2\n")

    with pytest.raises(SettingError, match="`--out` to be a new file"):
        gathered(tmp_path, tmp_path / "a")

    assert (tmp_path / "csv" / "a.csv").read_text() == "round,mine\n1,2\n"


def test_event_files_of_somebody_else_stay(tmp_path):
    pytest.importorskip("tensorboard")
    from experiments.report.tensorboard import export

    run = make_run(tmp_path / "run", [[0.1], [0.2]])
    other = tmp_path / "board" / "run" / "peer-0" / "events.out.tfevents.1.host.1.0"
    other.parent.mkdir(parents=True)
    other.write_bytes(b"mine")

    for _ in range(2):
        export(run, tmp_path / "board")

    assert other.read_bytes() == b"mine"
    assert len(list(other.parent.iterdir())) == 2  # ours once, not twice
