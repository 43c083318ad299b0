"""What keeps a run of many peers within bounds: knowledge held once, and few mails under way."""

import math

import pytest
from federation import federate, local_grid
from flwr.app import Message
from flwr.clientapp import ClientApp
from local_grid import LocalGrid

from experiments.launch.runner import Federation
from fedkd.errors import SettingError
from fedkd.results.folder import PeerSummary, Row, Summary
from fedkd.results.picture import accuracy_png
from fedkd.settings.config import RunConfig
from fedkd.wire.messages import PEER_MESSAGE, Answer, Mail, pack_answer, pack_mail, unpack_answer
from strategies.relay.console import round_line, summary_table
from strategies.relay.introductions import introduce
from strategies.relay.post import Post
from strategies.relay.window import Window

PEERS = 5


def letters(run, name):
    """The bytes of an array in every letter of round 1, as objects."""
    mails = [
        m.content for m in run.grid.sent if (m.content["mail"]["kind"], m.content["mail"]["round"]) == ("learn", 1)
    ]
    return [content[key][name].data for content in mails for key in content if key.startswith("letter.")]


@pytest.mark.parametrize(("settings", "name"), [({}, "logits"), ({"sealed": True}, "sealed")])
def test_knowledge_is_held_once_however_many_hear_it(tmp_path, settings, name):
    run = federate(tmp_path, PEERS, models="mlp", rounds=1, **settings)

    found = letters(run, name)
    came = [m.content["knowledge"][name].data for m in run.grid.replies if "knowledge" in m.content]
    assert len(found) == PEERS * (PEERS - 1)
    assert {id(data) for data in found} == {id(data) for data in came[:PEERS]}  # the very bytes that came


def test_a_servers_average_is_held_once(tmp_path):
    run = federate(tmp_path, PEERS, models="mlp", rounds=1, strategy="consensus")

    assert len(letters(run, "logits")) == PEERS and len({id(data) for data in letters(run, "logits")}) == 1


class Slow(LocalGrid):
    """A grid whose nodes answer when they are told to."""

    def __init__(self, nodes, path):
        app = ClientApp()
        app.train("mail")(lambda message, context: self.reply(message))
        super().__init__(app, nodes, path)
        self.most = 0

    def reply(self, message):
        return Message(pack_answer(Answer("peer", 1)), reply_to=message)

    def push_messages(self, messages):
        ids = super().push_messages(messages)
        self.most = max(self.most, len(self._waiting))
        return ids


def test_no_more_mail_is_under_way_than_the_window_has_room_for_and_all_of_it_arrives(tmp_path):
    grid = Slow(20, tmp_path)
    post = Post(grid, time_to_live=60.0, window=Window(3))

    mails = dict.fromkeys(post.nodes(), Mail("learn", 1, {}))
    post.send(mails)
    assert post.busy() == mails.keys() and post.room() == 0
    answered = [receipt.node for receipt in post.receive(mails, deadline=math.inf)]

    assert sorted(answered) == post.nodes() and grid.most == 3
    assert post.busy() == set() and post.room() == 3


def test_without_a_bound_all_mail_is_under_way_at_once(tmp_path):
    grid = Slow(20, tmp_path)

    Post(grid, time_to_live=60.0, window=Window.unbounded()).send(
        dict.fromkeys(grid.get_node_ids(), Mail("learn", 1, {}))
    )

    assert grid.most == 20


def test_mail_that_found_no_room_before_the_deadline_is_not_sent_later(tmp_path):
    grid = Slow(6, tmp_path)
    grid.silent = {0, 1}
    post = Post(grid, time_to_live=60.0, window=Window(2))
    nodes = post.nodes()

    mails = dict.fromkeys(nodes, Mail("learn", 1, {}))
    post.send(mails)
    assert list(post.receive(mails, deadline=0.0)) == []

    assert post.busy() == set(nodes[:2]) and len(grid.sent) == 2


def test_peers_that_hang_do_not_keep_the_others_from_their_mail(tmp_path, monkeypatch):
    monkeypatch.setattr("strategies.relay.post.QUIET", 0.0)
    grid = Slow(6, tmp_path)
    grid.silent = {0, 1}
    post = Post(grid, time_to_live=60.0, window=Window(2))
    hanging = set(post.nodes()[:2])
    others = set(post.nodes()) - hanging

    post.send(dict.fromkeys(post.nodes(), Mail("learn", 1, {})))
    answered = {receipt.node for receipt in post.receive(others, deadline=math.inf)}

    assert answered == others and post.busy() == hanging


def test_a_window_follows_the_time_for_which_mails_wait():
    window = Window()
    first = window.size
    window.heard(0.05)
    assert window.size == 2 * first
    for waited, size in ((0.5, 2 * first), (30.0, first), (30.0, first / 2)):
        window.heard(waited)
        assert window.size == size
    for _ in range(20):
        window.heard(30.0)
    assert window.size >= 1

    endless = Window.unbounded()
    endless.heard(30.0)
    assert endless.size == math.inf


def test_between_real_sites_nobody_but_the_user_says_how_many_they_are(tmp_path):
    grid = local_grid(tmp_path, 2)
    post = Post(grid, time_to_live=60.0)
    post.simulated = False
    with pytest.raises(SettingError, match="`peers`"):
        introduce(post, RunConfig(), run="token", state_dir=str(tmp_path))

    assert grid.sent == []


