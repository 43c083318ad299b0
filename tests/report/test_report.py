"""The report: one file without a network, complete, and candid about what is missing."""

import csv
import json
import math
import re
from dataclasses import replace

import pytest
from runs_on_disk import make_run
from typer.testing import CliRunner

from experiments.analysis.runs import read_run
from experiments.analysis.variants import study
from experiments.cli import app, main
from experiments.report.page import describe, find_runs, write_report
from experiments.report.tensorboard import Board
from fedkd.errors import FedkdError, SettingError
from fedkd.results.folder import RunFolder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two measures with three seeds each on two partitions; js never reaches 0.8."""
    path = tmp_path_factory.mktemp("runs")
    found = []
    for partition in ("iid", "dirichlet"):
        for divergence, final in (("kl", 0.85), ("js", 0.75)):
            for seed in range(3):
                curve = [[0.2, 0.3], [0.5, 0.6], [final + seed / 100, final - seed / 50]]
                settings = {"partition": partition, "divergence": divergence, "seed": seed, "peers": 2}
                found.append(make_run(path / f"{partition}-{divergence}-{seed}", curve, **settings))
    return found


@pytest.fixture(scope="module")
def report(folders, tmp_path_factory):
    out = tmp_path_factory.mktemp("report")
    return write_report(folders, out, describe(folders, command="fedkd report ...", target=0.8))


@pytest.fixture
def undrawn(monkeypatch):
    """Leave out the pictures' files, which take most of the time, where a test reads the page's words alone."""
    monkeypatch.setattr("experiments.report.page._save", lambda figure, path, note: "")


def test_the_report_is_one_file_that_needs_no_network(report):
    page = report.read_text()

    assert not re.search(r"""(src|href)=["'](https?:)?//""", page) and "@import" not in page and "<script" not in page
    assert page.count("data:image/svg+xml;base64,") == page.count("<img ") == 20


def test_every_figure_is_there_as_svg_png_and_csv(report):
    names = {path.stem for path in (report.parent / "figures").iterdir()}

    figures = (
        "accuracy-by-round accuracy-by-bytes final-accuracy rounds-to-target bytes-to-target seconds-to-target "
        "differences peers agreement reliability"
    )
    assert names == {f"{scenario}-{figure}" for scenario in (1, 2) for figure in figures.split()}
    for name in names:
        path = report.parent / "figures" / name
        assert path.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
        assert path.with_suffix(".svg").read_text().startswith("<?xml")
        assert list(csv.DictReader(path.with_suffix(".csv").open()))


def test_what_did_not_reach_the_target_stays_in_the_table(report):
    rows = {row["variant"]: row for row in csv.DictReader((report.parent / "tables" / "1-variants.csv").open())}

    assert (rows["kl"]["reached"], float(rows["kl"]["rounds_to_target"])) == ("3", 2)
    assert (rows["js"]["reached"], rows["js"]["bytes_to_target"]) == ("0", "inf")
    assert "not reached" in report.read_text()
    paid = list(csv.DictReader((report.parent / "figures" / "1-seconds-to-target.csv").open()))
    assert [(row["variant"], row["seed"], float(row["seconds"])) for row in paid] == [
        *(("kl", str(seed), 2.0) for seed in range(3)), *(("js", str(seed), math.inf) for seed in range(3)),
    ]  # fmt: skip


def test_calibration_and_spread_stand_beside_accuracy(report):
    rows = {row["variant"]: row for row in csv.DictReader((report.parent / "tables" / "1-variants.csv").open())}

    kl = {name: float(rows["kl"][name]) for name in ("accuracy", "nll", "nll_before", "brier", "ece", "spread")}
    assert kl["nll"] == kl["brier"] == pytest.approx(1 - kl["accuracy"])
    assert kl["nll_before"] == pytest.approx(0.75) and kl["ece"] == pytest.approx(0.1)
    assert kl["spread"] == pytest.approx((0.0 + 0.015 + 0.03) / 3)
    for head in ("spread across peers", "ECE", "NLL", "Brier"):
        assert report.read_text().count(f"<th>{head}</th>") == 2


