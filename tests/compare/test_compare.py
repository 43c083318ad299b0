"""`fedkd compare`: recipes, the trials they stand for, and a comparison through `flwr run` itself."""

import json
import re
import shlex
from pathlib import Path

import pytest
from runs_on_disk import make_run
from typer.testing import CliRunner

from experiments.analysis.comparison import Comparison, alone, means
from experiments.cli import app
from experiments.compare import recipe as recipes
from experiments.compare.recipe import FOLDER, plan, read
from experiments.compare.running import _measured, compare
from experiments.launch.project import Project
from experiments.launch.runner import COMPLETED, Federation, Outcome
from experiments.studies.leaderboard import page as leaderboard
from fedkd.errors import FedkdError
from fedkd.results.folder import RunFolder
from fedkd.settings.config import RunConfig
from strategies.relay.trials import read_trials

SMALL = """
title = "Two measures"
claims = ["They tie."]
target = 0.5

[settings]
peers = 2
models = "mlp"
partition = "iid"
proxy-size = 60
pretrain-epochs = 1
rounds = 1

[[grid]]
divergence = ["kl", "js"]
seed = [0, 1]

[quick]
seed = [0]
rounds = 2
"""


def recipe(path, text=SMALL, **options):
    file = path / "small.toml"
    file.write_text(text)
    return read(file, **options)


def test_trials_are_the_product_of_the_axes_one_seed_after_the_other(tmp_path):
    trials = [(trial.settings["seed"], trial.name) for trial in plan(recipe(tmp_path))]

    assert trials == [
        (0, "divergence=kl,seed=0"), (0, "divergence=js,seed=0"),
        (1, "divergence=kl,seed=1"), (1, "divergence=js,seed=1"),
    ]  # fmt: skip


def test_blocks_are_united_and_what_comes_twice_runs_once(tmp_path):
    more = SMALL + '\n[[grid]]\ndivergence = ["js"]\nstrategy = ["averaged", "pairwise"]\nseed = [0]\n'

    names = [trial.name for trial in plan(recipe(tmp_path, more))]

    assert len(names) == len(set(names)) == 5


def test_the_quick_size_takes_the_place_of_axes_and_settings(tmp_path):
    quick = plan(recipe(tmp_path, quick=True))

    assert [trial.settings["seed"] for trial in quick] == [0, 0]
    assert {trial.settings["rounds"] for trial in quick} == {2}


def test_settings_of_the_command_line_win_over_all(tmp_path):
    trials = plan(recipe(tmp_path, quick=True, changes={"divergence": "td", "rounds": 5}))

    assert [(trial.settings["divergence"], trial.settings["rounds"]) for trial in trials] == [("td", 5)]


def test_a_control_runs_once_for_all_trials_that_share_it(tmp_path):
    more = SMALL.replace(
        '"kl", "js"', '"kl", "js"]\npartition = ["iid", "dirichlet"]\nstrategy = ["fedavg", "averaged"'
    )

    carriers = [t.settings for t in plan(recipe(tmp_path, more)) if "pooled" in t.settings["controls"]]

    groups = [(s.get("partition", "dirichlet"), s["seed"]) for s in carriers]
    assert sorted(groups) == [("dirichlet", 0), ("dirichlet", 1), ("iid", 0), ("iid", 1)]
    assert all(s.get("strategy", "averaged") != "fedavg" for s in carriers)


