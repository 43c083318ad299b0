"""The counter at which mail is handed in and answers are picked up."""

import math

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from local_grid import LocalGrid

from fedkd.wire.messages import Answer, Letter, Mail, Packed, pack_answer, wire_bytes
from strategies.relay.mailbox import Mailbox
from strategies.relay.post import Post
from strategies.relay.window import Window

LETTER = Letter("peer", 0, Packed.of({"logits": np.zeros((5, 3), np.float32)}))
LEARN = Mail("learn", 1, {}, letters=(LETTER,))
KNOWLEDGE = Packed.of({"logits": np.ones((4, 3), np.float32)})


class Grid(LocalGrid):
    """Nodes that answer what ``content`` says, by partition."""

    def __init__(self, nodes, path, content=None, **answer):
        app = ClientApp()
        app.train("mail")(lambda message, context: Message(self.content(message), reply_to=message))
        super().__init__(app, nodes, path)
        answer = {"peer": "north", "round": 1, "arrays": KNOWLEDGE, **answer}
        self.content = content or (lambda message: pack_answer(Answer(**answer)))


class Listening(Window):
    def __init__(self, size):
        super().__init__(size)
        self.waits, self.quiet = [], 0

    def heard(self, waited):
        self.waits.append(waited)

    def nothing_heard(self):
        self.quiet += 1


def sent(grid, mail=LEARN, **options):
    post = Post(grid, time_to_live=60.0, **options)
    post.send(dict.fromkeys(post.nodes(), mail))
    return post


def test_an_answer_comes_with_its_mail_its_bytes_and_its_time(tmp_path):
    grid = Grid(2, tmp_path)
    post = sent(grid)

    receipts = post.next(deadline=math.inf)

    assert [receipt.node for receipt in receipts] == post.nodes() == sorted(grid.get_node_ids())
    for receipt, message, reply in zip(receipts, grid.sent, grid.replies, strict=True):
        assert receipt.mail is LEARN and receipt.error == "" and receipt.answer.peer == "north"
        assert receipt.bytes_down == wire_bytes(message.content) > 60
        assert receipt.bytes_up == wire_bytes(reply.content) > 48
        assert 0 <= receipt.seconds < 600
    assert post.bytes_down == sum(receipt.bytes_down for receipt in receipts)
    assert post.bytes_up == sum(receipt.bytes_up for receipt in receipts)
    assert post.busy() == set() and post.next(deadline=math.inf) == []  # nobody owes one: nothing to wait for


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (lambda message: RecordDict({"other": ConfigRecord({"a": 1})}), "answer"),
        (
            lambda message: pack_answer(Answer("north", 2, arrays=KNOWLEDGE)),
            "answer to round 1, but got one to round 2",
        ),
        (
            lambda message: pack_answer(Answer("north", 0, arrays=KNOWLEDGE)),
            "answer to round 1, but got one to round 0",
        ),
    ],
)
def test_what_is_no_answer_to_the_mail_is_none_and_its_bytes_count(tmp_path, content, complaint):
    grid = Grid(1, tmp_path, content)

    (receipt,) = sent(grid).next(deadline=math.inf)

    assert receipt.answer is None and complaint in receipt.error
    assert receipt.bytes_up == wire_bytes(grid.replies[0].content)
    assert receipt.bytes_down == wire_bytes(grid.sent[0].content)


def test_a_peer_that_refuses_its_mail_says_why_whatever_round_it_is_in(tmp_path):
    (receipt,) = sent(Grid(1, tmp_path, round=0, arrays=Packed.of({}), error="no state")).next(deadline=math.inf)

    assert receipt.error == "no state" and receipt.answer is not None


def test_an_error_of_flowers_is_told_with_its_reason_and_owes_nothing(tmp_path):
    grid = Grid(1, tmp_path)

    def broken(partition, message):
        raise RuntimeError("power cut")

    grid.fault = broken
    post = sent(grid)
    (receipt,) = post.next(deadline=math.inf)

    assert receipt.error == "Flower error 2: power cut" and receipt.answer is None
    assert receipt.bytes_up == post.bytes_up == 0 < receipt.bytes_down
    assert post.busy() == set()


def test_a_peer_that_owes_an_answer_gets_no_other_mail_and_what_it_owes_is_known(tmp_path):
    grid = Grid(2, tmp_path)
    grid.silent = {1}
    post = sent(grid)
    (first, silent), size = post.nodes(), wire_bytes(grid.sent[1].content)
    assert [one.node for one in post.next(deadline=math.inf)] == [first]

    with pytest.raises(ValueError, match=rf"\[{silent}\] still owe a reply"):
        post.send({first: LEARN, silent: LEARN})

    assert len(grid.sent) == 2 and post.busy() == {silent}
    assert (post.owed(silent, 1), post.owed(silent, 2), post.owed(first, 1)) == (size, 0, 0)
    assert post.next(deadline=0.0) == []  # its time is over, and nothing came
    grid.deliver(grid.sent[1], Message(pack_answer(Answer("late", 1)), reply_to=grid.sent[1]))
    (late,) = post.next(deadline=math.inf)
    assert (late.node, late.answer.peer) == (silent, "late") and post.owed(silent, 1) == 0


