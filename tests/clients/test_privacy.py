"""Differential privacy: the mechanism, what it adds up to, and runs among peers with a budget."""

import json
import math
import stat
import sys
from dataclasses import replace

import numpy as np
import pytest
from federation import Killed, federate, local_grid
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.stats import kstest, norm
from sites import deployed, make_sites

import clients.releases
from clients.data import proxy_subset
from fedkd.errors import FedkdError, SettingError
from fedkd.privacy import Mechanism, clipped, noise_multiplier, reproducible_normal, secret_normal, sensitivity, spent
from fedkd.settings.config import RunConfig
from strategies.relay.rounds import RelayError

ROWS = hnp.arrays(np.float32, (4, 5), elements=st.floats(-1e4, 1e4, width=32))


def exact_delta(epsilon, mu):
    """δ of a Gaussian release whose sensitivity is mu deviations (Balle and Wang 2018, theorem 8)."""
    second = math.exp(epsilon + norm.logcdf(-mu / 2 - epsilon / mu))
    return float(norm.cdf(mu / 2 - epsilon / mu) - second)


@pytest.mark.parametrize("epsilon", [0.1, 1.0, 8.0, 50.0])
@pytest.mark.parametrize("delta", [1e-8, 1e-5])
@pytest.mark.parametrize("releases", [1, 11, 101])
def test_so_many_releases_are_together_as_private_as_was_asked(epsilon, delta, releases):
    z = noise_multiplier(epsilon, delta, releases)

    assert exact_delta(epsilon, math.sqrt(releases) / z) == pytest.approx(delta, rel=1e-3)
    assert spent(releases / z**2, delta) == pytest.approx(epsilon, rel=1e-4)
    assert spent(1 / z**2, delta) <= spent(releases / z**2, delta)


def test_a_second_accountant_of_another_kind_bounds_the_first():
    import dp_accounting
    from dp_accounting import rdp

    accountant = rdp.RdpAccountant()
    accountant.compose(dp_accounting.GaussianDpEvent(5.0), 11)
    bound = accountant.get_epsilon(1e-5)
    assert 0.7 * bound < spent(11 / 25, 1e-5) <= bound


@given(logits=ROWS, others=ROWS, clip=st.floats(0.01, 100))
def test_no_change_of_the_logits_moves_a_release_further_than_its_sensitivity(logits, others, clip):
    moved = np.linalg.norm(clipped(logits, clip) - clipped(others, clip))
    assert moved <= sensitivity(4, clip)


@given(epsilon=st.floats(0.001, 1e4), delta=st.floats(1e-12, 0.1), releases=st.integers(1, 10_001))
@example(0.001, 1e-12, 10_001)
@example(1e4, 0.1, 1)
def test_the_noise_of_every_budget_that_is_allowed_is_found(epsilon, delta, releases):
    RunConfig.from_mapping({"privacy-epsilon": epsilon, "privacy-delta": delta})

    assert 0 < noise_multiplier(epsilon, delta, releases) < math.inf


@pytest.mark.parametrize("epsilon", [1e-300, 1e-9, 0.0009, -1.0, 10_001.0, math.nan])
def test_a_budget_whose_noise_takes_a_peer_forever_to_find_is_refused(epsilon):
    with pytest.raises(SettingError, match="privacy-epsilon"):
        RunConfig.from_mapping({"privacy-epsilon": epsilon})


@given(logits=ROWS)
def test_clipping_keeps_the_order_of_classes_and_what_softmax_sees_of_short_rows(logits):
    rows = clipped(logits, 1e6)
    np.testing.assert_allclose(
        rows - rows[:, :1], logits.astype(np.float64) - logits[:, :1].astype(np.float64), atol=1e-4
    )
    assert (clipped(logits, 0.5).argmax(1) == rows.argmax(1)).all()


def mechanism(**settings):
    changed = {"privacy-epsilon": 4.0, "rounds": 2, **settings}
    return Mechanism.from_config(RunConfig.from_mapping(changed))


def test_the_noise_is_gaussian_of_the_deviation_that_the_sensitivity_needs():
    made = mechanism()
    rows, classes = 500, 10
    shrink = made.clip**2 / (made.clip**2 + (classes - 1) * made.deviation(rows) ** 2)

    published = made.publish(np.zeros((rows, classes), np.float32), secret_normal((rows, classes)))

    noise = published / shrink / made.deviation(rows)
    assert made.deviation(rows) == pytest.approx(made.noise_multiplier * 2 * made.clip * math.sqrt(rows))
    # Centring takes one of ten dimensions of the noise away.
    assert kstest(noise.ravel() / math.sqrt(1 - 1 / classes), "norm").pvalue > 1e-6