def test_every_pair_is_tested_by_every_measure(report):
    rows = list(csv.DictReader((report.parent / "tables" / "1-pairs.csv").open()))

    assert [row["measure"] for row in rows] == ["accuracy", "worst", "spread", "own_accuracy", "ece", "nll", "brier"]
    assert {(row["first"], row["second"], row["seeds"]) for row in rows} == {("kl", "js", "3")}
    assert float(rows[0]["difference"]) == pytest.approx(0.1)


def test_every_variant_is_drawn_by_itself_the_best_first(report):
    for name in ("peers", "agreement", "reliability"):
        rows = list(csv.DictReader((report.parent / "figures" / f"1-{name}.csv").open()))

        assert list(dict.fromkeys(row["variant"] for row in rows)) == ["kl", "js"]


def test_every_mean_can_be_traced_to_its_runs(report):
    rows = list(csv.DictReader((report.parent / "tables" / "2-runs.csv").open()))

    assert [row["run"] for row in rows] == [f"dirichlet-{d}-{seed}" for d in ("kl", "js") for seed in range(3)]


@pytest.mark.slow
def test_three_variants_are_ranked_within_each_scenario_and_over_all(tmp_path):
    runs = [
        make_run(tmp_path / f"{partition}-{divergence}-{seed}", [[0.1], [final + seed / 100]], partition=partition,
                 divergence=divergence, seed=seed)
        for partition in ("iid", "dirichlet") for divergence, final in (("kl", 0.5), ("js", 0.6), ("td", 0.7))
        for seed in range(3)
    ]  # fmt: skip

    page = write_report(runs, tmp_path / "out", describe(runs, command="", target=None)).read_text()

    rows = list(csv.DictReader((tmp_path / "out" / "figures" / "overall-ranks.csv").open()))
    assert [(row["variant"], float(row["mean rank"]), row["blocks"]) for row in rows] == [
        ("td", 1.0, "6"), ("js", 2.0, "6"), ("kl", 3.0, "6")
    ]  # fmt: skip
    assert "6 blocks, one per scenario and seed" in page and page.count("3 blocks, one per seed") == 4


def test_what_has_not_begun_is_said(folders, tmp_path, undrawn):
    about = replace(describe(folders[:2], command="", target=None), trials={f.name: "fedkd run" for f in folders[:3]})

    page = write_report(folders[:2], tmp_path, about).read_text()

    assert "2 trials with 2 seeds; 0 failed, 1 more have not begun." in page
    assert f"Not begun yet: {folders[2].name}." in page


def test_every_trial_has_the_command_that_reproduces_it(report):
    assert "fedkd run --peers 2 partition=iid rounds=2 seed=2" in report.read_text()


def test_settings_and_versions_stand_under_every_figure(report):
    page = report.read_text()

    for caption in re.findall(r"<figcaption>.*?</figcaption>", page, re.S):
        assert "fedkd report ..." in caption and "torch" in caption and "rounds = 2" in caption


def test_what_an_interval_is_stands_wherever_one_is_shown(report):
    page = report.read_text()

    for title in ("Accuracy by round", "Accuracy by bytes", "Final accuracy"):
        captions = re.findall(rf'alt="{title}: .*?</figcaption>', page, re.S)
        assert len(captions) == 2 and all(caption.count("Student&#39;s t") == 2 for caption in captions)
    assert page.count("<th>95 % interval</th>") == 2 and page.count("with their 95 % interval (Student&#39;s t") == 2
    assert "bootstrap" not in page


def test_it_says_how_little_few_seeds_can_tell(folders, tmp_path, undrawn):
    one = [folder for folder in folders if folder.name.endswith("-0")]

    page = write_report(one, tmp_path, describe(one, command="", target=None)).read_text()

    assert "1 seed cannot tell a difference from noise" in page and "one seed" in page


def test_failed_runs_and_damaged_lines_are_named(folders, tmp_path, undrawn):
    bad = make_run(tmp_path / "bad", [[0.1], [0.2]], seed=7)
    (bad / "summary.json").unlink()
    (bad / "error.txt").write_text("Expected setting `x` to be <y>.\n")
    torn = make_run(tmp_path / "torn", [[0.1], [0.2]], seed=8)
    (torn / "rounds.jsonl").write_text("torn\n" + (torn / "rounds.jsonl").read_text())

    page = write_report([bad, torn], tmp_path / "out", describe([bad, torn], command="", target=None)).read_text()

    assert "Expected setting `x` to be &lt;y&gt;." in page
    assert "rounds.jsonl, line 1: left out" in page