@pytest.mark.parametrize(
    ("axis", "isolated", "pooled"),
    [
        ("distill-epochs = [1, 2]", 2, 1),  # a peer alone trains for as many steps as one with teachers
        ('schedule = ["alternate"]\ndistill-epochs = [1, 2]', 1, 1),  # without a say in what it does alone
        ("learning-rate = [0.001, 0.01]", 2, 2),
        ("participation = [1.0, 0.5]", 2, 1),
        ('regime = ["vanilla", "dml"]', 1, 1),
        # Private batches are drawn otherwise beside a teacher in every step.
        ('schedule = ["alternate"]\nregime = ["vanilla", "dml"]', 2, 1),
        ('strategy = ["averaged", "consensus"]', 2, 1),
        ('strategy = ["averaged", "consensus"]\nkd-weight = [0.5]', 1, 1),
        ('pooled-model = ["mlp", "cnn-small"]', 1, 2),
        ('strategy = ["averaged", "fedavg"]\nfedavg-start = ["cold", "distilled"]', 1, 1),
        ('strategy = ["fedavg"]\nfedavg-start = ["cold", "distilled"]', 1, 1),
        ('strategy = ["fedavg"]\nfedavg-model = ["cnn-small", "cnn-wide"]', 2, 1),
    ],
)
def test_every_control_runs_once_for_all_that_it_depends_on(tmp_path, axis, isolated, pooled):
    text = SMALL.replace('divergence = ["kl", "js"]\nseed = [0, 1]', f"{axis}\nseed = [0]")

    carried = [str(trial.settings["controls"]) for trial in plan(recipe(tmp_path, text))]

    assert [sum(name in controls for controls in carried) for name in ("isolated", "pooled")] == [isolated, pooled]


@pytest.mark.parametrize(
    ("axis", "carried"),
    [
        ('divergence = ["kl", "js"]', 2),
        ('codec = ["fp32", "fp16"]\nstrategy = ["averaged", "pairwise", "fedavg"]', 1),
        ('strategy = ["fedavg"]', 0),
        ('divergence = ["kl"]\nregime = ["tuned"]\ncodec = ["fp32", "fp16"]', 2),
    ],
)
def test_a_channel_control_runs_once_for_all_that_are_taught_alike(tmp_path, axis, carried):
    text = SMALL.replace('divergence = ["kl", "js"]\nseed = [0, 1]', f"{axis}\nseed = [0]")

    assert sum("channel" in str(trial.settings["controls"]) for trial in plan(recipe(tmp_path, text))) == carried


def test_a_comparison_from_before_a_control_or_a_setting_was_there_goes_on(tmp_path):
    """Its trials lack a key that has come since, and a control that is there by default now."""
    begun = {trial.name: "isolated,pooled" for trial in plan(recipe(tmp_path))[:1]}
    (kept,) = (trial for trial in plan(recipe(tmp_path), begun=begun) if trial.name in begun)
    assert kept.settings["controls"] == "isolated,pooled"

    folder = tmp_path / "out" / "trials" / "one"
    make_run(folder, [[0.1], [0.5]])
    config = json.loads((folder / "config.json").read_text())
    config["settings"].pop("weighing")
    (folder / "config.json").write_text(json.dumps(config))
    assert _measured(tmp_path / "out")["one"]["weighing"] == "uniform" != RunConfig().weighing


def test_a_command_written_down_under_other_defaults_does_not_mean_what_was_run():
    now = RunConfig().effective().to_mapping()
    before = {**now, "weighing": "uniform", "teacher-temperature": 1.0, "robust": "none"}

    assert means("fedkd run --peers 6", now) and not means("fedkd run --peers 6", before)
    assert means("fedkd run weighing=uniform robust=none t2-scaling=false", before)
    assert means("fedkd run preset=ours", now) and not means("fedkd run gone=1", now)
    assert not means("fedkd run temperature=4", now)


def test_what_was_begun_keeps_its_controls_when_a_comparison_grows(tmp_path):
    before = {trial.name: str(trial.settings["controls"]) for trial in plan(recipe(tmp_path))}
    grown = recipe(tmp_path, SMALL.replace('"kl", "js"', '"td", "kl", "js"'))

    after = {trial.name: str(trial.settings["controls"]) for trial in plan(grown, begun=before)}

    assert {name: after[name] for name in before} == before
    assert after["divergence=td,seed=0"] == "channel" and before["divergence=kl,seed=0"] == "isolated,pooled,channel"


