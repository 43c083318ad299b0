"""What peers tell beside their logits: whole federations, read off their messages, and one peer's way of finding it."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from federation import federate, killed, local_grid
from flwr.app import Array, ArrayRecord
from sites import deployed, make_sites
from torch import nn

import clients.releases
from clients.configuration import PeerConfig
from clients.data import open_site, proxy_subset
from clients.telling import Telling, penultimate
from fedkd.errors import SettingError
from fedkd.losses import selection
from fedkd.privacy import CountsMechanism, Mechanism, reproducible_normal, spent
from fedkd.settings.config import RunConfig
from fedkd.training.loops import predict
from fedkd.wire.claims import decode_claims, encode_claims
from fedkd.wire.messages import unpack_answer, unpack_mail
from strategies.relay.console import telling_line
from strategies.relay.rounds import RelayError

SKEWED = {"partition": "dirichlet", "partition_alpha": 0.3}
SAMPLES, CLASSES = 60, 10


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    """Where sites that are opened without a federation leave their parts of the data."""
    monkeypatch.chdir(tmp_path)


def knowledge(run):
    """Return by peer and round what every answer held."""
    answers = [unpack_answer(reply.content) for reply in run.grid.replies]
    return {(a.peer, a.round): a.arrays for a in answers if a.arrays}


def told(run, *claims):
    return {key: decode_claims(arrays, shape=(SAMPLES, CLASSES), told=claims) for key, arrays in knowledge(run).items()}


def labels(index, **settings):
    """Return the private labels of a simulated peer, from its data and not from what it sent."""
    return site_of(index, **settings).labels


def site_of(index, **settings):
    config = config_of(**settings)
    return open_site(config, peer_of(index), torch.device("cpu"))


def config_of(**settings):
    changed = {"models": "mlp,cnn-small", "proxy_size": SAMPLES, **SKEWED, **settings}
    return RunConfig(**changed)


def peer_of(index):
    return PeerConfig(f"peer-{index}", index, 3, Path("unused"), Path("unused"))


def test_counts_are_those_of_the_private_labels_in_every_letter(tmp_path, capsys):
    run = federate(tmp_path, 3, weighing="counts", **SKEWED)

    said = told(run, "counts")
    assert set(said) == {(f"peer-{i}", round) for i in range(3) for round in range(3)}
    for (peer, _), claims in said.items():
        np.testing.assert_array_equal(claims.counts, labels(int(peer[-1])).bincount(minlength=CLASSES))
    assert {tuple(sorted(arrays)) for arrays in knowledge(run).values()} == {("about.counts", "logits")}
    assert "peers tell beside their logits: how many samples of each class they have\n" in capsys.readouterr().out
    assert {row["status"] for row in run.rows()} == {"ok"} and not run.summary()["privacy"]


def test_under_other_weighings_nothing_is_told(tmp_path, capsys):
    run = federate(tmp_path, 2, rounds=1)
    assert {tuple(arrays) for arrays in knowledge(run).values()} == {("logits",)}
    assert "peers tell" not in capsys.readouterr().out


def test_noise_on_counts_is_drawn_once_by_each_peer_and_its_cost_is_told(tmp_path, capsys):
    run = federate(tmp_path / "a", 3, weighing="counts", counts_noise=4.0, **SKEWED)
    again = federate(tmp_path / "b", 3, weighing="counts", counts_noise=4.0, **SKEWED)

    said = told(run, "counts")
    noises = []
    for index in range(3):
        counts = [said[f"peer-{index}", round].counts for round in range(3)]
        np.testing.assert_array_equal(counts[0], counts[1])
        np.testing.assert_array_equal(counts[0], counts[2])
        noises.append(counts[0] - labels(index).bincount(minlength=CLASSES).numpy())
        assert np.abs(noises[-1]).max() > 0.1 and (counts[0] >= 0).all()
    assert not np.allclose(noises[0], noises[1])
    epsilon = spent(1 / 16, 1e-5)
    assert all(row["epsilon"] == pytest.approx(epsilon) for row in run.rows())
    promised = run.summary()["privacy"]
    assert promised["epsilon"] == pytest.approx(epsilon) and "not their logits" in promised["covers"]
    assert f"privacy: the class counts that a peer tells are ({epsilon:.3g}, 1e-05)-private" in capsys.readouterr().out
    assert run.timeless_rows() == again.timeless_rows()


def test_the_noise_of_counts_has_the_deviation_that_one_record_needs():
    mechanism = CountsMechanism(1e-5, 3.0)
    counts = np.full(20_000, 1000, np.float32)  # as many classes as draws

    noise = mechanism.publish(counts, reproducible_normal((1, len(counts)), 7)[0]) - counts

    assert noise.std() == pytest.approx(3 * math.sqrt(2), rel=0.02) and abs(noise.mean()) < 0.1
    # Among neighbours that differ in one record's label the release is one of multiplier 3.
    one, other = np.array([5.0, 2.0]), np.array([4.0, 3.0])
    assert np.linalg.norm(one - other) / mechanism.deviation == pytest.approx(1 / 3)
    assert mechanism.cost == pytest.approx(1 / 9)


def test_noised_counts_never_fall_below_zero():
    noised = CountsMechanism(1e-5, 50.0).publish(np.zeros(1000, np.float32), reproducible_normal((1, 1000), 1)[0])
    assert noised.min() == 0 and 0.4 < (noised > 0).mean() < 0.6


def test_counts_and_logits_are_together_within_the_promise(tmp_path):
    plain = Mechanism.from_config(RunConfig(privacy_epsilon=8.0, rounds=2))
    config = RunConfig(privacy_epsilon=8.0, rounds=2, weighing="counts", counts_noise=2.0)
    both = Mechanism.from_config(config)

    assert both.noise_multiplier > plain.noise_multiplier
    assert 3 * both.cost + CountsMechanism.from_config(config).cost == pytest.approx(3 * plain.cost)

    run = federate(tmp_path, 2, weighing="counts", counts_noise=2.0, privacy_epsilon=8.0)
    assert [row["epsilon"] for row in run.rows()][-1] == pytest.approx(8.0, rel=1e-4)
    assert run.rows()[0]["epsilon"] == pytest.approx(spent(both.cost + 1 / 4, 1e-5), rel=1e-6)
    assert run.summary()["privacy"]["epsilon_of_counts"] == pytest.approx(spent(1 / 4, 1e-5))


def test_counts_that_alone_would_break_the_promise_are_refused_before_anyone_trains(tmp_path):
    with pytest.raises(SettingError, match=r"`counts-noise` to be above [\d.]+ with `privacy-epsilon` 1.*got 0.5"):
        federate(tmp_path, 2, weighing="counts", counts_noise=0.5, privacy_epsilon=1.0)
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weighing": "counts", "privacy-epsilon": 1.0}, "`counts-noise` to be above 0 with a `privacy-epsilon`"),
        ({"weighing": "density", "privacy-epsilon": 1.0}, "`weighing` to be another one with a `privacy-epsilon`"),
        ({"selector": "roc", "privacy-epsilon": 1.0}, "`selector` to be none with a `privacy-epsilon`"),
        ({"weighing": "counts", "strategy": "consensus"}, "`weighing` .*under consensus: its server combines"),
        ({"weighing": "density", "strategy": "fedavg"}, "`weighing` .*under fedavg"),
        ({"selector": "kulsif", "strategy": "consensus"}, "`selector` to be none under consensus"),
        ({"selector": "kulsif", "strategy": "fedavg"}, "`selector` to be none under fedavg"),
        ({"selector": "roc", "method": "infoflow"}, "`selector` to be none under infoflow"),
        ({"selector": "roc", "robust": "median"}, "`selector` to be none with `robust=median`"),
        ({"selector": "roc", "robust": "agreement"}, "`selector` to be none with `robust=agreement`"),
        ({"selector": "k-means", "compiled": True}, "`compiled` to be false where density or a selector"),
        ({"weighing": "density", "compiled": True}, "`compiled` to be false where density or a selector"),
        ({"selector": "best"}, "`selector` to be one of none, kulsif, k-means, roc"),
        ({"selector-quantile": 1.5}, r"`selector-quantile` to be a number in \[0, 1\]"),
        ({"counts-noise": -1.0}, "`counts-noise` to be a number >= 0"),
    ],
)
def test_what_cannot_be_together_is_refused_by_key_value_and_what_is_allowed(settings, message):
    with pytest.raises(SettingError, match=message):
        RunConfig.from_mapping(settings)


@pytest.mark.parametrize("selector", ["kulsif", "k-means", "roc"])
def test_masked_samples_do_not_travel_and_bytes_fall(tmp_path, selector):
    run = federate(tmp_path / "masked", 3, selector=selector, **SKEWED)
    plain = federate(tmp_path / "plain", 3, **SKEWED)

    said, arrays, whole = told(run, "mask"), knowledge(run), knowledge(plain)
    for key, claims in said.items():
        rows = claims.rows(SAMPLES)
        assert 0 < rows < SAMPLES
        assert arrays[key]["logits"].shape == (rows, CLASSES) and set(arrays[key]) == {"logits", "about.sent"}
        sent = arrays[key]["logits"].nbytes + arrays[key]["about.sent"].nbytes
        assert sent == 4 * CLASSES * rows + 8 < whole[key]["logits"].nbytes
        np.testing.assert_array_equal(claims.sent, said[key[0], 0].sent)  # one for the whole run
        if key[1] == 0:  # before anyone has heard anything
            np.testing.assert_array_equal(arrays[key]["logits"], whole[key]["logits"][claims.sent])
    for ours, theirs in zip(run.rows(), plain.rows(), strict=True):
        assert ours["status"] == "ok" and ours["bytes_up"] < theirs["bytes_up"]
        assert ours["round"] == 0 or math.isfinite(ours["kd_loss"])


@pytest.mark.parametrize("settings", [{"weighing": "counts"}, {"weighing": "density", "selector": "kulsif"}])
def test_sealed_runs_hear_the_same_and_the_relay_sees_nothing_of_it(tmp_path, settings):
    plain = federate(tmp_path / "plain", 3, **settings, **SKEWED)
    sealed = federate(tmp_path / "sealed", 3, sealed=True, **settings, **SKEWED)

    def learned(run):
        return [(row["peer"], row["round"], row["test_accuracy"], row["kd_loss"]) for row in run.rows()]

    assert learned(sealed) == learned(plain)
    assert all(row["refused_letters"] == 0 and row["status"] == "ok" for row in sealed.rows())
    assert {tuple(sorted(arrays)) for arrays in knowledge(sealed).values()} == {("sealed", "wraps")}


def test_density_tells_a_score_of_every_sample_and_under_a_mask_of_those_sent(tmp_path):
    run = federate(tmp_path / "all", 3, weighing="density", **SKEWED)
    masked = federate(tmp_path / "some", 3, weighing="density", selector="k-means", **SKEWED)

    scores, some = told(run, "density"), told(masked, "density", "mask")
    for key, claims in scores.items():
        assert ((claims.certainty > 0) & (claims.certainty < 1)).all() and claims.certainty.std() > 0.01
        np.testing.assert_array_equal(claims.certainty, scores[key[0], 0].certainty)
        expected = np.where(some[key].sent, claims.certainty, 0)
        np.testing.assert_allclose(some[key].certainty, expected, atol=1e-3)
        assert knowledge(masked)[key]["about.certainty"].shape == (some[key].rows(SAMPLES),)


def test_what_is_told_about_a_rounds_subset_is_what_is_told_about_its_samples(tmp_path):
    whole = federate(tmp_path / "all", 2, weighing="density", **SKEWED)
    some = federate(tmp_path / "some", 2, weighing="density", proxy_per_round=20, **SKEWED)

    config = RunConfig.from_mapping(some.settings)
    for (peer, round), arrays in knowledge(some).items():
        said = decode_claims(arrays, shape=(20, CLASSES), told=("density",))
        chosen = proxy_subset(config, round + 1, torch.device("cpu")).numpy()
        np.testing.assert_array_equal(said.certainty, told(whole, "density")[peer, 0].certainty[chosen])


def test_a_peer_that_leaves_everything_out_sends_no_logits_and_is_no_ones_teacher(tmp_path, monkeypatch):
    monkeypatch.setattr(Telling, "_selected", lambda self, model: torch.full((SAMPLES,), self.index != 0))

    run = federate(tmp_path, 2, selector="roc", codec="int8")
    alone = federate(tmp_path / "alone", 2, codec="int8")

    assert {tuple(arrays) for (peer, _), arrays in knowledge(run).items() if peer == "peer-0"} == {("about.sent",)}
    found = {(row["peer"], row["round"]): row for row in run.rows()}
    assert all(row["status"] == "ok" and row["refused_letters"] == 0 for row in found.values())
    assert found["peer-1", 1]["kd_loss"] is None and math.isfinite(found["peer-0", 1]["kd_loss"])
    # Who hears the one that sent all samples hears what it would have heard without any mask.
    theirs = {(row["peer"], row["round"]): row for row in alone.rows()}
    assert found["peer-0", 1]["kd_loss"] == pytest.approx(theirs["peer-0", 1]["kd_loss"], rel=1e-5)


def test_controls_know_nothing_of_what_is_told(tmp_path):
    runs = [
        federate(tmp_path / str(i), 2, controls="isolated", **settings)
        for i, settings in enumerate(
            ({}, {"weighing": "counts", "counts_noise": 1.0}, {"selector": "kulsif"}, {"weighing": "density"})
        )
    ]
    found = [[peer["isolated"] for peer in run.summary()["peers"]] for run in runs]
    assert found[0] == found[1] == found[2] == found[3]


def test_a_run_that_is_resumed_tells_what_it_told_before(tmp_path):
    settings = {"weighing": "density", "selector": "k-means", "rounds": 3, **SKEWED}
    whole = federate(tmp_path / "whole", 2, **settings)
    grid = killed(tmp_path / "cut", 2, peer=1, round=2, **settings)
    files = list((tmp_path / "cut").rglob("told.npz"))
    assert len(files) == 2 and all(file.stat().st_mode & 0o077 == 0 for file in files)
    files[0].unlink()  # what is lost is found out again, of the model that the peer began with

    resumed = federate(tmp_path / "cut", 2, grid=grid, resume=str(tmp_path / "cut" / "run"), **settings)

    assert resumed.timeless_rows() == whole.timeless_rows()


@pytest.fixture(scope="module")
def sites(tmp_path_factory):
    return make_sites(tmp_path_factory.mktemp("sites"), peers=2)


@pytest.mark.parametrize(
    ("settings", "own", "message"),
    [
        ({"weighing": "counts"}, {}, '`weighing` .*tells nothing but its logits .*allows counts: `tell = "counts"`'),
        ({"weighing": "density"}, {"tell": "counts"}, 'tells nothing but counts .*`tell = "counts,density"`'),
        ({"selector": "roc"}, {"tell": "counts, density"}, '`selector` .*`tell = "counts,density,mask"`.*got .*roc'),
    ],
)
def test_a_site_tells_nothing_that_its_owner_does_not_allow(tmp_path, sites, settings, own, message):
    with pytest.raises(RelayError, match=message):
        federate(tmp_path, grid=local_grid(tmp_path, 2, node_config=deployed(sites, **own)), **settings)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_what_a_site_may_tell_has_names(tmp_path, sites):
    with pytest.raises(RelayError, match="`tell` to be a comma-separated choice of counts, density, mask"):
        federate(tmp_path, grid=local_grid(tmp_path, 2, node_config=deployed(sites, tell="all")))


def test_a_site_that_allows_it_takes_part(tmp_path, sites):
    grid = local_grid(tmp_path, 2, node_config=deployed(sites, tell="density,mask"))
    run = federate(tmp_path, grid=grid, weighing="density", selector="kulsif", density_noise=0.1)

    assert {row["status"] for row in run.rows()} == {"ok"}
    scores = told(run, "density", "mask")
    np.testing.assert_array_equal(scores["site-0", 0].certainty, scores["site-0", 2].certainty)  # secret, drawn once


def test_a_sites_noised_counts_are_charged_once_and_come_again(tmp_path, sites):
    own = {"tell": "counts", "max_epsilon": 5.0}
    grid = local_grid(tmp_path, 2, node_config=deployed(sites, **own))
    settings = {"weighing": "counts", "counts_noise": 3.0, "privacy_epsilon": 4.0}

    run = federate(tmp_path, grid=grid, **settings)

    said = told(run, "counts")
    for index in range(2):
        np.testing.assert_array_equal(said[f"site-{index}", 0].counts, said[f"site-{index}", 2].counts)
        folder = tmp_path / "state" / f"site-{index}"
        budget = json.loads((folder / "privacy.json").read_text())
        assert [sorted(made) for made in budget["runs"].values()] == [[-1, 0, 1, 2]]
        assert spent(budget["spent"], 1e-5) == pytest.approx(4.0, rel=1e-4)
        (kept,) = folder.rglob("counts.npy")
        np.testing.assert_array_equal(np.load(kept), said[f"site-{index}", 0].counts)
        assert kept.stat().st_mode & 0o077 == 0
    assert run.rows()[-1]["epsilon"] == pytest.approx(4.0, rel=1e-4)
    with pytest.raises(RelayError, match="the 4 that are spent already"):
        federate(tmp_path / "more", grid=grid, **settings)


def test_a_sites_counts_are_noised_by_what_nobody_else_knows(tmp_path, sites, monkeypatch):
    drawn = []

    def secret(shape):
        drawn.append(shape)
        return reproducible_normal(shape, 1)

    monkeypatch.setattr(clients.releases, "secret_normal", secret)
    grid = local_grid(tmp_path, 2, node_config=deployed(sites, tell="counts"))
    run = federate(tmp_path, grid=grid, weighing="counts", counts_noise=1.0)

    assert drawn == [(1, CLASSES)] * 2
    budget = json.loads((tmp_path / "state" / "site-0" / "privacy.json").read_text())
    assert budget["spent"] == 1.0 and run.rows()[-1]["epsilon"] == pytest.approx(spent(1.0, 1e-5))


def test_the_relay_refuses_claims_that_no_peer_could_use(tmp_path):
    grid = local_grid(tmp_path, 3)

    def lie(partition, message):
        mail = unpack_mail(message.content)
        if partition != 0 or mail.kind != "learn":
            return None
        reply = grid.answer(partition, message)
        arrays = unpack_answer(reply.content).arrays
        changed = {**arrays, "about.counts": np.full(CLASSES, np.nan, np.float32)}
        reply.content["knowledge"] = ArrayRecord({name: Array(array) for name, array in changed.items()})
        return reply

    grid.fault = lie
    run = federate(tmp_path, 3, grid=grid, weighing="counts")

    rows = {(row["peer"], row["round"]): row for row in run.rows()}
    assert "`about.counts` within" in rows["peer-0", 1]["error"] and rows["peer-1", 1]["status"] == "ok"


def test_features_are_what_the_last_linear_layer_is_given():
    model = nn.Sequential(nn.Flatten(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    inputs = torch.randn(300, 2, 3)
    with torch.no_grad():
        expected = model[:3](inputs)

    torch.testing.assert_close(penultimate(model, inputs), expected)
    assert not model[3]._forward_pre_hooks


def test_features_of_a_model_without_such_a_layer_are_its_logits():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.unused, self.weight = nn.Linear(2, 2), nn.Parameter(torch.randn(6, 3))

        def forward(self, x):
            return x.flatten(1) @ self.weight

    inputs = torch.randn(9, 2, 3)
    for model in (Odd(), nn.Conv1d(2, 3, 3)):
        logits = predict(nn.Sequential(model, nn.Flatten()), inputs)
        torch.testing.assert_close(penultimate(nn.Sequential(model, nn.Flatten()), inputs), logits)


def test_features_along_a_sequence_are_their_mean():
    class Sequence(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(4, 3)

        def forward(self, x):
            return self.head(x).mean(dim=1)

    inputs = torch.randn(7, 5, 4)
    torch.testing.assert_close(penultimate(Sequence(), inputs), inputs.mean(dim=1))


def telling(tmp_path, index=0, **settings):
    config = config_of(**settings)
    site = site_of(index, **settings)
    return Telling(config, site, index, tmp_path, None, simulated=True)


def identity():
    """A model whose features and logits are a picture's first ten numbers."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10, bias=False))
    nn.init.eye_(model[1].weight)
    return model