def test_nothing_to_report_about_is_said(tmp_path):
    bad = make_run(tmp_path / "bad", [[0.1], [0.2]])
    (bad / "summary.json").unlink()
    (bad / "error.txt").write_text("Traceback (most recent call last):\n  ...\nValueError: too small\n")

    with pytest.raises(FedkdError, match="all failed; the first: ValueError: too small"):
        write_report([bad], tmp_path / "out", describe([bad], command="", target=None))


def test_a_target_nothing_can_reach_is_refused(folders):
    with pytest.raises(SettingError, match=r"accuracy in \(0, 1\], but got 1\.5"):
        describe(folders, command="", target=1.5)


def test_a_target_that_nothing_reached_is_said(folders, tmp_path):
    page = write_report(folders, tmp_path, describe(folders, command="", target=0.99)).read_text()

    assert "No variant reached the target of 99.0% under more than half of its seeds" in page
    assert not list((tmp_path / "figures").glob("*-to-target.*"))


def test_two_numbers_that_were_varied_together_are_drawn_as_a_map(tmp_path):
    runs = [
        make_run(tmp_path / f"{alpha}-{beta}", [[0.1], [0.5 + 0.1 * alpha - 0.01 * beta]], divergence="cakd",
                 cakd_alpha=float(alpha), cakd_beta=float(beta))
        for alpha in (0, 1, 2) for beta in (1, 8)
    ]  # fmt: skip

    write_report(runs, tmp_path / "out", describe(runs, command="", target=None))

    rows = list(csv.DictReader((tmp_path / "out" / "figures" / "map.csv").open()))
    best = max(rows, key=lambda row: float(row["accuracy"]))
    assert len(rows) == 6 and (best["cakd-alpha"], best["cakd-beta"]) == ("2.0", "1.0")


def test_what_tuned_peers_chose_is_counted(tmp_path):
    runs = [
        make_run(tmp_path / regime, [[0.1, 0.2], [0.5, 0.6]], regime=regime, schedule="mixed", kd_weight=0.9)
        for regime in ("vanilla", "tuned")
    ]
    summary = json.loads((runs[1] / "summary.json").read_text())
    for peer, chosen in zip(summary["peers"], (1.0, 4.0), strict=True):
        peer |= {"temperature": chosen, "kd_weight": 0.9}
    (runs[1] / "summary.json").write_text(json.dumps(summary))

    page = write_report(runs, tmp_path / "out", describe(runs, command="", target=None)).read_text()

    rows = list(csv.DictReader((tmp_path / "out" / "figures" / "chosen.csv").open()))
    assert [row["temperature"] for row in rows] == ["1.0", "4.0"]
    assert "1 of 2 did not choose the run&#39;s own default" in page


def test_the_head_start_of_federated_averaging_is_measured_against_its_cold_start(tmp_path, undrawn):
    curves = {"cold": [0.1, 0.3, 0.5, 0.6, 0.7], "distilled": [0.65, 0.5, 0.7, 0.7, 0.7]}
    runs = [
        make_run(tmp_path / start, [[a] for a in curve], strategy="fedavg", fedavg_start=start)
        for start, curve in curves.items()
    ]

    page = write_report(runs, tmp_path / "out", describe(runs, command="", target=None)).read_text()

    # Round 0 of a distilled start is the peers' own models, not the averaged one; the exchange is the first round.
    assert "in 4 rounds; from a distilled start it gets there in 2 rounds, a cut of 50%" in page


