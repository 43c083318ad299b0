"""What of an app's folder goes to Flower: the same as without a copy, only sooner."""

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from test_launch import write_app

from experiments.launch.bundle import bundled

FILES = (
    "notes.md", "part/deep/settings.yaml", "part/runs.py", "LICENSE", "lib/code.py", "part/lib/code.py",
    "data.npz", "part/LICENSE", "runs/1/rounds.jsonl", "part/runs/x.json", "build/x.py", "part/build/x.py",
    ".hidden/code.py", "part/__pycache__/code.py", "mine/pyvenv.cfg", "mine/lib/code.py", ".venv/lib/code.py",
)  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    app = write_app(tmp_path / "toy")
    for name in FILES:
        (app / name).parent.mkdir(parents=True, exist_ok=True)
        (app / name).write_text(name)
    (app / ".gitignore").write_text("runs/\n*.log\n/notes/\n# lib/\n")
    (app / "linked.py").symlink_to(app / "toyclient.py")
    return app


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_code_and_its_texts_go_along_and_environments_and_results_stay(folder, tmp_path):
    copy = bundled(folder, tmp_path / "copy")

    assert files(copy) == {
        "pyproject.toml", "toyclient.py", "toyserver.py", ".gitignore", "notes.md", "part/deep/settings.yaml",
        "part/runs.py", "LICENSE", "part/lib/code.py", "part/build/x.py", ".hidden/code.py",
    }  # fmt: skip
    assert (copy / "part/lib/code.py").read_text() == "part/lib/code.py"


@pytest.mark.parametrize("lines", ["/runs/\n", "/runs\n", "runs/*\n!.gitkeep\n", "**/runs/\n", "*.jsonl\n"])
def test_what_is_ignored_in_another_way_stays_too(folder, tmp_path, lines):
    (folder / ".gitignore").write_text(lines)

    assert "runs/1/rounds.jsonl" not in files(bundled(folder, tmp_path / "copy"))


def test_what_a_later_line_takes_back_goes_along(folder, tmp_path):
    (folder / ".gitignore").write_text("runs/\n!part/runs/\n")

    copied = files(bundled(folder, tmp_path / "copy"))

    assert "part/runs/x.json" in copied and "runs/1/rounds.jsonl" not in copied


@pytest.mark.parametrize("content", [b"runs/\n\xff", None])
def test_a_gitignore_that_flower_does_not_read_hides_nothing(folder, tmp_path, content):
    (folder / ".gitignore").unlink()
    if content is None:
        (tmp_path / "elsewhere").write_text("runs/\n")
        (folder / ".gitignore").symlink_to(tmp_path / "elsewhere")
    else:
        (folder / ".gitignore").write_bytes(content)

    assert "runs/1/rounds.jsonl" in files(bundled(folder, tmp_path / "copy"))


def test_a_copy_within_the_app_does_not_hold_itself(folder, tmp_path):
    whole = files(bundled(folder, tmp_path / "copy"))
    (folder / "out" / "home").mkdir(parents=True)
    (folder / "out" / "home" / "config.toml").touch()  # as a launch has it there already

    assert files(bundled(folder, folder / "out" / "home" / "bundle")) == whole


def test_an_app_whose_patterns_speak_of_what_is_left_out_is_handed_over_as_it_is(folder, tmp_path):
    project = folder / "pyproject.toml"
    project.write_text(project.read_text().replace("[tool.flwr.app]", '[tool.flwr.app]\nfab-exclude = ["lib/**"]'))

    assert bundled(folder, tmp_path / "copy") == folder


def test_flower_makes_the_same_bundle_of_it(folder, tmp_path):
    (folder / "mine" / "pyvenv.cfg").unlink()  # Flower bundles an environment that has another name than usual
    (folder / "mine" / "lib" / "code.py").unlink()

    made = []
    for name, app in (("whole", folder), ("part", bundled(folder, tmp_path / "copy"))):
        (tmp_path / name).mkdir()
        flwr = Path(sysconfig.get_path("scripts")) / "flwr"
        subprocess.run([sys.executable, flwr, "build", "--app", app], cwd=tmp_path / name, check=True, timeout=60)
        (bundle,) = (tmp_path / name).glob("*.fab")
        made.append(bundle.read_bytes())

    assert made[0] == made[1]
