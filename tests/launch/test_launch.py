"""`fedkd run`: what a user types, what Flower gets, what comes back, and that nothing stays behind."""

import os
import shlex
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import psutil
import pytest
from flwr.common.config import parse_config_args
from hypothesis import example, given
from hypothesis import strategies as st

from experiments import cli
from experiments.launch import processes
from experiments.launch.app_lines import QuietLog, said_at_the_end
from experiments.launch.project import Project
from experiments.launch.runner import Federation, Outcome, _Log, command_line, launch, run_config
from experiments.launch.superlink import FlowerCommand, LaunchError, SuperLink, process_environment
from fedkd.errors import FedkdError, SettingError

ROOT = Path(cli.__file__).resolve().parent.parent

PYPROJECT = """
[project]
name = "toy"
version = "0.1.0"
description = "Sends a text to every peer and prints what comes back."
license = "Apache-2.0"

[tool.flwr.app]
publisher = "toy"

[tool.flwr.app.components]
serverapp = "toyserver:app"
clientapp = "toyclient:app"

[tool.flwr.app.config]
text = "hello"
behave = "echo"
size = 1
rate = 0.5
loud = false
dataset = "digits"
checkpoints = ""
data-dir = ""
out-dir = ""
run-name = "toy"
"""

SERVER = """
import os
import threading
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import ServerApp

app = ServerApp()

@app.main()
def main(grid, context):
    behave = context.run_config["behave"]
    if behave == "raise":
        raise ValueError("Expected setting `behave` to be kind.")
    if behave == "abort":
        os.write(2, b"[2025-01-01 12:00:00 C 1 1] core_worker.cc:9:  Check failed: no memory\\n")
        os.abort()
    if behave == "wait":
        print("waiting", flush=True)
        threading.Event().wait(300)
    while len(nodes := list(grid.get_node_ids())) < 3:
        pass
    content = RecordDict({"note": ConfigRecord({"text": context.run_config["text"]})})
    waiting = set(grid.push_messages([Message(content, dst_node_id=n, message_type="query") for n in nodes]))
    while waiting:
        for reply in grid.pull_messages(list(waiting)):
            waiting.discard(reply.metadata.reply_to_message_id)
            print(reply.content["note"]["text"], flush=True)
"""

CLIENT = """
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()

@app.query()
def query(message, context):
    text = "NAME heard " + message.content["note"]["text"]
    return Message(RecordDict({"note": ConfigRecord({"text": text})}), reply_to=message)
"""


def write_app(folder: Path, name: str = "toy") -> Path:
    folder.mkdir()
    (folder / "pyproject.toml").write_text(PYPROJECT)
    (folder / "toyserver.py").write_text(SERVER)
    (folder / "toyclient.py").write_text(CLIENT.replace("NAME", name))
    return folder


@pytest.fixture
def toy(tmp_path):
    return write_app(tmp_path / "toy")


# --- what a user types ------------------------------------------------------------------------------------------------


def test_values_take_the_type_of_the_default(toy, tmp_path):
    pairs = ["size=3", "rate=2", "loud=True", "text=a=b, c", "behave="]

    settings = Project.read(toy).settings(pairs, cwd=tmp_path)

    assert settings.items() >= {"size": 3, "rate": 2.0, "loud": True, "text": "a=b, c", "behave": ""}.items()
    assert [type(settings[key]) for key in ("size", "rate", "loud")] == [int, float, bool]


@pytest.mark.parametrize(
    ("pair", "complaint"),
    [
        ("sise=3", "`sise` to be a known key .*size.*'3'"),
        ("size=3.5", "`size` to be a whole number, but got '3.5'"),
        ("rate=fast", "`rate` to be a number, but got 'fast'"),
        ("loud=1", "`loud` to be true or false, but got '1'"),
        ("loud", "`loud` to be written as KEY=VALUE"),
    ],
)
def test_a_wrong_pair_names_the_key_the_value_and_what_is_allowed(toy, tmp_path, pair, complaint):
    with pytest.raises(SettingError, match=complaint):
        Project.read(toy).settings([pair], cwd=tmp_path)


def test_paths_are_the_users(toy, tmp_path):
    (tmp_path / "mine.pt").touch()
    pairs = ["out-dir=here", "data-dir=~/d", "dataset=npz:a/b.npz", "checkpoints=mine.pt,-,IMAGENET1K_V1"]

    settings = Project.read(toy).settings(pairs, cwd=tmp_path)

    assert settings["out-dir"] == str(tmp_path / "here")
    assert settings["data-dir"] == str(Path.home() / "d")
    assert settings["dataset"] == f"npz:{tmp_path}/a/b.npz"
    assert settings["checkpoints"] == f"{tmp_path}/mine.pt,-,IMAGENET1K_V1"


