"""What a server may ask of a deployed peer: every quantity that costs something has a bound of the peer's."""

from dataclasses import fields, replace
from typing import get_args

import numpy as np
import pytest
from federation import SMALL, federate
from sites import make_sites

from clients.answering import answer
from clients.bounds import Bounds
from clients.configuration import PeerConfig
from clients.limits import Limits
from clients.own_settings import _KEYS as OWN_KEYS
from clients.own_settings import own_settings
from clients.peer import Peer
from fedkd.errors import SettingError
from fedkd.settings.config import RunConfig
from fedkd.settings.declare import COSTS, FREE, key, of
from fedkd.settings.effect import idle
from fedkd.wire.messages import Kind, Letter, Mail, pack_mail, unpack_answer

ALL = {key(spec.name): spec for spec in fields(RunConfig)}
COSTLY = {name: of(spec).costs for name, spec in ALL.items() if of(spec).costs not in ("", FREE)}
WHERE = {
    "merge-epochs": {"strategy": "fedavg", "fedavg-start": "distilled"},
    "local-epochs": {"schedule": "alternate"},
    "tune-temperatures": {"regime": "tuned"},
    "tune-weights": {"regime": "tuned"},
    "flow-layers": {"method": "infoflow"},
    "flow-depth": {"method": "infoflow"},
    "flow-dimensions": {"method": "infoflow"},
    "flow-auxiliary-epochs": {"method": "infoflow", "flow-auxiliary": True},
    "proxy-per-round": {"proxy-size": 2**62},
}
"""Beside what a setting does something at all."""

OWN = {"name": "north", "model": "mlp", "dataset": "npz:nowhere.npz", "proxy": "npz:nowhere.npz"}


def asked(root, mail, open_peer, **own):
    place = PeerConfig.of_own(own_settings({**OWN, **own}), name="north", root=root, simulated=False)
    return unpack_answer(answer(pack_mail(mail), place, open_peer))


def never(place, config, run):
    raise AssertionError("a peer was opened")


def absurd(name):
    """Return the most that a setting's own rule accepts."""
    spec = ALL[name]
    if isinstance(spec.default, str):
        return ",".join(["1"] * 4000)
    return next(value for value in (2**62, 10**9, 4096, 64) if of(spec).rule.accepts(value))


def is_number(spec):
    return isinstance(spec.default, int | float) and not isinstance(spec.default, bool)


@pytest.mark.parametrize("name", [name for name, spec in ALL.items() if is_number(spec)])
def test_every_number_says_what_it_costs_a_peer_or_that_it_is_free(name):
    assert of(ALL[name]).costs in (FREE, *COSTS)


def test_every_cost_is_bounded_by_a_setting_of_the_peers():
    assert set(COSTLY.values()) == set(COSTS) <= OWN_KEYS.keys()


@pytest.mark.parametrize("name", COSTLY)
def test_what_costs_too_much_is_refused_before_anything_is_opened(tmp_path, name):
    """By the introduction for what any mail of the run would ask for, and by every mail for what none may ask for."""
    settings, limit = {**RunConfig().to_mapping(), **WHERE.get(name, {}), name: absurd(name)}, COSTLY[name]
    assert name not in idle(RunConfig.from_mapping(settings))
    kinds = [kind for kind in get_args(Kind) if limit != "max-epochs" or kind == "introduce"]

    said = {
        kind: asked(tmp_path, Mail(kind, 0, settings, "run"), never, **{"allowed-strategies": "averaged,fedavg"}).error
        for kind in kinds
    }

    most = Limits().epochs if limit == "max-epochs" else getattr(Bounds(), limit.replace("-", "_"))
    assert f"(this peer's `{limit}`" in said["introduce"] and f"at most {most} " in said["introduce"]
    assert all(error.startswith("Expected ") and "\n" not in error for error in said.values())


@pytest.mark.parametrize(("most", "batch", "refused"), [(16, 32, True), (32, 32, False), (5000, 5000, False)])
def test_a_limit_is_the_peers_own_and_told_with_its_value(tmp_path, most, batch, refused):
    site = make_sites(tmp_path / "sites", peers=2)[0]
    settings = {**RunConfig().to_mapping(), **SMALL, "batch-size": batch}

    said = asked(tmp_path, Mail("introduce", 0, settings, "run"), Peer, **{**site, "max-batch-size": most})

    complaint = f"Expected setting `batch-size` to be at most {most} (this peer's `max-batch-size`), but got {batch}."
    assert said.error == (complaint if refused else "")


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        (
            {"letters": (Letter("x", 0, {}),) * 1001},
            "at most 1000 letters in a mail (this peer's `max-peers`), got 1001",
        ),
        ({"keys": {f"peer-{i}": "" for i in range(1001)}}, "at most 1000 keys in a mail"),
        ({"round": 2**62}, "at most 10000 rounds in a mail"),
        ({"run": "x" * 10_001}, "at most 10000 characters of one text in a mail (this peer's `max-text`), got 10001"),
        ({"state_dir": "x" * 10_001}, "characters of one text"),
        ({"keys": {"peer-0": "x" * 10_001}}, "characters of one text"),
        ({"letters": (Letter("x" * 10_001, 0, {}),)}, "characters of one text"),
    ],
)
def test_a_mail_of_too_much_is_refused_before_anything_is_opened(tmp_path, changed, complaint):
    mail = replace(Mail("learn", 1, RunConfig().to_mapping(), "run"), **changed)

    assert complaint in asked(tmp_path, mail, never).error


