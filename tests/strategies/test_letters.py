"""What the relay puts into a peer's mail: whose knowledge, how old it may be, and how much it weighs."""

import numpy as np
import pytest
from federation import federate
from hypothesis import given
from hypothesis import strategies as st

from fedkd.settings.config import RunConfig
from fedkd.wire.codecs import BadKnowledge, codec
from fedkd.wire.features import encode_features
from fedkd.wire.messages import Answer, Letter, Packed
from strategies.averaged import Averaged
from strategies.relay.mailbox import Mailbox

CLASSES = 3


def strategy(peers, **settings):
    changed = {name.replace("_", "-"): value for name, value in settings.items()}
    return Averaged(RunConfig.from_mapping({"proxy-size": 4, **changed}), peers, CLASSES)


def letter(peer, round):
    return Letter(f"peer-{peer}", round, Packed.of(codec("fp32").encode(np.full((4, CLASSES), peer, np.float32))))


def mailbox(*rounds):
    """A letter of each peer, sent at the end of these rounds; None: it never sent one."""
    box = Mailbox()
    for peer, round in enumerate(rounds):
        if round is not None:
            box.put(peer, letter(peer, round))
    return box


def heard(letters):
    return {one.sender: one.weight for one in letters}


@given(
    rounds=st.lists(st.integers(0, 11), min_size=2, max_size=5),
    staleness=st.integers(0, 4),
    decay=st.sampled_from([0.0, 0.25, 0.5, 1.0]),
)
def test_knowledge_weighs_less_with_each_round_of_its_age_and_nothing_beyond_the_oldest(rounds, staleness, decay):
    made = strategy(len(rounds), max_staleness=staleness, staleness_decay=decay)

    found = heard(made.letters(0, 10, mailbox(*rounds)))

    for peer, sent in enumerate(rounds[1:], start=1):
        # What was sent at the end of round 9 is what round 10 is to learn from; nobody is ahead and weighs more for it.
        late = 9 - min(sent, 9)
        expected = decay**late if late <= staleness else 0.0
        assert found.get(f"peer-{peer}", 0.0) == expected
    assert "peer-0" not in found and all(found.values())


@given(rounds=st.lists(st.integers(0, 3), min_size=2, max_size=5), staleness=st.integers(0, 9))
def test_of_knowledge_on_another_subset_of_the_proxy_set_nothing_can_be_learned(rounds, staleness):
    made = strategy(len(rounds), max_staleness=staleness, proxy_per_round=4)

    found = heard(made.letters(0, 4, mailbox(*rounds)))

    assert found == {f"peer-{peer}": 1.0 for peer, sent in enumerate(rounds) if peer and sent == 3}


def test_peers_that_exchange_a_subset_of_the_proxy_set_hear_all_fresh_knowledge(tmp_path):
    run = federate(tmp_path, 3, proxy_per_round=20)

    learned = [row for row in run.rows() if row["round"] > 0]
    assert len(learned) == 6
    for row in learned:
        assert set(row["teachers"]) == {"peer-0", "peer-1", "peer-2"} - {row["peer"]}
        assert row["kd_loss"] > 0


@given(
    peers=st.integers(2, 6),
    staleness=st.integers(0, 3),
    answers=st.lists(st.integers(0, 5), max_size=40),
)
def test_without_rounds_knowledge_ages_by_one_with_as_many_answers_as_there_are_peers(peers, staleness, answers):
    made = strategy(peers, strategy="gossip", mode="async", max_staleness=staleness, staleness_decay=0.5, updates=99)
    box, since = mailbox(*[0] * peers), dict.fromkeys(range(peers), 0)
    for count, author in enumerate((one % peers for one in answers), start=1):
        box.put(author, letter(author, count))
        box.updates += 1
        since = {peer: 1 if peer == author else others + 1 for peer, others in since.items()}

    found = heard(made.letters(0, 1, box))

    assert box.updates == len(answers)
    for peer in range(1, peers):
        laps = max(lap for lap in range(len(answers) + 1) if lap * peers <= since[peer])
        assert found.get(f"peer-{peer}", 0.0) == (2.0**-laps if laps <= staleness else 0.0)


def test_who_has_sent_nothing_is_not_heard_and_older_knowledge_never_replaces_newer():
    box = mailbox(2, None, 2)
    box.put(2, letter(2, 1))

    assert heard(strategy(3).letters(0, 3, box)) == {"peer-2": 1.0}
    assert [(peer, one.round) for peer, one in box] == [(0, 2), (2, 2)] and len(box) == 2
    box.updates += 5
    box.put(2, letter(2, 1))
    assert box.updates_since(2) == 5
    box.put(2, letter(2, 2))  # a round that is answered again, by a peer that came back
    assert box.updates_since(2) == 0


def answer(arrays):
    return Answer("peer-0", 1, arrays=Packed.of(arrays))


@pytest.mark.parametrize("sent", [0, 1, 2])
def test_features_travel_only_under_information_flow_and_of_no_more_layers_than_were_chosen(sent):
    logits = codec("fp32").encode(np.zeros((4, CLASSES), np.float32))
    arrays = {**logits, **encode_features([np.ones((4, 2), np.float32)] * sent)}
    flow = {"method": "infoflow", "flow_dimensions": 2}

    for made, most in [
        (strategy(3), 0),
        (strategy(3, flow_depth=1, **flow), 1),
        (strategy(3, flow_layers="a,b", flow_depth=1, **flow), 2),
    ]:
        if sent <= most:
            made.check(answer(arrays))
        else:
            with pytest.raises(BadKnowledge, match=f"at most {most} layers, but got {sent}"):
                made.check(answer(arrays))


def test_one_peer_alone_has_no_topology_and_hears_nobody():
    alone = strategy(1)

    assert alone.topology is None and alone.neighbours(0, 1) == () and alone.letters(0, 1, mailbox(0)) == ()