def test_paths_in_a_recipe_start_in_the_users_folder_and_hold_in_any(tmp_path, monkeypatch):
    (tmp_path / "a.pt").touch()
    monkeypatch.chdir(tmp_path)
    settings = 'checkpoints = "a.pt,-"\nproxy = "folder:public"\ntopology = "file:edges.txt"\n\n[[grid]]\n'
    text = SMALL.replace("\n[[grid]]\n", settings + 'dataset = ["digits", "npz:mine-{peer}.npz"]\n')
    found = recipe(tmp_path, text)
    monkeypatch.chdir("/")

    trials = plan(found)

    assert {trial.settings.get("dataset", "digits") for trial in trials} == {
        "digits",
        f"npz:{tmp_path}/mine-{{peer}}.npz",
    }
    for trial in trials:
        assert trial.settings["checkpoints"] == f"{tmp_path}/a.pt,-"
        assert trial.settings["proxy"] == f"folder:{tmp_path}/public"
        assert trial.settings["topology"] == f"file:{tmp_path}/edges.txt"
        assert f"proxy=folder:{tmp_path}/public" in alone(trial.settings)
        assert str(tmp_path) not in trial.name


def test_data_sources_of_a_recipe_start_in_its_data_dir(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = SMALL.replace("peers = 2", 'peers = 2\ndata-dir = "slices"\ndataset = "npz:a.npz"')

    (trial, *_) = plan(recipe(tmp_path, text))

    assert trial.settings["data-dir"] == f"{tmp_path}/slices"
    assert trial.settings["dataset"] == f"npz:{tmp_path}/slices/a.npz"


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ('partition = "iid"', 'partitoin = "iid"', "`partitoin`.*partition"),
        ('"kl", "js"', '"kl", 7', "`divergence`.*text.*7"),
        ('"kl", "js"', "", "grid is empty: axis `divergence`"),
        ('[[grid]]\ndivergence = ["kl", "js"]\nseed = [0, 1]', "", "grid is empty"),
        ("target = 0.5", "target = 1.5", r"nothing can reach target = 1\.5"),
        ("target = 0.5", 'goal = "high"', "unknown key `goal`.*target"),
        ("target = 0.5", 'target = "high"', "unexpected value of `target`"),
        ("target = 0.5", "target = nan", "nothing can reach target = nan"),
        ("rounds = 2", 'target = "high"', "unexpected value of `target`: 'high'"),
        ('"They tie."', "3", r"unexpected value of `claims`: \[3\]"),
        ("[[grid]]", "[other]", "unknown key `other`"),
        ('title = "Two measures"', "grid = 3", "unexpected value of `grid`: 3|Cannot"),
        ("rounds = 1", 'out-dir = "x"', "`out-dir` belongs to the comparison"),
        ("peers = 2", "peers = 0", "`peers`.*>= 1"),
        ("[settings]", "[settings", r"small\.toml"),
    ],
)
def test_a_wrong_recipe_is_refused_with_the_word_that_helps(tmp_path, old, new, complaint):
    assert old in SMALL

    with pytest.raises(FedkdError, match=complaint):
        plan(recipe(tmp_path, SMALL.replace(old, new)))


def test_a_quick_axis_that_nothing_takes_is_refused(tmp_path):
    with pytest.raises(FedkdError, match=r"`temperature`.*no axis takes them"):
        recipe(tmp_path, SMALL + "temperature = [1.0, 4.0]\n", quick=True)


def test_an_unknown_recipe_names_those_there_are():
    with pytest.raises(FedkdError, match="rounds"):
        recipes.find("nowhere")


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.toml")), ids=lambda path: path.stem)
@pytest.mark.parametrize("quick", [False, True])
def test_every_recipe_that_comes_along_can_be_planned(path, quick):
    found = read(path, quick=quick)
    trials = plan(found)

    assert found.paper and found.claims and len(trials) > 1
    assert all(re.fullmatch(r"[A-Za-z0-9._=,+-]+", trial.name) and len(trial.name) < 120 for trial in trials)
    assert len({trial.settings["seed"] for trial in trials}) >= (2 if quick else 3)


def test_the_command_of_a_trial_gives_its_settings(tmp_path):
    changed = {"models": "mlp,cnn small", "download": True, "temperature": 4.0, "seed": 3, "controls": ""}

    words = shlex.split(alone({"peers": 3, **changed}))

    parsed = Project.read().settings(words[4:], cwd=tmp_path)
    assert words[:4] == ["fedkd", "run", "--peers", "3"]
    assert {key: parsed[key] for key in changed} == changed


