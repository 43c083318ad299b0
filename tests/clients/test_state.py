"""A peer's state on disk: whole or not at all."""

import os
import resource
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn

from clients.state import StateError, Store, Taught, Trained


def model(value):
    layer = nn.Linear(3, 2)
    nn.init.constant_(layer.weight, value)
    return layer


def test_a_state_comes_back_with_its_memo(tmp_path):
    store = Store(tmp_path, "run")
    store.begin()
    store.save(4, model(0.5), {"temperature": 4.0})

    other = model(0.0)

    assert store.load(4, other) == {"temperature": 4.0}
    assert torch.equal(other.weight, model(0.5).weight)


def test_what_it_was_trained_on_comes_back_too(tmp_path):
    store, trained = Store(tmp_path, "run"), Trained(samples=20)
    store.begin()
    store.save(0, model(0.0), trained=trained)
    trained = trained.then(1, 30).then(2, 0, Taught(2, 1.0, 0.9)).then(4, 30, Taught(4, 8.0, 0.5))
    store.save(4, model(1.0), trained=trained)

    assert store.trained(before=4) == Trained(samples=20)
    found = store.trained(before=5)
    assert found == trained == Trained((1, 4), 80, (Taught(2, 1.0, 0.9), Taught(4, 8.0, 0.5)))
    assert found.taught[1].temperature == 8.0


def test_round_0_and_the_newest_two_are_kept(tmp_path):
    store = Store(tmp_path, "run")
    store.begin()
    for round in range(6):
        store.save(round, model(round))

    assert store.rounds() == [0, 4, 5]
    assert store.latest(before=5) == 4
    store.begin()
    assert store.rounds() == []


@pytest.mark.parametrize("rounds", [[9, 8, 7, 6], [10**9, 10**8, 3], [5, 10**7, 6]])
def test_rounds_in_any_order_leave_no_more_than_three_states(tmp_path, rounds):
    store = Store(tmp_path, "run")
    store.begin()
    for round in [0, *rounds]:
        store.save(round, model(round))

    assert len(list(tmp_path.iterdir())) <= 3
    assert {0, rounds[-1]} <= set(store.rounds())
    store.begin()
    assert list(tmp_path.iterdir()) == []


def test_a_missing_a_foreign_and_a_damaged_state_are_refused(tmp_path):
    store = Store(tmp_path, "run")
    store.begin()
    with pytest.raises(StateError, match="no state before round 3"):
        store.latest(before=3)
    store.save(1, model(1.0))
    with pytest.raises(StateError, match="run run, not to other"):
        Store(tmp_path, "other").load(1, model(0.0))
    with pytest.raises(StateError, match="round 1"):
        store.load(1, nn.Linear(5, 5))
    path = tmp_path / "round-000001.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(StateError, match="round 1"):
        store.load(1, model(0.0))


def test_a_disk_that_takes_no_more_leaves_the_old_state(tmp_path):
    store = Store(tmp_path, "run")
    store.begin()
    store.save(1, model(1.0))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
    try:
        with pytest.raises(StateError, match="cannot write the state of round 2"):
            store.save(2, model(2.0))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    assert store.rounds() == [1] and [p.name for p in tmp_path.iterdir()] == ["round-000001.safetensors"]
    restored = model(0.0)
    store.load(1, restored)
    assert torch.equal(restored.weight, model(1.0).weight)


@pytest.mark.slow
def test_a_kill_at_any_moment_leaves_a_whole_state(tmp_path):
    """A process saves round after round and is killed; whatever is there can be read."""
    program = textwrap.dedent(
        """
        import sys, itertools
        from pathlib import Path
        from torch import nn
        from clients.state import Store
        store = Store(Path(sys.argv[1]), "run")
        store.begin()
        layer = nn.Linear(300, 300)
        for round in itertools.count():
            nn.init.constant_(layer.weight, round)
            store.save(round, layer)
            print(round, flush=True)
        """
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    for rounds in (1, 3, 8):
        process = subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True, env=environment
        )
        while int(process.stdout.readline()) < rounds:
            pass
        process.kill()
        process.wait()
        store = Store(tmp_path, "run")
        newest = store.rounds()[-1]
        layer = nn.Linear(300, 300)
        store.load(newest, layer)
        assert newest >= rounds and torch.equal(layer.weight, torch.full((300, 300), float(newest)))


def test_a_start_makes_folders_for_their_owner_alone_and_removes_states_and_halves_of_them_only(tmp_path):
    folder = tmp_path / "peer" / "runs" / "a"
    store = Store(folder, "a")
    assert store.rounds() == []
    store.begin()
    assert [path.stat().st_mode & 0o777 for path in (folder, *folder.parents)][:3] == [0o700] * 3

    store.save(1, model(1.0))
    for name in ("key.json", "round-000001.txt", "a.partial"):
        (folder / name).write_text("x")
    store.begin()

    assert {path.name for path in folder.iterdir()} == {"key.json", "round-000001.txt"}
    (folder / "round-000007.safetensors").write_bytes(b"")
    assert store.rounds() == [7] and store.latest(before=8) == 7
    with pytest.raises(StateError):
        store.latest(before=7)


def test_what_a_damaged_state_was_trained_on_is_an_error_that_names_its_round(tmp_path):
    store = Store(tmp_path, "run")
    store.begin()
    for round in range(2):
        store.save(round, model(1.0), trained=Trained())
    path = tmp_path / "round-000001.safetensors"
    path.write_bytes(path.read_bytes()[:5])

    with pytest.raises(StateError, match="cannot read the state of round 1 in"):
        store.trained(before=2)
