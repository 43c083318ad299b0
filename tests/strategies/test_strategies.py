"""Every strategy, end to end in one process."""

import json
import sys

import numpy as np
import pytest
import torch
from federation import federate, local_grid
from flwr.app import ArrayRecord

from clients.pretrained import _kept
from fedkd.errors import SettingError
from fedkd.settings.config import RunConfig
from fedkd.training.distillation import Distillation
from strategies.relay.rounds import RelayError

PEERS = 4


def teachers_by_round(run):
    found = {}
    for row in run.rows():
        found.setdefault(row["round"], {})[row["peer"]] = set(row["teachers"])
    return found


def test_averaged_on_a_ring_hears_two_neighbours(tmp_path):
    run = federate(tmp_path, PEERS, topology="ring", rounds=1, pictures=True)

    assert teachers_by_round(run)[1]["peer-0"] == {"peer-1", "peer-3"}
    assert run.summary()["topology"]["diameter"] == 2
    assert (run.folder / "topology.png").stat().st_size > 1000


def test_pairwise_round_robin_meets_everyone_once_in_n_minus_1_rounds(tmp_path):
    run = federate(tmp_path, PEERS, strategy="pairwise", matching="round-robin", rounds=PEERS - 1)

    met = [teachers_by_round(run)[round]["peer-0"] for round in range(1, PEERS)]
    assert all(len(partner) == 1 for partner in met)
    assert set().union(*met) == {"peer-1", "peer-2", "peer-3"}


@pytest.mark.parametrize("style", ["pull", "push", "push-pull"])
def test_gossip_draws_are_a_function_of_the_seed(tmp_path, style):
    first = federate(tmp_path / "a", PEERS, strategy="gossip", gossip_style=style, rounds=2)
    again = federate(tmp_path / "b", PEERS, strategy="gossip", gossip_style=style, rounds=2)

    assert first.timeless_rows() == again.timeless_rows()
    heard = [len(names) for names in teachers_by_round(first)[1].values()]
    assert heard == [1] * PEERS if style == "pull" else sum(heard) >= PEERS


@pytest.mark.slow
def test_async_gossip_ends_after_its_updates_and_a_silent_peer_slows_nobody(tmp_path):
    grid = local_grid(tmp_path, PEERS)
    grid.fault = lambda partition, message: grid.silent.update({3} if grid.sent[7:] else set())

    run = federate(tmp_path, PEERS, grid=grid, strategy="gossip", mode="async", updates=9, round_timeout=5.0)

    learned = [row for row in run.rows() if row["round"] > 0]
    assert len(learned) == 9
    assert sum(row["peer"] == "peer-3" for row in learned) <= 1
    assert max(row["round"] for row in learned) >= 3


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"mode": "async"}, "mode"),
        ({"sealed": True, "strategy": "consensus"}, "sealed"),
        ({"strategy": "pairwise", "robust": "median"}, "robust"),
        ({"strategy": "pairwise", "sharpen": 0.1}, "sharpen"),
        ({"kd-weight": 1.0}, "kd-weight"),
        ({"kd-weight": 0.0}, "kd-weight"),
        ({"local-epochs": 0}, "local-epochs"),
        ({"distill-epochs": 0}, "distill-epochs"),
        ({"regime": "dml", "schedule": "alternate", "local-epochs": 0}, "local-epochs"),
        ({"schedule": "alternate", "kd-weight": 0.5}, "kd-weight"),
        ({"schedule": "alternate", "match-gradients": True}, "match-gradients"),
        ({"schedule": "alternate", "t2-scaling": True}, "t2-scaling"),
        ({"schedule": "alternate", "kd-warm-up": 3}, "kd-warm-up"),
        ({"schedule": "alternate", "regime": "tuned"}, "regime"),
        ({"strategy": "consensus", "match-gradients": True}, "match-gradients"),
        ({"regime": "tuned", "tune-weights": "0.5,2"}, "tune-weights"),
        ({"strategy": "fedavg", "topology": "ring"}, "topology"),
        ({"strategy": "consensus", "robust": "median"}, "robust"),
        ({"strategy": "gossip", "combine": "pairwise", "robust": "trimmed"}, "robust"),
        ({"method": "infoflow", "robust": "median"}, "robust"),
        ({"method": "infoflow", "attack": "flip"}, "attack"),
        ({"proxy-per-round": 500}, "proxy-per-round"),
        ({"strategy": "gossip", "mode": "async", "proxy-per-round": 5}, "proxy-per-round"),
        ({"tune-weights": "0.5,-1"}, "tune-weights"),
        ({"tune-temperatures": "warm"}, "tune-temperatures"),
    ],
)
def test_settings_that_contradict_one_another_are_refused(settings, key):
    with pytest.raises(SettingError, match=f"`{key}`"):
        RunConfig.from_mapping(settings)


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"topology": "k-regular", "topology_degree": 3}, "topology"),
        ({"topology": "torus"}, "topology"),
        ({"strategy": "pairwise", "matching": "round-robin", "topology": "ring"}, "topology"),
    ],
)
def test_impossible_topologies_stop_the_run_before_training(tmp_path, settings, key):
    grid = local_grid(tmp_path, 5)

    with pytest.raises(SettingError, match=f"`{key}"):
        federate(tmp_path, 5, grid=grid, **settings)

    assert {message.content["mail"]["kind"] for message in grid.sent} == {"introduce"}


