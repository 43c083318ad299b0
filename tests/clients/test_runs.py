"""Runs at one peer: each has its own states, keys and data, and none costs another anything."""

import os
import re
from pathlib import Path

import numpy as np
import pytest
from federation import SMALL, Killed, federate, local_grid
from sites import deployed, make_sites

from clients.keys import Secrets
from clients.runs import _KEPT, _MOST, RunsError, close, make_room, remember_data, run_folder, use
from fedkd.errors import FedkdError
from fedkd.wire.sealing import SealError
from strategies.relay.rounds import RelayError


@pytest.fixture
def sites(tmp_path):
    return make_sites(tmp_path / "sites", peers=2)


def test_two_runs_at_the_same_deployed_peers_end_as_each_does_alone(tmp_path, sites):
    def grid(path):
        return local_grid(path, 2, node_config=deployed(sites))

    alone = {
        name: federate(tmp_path / name, grid=grid(tmp_path / name), sealed=True, seed=n) for n, name in enumerate("xy")
    }
    beside = tmp_path / "beside"
    inner, outer = (
        local_grid(beside, 2, node_config=deployed(sites)),
        local_grid(beside, 2, node_config=deployed(sites)),
    )
    found = []

    def between(partition, message):
        mail = message.content["mail"]
        if (partition, mail["kind"], mail["round"]) == (1, "learn", 1) and not found:
            found.append(federate(beside / "y", grid=inner, sealed=True, seed=1))

    outer.fault = between
    x = federate(beside / "x", grid=outer, sealed=True, seed=0)

    assert x.timeless_rows() == alone["x"].timeless_rows()
    assert found[0].timeless_rows() == alone["y"].timeless_rows()
    assert {row["status"] for row in x.rows()} == {"ok"}


def test_an_introduction_alone_costs_another_run_nothing(tmp_path, sites):
    grid = local_grid(tmp_path, 2, node_config=deployed(sites))
    intruder = local_grid(tmp_path, 2, node_config=deployed(sites))
    intruder.fault = lambda partition, message: message.content["no such"] if _kind(message) == "start" else None

    def between(partition, message):
        if _kind(message) == "learn" and partition == 0:
            with pytest.raises(FedkdError):
                federate(tmp_path / str(message.content["mail"]["round"]), grid=intruder, sealed=True)

    grid.fault = between

    assert {row["status"] for row in federate(tmp_path, grid=grid, sealed=True).rows()} == {"ok"}


def _kind(message):
    return message.content["mail"]["kind"]


def begun(state_dir: Path, run: str, *, hours: float, over: bool = False, started: bool = True) -> Path:
    """Make the folder of a run that was used so long ago."""
    folder = run_folder(state_dir, run)
    folder.mkdir(parents=True)
    if started:
        remember_data(folder, {})
    if over:
        close(folder)
    then = folder.stat().st_mtime - 3600 * hours
    os.utime(folder, (then, then))
    return folder


def test_the_newest_of_the_runs_that_are_over_are_kept_and_all_that_are_under_way(tmp_path):
    over = [begun(tmp_path, f"over-{n}", hours=n + 1, over=True) for n in range(_KEPT + 2)]
    under_way = [begun(tmp_path, f"under-way-{n}", hours=20 + n) for n in range(3)]
    only_introduced = begun(tmp_path, "introduced", hours=0.5, started=False)

    make_room(run_folder(tmp_path, "new"))

    assert [folder.exists() for folder in over] == [True] * _KEPT + [False] * 2
    assert all(folder.exists() for folder in [*under_way, only_introduced])


def test_a_run_that_nothing_came_of_for_long_gives_way_and_one_in_use_does_not(tmp_path):
    idle = [begun(tmp_path, f"idle-{n}", hours=30 + n) for n in range(_KEPT + 1)]
    introduced = begun(tmp_path, "introduced", hours=40, started=False)
    use(idle[-1])

    make_room(run_folder(tmp_path, "new"))

    assert all(folder.exists() for folder in idle) and not introduced.exists()


def test_more_runs_than_a_peer_keeps_are_refused_with_the_cure_and_none_is_lost(tmp_path):
    there = [begun(tmp_path, str(n), hours=1) for n in range(_MOST)]

    with pytest.raises(RunsError, match=rf"{_MOST} runs are under way at this peer.*remove the folders .* from .*runs"):
        make_room(run_folder(tmp_path, "new"))
    make_room(there[0])  # one of them goes on

    assert all(folder.exists() for folder in there)


@pytest.mark.parametrize("controls", ["", "isolated"])
def test_runs_that_have_ended_leave_no_more_than_a_few_states_at_a_deployed_peer(tmp_path, sites, controls):
    few = {**SMALL, "rounds": 1, "pretrain-epochs": 0, "models": "mlp", "controls": controls}
    settings = {key.replace("-", "_"): value for key, value in few.items()}
    for n in range(_KEPT + 2):
        federate(tmp_path / str(n), grid=local_grid(tmp_path, 2, node_config=deployed(sites)), **settings)

    for name in ("site-0", "site-1"):
        assert len(list((tmp_path / "state" / name / "runs").iterdir())) == _KEPT + 1


def test_a_peer_notices_that_its_key_is_not_the_one_it_pinned(tmp_path):
    mine, ada = Secrets(tmp_path, "me", "run"), Secrets(tmp_path / "ada", "ada", "run")
    keys = {"me": mine.public, "ada": ada.public}
    mine.pin(keys)
    (tmp_path / "key.json").unlink()

    with pytest.raises(
        SealError, match=r"^me's own key in use, of .*key\.json, is not the one .* pinned in .*peers\.json"
    ):
        Secrets(tmp_path, "me", "run").pin(keys)


