"""The pages of experiments/examples do what they say, at small size and in one process."""

from pathlib import Path

import numpy as np
import pytest
import torch
from federation import federate

from clients.configuration import PeerConfig
from clients.limits import Limits
from clients.own_settings import own_settings
from experiments.examples import (
    own_divergence,
    own_images,
    own_model,
    own_strategy,
    own_table,
    plain_loop,
    read_run,
)
from fedkd.errors import FedkdError, SettingError
from fedkd.losses import divergences
from fedkd.settings.config import RunConfig

HERE = "experiments.examples"
TABLE = {"dataset": f"{HERE}.own_table:load", "models": "mlp", "proxy_size": 100, "pooled_model": "mlp"}

MAJORITY = 357 / 569  # what it is worth to say "benign" always


@pytest.fixture
def table(tmp_path, monkeypatch):
    monkeypatch.setenv("TABLE", str(tmp_path / "table.csv"))
    own_table.main(tmp_path / "table.csv")


def test_an_own_model_starts_from_its_own_checkpoint(tmp_path):
    own_model.main(tmp_path / "own.safetensors", epochs=5)
    own = {"models": f"{HERE}.own_model:network,mlp", "checkpoints": f"{tmp_path}/own.safetensors,-"}

    run = federate(tmp_path, 2, **own, pretrain_epochs=0, rounds=1, proxy_size=400)

    start = {row["peer"]: row["test_accuracy"] for row in run.rows() if row["round"] == 0}
    assert start["peer-0"] > 0.7  # trained, though this run trains nobody before round 1
    assert start["peer-1"] < 0.3  # as it came


def test_the_checkpoint_has_not_seen_the_proxy_set(tmp_path, monkeypatch):
    seen = []
    fitted = torch.nn.functional.cross_entropy
    monkeypatch.setattr(
        torch.nn.functional, "cross_entropy", lambda logits, labels: seen.append(len(labels)) or fitted(logits, labels)
    )

    own_model.main(tmp_path / "own.safetensors", epochs=1)

    assert sum(seen) == 1438 - RunConfig().public_size


def test_every_site_reads_a_folder_of_its_own(tmp_path):
    own_images.main(tmp_path / "sites", sites=2, public=60, train=200, test=40)
    own = {"dataset": f"folder:{tmp_path}/sites/{{peer}}", "proxy": f"folder:{tmp_path}/sites/public"}

    run = federate(tmp_path, 2, **own, proxy_size=0, rounds=1, controls="isolated,pooled")

    samples = {peer["peer"]: peer["samples"] for peer in run.summary()["peers"]}
    on_disk = {f"peer-{site}": len(list((tmp_path / "sites" / str(site) / "train").glob("*/*.png"))) for site in (0, 1)}
    assert samples == on_disk and sum(samples.values()) == 200
    assert run.summary()["pooled"] is None  # real data are nobody else's


def test_a_site_without_its_folder_is_named(tmp_path):
    own_images.main(tmp_path / "sites", sites=2, public=60, train=200, test=40)
    own = {"dataset": f"folder:{tmp_path}/sites/{{peer}}", "proxy": f"folder:{tmp_path}/sites/public"}

    with pytest.raises(FedkdError, match=r"`dataset`.*sites/2"):
        federate(tmp_path, 3, **own, proxy_size=60)


def test_own_data_of_simulated_peers_need_a_proxy_set_of_their_own(tmp_path):
    with pytest.raises(SettingError, match=r"`proxy`.*every peer its own data.*'split'"):
        federate(tmp_path, 2, dataset=f"folder:{tmp_path}/sites/{{peer}}")


def test_a_deployed_peer_does_not_read_what_the_server_names(tmp_path):
    deployed = PeerConfig("clinic", 0, 2, tmp_path, tmp_path, simulated=False)

    assert deployed.among(2, "folder:/etc/{peer}").dataset == ""
    with pytest.raises(SettingError, match="`model`"):
        deployed.settings(RunConfig(dataset="folder:/etc/{peer}", proxy="digits"))


@pytest.mark.parametrize(
    "settings",
    [
        {"controls": "isolated,pooled", "models": f"mlp,{HERE}.own_table:linear"},
        {"strategy": "gossip", "sealed": True, "codec": "int8"},
        {"strategy": "pairwise", "regime": "tuned", "tune_weights": "1", "tune_temperatures": "1,2"},
        {"strategy": "consensus"},
        {"strategy": "fedavg", "fedavg_model": "mlp", "fedavg_start": "distilled", "merge_epochs": 1},
        {"method": "infoflow", "flow_dimensions": 8},
        {"evaluate_on": "validation", "proxy_per_round": 30},
    ],
    ids=lambda settings: next(iter(settings.values())) if "strategy" in settings else next(iter(settings)),
)
def test_a_table_goes_all_the_way_that_images_go(tmp_path, table, settings):
    run = federate(tmp_path, 2, **{**TABLE, **settings})

    assert all(row["status"] == "ok" for row in run.rows())
    found = run.summary()
    assert found["mean"]["after"] > MAJORITY
    if "controls" in settings:
        assert found["pooled"] > MAJORITY and found["isolated"] > MAJORITY


