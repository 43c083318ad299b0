"""The leaderboard: its recipe gives equal work, and its page is what made-up runs say."""

import json
import math
import re
import shlex
from pathlib import Path

import pytest
from runs_on_disk import make_run
from typer.testing import CliRunner

from experiments.analysis.comparison import Comparison, alone
from experiments.compare.recipe import find, plan, read
from experiments.launch.presets import names, preset
from experiments.launch.project import Project
from experiments.slices import PER_CLASS
from experiments.studies import __main__ as studies
from experiments.studies.leaderboard import page
from fedkd.errors import FedkdError
from fedkd.settings.config import RunConfig

TRAINING = {f"npz:{name}.npz": 10 * count for name, (count, _) in PER_CLASS.items()} | {"digits": 1437}


def trials(**options):
    return plan(read(find("leaderboard"), **options))


def config_of(trial):
    settings = {**trial.settings, "dataset": re.sub(r"npz:.*/", "npz:", str(trial.settings.get("dataset", "digits")))}
    return RunConfig.from_mapping(settings)


@pytest.mark.parametrize("quick", [False, True])
def test_a_peer_sees_as_many_private_images_whether_it_takes_turns_or_shares_steps(quick):
    for trial in trials(quick=quick):
        config = config_of(trial)
        sharing = config.distill_epochs * config.travelling
        turns = config.local_epochs * (TRAINING[config.dataset] - config.proxy_size) / config.peers
        assert turns == pytest.approx(sharing, abs=1), trial.name


def test_every_preset_meets_every_scenario_five_times_with_the_same_training():
    found = [(trial.preset, config_of(trial)) for trial in trials()]

    for name in names():
        met = {(c.dataset, c.partition, c.seed) for called, c in found if called == name}
        assert met == {(d, p, s) for d in TRAINING for p in ("dirichlet", "iid") for s in range(5)}
    alike = {
        (c.optimizer, c.learning_rate, c.batch_size, c.weight_decay, c.rounds, c.pretrain_epochs) for _, c in found
    }
    assert len(alike) == 1
    assert all(len({c.models for _, c in found if c.dataset == dataset}) == 1 for dataset in TRAINING)


def test_what_makes_a_method_is_left_as_its_preset_has_it():
    trained = {"optimizer", "learning-rate", "momentum", "weight-decay", "batch-size", "distill-epochs", "local-epochs"}
    for trial in trials():
        for key, value in preset(trial.preset).settings.items():
            said = RunConfig.from_mapping(trial.settings).to_mapping()[key]
            assert key in trained or said == value or (key == "schedule" and said == "mixed"), (trial.name, key)


