"""The differences, intervals and bold cells of `docs/results.md`, computed from its CSV files by another way."""

import itertools
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

PAGE = Path(__file__).parents[2] / "docs" / "results.md"
CSV = {p.stem: pd.read_csv(p, dtype=str, keep_default_na=False) for p in PAGE.with_suffix("").glob("*.csv")}


def cells(name):
    """Return the head and the rows of a table of the page."""
    block = re.search(rf"<!-- table: {name} -->\n(.*?)<!-- /table -->", PAGE.read_text(), re.DOTALL)[1]
    head, _, *rows = [
        [cell.strip() for cell in line[1:-1].split("|")] for line in block.splitlines() if line.startswith("|")
    ]
    return head, rows


def ends(study, what="accuracy", **chosen):
    """Return the last measurement of the trials that have these values, by seed."""
    frame = CSV[study]
    for key, value in chosen.items():
        name = key.replace("_", "-")
        if name in frame:
            frame = frame[frame[name].isin([value] if isinstance(value, str) else [str(value), f"{value:g}"])]
    last = frame[frame["round"] == str(frame["round"].astype(int).max())].sort_values("seed")
    assert len(last) == last["seed"].nunique() >= 3, chosen
    return last[what].astype(float).to_numpy()


def measures(study, split):
    present = [n for n in ("ce", "jeffreys", "js", "td", "sed", "msed") if n in CSV[study]["divergence"].unique()]
    for matched, column in (("False", 2), ("True", 6)):
        at = {"partition": split, "strategy": "averaged", "match_gradients": matched}
        kl = ends(study, divergence="kl", **at)
        yield column, {f"`{name}`": (ends(study, divergence=name, **at), kl) for name in present}


def combining():
    at = {"partition": "dirichlet", "match_gradients": "False"}
    for column, reduction in ((3, "sum"), (5, "mean")):
        yield (
            column,
            {
                f"`{name}`": (
                    ends("divergences", divergence=name, strategy="averaged", **at),
                    ends("divergences", divergence=name, strategy="pairwise", reduction=reduction, **at),
                )
                for name in ("kl", "js", "td", "sed")
            },
        )


def rounds(split):
    cold = ends("rounds", partition=split, strategy="fedavg", fedavg_start="cold")
    ways = {}
    for start in set(CSV["rounds"]["fedavg-start"]) - {"", "cold"}:
        ways[f"FedAvg, {start} start"] = {"strategy": "fedavg", "fedavg_start": start}
    codecs = CSV["rounds"][(CSV["rounds"]["partition"] == split) & (CSV["rounds"]["strategy"] == "averaged")]["codec"]
    ways |= {f"averaged, {codec}": {"strategy": "averaged", "codec": codec} for codec in codecs.unique()}
    ways |= {"gossip, fanout 2, fp16": {"strategy": "gossip"}, "consensus (FedMD), fp16": {"strategy": "consensus"}}
    yield 2, {label: (ends("rounds", partition=split, **chosen), cold) for label, chosen in ways.items()}


def regimes():
    head, rows = cells("regimes")
    column = head.index("tuned less the best untuned")
    pairs = {}
    for row in rows:
        of = {regime: ends("tuned", partition=row[0], regime=regime) for regime in CSV["tuned"]["regime"].unique()}
        best = max((regime for regime in of if regime != "tuned"), key=lambda regime: of[regime].mean())
        assert row[column].endswith(f"(`{best}`)")
        pairs[row[0]] = (of["tuned"], of[best])
    yield column, pairs


def balance():
    ways = {f"`bdkd`, {rule}": {"divergence": "bdkd", "bdkd_rule": rule} for rule in ("sharpen_if_flat", "opposite")}
    ways |= {"`bdkd`, none (= `jeffreys`)": {"divergence": "bdkd", "bdkd_rule": "none"}}
    ways |= {f"`{name}`": {"divergence": name} for name in ("jeffreys", "reverse_kl")}
    for column, what in ((2, "accuracy"), (4, "ece")):
        kl = ends("balanced", what, divergence="kl")
        pairs = {label: (ends("balanced", what, **chosen), kl) for label, chosen in ways.items()}
        if "isolated_ece" in CSV["balanced"]:
            frame = CSV["balanced"]
            control = {"accuracy": "isolated", "ece": "isolated_ece"}[what]
            alone = frame[frame[control] != ""].drop_duplicates("seed").sort_values("seed")[control]
            pairs["isolated"] = (alone.astype(float).to_numpy(), kl)
        yield column, pairs


