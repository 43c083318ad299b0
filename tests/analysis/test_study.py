"""Runs read back: what they cost, how they are sorted, and what a few seeds allow to say."""

import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from runs_on_disk import make_run
from scipy import stats

from experiments.analysis.checks import checks, matched_gradients
from experiments.analysis.runs import read_run
from experiments.analysis.statistics import compare, every_pair, holm, mean, median, price
from experiments.analysis.variants import study
from experiments.report.agreement import agreement, reliability
from fedkd.errors import FedkdError


def runs_of(tmp_path, **variants):
    """Make a run for every seed of every variant: name = (settings, final accuracies by seed)."""
    found = []
    for name, (settings, finals) in variants.items():
        for seed, final in enumerate(finals):
            curve = [[0.2, 0.2], [final, final]]
            found.append(read_run(make_run(tmp_path / f"{name}-{seed}", curve, seed=seed, **settings)))
    return found


def test_a_curve_counts_all_bytes_of_all_peers_and_the_rounds_wall_time(tmp_path):
    run = read_run(make_run(tmp_path / "run", [[0.1, 0.3], [0.4, 0.6], [0.7, 0.9]], bytes_per_round=1000))

    curve = run.curve()

    assert [point.accuracy for point in curve] == pytest.approx([0.2, 0.5, 0.8])
    assert [point.bytes for point in curve] == [2000, 4000, 6000]
    assert [point.seconds for point in curve] == [0.0, 1.0, 2.0]  # round 0 is not counted
    assert [point.nll for point in curve] == [point.brier for point in curve] == pytest.approx([0.8, 0.5, 0.2])
    assert curve[-1].worst == 0.7 and curve[-1].spread == pytest.approx(0.1)


def test_a_peer_that_was_not_measured_stands_where_it_stood(tmp_path):
    run = read_run(make_run(tmp_path / "run", [[0.1, 0.3], [0.5, math.nan], [math.nan, math.nan]]))

    assert [(point.round, point.accuracy) for point in run.curve()] == [
        (0, pytest.approx(0.2)),
        (1, pytest.approx(0.4)),
    ]


def test_what_travelled_between_rounds_is_charged_before_the_first(tmp_path):
    distilled = {"strategy": "fedavg", "fedavg_start": "distilled"}
    run = read_run(make_run(tmp_path / "run", [[0.1], [0.5]], bytes_per_round=1000, **distilled))
    totals = {**run.summary["totals"], "bytes_up": run.summary["totals"]["bytes_up"] + 700}

    curve = replace(run, summary={**run.summary, "totals": totals}).curve()

    assert [point.bytes for point in curve] == [1000, 2700]


@pytest.mark.parametrize("settings", [{}, {"strategy": "fedavg", "fedavg_start": "distilled"}])
def test_the_bytes_of_a_damaged_line_are_not_charged_elsewhere(tmp_path, settings):
    path = make_run(tmp_path / "run", [[0.1], [0.5], [0.6]], bytes_per_round=1000, **settings)
    lines = (path / "rounds.jsonl").read_text().splitlines()
    (path / "rounds.jsonl").write_text("\n".join([*lines[:2], '{"round": 2, "pe']) + "\n")

    assert [point.bytes for point in read_run(path).curve()] == [1000, 2000]


