"""A deployed peer's own budget: what it releases, how often, and what of that is kept."""

import json
import stat
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

import clients.releases
from clients.configuration import PeerConfig
from clients.own_settings import own_settings
from clients.releases import BudgetError, Private, withhold
from fedkd.errors import SettingError
from fedkd.settings.config import RunConfig
from fedkd.wire.codecs import BadKnowledge


def private(tmp_path, run="a", **given):
    """Return the privacy of a deployed peer; its own settings with hyphens, the run's with underscores."""
    own = {name: value for name, value in given.items() if "-" in name}
    settings = {name: value for name, value in given.items() if "-" not in name}
    made = {"name": "north", "max-epsilon": 3.0, **own}
    place = PeerConfig.of_own(own_settings(made), name="north", root=tmp_path, simulated=False)
    return Private.of(RunConfig(**{"privacy_epsilon": 3.0, "rounds": 1, **settings}), place, run)


LOGITS = np.zeros((5, 3), np.float32)


def test_a_server_that_asks_once_more_gets_the_same_again_and_another_run_is_charged(tmp_path):
    peer = private(tmp_path)

    first, again = peer.publish(LOGITS, round=0), private(tmp_path).publish(LOGITS + 1, round=0)
    after_one = peer.epsilon
    second = private(tmp_path, run="b").publish(LOGITS, round=0)

    assert first.tobytes() == again.tobytes()
    assert not (first == second).any()
    spent_by = private(tmp_path, run="b")
    spent_by.publish(LOGITS, round=0)
    assert after_one < spent_by.epsilon == pytest.approx(3.0)
    with pytest.raises(BudgetError, match=r"the budget is spent: .*ε 3 at δ 1e-05 .*`max-epsilon`.*privacy.json"):
        private(tmp_path).publish(LOGITS, round=1)


@pytest.mark.parametrize("round", [-1, 2, 10**9])
@pytest.mark.parametrize("simulated", [False, True])
def test_no_release_is_made_that_the_promise_does_not_count(tmp_path, round, simulated):
    peer = private(tmp_path)
    peer._peer_config = replace(peer._peer_config, simulated=simulated)
    with pytest.raises(BudgetError, match=f"round {round} is not among the 2 "):
        peer.publish(LOGITS, round=round)
    assert list(tmp_path.iterdir()) == []


def test_a_release_that_was_not_charged_is_never_sent(tmp_path, monkeypatch):
    """A process that ends between the two files leaves a release that nobody has seen: another one replaces it."""
    kept = []
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(clients.releases, "_write", interrupt)
        private(tmp_path).publish(LOGITS, round=0)
    kept += [path.read_bytes() for path in (tmp_path / "north").rglob("*.npy")]

    sent = private(tmp_path).publish(LOGITS, round=0)

    assert len(kept) == 1 and sent.tobytes() not in kept[0]
    assert private(tmp_path).publish(LOGITS, round=0).tobytes() == sent.tobytes()


def interrupt(*_):
    raise KeyboardInterrupt


def test_releases_made_side_by_side_are_all_charged(tmp_path):
    rounds = range(16)
    with ThreadPoolExecutor(8) as pool:
        settings = {"rounds": len(rounds) - 1}
        list(pool.map(lambda round: private(tmp_path, **settings).publish(LOGITS, round=round), rounds))

    with pytest.raises(SettingError, match="the 3 that are spent already"):
        private(tmp_path, run="b").check_budget()
    files = [path for path in (tmp_path / "north").rglob("*") if path.is_file()]
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}
    assert {path.suffix for path in files} == {".json", ".lock", ".npy"}


def test_two_releases_of_each_run_are_kept(tmp_path):
    def kept():
        return len(list((tmp_path / "north").rglob("*.npy")))

    for round in range(5):
        private(tmp_path, rounds=9).publish(LOGITS, round=round)
    assert kept() == 2
    private(tmp_path, run="b", rounds=9).publish(LOGITS, round=0)
    assert kept() == 3
    with pytest.raises(BudgetError, match="read a release"):
        private(tmp_path, run="b", rounds=9).publish(LOGITS, round=1)
        private(tmp_path, run="b", rounds=9).publish(LOGITS, round=2)
        private(tmp_path, run="b", rounds=9).publish(LOGITS, round=0)


def test_two_runs_side_by_side_have_releases_of_their_own_and_one_budget(tmp_path):
    def publish(run, round):
        peer = private(tmp_path, run=run, rounds=9, privacy_epsilon=1.0)
        return peer.publish(LOGITS, round=round).tobytes(), peer.epsilon

    first = {(run, round): publish(run, round) for round in (0, 1) for run in ("a", "b")}
    again = {(run, round): publish(run, round) for run, round in first}

    assert [again[key][0] for key in again] == [first[key][0] for key in first]  # and not another one of the same round
    spent_by = [first[key][1] for key in first]
    assert spent_by == sorted(set(spent_by)) and {epsilon for _, epsilon in again.values()} == {spent_by[-1]}


