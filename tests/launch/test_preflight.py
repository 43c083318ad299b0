"""What `fedkd run` finds out before it starts anything."""

import os
import sys

import pytest
from runs_on_disk import make_run
from typer.testing import CliRunner

from experiments.cli import app
from experiments.launch import preflight
from experiments.launch.preflight import check_machine
from experiments.launch.project import OWN_FOLDER
from experiments.launch.runner import STOPPED, Federation, Outcome
from fedkd.errors import FedkdError, SettingError


class Launched(list):
    """Federations, and the settings that each was to run with."""

    def __init__(self):
        super().__init__()
        self.settings = []


@pytest.fixture
def launched(tmp_path, monkeypatch):
    """Stand in a new folder, and replace `flwr run` by a Ctrl-C; return the federations that would have run."""
    seen = Launched()

    def launch(app, settings, federation, **options):
        seen.append(federation)
        seen.settings.append(settings)
        return Outcome("1", STOPPED, "stopped by SIGINT", {"app": 1.0}, (), signal=2)

    monkeypatch.setattr("experiments.launch.runner.launch", launch)
    monkeypatch.chdir(tmp_path)
    return seen


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["dataset=npz:none.npz"], "`dataset` to be npz:PATH of a file; there is none at .*none.npz"),
        (["dataset=npz:{peer}.npz", "proxy=digits"], "`dataset` .* there is none at .*0.npz"),
        (["proxy=folder:none@32"], "`proxy` to be folder:PATH of a folder; there is none at .*none@32"),
        (
            ["proxy=parquet:none.parquet"],
            "`proxy` to be parquet:PATH of a file or a folder; there is none at .*none.parq",
        ),
        (["dataset=fashionmnist"], "`dataset` to be one of digits, .*fashion-mnist.*'fashionmnist'"),
        (["proxy=splitt"], "`proxy` to be split, or one of digits"),
        (["checkpoints=-,none.pt"], "`checkpoints` to be files that exist.*'none.pt'"),
        (["device=gpu"], "`device` to be auto, cpu, cuda or cuda:N, but got 'gpu'"),
        (["device=cuda:99"], r"`device` to be a device of this process \(\d+ GPUs visible\)"),
        (["topology=torus", "--peers", "5"], "`topology` to be possible for 5 peers"),
        (["topology=file:none"], "`topology` .*No such file"),
        (["models=mlp,hf:./none"], "`models` .*there is no folder .*none, but got"),
        (["models=mlp,timm:resnet18.a1_in1k"], "`models` to be timm:resnet18@a1_in1k with these weights"),
        (["models=mlp,none:make"], "`models` .*there is no module none installed, on PYTHONPATH or in "),
        (["strategy=broken.none:Mine"], "`strategy` .*there is no module broken.none "),
        (["--peers", "1"], "`--peers` to be at least 2 under strategy averaged"),
        (["peers=3", "--peers", "4"], "`peers` to be left out beside --peers 4, but got 3"),
        (["resume=none"], "Expected the folder of a run"),
        (["--rounds", "2"], "There is no option --rounds: settings are words, `rounds=2`"),
        (["--rounds=2"], "There is no option --rounds: settings are words, `rounds=2`"),
    ],
)
def test_a_mistake_is_found_before_anything_starts(launched, tmp_path, words, complaint):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "__init__.py").write_text("raise RuntimeError('this code was executed')")

    with pytest.raises(FedkdError, match=complaint):
        CliRunner().invoke(app, ["run", *words], catch_exceptions=False)
    assert launched == []


def test_what_is_there_is_not_complained_about(launched, tmp_path):
    for name in ("0.npz", "1.npz", "a.pt", "mine.py", "a.parquet"):
        (tmp_path / name).touch()
    (tmp_path / "images").mkdir()
    words = ["dataset=npz:{peer}.npz", "proxy=folder:images@8", "checkpoints=a.pt,-", "models=mine:make", "peers=2"]

    for proxy in ((), ("proxy=parquet:a.parquet#photo@8",), ("proxy=hf:owner/name",), ("proxy=hf:images",)):
        CliRunner().invoke(app, ["run", *words, *proxy], catch_exceptions=False)

    assert [federation.peers for federation in launched] == [2] * 4
    given = [settings["proxy"] for settings in launched.settings]
    assert given[1:] == [f"parquet:{tmp_path}/a.parquet#photo@8", "hf:owner/name", f"hf:{tmp_path}/images"]


def test_a_model_of_another_library_is_no_module_of_ones_own_and_its_folder_is_found_from_anywhere(launched, tmp_path):
    (tmp_path / "vit").mkdir()
    words = ["models=timm:resnet18,hf:vit,hf:google/vit-base-patch16-224,mlp", "pooled-model=hf:./vit"]

    CliRunner().invoke(app, ["run", *words], catch_exceptions=False)

    (settings,) = launched.settings
    assert settings["models"] == f"timm:resnet18,hf:{tmp_path}/vit,hf:google/vit-base-patch16-224,mlp"
    assert settings["pooled-model"] == f"hf:{tmp_path}/vit"


def test_a_library_that_is_not_installed_is_said_before_flower_starts(launched, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)

    done = CliRunner().invoke(app, ["run", "models=timm:resnet18"])

    assert "pip install 'fedkd[timm]'" in str(done.exception) + done.output and not launched