def made_up(path, *, quick=False, missing=(), planned=(), channel=0.8, dataset="npz:/home/me/fashion-mnist.npz"):
    """Make a comparison's folder: FedMD, ours and FedMD that shares its steps, under two partitions and two seeds."""
    text = (
        f'[settings]\ndataset = "{dataset}"\npeers = 2\nrounds = 2\nproxy-size = 60\n'
        '[[grid]]\npreset = ["fedmd", "ours"]\npartition = ["dirichlet", "iid"]\nseed = [0, 1]\n'
        '[[grid]]\npreset = ["fedmd"]\npartition = ["dirichlet"]\n'
        'schedule = ["mixed"]\nkd-weight = [0.5]\nseed = [0, 1]\n'
    )
    recipe = path / "small.toml"
    path.mkdir(parents=True, exist_ok=True)
    recipe.write_text(text)
    found = plan(read(recipe))
    ends = {"fedmd": 0.6, "ours": 0.74}
    for trial in found:
        settings = {key.replace("-", "_"): value for key, value in trial.settings.items()}
        end = ends[trial.preset] + 0.1 * (settings.get("kd_weight") == 0.5) + 0.02 * settings["seed"]
        if trial.name in missing or trial.preset in missing:
            continue
        level = channel if "channel" in settings["controls"] else math.nan
        curve = [[0.2, 0.4], [end - 0.1, end - 0.1], [end - 0.1, end + 0.1]]
        settings |= {"controls": ""}
        made = make_run(
            path / "trials" / trial.name,
            curve,
            channel=level,
            bytes_per_round=10**6,
            samples_seen=(500, 600, 760),
            **settings,
        )
        config = json.loads((made / "config.json").read_text())
        config["environment"] |= {"commit": "c0ffee", "date": "2030-01-02T00:00:00", "versions": {"torch": "2.9"}}
        (made / "config.json").write_text(json.dumps(config))
    lines = [{"name": t.name, "settings": {**t.settings, "out-dir": str(path / "trials" / t.name)}} for t in found]
    (path / "trials.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    commands = {trial.name: alone(trial.settings, called=trial.preset) for trial in found}
    called = {trial.name: trial.preset for trial in found}
    Comparison(
        "Small", "", (), None, f"fedkd compare {recipe}", text, commands, quick=quick, presets=called
    ).write(path)  # fmt: skip
    return path


def table_of(text, title):
    """Return a scenario's table by the first cell of its rows."""
    lines = text.partition(f"## {title}\n\n")[2].partition("\n\n")[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    head = [cell.strip() for cell in rows[0]]
    return {row[0]: dict(zip(head, row, strict=True)) for row in rows[2:]}


SKEWED, IID = "fashion-mnist · dirichlet · partition-alpha 0.3", "fashion-mnist · iid"


def test_a_row_is_a_preset_with_what_it_reached_and_paid_and_the_best_stands_first(tmp_path):
    found = table_of(page(made_up(tmp_path)), IID)

    assert list(found) == ["`ours`", "`fedmd`"]
    ours = found["`ours`"]
    assert ours["accuracy"] == "75.0 ± 1.4" and ours["worst peer"] == "65.0 ± 1.4" and ours["spread"] == "10.0 ± 0.0"
    assert ours["bytes"] == "6.00 MB"  # two peers, three rounds, 1 MB each
    assert ours["wall seconds of a round"] == "1.0"
    assert ours["private images a round"] == "130"  # what came before round 1 is not counted


def test_rounds_are_counted_to_a_share_of_the_highest_true_label_control_and_losses_stay_in(tmp_path):
    found = table_of(page(made_up(tmp_path)), IID)  # 72 % of 80

    assert found["`ours`"]["rounds to 72.0 %"] == "2"
    assert found["`fedmd`"]["rounds to 72.0 %"] == "not reached"


def test_without_that_control_no_target_is_made_up(tmp_path):
    found = table_of(page(made_up(tmp_path, channel=math.nan)), IID)

    assert found["`ours`"]["rounds to 90% of true labels"] == "—"


def test_trials_of_one_preset_that_differ_in_their_schedule_are_rows_of_their_own(tmp_path):
    text = page(made_up(tmp_path))

    assert list(table_of(text, SKEWED)) == [
        "`ours`", "`fedmd` `kd-weight=0.5` `schedule=mixed`", "`fedmd` `kd-weight=1.0` `schedule=alternate`",
    ]  # fmt: skip
    assert set(table_of(text, IID)) == {"`ours`", "`fedmd`"}


def test_what_has_no_result_is_a_row_that_says_so(tmp_path):
    text = page(made_up(tmp_path, missing=("ours",)))

    found = table_of(text, IID)
    assert list(found) == ["`fedmd`", "`ours` (0 of 2 seeds)"]
    assert set(list(found["`ours` (0 of 2 seeds)"].values())[1:]) == {"no result"}
    assert "6 of 10 trials have a result" in text


def test_every_row_has_a_command_that_gives_its_very_settings_and_names_no_folder_of_this_machine(tmp_path):
    folder = made_up(tmp_path)
    text = page(folder)

    commands = re.findall(r"^fedkd run .*$", text, re.MULTILINE)
    assert len(commands) == 5 and "/home/me" not in text and str(tmp_path) not in text
    kept = (
        "seed",
        "rounds",
        "strategy",
        "weighing",
        "schedule",
        "kd-weight",
        "learning-rate",
        "local-epochs",
        "partition",
    )
    trials = {
        tuple(RunConfig.from_mapping(json.loads(line)["settings"]).to_mapping()[key] for key in kept)
        for line in (folder / "trials.jsonl").read_text().splitlines()
    }
    for command in commands:
        words = shlex.split(command)
        said = Project.read().settings(words[words.index("--peers") + 2 :], cwd=Path("/"))
        mapping = RunConfig.from_mapping(said).to_mapping()
        assert tuple(mapping[key] for key in kept) in trials, command


def test_a_command_with_a_preset_says_what_the_recipe_set_back_to_a_default():
    settings = {"peers": 8, "seed": 0, **preset("idkd").settings}
    del settings["weight-decay"]  # as a trial has it whose recipe says 0

    words = shlex.split(alone(settings, called="idkd"))

    assert words[:5] == ["fedkd", "run", "--peers", "8", "preset=idkd"] and "weight-decay=0.0" in words
    assert not any(word.startswith(("selector=", "momentum=")) for word in words)


def test_the_page_says_commit_versions_date_and_command(tmp_path):
    text = page(made_up(tmp_path))

    assert text.startswith("# Leaderboard\n") and "quick size" not in text
    for told in ("commit c0ffee", "torch 2.9", "2030-01-02", "seeds 0, 1", "```sh\nfedkd compare small.toml\n```"):
        assert told in text


def test_the_page_says_whether_work_was_alike(tmp_path):
    text = page(made_up(tmp_path))  # FedMD brings its own epochs, and the recipe does not say otherwise

    assert re.search(r"Alike in all rows: .*`rounds=2`.*Not alike: `distill-epochs`, `local-epochs`\.", text)


def test_a_quick_size_says_that_it_decides_nothing(tmp_path):
    assert "decides nothing" in page(made_up(tmp_path, quick=True))


def run(*words):
    return CliRunner().invoke(studies.app, ["leaderboard", *map(str, words)])


def test_the_command_writes_the_page_and_again_over_its_own_alone(tmp_path):
    folder, target = made_up(tmp_path / "runs"), tmp_path / "docs" / "leaderboard.md"

    for _ in range(2):
        assert run(folder, "--page", target).exit_code == 0
    assert target.read_text() == page(folder)

    target.write_text("# My notes\n")
    refused = run(folder, "--page", target)
    assert isinstance(refused.exception, FedkdError) and "--page" in str(refused.exception)
    assert target.read_text() == "# My notes\n"


@pytest.mark.parametrize("presets", [{}, None])
def test_a_folder_without_presets_is_refused_in_one_line(tmp_path, presets):
    folder = made_up(tmp_path)
    content = json.loads((folder / "comparison.json").read_text())
    content = (
        {**content, "presets": {}} if presets is not None else {k: v for k, v in content.items() if k != "presets"}
    )
    (folder / "comparison.json").write_text(json.dumps(content))

    with pytest.raises(FedkdError, match="comparison of presets"):
        page(folder)