@pytest.mark.parametrize("name", [name for name, spec in ALL.items() if isinstance(spec.default, str)])
def test_no_text_of_a_run_is_read_that_is_too_long(tmp_path, name):
    settings = {**RunConfig().to_mapping(), name: ",".join(["1"] * 10**6)}

    said = asked(tmp_path, Mail("introduce", 0, settings, "run"), never)

    assert "characters of one text in a mail (this peer's `max-text`)" in said.error and len(said.error) < 300


PLAIN = {"weighing": "uniform", "robust": "none"}


def test_letters_that_are_weighed_by_place_take_as_much_again_twice(tmp_path):
    site = make_sites(tmp_path / "sites", peers=2)[0]
    letter = Letter("south", 0, {"logits": np.zeros((60, 10), np.float32)})
    decoded = 60 * 10 * 4

    def refused(most, **settings):
        own = {**site, "max-memory": most}
        config = {**RunConfig().to_mapping(), **SMALL, "pretrain-epochs": 0, **settings}
        assert not asked(tmp_path, Mail("start", 0, config, "run"), Peer, **own).error
        return asked(tmp_path, Mail("learn", 1, config, "run", (letter,)), Peer, **own).error

    assert "max-memory" in refused(3 * decoded - 1) and not refused(3 * decoded)
    assert "max-memory" in refused(decoded - 1, **PLAIN) and not refused(decoded, **PLAIN)


def test_letters_that_grow_when_they_are_decoded_are_refused_before_that(tmp_path):
    """`topk:1` sends two numbers for each sample and becomes ten."""
    site = make_sites(tmp_path / "sites", peers=2)[0]
    settings = {**RunConfig().to_mapping(), **SMALL, "pretrain-epochs": 0, "codec": "topk:1", **PLAIN}
    own = {**site, "max-memory": 3 * 60 * 10 * 4 - 1}
    letter = Letter("south", 0, {"values": np.zeros((60, 1), np.float16), "indices": np.zeros((60, 1), np.uint8)})

    assert not asked(tmp_path, Mail("start", 0, settings, "run"), Peer, **own).error
    two, three = (asked(tmp_path, Mail("learn", 1, settings, "run", (letter,) * k), Peer, **own) for k in (2, 3))

    assert not two.error
    assert "at most 7199 bytes of decoded letters in a mail (this peer's `max-memory`), got 7200" in three.error


def test_simulated_peers_are_one_users_and_unbounded(tmp_path):
    assert federate(tmp_path, 2, rounds=1, batch_size=10**6, max_staleness=10**6).summary()["peers"]


def test_a_server_that_starts_a_run_again_and_again_does_not_fill_the_disk_with_models(tmp_path):
    """They are their owner's, so that none of them is removed: what is too much is refused."""
    site = {**make_sites(tmp_path / "sites", peers=2)[0], "max-models": 2}
    settings = {**RunConfig().to_mapping(), **SMALL, "models": "mlp", "pretrain-epochs": 0, "rounds": 1}

    def ask(kind, run="run"):
        return asked(tmp_path, Mail(kind, int(kind == "learn"), settings, run), Peer, **site).error

    def kept():
        return {path.name: path.read_bytes() for path in tmp_path.glob("*/models/*.safetensors")}

    assert [ask(kind) for kind in ("start", "learn", "start", "learn")] == [""] * 4
    before = kept()
    assert len(before) == 2
    for kind, run in (("start", "run"), ("start", "other"), ("introduce", "other")):
        assert "at most 2 models (its `max-models`)" in ask(kind, run) and str(tmp_path) not in ask(kind, run)
    assert ask("introduce") == "" == ask("learn") and kept().keys() == before.keys()
    next(iter(tmp_path.glob("*/models/*.1.safetensors"))).unlink()
    assert ask("introduce", "other") == "" == ask("start", "other")


def test_the_setting_that_asks_for_most_epochs_is_named():
    turns = RunConfig(schedule="alternate", distill_epochs=0, local_epochs=0)

    with pytest.raises(SettingError, match=r"`tune-temperatures × tune-weights`.*got 3"):
        Limits(epochs=2).check(replace(turns, regime="tuned", tune_temperatures="1,2,3", tune_weights="0.5"), "learn")
    with pytest.raises(SettingError, match=r"`local-epochs`.*got 30"):
        Limits(epochs=20).check(replace(turns, local_epochs=30), "learn")


def test_what_does_nothing_beside_the_others_costs_no_epochs():
    idle = RunConfig(strategy="fedavg", local_epochs=190, flow_auxiliary=True, regime="tuned")

    Limits(epochs=190, strategies=("fedavg",)).check(idle, "learn")