def test_results_go_below_the_users_folder_by_default(toy, tmp_path):
    project = Project.read(toy)
    with project.new_folder(project.settings(["run-name=first"], cwd=tmp_path), cwd=tmp_path) as settings:
        out_dir = Path(str(settings["out-dir"]))
        assert out_dir.is_dir() and out_dir.parent == tmp_path / "runs" and out_dir.name.endswith("-first")

    assert "data-dir" not in settings
    assert not out_dir.exists()  # nothing was written there


def test_a_run_that_goes_on_has_its_folder_already(toy, tmp_path):
    (toy / "pyproject.toml").write_text(PYPROJECT + 'resume = ""\n')

    project = Project.read(toy)
    with project.new_folder(project.settings(["resume=runs/a"], cwd=tmp_path), cwd=tmp_path) as settings:
        assert settings == {"resume": str(tmp_path / "runs/a")}


def test_a_folder_without_an_app_is_refused(tmp_path):
    with pytest.raises(FedkdError, match=r"--app.*no pyproject.toml"):
        Project.read(tmp_path)


@pytest.mark.parametrize(
    "wrong",
    [{"peers": 0}, {"actors": 0}, {"cpus_per_peer": 0}, {"gpus_per_peer": -0.5}, {"gpus_per_peer": float("nan")}],
)
def test_an_impossible_federation_is_refused(wrong):
    with pytest.raises(SettingError, match="--" + next(iter(wrong)).replace("_", "-")):
        Federation(**{"peers": 2, **wrong})


def test_a_running_cluster_decides_its_own_size():
    with pytest.raises(SettingError, match=r"--actors.*--ray-address"):
        Federation(peers=2, actors=2, ray_address="head:6379")

    assert "init-args" not in Federation(peers=2, ray_address="head:6379").config()


def test_actors_are_limited_through_rays_cpus():
    config = parse_config_args([Federation(peers=6, cpus_per_peer=2, actors=3, gpus_per_peer=0.25).config()])

    assert config["init-args-num-cpus"] == 6
    assert config["client-resources-num-gpus"] == 0.25 and config["num-supernodes"] == 6


# --- what Flower gets -------------------------------------------------------------------------------------------------

texts = st.text(st.characters(exclude_categories=["Cs"]))
scalars = texts | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False)


@given(st.dictionaries(st.from_regex(r"[a-z]+(-[a-z]+)*", fullmatch=True), scalars))
@example({"a": "it's \"x=1\", y='2' \\n\t\u2028 and\nmore", "b": "recipe.toml"})
@example({"a": 1e-05, "b": float("inf"), "c": ""})
def test_flower_reads_back_every_setting(settings):
    assert parse_config_args([run_config(settings)]) == settings


def test_the_printed_command_survives_a_shell(tmp_path):
    settings = {"text": 'it\'s "quoted" $HOME', "size": 2}

    words = shlex.split(command_line(tmp_path / "my app", settings, Federation(peers=4, ray_address="head:6379")))

    assert {"FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1", "RAY_ADDRESS=head:6379"} <= set(words)
    assert words[2:5] == ["flwr", "run", str(tmp_path / "my app")] and words[-1] == "--stream"
    assert parse_config_args([words[words.index("--run-config") + 1]]) == settings


def test_relative_python_path_means_the_users_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    environment = process_environment({"PYTHONPATH": f"lib{os.pathsep}/opt/lib"}, tmp_path, ray_address=None)

    assert environment["PYTHONPATH"] == f"{tmp_path / 'lib'}{os.pathsep}/opt/lib"


def test_what_flower_answers_is_read_where_colours_are_asked_for_as_jupyter_does(tmp_path):
    environment = process_environment({**os.environ, "FORCE_COLOR": "1"}, tmp_path, ray_address=None)

    with FlowerCommand(tmp_path, environment) as flwr:
        assert flwr.json("config", "list")["superlink"]


# --- what comes back --------------------------------------------------------------------------------------------------


