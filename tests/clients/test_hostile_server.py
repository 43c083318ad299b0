"""What a hostile server can make a deployed peer do: every kind of mail, under every strategy."""

from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
from federation import SMALL
from sites import make_sites

from clients.answering import answer
from clients.configuration import PeerConfig
from clients.limits import Limits
from clients.own_settings import own_settings
from clients.peer import Peer
from experiments.deploy.create import create
from experiments.deploy.demo import write_demo_data
from experiments.deploy.layout import Deployment
from fedkd.errors import SettingError
from fedkd.settings.config import RunConfig
from fedkd.settings.rules import STRATEGIES
from fedkd.wire.messages import Kind, Letter, Mail, pack_mail, unpack_answer

KINDS = get_args(Kind)
SERVER_FREE = Limits().strategies
SETTINGS = RunConfig.from_mapping({**SMALL, "pretrain-epochs": 1, "fedavg-model": "mlp", "pooled-model": "mlp"})
TOLD = {"seconds", "refused_letters", "epsilon"}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    return make_sites(tmp_path_factory.mktemp("sites"), peers=2)[0]


def ask(site, root, kind, *, round=0, letters=(), run="run", **settings):
    """Send one mail to a deployed peer in this process."""
    config = replace(SETTINGS, **settings)
    place = PeerConfig.of_own(own_settings(site), name=site["name"], root=root, simulated=False)
    mail = Mail(kind, round, config.to_mapping(), run, letters)
    return unpack_answer(answer(pack_mail(mail), place, Peer))


def crafted():
    """Return knowledge that no peer has: the same class everywhere."""
    logits = np.tile(np.float32([9.0, *[0.0] * 9]), (60, 1))
    return (Letter("site-1", 0, {"logits": logits}),)


def every_kind(site, root, **settings):
    """Start a peer and then send it every kind of mail; return the answers by kind."""
    ask(site, root, "start", **settings)
    rounds = {"introduce": 0, "start": 0}
    return {
        kind: ask(site, root, kind, round=rounds.get(kind, 1), letters=crafted(), **settings)
        for kind in ("introduce", "start", "learn", "isolated", "pooled", "channel", "merge")
    }


def test_the_list_of_kinds_is_complete(site, tmp_path):
    assert set(every_kind(site, tmp_path)) == set(KINDS)


@pytest.mark.parametrize("strategy", [*STRATEGIES, "own.strategies:Mine"])
@pytest.mark.parametrize("start", ["cold", "distilled"])
def test_no_kind_of_mail_gets_more_than_knowledge_out_of_a_peer(site, tmp_path, strategy, start):
    answers = every_kind(site, tmp_path, strategy=strategy, fedavg_start=start)

    for kind, said in answers.items():
        assert set(said.arrays) <= {"logits"}, kind
        assert all(array.shape == (60, 10) for array in said.arrays.values())
    for control in ("pooled", "channel"):
        assert "`controls` to be left out in a deployment" in answers[control].error or strategy not in SERVER_FREE
    assert "`strategy`" in answers["merge"].error
    learned = {kind for kind, said in answers.items() if not said.error}
    assert learned == ({"introduce", "start", "learn", "isolated"} if strategy in SERVER_FREE else set())


@pytest.mark.parametrize("strategy", [*STRATEGIES, "own.strategies:Mine"])
def test_no_kind_of_mail_gets_a_measurement_out_of_a_peer_with_a_budget(site, tmp_path, strategy):
    own = {**site, "max-epsilon": 3.0, "allowed-strategies": ",".join([*STRATEGIES, "own.strategies:Mine"])}

    answers = every_kind(own, tmp_path, strategy=strategy, privacy_epsilon=1.0)

    for kind, said in answers.items():
        assert set(said.metrics) <= TOLD, kind
        assert not said.series, kind
        assert set(said.arrays) <= {"logits"}, kind
    published = {kind for kind, said in answers.items() if said.arrays}
    assert published == (set() if strategy == "fedavg" else {"start", "learn"})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("setting", ["fedavg_model", "pooled_model", "divergence", "dataset", "proxy", "models"])
@pytest.mark.parametrize("allowed", [SERVER_FREE, STRATEGIES])
def test_no_kind_of_mail_runs_code_that_the_server_names(site, tmp_path, monkeypatch, kind, setting, allowed):
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\ndef c(*a, **k): raise SystemExit\n")
    monkeypatch.syspath_prepend(tmp_path)
    own = {**site, "allowed-strategies": ",".join(allowed)}

    for strategy in allowed:
        ask(own, tmp_path, kind, letters=crafted(), strategy=strategy, **{setting: "evil:c"})

    assert not (tmp_path / "ran").exists()