def test_a_damaged_line_is_named_and_the_rest_is_used(tmp_path):
    path = make_run(tmp_path / "run", [[0.1, 0.3], [0.4, 0.6]])
    lines = (path / "rounds.jsonl").read_text().splitlines()
    (path / "rounds.jsonl").write_text("\n".join([*lines[:1], '{"round": 0, "pe', *lines[2:]]) + "\n")

    run = read_run(path)

    assert len(run.rows) == 3
    assert len(run.problems) == 1 and "rounds.jsonl, line 2" in run.problems[0]


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("test_accuracy", "high"),
        ("round", "one"),
        ("round", 1.5),
        ("bytes_up", None),
        ("peer", 3),
        ("test_accuracy", True),
    ],
)
def test_a_line_with_values_of_a_wrong_kind_is_damaged_too(tmp_path, name, wrong):
    path = make_run(tmp_path / "run", [[0.1, 0.3], [0.4, 0.6]])
    lines = (path / "rounds.jsonl").read_text().splitlines()
    (path / "rounds.jsonl").write_text("\n".join([*lines[:3], json.dumps({**json.loads(lines[3]), name: wrong})]))

    run = read_run(path)

    assert len(run.problems) == 1 and f"rounds.jsonl, line 4: left out, not a row (unexpected {name}" in run.problems[0]
    assert run.curve()[-1].accuracy == pytest.approx(0.35)  # peer-1 stands where it stood


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"peers": []}', '{"peers": [{}]}', '{"peers": 3}', "null"])
def test_a_damaged_summary_is_named_and_the_run_counts_as_failed(tmp_path, content):
    path = make_run(tmp_path / "run", [[0.1], [0.4]])
    (path / "summary.json").write_text(content)

    found = study([read_run(path)])

    assert len(found.problems) == 1 and "summary.json: left out" in found.problems[0]
    assert [run.error for run in found.failed] == ["not finished"]


def test_a_run_that_is_there_twice_is_named_and_counted_once(tmp_path):
    runs = [read_run(make_run(tmp_path / name, [[0.1], [final]], seed=3)) for name, final in (("a", 0.4), ("b", 0.6))]

    found = study(runs)

    assert found.scenarios[0].variants[0].finals() == {3: 0.4}
    assert found.problems == [f"{tmp_path / 'b'}: left out, another run has the same settings and seed 3"]


def test_what_is_in_every_scenario_is_ranked_over_all(tmp_path):
    found = study(runs_of(
        tmp_path,
        iid_kl=({"partition": "iid", "divergence": "kl"}, [0.8, 0.9]),
        iid_js=({"partition": "iid", "divergence": "js"}, [0.7]),
        iid_td=({"partition": "iid", "divergence": "td"}, [0.3]),
        skewed_kl=({"partition": "dirichlet", "divergence": "kl"}, [0.5, 0.6]),
        skewed_td=({"partition": "dirichlet", "divergence": "td"}, [0.4]),
    ))  # fmt: skip

    assert found.in_every_scenario() == {
        "kl": {(0, 0): 0.8, (0, 1): 0.9, (1, 0): 0.5, (1, 1): 0.6},
        "td": {(0, 0): 0.3, (1, 0): 0.4},
    }


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(FedkdError, match=r"config\.json"):
        read_run(tmp_path)


def test_runs_are_sorted_by_data_then_by_what_is_compared(tmp_path):
    found = study(runs_of(
        tmp_path,
        iid=({"partition": "iid", "divergence": "kl"}, [0.8, 0.9]),
        kl=({"divergence": "kl"}, [0.5, 0.6]),
        sed=({"divergence": "sed", "topology_degree": 5}, [0.7, 0.6]),
    ))  # fmt: skip

    assert [scenario.label for scenario in found.scenarios] == ["iid", "dirichlet"]
    assert [variant.label for variant in found.scenarios[1].variants] == ["kl", "sed"]  # the topology has no degree
    assert found.scenarios[1].variants[1].finals() == {0: 0.7, 1: 0.6}
    assert found.common == {"rounds": 1, "peers": 2}


def test_what_failed_is_kept_beside_what_finished(tmp_path):
    runs = runs_of(tmp_path, kl=({"divergence": "kl"}, [0.5, 0.6]))
    (tmp_path / "kl-1" / "summary.json").unlink()
    (tmp_path / "kl-1" / "error.txt").write_text("out of memory\n")

    found = study([runs[0], read_run(tmp_path / "kl-1")])

    assert [run.error for run in found.failed] == ["out of memory"]
    (variant,) = found.scenarios[0].variants
    assert set(variant.runs) == {0} and variant.missing == (1,)


def test_the_paired_test_is_scipys(tmp_path):
    a, b = {0: 0.5, 1: 0.7, 2: 0.6, 5: 0.9}, {0: 0.4, 1: 0.5, 2: 0.55, 3: 0.1}
    reference = stats.ttest_rel([0.5, 0.7, 0.6], [0.4, 0.5, 0.55])
    interval = reference.confidence_interval()

    result = compare("a", a, "b", b)

    assert result.seeds == 3
    assert result.p == pytest.approx(reference.pvalue)
    assert (result.low, result.high) == pytest.approx((interval.low, interval.high))