def flow():
    alone, pairs = ends("flow", method="logits"), {}
    for auxiliary, decay in itertools.product((False, True), (0.7, 1.0)):
        label = f"flow, {'auxiliary teacher' if auxiliary else 'direct'}, "
        label += "critical phase" if decay < 1 else "constant weight"
        pairs[label] = (ends("flow", method="infoflow", flow_auxiliary=str(auxiliary), flow_decay=decay), alone)
    yield 2, pairs


def turns():
    pairs = {}
    for split, name in itertools.product(("dirichlet", "iid"), ("kl", "js")):
        at = {"partition": split, "divergence": name}
        sharing = ends("divergences", strategy="averaged", match_gradients="False", **at)
        pairs[split, f"`{name}`"] = (sharing, ends("schedule", schedule="alternate", **at))
    yield 4, pairs


def backbones():
    words = {"discrimination": "weighed by their logits", "counts": "weighed by class counts"}
    pairs = {}
    for split, (name, word) in itertools.product(("dirichlet", "iid"), words.items()):
        mean = ends("backbones", partition=split, weighing="uniform")
        pairs[split, word] = (ends("backbones", partition=split, weighing=name), mean)
    yield 3, pairs


COLUMNS = {
    "measures-iid": lambda: measures("divergences", "iid"),
    "measures-dirichlet": lambda: measures("divergences", "dirichlet"),
    "measures-cifar10": lambda: measures("cifar10", "dirichlet"),
    "combining": combining,
    "rounds-iid": lambda: rounds("iid"),
    "rounds-dirichlet": lambda: rounds("dirichlet"),
    "regimes": regimes,
    "balance": balance,
    "flow": flow,
    "turns": turns,
    "backbones": backbones,
}


def rejected(p_values):
    """Return what Holm's procedure rejects at 5 %, step by step."""
    found, left = set(), dict(p_values)
    while left:
        label = min(left, key=left.get)
        if left[label] >= 0.05 / len(left):
            break
        found.add(label)
        del left[label]
    return found


@pytest.mark.parametrize("table", COLUMNS)
def test_every_difference_is_scipys_and_bold_is_what_holms_procedure_rejects(table):
    _, rows = cells(table)
    checked = 0
    for column, pairs in COLUMNS[table]():
        differing = {label: pair for label, pair in pairs.items() if not np.array_equal(*pair)}
        tests = {label: stats.ttest_rel(*pair) for label, pair in differing.items()}
        telling = rejected({label: test.pvalue for label, test in tests.items()})
        shown = {(row[0], row[1]) if isinstance(next(iter(pairs)), tuple) else row[0]: row[column] for row in rows}
        for label, (ours, theirs) in pairs.items():
            if label not in differing:
                assert shown[label] == "0 exactly"
                continue
            low, high = tests[label].confidence_interval()
            words = f"{100 * (ours - theirs).mean():+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
            assert shown[label].split(" (`")[0] == (f"**{words}**" if label in telling else words), (label, column)
        bold = {label for label, cell in shown.items() if "**" in cell}
        assert bold == telling
        checked += len(pairs)
    assert checked == sum("[" in cell or cell == "0 exactly" for row in rows for cell in row)


def test_every_table_with_differences_is_checked():
    blocks = re.findall(r"<!-- table: ([a-z0-9-]+) -->\n(.*?)<!-- /table -->", PAGE.read_text(), re.DOTALL)

    assert {name for name, text in blocks if re.search(r"\[[+-]\d", text)} == {*COLUMNS, "map"}


def test_the_map_is_corrected_over_all_its_cells():
    head, rows = cells("map")
    betas, kl, p_values, shown = [h.removeprefix("β = ") for h in head[1:]], ends("decoupled", divergence="kl"), {}, {}
    for row in rows:
        name, alpha = ("dkd", {}) if row[0] == "`dkd`" else ("cakd", {"cakd_alpha": float(row[0].split("= ")[1])})
        for beta, cell in zip(betas, row[1:], strict=True):
            found = ends("decoupled", divergence=name, cakd_beta=float(beta), **alpha)
            test = stats.ttest_rel(found, kl)
            low, high = test.confidence_interval()
            words = f"{100 * (found - kl).mean():+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
            shown[row[0], beta] = cell
            assert cell.split("<br>")[1].strip("*") == words
            p_values[row[0], beta] = test.pvalue

    assert {key for key, cell in shown.items() if "**" in cell} == rejected(p_values)