def letter_of(run, round, peer=0):
    mails = [m for m in run.grid.sent if m.content["mail"]["round"] == round and m.content["mail"]["kind"] == "learn"]
    return mails[peer].content["letter.0"]["logits"].numpy()


def knowledge(run, round):
    answers = [m.content for m in run.grid.replies if "knowledge" in m.content]
    return np.stack([a["knowledge"]["logits"].numpy() for a in answers if a["answer"]["round"] == round])


def test_fedmd_sends_everyone_the_mean_of_all_logits(tmp_path):
    run = federate(tmp_path, 3, strategy="consensus", rounds=1)

    assert all(row["teachers"] == ["server"] for row in run.rows() if row["round"] == 1)
    np.testing.assert_allclose(letter_of(run, 1), knowledge(run, 0).mean(axis=0), atol=1e-5)


def test_ds_fl_sharpens_the_mean_of_all_probabilities(tmp_path):
    from scipy.special import softmax

    run = federate(tmp_path, 3, strategy="consensus", consensus="ds-fl", rounds=1)

    expected = softmax(softmax(knowledge(run, 0), axis=-1).mean(axis=0) / 0.1, axis=-1)
    np.testing.assert_allclose(softmax(letter_of(run, 1), axis=-1), expected, atol=1e-5)


@pytest.mark.parametrize("name", ["fedmd", "ds-fl"])
def test_a_consensus_baseline_takes_turns_unless_it_is_given_a_weight(tmp_path, name):
    published = federate(tmp_path / "published", 3, strategy="consensus", consensus=name, rounds=1)
    mixed = federate(tmp_path / "mixed", 3, strategy="consensus", consensus=name, kd_weight=0.5, rounds=1)

    assert all(row["local_loss"] > 0 and row["kd_weight"] == 1 for row in published.rows()[3:])
    assert json.loads((published.folder / "config.json").read_text())["settings"]["schedule"] == "alternate"
    assert all(row["local_loss"] is None and row["kd_weight"] == 0.5 for row in mixed.rows()[3:])


def test_federated_averaging_and_its_control_know_no_schedule(tmp_path):
    settings = {"strategy": "fedavg", "fedavg_model": "mlp", "rounds": 2, "controls": "isolated"}
    one, other = (federate(tmp_path / name, 3, schedule=name, **settings) for name in ("mixed", "alternate"))

    assert one.timeless_rows() == other.timeless_rows()
    assert one.summary()["isolated_by_round"] == other.summary()["isolated_by_round"]


def test_fedavg_averages_weights_by_samples_and_measures_the_average(tmp_path):
    run = federate(tmp_path, 3, strategy="fedavg", fedavg_model="mlp", rounds=2)

    sent = [m.content["letter.0"] for m in run.grid.sent if m.content["mail"]["round"] == 1]
    came = [m.content for m in run.grid.replies if "knowledge" in m.content and m.content["answer"]["round"] == 0]
    samples = np.array([content["metrics"]["samples"] for content in came])
    for name, array in sent[0].items():
        weights = np.stack([content["knowledge"][name].numpy() for content in came])
        np.testing.assert_allclose(array.numpy(), np.average(weights, axis=0, weights=samples), atol=1e-6)
    last = [row["test_accuracy"] for row in run.rows() if row["round"] == 2]
    assert len(set(last)) == 1  # one model, measured by everyone
    assert all(row["bytes_up"] == 0 for row in run.rows() if row["round"] == 2)  # the last average is only measured