def test_what_was_not_measured_is_not_compared():
    result = compare("a", {0: 0.5, 1: math.nan, 2: 0.7}, "b", {0: 0.4, 1: 0.2, 2: 0.5})

    assert result.seeds == 2 and result.difference == pytest.approx(0.15)
    assert compare("a", {0: math.nan}, "b", {0: 1.0}).seeds == 0


def test_one_difference_under_every_seed_is_no_certainty():
    a, b = {seed: 0.5 + 0.1 * seed + 0.025 for seed in range(3)}, {seed: 0.5 + 0.1 * seed for seed in range(3)}

    (result,) = every_pair({"a": a, "b": b})

    flips = [np.mean(signs) for signs in itertools.product([-1, 1], repeat=3)]
    assert result.difference == pytest.approx(0.025) and result.p == np.mean([abs(flip) >= 1 for flip in flips])
    assert not result.larger_than_noise and math.isnan(result.low) and math.isnan(result.high)


def test_what_rounding_alone_tells_apart_is_identical():
    (result,) = every_pair({"a": dict.fromkeys(range(3), 0.1 + 0.2), "b": dict.fromkeys(range(3), 0.3)})

    assert result.identical and not result.larger_than_noise


def test_holm_multiplies_the_smallest_by_their_number_the_next_by_one_less_and_keeps_the_order():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.02, 0.001, 0.5, 0.012]) == pytest.approx([0.04, 0.004, 0.5, 0.036])


def test_holm_never_claims_more_than_the_single_tests():
    p_values = [0.004, 0.03, math.nan, 0.2, 0.01]

    adjusted = holm(p_values)

    assert adjusted[0] == pytest.approx(0.016) and math.isnan(adjusted[2])
    assert all(b >= a for a, b in zip(p_values, adjusted, strict=True) if not math.isnan(a))


def test_two_seeds_cannot_tell_and_equal_numbers_are_called_identical(tmp_path):
    found = study(runs_of(
        tmp_path,
        kl=({"divergence": "kl"}, [0.5, 0.6]),
        ce=({"divergence": "ce"}, [0.5, 0.6]),
        js=({"divergence": "js"}, [0.7, 0.9]),
    ))  # fmt: skip

    verdicts = {
        (p.first, p.second): p.verdict for p in every_pair({v.label: v.finals() for v in found.scenarios[0].variants})
    }

    assert verdicts == {
        ("kl", "ce"): "identical",
        ("kl", "js"): "too few seeds to tell",
        ("ce", "js"): "too few seeds to tell",
    }


def test_a_steady_difference_is_told_from_noise(tmp_path):
    found = study(runs_of(
        tmp_path,
        kl=({"divergence": "kl"}, [0.50, 0.61, 0.55, 0.58]),
        js=({"divergence": "js"}, [0.60, 0.70, 0.66, 0.68]),
        td=({"divergence": "td"}, [0.40, 0.75, 0.45, 0.70]),
    ))  # fmt: skip

    verdicts = {
        (p.first, p.second): p.verdict for p in every_pair({v.label: v.finals() for v in found.scenarios[0].variants})
    }

    assert verdicts[("kl", "js")] == "larger than seed noise"
    assert verdicts[("kl", "td")] == "within seed noise"


@pytest.mark.parametrize("seeds", [2, 3, 5, 8])
def test_an_interval_of_a_few_seeds_holds_the_true_mean_as_often_as_it_says(seeds):
    draws = np.random.default_rng(seeds).normal(0.7, 0.02, size=(4000, seeds))

    found = [mean(list(draw)) for draw in draws]

    held = np.mean([interval.low <= 0.7 <= interval.high for interval in found])
    assert abs(held - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 4000)


def test_the_interval_is_scipys():
    values = [0.2, 0.5, 0.9, 0.4]
    reference = stats.ttest_1samp(values, 0.0).confidence_interval()

    assert (mean(values).low, mean(values).high) == pytest.approx((reference.low, reference.high))
    assert math.isnan(mean([0.3, math.nan]).low) and mean([0.3, math.nan]).seeds == 1


