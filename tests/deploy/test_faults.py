"""What really happens to real peers: each fault costs its round at most the time it may take, and no peer its state."""

import contextlib
import resource
import signal
import time
from collections.abc import Callable, Iterator

import psutil
import pytest
from deployed import Federated, Run, learned
from processes import still_running
from safetensors import safe_open

from experiments.deploy import trial

pytestmark = [pytest.mark.flower, pytest.mark.timeout(1800)]

CUT_SECONDS = 30.0


@pytest.fixture(scope="module")
def share(federation, tmp_path_factory) -> Iterator[Callable[[], Run]]:
    """Give a run that goes on and on, in which all peers take part; faults come one after another."""
    runs: list[Run] = []

    def running() -> Run:
        if not runs or runs[-1].reason is not None:
            folder = tmp_path_factory.mktemp("long") / "run"
            runs.append(federation.run(folder, rounds=2000, round_timeout=round_seconds(federation), strategy="gossip"))
        run = runs[-1]
        since = run.closed() + 1
        run.wait_until(lambda: all(run.row(f"peer-{i}", "ok", since=since) for i in range(3)))
        return run

    yield running
    if runs and runs[-1].reason is None:
        runs[-1].stop()


def round_seconds(federation: Federated) -> float:
    """Return how long a round may take: a peer that a fault hit costs that, one of a busy machine's must not be hit."""
    return float(max(30, 2 * round(federation.start_seconds)))


def saved(federation: Federated, name: str) -> dict[int, bytes]:
    """Return the states of the newest run on a peer's disk, by round; each one can be read."""
    found = {}
    newest = max(federation.state(name).glob("runs/*/"), key=lambda folder: folder.stat().st_mtime)
    for path in newest.glob("round-*.safetensors"):
        with contextlib.suppress(FileNotFoundError):  # an old one, removed meanwhile
            found[int(path.stem.removeprefix("round-"))] = path.read_bytes()
            with safe_open(path, framework="numpy") as file:
                assert list(file.keys())
    return found


def goes_on_without(run: Run, name: str, *, since: int, rounds: int = 2) -> None:
    """Wait until some rounds have closed without a peer; the others answered in each of them."""
    run.wait_until(lambda: run.closed() >= since + rounds)
    others = [row for row in run.rows() if row["peer"] != name and since < row["round"] <= since + rounds]
    assert len(others) >= rounds and {row["status"] for row in others} <= {"ok"}, others


def comes_back(run: Run, name: str, *, since: int, meanwhile: Callable[[], object] = lambda: None) -> None:
    """Wait until a peer answers well again."""

    def back() -> bool:
        meanwhile()
        return run.row(name, "ok", since=since) is not None

    run.wait_until(back)


def server_app(federation: Federated) -> psutil.Process:
    """Return the process of the ServerApp."""
    superlink = psutil.Process(federation.process("superlink").pid)
    (found,) = (p for p in superlink.children(recursive=True) if "flwr-serverapp" in " ".join(p.cmdline()[:3]))
    return found


def test_a_run_goes_on_after_its_serverapp_and_then_the_superlink_were_killed(federation, tmp_path):
    """It ends with what an uninterrupted one learns. It comes first: the faults below share a run that is under way."""
    settings = {"strategy": "averaged", "rounds": 3}
    folder = tmp_path / "run"
    first = federation.run(folder, **settings)
    first.wait_for("round   0/3")
    server_app(federation).kill()
    first.stop()  # Flower itself notices after a minute
    closed = first.closed()
    assert closed < 3

    second = federation.run(folder, resume=str(folder), **settings)
    second.wait_for(f"resumed after round {closed}")
    second.wait_until(lambda: second.closed() > closed)
    orphan = server_app(federation)
    psutil.Process(federation.process("superlink").pid).kill()
    assert second.end() != ""
    with contextlib.suppress(psutil.NoSuchProcess):  # it may outlive its SuperLink, and holds its folder then
        orphan.kill()
    assert still_running([orphan], seconds=60) == []
    closed = second.closed()
    assert closed < 3

    trial.start_superlink(federation.deployment)
    federation.wait_until_connected()
    third = federation.run(folder, resume=str(folder), **settings)

    assert third.end() == ""
    assert any(f"resumed after round {closed}" in line for line in third.said)
    uninterrupted = federation.simulated(tmp_path / "simulated", **settings).rows()
    assert learned(third.rows()) == learned(uninterrupted)


def test_a_full_disk_is_an_error_that_leaves_the_state_as_it_was(share, federation):
    run, worker = share(), federation.worker("peer-1")
    worker.rlimit(psutil.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
    run.wait_until(lambda: run.row("peer-1", "error"))
    before, failed = saved(federation, "peer-1"), run.row("peer-1", "error")
    goes_on_without(run, "peer-1", since=failed["round"], rounds=1)
    after = saved(federation, "peer-1")

    worker.rlimit(psutil.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    comes_back(run, "peer-1", since=failed["round"])
    assert f"cannot write the state of round {failed['round']} to" in failed["error"]
    assert failed["round"] not in after
    assert after == before
    assert federation.worker("peer-1") == worker


def test_a_peer_that_hangs_costs_the_others_one_round_and_comes_back(share, federation):
    run, worker = share(), federation.worker("peer-1")
    worker.send_signal(signal.SIGSTOP)
    before, since = saved(federation, "peer-1"), run.closed()
    run.wait_until(lambda: run.row("peer-1", "late", since=since))

    late, held = run.row("peer-1", "late", since=since), saved(federation, "peer-1")
    goes_on_without(run, "peer-1", since=late["round"])

    comes_back(run, "peer-1", since=late["round"] + 1)
    assert late["error"].startswith(f"no answer within {round_seconds(federation):g} s")
    assert held == before
    assert federation.worker("peer-1") != worker  # the one that hung was ended


def test_a_killed_supernode_comes_back_from_its_last_state(share, federation):
    run = share()
    psutil.Process(federation.process("peer-1").pid).kill()
    since = run.closed()
    run.wait_until(lambda: run.row("peer-1", "late", since=since))
    late = run.row("peer-1", "late", since=since)
    goes_on_without(run, "peer-1", since=late["round"])
    assert max(saved(federation, "peer-1")) in (
        late["round"],
        late["round"] - 1,
    )  # killed after it was written: unheard

    def supervise() -> None:
        if not federation.process("peer-1").lives():
            federation.start_supernode("peer-1")

    comes_back(run, "peer-1", since=late["round"] + 1, meanwhile=supervise)


def test_a_line_that_is_cut_for_30_seconds_costs_the_others_one_round(share, federation):
    """Where a network namespace can be made, its cable is pulled: no packet and no reset arrives."""
    run, line = share(), federation.line
    began = time.monotonic()
    line.cut()
    try:
        since = run.closed()
        run.wait_until(lambda: run.row("peer-0", "late", since=since))
        late = run.row("peer-0", "late", since=since)
        goes_on_without(run, "peer-0", since=late["round"])
        run.wait_until(lambda: time.monotonic() > began + CUT_SECONDS)
        state = saved(federation, "peer-0")
    finally:
        line.mend()

    comes_back(run, "peer-0", since=late["round"] + 1)
    assert max(state) in (late["round"], late["round"] - 1)
    assert run.reason is None