METHODS = """
[settings]
peers = 2
proxy-size = 60
rounds = 1
weight-decay = 0.0

[[grid]]
preset = ["idkd", "ours"]
seed = [0, 1]

[[grid]]
preset = ["ours"]
teacher-temperature = [0.25]
seed = [0]
"""


def test_an_axis_of_presets_brings_their_settings_and_names_the_trials(tmp_path):
    found = {trial.name: trial for trial in plan(recipe(tmp_path, METHODS))}

    assert list(found) == [
        "preset=idkd,teacher-temperature=1.0,seed=0", "preset=ours,teacher-temperature=0.5,seed=0",
        "preset=ours,teacher-temperature=0.25,seed=0",
        "preset=idkd,teacher-temperature=1.0,seed=1", "preset=ours,teacher-temperature=0.5,seed=1",
    ]  # fmt: skip
    idkd = next(trial for trial in found.values() if trial.preset == "idkd")
    assert idkd.settings["selector"] == "roc" and idkd.settings["optimizer"] == "sgd"


def test_what_a_recipe_says_wins_over_its_presets(tmp_path):
    trials = plan(recipe(tmp_path, METHODS))

    decays = {RunConfig.from_mapping(trial.settings).weight_decay for trial in trials}
    assert decays == {0.0}  # not idkd's
    sharpened = [trial.settings["teacher-temperature"] for trial in trials if trial.preset == "ours"]
    assert sorted(sharpened) == [0.25, 0.5, 0.5]


def test_the_command_line_chooses_among_presets(tmp_path):
    one = plan(recipe(tmp_path, METHODS, changes={"preset": "fedmd", "teacher-temperature": 1.0}))
    none = plan(recipe(tmp_path, changes={"preset": ["ours", "fedmd"]}))

    assert {trial.preset for trial in one} == {"fedmd"}
    assert {trial.preset for trial in none} == {"ours", "fedmd"} and len(none) > 4


def test_an_unknown_preset_in_a_recipe_is_refused_with_those_near_it(tmp_path):
    with pytest.raises(FedkdError, match=r"`preset`.*nearest: .*idkd"):
        plan(recipe(tmp_path, METHODS.replace('"idkd"', '"idk"')))


def test_presets_with_equal_settings_are_one_trial_called_after_the_first(tmp_path):
    text = METHODS.replace("teacher-temperature = [0.25]", "teacher-temperature = [0.5]")

    assert [trial.preset for trial in plan(recipe(tmp_path, text))] == ["idkd", "ours", "idkd", "ours"]


@pytest.fixture
def ran(monkeypatch):
    """Replace `flwr run`: every trial that is not finished is run, by name."""
    names = []

    def launch(app, settings, federation, **options):
        for trial in read_trials(Path(settings["trials"]), RunConfig()):
            if not trial.finished():
                names.append(trial.name)
                path = make_run(trial.folder, [[0.2, 0.3]] * (1 + trial.config.rounds))
                RunFolder(path).write_config(trial.config.effective().to_mapping(), {"run": "feed"})
        return Outcome("1", COMPLETED, "", {"app": 1.0}, ())

    monkeypatch.setattr("experiments.compare.running.launch", launch)
    monkeypatch.setattr("experiments.report.page._save", lambda figure, path, note: "")
    return names


def compared(path, text=SMALL):
    return compare(recipe(path, text), Federation(peers=1), path / "out", command="", out=lambda line: None)


def test_results_under_other_settings_are_refused_and_stay(tmp_path, ran):
    compared(tmp_path)
    kept = (tmp_path / "out" / "trials.jsonl").read_text()

    with pytest.raises(FedkdError, match=r"other settings: proxy-size \(60 there, 50 here\).*--out"):
        compared(tmp_path, SMALL.replace("proxy-size = 60", "proxy-size = 50"))

    assert (tmp_path / "out" / "trials.jsonl").read_text() == kept
    assert len(ran) == 4 and compared(tmp_path).finished == 4 and len(ran) == 4