def test_nothing_is_published_that_could_not_be_written_down(tmp_path):
    peer = private(tmp_path)
    (tmp_path / "north").write_text("a file where the folder should be")
    with pytest.raises(BudgetError, match=r"cannot (read|write) the budget"):
        peer.publish(LOGITS, round=0)


@pytest.mark.parametrize("content", ["{", "[]", '{"spent": NaN}', '{"spent": -1}', '{"spent": "much"}', "{}"])
def test_a_damaged_budget_is_no_fresh_one(tmp_path, content):
    peer = private(tmp_path)
    (tmp_path / "north").mkdir()
    (tmp_path / "north" / "privacy.json").write_text(content)
    with pytest.raises(BudgetError, match="cannot read the budget"):
        peer.publish(LOGITS, round=0)


def test_a_release_that_is_gone_is_not_made_anew(tmp_path):
    """Another one would be a second release of one round, which the promise counts once."""
    private(tmp_path).publish(LOGITS, round=0)
    for damage in (lambda path: path.write_bytes(b""), lambda path: path.unlink()):
        damage(next((tmp_path / "north").rglob("*.npy")))
        with pytest.raises(BudgetError, match="read a release"):
            private(tmp_path).publish(LOGITS, round=0)


def test_logits_that_no_noise_hides_cost_nothing_and_stay(tmp_path):
    with pytest.raises(BadKnowledge, match="finite"):
        private(tmp_path).publish(LOGITS + np.inf, round=0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("epsilon", [0.001, 0.01, 1.0, 50.0, 1000.0])
@pytest.mark.parametrize("rounds", [0, 10, 100])
def test_a_run_that_asks_for_exactly_the_budget_is_within_it(tmp_path, epsilon, rounds):
    peer = private(tmp_path, **{"max-epsilon": epsilon}, privacy_epsilon=epsilon, rounds=rounds)
    peer.check_budget()


def test_what_is_told_holds_at_the_runs_delta_and_what_is_limited_at_the_peers(tmp_path):
    peer = private(tmp_path, **{"max-delta": 1e-3}, privacy_delta=1e-6, rounds=0)

    peer.publish(LOGITS, round=0)

    assert peer.epsilon == pytest.approx(3.0)
    private(tmp_path, run="b", **{"max-delta": 1e-3}, privacy_epsilon=0.5, privacy_delta=1e-6, rounds=0).check_budget()
    with pytest.raises(SettingError, match=r"`privacy-epsilon` .*ε 3 at δ 1e-06"):
        private(tmp_path, run="b", **{"max-delta": 1e-6}, privacy_epsilon=0.5, privacy_delta=1e-6).check_budget()


@pytest.mark.parametrize("above", [1.001, 2.0])
def test_a_run_that_asks_for_more_than_the_budget_is_not_begun(tmp_path, above):
    with pytest.raises(SettingError, match="`privacy-epsilon`"):
        private(tmp_path, privacy_epsilon=3.0 * above).check_budget()
    with pytest.raises(BudgetError, match="the budget is spent"):
        private(tmp_path, privacy_epsilon=3.0 * above, rounds=0).publish(LOGITS, round=0)


def test_what_a_run_has_released_already_does_not_count_against_it_again(tmp_path):
    peer = private(tmp_path, rounds=3)
    for round in (0, 1):
        peer.publish(LOGITS, round=round)

    private(tmp_path, rounds=3).check_budget()  # two more, which the promise holds
    with pytest.raises(SettingError):
        private(tmp_path, run="b", rounds=3).check_budget()
    for round in (2, 3):
        peer.publish(LOGITS, round=round)
    assert peer.epsilon == pytest.approx(3.0)


def test_a_peer_without_a_limit_or_on_this_machine_has_no_budget(tmp_path):
    for round in range(3):
        endless = private(tmp_path, run=f"{round}", rounds=0)
        endless._peer_config = replace(endless._peer_config, limits=replace(endless._peer_config.limits, epsilon=None))
        endless.check_budget()
        endless.publish(LOGITS, round=0)
    assert endless.epsilon > 3.0
    peer = private(tmp_path)
    peer._peer_config = replace(peer._peer_config, simulated=True)
    peer.check_budget()


def test_what_is_kept_of_privacy_is_its_owners_alone(tmp_path):
    peer = private(tmp_path)
    peer.publish(LOGITS, round=0)
    withhold(peer._peer_config, "a", 0, {"test_accuracy": 0.5})

    for path in (tmp_path / "north").rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path
    assert stat.S_IMODE((tmp_path / "north").stat().st_mode) == 0o700
    fresh = PeerConfig.of_own(own_settings({"name": "south"}), name="south", root=tmp_path, simulated=False)
    withhold(fresh, "a", 0, {"test_accuracy": 0.5})
    withhold(fresh, "a", 1, {"test_accuracy": 0.75})
    assert stat.S_IMODE((tmp_path / "south").stat().st_mode) == 0o700
    lines = [json.loads(line) for line in (tmp_path / "south" / "measured.jsonl").read_text().splitlines()]
    assert [(line["run"], line["round"], line["test_accuracy"]) for line in lines] == [("a", 0, 0.5), ("a", 1, 0.75)]