def test_what_pretraining_alone_saves_stands_beside_what_the_merging_does(tmp_path, undrawn):
    curves = {"cold": [0.1, 0.3, 0.5, 0.7, 0.7], "pretrained": [0.4, 0.6, 0.7, 0.7, 0.7],
              "distilled": [0.4, 0.7, 0.7, 0.7, 0.7]}  # fmt: skip
    runs = [
        make_run(tmp_path / start, [[a] for a in curve], strategy="fedavg", fedavg_start=start)
        for start, curve in curves.items()
    ]

    page = write_report(runs, tmp_path / "out", describe(runs, command="", target=None)).read_text()

    told = re.findall(r"From a cold .* in (\d) rounds; from a (\w+) start it gets there in (\d)", page)
    assert told == [("3", "pretrained", "2"), ("3", "distilled", "1")]


def test_every_distilled_start_is_measured_against_the_cold_start_that_is_like_it_in_all_else(tmp_path, undrawn):
    cold, settings = [0.1, 0.3, 0.5, 0.6, 0.7], {"strategy": "fedavg"}
    runs = [make_run(tmp_path / f"cold-{n}", [[a] for a in cold], **settings, local_epochs=n) for n in (1, 2)]
    for epochs, curve in ((20, [0.1, 0.7, 0.7, 0.7, 0.7]), (5, [0.1, 0.2, 0.7, 0.7, 0.7])):
        settings |= {"fedavg_start": "distilled", "merge_epochs": epochs, "temperature": epochs / 5}
        runs.append(make_run(tmp_path / f"distilled-{epochs}", [[a] for a in curve], **settings, local_epochs=2))

    page = write_report(runs, tmp_path / "out", describe(runs, command="", target=None)).read_text()

    told = re.findall(r"merge-epochs (\d+).*: From a cold .* in (\d) rounds; .* in (\d) round", page)
    assert told == [("20", "4", "1"), ("5", "4", "2")]


def test_numbers_set_side_by_side_are_of_the_same_seeds(tmp_path, undrawn):
    runs = [
        make_run(tmp_path / f"{divergence}-{seed}", [[0.1], [final]], divergence=divergence, seed=seed, isolated=level)
        for divergence, seed, final, level in (
            ("kl", 0, 0.5, 0.3), ("kl", 1, 0.9, 0.8), ("js", 0, 0.6, 0.3)
        )
    ]  # fmt: skip

    page = write_report(runs, tmp_path / "out", describe(runs, command="", target=None)).read_text()

    assert "“js” ended highest, at 60.0% mean accuracy over the 1 seed that all variants have, +30.0 points" in page


def test_controls_that_differ_between_variants_are_told_for_each(tmp_path, undrawn):
    runs = [
        make_run(tmp_path / f"{rate}", [[0.1], [0.6]], learning_rate=rate, isolated=level)
        for rate, level in ((0.001, 0.4), (0.1, 0.5))
    ]

    page = write_report(runs, tmp_path / "out", describe(runs, command="", target=None)).read_text()

    rows = list(csv.DictReader((tmp_path / "out" / "tables" / "variants.csv").open()))
    assert [float(row["over_isolated"]) for row in rows] == pytest.approx([0.2, 0.1])
    assert "Isolated: not one level" in page and "Pooled: 95.0%." in page


def test_the_share_of_the_channel_stands_beside_the_gain_over_isolated_by_seed(tmp_path, undrawn):
    runs = [
        make_run(tmp_path / f"kl-{seed}", [[0.2], [end]], divergence="kl", seed=seed, isolated=0.4, channel=level)
        for seed, end, level in ((0, 0.5, 0.8), (1, 0.7, 0.8))  # 25 % and 75 %
    ]
    runs.append(make_run(tmp_path / "js", [[0.2], [0.5]], divergence="js", isolated=0.4))  # it is taught otherwise

    page = write_report(runs, tmp_path / "out", describe(runs, command="", target=None)).read_text()

    assert "share of channel" in page and "50%" in page and "True labels: 80.0%." in page
    table = csv.DictReader((tmp_path / "out" / "tables" / "variants.csv").open())
    shares = {row["variant"]: float(row["share_of_channel"] or "nan") for row in table}
    assert shares["kl"] == pytest.approx(0.5) and math.isnan(shares["js"])


