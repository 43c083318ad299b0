"""A control does what its peer did, exactly: the same private batches, as many and in the same order."""

import dataclasses
import math

import pytest
from federation import federate, local_grid
from flwr.app import Array, ArrayRecord
from hypothesis import Phase, example, given, reject, settings
from hypothesis import strategies as st
from local_grid import LocalGrid
from witness import Clock, Witness

from experiments.analysis.settings import control_group
from fedkd.errors import SettingError
from fedkd.settings.config import RunConfig
from strategies.relay.rounds import RelayError

PEERS = 3
SHORT = {"rounds": 2, "local_epochs": 1}
SMALL = {"models": "mlp", "pretrain_epochs": 1, "proxy_size": 64, "round_timeout": 8.0, "batch_size": 64}


class Killed(BaseException):
    """Not an Exception: nothing catches it, as nothing catches SIGKILL."""


def spoiled(reply):
    knowledge = reply.content.get("knowledge", {})
    reply.content["knowledge"] = ArrayRecord(
        {name: Array(array.numpy() * math.nan) for name, array in knowledge.items()}
    )
    return reply


class Fate:
    """What becomes of every mail of a round: drawn by hypothesis for (peer, round).

    ``late n``: the answer comes with the n-th message after it. ``refused``: the peer trains, the relay cannot use what
    it says. ``unheard``: it trains, and Flower reports an error. ``errs``: it never gets to work.
    """

    def __init__(self, grid, witness, fates, *, killed_at=None):
        self.grid, self.witness, self.fates, self.killed_at = grid, witness, fates, killed_at
        self.held, self.messages = [], 0
        grid.fault = self

    def __call__(self, partition, message):
        self.messages += 1
        if self.messages == self.killed_at:
            raise Killed
        for entry in list(self.held):
            entry[0] -= 1
            if entry[0] <= 0:
                self.held.remove(entry)
                self.grid.deliver(*entry[1:])
        mail = message.content["mail"]
        fate = self.fates.get((partition, mail["round"]), "ok") if mail["kind"] in ("start", "learn") else "ok"
        if fate == "errs":
            raise RuntimeError("not now")
        reply = self.witness.answer(self.grid, partition, message)
        if fate == "unheard":
            raise RuntimeError("lost on the way")
        if fate.startswith("late"):
            self.held.append([int(fate[-1]), message, reply])
            return self.grid.nothing
        return spoiled(reply) if fate == "refused" else reply


FATES = st.dictionaries(
    st.tuples(st.integers(0, PEERS - 1), st.integers(0, 5)),
    st.sampled_from(["errs", "refused", "unheard", "late 1", "late 3", "late 6"]),
    max_size=8,
)
WAYS = st.sampled_from(
    [
        {},
        {"schedule": "alternate", "local_epochs": 2},
        {"participation": 0.5},
        {"regime": "dml", "eval_every": 2},
        {"logit_adjustment": 1.0, "vacant_classes": 0.5},
        {"augment": "crop-flip", "label_smoothing": 0.1, "augment_proxy": "crop-flip"},
        {"proxy_per_round": 32},
        {"regime": "tuned", "tune_temperatures": "1", "tune_weights": "0.5,1"},
        {"strategy": "gossip", "mode": "async", "updates": 14, "rounds": 2},
        {"strategy": "fedavg", "fedavg_model": "mlp"},
        {"strategy": "fedavg", "fedavg_model": "mlp", "fedavg_start": "distilled", "merge_epochs": 1},
    ]
)


def run(tmp_path_factory, witness, fates, *, killed_at=None, **settings):
    path = tmp_path_factory.mktemp("run")
    grid = local_grid(path, PEERS)
    given_ = {**SMALL, "rounds": 4, "controls": "isolated,channel", **settings}
    fate = Fate(grid, witness, fates, killed_at=killed_at)
    try:
        return federate(path, PEERS, grid=grid, **given_), fate
    except Killed:
        fate.killed_at = None
        fate.held.clear()
        grid.forget()
        if not (path / "run" / "relay.safetensors").exists():
            return federate(path, PEERS, grid=grid, **given_), fate
        return federate(path, PEERS, grid=grid, resume=str(path / "run"), **given_), fate