def test_the_quiet_view_keeps_what_the_app_says():
    info, warning, error = (f"\x1b[9{n}m{word} \x1b[0m:   " for n, word in ((2, "INFO"), (3, "WARNING"), (1, "ERROR")))
    actor = "\x1b[36m(ClientAppActor pid=42)\x1b[0m "
    log = [
        f"{info}Starting Flower Simulation",
        f"{warning}Since flwr 1.32, default simulated SuperNodes changed from 10 to 2.",
        f"{info}Federation `@none/default` (6 simulated SuperNodes)",
        f"{info}To change federation size, use the following command:",
        f"{info}\tflwr federation simulation-config @none/default <superlink> --num-supernodes <N>",
        "Successfully installed toy to /home/x/apps/toy.toy.0.1.0.b51b5320.",
        "/x/ray/worker.py:2051: FutureWarning: Tip: In future versions of Ray, Ray will no longer override",
        "  warnings.warn(",
        "round 1  accuracy 81.0 %",
        "",
        f"{actor}loading weights",
        f"{actor}{warning}Manually terminating ClientAppActor",
        f"{warning}peer-2 answered late",
        f"{error}error: Expected setting `rounds` to be more.",
        f"{error}Exit Code: 700",
        "",
        "An unhandled exception occurred when running the simulation.",
    ]
    quiet = QuietLog()

    assert [line for line in map(quiet.line, log) if line is not None] == [
        "round 1  accuracy 81.0 %",
        "",
        "(ClientAppActor pid=42) loading weights",
        "warning: peer-2 answered late",
        "error: Expected setting `rounds` to be more.",
    ]


def test_the_last_words_are_those_before_the_stack():
    log = [
        "\x1b[92mINFO \x1b[0m:      ControlServicer.StreamLogs",
        '2025-01-01T12:00:00.000Z INFO [uvicorn.access] 127.0.0.1:1 - "POST /v1/control/stream-logs HTTP/1.1" 200',
        "\x1b[91mERROR \x1b[0m:     address already in use",
        "[2025-01-01 12:00:00,000 C 7 7] core_worker.cc:9:  Check failed: no memory",
        "*** StackTrace Information ***",
        "/usr/lib/python3/ray/_raylet.so(+0xf3a5aa) [0x7f7a] ray::operator<<()",
        "",
        "Fatal Python error: Aborted",
        "Current thread 0x00007f7a (most recent call first):",
        '  File "/usr/lib/python3/ray/_private/worker.py", line 2517 in connect',
    ]

    assert said_at_the_end("\n".join(log)).splitlines() == [
        "error: address already in use",
        "[2025-01-01 12:00:00,000 C 7 7] core_worker.cc:9:  Check failed: no memory",
        "Fatal Python error: Aborted",
    ]


def test_the_error_that_ends_a_run_is_left_to_whoever_tells_its_outcome():
    lines: list[str] = []
    log = _Log(lines.append, quiet=True)
    for text in ("peer-2 broke", "round 1", "no peers"):
        log.add(text if text == "round 1" else f"\x1b[91mERROR \x1b[0m:   {text}")

    log.end("error: no peers")

    assert lines == ["error: peer-2 broke", "round 1"]


@pytest.mark.parametrize(
    ("status", "signum", "code"),
    [
        ("finished:completed", None, 0),
        ("finished:failed", None, 1),
        ("finished:stopped", None, 1),
        ("running", None, 1),
        ("finished:stopped", signal.SIGINT, 130),
        ("finished:stopped", signal.SIGTERM, 143),
    ],
)
def test_only_a_completed_run_is_a_success(status, signum, code):
    assert Outcome("1", status, "", {}, (), signum).exit_code == code


def test_a_mistake_is_one_line_and_exit_status_2(toy, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fedkd", "run", "--app", str(toy), "sise=3"])

    with pytest.raises(SystemExit) as end:
        cli.main()

    assert end.value.code == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: Expected setting `sise` to be a known key (nearest: size), but got '3'."
    ]


def test_fedkds_own_settings_are_checked_before_anything_starts(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fedkd", "run", "partition-alpha=-1"])

    with pytest.raises(SystemExit) as end:
        cli.main()

    assert end.value.code == 2 and "`partition-alpha`" in capsys.readouterr().err


def test_help_loads_nothing_heavy():
    check = "import sys, experiments.cli as c; print(sorted({'flwr', 'ray', 'torch', 'numpy'} & set(sys.modules)))"

    assert subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True).stdout == "[]\n"


