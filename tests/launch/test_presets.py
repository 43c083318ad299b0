"""`preset=NAME`: a method's settings in the place of the defaults."""

import re
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from experiments import cli, notebook
from experiments.launch.presets import FOLDER, names, preset, table
from experiments.launch.project import Project
from experiments.studies.__main__ import with_presets
from fedkd.errors import FedkdError, SettingError
from fedkd.settings.config import RunConfig
from fedkd.settings.effect import without_effect

PAGE = Path(__file__).parents[2] / "docs" / "strategies.md"


def settings(*words, cwd=Path("/somewhere"), **options):
    return Project.read().settings(words, cwd=cwd, **options)


@pytest.mark.parametrize("name", names())
def test_a_preset_can_be_run_as_it_stands_and_says_nothing_without_effect(name):
    config = RunConfig.from_mapping(preset(name).settings)

    assert without_effect(config) == []
    assert preset(name).title and preset(name).teacher and (preset(name).differs or name == "ours")


@pytest.mark.parametrize("name", names())
def test_every_value_of_a_published_method_that_is_no_default_says_whose_it_is(name):
    text = (FOLDER / f"{name}.toml").read_text().partition("[settings]\n")[2]
    makes_it = {"strategy", "consensus", "weighing", "selector", "divergence"}

    for line in text.splitlines():
        key = line.partition(" = ")[0]
        assert key in makes_it or re.search(r"\[(paper|code|ours)\]", line), line


@pytest.mark.parametrize("words", [("preset=fedaux", "learning-rate=0.5"), ("learning-rate=0.5", "preset=fedaux")])
def test_what_else_is_said_wins_over_a_preset_wherever_it_stands(words):
    found = settings(*words)

    assert found == {**preset("fedaux").settings, "learning-rate": 0.5}
    assert found["weighing"] == "density"


@pytest.mark.parametrize("name", names())
def test_everything_a_preset_brings_can_be_said_otherwise(name):
    defaults = RunConfig().to_mapping()
    words = [f"{key}={str(defaults[key]).lower()}" for key in preset(name).settings]

    assert RunConfig.from_mapping(settings(f"preset={name}", *words)) == RunConfig()


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["run", "preset=fedaix"], r"`preset`.*nearest: fedaux.*'fedaix'"),
        (["run", "preset="], r"nearest: .*fedmd"),
        (["compare", "rounds", "preset=fedmf"], r"nearest: fedmd"),
        (["run", "--preset", "ours"], r"settings are words, `preset=ours`"),
        (["run", "prest=ours"], r"nearest: .*preset"),
    ],
)
def test_a_mistake_is_one_line(words, complaint):
    result = CliRunner().invoke(cli.app, words)

    assert isinstance(result.exception, FedkdError) and result.exit_code
    assert re.search(complaint, str(result.exception)) and "\n" not in str(result.exception)


def test_help_names_the_methods():
    text = " ".join(CliRunner().invoke(cli.app, ["run", "-h"]).output.split())

    assert all(name in text for name in names())


def test_an_app_with_a_setting_of_that_name_keeps_it(tmp_path):
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "theirs"\n[tool.flwr.app.config]\npreset = "plain"\n')

    assert Project.read(tmp_path).settings(["preset=loud"], cwd=tmp_path) == {"preset": "loud"}


def test_a_notebook_runs_a_preset_too(monkeypatch):
    seen = []
    monkeypatch.setattr(notebook, "simulate", lambda pairs, **_: seen.extend(pairs) or pytest.skip("never"))
    with pytest.raises(pytest.skip.Exception):
        notebook.run({"preset": "ours", "rounds": 3}, ray_address=None, quiet=True)

    assert settings(*seen) == {**preset("ours").settings, "rounds": 3}


def test_the_table_of_the_page_is_what_the_files_say():
    text = PAGE.read_text()

    assert with_presets(text) == text, "make it anew: python -m experiments.studies presets docs/strategies.md"
    assert all(f"| `{name}` (" in table() for name in names())


def test_a_table_that_was_changed_by_hand_is_made_anew():
    before = "head\n<!-- presets -->\nwrong\n<!-- /presets -->\ntail\n"

    assert with_presets(before) == f"head\n<!-- presets -->\n\n{table()}\n\n<!-- /presets -->\ntail\n"


@pytest.mark.parametrize("name", names())
def test_a_file_has_these_parts_and_no_others(name):
    content = tomllib.loads((FOLDER / f"{name}.toml").read_text())

    assert content.keys() == {"title", "teacher", "source", "differs", "settings"}


def test_an_unknown_preset_names_all_where_none_is_near():
    with pytest.raises(SettingError, match=r"by-class, ds-fl, .*ours"):
        preset("zzzz")