def test_a_target_that_is_not_reached_is_kept_as_infinite(tmp_path):
    run = read_run(make_run(tmp_path / "run", [[0.1], [0.5], [0.7]], bytes_per_round=1000))

    assert (price(run, 0.5).rounds, price(run, 0.5).bytes, price(run, 0.5).seconds) == (1, 2000, 1.0)
    assert price(run, 0.8).bytes == math.inf
    assert median([price(run, 0.5).rounds, price(run, 0.8).rounds]) == math.inf


@pytest.mark.parametrize("start", ["distilled", "pretrained"])
def test_the_peers_own_models_before_anything_is_averaged_reach_no_target(tmp_path, start):
    curve = [[0.7], [0.5], [0.6], [0.7]]
    averaged = read_run(make_run(tmp_path / "a", curve, strategy="fedavg", fedavg_start=start))
    exchanged = read_run(make_run(tmp_path / "b", curve))

    assert (price(averaged, 0.5).rounds, price(averaged, 0.65).rounds) == (1, 3)
    assert price(exchanged, 0.5).rounds == 0  # there the peers' own models are what is exchanged about


def test_controls_see_agreement_and_its_absence(tmp_path):
    agreeing = study(runs_of(
        tmp_path / "good",
        kl=({"divergence": "kl"}, [0.50, 0.60, 0.55]),
        ce=({"divergence": "ce"}, [0.50, 0.60, 0.55]),
    ))  # fmt: skip
    differing = study(runs_of(
        tmp_path / "bad",
        kl=({"divergence": "kl"}, [0.50, 0.60, 0.55]),
        ce=({"divergence": "ce"}, [0.70, 0.81, 0.75]),
    ))  # fmt: skip

    assert {c.name: c.ok for c in checks(agreeing)}["ce and kl agree"] is True
    assert {c.name: c.ok for c in checks(differing)}["ce and kl agree"] is False


def test_floor_and_ceiling_are_checked_by_name(tmp_path):
    found = study(runs_of(
        tmp_path,
        low=({"divergence": "kl"}, [0.299, 0.301]),
        high=({"divergence": "js"}, [0.989, 0.991]),
    ))  # fmt: skip

    by_name = {check.name: check for check in checks(found)}

    floor, ceiling = by_name["isolated is the floor"], by_name["pooled is the ceiling"]
    assert floor.ok is False and floor.found.startswith("isolated 40.0%;") and "kl (-10.0 [" in floor.found
    assert ceiling.ok is False and ceiling.found.startswith("pooled 95.0%;") and "js (+4.0 [" in ceiling.found


@pytest.mark.parametrize(
    ("finals", "verdict"),
    [([0.3999, 0.3999], True), ([0.30, 0.49], None), ([0.3], None), ([0.30, 0.31, 0.30], False), ([0.9], True)],
)
def test_a_floor_is_broken_only_by_more_than_seeds_do_by_themselves(tmp_path, finals, verdict):
    found = study(runs_of(tmp_path, kl=({}, finals)))

    assert {check.name: check.ok for check in checks(found)}["isolated is the floor"] is verdict


@pytest.mark.parametrize(
    ("finals", "verdict"),
    [
        ([0.504, 0.597], True),  # each within rounding
        ([0.60, 0.60], None),  # ten points and none: two seeds do not tell
        ([0.60], None),
        ([0.60, 0.70, 0.66], False),
        ([0.51, 0.595, 0.547], True),  # about zero, and the interval is narrow
    ],
)
def test_agreement_is_what_few_seeds_can_show_and_no_more(tmp_path, finals, verdict):
    kl = [0.50, 0.60, 0.55][: len(finals)]
    found = study(runs_of(tmp_path, kl=({"divergence": "kl"}, kl), ce=({"divergence": "ce"}, finals)))

    assert {check.name: check.ok for check in checks(found)}["ce and kl agree"] is verdict


