"""The tables of `docs/results.md`, made from the CSV files beside it."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev

import pandas as pd

from experiments import statistics

MEASURES = ("ce", "kl", "jeffreys", "js", "td", "sed", "msed")
Values = Mapping[int, float]
"""A number by seed."""


def render(name: str, folder: Path) -> str:
    """Return one table as Markdown, from the CSV files in a folder."""
    study, table = TABLES[name]
    return table(pd.read_csv(folder / f"{study}.csv"))


def _measures(frame: pd.DataFrame, partition: str) -> str:
    """Compare seven measures under averaged teachers, plain and with matched gradients."""
    found = _last(frame, partition=partition)
    if "strategy" in found:
        found = found[found["strategy"] == "averaged"]
    rows = []
    kinds = [matched for matched in (False, True) if (found["match-gradients"] == matched).any()]
    present = [name for name in MEASURES if (found["divergence"] == name).any()]
    against: dict[bool, list[statistics.Comparison]] = {}
    for matched in kinds:
        of = {name: _where(found, divergence=name, **{"match-gradients": matched}) for name in present}
        against[matched] = _against("kl", {name: _by_seed(part, "accuracy") for name, part in of.items()})
    for name in present:
        row = [f"`{name}`"]
        for matched in kinds:
            part = _where(found, divergence=name, **{"match-gradients": matched})
            difference = next((c for c in against[matched] if c.first == name), None)
            row += [_percent(part, "accuracy"), _points(difference), _percent(part, "worst"), _percent(part, "spread")]
        rows.append(row)
    head = ["measure"]
    for matched in kinds:
        word = "matched" if matched else "plain"
        head += [f"accuracy, {word}", "less `kl`", "worst peer", "spread"]
    return _markdown(head, rows) + _controls(frame[frame["partition"] == partition])


def _combining(frame: pd.DataFrame) -> str:
    """Set averaged teachers against the sum and the mean of pairwise divergences."""
    found = _where(_last(frame, partition="dirichlet"), **{"match-gradients": False})
    rows = []
    for name in ("kl", "js", "td", "sed"):
        averaged = _by_seed(_where(found, divergence=name, strategy="averaged"), "accuracy")
        row = [f"`{name}`", _spelled(averaged)]
        for reduction in ("sum", "mean"):
            other = _by_seed(_where(found, divergence=name, strategy="pairwise", reduction=reduction), "accuracy")
            row += [_spelled(other), _points(statistics.compare("averaged", averaged, reduction, other))]
        rows.append(row)
    return _markdown(
        ["measure", "averaged", "pairwise, sum", "averaged less sum", "pairwise, mean", "averaged less mean"], rows
    )


def _rounds(frame: pd.DataFrame, partition: str) -> str:
    """Count the rounds and bytes until 90 % and 97 % of what cold FedAvg ends with."""
    found = frame[frame["partition"] == partition]
    cold = _where(found, strategy="fedavg", **{"fedavg-start": "cold"})
    end = fmean(_by_seed(_last(cold), "accuracy").values())
    targets = [0.9 * end, 0.97 * end]
    rows = []
    for label, part in _ways(found):
        final = _last(part)
        row = [label, _percent(final, "accuracy"), f"{fmean(_by_seed(final, 'bytes').values()) / 1e6:.2f} MB"]
        for target in targets:
            rounds, cost = zip(*(_price(run, target) for _, run in part.groupby("seed")), strict=True)
            row += [_median(rounds, "{:.0f}"), _median([c / 1e6 for c in cost], "{:.2f} MB")]
        rows.append(row)
    head = ["", f"accuracy after {int(found['round'].max())} rounds", "bytes in all"]
    for target in targets:
        head += [f"rounds to {100 * target:.1f} %", "bytes"]
    return _markdown(head, rows)


def _saved(frame: pd.DataFrame) -> str:
    """Count the rounds of FedAvg that a distilled start saves, target by target."""
    rows = []
    for partition in ("iid", "dirichlet"):
        fedavg = _where(frame, partition=partition, strategy="fedavg")
        runs = {start: dict(list(part.groupby("seed"))) for start, part in fedavg.groupby("fedavg-start")}
        end = fmean(_by_seed(_last(fedavg[fedavg["fedavg-start"] == "cold"]), "accuracy").values())
        for share in (0.7, 0.8, 0.9, 0.97):
            needed = [
                (_price(cold, share * end)[0], _price(runs["distilled"][seed], share * end)[0])
                for seed, cold in sorted(runs["cold"].items())
            ]
            words = ", ".join(f"{_count(cold)} → {_count(distilled)}" for cold, distilled in needed)
            cuts = [_cut(needed, free) for free in (0, 1)]
            rows.append([partition, f"{100 * share * end:.1f} %", words, *cuts])
    return _markdown(
        [
            "partition", "target", "rounds, cold → distilled, by seed", "mean cut, the exchange counted as a round",
            "mean cut, the exchange not counted",
        ],
        rows,
    )  # fmt: skip


def _cut(needed: Sequence[tuple[float, float]], free: int) -> str:
    """Return the mean cut over the seeds under which cold FedAvg reached the target.

    Args:
        needed: rounds of the cold and of the distilled start; the exchange before the latter is one of its rounds.
        free: how many of its rounds are not counted.
    """
    cuts = [1 - (distilled - free) / cold for cold, distilled in needed if math.isfinite(cold)]
    return f"{100 * fmean(cuts):.0f} %" if cuts and all(map(math.isfinite, cuts)) else "—"


def _regimes(frame: pd.DataFrame) -> str:
    """Set tuned distillation against the untuned methods."""
    rows = []
    for partition in ("iid", "dirichlet"):
        start = _where(frame, partition=partition, round=0)
        final = _last(frame, partition=partition)
        before = {seed: float(part["accuracy"].iloc[0]) for seed, part in start.groupby("seed")}
        ends = {regime: _by_seed(part, "accuracy") for regime, part in final.groupby("regime")}
        best = max((r for r in ends if r != "tuned"), key=lambda r: fmean(ends[r].values()))
        gains = {r: fmean(v[s] - before[s] for s in v) for r, v in ends.items()}
        relative = 100 * (gains["tuned"] / gains[best] - 1) if gains[best] > 0 else math.nan
        difference = _points(statistics.compare("tuned", ends["tuned"], best, ends[best]))
        accuracies = (_spelled(ends[regime]) for regime in ("vanilla", "dml", "partitioned", "tuned"))
        share = "—" if math.isnan(relative) else f"{relative:+.0f} %"
        rows.append([partition, _spelled(before), *accuracies, f"{difference} (`{best}`)", share])
    tuned = ("tuned", "tuned less the best untuned", "gain, relative")
    return _markdown(["partition", "before", "vanilla", "dml", "partitioned", *tuned], rows)


def _balance(frame: pd.DataFrame) -> str:
    """Show accuracy and calibration of the rules of balanced KL."""
    ways = [
        ("`bdkd`, sharpen_if_flat", {"divergence": "bdkd", "bdkd-rule": "sharpen_if_flat"}),
        ("`bdkd`, opposite", {"divergence": "bdkd", "bdkd-rule": "opposite"}),
        ("`bdkd`, none (= `jeffreys`)", {"divergence": "bdkd", "bdkd-rule": "none"}),
        ("`jeffreys`", {"divergence": "jeffreys"}),
        ("`kl`", {"divergence": "kl"}),
        ("`reverse_kl`", {"divergence": "reverse_kl"}),
    ]
    found = _last(frame)
    parts = {label: _where(found, **chosen) for label, chosen in ways}
    tables = {
        what: {c.first: c for c in _against("`kl`", {k: _by_seed(v, what) for k, v in parts.items()})}
        for what in ("accuracy", "ece")
    }
    rows = []
    for label, part in parts.items():
        row = [label]
        for what in ("accuracy", "ece"):
            row += [_percent(part, what), _points(tables[what].get(label))]
        rows.append([*row, *(f"{_mean(part, what):.3f}" for what in ("nll", "brier"))])
    start = _where(frame, round=0).drop_duplicates("seed")
    rows.append(["before", _percent(start, "accuracy"), "", _percent(start, "ece"), "", *(
        f"{_mean(start, what):.3f}" for what in ("nll", "brier")
    )])  # fmt: skip
    return _markdown(["", "accuracy", "less `kl`", "ECE", "less `kl`", "NLL", "Brier"], rows)


def _map(frame: pd.DataFrame) -> str:
    """Lay out the accuracy over α and β."""
    found = _last(frame)
    cakd = _where(found, divergence="cakd")
    betas = sorted(cakd["cakd-beta"].unique())
    rows = [
        [
            f"α = {alpha:g}",
            *(_percent(_where(cakd, **{"cakd-alpha": alpha, "cakd-beta": beta}), "accuracy") for beta in betas),
        ]
        for alpha in sorted(cakd["cakd-alpha"].unique())
    ]
    dkd = _where(found, divergence="dkd")
    rows.append(["`dkd`", *(_percent(_where(dkd, **{"cakd-beta": beta}), "accuracy") for beta in betas)])
    kl = _where(found, divergence="kl")
    return _markdown(["accuracy", *(f"β = {beta:g}" for beta in betas)], rows) + f"\n`kl`: {_percent(kl, 'accuracy')}\n"


def _flow(frame: pd.DataFrame) -> str:
    """Set information flow against logits alone."""
    found = _last(frame)
    ways = {"logits alone": _where(found, method="logits")}
    for auxiliary, decay in itertools.product((False, True), (0.7, 1.0)):
        teacher = "auxiliary teacher" if auxiliary else "direct"
        phase = "critical phase" if decay < 1 else "constant weight"
        ways[f"flow, {teacher}, {phase}"] = _where(
            found, method="infoflow", **{"flow-auxiliary": auxiliary, "flow-decay": decay}
        )
    accuracies = {label: _by_seed(part, "accuracy") for label, part in ways.items()}
    differences = {c.first: c for c in _against("logits alone", accuracies)}
    rows = [
        [
            label,
            _percent(part, "accuracy"),
            _points(differences.get(label)),
            _percent(part, "worst"),
            f"{_mean(part, 'bytes') / 1e6:.2f} MB",
        ]
        for label, part in ways.items()
    ]
    return _markdown(["", "accuracy", "less logits alone", "worst peer", "bytes"], rows)


def _turns(frame: pd.DataFrame) -> str:
    """Set peers that distil and then train against peers whose every step does both."""
    rows = []
    for partition, divergence in itertools.product(("dirichlet", "iid"), ("kl", "js")):
        found = _last(frame, partition=partition, divergence=divergence)
        mixed, alternate = (_where(found, schedule=schedule) for schedule in ("mixed", "alternate"))
        gain = statistics.compare("mixed", _by_seed(mixed, "accuracy"), "alternate", _by_seed(alternate, "accuracy"))
        of_both = [_percent(part, what) for what in ("accuracy", "worst") for part in (alternate, mixed)]
        rows.append([partition, f"`{divergence}`", of_both[0], of_both[1], _points(gain), *of_both[2:]])
    head = [
        "partition",
        "divergence",
        "taking turns",
        "sharing steps",
        "gain",
        "worst peer, turns",
        "worst peer, sharing",
    ]
    return _markdown(head, rows)


TABLES: Mapping[str, tuple[str, Callable[[pd.DataFrame], str]]] = {
    "measures-iid": ("divergences", lambda frame: _measures(frame, "iid")),
    "measures-dirichlet": ("divergences", lambda frame: _measures(frame, "dirichlet")),
    "measures-cifar10": ("cifar10", lambda frame: _measures(frame, "dirichlet")),
    "combining": ("divergences", _combining),
    "rounds-iid": ("rounds", lambda frame: _rounds(frame, "iid")),
    "rounds-dirichlet": ("rounds", lambda frame: _rounds(frame, "dirichlet")),
    "saved": ("rounds", _saved),
    "regimes": ("tuned", _regimes),
    "balance": ("balanced", _balance),
    "map": ("decoupled", _map),
    "flow": ("flow", _flow),
    "turns": ("schedule", _turns),
}
"""The tables by name: the study that each is made from, and how."""


def _ways(found: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    ways = [("FedAvg, cold", {"strategy": "fedavg", "fedavg-start": "cold"})]
    ways += [("FedAvg, distilled start", {"strategy": "fedavg", "fedavg-start": "distilled"})]
    ways += [(f"averaged, {codec}", {"strategy": "averaged", "codec": codec}) for codec in ("fp16", "int8", "topk:3")]
    ways += [("gossip, fanout 2, fp16", {"strategy": "gossip"}), ("consensus (FedMD), fp16", {"strategy": "consensus"})]
    parts = [(label, _where(found, **chosen)) for label, chosen in ways]
    return [(label, part) for label, part in parts if len(part)]


def _price(run: pd.DataFrame, target: float) -> tuple[float, float]:
    """Return rounds and bytes until a target; infinite where it was not reached.

    Round 0 of a distilled start measures the peers' own models, not FedAvg's.
    """
    first = 1 if (run["fedavg-start"] == "distilled").any() else 0
    reached = run[(run["accuracy"] >= target) & (run["round"] >= first)].sort_values("round")
    return (float(reached["round"].iloc[0]), float(reached["bytes"].iloc[0])) if len(reached) else (math.inf, math.inf)


def _last(frame: pd.DataFrame, **chosen: object) -> pd.DataFrame:
    return _where(frame, **chosen, round=int(frame["round"].max()))


def _where(frame: pd.DataFrame, **chosen: object) -> pd.DataFrame:
    for name, value in chosen.items():
        frame = frame[frame[name] == value]
    return frame


def _by_seed(frame: pd.DataFrame, what: str) -> dict[int, float]:
    if frame["seed"].duplicated().any():
        raise ValueError(f"Expected one trial for each seed, but got {list(frame['seed'])}.")
    return {int(seed): float(value) for seed, value in zip(frame["seed"], frame[what], strict=True)}


def _against(reference: str, values: Mapping[str, Values]) -> list[statistics.Comparison]:
    """Compare all with one, corrected for their number (Holm)."""
    found = [
        statistics.compare(name, of, reference, values[reference]) for name, of in values.items() if name != reference
    ]
    adjusted = statistics.holm([c.p for c in found])
    return [statistics.Comparison(**{**vars(c), "adjusted": p}) for c, p in zip(found, adjusted, strict=True)]


def _controls(frame: pd.DataFrame) -> str:
    words = [
        f"{name} {100 * fmean(frame[name].dropna()):.1f} %" for name in ("isolated", "pooled") if frame[name].any()
    ]
    start = _where(frame, round=0).drop_duplicates("seed")["accuracy"]
    return f"\nBefore the exchange {100 * fmean(start):.1f} %; {', '.join(words)}.\n"


def _mean(frame: pd.DataFrame, what: str) -> float:
    return fmean(frame[what])


def _percent(frame: pd.DataFrame, what: str) -> str:
    return _spelled(dict(enumerate(frame[what])))


def _spelled(values: Values) -> str:
    """Return the mean and the standard deviation over seeds, in percent."""
    numbers = [100 * value for value in values.values()]
    return f"{fmean(numbers):.1f} ± {stdev(numbers):.1f}" if len(numbers) > 1 else "—"


def _points(found: statistics.Comparison | None) -> str:
    """Return a mean difference in points with its 95 % interval; bold where it is larger than seed noise."""
    if found is None:
        return ""
    if found.identical:
        return "0 exactly"
    words = f"{100 * found.difference:+.1f} [{100 * found.low:+.1f}, {100 * found.high:+.1f}]"
    p = found.p if math.isnan(found.adjusted) else found.adjusted
    return f"**{words}**" if p < 1 - statistics.LEVEL else words


def _count(rounds: float) -> str:
    return f"{rounds:.0f}" if math.isfinite(rounds) else "not reached"


def _median(values: Sequence[float], form: str) -> str:
    middle = statistics.median(list(values))
    return form.format(middle) if math.isfinite(middle) else "not reached"


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
