"""Installed as the README says, by pip, by uv and from a wheel, each in an environment of its own: a run completes."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SMALL = "--peers 2 rounds=1 pretrain-epochs=1 models=mlp pooled-model=mlp out-dir={folder}/run"
NO_INDEX = "(?i)fetch|connect|timed out|resolve host|no matching distribution|dns|certificate"

pytestmark = [pytest.mark.slow, pytest.mark.flower, pytest.mark.timeout(1800)]


@pytest.fixture
def clone(tmp_path):
    """The project as a clone has it: what is ignored is not there."""
    folder = tmp_path / "clone"
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a clone")
    for name in filter(None, done.stdout.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    yield folder
    shutil.rmtree(tmp_path)  # an environment is gigabytes


def first_commands():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.findall(r"^```sh\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)[0].strip().split("\n")


def completes(commands, folder, cwd):
    """Run the commands of a shell in an environment of nothing else; a run of theirs leaves its results."""
    kept = {name: value for name, value in os.environ.items() if name in ("PATH", "LANG", "TMPDIR", "SSL_CERT_FILE")}
    kept |= {
        name: value for name, value in os.environ.items() if name.startswith(("PIP_", "UV_")) and "ENV" not in name
    }
    kept |= {"HOME": os.environ["HOME"], "FLWR_TELEMETRY_ENABLED": "0"}
    done = subprocess.run(["bash", "-euc", "\n".join(commands)], cwd=cwd, env=kept, capture_output=True, text=True)
    if done.returncode and not (folder / "run").exists() and re.search(NO_INDEX, done.stderr):
        pytest.skip("no package index is reached")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert len(json.loads((folder / "run" / "summary.json").read_text())["peers"]) == 2


def test_by_pip_in_a_clone(clone, tmp_path):
    *install, run = first_commands()
    assert run == "fedkd run"
    python = f'python3() {{ {sys.executable} "$@"; }}'  # this one, whatever else the machine calls so

    completes([python, *install, f"{run} {SMALL.format(folder=tmp_path)}"], tmp_path, clone)


def test_by_uv_in_a_clone(clone, tmp_path):
    said = re.findall(r"`(uv [^`]*)`", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert said[:2] == ["uv sync", "uv run fedkd run"]
    found = shutil.which("uv", path=Path(sys.executable).parent) or shutil.which("uv")
    assert found, "uv is in the extra `dev`"
    uv = f'uv() {{ {found} "$@"; }}'

    completes([uv, said[0], f"{said[1]} {SMALL.format(folder=tmp_path)}"], tmp_path, clone)


def test_from_a_wheel_in_an_empty_folder(clone, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    environment = tmp_path / "environment"

    completes(
        [
            f"{sys.executable} -m venv {environment}",
            f"{environment}/bin/pip wheel --quiet --no-deps --wheel-dir {tmp_path}/dist {clone}",
            f"{environment}/bin/pip install --quiet {tmp_path}/dist/*.whl",
            f"{environment}/bin/fedkd run {SMALL.format(folder=tmp_path)}",
        ],
        tmp_path,
        empty,
    )
