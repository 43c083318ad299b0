"""What README.md and docs/ say, held against the program. That the site builds is for the CI to see."""

import json
import re
import shlex
import tomllib
from collections import Counter
from dataclasses import fields
from pathlib import Path

import click
import pytest
import typer

from clients.own_settings import _KEYS as OWN_KEYS
from experiments.cli import app
from experiments.launch.project import Project
from fedkd.losses import divergences
from fedkd.settings.config import GROUPS, RunConfig
from fedkd.settings.declare import key, of
from fedkd.settings.rules import STRATEGIES
from fedkd.settings.table import lines, settings_table

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
CODE_BLOCK = re.compile(r"^```([\w{}-]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
KEYS = [row.split("`")[1] for row in settings_table().splitlines()[2:]]

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def read(name):
    return (ROOT / name).read_text()


def code_blocks(page):
    return [(match[1], match[2]) for match in CODE_BLOCK.finditer(page.read_text())]


def commands(page):
    """Every `fedkd ...` of a page's shell blocks, as words without comments."""
    lines = [line for kind, text in code_blocks(page) if kind in ("", "sh") for line in text.splitlines()]
    words = [shlex.split(line.removeprefix("PYTHONPATH=. "), comments=True) for line in lines if "fedkd " in line]
    return [line for line in words if line[:1] == ["fedkd"]]


def anchors(page):
    """The anchors of a page's headings, as forges make them."""
    headings = re.findall(r"^#+ (.+)$", CODE_BLOCK.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-").replace("_", "-") for heading in headings}


@pages
def test_links_lead_somewhere(page):
    text = CODE_BLOCK.sub("", page.read_text())
    targets = [target for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target]

    for target in targets:
        name, _, anchor = target.partition("#")
        linked = (page.parent / name).resolve() if name else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


@pages
def test_commands_are_the_programs(page):
    for words in commands(page):
        command, rest = typer.main.get_command(app), words[1:]
        while isinstance(command, click.Group) and rest and not rest[0].startswith("-"):
            command, rest = command.commands[rest[0]], rest[1:]
        assert isinstance(command, click.Group) or command.make_context(words[0], rest, resilient_parsing=True)
        known = {option for parameter in command.params for option in parameter.opts}
        assert {word.partition("=")[0] for word in rest if word.startswith("-")} <= known, words


@pages
def test_settings_in_commands_are_allowed_together(page):
    for words in commands(page):
        pairs = [word for word in words if re.match(r"[a-z][a-z0-9-]*=", word)]
        settings = Project.read().settings(pairs, cwd=ROOT)
        RunConfig.from_mapping({name: value for name, value in settings.items() if name != "out-dir"})


@pages
def test_settings_in_the_text_exist_and_may_be_so(page):
    rules = {key(field.name): of(field).rule for field in fields(RunConfig)}
    for code in re.findall(r"`([^`\n]+)`", CODE_BLOCK.sub("", page.read_text())):
        found = re.fullmatch(r"([a-z][a-z0-9]*(?:-[a-z0-9]+)*) ?= ?(.+)", code)
        if found and found[1] not in OWN_KEYS:
            for value in found[2].split(" | "):
                text = value.strip('"')
                setting = Project.read().settings([f"{found[1]}={text}"], cwd=ROOT)[found[1]]
                assert rules[found[1]].accepts(setting), code


@pages
def test_examples_in_python_run_and_those_in_toml_are_read(page, monkeypatch):
    monkeypatch.setattr(divergences, "_REGISTRY", {})
    for kind, text in code_blocks(page):
        if kind == "python":
            exec(compile(text, str(page), "exec"), {"__name__": "example"})
        if kind == "toml":
            tomllib.loads(text)


def test_the_readme_begins_with_how_to_run_and_how_to_test():
    run, test, *_ = [text for kind, text in code_blocks(ROOT / "README.md") if kind == "sh"]

    assert run.splitlines()[-1] == "fedkd run"
    assert test.splitlines()[-1] == "pytest -n 2 --dist loadgroup"


def test_every_page_is_in_the_sites_contents():
    for folder in (ROOT / "docs", ROOT / "docs/api"):
        contents = re.search(r"```\{toctree\}\n(.*?)```", (folder / "index.md").read_text(), re.DOTALL)[1].split()
        assert {path.stem for path in folder.glob("*.md")} - {"index"} <= set(contents)


def test_every_divergence_has_a_row_with_what_is_known_of_it_a_section_and_a_picture():
    text, shown = read("docs/divergences.md"), {True: "yes", False: "no"}
    rows = {row[1]: row[2:] for row in re.findall(r"^\| (\[`(\w+)`\]\(.*?\)) (.*) \|$", text, re.MULTILINE)}

    for name in divergences.names():
        divergence = divergences.get(name)
        if name == "total-variation" or not divergence.function.__module__.startswith("fedkd."):
            continue  # a docstring's or an example's own, where these ran in this process
        *_, bound, _, symmetric, metric = (cell.strip() for cell in rows[name][0].split("|"))
        assert {"∞": float("inf"), "ln 2": 0.6931471805599453, "1": 1.0}[bound] == divergence.bound
        assert (symmetric, metric) == (shown[divergence.symmetric], shown[divergence.root_is_metric])
        assert f"\n## {name}\n" in text and f"](figures/divergences/{name}.svg)" in text
        assert f"`{name}`" in read("README.md")


def test_every_strategy_is_described():
    for name in STRATEGIES:
        assert f"| `{name}`" in read("README.md")
        assert f"`{name}`" in read("docs/strategies.md")


def test_every_setting_is_in_one_group_and_in_order():
    assert [line.key for group in GROUPS for line in lines(group)] == KEYS
    assert "```{settings}\n```" in read("docs/settings.md")


def test_every_module_is_on_one_page_of_the_api():
    shown = re.findall(r"automodule:: (\S+)", "".join(path.read_text() for path in (ROOT / "docs/api").glob("*.md")))
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for package in ("fedkd", "strategies", "clients")
        for path in (ROOT / package).rglob("*.py")
        if path.name != "__main__.py"
    ]

    former = "fedkd.divergences"  # goes with 1.0
    assert Counter(shown) == Counter(set(modules) - {"fedkd", "strategies", "clients", former})


def test_the_bytes_on_the_page_are_those_of_their_file() -> None:
    found = json.loads(read("docs/performance/bytes.json"))
    page = read("docs/performance.md")
    rows = {row["way"]: row for row in found["rows"]}
    logits = {way: row for way, row in rows.items() if not way.startswith("fedavg")}
    for row in rows.values():
        assert (
            f"| {row['best']:.1%}".replace("%", " %") + f" | {row['rounds']:.1f} | {row['bytes'] / 1000:,.0f} kB |"
            in page
        )
    for row in logits.values():
        for averaged in ("pretrained, 2", "cold, 2", "cold, 5"):
            assert f"{rows[f'fedavg, {averaged} epochs']['bytes'] / row['bytes']:.0f} ×" in page
    assert ", ".join(f"{100 * target:.1f}" for target in list(found["targets"].values())[:2]) in page


def test_what_ways_to_weigh_bring_on_the_page_is_what_their_file_says() -> None:
    found = json.loads(read("docs/performance/accuracy.json"))
    page = read("docs/performance.md")
    scenarios = {row["scenario"]: {one["way"]: one for one in found["rows"] if one["scenario"] == row["scenario"]}
                 for row in found["rows"]}  # fmt: skip
    assert len(scenarios) == 8
    for scenario, ways in scenarios.items():
        alone, labels = ways["mean"]["isolated"], ways["mean"]["channel"]
        cells = [f"{100 * alone:.1f}"]
        for row in ways.values():
            assert len(row["seeds"]) >= 3 and (row["isolated"], row["channel"]) == (alone, labels)
            cells.append(f"{100 * row['accuracy']:.1f} ({100 * row['worst']:.1f})")
        shares = [f"{(ways[way]['accuracy'] - alone) / (labels - alone):.2f}" for way in ways]
        assert " | ".join([f"| {scenario}", *cells, f"{100 * labels:.1f}", *shares]) + " |" in page


def test_the_figures_of_a_gpu_on_the_page_are_those_of_their_file() -> None:
    found = json.loads(read("docs/performance/gpu.json"))
    page = read("docs/performance.md")
    for row in [*found["rows"], {"images_per_second": found["bare"]}, {"images_per_second": found["plain"]}]:
        assert f"| {row['images_per_second']:,.0f} |" in page
    first, mixed = found["rows"]
    assert f"{first['images_per_second'] / found['bare']:.2f} of the bare loop" in page
    assert f"{mixed['images_per_second'] / found['plain']:.2f} of the plain loop" in page
    assert all(sum(line["waits"].values()) == 1 for line in found["trace"])


def test_what_liars_cost_on_the_page_is_what_their_file_says() -> None:
    found = json.loads(read("docs/performance/robust.json"))
    page = read("docs/strategies.md")
    by = {(row["attack"], row["attackers"], row["weighing"], row["robust"]): row["accuracy"] for row in found["rows"]}
    columns = [("uniform", robust) for robust in ("none", "median", "trimmed", "agreement", "eigentrust")]
    columns += [("discrimination", robust) for robust in ("none", "agreement", "eigentrust")]
    for attack, share in dict.fromkeys((row["attack"], row["attackers"]) for row in found["rows"]):
        cells = [f"{100 * by[attack, share, *column]:.1f}" for column in columns]
        name = "nobody" if attack == "none" else f"`{attack}`, {share:.0%}"
        assert " | ".join([f"| {name}", *cells]) + " |" in page