def test_a_codec_does_nothing_to_weights_and_the_run_says_so(tmp_path, capsys):
    settings = {"strategy": "fedavg", "fedavg_model": "mlp", "rounds": 1}
    plain = federate(tmp_path / "plain", 2, **settings)
    assert "`codec`" not in capsys.readouterr().out
    coded = federate(tmp_path / "coded", 2, codec="int8", **settings)

    assert "`codec` = 'int8' has no effect under strategy fedavg" in capsys.readouterr().out
    assert json.loads((coded.folder / "config.json").read_text())["settings"]["codec"] == "fp32"
    assert coded.timeless_rows() == plain.timeless_rows()


def test_a_distilled_start_that_there_is_no_knowledge_for_ends_the_run(tmp_path):
    grid = local_grid(tmp_path, 2)

    def spoil(partition, message):
        reply = grid.answer(partition, message)
        if message.content["mail"]["kind"] == "start":
            reply.content["knowledge"] = ArrayRecord({})
        return reply

    grid.fault = spoil
    fedavg = {"strategy": "fedavg", "fedavg_model": "mlp", "fedavg_start": "distilled", "merge_epochs": 1}

    with pytest.raises(RelayError, match="round 0: no knowledge that could be used came in time"):
        federate(tmp_path, 2, grid=grid, **fedavg)


def test_a_distilled_start_begins_fedavg_above_a_cold_one(tmp_path):
    settings = {"strategy": "fedavg", "fedavg_model": "mlp", "rounds": 2, "pretrain_epochs": 15, "proxy_size": 300}
    cold = federate(tmp_path / "cold", 3, **settings)
    distilled = federate(tmp_path / "distilled", 3, fedavg_start="distilled", **settings)

    def first_round(run):
        return next(row["test_accuracy"] for row in run.rows() if row["round"] == 1)

    assert first_round(distilled) > first_round(cold)


def test_a_pretrained_start_averages_in_round_1_what_every_peer_trained_before_it(tmp_path):
    settings = {"strategy": "fedavg", "fedavg_model": "mlp", "rounds": 1, "controls": "isolated"}
    started = {"fedavg_start": "pretrained", "pretrain_epochs": 3}
    run = federate(tmp_path / "run", 2, **settings, **started)
    # A cold start trains the same architecture, for `local-epochs`, before it sends its first weights.
    cold = federate(tmp_path / "cold", 2, **settings, fedavg_start="cold", local_epochs=3)

    def accuracies(run, round):
        return [row["test_accuracy"] for row in run.rows() if row["round"] == round]

    assert accuracies(run, 1) == accuracies(cold, 1)
    before, alone = run.summary()["mean"]["before"], run.summary()["isolated_by_round"]
    assert len(set(accuracies(cold, 0))) == 1  # all measure the common initialisation
    assert min(accuracies(run, 0)) > accuracies(cold, 0)[0] and alone[0] == pytest.approx(before)


def test_a_pretrained_start_never_takes_the_peers_own_model_for_the_common_one(tmp_path):
    settings = {"strategy": "fedavg", "fedavg_model": "mlp", "fedavg_start": "pretrained", "models": "mlp", "rounds": 1}
    _kept.clear()
    alone = federate(tmp_path / "alone", 2, **settings)
    _kept.clear()
    federate(tmp_path / "own", 2, models="mlp", rounds=1)

    assert federate(tmp_path / "after", 2, **settings).timeless_rows() == alone.timeless_rows()


def test_controls_of_a_server_free_run_do_not_count_as_bytes(tmp_path):
    plain = federate(tmp_path / "plain", 3)
    controlled = federate(tmp_path / "controlled", 3, controls="isolated,pooled")

    assert plain.summary()["totals"]["bytes_up"] == controlled.summary()["totals"]["bytes_up"]


@pytest.mark.parametrize("regime", ["vanilla", "tuned", "dml", "partitioned"])
@pytest.mark.parametrize("schedule", ["alternate", "mixed"])
def test_every_regime_learns(tmp_path, regime, schedule):
    by_weight = {"tune_weights": "0.3,0.9" if schedule == "mixed" else "1"}
    run = federate(
        tmp_path, 3, regime=regime, schedule=schedule, rounds=3, proxy_size=300, pretrain_epochs=5,
        partition="dirichlet", tune_temperatures="1,4", distill_epochs=4, learning_rate=0.003, **by_weight,
    )  # fmt: skip

    mean = run.summary()["mean"]
    assert mean["after"] > mean["before"]
    if regime == "tuned":
        assert all(
            row["temperature"] in (1, 4) and row["kd_weight"] in (0.3, 0.9, 1) for row in run.rows() if row["round"]
        )
        assert len({row["temperature"] for row in run.rows() if row["peer"] == "peer-0" and row["round"]}) == 1


