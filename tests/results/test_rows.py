"""What a run writes of its rounds, read again; and means over peers that may lack a number."""

import json
import math
from dataclasses import fields, replace
from importlib import metadata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedkd.results.folder import PeerSummary, Row, RunFolder, Summary, environment, mean, read_row, row_line
from fedkd.wire.messages import Answer
from strategies.relay.rounds import same_said_once

NUMBERS = st.floats(allow_nan=True, allow_infinity=False)
KINDS = {"float": NUMBERS, "int": st.integers(0, 2**50), "str": st.text(max_size=8)}


def kind(of):
    return getattr(of.type, "__name__", of.type)


ROWS = st.builds(
    Row, teachers=st.lists(st.text(max_size=5), max_size=3),
    **{f.name: KINDS[kind(f)] for f in fields(Row) if kind(f) in KINDS},
)  # fmt: skip
PLAIN = Row(1, "north", "mlp", ["south"], test_accuracy=0.5)


@given(ROWS)
def test_a_row_comes_back_as_it_was_written_and_is_one_line(row):
    line = row_line(row)

    assert line.endswith("\n") and "\n" not in line[:-1] and "NaN" not in line
    assert repr(read_row(line)) == repr(row)


@given(ROWS)
def test_a_number_that_is_infinite_is_none(row):
    assert math.isnan(read_row(row_line(replace(row, kd_loss=math.inf))).kd_loss)