def test_the_last_bits_of_what_is_published_do_not_tell_what_was_hidden():
    """Before it is scaled, every number lies on one grid, whatever the logits were."""
    made = mechanism()
    step = 2.0 ** (math.floor(math.log2(made.deviation(3))) - 16)
    logits = np.array([[1 / 3, -0.1, 7e-9], [2.5, -2.5, 0.0], [0.0, 0.0, 0.0]], np.float32)
    shrink = made.clip**2 / (made.clip**2 + 2 * made.deviation(3) ** 2)

    published = made.publish(logits, secret_normal((3, 3))).astype(np.float64) / shrink

    differences = (published[:, 1:] - published[:, :1]) / step  # centring moves a row as a whole
    np.testing.assert_allclose(differences, np.rint(differences), atol=0.05)


def test_noise_of_the_least_and_the_most_randomness_is_finite_and_far_out_on_either_side():
    from fedkd.privacy import _normal

    least, most = _normal(bytes(8), (1, 1)), _normal(b"\xff" * 8, (1, 1))

    assert -8.5 < least[0, 0] < -8 < 8 < most[0, 0] < 8.5


@pytest.mark.parametrize("deviation", [1.0, 1.9, 3.0, 0.3])
def test_the_grid_is_a_65536th_of_the_noise_to_the_power_of_two_below(deviation):
    from fedkd.privacy import _on_grid

    step = 2.0 ** np.floor(np.log2(deviation)) / 65536
    found = _on_grid(np.linspace(0, 10 * step, 1001), deviation)

    assert np.unique(found).tolist() == [step * k for k in range(11)]


def test_secret_noise_never_repeats_and_a_seeds_noise_always_does():
    assert not (secret_normal((4, 4)) == secret_normal((4, 4))).any()
    assert (reproducible_normal((4, 4), 7) == reproducible_normal((4, 4), 7)).all()
    assert not (reproducible_normal((4, 4), 7) == reproducible_normal((4, 4), 8)).any()


def test_a_private_run_says_what_it_promises_and_repeats_itself(tmp_path, capsys):
    settings = {"privacy_epsilon": 3.0, "privacy_delta": 1e-6, "proxy_per_round": 10}

    run = federate(tmp_path / "a", 2, **settings)
    again = federate(tmp_path / "b", 2, **settings)

    said = run.summary()["privacy"]
    assert (said["epsilon"], said["delta"], said["releases"]) == (3.0, 1e-6, 3)
    assert 0 < said["epsilon_per_release"] < 3.0
    assert "privacy: a peer's knowledge of the whole run is (3, 1e-06)-private" in capsys.readouterr().out
    by_round = [[row["epsilon"] for row in run.rows() if row["round"] == round] for round in range(3)]
    assert by_round[0][0] == pytest.approx(said["epsilon_per_release"])
    assert by_round[0] < by_round[1] < by_round[2] == pytest.approx([3.0, 3.0])
    assert run.timeless_rows() == again.timeless_rows()


def test_what_travels_is_the_clipped_and_noised_knowledge_alone(tmp_path):
    """Subtracting the seed's noise from what a simulated peer sent leaves its clipped logits."""
    plain = federate(tmp_path / "a", 2, rounds=0)
    noised = federate(tmp_path / "b", 2, rounds=0, privacy_epsilon=1e4, privacy_clip=3.0)
    config = RunConfig.from_mapping(noised.settings)
    made = Mechanism.from_config(config)
    assert len(proxy_subset(config, 1, "cpu")) == 60

    for before, after in zip(plain.grid.replies[2:], noised.grid.replies[2:], strict=True):
        logits, sent = before.content["knowledge"]["logits"].numpy(), after.content["knowledge"]["logits"].numpy()
        shrink = made.clip**2 / (made.clip**2 + 9 * made.deviation(60) ** 2)
        noise = sent / shrink - clipped(logits, 3.0)
        assert noise.std() == pytest.approx(made.deviation(60) * math.sqrt(0.9), rel=0.15)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strategy": "fedavg"}, "`privacy-epsilon` to be 0 under fedavg"),
        ({"method": "infoflow"}, "`privacy-epsilon` to be 0 under infoflow"),
        ({"strategy": "gossip", "mode": "async"}, "`privacy-epsilon` to be 0 under mode async"),
        ({"privacy-delta": 0.0}, r"`privacy-delta` to be a number in \[1e-12, 0.1\], but got 0.0"),
        ({"privacy-clip": 0.0}, "`privacy-clip` to be a number > 0, but got 0.0"),
        ({"privacy-epsilon": -1.0}, "`privacy-epsilon` to be 0, or a number in \\[0.001, 10000\\], but got -1.0"),
    ],
)
def test_settings_under_which_the_promise_would_not_hold_are_refused(settings, message):
    with pytest.raises(SettingError, match=message):
        RunConfig.from_mapping({"privacy-epsilon": 1.0, **settings})