def test_settings_that_come_to_the_same_are_one_trial(tmp_path):
    text = SMALL.replace('divergence = ["kl", "js"]', "kd-weight = [-1.0, 0.5, 0.9]")
    consensus = SMALL.replace(
        'divergence = ["kl", "js"]', 'strategy = ["consensus"]\nschedule = ["mixed", "alternate"]'
    )

    assert [trial.name for trial in plan(recipe(tmp_path, text))][:2] == [
        "kd-weight=-1.0,seed=0",
        "kd-weight=0.9,seed=0",
    ]
    assert len(plan(recipe(tmp_path, consensus))) == 2  # a seed each


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('dataset = "npz:none.npz"', "`dataset` to be npz:PATH of a file; there is none at .*none.npz"),
        ('models = "none:make"', "`models` .*there is no module none"),
        ('topology = "torus"', "`topology` to be possible for 2 peers"),
    ],
)
def test_what_is_not_there_is_found_before_anything_runs(tmp_path, ran, line, complaint):
    key = line.partition(" =")[0]
    kept = [given for given in SMALL.splitlines() if not given.startswith(f"{key} =")]
    text = "\n".join(kept).replace("[settings]", f"[settings]\n{line}")

    with pytest.raises(FedkdError, match=complaint):
        compared(tmp_path, text)
    assert ran == [] and not (tmp_path / "out").exists()


def test_a_comparison_grows_without_running_anything_anew(tmp_path, ran):
    compared(tmp_path)

    grown = compared(tmp_path, SMALL.replace('"kl", "js"', '"td", "kl", "js"'))

    assert grown.finished == 6 and ran[4:] == ["divergence=td,seed=0", "divergence=td,seed=1"]


def test_what_never_measured_anything_gives_way(tmp_path, ran):
    RunFolder(tmp_path / "out" / "trials" / "divergence=kl,seed=0").write_config({"rounds": 99}, {"run": "feed"})

    assert compared(tmp_path).finished == 4


@pytest.mark.flower
def test_a_comparison_runs_reports_and_goes_on_where_it_stopped(tmp_path, monkeypatch):
    (tmp_path / "small.toml").write_text(SMALL.replace('"js"', '"json:telepathy"'))
    monkeypatch.chdir(tmp_path)

    def compare():
        return CliRunner().invoke(app, ["compare", "small.toml", "--quick", "--out", "out"], catch_exceptions=False)

    first = compare()
    finished = tmp_path / "out" / "trials" / "divergence=kl"
    rows = (finished / "rounds.jsonl").read_text()

    assert first.exit_code == 1 and "telepathy" in first.output  # one failed, and stopped nothing
    assert len(rows.splitlines()) == 6
    page = (tmp_path / "out" / "report.html").read_text()
    assert "They tie." in page and "1 failed" in page and "telepathy" in page
    assert not (finished / "peers").exists()
    command = Comparison.read(tmp_path / "out").trials["divergence=kl"]
    parsed = Project.read().settings(shlex.split(command)[4:], cwd=tmp_path)
    settings = json.loads((finished / "config.json").read_text())["settings"]
    same = RunConfig.from_mapping({**parsed, "out-dir": settings["out-dir"], "peers": 2}).effective().to_mapping()
    assert {**same, "keep-models": False} == settings  # alone, a run keeps them

    (tmp_path / "small.toml").write_text(SMALL)
    second = compare()

    assert second.exit_code == 0 and "1 of 2 trials are finished already" in second.output
    assert (finished / "rounds.jsonl").read_text() == rows
    assert second.output.splitlines()[-1] == f"report: {tmp_path / 'out' / 'report.html'}"


def test_a_comparison_of_presets_keeps_their_names_and_becomes_a_leaderboard(tmp_path, ran):
    done = compared(tmp_path, METHODS)

    kept = Comparison.read(done.folder)
    assert set(kept.presets) == set(ran) and set(kept.presets.values()) == {"idkd", "ours"}
    assert all(f" preset={kept.presets[name]} " in command for name, command in kept.trials.items())
    text = leaderboard(done.folder, as_they_are=True)
    assert text.count("preset=ours") == 2 and "5 of 5 trials have a result" in text