@pytest.mark.parametrize(
    "change",
    [{"round": 1.5}, {"round": "1"}, {"peer": 3}, {"test_accuracy": "0.5"}, {"bytes_up": None}, {"status": None},
     {"colour": "red"}, {"round": True}],
)  # fmt: skip
def test_what_is_no_row_is_refused(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        read_row(json.dumps({**json.loads(row_line(PLAIN)), **change}))


def test_a_wrong_number_is_named_with_its_own_value():
    with pytest.raises(ValueError, match=r"unexpected (round = 'one'|bytes_up = 'many')$"):
        read_row(json.dumps({**json.loads(row_line(PLAIN)), "round": "one", "bytes_up": "many"}))


def test_who_says_nothing_of_bytes_letters_and_what_it_holds_out_has_none():
    assert (PLAIN.bytes_up, PLAIN.bytes_down, PLAIN.refused_letters) == (0, 0, 0)
    assert peer("a", 0.5, 0.5).held_out == 0


def test_a_package_that_is_missing_costs_no_others_version(monkeypatch):
    known = environment()["versions"]
    version = metadata.version

    def without_ray(package):
        if package == "ray":
            raise metadata.PackageNotFoundError(package)
        return version(package)

    monkeypatch.setattr(metadata, "version", without_ray)
    assert environment()["versions"] == {name: value for name, value in known.items() if name != "ray"}


@pytest.mark.parametrize("line", ["[]", "3", "null", "{}", '{"round": 1}', "{"])
def test_a_line_that_lacks_what_a_row_has_is_refused(line):
    with pytest.raises(ValueError, match=r"expected a row|Expecting"):
        read_row(line)


@given(st.lists(st.one_of(st.floats(-1e6, 1e6), st.sampled_from([math.nan, math.inf, -math.inf])), max_size=9))
def test_a_mean_is_over_the_numbers_that_there_are(values):
    there = [value for value in values if math.isfinite(value)]

    assert mean(values) == pytest.approx(math.fsum(there) / len(there)) if there else math.isnan(mean(values))


def peer(name, before, after, isolated=math.nan):
    return PeerSummary(name, "mlp", 1, 1, before, after, before, after, isolated)


def test_gains_are_over_the_peers_that_have_both_numbers():
    peers = [
        peer("a", 0.2, 0.5, 0.4),
        peer("b", math.nan, 0.9, 0.8),
        peer("c", 0.4, 0.3),
        peer("d", 0.1, math.nan, 0.3),
    ]
    summary = Summary(peers)

    assert peers[0].gain == pytest.approx(0.3) and peers[2].gain == pytest.approx(-0.1)
    assert summary.mean("gain") == pytest.approx((0.3 - 0.1) / 2)
    assert summary.mean("after") == pytest.approx((0.5 + 0.9 + 0.3) / 3)
    assert summary.gain_over_isolated == pytest.approx((0.1 + 0.1) / 2)
    assert math.isnan(Summary([peer("a", 0.5, 0.5)]).gain_over_isolated)


def test_a_summary_on_disk_says_the_same_numbers(tmp_path):
    summary = Summary([peer("a", 0.2, 0.5, 0.4), peer("b", math.nan, 0.9)], pooled=0.7, totals={"seconds": math.inf})

    RunFolder(tmp_path).write_summary(summary)

    found = json.loads((tmp_path / "summary.json").read_text())
    assert [one["gain"] for one in found["peers"]] == [pytest.approx(0.3), None]
    assert found["mean"] == {
        "before": 0.2, "after": 0.7, "gain": pytest.approx(0.3), "own_before": 0.2, "own_after": 0.7,
    }  # fmt: skip
    assert (found["gain_over_isolated"], found["pooled"], found["isolated"]) == (pytest.approx(0.1), 0.7, None)
    assert found["totals"] == {"seconds": None} and list(tmp_path.iterdir()) == [tmp_path / "summary.json"]


@pytest.mark.parametrize("round", [-1, 0, 2, 9])
def test_rewound_a_folder_holds_the_rounds_up_to_one_and_no_half_line(tmp_path, round):
    folder = RunFolder(tmp_path)
    rows = [replace(PLAIN, round=t, peer=name) for t in range(4) for name in ("a", "b")]
    for t in range(4):
        if t == 1:  # what a kill and a start that was killed too can leave
            with (tmp_path / "rounds.jsonl").open("a") as file:
                file.write('{"round": 0, "pe\n')
        folder.append(rows[2 * t : 2 * t + 2])
        folder.append_reliability(t, "a", {"confidence": [0.5], "accuracy": [math.nan], "samples": [1]})
        folder.append_profile([{"round": t, "peer": "a", "train": 0.5}])
    folder.append_profile([])
    for name in ("rounds.jsonl", "reliability.jsonl", "profile.jsonl"):
        with (tmp_path / name).open("a") as file:
            file.write('{"round": 0, "peer"')

    found = folder.rewind(round)

    kept = [row for row in rows if row.round <= round]
    assert repr(found) == repr(kept)
    assert (tmp_path / "rounds.jsonl").read_text() == "".join(map(row_line, kept))
    for name in ("reliability.jsonl", "profile.jsonl"):
        lines = [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        assert [line["round"] for line in lines] == [t for t in range(4) if t <= round]
    assert [line["round"] for line in folder.read_profile()] == [t for t in range(4) if t <= round]
    assert repr(folder.rewind(round)) == repr(found)


def test_what_is_known_later_is_added_to_the_settings_and_not_put_in_their_place(tmp_path):
    folder = RunFolder(tmp_path / "deep" / "run")
    folder.write_config({"rounds": 3}, {"run": "token"})
    folder.add_facts({"classes": ["a"], "value": math.nan})

    content = folder.read_config()
    assert (content["settings"], content["run"], content["classes"], content["value"]) == (
        {"rounds": 3},
        "token",
        ["a"],
        None,
    )
    assert content["environment"]["versions"]["fedkd"] and content["environment"]["command"]


def test_an_error_is_one_text_that_ends_with_its_line(tmp_path):
    folder = RunFolder(tmp_path)
    folder.write_error("out of memory\n\n")
    assert (tmp_path / "error.txt").read_text() == "out of memory\n"


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["x", "y"])), unique_by=lambda pair: pair[0]),
    st.integers(1, 4),
)
def test_what_peers_complain_of_is_said_once_with_whose_it_is(problems, of):
    said = same_said_once(problems, of=max(of, len(problems)))

    texts = {text for _, text in problems}
    if len(texts) == 1 and len(problems) == max(of, len(problems)):
        assert said == texts.pop()
        return
    parts = dict(reversed(part.split(": ")) for part in said.split("; ") if part)
    assert parts == {text: ", ".join(sorted(name for name, other in problems if other == text)) for text in texts}


@pytest.mark.parametrize("name", ["test_accuracy", "own_accuracy", "ece"])
@given(value=st.floats(allow_nan=True, allow_infinity=True))
def test_a_share_that_cannot_be_is_not_written_down(name, value):
    from strategies.relay.rounds import _measured

    found = _measured(Answer("north", 1, metrics={name: value, "kd_loss": value, "colour": 1.0}))

    assert found.keys() == {name, "kd_loss", "refused_letters"}
    assert found[name] == value if 0 <= value <= 1 else math.isnan(found[name])
    assert math.isnan(found["kd_loss"]) or found["kd_loss"] == value


@pytest.mark.parametrize(("said", "kept"), [(0.0, 0), (3.0, 3), (-1.0, 0), (math.nan, 0), (math.inf, 0), (1e9, 0)])
def test_a_count_that_cannot_be_is_none(said, kept):
    from strategies.relay.rounds import _measured

    assert _measured(Answer("north", 1, metrics={"refused_letters": said}))["refused_letters"] == kept
    assert _measured(Answer("north", 1))["refused_letters"] == 0