def test_without_the_accountant_the_error_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "dp_accounting.pld", None)
    with pytest.raises(FedkdError, match=r"`privacy-epsilon` needs .*pip install \"fedkd\[privacy\]\""):
        federate(tmp_path, 2, privacy_epsilon=1.0)
    federate(tmp_path, 2, rounds=0)


@pytest.fixture(scope="module")
def sites(tmp_path_factory):
    return make_sites(tmp_path_factory.mktemp("sites"), peers=2)


@pytest.mark.parametrize(
    ("settings", "own", "message"),
    [
        ({}, {"max_epsilon": 2.0}, "`privacy-epsilon` to be more than 0 and at most 2 .*`max-epsilon`.*got 0.0"),
        ({"privacy_epsilon": 2.5}, {"max_epsilon": 2.0}, "`privacy-epsilon` .*at most 2 .*got 2.5"),
        (
            {"privacy_epsilon": 1.0, "privacy_delta": 1e-4},
            {"max_epsilon": 2.0, "max_delta": 1e-6},
            "`privacy-delta` to be at most 1e-06 .*`max-delta`.*got 0.0001",
        ),
    ],
)
def test_a_site_can_demand_privacy(tmp_path, sites, settings, own, message):
    with pytest.raises(RelayError, match=message):
        federate(tmp_path, grid=local_grid(tmp_path, 2, node_config=deployed(sites, **own)), **settings)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_sites_budget_adds_up_over_runs_and_then_it_publishes_no_more(tmp_path, sites):
    grid = local_grid(tmp_path, 2, node_config=deployed(sites, max_epsilon=5.0))
    first = federate(tmp_path / "1", grid=grid, privacy_epsilon=3.0, controls="isolated")

    with pytest.raises(RelayError, match=r"`privacy-epsilon` .*the 3 that are spent already .*ε 5 at δ 1e-05"):
        federate(tmp_path / "2", grid=grid, privacy_epsilon=4.5)
    second = federate(tmp_path / "3", grid=grid, privacy_epsilon=3.0, rounds=1)

    spent_by = [row["epsilon"] for run in (first, second) for row in run.rows() if row["peer"] == "site-0"]
    assert spent_by == sorted(spent_by) and 3.0 < spent_by[-1] <= 5.0
    assert stat.S_IMODE((tmp_path / "state" / "site-0" / "privacy.json").stat().st_mode) == 0o600


def test_what_a_site_with_a_budget_measures_stays_with_it(tmp_path, sites, capsys):
    grid = local_grid(tmp_path, 2, node_config=deployed(sites[:1], max_epsilon=9.0) | {1: sites[1]})

    run = federate(tmp_path, grid=grid, privacy_epsilon=3.0, controls="isolated")

    mine = [row for row in run.rows() if row["peer"] == "site-0"]
    told = {name for row in mine for name, value in row.items() if isinstance(value, float)}
    assert told == {"seconds", "epsilon"}
    theirs = [row for row in run.rows() if row["peer"] == "site-1"]
    assert all(row["test_accuracy"] is not None for row in theirs)
    for reply in grid.replies:
        if reply.content["answer"]["peer"] == "site-0":
            assert set(reply.content["metrics"]) <= {"seconds", "refused_letters", "epsilon"}
            assert not reply.content["series"]
    assert "control isolated: no result from site-0" in capsys.readouterr().out
    file = tmp_path / "state" / "site-0" / "measured.jsonl"
    kept = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["round"] for line in kept] == [0, 1, 2]
    assert all(0 <= line["test_accuracy"] <= 1 for line in kept)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_a_private_run_that_is_resumed_ends_as_an_uninterrupted_one_and_costs_no_more(tmp_path, sites, monkeypatch):
    """At a budget that has no room for a second release of any round; the same noise twice, so that numbers compare."""
    monkeypatch.setattr(clients.releases, "secret_normal", lambda shape: reproducible_normal(shape, 0))
    settings = {"privacy_epsilon": 3.0, "rounds": 3}
    grids = [local_grid(tmp_path / name, 2, node_config=deployed(sites, max_epsilon=3.0)) for name in ("a", "b")]
    whole = federate(tmp_path / "a", grid=grids[0], **settings)

    def kill(partition, message):
        mail = message.content["mail"]
        if (partition, mail["kind"], mail["round"]) == (1, "learn", 2):
            raise Killed

    grids[1].fault = kill
    with pytest.raises(Killed):
        federate(tmp_path / "b", grid=grids[1], **settings)
    grids[1].fault = None
    grids[1].forget()
    before = len(grids[1].replies)

    resumed = federate(tmp_path / "b", grid=grids[1], resume=str(tmp_path / "b" / "run"), **settings)

    assert resumed.timeless_rows() == whole.timeless_rows()
    assert {row["status"] for row in resumed.rows()} == {"ok"}
    assert resumed.rows()[-1]["epsilon"] == pytest.approx(3.0)
    first, again = (
        reply.content["knowledge"]["logits"].numpy()
        for reply in (grids[1].replies[before - 1], grids[1].replies[before + 2])
    )
    np.testing.assert_array_equal(first, again)


