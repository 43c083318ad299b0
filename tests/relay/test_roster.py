"""Who takes part, of the peers as they introduced themselves."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedkd.source import source_hash
from fedkd.wire.messages import Answer
from fedkd.wire.sealing import Keys
from strategies.relay.roster import Member, RosterError, expected, member, roster


def facts(**changed):
    said = {
        "source": source_hash(), "source-root": "", "index": 1, "model": "mlp", "parameters": 10, "samples": 20,
        "classes": json.dumps(["a", "b"]), "fingerprint": "f", "proxy-shape": "[9, 4]", "peers": 3, "simulated": 1,
        "held-out": 4, "chosen-unseen": 1,
    }  # fmt: skip
    return {**said, **{name.replace("_", "-"): value for name, value in changed.items()}}


def introduced(**changed):
    return member(7, Answer("north", 0, facts=facts(**changed)))


def peers(count, **changed):
    return [
        Member(i, f"peer-{i}", i, "mlp", 1, 1, ("a", "b"), "f", (9, 4), count, True, **changed) for i in range(count)
    ]


def test_a_member_is_what_it_said():
    said = introduced(index=0, samples=0)

    assert said == Member(7, "north", 0, "mlp", 10, 0, ("a", "b"), "f", (9, 4), 3, True, held_out=4)
    assert said.caveat() == "" and "north" in introduced(chosen_unseen=0).caveat()
    assert not introduced(simulated=0).simulated and introduced().public_key == ""


@pytest.mark.parametrize("name", ["index", "parameters", "samples", "peers", "held_out"])
@pytest.mark.parametrize("value", [-1, 10**18, 1.0, True, "1"])
def test_a_number_that_cannot_be_is_refused_by_its_name(name, value):
    with pytest.raises(
        RosterError, match=f"north introduced itself wrongly: `{name.replace('_', '-')}` is a whole number from 0"
    ):
        introduced(**{name: value})


@pytest.mark.parametrize("classes", ["", "[]", "{}", "[1]", '["a", 2]', '"ab"', "[" * 10**5])
def test_classes_that_are_no_names_are_refused(classes):
    with pytest.raises(RosterError, match="north introduced itself wrongly: "):
        introduced(classes=classes)


@pytest.mark.parametrize("shape", ["", "[]", "{}", "9", "[0, 4]", "[9.5]", "[true]", "[" * 10**5])
def test_a_proxy_set_of_no_shape_is_refused(shape):
    with pytest.raises(RosterError, match="north introduced itself wrongly: "):
        introduced(proxy_shape=shape)


def test_other_code_is_refused_with_where_it_lies_if_that_was_said():
    with pytest.raises(RosterError, match="north runs other code than the relay: abc, here"):
        introduced(source="abc")
    with pytest.raises(RosterError, match="north runs other code than the relay: abc from /opt/old, here"):
        introduced(source="abc", source_root="/opt/old")


def test_where_mail_is_sealed_a_member_has_a_key_that_mail_can_be_sealed_for():
    key = Keys.generate().public_bytes.hex()

    assert member(1, Answer("north", 0, facts=facts(public_key=key)), sealed=True).public_key == key
    for wrong in ({}, {"public_key": "00" * 32}, {"public_key": key[:-2]}):
        with pytest.raises(RosterError, match="`public-key`"):
            member(1, Answer("north", 0, facts=facts(**wrong)), sealed=True)


@given(st.permutations(range(5)))
def test_members_come_out_in_the_order_of_their_numbers_however_they_came_in(order):
    everyone = peers(5)
    assert roster([everyone[i] for i in order]) == everyone


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda m: [], "no peer takes part"),
        (lambda m: [m[0], m[1], replace(m[2], name="peer-1")], "two peers share the name peer-1: peer-1, peer-1"),
        (lambda m: [m[0], m[1], replace(m[2], index=1)], "two peers share the index 1: peer-1, peer-2"),
        (lambda m: [m[0], m[1], replace(m[2], index=3)], "3 peers need the indices 0 to 2 .*peer-2 has 3"),
        (lambda m: [m[0], replace(m[1], fingerprint="g"), m[2]], "peer-1's proxy set g differ from the others' f"),
        (
            lambda m: [m[0], replace(m[1], proxy_shape=(9, 1, 8, 8), fingerprint="g"), m[2]],
            r"peer-1's proxy set \(9, 1, 8, 8\) differ from the others' \(9, 4\)",
        ),
        (lambda m: [replace(m[0], classes=("b", "a")), *m[1:]], r"peer-0's classes \('b', 'a'\) differ .*\('a', 'b'\)"),
    ],
)
def test_peers_that_do_not_fit_one_another_are_named(spoil, complaint):
    with pytest.raises(RosterError, match=complaint) as refused:
        roster(spoil(peers(3)))
    assert len(str(refused.value).split(";")) == 1


def test_of_two_names_that_come_twice_the_first_and_its_peers_are_named():
    """Sorted by name, whatever the order in which they came."""
    one, two, three, four = peers(4)
    with pytest.raises(RosterError, match=r"^two peers share the index 0: peer-0, peer-2$"):
        roster([replace(two, index=1), one, replace(three, index=0), replace(four, index=1)])


def test_every_peer_that_differs_is_named_and_nobody_else():
    odd = [
        replace(m, fingerprint="g" * (m.index == 1) or "f", classes=("z",) if m.index == 4 else m.classes)
        for m in peers(5)
    ]

    with pytest.raises(RosterError) as refused:
        roster(odd)

    said = str(refused.value).split("; ")
    assert [line.split("'s ")[0] for line in said] == ["peer-1", "peer-4"]


@given(st.lists(st.integers(1, 4), min_size=1, max_size=8))
def test_as_many_are_awaited_as_most_say_and_a_tie_makes_nobody_wait(said):
    members = [replace(m, expected=count) for m, count in zip(peers(len(said)), said, strict=True)]

    found = expected(members)

    assert all((said.count(found), -found) >= (said.count(other), -other) for other in said)
    assert expected([]) == 0


def test_a_long_word_of_a_peers_is_shown_in_part():
    with pytest.raises(RosterError) as refused:
        introduced(index="9" * 5000)
    assert "9" * 100 in str(refused.value) and len(str(refused.value)) < 1000
