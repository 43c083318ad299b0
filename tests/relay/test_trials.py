"""Many trials in one run: each gives what it gives alone, and none costs another."""

import json
import os

import pytest
from federation import SMALL, federate, local_grid, without_pictures
from flwr.app import Context, RecordDict

from fedkd.errors import SettingError
from fedkd.results.claim import LOCK, STATES, held
from fedkd.settings.config import RunConfig
from strategies.relay.trials import Trial, TrialsError
from strategies.relay.trials import run_trials as run_each
from strategies.server_app import app as server_app

PEERS = 3


def run_trials(path, trials, *, grid=None):
    """Run trials given as {name: settings}, each in a folder of its name."""
    file = path / "trials.jsonl"
    lines = [{"name": name, "settings": {"out-dir": str(path / name), **own}} for name, own in trials.items()]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = {**RunConfig().to_mapping(), **SMALL, "trials": str(file)}
    context = Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config=config)
    with without_pictures():
        server_app(grid or local_grid(path, PEERS), context)


def timeless(folder):
    rows = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in ("seconds", "run")} for row in rows]


def fails(settings_value):
    """A fault: every peer errs in round 2 of the trials with this divergence."""

    def fault(partition, message):
        if message.content["settings"]["divergence"] == settings_value and message.content["mail"]["round"] == 2:
            raise RuntimeError("out of memory")

    return fault


def test_a_trial_gives_what_it_gives_alone(tmp_path):
    run_trials(tmp_path, {"js": {}, "td": {"divergence": "td", "seed": 1}})

    alone = federate(tmp_path / "alone", PEERS, divergence="td", seed=1)

    assert timeless(tmp_path / "td") == alone.timeless_rows()
    assert timeless(tmp_path / "js") != alone.timeless_rows()


def test_pretraining_is_paid_once_for_trials_that_start_alike(tmp_path, monkeypatch):
    import clients.learner
    from clients import pretrained

    monkeypatch.setattr(pretrained, "_kept", pretrained.OrderedDict())
    fitted = []
    fit = clients.learner.fit

    def counted(model, inputs, labels, **options):
        fitted.append(options["epochs"])
        return fit(model, inputs, labels, **options)

    monkeypatch.setattr(clients.learner, "fit", counted)
    own = {"pretrain-epochs": 3, "rounds": 1}
    run_trials(tmp_path, {"js": own, "td": {**own, "divergence": "td"}, "sgd": {**own, "optimizer": "sgd"}})

    assert fitted.count(3) == 2 * PEERS  # not for td, which differs from js only in the exchange


def test_a_trial_with_fewer_peers_than_nodes_is_the_run_with_that_many(tmp_path):
    run_trials(tmp_path, {"two": {"peers": 2}, "three": {}})

    alone = federate(tmp_path / "alone", 2)

    assert timeless(tmp_path / "two") == alone.timeless_rows()
    assert {row["peer"] for row in timeless(tmp_path / "three")} == {"peer-0", "peer-1", "peer-2"}


def test_a_failed_trial_says_why_and_stops_nothing(tmp_path, capsys):
    grid = local_grid(tmp_path, PEERS)
    grid.fault = fails("td")

    trials = {"bad": {"divergence": "td"}, "typo": {"divergence": "no_module:telepathy"}, "good": {}}
    run_trials(tmp_path, trials, grid=grid)

    assert "out of memory" in (tmp_path / "bad" / "error.txt").read_text()
    assert "telepathy" in (tmp_path / "typo" / "error.txt").read_text()
    assert not (tmp_path / "bad" / "summary.json").exists()
    assert (tmp_path / "good" / "summary.json").exists()
    assert "2 of 3 trials failed" in capsys.readouterr().out


def test_a_run_whose_every_trial_failed_has_failed(tmp_path):
    with pytest.raises(TrialsError, match=r"all 1 trials failed.*telepathy"):
        run_trials(tmp_path, {"typo": {"divergence": "no_module:telepathy"}})


@pytest.mark.slow
def test_started_again_it_skips_what_is_finished_and_goes_on_in_the_middle_of_a_trial(tmp_path):
    grid = local_grid(tmp_path, PEERS)
    grid.fault = fails("td")
    trials = {"js": {}, "td": {"divergence": "td", "rounds": 3}}
    run_trials(tmp_path, trials, grid=grid)
    grid.fault = None
    grid.sent.clear()

    # Outside of Ray a peer keeps its state in a folder of its own; the relay's is what tells a trial's begin.
    (tmp_path / "td" / "peers").mkdir()
    run_trials(tmp_path, trials, grid=grid)

    kinds = [(m.content["mail"]["kind"], m.content["mail"]["round"]) for m in grid.sent]
    assert kinds == [("introduce", 0)] * 3 + [("learn", 2)] * 3 + [("learn", 3)] * 3
    assert timeless(tmp_path / "td") == federate(tmp_path / "alone", divergence="td", rounds=3).timeless_rows()
    assert not (tmp_path / "td" / "error.txt").exists()


