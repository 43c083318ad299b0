"""What a stranger gets: a wheel that claims one name, and a bundle that holds all it needs."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

from experiments.compare.tuning import tune as search
from experiments.export import export
from experiments.launch.runner import Federation
from experiments.report.tensorboard import Board
from fedkd import __version__, models
from fedkd.data.sources import load_source
from fedkd.errors import FedkdError
from fedkd.privacy import Mechanism
from fedkd.results.folder import git_commit
from fedkd.settings.config import RunConfig
from fedkd.source import source_hash
from fedkd.wire.codecs import codec

ROOT = Path(__file__).parent.parent
ROOMS = ("clients", "strategies", "experiments")
SMALL = ["--peers", "2", "models=mlp,cnn-small", "proxy-size=60", "pretrain-epochs=1", "rounds=1", "distill-epochs=1"]


def run(*command, cwd, **environment):
    return subprocess.run(
        [str(word) for word in command], cwd=cwd, env={**os.environ, **environment},
        capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip


def build(kind, source, folder):
    done = run(sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", folder, cwd=source)
    assert done.returncode == 0, done.stderr
    (made,) = folder.iterdir()
    return made


def unpack(archive, folder):
    with zipfile.ZipFile(archive) as opened:
        opened.extractall(folder)
    return folder


def files(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder as pip's `--target` leaves it."""
    wheel = build("wheel", ROOT, tmp_path_factory.mktemp("dist"))
    return unpack(wheel, tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """The bundle that `flwr build` makes, unpacked."""
    folder = tmp_path_factory.mktemp("fab")
    done = run(sys.executable, "-c", "from flwr.cli.app import app; app()", "build", "--app", ROOT, cwd=folder)
    assert done.returncode == 0, done.stderr + done.stdout
    (fab,) = folder.glob("*.fab")
    return unpack(fab, tmp_path_factory.mktemp("app"))


def from_wheel(installed, cwd, *words):
    """Run the command line that is in the wheel: ahead of everything else that this Python has installed."""
    return run(sys.executable, "-P", "-m", "fedkd", *words, cwd=cwd, PYTHONPATH=str(installed))


def test_the_wheel_claims_one_name(installed):
    assert {path.name for path in installed.iterdir()} == {"fedkd", f"fedkd-{__version__}.dist-info"}
    assert not {path for path in files(installed) if "__pycache__" in path or path.endswith(".pyc")}


def test_the_wheel_holds_the_library_and_the_app_whole(installed):
    app = installed / "fedkd" / "flower-app"
    found = {path.relative_to(ROOT) for room in ROOMS for path in (ROOT / room).rglob("*") if path.is_file()}
    caches = {path for path in found if any(part.startswith((".", "__pycache__")) for part in path.parts)}
    ours = {path.as_posix() for path in found - caches if "gpu_kit" not in path.parts}  # which packs a clone

    assert "experiments/report/page.html.jinja" in ours and "experiments/examples/notebook.ipynb" in ours
    assert "experiments/recipes/rounds.toml" in ours
    assert files(app) == ours | {"pyproject.toml", "LICENSE"}
    assert not (app / "fedkd").exists()  # the library is there once
    assert (installed / "fedkd" / "py.typed").exists()


def test_a_wheel_holds_nothing_that_a_user_left_in_the_folders_of_the_app(installed, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "runs", "build", "dist", "__pycache__"))
    for stray in (
        "experiments/runs/secret.key",
        "experiments/runs/note.py",
        "clients/.env",
        "clients/.env.py",
        "strategies/node.key",
    ):
        (source / stray).parent.mkdir(exist_ok=True)
        (source / stray).write_text("secret")

    made = unpack(build("wheel", source, tmp_path / "dist"), tmp_path / "made")

    assert files(made) == files(installed)


def test_an_sdist_gives_the_same_wheel(installed, tmp_path):
    with tarfile.open(build("sdist", ROOT, tmp_path / "sdist")) as opened:
        opened.extractall(tmp_path / "source", filter="data")
    (source,) = (tmp_path / "source").iterdir()

    again = unpack(build("wheel", source, tmp_path / "dist"), tmp_path / "again")

    assert files(again) == files(installed)


def test_an_editable_install_is_the_clone_itself(tmp_path):
    code = "from hatchling.build import build_editable; import sys; build_editable(sys.argv[1])"
    assert run(sys.executable, "-c", code, tmp_path, cwd=ROOT).returncode == 0

    (made,) = tmp_path.glob("*.whl")

    assert {name.split("/")[0] for name in zipfile.ZipFile(made).namelist()} == {
        "_fedkd.pth", f"fedkd-{__version__}.dist-info",
    }  # fmt: skip


def test_the_installed_command_finds_its_app_inside_the_package(installed, tmp_path):
    version = from_wheel(installed, tmp_path, "--version")
    doctor = from_wheel(installed, tmp_path, "doctor")

    assert version.stdout.strip() == f"fedkd {__version__}"
    assert doctor.returncode == 0, doctor.stdout + doctor.stderr
    assert str(installed / "fedkd" / "flower-app") in doctor.stdout


def test_importing_the_installed_library_puts_nothing_else_on_the_path(installed, tmp_path):
    code = "import sys; before = list(sys.path); import fedkd.losses, fedkd.settings; print(sys.path == before)"

    assert run(sys.executable, "-P", "-c", code, cwd=tmp_path, PYTHONPATH=str(installed)).stdout.strip() == "True"