@pytest.mark.parametrize(("simulated", "seconds"), [(True, 24 * 3600), (False, 60)])
def test_mail_expires_only_where_the_work_on_it_ends_too(tmp_path, monkeypatch, simulated, seconds):
    """In a simulation nothing ends it: a peer that were given other mail meanwhile would work on both at once."""
    if not simulated:
        monkeypatch.delattr(LocalGrid, "state")
    grid = Slow(1, tmp_path)

    Post(grid, time_to_live=60.0).send(dict.fromkeys(grid.get_node_ids(), Mail("learn", 1, {})))

    (message,) = grid.sent
    assert message.metadata.ttl >= seconds if simulated else message.metadata.ttl == seconds


def test_a_run_of_many_lists_some_of_its_peers_and_counts_the_others(tmp_path):
    peers = [PeerSummary(f"peer-{i}", "mlp", 10, 20, 0.5, 0.6, 0.5, 0.6) for i in range(200)]
    rows = [Row(t, p.peer, "mlp", [], test_accuracy=0.5, error="broken") for t in (0, 1) for p in peers]

    table = summary_table(Summary(peers)).splitlines()
    line = round_line(1, 1, rows[200:], [1.0, 1.0]).splitlines()
    accuracy_png(tmp_path / "accuracy.png", rows, Summary(peers), title="many")

    assert "and 160 more" in "\n".join(table) and len(table) < 60
    assert len(line) == 42 and line[-1].startswith("and 160 more")
    assert (tmp_path / "accuracy.png").stat().st_size > 1000


def test_peers_that_share_a_simulations_nodes_learn_what_they_would_have_learned_on_their_own(tmp_path):
    own = federate(tmp_path / "own", PEERS, strategy="gossip", fanout=2)
    shared = federate(tmp_path / "shared", grid=local_grid(tmp_path / "shared", 2), seats=PEERS, strategy="gossip",
                      fanout=2)  # fmt: skip

    assert shared.timeless_rows() == own.timeless_rows()
    assert {message.metadata.dst_node_id for message in shared.grid.sent} == set(shared.grid.get_node_ids())


def test_a_shared_node_works_for_one_peer_at_a_time(tmp_path):
    grid = Slow(2, tmp_path)
    post = Post(grid, time_to_live=60.0)
    post.share_nodes(9)

    mails = dict.fromkeys(post.nodes(), Mail("learn", 1, {}))
    post.send(mails)
    answered = [receipt.node for receipt in post.receive(mails, deadline=math.inf)]

    assert sorted(answered) == list(range(9)) and grid.most == 2


def test_a_peer_that_hangs_keeps_its_node_and_no_other(tmp_path):
    grid = Slow(2, tmp_path)
    grid.silent = {0}
    post = Post(grid, time_to_live=60.0)
    post.share_nodes(4)

    post.send(dict.fromkeys(post.nodes(), Mail("learn", 1, {})))
    answered = {receipt.node for receipt in post.receive({1, 2, 3}, deadline=math.inf)}

    assert answered == {1, 2, 3} and post.busy() == {0}


def test_a_mail_that_flower_does_not_take_leaves_its_node_free(tmp_path):
    grid = Slow(1, tmp_path)
    post = Post(grid, time_to_live=60.0)
    post.share_nodes(2)
    taken, grid.push_messages = grid.push_messages, lambda messages: [""]

    post.send({0: Mail("learn", 1, {})})
    (lost,) = post.next(deadline=math.inf)
    grid.push_messages = taken
    post.send({1: Mail("learn", 1, {})})
    (came,) = post.next(deadline=math.inf)

    assert (lost.node, lost.answer) == (0, None) and came.node == 1 and came.answer is not None


def test_no_mail_without_a_barrier_waits_for_a_node(tmp_path):
    grid = Slow(2, tmp_path)
    post = Post(grid, time_to_live=60.0)
    post.share_nodes(9)

    assert post.room() == 2
    post.send({0: Mail("learn", 1, {})})
    assert post.room() == 1


def test_gossip_without_a_barrier_runs_on_shared_nodes(tmp_path):
    run = federate(tmp_path, grid=local_grid(tmp_path, 2), seats=PEERS, strategy="gossip", mode="async", updates=12)

    done = [row for row in run.rows() if row["round"] > 0]
    assert len(done) == 12 and {row["peer"] for row in done} == {f"peer-{i}" for i in range(PEERS)}
    assert all(row["status"] == "ok" for row in done)


def test_nobody_but_a_simulation_seats_a_peer(tmp_path):
    grid = local_grid(tmp_path, 1, node_config={0: {"simulated": False}})

    grid.push_messages(
        [Message(pack_mail(Mail("introduce", 0, {"peers": 9}), seat=4), grid.get_node_ids()[0], PEER_MESSAGE)]
    )

    assert unpack_answer(grid.replies[0].content).peer == "peer-0"


def test_a_large_simulation_has_few_nodes():
    assert "num-supernodes=1000 " in Federation(peers=1000).config()
    assert "num-supernodes=32 " in Federation(peers=1000, actors=2).sharing().config()
    assert "num-supernodes=80 " in Federation(peers=1000, actors=40).sharing().config()
    assert "num-supernodes=6 " in Federation(peers=6, actors=40).sharing().config()
    assert "num-supernodes=1000 " in Federation(peers=1000, ray_address="head:6379").sharing().config()


@pytest.mark.parametrize(("nodes", "peers", "shared"), [(3, 3, []), (2, 4, [4]), (3, 0, [])])
def test_nodes_are_shared_where_there_are_fewer_than_peers(tmp_path, monkeypatch, nodes, peers, shared):
    asked, share = [], Post.share_nodes
    monkeypatch.setattr(Post, "share_nodes", lambda post, count: (asked.append(count), share(post, count))[1])
    federate(tmp_path, nodes, seats=peers, models="mlp", rounds=1)
    assert asked == shared