@pytest.mark.parametrize(
    ("there", "settings", "resumed"),
    [
        (("relay.safetensors", "peers"), {}, True),
        (("relay.safetensors",), {}, False),
        (("peers",), {}, False),
        (("relay.safetensors", "peers"), {"strategy": "fedavg"}, False),
    ],
)
def test_a_trial_goes_on_where_both_sides_left_their_state(tmp_path, there, settings, resumed):
    config = RunConfig.from_mapping({"out-dir": str(tmp_path), **settings})
    (tmp_path / "config.json").write_text(json.dumps({"settings": config.effective().to_mapping()}))
    for name in there:
        (tmp_path / name).mkdir() if name == STATES else (tmp_path / name).touch()

    assert Trial("one", config).next_config().resume == (str(tmp_path) if resumed else "")


def test_a_baseline_that_brings_its_own_loss_is_skipped_too(tmp_path):
    run_trials(tmp_path, {"one": {"strategy": "consensus"}})
    written = (tmp_path / "one" / "summary.json").stat().st_mtime_ns

    run_trials(tmp_path, {"one": {"strategy": "consensus"}})

    assert (tmp_path / "one" / "summary.json").stat().st_mtime_ns == written


def test_a_trial_whose_settings_changed_does_not_take_the_place_of_the_other(tmp_path):
    run_trials(tmp_path, {"one": {}})
    before = (tmp_path / "one" / "rounds.jsonl").read_text()

    with pytest.raises(TrialsError, match=r"one: .*`out-dir` .*a run left .*rounds\.jsonl.* there: take another"):
        run_trials(tmp_path, {"one": {"seed": 5}})

    assert (tmp_path / "one" / "rounds.jsonl").read_text() == before
    assert not (tmp_path / "one" / "error.txt").exists()


@pytest.mark.parametrize("name", ["notes.md", "config.json", "log.txt", "error.txt", "accuracy.png"])
def test_a_trial_touches_no_file_of_somebody_else(tmp_path, name):
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / name).write_text("mine")

    with pytest.raises(TrialsError, match=f"a new or empty folder; it holds {name}"):
        run_trials(tmp_path, {"one": {}})

    assert {path.name: path.read_text() for path in (tmp_path / "one").iterdir()} == {name: "mine"}


def test_a_trial_that_failed_before_any_result_gives_way_to_other_settings(tmp_path):
    with pytest.raises(TrialsError, match="telepathy"):
        run_trials(tmp_path, {"one": {"divergence": "no_module:telepathy"}})

    run_trials(tmp_path, {"one": {"divergence": "td"}})

    assert timeless(tmp_path / "one") and not (tmp_path / "one" / "error.txt").exists()


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("", "at least one trial"),
        ("{}\n", "line 1"),
        ('{"name": "a", "settings": {"out-dir": "relative"}}\n', "absolute out-dir"),
        ('{"name": "a", "settings": {"out-dir": "/a"}}\n{"name": "a", "settings": {"out-dir": "/b"}}\n', "'a' comes"),
        ('{"name": "a", "settings": {"out-dir": "/a", "divergance": "js"}}\n', "divergance"),
    ],
)
def test_a_wrong_file_of_trials_is_refused(tmp_path, content, complaint):
    (tmp_path / "trials.jsonl").write_text(content)

    with pytest.raises(SettingError, match=complaint):
        federate(tmp_path, trials=str(tmp_path / "trials.jsonl"))


def test_bins_of_the_reliability_diagram_are_kept_from_before_and_after(tmp_path):
    run = federate(tmp_path)

    entries = [json.loads(line) for line in (run.folder / "reliability.jsonl").read_text().splitlines()]
    assert [(e["round"], e["peer"]) for e in entries] == [(r, f"peer-{i}") for r in (0, 2) for i in range(3)]
    for entry, row in zip(entries, [row for row in run.rows() if row["round"] != 1], strict=True):
        right = sum(a * n for a, n in zip(entry["accuracy"], entry["samples"], strict=True) if n)
        assert right / sum(entry["samples"]) == pytest.approx(row["test_accuracy"])


def test_a_trial_that_another_process_works_in_is_left_alone(tmp_path):
    taken, free = (Trial(name, RunConfig(out_dir=str(tmp_path / name))) for name in ("taken", "free"))
    ran, said = [], []

    def run(config, folder, *, say):
        ran.append(config.out_dir)
        (tmp_path / "free" / "summary.json").write_text('{"mean": {"before": 0.1, "after": 0.5}}')

    with held(tmp_path / "taken"):
        run_each([taken, free], run, say=said.append)

    assert ran == [str(tmp_path / "free")]
    assert f"FAILED: process {os.getpid()} on " in said[0] and f"writes to {tmp_path / 'taken'}: end it" in said[0]
    assert [path.name for path in (tmp_path / "taken").iterdir()] == [LOCK]