def test_whoever_asks_a_model_that_learned_by_heart_finds_its_members_and_noise_hides_them():
    from experiments.bench.privacy import attack

    plain, private = attack((0.0, 0.1), seeds=(0, 1))

    assert plain["published"] > 0.6 > private["published"]
    assert 0.4 < private["copy"] < 0.6


@pytest.mark.flower
@pytest.mark.slow
def test_the_benchmark_sets_accuracy_beside_epsilon(tmp_path, capsys):
    from experiments.bench.benchmarks import bench

    bench("privacy", tmp_path / "figures.json", quick=True)

    found = json.loads((tmp_path / "figures.json").read_text())
    assert [(row["rows"], row["epsilon"]) for row in found["accuracy"]] == [
        (60, 0.0),
        (60, 10.0),
        (20, 0.0),
        (20, 10.0),
    ]
    assert all(0 < row["isolated"] <= 1 and 0 < row["after"] <= 1 for row in found["accuracy"])
    many, few = (row["noise_multiplier"] for row in found["accuracy"][1::2])
    assert many == few > 0  # what the samples cost is in the sensitivity, not in z
    assert found["ratio"] > 0
    assert "AUC" in capsys.readouterr().out


@pytest.mark.parametrize("draw", [secret_normal, lambda shape: reproducible_normal(shape, 5)])
def test_the_noise_before_it_is_scaled_is_standard_normal_in_every_place(draw):
    drawn = draw((400, 50))

    assert drawn.shape == (400, 50) and np.isfinite(drawn).all()
    assert kstest(drawn.ravel(), "norm").pvalue > 1e-6
    assert len(np.unique(drawn)) == drawn.size  # 53 bits each: none twice
    assert abs(np.corrcoef(drawn.ravel()[:-1], drawn.ravel()[1:])[0, 1]) < 0.05


def test_what_is_spent_grows_with_the_cost_from_nothing_to_more_than_a_number_says():
    costs = [0.0, 1e-9, 1e-3, 1e-2, 1.0, 100.0, 1e4]
    found = [spent(cost, 1e-5) for cost in costs]

    assert found[0] == 0 and found == sorted(found) and math.isfinite(found[-1]) and len(set(found[2:])) == 5
    assert spent(-1.0, 1e-5) == 0
    assert spent(1e-3, 0.1) == 0  # all that such a release could tell is within δ
    assert spent(1e9, 1e-5) == math.inf
    for cost, epsilon in zip(costs[2:], found[2:], strict=True):
        if epsilon < 500:  # beyond, the independent formula overflows
            assert exact_delta(epsilon, math.sqrt(cost)) == pytest.approx(1e-5, rel=1e-3)


@given(scale=st.floats(0.01, 100), clip=st.floats(0.1, 10))
def test_without_noise_what_is_published_is_a_multiple_of_what_was_clipped(scale, clip):
    """Shrinking moves all rows alike and nobody's classes: what the softmax sees of a row is tempered, not turned."""
    made = replace(mechanism(), clip=clip)
    logits = (scale * np.random.default_rng(0).standard_normal((6, 4))).astype(np.float32)

    published = made.publish(logits, np.zeros((6, 4)))

    kept = clipped(logits, clip)
    factor = float((published * kept).sum() / (kept * kept).sum())
    assert 0 < factor < 1
    # Up to the grid of 2⁻¹⁶ of the deviation.
    np.testing.assert_allclose(published, factor * kept, atol=factor * made.deviation(6) * 2.0**-15)


def test_the_more_noise_a_release_has_the_less_it_is_believed_as_a_posterior_mean_would():
    """For logits of that norm in every direction, shrinking is what brings noisy ones nearest to them."""
    made, classes = replace(mechanism(), noise_multiplier=0.02), 8
    stream = np.random.default_rng(1)
    logits = stream.standard_normal((300, classes))
    logits -= logits.mean(axis=1, keepdims=True)
    logits *= made.clip / np.linalg.norm(logits, axis=1, keepdims=True)

    published = made.publish(logits.astype(np.float32), stream.standard_normal((300, classes)))

    def miss(factor):
        return float(np.square(factor * published - logits).mean())

    assert miss(1.0) < miss(0.9) and miss(1.0) < miss(1.1)