def test_what_comes_late_from_others_is_handed_out_beside_what_is_awaited(tmp_path):
    grid = Grid(3, tmp_path)
    grid.silent = {0}
    post = sent(grid)
    nodes = post.nodes()
    assert {one.node for one in post.receive(nodes, deadline=0.0)} == set(nodes[1:])

    grid.silent = set()
    grid.deliver(grid.sent[0], Message(pack_answer(Answer("late", 1)), reply_to=grid.sent[0]))
    post.send({nodes[1]: LEARN})
    found = [(one.node, one.answer.peer) for one in post.receive({nodes[1]}, deadline=math.inf)]

    assert sorted(found) == [(nodes[0], "late"), (nodes[1], "north")]


def test_a_message_that_flower_does_not_take_costs_no_bytes_and_no_time(tmp_path):
    for ids in ([], [""], ["a", "b"]):
        grid = Grid(1, tmp_path)
        grid.push_messages = lambda messages, ids=ids: ids
        post = sent(grid)
        (lost,) = post.next(deadline=math.inf)
        assert (lost.error, lost.bytes_down, lost.bytes_up) == ("Flower did not take the message", 0, 0)
        assert math.isnan(lost.seconds) and post.bytes_down == 0 and post.busy() == set()


@pytest.mark.parametrize(("size", "heard"), [(3, False), (2, True), (1, True)])
def test_a_window_hears_how_long_mails_wait_only_where_it_is_full(tmp_path, size, heard):
    """Where there is room left, that answers come soon says nothing of how many actors there are."""
    window = Listening(size)

    sent(Grid(2, tmp_path, metrics={"seconds": -100.0}), window=window).next(deadline=math.inf)

    assert bool(window.waits) == heard
    assert all(100 <= waited < 700 for waited in window.waits)  # since the push, less what the peer says it worked


def test_of_answers_that_do_not_say_how_long_they_worked_nothing_is_learned(tmp_path):
    window = Listening(1)
    sent(Grid(1, tmp_path), window=window).next(deadline=math.inf)
    assert window.waits == []


def test_room_is_what_the_window_has_beyond_what_is_under_way_and_waits(tmp_path):
    grid = Grid(6, tmp_path)
    grid.silent = set(range(6))
    post = Post(grid, time_to_live=60.0, window=Window(4))
    nodes, rooms = post.nodes(), []
    for node in nodes:
        rooms.append(post.room())
        post.send({node: LEARN})

    assert rooms == [4, 3, 2, 1, 0, 0] and post.room() == 0
    assert len(grid.sent) == 4 and post.busy() == set(nodes)
    post.recall()
    assert post.busy() == set(nodes[:4])


def test_after_long_silence_one_more_mail_is_under_way_each_time(tmp_path, monkeypatch):
    monkeypatch.setattr("strategies.relay.post.QUIET", 0.0)
    grid = Grid(2, tmp_path)
    grid.silent = {0, 1}
    window = Listening(2)
    post = sent(grid, window=window)

    assert post.next(deadline=0.0) == [] and window.quiet == 1


class Clock:
    """Time that passes in sleep alone."""

    def __init__(self):
        self.now, self.pauses, self.at = 1000.0, [], []

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.pauses.append(seconds)
        self.now += seconds
        for due, act in list(self.at):
            if self.now >= due:
                self.at.remove((due, act))
                act()


def test_an_answer_is_waited_for_until_the_deadline_and_looked_for_less_and_less_often(tmp_path, monkeypatch):
    clock = Clock()
    monkeypatch.setattr("strategies.relay.post.time", clock)
    grid = Grid(1, tmp_path)
    grid.silent = {0}
    post = sent(grid)

    assert post.next(deadline=clock.now + 60.0) == []

    assert clock.now == pytest.approx(1060.0)
    assert clock.pauses[:-1] == sorted(clock.pauses[:-1]) and clock.pauses[0] < clock.pauses[-2] < 1
    reply = Message(pack_answer(Answer("late", 1)), reply_to=grid.sent[0])
    clock.at = [(clock.now + 29.5, lambda: grid.deliver(grid.sent[0], reply))]
    (late,) = post.next(deadline=clock.now + 30.0)
    assert late.answer.peer == "late" and late.seconds == pytest.approx(clock.now - 1000.0)
    assert clock.now < 1060.0 + 30.0 + 1e-6


def test_a_window_hears_of_the_answer_that_waited_least(tmp_path):
    """The others may have been behind it: that one tells whether an actor was idle."""
    window = Listening(2)
    grid = Grid(2, tmp_path, lambda message: pack_answer(Answer("p", 1, metrics={"seconds": next(worked)})))

    for order in ((-100.0, -5000.0), (-5000.0, -100.0)):
        worked = iter(order)
        sent(grid, window=window).next(deadline=math.inf)

    assert len(window.waits) == 2 and all(100 <= waited < 700 for waited in window.waits)


def test_a_mailbox_counts_answers_from_none():
    mailbox = Mailbox()
    assert mailbox.updates == 0
    mailbox.put(3, LETTER)
    mailbox.updates += 2
    assert mailbox.updates_since(3) == 2