def test_matched_gradients_give_every_divergence_the_first_step_of_kl(tmp_path):
    """With plain gradient descent and one full batch, the first step is as long as KL's, whatever the divergence."""
    student, teachers = torch.randn(64, 10), torch.randn(3, 64, 10)
    weights = torch.ones(3)
    norms = {}
    for name in ("kl", "js", "td", "sed", "jeffreys"):
        plain = Distillation.from_config(RunConfig(divergence=name))
        loss = plain.times(plain.matched(student, teachers, weights))
        z = student.clone().requires_grad_()
        (loss.scale * loss(z, loss.prepare(teachers, weights))).backward()
        norms[name] = float(z.grad.norm())

    assert all(norm == pytest.approx(norms["kl"], rel=1e-4) for norm in norms.values())


def test_matching_gradients_changes_what_peers_learn_and_not_how_their_loss_is_reported(tmp_path):
    settings = {"optimizer": "sgd", "learning_rate": 0.05, "divergence": "js"}
    matched = federate(tmp_path / "matched", 3, match_gradients=True, **settings).rows()
    plain = federate(tmp_path / "plain", 3, **settings).rows()

    assert [row["test_loss"] for row in matched[:3]] == [row["test_loss"] for row in plain[:3]]
    assert all(a["test_loss"] != b["test_loss"] for a, b in zip(matched[3:], plain[3:], strict=True))
    first = [(a["kd_loss"], b["kd_loss"]) for a, b in zip(matched[3:6], plain[3:6], strict=True)]
    assert all(a < b < 1.1 * a for a, b in first)  # one epoch further on, in the same unit


def test_only_the_subset_of_the_round_travels(tmp_path):
    run = federate(tmp_path, 3, proxy_per_round=20)

    assert knowledge(run, 0).shape == (3, 20, 10)
    assert not np.array_equal(knowledge(run, 0), knowledge(run, 1))


@pytest.mark.parametrize(("codec", "share"), [("fp16", 0.5), ("int8", 0.5), ("topk:2", 0.35), ("fp16+zstd", 0.6)])
def test_codecs_save_the_bytes_they_promise_and_still_teach(tmp_path, codec, share):
    plain = federate(tmp_path / "plain", 3, proxy_size=300)
    small = federate(tmp_path / "small", 3, proxy_size=300, codec=codec)

    assert small.summary()["totals"]["bytes_up"] < (share + 0.1) * plain.summary()["totals"]["bytes_up"]
    assert small.summary()["mean"]["after"] == pytest.approx(plain.summary()["mean"]["after"], abs=0.06)


@pytest.mark.parametrize(
    "divergence", ["ce", "kl", "reverse_kl", "jeffreys", "js", "td", "sed", "msed", "bdkd", "cakd", "dkd"]
)
def test_every_divergence_teaches(tmp_path, divergence):
    run = federate(
        tmp_path, 3, divergence=divergence, partition="dirichlet", proxy_size=300, pretrain_epochs=5,
        distill_epochs=4, rounds=3, learning_rate=0.003,
        cakd_beta=1.0,  # the published 8 multiplies what skewed teachers get wrong
    )  # fmt: skip

    mean = run.summary()["mean"]
    assert mean["after"] > mean["before"]


def test_options_of_a_divergence_change_what_is_learned(tmp_path):
    one = federate(tmp_path / "a", 2, divergence="bdkd", bdkd_delta=1.0)
    other = federate(tmp_path / "b", 2, divergence="bdkd", bdkd_delta=3.0)

    assert one.timeless_rows()[:2] == other.timeless_rows()[:2]
    assert one.timeless_rows()[2:] != other.timeless_rows()[2:]


@pytest.mark.parametrize("auxiliary", [False, True])
@pytest.mark.slow
def test_information_flow_sends_projected_features_beside_the_logits(tmp_path, auxiliary):
    run = federate(
        tmp_path, 3, method="infoflow", flow_dimensions=8, flow_auxiliary=auxiliary, proxy_size=200, pretrain_epochs=5
    )

    sent = run.grid.replies[-1].content["knowledge"]
    assert {name: array.numpy().shape for name, array in sent.items() if name.startswith("flow.")} == {
        f"flow.{i}": (200, 8) for i in range(3)
    }
    assert run.summary()["mean"]["after"] > run.summary()["mean"]["before"]
    assert run.timeless_rows() == federate(
        tmp_path / "again", 3, method="infoflow", flow_dimensions=8, flow_auxiliary=auxiliary, proxy_size=200,
        pretrain_epochs=5,
    ).timeless_rows()  # fmt: skip