def test_only_a_distilled_start_that_the_peer_allows_makes_weights_of_knowledge(site, tmp_path):
    own = {**site, "allowed-strategies": "averaged,fedavg"}

    merged = ask(own, tmp_path, "merge", round=1, letters=crafted(), strategy="fedavg", fedavg_start="distilled")
    cold = ask(own, tmp_path, "merge", round=1, letters=crafted(), strategy="fedavg", fedavg_start="cold")

    assert merged.arrays and not merged.error
    assert not cold.arrays and "fedavg-start distilled where knowledge is to become weights" in cold.error


def limited(epochs, kind, **settings):
    Limits(("averaged", "fedavg"), epochs=epochs).check(replace(RunConfig(), **settings), kind)


@pytest.mark.parametrize(
    ("kind", "settings", "cost"),
    [
        ("start", {"pretrain_epochs": 30}, 30),
        ("start", {"strategy": "fedavg", "pretrain_epochs": 0, "local_epochs": 30}, 30),
        ("start", {"strategy": "fedavg", "fedavg_start": "distilled", "pretrain_epochs": 30}, 30),
        ("start", {"strategy": "fedavg", "fedavg_start": "pretrained", "pretrain_epochs": 30}, 30),
        ("merge", {"strategy": "fedavg", "fedavg_start": "distilled", "merge_epochs": 30}, 30),
        ("learn", {"schedule": "alternate", "distill_epochs": 20, "local_epochs": 10}, 30),
        ("learn", {"strategy": "fedavg", "local_epochs": 30, "distill_epochs": 999}, 30),
        ("learn", {"schedule": "mixed", "distill_epochs": 30, "local_epochs": 999}, 30),
        ("learn", {"method": "infoflow", "flow_auxiliary": True, "flow_auxiliary_epochs": 28}, 30),
        ("isolated", {"schedule": "alternate", "rounds": 10, "local_epochs": 3}, 30),
        ("isolated", {"schedule": "alternate", "rounds": 30, "local_epochs": 0}, 30),
        ("isolated", {"schedule": "mixed", "rounds": 10, "distill_epochs": 3}, 30),
        ("isolated", {"strategy": "fedavg", "rounds": 10, "local_epochs": 3, "distill_epochs": 999}, 30),
        ("introduce", {"pretrain_epochs": 30}, 30),
        ("introduce", {"schedule": "alternate", "distill_epochs": 20, "local_epochs": 10}, 30),
        ("introduce", {"strategy": "fedavg", "fedavg_start": "distilled", "merge_epochs": 30}, 30),
        (
            "learn",
            {"schedule": "alternate", "regime": "tuned", "tune_weights": "1", "distill_epochs": 1, "local_epochs": 1},
            17,
        ),
        ("learn", {"regime": "tuned", "tune_weights": "1,2", "distill_epochs": 0, "local_epochs": 0}, 10),
    ],
)
def test_all_that_a_mail_costs_is_counted_together(kind, settings, cost):
    """The default search tries five temperatures."""
    limited(cost, kind, **settings)
    with pytest.raises(SettingError, match=rf"at most {cost - 1} epochs in a mail .*`max-epochs`\), not {cost}"):
        limited(cost - 1, kind, **settings)


def test_a_control_of_endless_rounds_is_refused_at_once(site, tmp_path):
    ask(site, tmp_path, "start")
    said = ask(site, tmp_path, "isolated", rounds=10**9, schedule="alternate", local_epochs=0)
    assert "`rounds × local-epochs`" in said.error and "got 1000000000" in said.error


@pytest.mark.parametrize("kind", KINDS)
def test_a_relay_that_says_the_run_is_not_sealed_is_refused_by_a_site_of_deploy_init(tmp_path, kind):
    """The owner fills in model and data, and leaves the rest as `fedkd deploy init` wrote it."""
    deployment = Deployment(tmp_path / "fed", ("127.0.0.1",), 2, 9092, 9093, 9400)
    create(deployment, demo=False)
    folder = deployment.peer("peer-0")
    write_demo_data([folder], proxy_size=60)
    filled = {"model": "mlp", "dataset": "npz:data.npz", "proxy": "npz:proxy.npz"}
    text = (folder / "peer.toml").read_text()
    for key, value in filled.items():
        text = text.replace(f'{key} = ""', f'{key} = "{value}"')
    (folder / "peer.toml").write_text(text)
    own = {**own_settings({"peer-config": str(folder / "peer.toml")}), "name": "peer-0"}

    assert not ask(own, tmp_path, "introduce", sealed=True, seed=1).error
    said = ask(own, tmp_path, kind, letters=crafted(), sealed=False)

    assert "`sealed` to be true: start the run with `sealed=true`" in said.error and "\n" not in said.error
    assert not said.arrays and not said.metrics and not said.facts
    assert not list(tmp_path.rglob("*.safetensors"))