def write_program(folder: Path, name: str, script: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def test_a_superlink_that_cannot_start_says_what_its_log_says(tmp_path):
    write_program(tmp_path / "scripts", "flower-superlink", "echo address already in use\nexit 1")
    environment = {"PATH": f"{tmp_path / 'scripts'}:/usr/bin:/bin"}

    with (
        pytest.raises(LaunchError, match=r"did not start.*\n.*address already in use"),
        SuperLink(tmp_path, environment, hurry=lambda: False) as superlink,
    ):
        superlink.wait_until_ready()


def test_what_flower_throws_away_of_a_simulation_that_dies_is_told(tmp_path):
    scripts = tmp_path / "it's scripts"
    write_program(scripts, "flower-superlink", "flwr-simulation --token 'a b' 2>/dev/null")
    write_program(scripts, "flwr-simulation", 'echo "$# words: no memory" >&2\nkill -9 $$')

    with SuperLink(tmp_path, {"PATH": f"{scripts}:/usr/bin:/bin"}, hurry=lambda: False) as superlink:
        while not superlink.has_ended():
            pass

        assert superlink.last_words().splitlines()[0] == "2 words: no memory"


# --- what a launcher that was killed leaves ---------------------------------------------------------------------------


def test_what_a_killed_launcher_left_is_ended_and_nothing_else(tmp_path):
    """Its SuperLink may have been killed before, and an actor's environment is not to be read."""
    home = tmp_path / "home"
    home.mkdir()
    ray = "env -u FLWR_HOME sleep 300 & echo $$ $!; wait"
    superlink = subprocess.Popen(
        ["sh", "-c", f"sh -c '{ray}' & wait"], env={**os.environ, "FLWR_HOME": str(home)}, stdout=subprocess.PIPE
    )
    left = [psutil.Process(int(pid)) for pid in superlink.stdout.readline().split()]
    other = subprocess.Popen(["sleep", "300"])
    superlink.kill()
    superlink.wait()
    superlink.stdout.close()

    subprocess.run([sys.executable, "-P", processes.__file__, home], input=b"", check=True)

    assert len(left) == 2 and not any(map(processes.lives, left))
    assert not home.exists()
    assert other.poll() is None
    other.kill()
    other.wait()


# --- through Flower itself --------------------------------------------------------------------------------------------


@pytest.fixture
def marked(monkeypatch):
    """Mark every process that descends from this test."""
    mark = uuid.uuid4().hex
    monkeypatch.setenv("FEDKD_TEST_MARK", mark)
    return mark


def survivors(mark: str) -> list[str]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.environ().get("FEDKD_TEST_MARK") == mark:
                found.append(process.name())
        except psutil.Error:  # another user's, or a zombie
            continue
    return found


@pytest.mark.flower
def test_a_run_uses_its_own_code_and_leaves_nothing_behind(toy, tmp_path, marked, monkeypatch):
    """Even when started from another checkout whose packages have the same names."""
    monkeypatch.chdir(write_app(tmp_path / "other", name="other"))
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    text, lines = 'it\'s "a, b" = c', []

    outcome = launch(toy, {"text": text}, Federation(peers=3, actors=2), out=lines.append, scratch=scratch)

    assert outcome.completed and outcome.exit_code == 0, lines
    assert list(outcome.tail) == [f"toy heard {text}"] * 3
    command = command_line(toy, {"text": text}, Federation(peers=3, actors=2))
    assert lines == [f"$ {command}", "starting Flower and Ray ...", *outcome.tail]
    assert 0 < outcome.flower_seconds < outcome.seconds
    assert survivors(marked) == [] and list(scratch.iterdir()) == []


@pytest.mark.flower
def test_a_failed_run_ends_with_the_apps_own_words_and_exit_status_1(toy, tmp_path, marked):
    command = [sys.executable, "-m", "experiments", "run", "--app", str(toy), "--peers", "1", "behave=raise"]

    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1] == "error: Expected setting `behave` to be kind."
    assert survivors(marked) == []


@pytest.mark.flower
def test_ctrl_c_stops_the_run_and_all_its_processes(toy, tmp_path, marked):
    command = [sys.executable, "-u", "-m", "experiments", "run", "--app", str(toy), "--peers", "1", "behave=wait"]
    launched = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # where the tests run in the background
    )  # fmt: skip
    lines = iter(launched.stdout)
    while "waiting" not in next(lines):
        pass
    assert "flwr-simulation" in survivors(marked)

    launched.send_signal(signal.SIGINT)
    rest = list(lines)

    assert launched.wait() == 130
    assert rest[-1] == "error: stopped by SIGINT\n"
    assert survivors(marked) == []


@pytest.mark.flower
def test_a_launcher_that_is_killed_leaves_nothing_behind(toy, tmp_path, marked, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    command = [sys.executable, "-u", "-m", "experiments", "run", "--app", str(toy), "--peers", "1", "behave=wait"]
    launched = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    while "waiting" not in next(launched.stdout):
        pass
    (home,) = tmp_path.glob("fedkd-*")
    family = [*processes.at_home(home), *processes.below(launched.pid)]
    assert any("flwr-simulation" in process.name() for process in family)

    launched.kill()
    launched.communicate()

    while any(map(processes.lives, family)) or home.exists():
        pass
    assert survivors(marked) == []


@pytest.mark.flower
def test_a_simulation_that_dies_is_noticed_soon_and_its_last_words_are_told(toy):
    outcome = launch(toy, {"behave": "abort"}, Federation(peers=1), out=lambda _: None)

    assert outcome.exit_code == 1
    assert outcome.reason.splitlines()[1:] == ["[2025-01-01 12:00:00 C 1 1] core_worker.cc:9:  Check failed: no memory"]
    assert outcome.phases["start"] < 50  # Flower's own patience is 60 seconds