def test_a_model_of_images_refuses_a_table_before_any_training(tmp_path, table):
    with pytest.raises(FedkdError, match=r"`models`.*images \[C, H, W\], not \[30\].*'cnn-small'"):
        federate(tmp_path, 2, **{**TABLE, "models": "mlp,cnn-small"})


def test_a_control_that_cannot_read_a_table_says_so_and_costs_the_run_nothing(tmp_path, table, capsys):
    run = federate(tmp_path, 2, **{**TABLE, "pooled_model": "cnn-wide"}, controls="pooled")

    assert run.summary()["pooled"] is None and run.summary()["mean"]["after"] > MAJORITY
    assert "control pooled: no result: Expected setting `pooled-model`" in capsys.readouterr().out


def test_words_in_a_table_become_columns(tmp_path, monkeypatch):
    path = tmp_path / "table.csv"
    path.write_text("colour,size,target\n" + "red,1.5,yes\nblue,2.5,no\nred,,no\n" * 4)
    monkeypatch.setenv("TABLE", str(path))

    x_train, y_train, x_test, y_test = own_table.load()

    assert x_train.shape[1] == x_test.shape[1] == 3 and x_train.dtype == np.float32
    assert len(y_train) + len(y_test) == 8  # rows with gaps are left out
    assert set(y_train) == {0, 1}


def test_an_own_divergence_is_registered_and_is_a_runs_loss(tmp_path):
    known = divergences.get("squared_hellinger")
    z, w = torch.randn(5, 7, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64)

    assert torch.allclose(known(z, w), known(w, z)) and bool((known(z, w) <= known.bound).all())
    assert torch.allclose(known(z, z), torch.zeros(5, dtype=torch.float64), atol=1e-12)
    run = federate(tmp_path, 2, divergence=f"{HERE}.own_divergence:squared_hellinger", temperature=2.0)
    assert all(row["kd_loss"] >= 0 for row in run.rows() if row["round"])


def test_the_divergence_falls_when_it_is_minimised(capsys):
    own_divergence.main()

    values = [float(line.split(": ")[1]) for line in capsys.readouterr().out.splitlines()]
    assert values == sorted(values, reverse=True) and values[-1] < values[0] / 100


def test_an_own_strategy_decides_who_hears_whom(tmp_path):
    run = federate(tmp_path, 4, strategy=f"{HERE}.own_strategy:Tables", combine="pairwise", rounds=3)

    heard = [row["teachers"] for row in run.rows() if row["round"]]
    assert all(row["status"] == "ok" for row in run.rows())
    assert {len(teachers) for teachers in heard} == {3}  # four peers: one table, with a chair


@pytest.mark.parametrize("peers", [1, 2, 3, 7, 9])
def test_at_every_table_each_hears_the_others(peers):
    strategy = own_strategy.Tables(RunConfig(strategy="own_strategy:Tables"), peers, 10)

    for round in range(1, 4):
        tables = {frozenset({peer, *strategy.teachers(peer, round)}) for peer in range(peers)}
        assert sorted(peer for table in tables for peer in table) == list(range(peers))
        assert all(len(table) >= min(3, peers) for table in tables)


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("nowhere.at_all:Tables", "importable.*nowhere"),
        (f"{HERE}.own_strategy:Chairs", "a callable `Chairs`"),
        (f"{HERE}.own_table:load", "a class derived from strategies.strategy.Strategy"),
    ],
)
def test_a_strategy_that_is_none_is_refused_before_anyone_is_asked(tmp_path, name, complaint):
    with pytest.raises(SettingError, match=f"`strategy`.*{complaint}"):
        federate(tmp_path, 2, strategy=name)

    assert not (tmp_path / "run" / "rounds.jsonl").exists()


def test_a_deployed_peer_takes_part_in_an_own_strategy_only_if_its_owner_names_it():
    config = RunConfig(strategy="own_strategy:Tables")
    own = own_settings({"allowed-strategies": "gossip,own_strategy:Tables", "max-epochs": 30})
    peer_config = PeerConfig.of_own(own, name="clinic", root=Path("state"), simulated=False)

    peer_config.limits.check(config, "learn")
    with pytest.raises(SettingError, match=r"`strategy`.*averaged, pairwise, gossip.*own_strategy:Tables"):
        Limits().check(config, "learn")
    with pytest.raises(SettingError, match=r"`allowed-strategies`.*package.module:Class.*telepathy"):
        own_settings({"allowed-strategies": "telepathy"})


def test_losses_alone_teach_models_what_they_have_not_seen(capsys):
    found = plain_loop.main(rounds=2)

    assert min(found[-1]) > max(found[0]) + 0.1
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_a_runs_folder_reads_as_tables(tmp_path, capsys):
    run = federate(tmp_path, 2, controls="isolated")
    capsys.readouterr()

    accuracy = read_run.main(run.folder, target=0.3)

    assert accuracy.shape == (3, 2)
    assert accuracy.loc[2, "peer-1"] == run.rows()[-1]["test_accuracy"]
    said = capsys.readouterr().out
    assert "averaged, kl, seed 0" in said and "gain over isolated" in said and "every peer answered" in said
    assert "a mean accuracy of 30% took" in said
