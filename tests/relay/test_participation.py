"""Who takes part in a round."""

import math
from fractions import Fraction

from hypothesis import given
from hypothesis import strategies as st

from strategies.relay.participation import participants


@given(peers=st.integers(1, 60), percent=st.integers(1, 100), round=st.integers(1, 9), seed=st.integers(0, 99))
def test_so_many_take_part_as_the_share_rounds_up_to(peers, percent, round, seed):
    drawn = participants(peers, percent / 100, seed=seed, round=round)

    assert len(drawn) == math.ceil(Fraction(percent * peers, 100)) and drawn <= set(range(peers))
    assert drawn == participants(peers, percent / 100, seed=seed, round=round)
    assert participants(peers, percent / 100, seed=seed, round=0) == set(range(peers))


@given(busy=st.sets(st.integers(0, 9), max_size=10), percent=st.integers(1, 100), round=st.integers(0, 3))
def test_who_still_owes_an_answer_is_asked_nothing_and_others_take_its_place(busy, percent, round):
    drawn = participants(10, percent / 100, seed=1, round=round, busy=busy)

    asked = 10 if round == 0 else math.ceil(Fraction(percent, 10))
    assert len(drawn) == min(asked, 10 - len(busy)) and not drawn & busy


def test_over_many_rounds_everyone_takes_part_about_as_often():
    counts = [0] * 8
    for round in range(1, 2001):
        for peer in participants(8, 0.25, seed=3, round=round):
            counts[peer] += 1

    deviation = math.sqrt(2000 * 0.25 * 0.75)
    assert all(abs(count - 500) < 4 * deviation for count in counts)
    assert participants(100, 0.3, seed=3, round=1) != participants(100, 0.3, seed=4, round=1)