def with_control(path, isolated, **settings):
    return read_run(make_run(path, [[0.2, 0.2], [0.5, 0.5]], isolated=isolated, **settings))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"learning_rate": 0.001}, {"learning_rate": 0.1}),
        ({"rounds": 1}, {"rounds": 2}),
        ({"batch_size": 16}, {"batch_size": 64}),
        ({"schedule": "alternate", "local_epochs": 1}, {"schedule": "alternate", "local_epochs": 3}),
        ({"schedule": "alternate", "regime": "vanilla"}, {"schedule": "alternate", "regime": "dml"}),
        ({"distill_epochs": 1}, {"distill_epochs": 3}),
        ({"regime": "dml", "distill_epochs": 1}, {"regime": "dml", "distill_epochs": 3}),
        ({"participation": 1.0}, {"participation": 0.5}),
        ({"fast": False}, {"fast": True}),
    ],
)
def test_a_variant_is_held_against_the_control_under_its_own_settings(tmp_path, one, other):
    runs = [with_control(tmp_path / "one", 0.45, **one), with_control(tmp_path / "other", 0.55, **other)]

    found = study(runs)

    (scenario,) = found.scenarios
    assert [variant.isolated for variant in scenario.variants] == [{0: 0.45}, {0: 0.55}]
    assert [variant.isolated_by_peer["peer-1"] for variant in scenario.variants] == [0.45, 0.55]
    assert scenario.control("isolated") == {} and scenario.best.over("isolated") == {0: pytest.approx(0.05)}
    (floor,) = (check for check in checks(found) if check.name == "isolated is the floor")
    assert "of each variant its own" in floor.found and "(-5.0)" in floor.found and floor.ok is None


def test_a_control_serves_every_variant_that_differs_only_in_the_exchange(tmp_path):
    turns = {"schedule": "alternate"}
    runs = [
        with_control(tmp_path / "carrier", 0.45, divergence="kl", distill_epochs=1, **turns),
        with_control(tmp_path / "other", math.nan, divergence="js", distill_epochs=3, **turns),
    ]

    (scenario,) = study(runs).scenarios

    assert [variant.isolated for variant in scenario.variants] == [{0: 0.45}, {0: 0.45}]
    assert scenario.control("isolated") == {0: 0.45}


@pytest.mark.parametrize(("seen", "shares"), [([20, 40], True), ([20, 20], False), ([], True)])
def test_a_variant_whose_peers_trained_in_other_rounds_is_held_against_no_control_of_others(tmp_path, seen, shares):
    """A peer that was always late trained less than the control that its trial was to share; old runs do not tell."""
    runs = [
        with_control(tmp_path / "carrier", 0.45, divergence="kl", samples_seen=[20, 40]),
        with_control(tmp_path / "other", math.nan, divergence="js", samples_seen=seen),
    ]

    found = study(runs)

    assert [variant.isolated for variant in found.scenarios[0].variants] == [{0: 0.45}, {0: 0.45} if shares else {}]
    assert [
        f"{tmp_path / 'other'}: not held against the control isolated" in problem for problem in found.problems
    ] == [True] * (not shares)


def test_averaging_from_scratch_is_held_against_the_peers_own_models_if_they_ran_alone(tmp_path):
    cold = [
        with_control(tmp_path / model, level, strategy="fedavg", fedavg_model=model)
        for model, level in (("cnn-small", 0.2), ("cnn-wide", 0.3))
    ]
    exchanged = with_control(tmp_path / "averaged", 0.6)

    among_themselves, beside_exchange = (study(runs).scenarios[0].variants for runs in (cold, [*cold, exchanged]))

    assert [variant.isolated for variant in among_themselves] == [{0: 0.2}, {0: 0.3}]
    assert [variant.isolated for variant in beside_exchange] == [{0: 0.6}] * 3


def test_averaging_from_a_pretrained_start_is_held_against_that_architecture_trained_on_from_there(tmp_path):
    runs = [
        with_control(tmp_path / start, level, strategy="fedavg", fedavg_start=start)
        for start, level in (("cold", 0.2), ("pretrained", 0.3))
    ]

    variants = study(runs).scenarios[0].variants

    assert [variant.isolated for variant in variants] == [{0: 0.2}, {0: 0.3}]