def test_a_warm_up_lets_the_first_rounds_distil_less(tmp_path):
    # Under `js` a step of this length goes down the slope; under `kl` a whole one goes past the bottom.
    settings = {
        "optimizer": "sgd", "learning_rate": 0.05, "schedule": "alternate", "local_epochs": 0, "rounds": 1,
        "divergence": "js",
    }  # fmt: skip
    warm = federate(tmp_path / "warm", 2, kd_warm_up=100, **settings).rows()
    plain = federate(tmp_path / "plain", 2, **settings).rows()

    for before, slow, fast in zip(plain[:2], warm[2:], plain[2:], strict=True):
        moved = [abs(row["test_loss"] - before["test_loss"]) for row in (slow, fast)]
        assert 0 < moved[0] < 0.2 * moved[1]


def test_the_isolated_control_of_a_joint_schedule_sees_the_same_private_batches(tmp_path):
    """With teachers that weigh next to nothing, a peer is its own control."""
    run = federate(
        tmp_path, 3, schedule="mixed", kd_weight=1e-9, optimizer="sgd", learning_rate=0.05, controls="isolated",
        rounds=3, models="mlp",
    )  # fmt: skip

    for peer in run.summary()["peers"]:
        assert peer["after"] == pytest.approx(peer["isolated"], abs=0.003) and peer["after"] > peer["before"]


def test_the_isolated_control_takes_part_in_the_rounds_in_which_its_peer_did(tmp_path):
    run = federate(
        tmp_path, 3, participation=0.34, rounds=6, controls="isolated", schedule="alternate", distill_epochs=0
    )

    for peer in run.summary()["peers"]:
        assert peer["after"] == peer["isolated"]


def test_an_earlier_try_in_the_same_folder_leaves_nothing_behind(tmp_path):
    grid = local_grid(tmp_path, 2)

    def broken(partition, message):
        raise RuntimeError("power cut")

    grid.fault = broken
    with pytest.raises(RelayError):
        federate(tmp_path, 2, grid=grid, seed=1)
    for name in ("error.txt", "profile.jsonl", "peers/peer-9/state"):
        (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / name).touch()

    federate(tmp_path, 2)

    left = {str(path.relative_to(tmp_path / "run")) for path in (tmp_path / "run").rglob("*")}
    assert "summary.json" in left and not any(name.startswith(("error", "profile", "peers")) for name in left)


def test_ones_own_divergence_works_by_name(tmp_path, monkeypatch):
    (tmp_path / "my_losses.py").write_text(
        "import torch\n"
        "def hellinger(student_logits, teacher_logits, *, temperature=1.0):\n"
        "    q = torch.softmax(student_logits / temperature, -1)\n"
        "    p = torch.softmax(teacher_logits.detach() / temperature, -1)\n"
        "    return 1 - (p * q).clamp_min(1e-12).sqrt().sum(-1)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))

    rows = federate(tmp_path, 3, divergence="my_losses:hellinger").rows()

    assert all(0 < row["kd_loss"] < 1 for row in rows if row["round"])
    with pytest.raises(RelayError, match=r"`divergence`.*my_losses:missing"):
        federate(tmp_path / "b", 3, divergence="my_losses:missing")


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        ("def loss(student, teacher):\n    return (student - teacher).sum(-1)", "TypeError.*temperature"),
        ("def loss(student, teacher, *, temperature):\n    return (student - teacher).sum()", r"it returned \[\]"),
        (
            "def loss(student, teacher, *, temperature):\n    return (student - teacher).detach().sum(-1)",
            "differentiable",
        ),
        ("def loss(student, teacher, *, temperature):\n    raise SystemExit(3)", "SystemExit: 3"),
    ],
)
def test_what_ones_own_divergence_cannot_do_is_said_before_training(body, complaint, tmp_path, monkeypatch):
    (tmp_path / "odd_losses.py").write_text(body)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "odd_losses", raising=False)
    grid = local_grid(tmp_path, 2)

    with pytest.raises(RelayError, match=f"`divergence`.*{complaint}"):
        federate(tmp_path, 2, grid=grid, divergence="odd_losses:loss")

    assert {message.content["mail"]["kind"] for message in grid.sent} == {"introduce"}