def test_the_share_of_the_channel_is_that_of_the_peers_that_have_both_controls_and_of_the_means_over_seeds(tmp_path):
    paths = [
        make_run(tmp_path / str(seed), [[0.2, 0.2], ends], seed=seed, isolated=alone, channel=level)
        for seed, ends, alone, level in ((0, [0.6, 0.9], 0.5, 0.7), (1, [0.6, 0.6], 0.59, 0.6))
    ]
    summary = json.loads((paths[0] / "summary.json").read_text())
    summary["peers"][1]["channel"] = None  # peer-1's control did not come
    (paths[0] / "summary.json").write_text(json.dumps(summary))

    (scenario,) = study([read_run(path) for path in paths]).scenarios

    after, alone, shown = (0.6 + 0.6) / 2, (0.5 + 0.59) / 2, (0.7 + 0.6) / 2
    assert scenario.variants[0].share_of_channel == pytest.approx((after - alone) / (shown - alone))


@pytest.mark.parametrize(
    ("mode", "promise"), [("sync", "alone, with the same numbers."), ("async", "not with the same")]
)
def test_the_same_numbers_are_promised_only_where_rounds_make_them(tmp_path, undrawn, mode, promise):
    run = make_run(tmp_path / "run", [[0.1], [0.5]], strategy="gossip", mode=mode)

    assert promise in write_report([run], tmp_path / "out", describe([run], command="", target=None)).read_text()


@pytest.mark.parametrize(
    ("facts", "command"),
    [
        ({}, "fedkd run rounds=1 seed=3\n"),
        ({"peers": 4, "simulated": True}, "fedkd run --peers 4 rounds=1 seed=3\n"),
        ({"peers": 4, "simulated": False}, "fedkd deploy run DIR rounds=1 controls=isolated,pooled,channel seed=3\n"),
    ],
)
def test_the_command_of_a_stopped_run_says_what_is_known_of_its_peers(tmp_path, facts, command):
    path = make_run(tmp_path / "run", [[0.1], [0.5]], seed=3)
    (path / "rounds.jsonl").unlink()
    RunFolder(path).add_facts(facts)

    assert CliRunner().invoke(app, ["show", str(path)], catch_exceptions=False).output.startswith(command)


