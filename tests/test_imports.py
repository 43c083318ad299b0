"""What may import what: the contracts are in pyproject.toml, here they are held to."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def lint(folder):
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as run; run()", "--no-cache"]
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "PYTHONPATH": str(folder)},
    )  # fmt: skip


def test_the_contracts_of_the_rooms_are_kept():
    done = lint(ROOT)

    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


@pytest.mark.parametrize(
    ("file", "line", "found"),
    [
        ("strategies/gossip.py", "import clients.configuration", "strategies is not allowed to import clients"),
        ("fedkd/wire/codecs.py", "import strategies.relay.rounds", "fedkd is not allowed to import strategies"),
        ("strategies/relay/post.py", "def average():\n    import torch", "strategies is not allowed to import torch"),
        (
            "fedkd/losses/teachers.py",
            "import fedkd.settings.config",
            "fedkd.losses is not allowed to import fedkd.settings",
        ),
        ("fedkd/results/folder.py", "import flwr", "fedkd is not allowed to import flwr"),
    ],
)
def test_an_import_against_the_direction_is_found(tmp_path, file, line, found):
    for room in ("fedkd", "clients", "strategies", "experiments"):
        shutil.copytree(ROOT / room, tmp_path / room, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with (tmp_path / file).open("a") as wrong:
        wrong.write(f"\n\n{line}\n")

    done = lint(tmp_path)

    assert done.returncode == 1 and found in done.stdout, done.stdout


@pytest.mark.parametrize(
    ("modules", "absent"),
    [
        ("strategies.server_app, strategies.registry", {"torch", "torchvision", "ray", "sklearn"}),
        ("clients.client_app, clients.worker_client, clients.configuration", {"torch", "torchvision", "matplotlib"}),
        (
            "fedkd.losses.divergences, fedkd.losses.teachers, fedkd.metrics",
            {"flwr", "ray", "pandas", "matplotlib", "sklearn"},
        ),
        ("fedkd.__main__, experiments.cli", {"torch", "flwr", "ray", "numpy", "pandas", "matplotlib"}),
    ],
)
def test_what_a_process_does_not_need_it_does_not_load(modules, absent):
    code = f"import sys, {modules}; print(*sorted({absent!r} & set(sys.modules)))"

    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout

    assert loaded.split() == []