def killed(path, grid, **settings):
    def kill(partition, message):
        if message.content["mail"]["round"] == 2:
            raise Killed

    grid.fault = kill
    with pytest.raises(Killed):
        federate(path, grid=grid, **settings)
    grid.fault = None
    grid.forget()


def change(dataset: str, **arrays):
    """Change what a site's file holds."""
    path = Path(dataset.removeprefix("npz:"))
    with np.load(path) as content:
        held = dict(content)
    np.savez(path, **{**held, **{name: of(held[name]) for name, of in arrays.items()}})


@pytest.mark.parametrize(
    ("what", "array"), [("private data", "y_train"), ("private data", "x_train"), ("test set", "y_test")]
)
def test_a_run_is_not_resumed_on_other_data_and_the_peer_that_has_them_is_named(tmp_path, sites, what, array):
    grid = local_grid(tmp_path, 2, node_config=deployed(sites))
    killed(tmp_path, grid)
    before = (tmp_path / "run" / "rounds.jsonl").read_text()
    change(sites[1]["dataset"], **{array: lambda values: np.roll(values, 1, axis=0)})

    with pytest.raises(RelayError, match=rf"^site-1: the {what} changed since this run began: bring back what"):
        federate(tmp_path, grid=grid, resume=str(tmp_path / "run"))

    assert (tmp_path / "run" / "rounds.jsonl").read_text() == before
    change(sites[1]["dataset"], **{array: lambda values: np.roll(values, -1, axis=0)})
    resumed = federate(tmp_path, grid=grid, resume=str(tmp_path / "run"))
    assert {row["status"] for row in resumed.rows()} == {"ok"}


def test_a_run_is_not_resumed_on_another_proxy_set_even_if_all_have_it(tmp_path, sites):
    grid = local_grid(tmp_path, 2, node_config=deployed(sites))
    killed(tmp_path, grid)
    for data in sites:
        change(data["proxy"], x_train=lambda x: x[::-1])

    with pytest.raises(RelayError, match=r"^the proxy set changed since this run began"):
        federate(tmp_path, grid=grid, resume=str(tmp_path / "run"))


def test_what_tells_that_data_have_changed_stays_with_the_peer(tmp_path, sites):
    grid = local_grid(tmp_path, 2, node_config=deployed(sites))
    run = federate(tmp_path, grid=grid)

    kept = list((tmp_path / "state").rglob("data.json"))
    prints = re.findall(r'"private data": "([0-9a-f]{32})"', "".join(path.read_text() for path in kept))
    assert len(set(prints)) == 2 and {path.stat().st_mode & 0o777 for path in kept} == {0o600}
    folders = [folder for path in kept for folder in (path.parent, *path.parents) if folder.name in ("runs", "site-0")]
    assert {folder.stat().st_mode & 0o777 for folder in folders if tmp_path / "state" in folder.parents} == {0o700}
    left = [str(message.content) for message in grid.sent + grid.replies]
    left += [path.read_text() for path in run.folder.glob("*.json*")]
    assert not any(fingerprint in text for fingerprint in prints for text in left)


def test_data_that_change_in_the_middle_of_a_run_are_an_error_of_that_peer(tmp_path, sites):
    grid = local_grid(tmp_path, 2, node_config=deployed(sites))

    def between(partition, message):
        if (partition, _kind(message), message.content["mail"]["round"]) == (1, "learn", 2):
            change(sites[1]["dataset"], y_train=lambda y: np.roll(y, 1))

    grid.fault = between

    run = federate(tmp_path, grid=grid)

    rows = {(row["peer"], row["round"]): row for row in run.rows()}
    assert rows["site-0", 2]["status"] == "ok" and rows["site-1", 2]["status"] == "error"
    assert rows["site-1", 2]["error"].startswith("the private data changed since this run began")


def test_what_else_has_changed_since_a_run_began_is_said_in_a_line(tmp_path, capsys, monkeypatch):
    grid = local_grid(tmp_path, 2)
    killed(tmp_path, grid)
    capsys.readouterr()
    federate(tmp_path, 2, grid=grid, resume=str(tmp_path / "run"))
    assert "not as when the run began" not in capsys.readouterr().out
    monkeypatch.setattr("strategies.relay.resuming.source_hash", lambda: "0ther")

    federate(tmp_path, 2, grid=grid, resume=str(tmp_path / "run"))

    (line,) = (line for line in capsys.readouterr().out.splitlines() if "not as when the run began" in line)
    assert re.search(r"numbers may differ from those of an uninterrupted one: code [0-9a-f]{16} → 0ther$", line)


def test_a_simulated_run_is_not_resumed_on_other_data_either(tmp_path, sites):
    """There the peers share a data set, of which each has its part."""
    settings = {"dataset": sites[0]["dataset"], "proxy": sites[0]["proxy"]}
    grid = local_grid(tmp_path, 2)
    killed(tmp_path, grid, **settings)
    change(sites[0]["dataset"], y_train=lambda labels: np.roll(labels, 1))
    _forget_what_this_process_has_read()

    complaint = r"peer-0: the private data \(part 1 of 2\) changed .*peer-1: the private data \(part 2 of 2\) changed"
    with pytest.raises(RelayError, match=complaint):
        federate(tmp_path, grid=grid, resume=str(tmp_path / "run"))


def _forget_what_this_process_has_read():
    from clients import data

    for cached in (data._source, data._raw, data._commons, data._parts, data._private_fingerprint):
        cached.cache_clear()
