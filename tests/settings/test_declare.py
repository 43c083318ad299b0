"""A setting is declared in one place, and everything that has to know of it does."""

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from fedkd.settings.declare import DATA, EXCHANGE, FREE, setting
from fedkd.settings.rules import ANY, at_least

ROOT = Path(__file__).parents[2]
MADE_UP = """
    made_up: float = setting(
        0.25, between(0, 1), "of a test", decides=EXCHANGE, costs=FREE,
        takes=Condition("strategy gossip", lambda c: c.strategy == "gossip"),
    )  # fmt: skip
    made_up_data: str = setting("", ANY, "of a test", decides=DATA)
    made_up_code: str = setting("", ANY, "of a test", decides=EXCHANGE, opens=CODE)
    made_up_files: str = setting("", ANY, "of a test", decides=TRAINING, opens=FILES)
    made_up_epochs: int = setting(
        1, at_least(0), "of a test", decides=EXCHANGE, costs="max-epochs", controls=("pooled",),
        epochs=lambda c, kind, _: c.made_up_epochs if kind == "learn" else 0,
    )  # fmt: skip
    made_up_batch: int = setting(2, at_least(0), "of a test", decides=BOOKKEEPING, costs="max-batch-size")
"""
LOOKED_FOR = """
from pathlib import Path

import pytest
from typer.testing import CliRunner

from clients.configuration import PeerConfig
from clients.limits import Limits
from clients.own_settings import own_settings
from experiments.analysis.settings import SCENARIO_KEYS, VARIANT_KEYS, control_group, has_effect
from experiments.cli import app
from experiments.launch import preflight
from fedkd.errors import SettingError
from fedkd.settings.config import RunConfig

defaults = RunConfig().to_mapping()

# Its rule, with the key, the value and what is allowed.
with pytest.raises(SettingError, match=r"`made-up` to be a number in \\[0, 1\\], but got 2.0"):
    RunConfig.from_mapping({"made-up": 2.0})

# In a terminal.
printed = CliRunner().invoke(app, ["settings", "made-up"]).stdout
assert printed.count("made-up") == 6 and "The run" not in printed

# Whether it has an effect, what sets variants apart, what is not compared, what controls depend on.
assert not has_effect(defaults, "made-up") and has_effect({**defaults, "strategy": "gossip"}, "made-up")
assert {"made-up", "made-up-code", "made-up-files"} <= set(VARIANT_KEYS) and "made-up-batch" not in VARIANT_KEYS
assert "made-up-data" in SCENARIO_KEYS


def shared(name, **changed):
    changed = {key.replace("_", "-"): value for key, value in changed.items()}
    return control_group({**defaults, "peers": 2, **changed}, name) == control_group({**defaults, "peers": 2}, name)


assert shared("isolated", made_up_epochs=2) and not shared("pooled", made_up_epochs=2)
assert not shared("isolated", made_up_files="a") and shared("isolated", made_up_batch=3)

# Before Flower starts: code and files that are not there.
for key, value in {"made-up-code": "nowhere_at_all:loss", "made-up-files": "nowhere.bin"}.items():
    with pytest.raises(SettingError, match=key):
        preflight.check(RunConfig.from_mapping({key: value}), 2, app=Path.cwd(), cwd=Path.cwd())

# A deployed peer: its limits, and what it does not open.
with pytest.raises(SettingError, match="`made-up-epochs`.*max-epochs"):
    Limits(epochs=30).check(RunConfig(made_up_epochs=40), "learn")
with pytest.raises(SettingError, match="`made-up-batch`.*max-batch-size"):
    Limits().check(RunConfig(made_up_batch=10**6), "learn")
own = own_settings({"name": "north", "model": "mlp", "dataset": "npz:a.npz", "proxy": "npz:b.npz"})
peer = PeerConfig.of_own(own, name="north", root=Path("state"), simulated=False)
for key, value in {"made_up_code": "evil:run", "made_up_files": "/etc/passwd"}.items():
    with pytest.raises(SettingError, match=key.replace("_", "-")):
        peer.settings(RunConfig(**{key: value}))
"""
START = """
import pathlib

import torch
from torch import nn

from clients.configuration import PeerConfig
from clients.pretrained import pretrain
from fedkd.settings.config import RunConfig

peer, trained = PeerConfig("a", 0, 1, pathlib.Path("a"), pathlib.Path("a")), []
for changed in ({}, {"made_up": 0.5}, {"made_up_batch": 3}, {"made_up_data": "x"}, {"made_up_files": "x"}):
    pretrain(nn.Linear(1, 1), RunConfig(**changed), peer, (), lambda: trained.append(changed) or 0)
assert trained == [{}, {"made_up_data": "x"}, {"made_up_files": "x"}], trained
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A copy of the project with settings that it does not know."""
    folder = tmp_path_factory.mktemp("project")
    for room in ("fedkd", "clients", "strategies", "experiments"):
        shutil.copytree(ROOT / room, folder / room, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    learning = folder / "fedkd" / "settings" / "learning.py"
    words = "from fedkd.settings.declare import BOOKKEEPING, DATA, FILES, Condition\n"
    text = learning.read_text(encoding="utf-8").replace(
        "from fedkd.settings.rules", words + "from fedkd.settings.rules", 1
    )
    learning.write_text(text + MADE_UP, encoding="utf-8")
    return folder


def python(folder, *arguments):
    found = subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr


def test_a_made_up_setting_is_found_everywhere(project):
    python(project, "-c", LOOKED_FOR)


def test_starts_that_know_nothing_of_a_setting_are_shared(project):
    python(project, "-c", START)


def test_one_command_writes_what_is_repeated_in_readme_and_defaults(project):
    python(project, "-m", "fedkd.settings")

    readme, before = ((folder / "README.md").read_text(encoding="utf-8") for folder in (project, ROOT))
    assert "| `made-up` | `0.25` | a number in [0, 1] | of a test |" in readme
    assert [line for line in readme.split("\n") if "`made-up" not in line] == before.split("\n")
    written = tomllib.loads((project / "pyproject.toml").read_text(encoding="utf-8"))
    ours = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    new = written["tool"]["flwr"]["app"]["config"]
    assert {name: value for name, value in new.items() if name.startswith("made-up")} == {
        "made-up": 0.25, "made-up-data": "", "made-up-code": "", "made-up-files": "", "made-up-epochs": 1,
        "made-up-batch": 2,
    }  # fmt: skip
    for name in [name for name in new if name.startswith("made-up")]:
        del new[name]
    assert written == ours


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ({"decides": "everything"}, "decides='everything'"),
        ({"decides": DATA, "opens": "a door"}, "opens='a door'"),
        ({"decides": DATA, "costs": "max-joy"}, "costs='max-joy'"),
        ({"decides": EXCHANGE}, "a number needs the limit"),
    ],
)
def test_a_setting_that_does_not_say_what_it_is_cannot_be_declared(words, complaint):
    with pytest.raises(ValueError, match=complaint):
        setting(1, at_least(0), "of a test", **words)
    setting(1, at_least(0), "of a test", decides=DATA, costs=FREE)
    setting("", ANY, "of a test", decides=DATA)