@settings(max_examples=12, phases=[Phase.explicit, Phase.generate])
@given(FATES, WAYS, st.one_of(st.none(), st.integers(4, 24)))
@example({}, {"strategy": "gossip", "mode": "async", "updates": 14, "rounds": 2}, None)
@example({(1, 1): "late 6", (1, 4): "late 3"}, {}, None)
@example({(1, 0): "errs", (2, 2): "late 3"}, {"strategy": "fedavg", "fedavg_model": "mlp"}, None)
@example({(0, 2): "unheard", (2, 1): "refused"}, {"schedule": "alternate"}, 10)
@example({}, {"participation": 0.5}, 9)
@example({(0, 2): "late 3", (1, 3): "errs"}, {"augment": "crop-flip", "augment_proxy": "crop-flip"}, 9)
@example(
    {(2, 0): "refused", (2, 2): "refused", (2, 3): "refused", (2, 4): "unheard", (0, 1): "unheard"},
    {"participation": 0.5},
    6,
)
@example(
    {(0, 0): "refused", (1, 0): "errs"},  # these two start late: the common model was made of the third's knowledge
    {"strategy": "fedavg", "fedavg_model": "mlp", "fedavg_start": "distilled", "merge_epochs": 1},
    None,
)
@example({(1, 0): "errs"}, {"regime": "tuned", "tune_temperatures": "1", "tune_weights": "1"}, None)
def test_a_control_sees_the_private_batches_that_its_peer_saw_under_any_schedule(
    tmp_path_factory, fates, way, killed_at
):
    if way.get("mode") == "async" or way.get("strategy") == "fedavg":
        killed_at = None  # not resumed
    with pytest.MonkeyPatch.context() as monkeypatch:
        Clock(monkeypatch)
        witness = Witness(monkeypatch)
        try:
            finished, fate = run(tmp_path_factory, witness, fates, killed_at=killed_at, **way)
        except RelayError:  # nobody answered in a round
            reject()

        taught = way.get("strategy") != "fedavg"
        late = {peer for (peer, _), what in fates.items() if what.startswith("late")}
        working = {int(message.metadata.dst_node_id - 1000) // 7 for _, message, _ in fate.held}
        # One whose every word was refused has never started, though what it measured is known.
        unheard = {peer for peer in range(PEERS) if f"peer-{peer}" not in {
            row["peer"] for row in finished.rows() if row["status"] in ("ok", "late")
        }}  # fmt: skip
        for peer, entry in enumerate(finished.summary()["peers"]):
            missing = peer in working | unheard or entry["after"] is None
            if missing or peer not in late:  # who was late may have answered between the two controls
                assert (entry["isolated"] is None) == missing
            assert (entry["channel"] is None) == (missing or not taught)
        witness.check()
        assert set(witness.alone) >= set(range(PEERS)) - working - late - unheard
        assert set(witness.shown) >= (set(range(PEERS)) - working - unheard if taught else set())


def others(field):
    """Return values of a setting beside its default."""
    special = {
        "partition": ["iid"], "normalize": ["none"], "optimizer": ["sgd"],
        "strategy": ["pairwise", "gossip", "consensus"],
        "topology": ["ring"], "matching": ["round-robin"], "gossip_style": ["push"], "mode": ["async"],
        "consensus": ["ds-fl"], "fedavg_start": ["distilled"], "divergence": ["js"], "combine": ["pairwise"],
        "average": ["logits"], "reduction": ["sum"], "robust": ["median"], "regime": ["tuned", "dml", "partitioned"],
        "cakd_mode": ["scaled"], "cakd_strong": ["label"], "bdkd_rule": ["none"], "method": ["infoflow"],
        "schedule": ["alternate"], "attack": ["flip"], "codec": ["fp16"], "evaluate_on": ["validation"],
        "tune_weights": ["0.5"], "tune_temperatures": ["2"], "models": ["cnn-small"], "pooled_model": ["mlp"],
        "fedavg_model": ["mlp"], "kd_weight": [0.1, 0.9], "participation": [0.5], "threads": [1],
        "augment": ["crop-flip"], "augment_proxy": ["crop-flip"], "learning_rate_schedule": ["cosine", "step"],
        "learning_rate_over": ["run"], "privacy_epsilon": [100.0], "flow_layers": [""], "controls": ["isolated,pooled"],
    }  # fmt: skip
    skipped = {
        "dataset",
        "proxy",
        "data_dir",
        "checkpoints",
        "device",
        "out_dir",
        "resume",
        "trials",
        "run_name",
        "peers",
    }
    if field.name in skipped | {"download", "compiled", "fast"}:  # other data, files or kernels
        return []
    if field.name in special:
        return special[field.name]
    kind = type(field.default)
    if kind is str:  # names something that there is one of
        return []
    return [not field.default] if kind is bool else [field.default + 1] if kind is int else [field.default * 0.9 + 0.1]


BASES = [
    {},
    {"schedule": "alternate"},
    {"strategy": "gossip", "topology": "ring", "participation": 0.7},
    {"regime": "tuned", "tune_weights": "0.3,0.7", "tune_temperatures": "1"},
    {"strategy": "fedavg", "fedavg_model": "mlp"},
]


@pytest.mark.slow
@pytest.mark.parametrize("base", BASES)
def test_trials_share_a_control_only_where_it_does_the_same(tmp_path_factory, base):
    """Every setting is changed alone: where the control is said to be the same, its private batches and numbers are."""

    def control(name, **changed):
        with pytest.MonkeyPatch.context() as monkeypatch:
            witness = Witness(monkeypatch)
            finished, _ = run(tmp_path_factory, witness, {}, controls=name, **SHORT, **base, **changed)
        said = "isolated_measures" if name == "isolated" else name
        return witness.alone, witness.shown, [peer[said] for peer in finished.summary()["peers"]]

    def group(name, **changed):
        named = {name.replace("_", "-"): value for name, value in {**SMALL, **SHORT, **base, **changed}.items()}
        config = RunConfig.from_mapping(named)
        return control_group({**config.effective().to_mapping(), "peers": PEERS}, name)

    names = ("isolated",) if base.get("strategy") == "fedavg" else ("isolated", "channel")
    plain, tried = {name: control(name) for name in names}, dict.fromkeys(names, 0)
    for field in dataclasses.fields(RunConfig):
        for value in others(field) if field.name not in base and field.name not in {**SMALL, **SHORT} else ():
            for name in names if field.name != "controls" else ():
                try:
                    shared = group(name, **{field.name: value}) == group(name)
                except SettingError:
                    continue
                if shared:
                    tried[name] += 1
                    assert control(name, **{field.name: value}) == plain[name], (name, field.name, value)
    assert tried["isolated"] > 10


@pytest.mark.parametrize(
    "changed",
    [
        {"strategy": "gossip", "mode": "async"},
        {"participation": 0.5},
        {"round_timeout": 5.0},
        {"regime": "tuned"},  # a weight of 1 leaves nothing to the labels
        {"strategy": "fedavg"},  # trains in round 0, and not in the last
    ],
)
def test_a_trial_whose_peers_train_in_other_rounds_shares_no_control(changed):
    one, other = (RunConfig(**changed, divergence=divergence).to_mapping() for divergence in ("kl", "js"))

    assert control_group(one, "isolated") != control_group(RunConfig().to_mapping(), "isolated")
    timed = "mode" in changed or "regime" in changed
    assert (control_group(one, "isolated") != control_group(other, "isolated")) == timed


def test_both_numbers_of_private_samples_stand_beside_the_pooled_control(tmp_path_factory, monkeypatch, capsys):
    witness = Witness(monkeypatch)
    finished, _ = run(tmp_path_factory, witness, {}, controls="pooled", pooled_model="mlp", schedule="alternate")

    said = finished.summary()
    drawn = sum(len(labels) for states in witness.states.values() for _, labels in states[max(states)])
    start = sum(peer["samples"] for peer in said["peers"])  # one epoch each
    assert said["samples_seen"] == start + drawn == sum(row["samples_seen"] for row in finished.rows()[-PEERS:])
    assert said["pooled_samples_seen"] == start * (1 + 4)
    assert f"{said['pooled_samples_seen']:,.0f}" in capsys.readouterr().out


def test_an_isolated_control_measures_what_its_peer_does_at_the_same_time(tmp_path_factory, monkeypatch):
    """A peer that hears nothing of its teachers is its own control, measure by measure, when it was last measured."""
    Clock(monkeypatch)
    fates = {(0, 3): "unheard", (0, 4): "unheard", (1, 4): "late 9"}
    finished, _ = run(tmp_path_factory, Witness(monkeypatch), fates, schedule="alternate", distill_epochs=0)

    for peer in finished.summary()["peers"][::2]:
        own = [row for row in finished.rows() if row["peer"] == peer["peer"] and row["test_accuracy"] is not None]
        assert peer["isolated_measures"] == {name: own[-1][name] for name in peer["isolated_measures"]}
        assert peer["isolated"] == peer["channel"] == peer["after"] == own[-1]["test_accuracy"]
    assert finished.summary()["peers"][1]["isolated"] is None


@pytest.mark.parametrize("late", ["late 2", "late 4"])
def test_a_late_answers_measurements_stand_in_the_row_of_their_round(tmp_path_factory, monkeypatch, late):
    Clock(monkeypatch)
    prompt, _ = run(tmp_path_factory, Witness(monkeypatch), {}, schedule="alternate", distill_epochs=0)
    fates = {(1, round): late for round in range(1, 5)}
    finished, _ = run(tmp_path_factory, Witness(monkeypatch), fates, schedule="alternate", distill_epochs=0)

    rows = {(row["round"], row["peer"]): row for row in finished.rows()}
    assert len(rows) == len(finished.rows()) == 5 * PEERS
    own = [rows[round, "peer-1"] for round in range(1, 5)]
    assert {row["status"] for row in own} == {"late"}
    assert own[0]["samples_seen"] > rows[0, "peer-1"]["samples_seen"] and own[0]["ece"] is not None
    first = next(row for row in prompt.rows() if row["peer"] == "peer-1" and row["round"] == 1)
    assert own[0]["test_accuracy"] == first["test_accuracy"]
    measured = [row["test_accuracy"] for row in own if row["test_accuracy"] is not None]
    summary = finished.summary()["peers"][1]
    assert summary["after"] == measured[-1] and summary["failures"] == {"late": 4}


@pytest.mark.parametrize("slow", [1.0, 5.0, 7.0])
def test_a_control_has_as_much_time_as_the_rounds_it_does_again(tmp_path, monkeypatch, slow):
    """Eight rounds of at most 8 seconds each; the control takes as many rounds' time, of these seconds, as is said."""
    clock, due = Clock(monkeypatch), []
    monkeypatch.delattr(LocalGrid, "state")  # as between real sites, where messages have a time to live
    grid = local_grid(tmp_path, 2)
    pull = grid.pull_messages

    def later(partition, message):
        if message.content["mail"]["kind"] != "isolated":
            return None
        due.append((clock.now + slow * SMALL["round_timeout"], message, grid.answer(partition, message)))
        return grid.nothing

    def pulled(ids):
        for at, message, reply in due:
            if clock.now >= at:
                grid.deliver(message, reply)
        due[:] = [entry for entry in due if clock.now < entry[0]]
        return pull(ids)

    grid.fault, grid.pull_messages = later, pulled
    finished = federate(tmp_path, 2, grid=grid, seats=2, **{**SMALL, "rounds": 8, "controls": "isolated"})

    assert all(peer["isolated"] is not None for peer in finished.summary()["peers"])
    lives = {message.content["mail"]["kind"]: message.metadata.ttl for message in grid.sent}
    assert lives["isolated"] == 8 * lives["learn"]
