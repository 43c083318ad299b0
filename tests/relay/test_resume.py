"""A run that is killed and resumed ends as one that was not: nothing is lost, nothing counted twice."""

import random

import pytest
from federation import federate, local_grid
from typer.testing import CliRunner

from experiments.cli import app
from fedkd.errors import SettingError
from fedkd.results.folder import RunFolder
from strategies.relay.ledger import Ledger, LedgerError
from strategies.relay.rounds import RelayError

SETTINGS = {"rounds": 5, "topology": "ring", "strategy": "gossip", "models": "mlp"}


class Killed(BaseException):
    """Not an Exception: nothing catches it, as nothing catches SIGKILL."""


class Reaper:
    """Kills the run at its n-th moment: around every message, every write of rows and every write of the ledger."""

    def __init__(self, monkeypatch, grid):
        self.moments, self.fatal = 0, None
        for owner, name in ((RunFolder, "append"), (Ledger, "save")):
            monkeypatch.setattr(owner, name, self.around(getattr(owner, name)))
        grid.fault = lambda partition, message: self.moment()

    def around(self, method):
        def wrapped(*arguments):
            self.moment()
            method(*arguments)
            self.moment()

        return wrapped

    def moment(self):
        self.moments += 1
        if self.moments == self.fatal:
            raise Killed


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return federate(tmp_path_factory.mktemp("whole"), 4, **SETTINGS)


def count_moments(tmp_path, monkeypatch):
    grid = local_grid(tmp_path, 4)
    reaper = Reaper(monkeypatch, grid)
    federate(tmp_path, 4, grid=grid, **SETTINGS)
    return reaper.moments


@pytest.mark.slow
def test_killed_at_ten_random_moments_a_resumed_run_ends_as_an_uninterrupted_one(tmp_path, monkeypatch, whole):
    moments = count_moments(tmp_path / "count", monkeypatch)
    monkeypatch.undo()

    for fatal in random.Random(0).sample(range(8, moments + 1), 10):  # after the introductions, before which nothing is
        path = tmp_path / f"moment-{fatal}"
        grid = local_grid(path, 4)
        with monkeypatch.context() as patch, pytest.raises(Killed):
            Reaper(patch, grid).fatal = fatal
            federate(path, 4, grid=grid, **SETTINGS)
        grid.fault = None
        grid.forget()

        resumed = federate(path, 4, grid=grid, resume=str(path / "run"), **SETTINGS)

        assert resumed.timeless_rows() == whole.timeless_rows(), f"killed at moment {fatal} of {moments}"
        totals = [run.summary()["totals"] | {"seconds": 0} for run in (resumed, whole)]
        assert totals[0] == totals[1]


def test_a_finished_run_that_is_resumed_stays_as_it_is(tmp_path, whole):
    grid = local_grid(tmp_path, 4)
    first = federate(tmp_path, 4, grid=grid, **SETTINGS)
    before = first.timeless_rows()

    assert federate(tmp_path, 4, grid=grid, resume=str(first.folder), **SETTINGS).timeless_rows() == before


def test_a_resumed_run_counts_the_time_before_it_was_stopped(tmp_path):
    grid = local_grid(tmp_path, 2)
    first = federate(tmp_path, 2, grid=grid)
    ledger = Ledger.load(first.folder)
    ledger.elapsed = 5000.0
    ledger.save(first.folder)

    resumed = federate(tmp_path, 2, grid=grid, resume=str(first.folder))

    assert sum(ledger.seconds) > 0 and 5000 < resumed.summary()["totals"]["seconds"] < 5600


def test_a_damaged_ledger_is_refused_by_name(tmp_path):
    grid = local_grid(tmp_path, 2)
    run = federate(tmp_path, 2, grid=grid)
    path = run.folder / "relay.safetensors"
    path.write_bytes(path.read_bytes()[:40])

    with pytest.raises(LedgerError, match=r"relay\.safetensors"):
        federate(tmp_path, 2, grid=grid, resume=str(run.folder))


def test_a_line_that_a_kill_cut_off_is_dropped_when_the_run_is_resumed(tmp_path):
    grid = local_grid(tmp_path, 2)
    first = federate(tmp_path, 2, grid=grid)
    before = first.timeless_rows()
    with (first.folder / "rounds.jsonl").open("a") as file:
        file.write('{"round": 2, "pee')

    resumed = federate(tmp_path, 2, grid=grid, resume=str(first.folder))

    assert resumed.timeless_rows() == before


def test_a_resumed_run_keeps_its_settings_and_says_so(tmp_path):
    grid = local_grid(tmp_path, 2)
    first = federate(tmp_path, 2, grid=grid)

    with pytest.raises(SettingError, match=r"`rounds` to be 2 as in the run that is resumed, but got 99"):
        federate(tmp_path, 2, grid=grid, resume=str(first.folder), rounds=99)


@pytest.mark.parametrize("now", [3, 6])
def test_a_run_is_not_resumed_with_another_number_of_peers(tmp_path, now):
    first = federate(tmp_path, 4, grid=local_grid(tmp_path, 4))
    before = first.timeless_rows()

    with pytest.raises(RelayError, match=rf"had 4 peers \(peer-0, .*peer-3\), but now there are {now} \(peer-0, "):
        federate(tmp_path, now, grid=local_grid(tmp_path, now), resume=str(first.folder))
    assert first.timeless_rows() == before


@pytest.mark.parametrize(("words", "peers"), [([], 4), (["--peers", "5"], 5)])
def test_the_command_takes_the_number_of_peers_from_the_run_that_is_resumed(tmp_path, monkeypatch, words, peers):
    def kill(*arguments):
        raise Killed

    monkeypatch.setattr(RunFolder, "append", kill)
    with pytest.raises(Killed):  # before any row tells who takes part
        federate(tmp_path, 4)
    asked = []
    monkeypatch.setattr(
        "experiments.launch.runner.launch", lambda app, settings, federation, **_: asked.append(federation)
    )

    CliRunner().invoke(app, ["run", f"resume={tmp_path / 'run'}", *words])

    assert [federation.peers for federation in asked] == [peers]


def test_resuming_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(SettingError, match=r"`resume`.*nowhere"):
        federate(tmp_path, 3, resume=str(tmp_path / "nowhere"))