def test_the_scores_are_those_of_the_regression_on_the_models_features(tmp_path):
    made = telling(tmp_path, weighing="density", density_penalty=0.05)

    found = made.claims(identity)

    private, public = selection.bounded(made.site.inputs.flatten(1), made.site.commons.proxy_inputs.flatten(1))
    theta = selection.density_coefficients(private, public, penalty=0.05)
    np.testing.assert_allclose(found.certainty, selection.density_scores(theta, public), atol=1e-5)


def test_the_noise_of_the_density_moves_coefficients_by_what_the_paper_says(tmp_path, monkeypatch):
    made = telling(tmp_path, weighing="density", density_noise=2.0, density_penalty=0.05)
    given = []
    monkeypatch.setattr(selection, "density_scores", lambda theta, rows: given.append(theta) or torch.zeros(len(rows)))
    clean = replace(made, config=replace(made.config, density_noise=0.0))

    clean._density(identity())
    for index in range(40):
        replace(made, index=index)._density(identity())

    noise = torch.stack(given[1:]) - given[0]
    rows = len(made.site.inputs) + SAMPLES
    assert float(noise.std()) == pytest.approx(2.0 * 2 / (rows * 0.05), rel=0.06)


def test_a_selector_keeps_samples_like_ones_own_and_leaves_strangers_out(tmp_path):
    """Of proxy samples half of which lie where no private sample does."""
    made = telling(tmp_path)
    stranger = made.site.commons.proxy_inputs.clone()
    stranger[SAMPLES // 2 :] += 20.0
    commons = replace(made.site.commons, proxy_inputs=stranger)
    for selector in ("kulsif", "k-means"):
        config = replace(made.config, selector=selector)
        found = replace(made, config=config, site=replace(made.site, commons=commons))._selected(identity())
        assert not found[SAMPLES // 2 :].any() and found[: SAMPLES // 2].float().mean() > 0.1, selector


def test_the_quantile_decides_how_many_are_sent(tmp_path):
    made = telling(tmp_path, selector="k-means")
    sent = [
        int(replace(made, config=replace(made.config, selector_quantile=q))._selected(identity()).sum())
        for q in (0.0, 0.25, 0.75, 1.0)
    ]
    assert sent == sorted(sent, reverse=True) and sent[0] > sent[-1]


def test_confident_samples_are_those_above_the_threshold_of_the_roc_curve(tmp_path):
    made = telling(tmp_path, selector="roc")
    model = identity()

    found = made._selected(model)

    private, public = (
        predict(model, rows).double().softmax(dim=1).max(dim=1).values
        for rows in (made.site.inputs, made.site.commons.proxy_inputs)
    )
    edge = selection.roc_threshold(private, public)
    np.testing.assert_array_equal(found, public >= edge)


@pytest.mark.parametrize("selector", ["kulsif", "k-means", "roc"])
@pytest.mark.parametrize("count", [0, 1, 2])
def test_a_peer_of_hardly_any_sample_still_answers(tmp_path, selector, count):
    made = telling(tmp_path, selector=selector, weighing="density")
    site = replace(made.site, inputs=made.site.inputs[:count], labels=made.site.labels[:count])

    found = replace(made, site=site).claims(identity)

    assert found.sent.shape == (SAMPLES,) and np.isfinite(found.certainty).all()
    assert decode_claims(encode_claims(found), shape=(SAMPLES, CLASSES), told=("density", "mask")).rows(
        SAMPLES
    ) == found.rows(SAMPLES)
    if count == 0:
        assert not found.sent.any()


def test_what_is_held_out_finds_the_threshold(tmp_path):
    made = telling(tmp_path, selector="k-means")
    own = made.site.inputs
    site = replace(made.site, held_out=replace(made.site.held_out, inputs=own[:3], labels=made.site.labels[:3]))

    known, others = replace(made, site=site)._set_aside()
    parted = made._set_aside()

    assert torch.equal(known, own) and torch.equal(others, own[:3])
    assert sum(map(len, parted)) == len(own) and len(parted[1]) == round(0.2 * len(own))
    rows = [{row.numpy().tobytes() for row in part} for part in parted]
    assert rows[0] | rows[1] == {row.numpy().tobytes() for row in own}


def test_the_log_says_what_peers_tell():
    assert telling_line(RunConfig()) == telling_line(RunConfig(strategy="fedavg", selector="roc")) == ""
    assert telling_line(RunConfig(weighing="counts", counts_noise=2.0)).endswith(
        "how many samples of each class they have with noise of 2 times what one record moves"
    )