def test_the_best_variant_is_found_over_seeds_that_all_have(tmp_path):
    found = study(runs_of(tmp_path, kl=({"divergence": "kl"}, [0.5, 0.9]), js=({"divergence": "js"}, [0.6])))

    assert found.scenarios[0].best.label == "js"


@pytest.mark.parametrize("weighing", ["uniform", "discrimination"])
def test_pairwise_and_averaged_are_held_together_only_where_algebra_says_so(tmp_path, weighing):
    found = study(runs_of(
        tmp_path,
        a=({"divergence": "kl", "strategy": "averaged", "weighing": weighing}, [0.5, 0.6]),
        b=({"divergence": "kl", "strategy": "pairwise", "weighing": weighing}, [0.5, 0.6]),
        c=({"divergence": "sed", "strategy": "averaged"}, [0.5, 0.6]),
        d=({"divergence": "sed", "strategy": "pairwise"}, [0.7, 0.6]),
    ))  # fmt: skip

    names = [check.name for check in checks(found) if "pairwise" in check.name]

    # Sharpened, a mean of divergences is one from the mean of sharpened teachers, not from a sharpened mean.
    assert names == ["pairwise mean and averaged probabilities agree under kl"] * (weighing == "uniform")


def test_a_variant_is_not_named_by_what_differs_only_where_it_does_nothing(tmp_path):
    """A server's run records what nobody chose, and what it does not use."""
    found = study(runs_of(
        tmp_path,
        a=({"strategy": "gossip", "teacher_temperature": 0.5}, [0.5, 0.6]),
        b=({"strategy": "fedavg"}, [0.5, 0.6]),
        c=({"strategy": "consensus"}, [0.5, 0.6]),
    ))  # fmt: skip

    names = [variant.label for variant in found.scenarios[0].variants]

    assert not any("temperature" in name or "discrimination" in name for name in names), names


def test_plain_and_matched_gradients_stand_side_by_side(tmp_path):
    found = study(runs_of(
        tmp_path,
        plain=({"divergence": "sed", "optimizer": "sgd"}, [0.5, 0.6, 0.1]),
        matched=({"divergence": "sed", "optimizer": "sgd", "match_gradients": True}, [0.7, 0.6]),
    ))  # fmt: skip

    (row,) = matched_gradients(found.scenarios[0])

    assert row["difference"] == pytest.approx(0.1) and row["plain"] == 0.55 and row["seeds"] == 2


def test_agreement_is_read_from_the_last_knowledge(tmp_path):
    names, matrix = agreement(read_run(make_run(tmp_path / "run", [[0.1, 0.3, 0.2], [0.4, 0.6, 0.3]], proxy_size=40)))

    assert names == ["peer-0", "peer-1", "peer-2"]
    assert matrix[1, 2] == 1.0 and matrix[0, 1] == 0.5


def test_reliability_pools_peers_and_leaves_out_empty_bins(tmp_path):
    found = reliability([read_run(make_run(tmp_path / "run", [[0.1, 0.3], [0.4, 0.6]]))])

    assert list(found) == ["before", "after"]
    assert found["after"].samples.tolist() == [4.0, 16.0]
    assert found["after"].ece == pytest.approx(0.25)


def test_of_nothing_the_mean_is_unknown_and_of_no_seed():
    for values in ([], [math.nan], [math.inf, math.nan]):
        found = mean(values)
        assert found.seeds == 0 and all(map(math.isnan, (found.value, found.low, found.high)))


def test_what_is_identical_is_a_difference_of_zero_and_a_steady_one_is_no_chance():
    same = compare("a", {0: 0.5, 1: 0.6, 2: 0.7}, "b", {0: 0.5, 1: 0.6, 2: 0.7})
    steady = every_pair({"a": {0: 0.75, 1: 0.5, 2: 0.25}, "b": {0: 0.5, 1: 0.25, 2: 0.0}})[0]

    assert same.identical and (same.difference, same.low, same.high) == (0, 0, 0) and math.isnan(same.p)
    assert steady.difference == 0.25 and not steady.identical and steady.p == 0.25


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=9))
def test_the_median_is_numpys(values):
    assert median(values) == pytest.approx(float(np.median(values)))
    assert math.isnan(median([*values, math.nan])) and math.isnan(median([]))