@pytest.mark.slow
def test_the_bundle_holds_what_a_run_needs_and_nothing_else(bundle):
    found = {path.split("/")[0] for path in files(bundle)}

    assert found == {"fedkd", "clients", "strategies", "pyproject.toml", "LICENSE", ".info"}
    assert all(path.endswith(".py") for path in files(bundle) if path.split("/")[0] in ("fedkd", "clients"))


def test_the_bundle_is_of_the_format_that_flower_hub_publishes(bundle):
    from flwr.supercore.fab_format_version import normalize_and_validate_fab_format

    found = normalize_and_validate_fab_format(tomllib.loads((bundle / "pyproject.toml").read_text(encoding="utf-8")))

    assert (found.fab_format_version, found.flwr_version_min) == (1, "1.39")
    assert "Apache License" in (bundle / "LICENSE").read_text(encoding="utf-8")


def test_a_commit_is_that_of_the_code_and_not_of_the_repository_around_an_environment(tmp_path):
    (tmp_path / "mine.py").write_text("")
    (tmp_path / ".gitignore").write_text(".venv/\n")
    (tmp_path / ".venv" / "fedkd").mkdir(parents=True)
    (tmp_path / ".venv" / "fedkd" / "codec.py").write_text("")
    identity = ["-c", "user.name=A", "-c", "user.email=a@example.org"]
    for words in (["init", "-q"], ["add", "."], [*identity, "commit", "-q", "-m", "mine"]):
        assert run("git", *words, cwd=tmp_path).returncode == 0

    assert len(git_commit(tmp_path)) == 40
    assert git_commit(tmp_path / ".venv" / "fedkd") == ""


@pytest.mark.slow
@pytest.mark.flower
def test_a_run_from_the_installed_wheel_in_an_empty_folder(installed, tmp_path):
    done = from_wheel(installed, tmp_path, "run", *SMALL, "out-dir=run")

    assert done.returncode == 0, done.stdout + done.stderr
    assert f"flwr run {installed / 'fedkd' / 'flower-app'}" in done.stdout
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["mean"]["after"] > 0


@pytest.mark.slow
@pytest.mark.flower
def test_a_run_of_the_bundle_in_an_empty_folder(bundle, tmp_path):
    """All that runs comes out of the bundle, though this Python has a fedkd of its own."""
    marked = bundle / "clients" / "__init__.py"
    marked.write_text(marked.read_text() + "# the bundle's own\n")

    done = run(sys.executable, "-m", "fedkd", "run", "--app", bundle, *SMALL, f"out-dir={tmp_path}/run", cwd=tmp_path)

    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "run" / "config.json").read_text())["source"] != source_hash()


def use_zstd(tmp_path):
    codec("fp32+zstd")


def use_tune(tmp_path):
    search({}, Federation(peers=2), tmp_path, trials=1, seeds=1, batch=1)


def use_tensorboard(tmp_path):
    Board(tmp_path)


def use_privacy(tmp_path):
    Mechanism.from_config(RunConfig(privacy_epsilon=1.0))


def use_export(tmp_path):
    export(tmp_path, peer=None, form="onnx")


def use_timm(tmp_path):
    models.build("timm:resnet18", input_shape=(3, 32, 32), num_classes=2, seed=0)


def use_transformers(tmp_path):
    models.build("hf:google/vit-base-patch16-224", input_shape=(3, 224, 224), num_classes=2, seed=0)


def use_datasets(tmp_path):
    load_source("hf:mnist", data_dir=tmp_path)


@pytest.mark.parametrize(
    ("extra", "module", "use"),
    [
        ("datasets", "datasets", use_datasets),
        ("zstd", "zstandard", use_zstd),
        ("tune", "optuna", use_tune),
        ("tensorboard", "torch.utils.tensorboard", use_tensorboard),
        ("privacy", "dp_accounting.pld", use_privacy),
        ("export", "onnx", use_export),
        ("timm", "timm", use_timm),
        ("transformers", "transformers", use_transformers),
    ],
)
def test_what_one_feature_needs_is_named_with_its_extra_where_it_is_missing(tmp_path, monkeypatch, extra, module, use):
    monkeypatch.setitem(sys.modules, module, None)

    with pytest.raises(FedkdError, match=re.escape(f"fedkd[{extra}]")):
        use(tmp_path)


def test_every_extra_that_a_user_may_need_is_among_these():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]

    assert set(declared) - {"dev", "docs", "mutation", "backbones"} == {
        "fast", "zstd", "tune", "tensorboard", "privacy", "export", "timm", "transformers", "datasets",
    }  # fmt: skip


def test_uv_installs_what_the_project_needs(tmp_path):
    uv = shutil.which("uv", path=Path(sys.executable).parent) or shutil.which("uv")
    if uv is None:
        pytest.skip("there is no uv here")
    about = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "uv" not in about["tool"]  # what is left out there is left out of every user's environment, silently
    done = run(uv, "pip", "compile", "-q", "--no-header", "--no-annotate", ROOT / "pyproject.toml", cwd=tmp_path)
    if done.returncode and re.search("fetch|connect|timed out|dns", done.stderr, re.IGNORECASE):
        pytest.skip("uv reaches no package index")
    assert done.returncode == 0, done.stderr
    chosen = {re.split(r"[^\w.-]", line)[0] for line in done.stdout.splitlines() if line}
    assert {re.split(r"[^\w.-]", need)[0] for need in about["project"]["dependencies"]} <= chosen
