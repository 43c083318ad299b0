"""What a relay remembers of a run: what was written comes back, or the file is refused."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedkd.wire.messages import Letter, Packed
from strategies.relay.ledger import Ledger, LedgerError
from strategies.relay.mailbox import SERVER

ARRAYS = st.dictionaries(
    st.sampled_from(["logits", "layer/0.weight", "flow.0"]),
    hnp.arrays(
        st.sampled_from([np.dtype("<f4"), np.dtype("u1"), np.dtype("<f2")]), hnp.array_shapes(max_dims=2, max_side=3)
    ),
    max_size=3,
)


def facts(ledger):
    letters = [
        (
            index,
            one.sender,
            one.round,
            {name: (array.dtype, array.tolist()) for name, array in sorted(one.arrays.items())},
        )
        for index, one in ledger.mailbox
    ]
    numbers = ledger.round, sorted(ledger.started), ledger.bytes_up, ledger.bytes_down, ledger.seconds, ledger.elapsed
    return repr((letters, numbers))


@given(
    letters=st.dictionaries(
        st.integers(SERVER, 12), st.tuples(st.text(max_size=5), st.integers(0, 9), ARRAYS), max_size=4
    ),
    numbers=st.tuples(st.integers(-1, 99), st.integers(0, 2**50), st.integers(0, 2**50)),
    started=st.sets(st.integers(0, 12)),
    seconds=st.lists(st.floats(0, 1e6), max_size=4),
)
def test_a_ledger_comes_back_as_it_was_written(tmp_path_factory, letters, numbers, started, seconds):
    folder = tmp_path_factory.mktemp("ledger")
    written = Ledger(
        numbers[0], started=started, bytes_up=numbers[1], bytes_down=numbers[2], seconds=seconds, elapsed=2.5
    )
    for index, (sender, round, arrays) in letters.items():
        written.mailbox.put(index, Letter(sender, round, Packed.of(arrays)))

    written.save(folder)
    read = Ledger.load(folder)

    assert facts(read) == facts(written)
    assert [path.name for path in folder.iterdir()] == ["relay.safetensors"]


def test_where_no_round_has_closed_nothing_is_known(tmp_path):
    ledger = Ledger.load(tmp_path)

    assert ledger.round < 0 and not ledger.started and len(ledger.mailbox) == 0
    assert ledger.bytes_up == ledger.bytes_down == ledger.elapsed == 0 and ledger.seconds == []


def test_a_ledger_that_was_cut_off_is_refused_by_its_name(tmp_path):
    ledger = Ledger(round=3)
    ledger.mailbox.put(0, Letter("north", 3, Packed.of({"logits": np.ones((2, 2), np.float32)})))
    ledger.save(tmp_path)
    whole = (tmp_path / "relay.safetensors").read_bytes()

    for length in (0, 7, len(whole) // 2, len(whole) - 1):
        (tmp_path / "relay.safetensors").write_bytes(whole[:length])
        with pytest.raises(LedgerError, match=r"cannot read .*relay.safetensors"):
            Ledger.load(tmp_path)