def test_a_large_run_has_fewer_nodes_than_peers_and_says_how_many_peers(launched, tmp_path):
    for words in (["--peers", "500"], ["peers=500"]):
        CliRunner().invoke(app, ["run", *words, "--actors", "2"], catch_exceptions=False)
    CliRunner().invoke(app, ["run", "--peers", "6"], catch_exceptions=False)

    CliRunner().invoke(app, ["run", "--peers", "500", "--ray-address", "head:6379"], catch_exceptions=False)

    sizes = [(federation.peers, federation.nodes) for federation in launched]
    assert sizes == [(500, 32), (500, 32), (6, 6), (500, None)]
    assert [settings["peers"] for settings in launched.settings] == [500, 500, 6, 500]


def test_a_run_that_counted_its_nodes_is_resumed_with_as_many(launched, tmp_path):
    make_run(tmp_path / "counted", [[0.3] * 40], rounds=3)
    make_run(tmp_path / "told", [[0.3] * 40], rounds=3, peers=40)
    for name in ("counted", "told"):
        (tmp_path / name / "summary.json").unlink()  # as after a stop
        CliRunner().invoke(app, ["run", f"resume={name}", "--actors", "2"], catch_exceptions=False)

    assert [(federation.peers, federation.nodes) for federation in launched] == [(40, None), (40, 32)]


def test_modules_where_the_user_stands_are_found_unless_they_would_hide_others(tmp_path):
    (tmp_path / "mine.py").touch()
    assert preflight.with_own_code("/opt", app=OWN_FOLDER, cwd=tmp_path) == f"/opt{os.pathsep}{tmp_path}"

    (tmp_path / "clients").mkdir()
    for name in ("queue.py", "numpy.py", "clients/__init__.py"):
        (tmp_path / name).touch()

    assert preflight.hidden_by(tmp_path, app=OWN_FOLDER) == ["clients", "numpy", "queue"]
    assert preflight.with_own_code("/opt", app=OWN_FOLDER, cwd=tmp_path) == "/opt"


def test_a_module_that_lies_beside_one_that_hides_others_is_refused_with_the_cure(launched, tmp_path):
    for name in ("mine.py", "queue.py"):
        (tmp_path / name).touch()

    with pytest.raises(FedkdError, match=r"left out.* named queue: .*`export PYTHONPATH=\$PWD`"):
        CliRunner().invoke(app, ["run", "models=mine:make"], catch_exceptions=False)


def test_a_complete_run_is_shown_and_nothing_is_started(launched, tmp_path):
    make_run(tmp_path / "done", [[0.3, 0.3], [0.6, 0.7]])

    result = CliRunner().invoke(app, ["run", "resume=done"], catch_exceptions=False)

    assert result.exit_code == 0 and launched == []
    assert result.output.startswith("already complete (1 of 1 rounds)\n") and "peer-1" in result.output


def test_a_comparison_is_not_shown_as_if_it_were_a_run(tmp_path):
    (tmp_path / "comparison.json").touch()

    with pytest.raises(FedkdError, match=r"is a comparison: show one of .*trials/\*, or open .*report.html"):
        CliRunner().invoke(app, ["show", str(tmp_path)], catch_exceptions=False)


def test_a_run_is_not_resumed_under_other_settings_or_among_others(launched, tmp_path):
    make_run(tmp_path / "done", [[0.3, 0.3], [0.6, 0.7]])

    for words, complaint in (
        (["divergence=td"], "`divergence` to be 'kl' as"),
        (["--peers", "3"], "`--peers` to be 2"),
    ):
        with pytest.raises(FedkdError, match=complaint):
            CliRunner().invoke(app, ["run", "resume=done", *words], catch_exceptions=False)
    assert launched == []


@pytest.mark.parametrize(("settings", "hint"), [({}, True), ({"mode": "async", "strategy": "gossip"}, False)])
def test_after_ctrl_c_the_command_that_goes_on_is_told(launched, tmp_path, monkeypatch, settings, hint):
    def launch(*arguments, **options):
        make_run(tmp_path / "run", [[0.3, 0.3], [0.6, 0.7]], **settings)
        (tmp_path / "run" / "summary.json").unlink()
        return Outcome("1", STOPPED, "stopped by SIGINT", {"app": 1.0}, (), signal=2)

    monkeypatch.setattr("experiments.launch.runner.launch", launch)
    words = [f"{key}={value}" for key, value in settings.items()]

    result = CliRunner().invoke(app, ["run", "out-dir=run", "--peers", "2", *words], catch_exceptions=False)

    assert result.exit_code == 130
    assert ("go on: fedkd run resume=run" in result.output.splitlines()) == hint


@pytest.mark.parametrize(
    ("federation", "gpus", "said"),
    [
        (Federation(peers=2, cpus_per_peer=10**6), 0, "`--cpus-per-peer` to be at most"),
        (Federation(peers=2, gpus_per_peer=0.25), 0, "PyTorch sees no GPU here"),
        (Federation(peers=2, gpus_per_peer=2), 1, "at most 1"),
        (Federation(peers=2, gpus=2), 1, "`--gpus`"),
        (Federation(peers=2, gpus_per_peer=1, gpus=0), 1, "at most --gpus 0"),
    ],
)
def test_more_than_the_machine_has_is_an_error_before_flower_starts(
    federation: Federation, gpus: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    with pytest.raises(SettingError) as refused:
        check_machine(federation)
    assert said in str(refused.value)


def test_what_the_machine_has_may_be_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    check_machine(Federation(peers=40, gpus_per_peer=0.25, gpus=1))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    check_machine(Federation(peers=2))
    check_machine(Federation(peers=2, cpus_per_peer=10**6, gpus_per_peer=8, ray_address="head:6379"))