def test_a_folder_that_cannot_be_written_is_one_line_and_exit_status_2(folders, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("sys.argv", ["fedkd", "report", str(folders[0]), "--out", str(tmp_path / "file" / "report")])

    with pytest.raises(SystemExit) as ended:
        main()

    assert ended.value.code == 2
    assert re.fullmatch(r"error: .*Not a directory: .*file.*\n", capsys.readouterr().err)


@pytest.mark.slow
def test_the_commands_report_and_show(folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shown = CliRunner().invoke(app, ["show", str(folders[0])], catch_exceptions=False)
    written = CliRunner().invoke(app, ["report", *map(str, folders)], catch_exceptions=False)

    assert "fedkd run --peers 2 partition=iid" in shown.output
    assert re.search(r"peer-1 +mlp +30\.0% +85\.0% +\+55\.0", shown.output)
    assert written.output == f"report: {tmp_path / 'report' / 'report.html'}\n"


def test_curves_are_written_for_tensorboard(folders, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

    result = CliRunner().invoke(app, ["show", str(folders[0]), "--tensorboard", str(tmp_path)], catch_exceptions=False)

    assert result.output == f"written to {tmp_path / folders[0].name}\n"
    events = accumulator.EventAccumulator(str(tmp_path / folders[0].name / "peer-1")).Reload()
    assert [event.value for event in events.Scalars("test_accuracy")] == pytest.approx([0.3, 0.6, 0.85])


def test_a_run_that_goes_on_is_written_round_by_round_and_each_round_once(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = make_run(tmp_path / "run", [[0.1], [0.5], [0.7]])
    rows = (run / "rounds.jsonl").read_text().splitlines(keepends=True)
    heard = []

    def told():
        events = accumulator.EventAccumulator(str(tmp_path / "board" / "run" / "mean")).Reload()
        return [(event.step, pytest.approx(event.value)) for event in events.Scalars("test_accuracy")]

    with Board(tmp_path / "board") as board:
        take = board.follow(heard.append)
        take(f"results go to {run}")
        (run / "rounds.jsonl").write_text("".join(rows[:2]))
        take("round   1/2  ...")
        assert told() == [(0, 0.1), (1, 0.5)]
        (run / "rounds.jsonl").write_text("".join(rows))
        take("round   2/2  ...")
        take(f"results: {run}")

    assert told() == [(0, 0.1), (1, 0.5), (2, 0.7)] and len(heard) == 4
    with Board(tmp_path / "board") as board:  # once more: not twice
        board.write(run)
    assert told() == [(0, 0.1), (1, 0.5), (2, 0.7)]


def test_the_trials_of_a_comparison_are_written_as_they_end(tmp_path):
    pytest.importorskip("tensorboard")
    make_run(tmp_path / "trials" / "seed=0", [[0.1], [0.5]])

    with Board(tmp_path / "board") as board:
        take = board.follow(lambda line: None, tmp_path / "trials")
        take("trial 1/2  seed=0  10.0% → 50.0%  3.0 s")
        take("trial 2/2  seed=1  FAILED: before it began")

    assert [path.name for path in (tmp_path / "board").iterdir()] == ["seed=0"]


def test_a_single_run_is_compared_with_nothing(tmp_path, undrawn):
    run = make_run(tmp_path / "run", [[0.1], [0.5], [0.6]])

    page = write_report([run], tmp_path / "out", describe([run], command="", target=0.5)).read_text()

    assert "It ended at 60.0% mean accuracy, +20.0 points against isolated peers." in page
    assert "The target of 50.0% was reached after 2.0 kB." in page


def test_two_seeds_are_said_to_tell_nothing_where_the_result_stands(folders, tmp_path, undrawn):
    two = [folder for folder in folders if folder.name.startswith("iid") and not folder.name.endswith("2")]
    about = replace(describe(two, command="", target=None), quick=True)

    short = write_report(two, tmp_path, about).read_text().split("</section>")[0]

    assert "This is the quick size" in short and "; 2 seeds cannot tell a difference from noise." in short


def test_a_deployed_run_is_named_after_the_models_that_came(tmp_path, undrawn):
    runs = [make_run(tmp_path / name, [[0.1, 0.2], [0.5, 0.6]]) for name in ("deployed", "simulated")]
    RunFolder(runs[0]).add_facts({"peers": 2, "simulated": False})

    page = write_report(runs, tmp_path / "out", describe(runs, command="", target=None)).read_text()

    assert re.findall(r"<h2>(.*)</h2>", page)[1:3] == ["deployed · peers 2 · mlp", "Results"]


def test_one_model_for_all_peers_is_no_even_spread(tmp_path, undrawn):
    runs = [
        make_run(tmp_path / strategy, [[0.1, 0.2], [0.5, last]], strategy=strategy)
        for strategy, last in (("fedavg", 0.5), ("gossip", 0.6), ("averaged", 0.7))
    ]

    page = write_report(runs, tmp_path / "out", describe(runs, command="", target=None)).read_text()

    assert "<td>one model</td>" in page and "<b>5.0 → 5.0</b>" in page


def test_folders_without_runs_are_skipped_and_said(folders, tmp_path):
    (tmp_path / "report").mkdir()
    said = []

    assert find_runs([tmp_path / "report", folders[0]], out=said.append) == [folders[0]]
    assert said == [f"skipped: {tmp_path / 'report'} holds no run"]
    with pytest.raises(FedkdError, match="at least one folder of a run"):
        find_runs([tmp_path / "report"])
    with pytest.raises(FedkdError, match="there is no"):
        find_runs([folders[0], tmp_path / "typo"])


def test_a_comparisons_folder_stands_for_its_trials(folders, tmp_path):
    for folder in folders[:2]:
        (tmp_path / "trials").mkdir(exist_ok=True)
        (tmp_path / "trials" / folder.name).symlink_to(folder)
    about = {"title": "t", "paper": "", "claims": [], "target": 0.5, "command": "c", "recipe": "r",
             "trials": {folder.name: "fedkd run" for folder in folders}}  # fmt: skip
    (tmp_path / "comparison.json").write_text(json.dumps(about))

    assert [path.name for path in find_runs([tmp_path])] == [folder.name for folder in folders[:2]]
    assert describe([tmp_path], command="other", target=None).title == "t"
