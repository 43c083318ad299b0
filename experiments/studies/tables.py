"""The tables of `docs/results.md`, made from the CSV files beside it."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev

from experiments.analysis import statistics
from experiments.analysis.settings import config_of
from experiments.analysis.statistics import Comparison, Values
from experiments.studies.record import Recorded, read_trials
from fedkd.settings.declare import Scalar

Trials = Sequence[Recorded]
MEASURES = ("ce", "kl", "jeffreys", "js", "td", "sed", "msed")
TARGETS = (0.7, 0.8, 0.9, 0.97)
"""Shares of what cold FedAvg ends with; the last two are those of the tables of rounds and bytes."""


def render(name: str, folder: Path) -> str:
    """Return one table as Markdown, from the files in a folder."""
    studies, table = TABLES[name]
    return table(*(read_trials(folder / f"{study}.csv") for study in studies))


def _measures(trials: Trials, partition: str) -> str:
    """Compare seven measures under averaged teachers, plain and with matched gradients."""
    found = _where(trials, partition=partition, strategy="averaged")
    present = [name for name in MEASURES if _where(found, divergence=name)]
    head, columns = ["measure"], [[f"`{name}`" for name in present]]
    for word, matched in (("plain", False), ("matched", True)):
        parts = {name: _where(found, divergence=name, match_gradients=matched) for name in present}
        head += [f"accuracy, {word}", "less `kl`", "worst peer", "spread"]
        columns += _beside("kl", parts)
        columns += [[spelled(_ends(part, what)) for part in parts.values()] for what in ("worst", "spread")]
    return markdown(head, columns) + _levels(found)


def _combining(trials: Trials) -> str:
    """Set averaged teachers against the sum and the mean of pairwise divergences."""
    found = _where(trials, partition="dirichlet", match_gradients=False)
    names = ("kl", "js", "td", "sed")
    averaged = [_ends(_where(found, divergence=name, strategy="averaged")) for name in names]
    head, columns = ["measure", "averaged"], [[f"`{name}`" for name in names], list(map(spelled, averaged))]
    for reduction in ("sum", "mean"):
        others = [_ends(_where(found, divergence=name, strategy="pairwise", reduction=reduction)) for name in names]
        head += [f"pairwise, {reduction}", f"averaged less {reduction}"]
        columns += [list(map(spelled, others)), _differences(averaged, others)]
    return markdown(head, columns)


def _rounds(trials: Trials, partition: str) -> str:
    """Count the rounds and bytes until 90 % and 97 % of what cold FedAvg ends with."""
    found = _where(trials, partition=partition)
    ways = _ways(found)
    targets = [share * _cold_end(found) for share in TARGETS[-2:]]
    head = ["", f"accuracy after {found[0].settings['rounds']} rounds", "less FedAvg, cold"]
    columns = [list(ways), *_beside("FedAvg, cold", ways)]
    head += ["epochs before round 1", "images of a peer a round, private + public", "bytes in all"]
    columns += [[_before(part[0]) for part in ways.values()], [_images(part) for part in ways.values()]]
    columns += [[megabytes(fmean(_ends(part, "bytes").values())) for part in ways.values()]]
    for target in targets:
        head += [f"rounds to {100 * target:.1f} %", "bytes"]
        prices = [[statistics.price(trial, target) for trial in part] for part in ways.values()]
        columns += [[counted(statistics.median([price.rounds for price in paid])) for paid in prices]]
        columns += [[megabytes(statistics.median([price.bytes for price in paid])) for paid in prices]]
    return markdown(head, columns) + _levels(_where(found, strategy="averaged"))


def _saved(trials: Trials) -> str:
    """Count the rounds of FedAvg that another start than a cold one saves, target by target."""
    rows = []
    starts = [start for start in ("cold", "pretrained", "distilled") if _where(trials, fedavg_start=start)]
    for partition, share in itertools.product(("iid", "dirichlet"), TARGETS):
        found = _where(trials, partition=partition)
        target = share * _cold_end(found)
        needed = {
            start: {trial.seed: statistics.price(trial, target).rounds for trial in _fedavg(found, start)}
            for start in starts
        }
        by_seed = [" → ".join(counted(needed[start][seed]) for start in starts) for seed in sorted(needed["cold"])]
        cuts = [_cut(needed["cold"], needed[start]) for start in starts[1:]]
        cuts += [_cut(needed["cold"], needed["distilled"], free=1)]
        rows.append([partition, f"{100 * target:.1f} %", ", ".join(by_seed), *cuts])
    cut = {"pretrained": "mean cut, pretrained", "distilled": "mean cut, distilled, the exchange counted as a round"}
    head = ["partition", "target", f"rounds, {' → '.join(starts)}, by seed", *(cut[start] for start in starts[1:])]
    return markdown([*head, "distilled, the exchange not counted"], list(zip(*rows, strict=True)))


def _cut(cold: Values, other: Values, *, free: int = 0) -> str:
    """Return the mean cut over the seeds under which cold FedAvg reached the target.

    Args:
        cold: rounds by seed.
        other: likewise; the exchange before a distilled start is one of its rounds.
        free: how many of its rounds are not counted.
    """
    cuts = [1 - (other[seed] - free) / rounds for seed, rounds in cold.items() if math.isfinite(rounds)]
    return f"{100 * fmean(cuts):.0f} %" if cuts and all(map(math.isfinite, cuts)) else "—"


def _regimes(trials: Trials) -> str:
    """Set tuned distillation against the untuned methods."""
    regimes = sorted(
        {str(trial.settings["regime"]) for trial in trials}, key=lambda r: (r != "vanilla", r == "tuned", r)
    )
    rows, pairs, bests = [], [], []
    for partition in ("iid", "dirichlet"):
        parts = {regime: _where(trials, partition=partition, regime=regime) for regime in regimes}
        ends = {regime: _ends(part) for regime, part in parts.items()}
        starts = {regime: _starts(part) for regime, part in parts.items()}
        gains = {r: fmean(ends[r][seed] - starts[r][seed] for seed in ends[r]) for r in regimes}
        best = max((r for r in regimes if r != "tuned"), key=lambda r: fmean(ends[r].values()))
        relative = f"{100 * (gains['tuned'] / gains[best] - 1):+.0f} %" if gains[best] > 0 else "—"
        pairs.append((ends["tuned"], ends[best]))
        bests.append(best)
        before = [spelled(starts[regime]) for regime in ("vanilla", "tuned")]
        alone = [spelled(_ends(parts[regime], "isolated")) for regime in ("vanilla", "tuned")]
        rows.append([partition, *before, *alone, *(spelled(ends[regime]) for regime in regimes), "", relative])
    differences = _differences(*zip(*pairs, strict=True))
    for row, difference, best in zip(rows, differences, bests, strict=True):
        row[-2] = f"{difference} (`{best}`)"
    head = ["partition", "before", "before, tuned", "isolated", "isolated, tuned", *regimes]
    return markdown([*head, "tuned less the best untuned", "gain, relative"], list(zip(*rows, strict=True)))


def _balance(trials: Trials) -> str:
    """Show accuracy and calibration of the rules of balanced KL."""
    ways = {
        "`bdkd`, sharpen_if_flat": _where(trials, divergence="bdkd", bdkd_rule="sharpen_if_flat"),
        "`bdkd`, opposite": _where(trials, divergence="bdkd", bdkd_rule="opposite"),
        "`bdkd`, none (= `jeffreys`)": _where(trials, divergence="bdkd", bdkd_rule="none"),
        "`jeffreys`": _where(trials, divergence="jeffreys"),
        "`kl`": _where(trials, divergence="kl"),
        "`reverse_kl`": _where(trials, divergence="reverse_kl"),
    }
    whats = ("accuracy", "ece", "nll", "brier")
    values = {what: {label: _ends(part, what) for label, part in ways.items()} for what in whats}
    kl = ways["`kl`"]
    for what in whats:
        alone = _ends(kl, "isolated" if what == "accuracy" else f"isolated_{what}")
        if not any(map(math.isnan, _ends(kl, "isolated_ece").values())):
            values[what]["isolated"] = alone
        values[what]["before"] = _starts(kl, what)
    labels = list(values["accuracy"])
    columns = [labels]
    for what in ("accuracy", "ece"):
        differences = statistics.against("`kl`", {k: v for k, v in values[what].items() if k != "before"})
        columns += [[spelled(of) for of in values[what].values()], [_points(differences.get(k)) for k in labels]]
    columns += [[f"{fmean(of.values()):.3f}" for of in values[what].values()] for what in ("nll", "brier")]
    return markdown(["", "accuracy", "less `kl`", "ECE", "less `kl`", "NLL", "Brier"], columns)


def _map(trials: Trials) -> str:
    """Lay out the accuracy over α and β."""
    cakd, dkd, kl = (_where(trials, divergence=name) for name in ("cakd", "dkd", "kl"))
    alphas, betas = ([float(v) for v in sorted({trial.settings[key] for trial in cakd})] for key in
                     ("cakd-alpha", "cakd-beta"))  # fmt: skip
    parts = {
        **{(alpha, beta): _where(cakd, cakd_alpha=alpha, cakd_beta=beta) for alpha in alphas for beta in betas},
        **{("dkd", beta): _where(dkd, cakd_beta=beta) for beta in betas},
        "kl": kl,
    }
    differences = statistics.against("kl", {str(key): _ends(part) for key, part in parts.items()})
    rows = [
        [name, *(f"{spelled(_ends(parts[key, beta]))}<br>{_points(differences[str((key, beta))])}" for beta in betas)]
        for key, name in [*((alpha, f"α = {alpha:g}") for alpha in alphas), ("dkd", "`dkd`")]
    ]
    head = ["accuracy, and less `kl`", *(f"β = {beta:g}" for beta in betas)]
    return markdown(head, list(zip(*rows, strict=True))) + f"\n`kl`: {spelled(_ends(kl))}.\n" + _levels(kl)


def _flow(trials: Trials) -> str:
    """Set information flow against logits alone."""
    ways = {"logits alone": _where(trials, method="logits")}
    for auxiliary, decay in itertools.product((False, True), (0.7, 1.0)):
        teacher = "auxiliary teacher" if auxiliary else "direct"
        phase = "critical phase" if decay < 1 else "constant weight"
        ways[f"flow, {teacher}, {phase}"] = _where(
            trials, method="infoflow", flow_auxiliary=auxiliary, flow_decay=decay
        )
    columns = [list(ways), *_beside("logits alone", ways)]
    columns += [[spelled(_ends(part, "worst")) for part in ways.values()]]
    columns += [[megabytes(fmean(_ends(part, "bytes").values())) for part in ways.values()]]
    head = ["", "accuracy", "less logits alone", "worst peer", "bytes"]
    return markdown(head, columns) + _levels(ways["logits alone"])


def _turns(sharing: Trials, turns: Trials) -> str:
    """Set peers that distil and then train against peers whose every step does both."""
    cases = list(itertools.product(("dirichlet", "iid"), ("kl", "js")))
    of = {"partition": [partition for partition, _ in cases], "divergence": [f"`{name}`" for _, name in cases]}
    ends: dict[str, list[Values]] = {}
    kinds = {
        "taking turns": _where(turns, schedule="alternate"),
        "sharing steps": _where(sharing, strategy="averaged", match_gradients=False, schedule="mixed"),
    }
    for kind, trials in kinds.items():
        parts = [_where(trials, partition=partition, divergence=name) for partition, name in cases]
        ends[kind] = [_ends(part) for part in parts]
        of[kind] = list(map(spelled, ends[kind]))
        of[f"isolated, {kind}"] = [spelled(_ends(part, "isolated")) for part in parts]
        of[f"worst peer, {kind}"] = [spelled(_ends(part, "worst")) for part in parts]
    of["gain"] = _differences(ends["sharing steps"], ends["taking turns"])
    head = [
        "partition",
        "divergence",
        *kinds,
        "gain",
        *(f"{w}, {k}" for w in ("isolated", "worst peer") for k in kinds),
    ]
    return markdown(head, [of[name] for name in head])


def _backbones(trials: Trials) -> str:
    """Set ways to weigh teachers against one another, among heads on the features of pre-trained backbones."""
    words = {"uniform": "plain mean", "discrimination": "weighed by their logits", "counts": "weighed by class counts"}
    cases = list(itertools.product(("dirichlet", "iid"), words))
    parts = {case: _where(trials, partition=case[0], weighing=case[1]) for case in cases}
    ends = {case: _ends(part) for case, part in parts.items()}
    others = [case for case in cases if case[1] != "uniform"]
    found = _differences([ends[case] for case in others], [ends[case[0], "uniform"] for case in others])
    differences = dict(zip(others, found, strict=True))
    rows = []
    for case, part in parts.items():
        levels = [_ends(part, control) for control in ("isolated", "channel", "pooled")]
        ours, alone, truth = (fmean(of.values()) for of in (ends[case], *levels[:2]))
        shown = [case[0], words[case[1]], spelled(ends[case]), differences.get(case, ""), spelled(_ends(part, "worst"))]
        rows.append([*shown, f"{(ours - alone) / (truth - alone):.2f}", *map(spelled, levels)])
    head = ["partition", "teachers", "accuracy", "less the plain mean", "worst peer", "share of the channel"]
    return markdown([*head, "isolated", "true labels", "pooled"], list(zip(*rows, strict=True)))


TABLES: Mapping[str, tuple[Sequence[str], Callable[..., str]]] = {
    "measures-iid": (["divergences"], lambda trials: _measures(trials, "iid")),
    "measures-dirichlet": (["divergences"], lambda trials: _measures(trials, "dirichlet")),
    "measures-cifar10": (["cifar10"], lambda trials: _measures(trials, "dirichlet")),
    "combining": (["divergences"], _combining),
    "rounds-iid": (["rounds"], lambda trials: _rounds(trials, "iid")),
    "rounds-dirichlet": (["rounds"], lambda trials: _rounds(trials, "dirichlet")),
    "saved": (["rounds"], _saved),
    "regimes": (["tuned"], _regimes),
    "balance": (["balanced"], _balance),
    "map": (["decoupled"], _map),
    "flow": (["flow"], _flow),
    "turns": (["divergences", "schedule"], _turns),
    "backbones": (["backbones"], _backbones),
}
"""The tables by name: the studies that each is made from, and how."""


def _ways(found: Trials) -> dict[str, Trials]:
    starts = {"cold": "cold", "pretrained": "pretrained start", "distilled": "distilled start"}
    ways = {f"FedAvg, {words}": _fedavg(found, start) for start, words in starts.items()}
    ways |= {f"averaged, {c}": _where(found, strategy="averaged", codec=c) for c in ("fp16", "int8", "topk:3")}
    ways |= {"gossip, fanout 2, fp16": _where(found, strategy="gossip")}
    ways |= {"consensus (FedMD), fp16": _where(found, strategy="consensus")}
    return {label: part for label, part in ways.items() if part}


def _fedavg(found: Trials, start: str) -> Trials:
    return _where(found, strategy="fedavg", fedavg_start=start)


def _cold_end(found: Trials) -> float:
    return fmean(_ends(_fedavg(found, "cold")).values())


def _before(trial: Recorded) -> str:
    """Say how much was trained before round 1."""
    config = config_of(trial.settings)
    if config.strategy != "fedavg" or config.fedavg_start == "pretrained":
        return f"{config.pretrain_epochs}"
    merged = f"{config.pretrain_epochs}, and {config.merge_epochs} of one peer on the public images"
    return merged if config.fedavg_start == "distilled" else "0"


def _images(part: Trials) -> str:
    """Say how many private and public images a peer trains on in a round."""
    config = config_of(part[0].settings)
    held = fmean(trial.samples for trial in part)
    if math.isnan(held):
        return "—"
    shown = config.distill_epochs * config.travelling
    private = shown if config.joint else config.local_epochs * held
    return f"{private:.0f} + {0 if config.strategy == 'fedavg' else shown}"


def _where(trials: Trials, **chosen: Scalar) -> Trials:
    """Return the trials with some settings, their names with underscores."""
    wanted = {name.replace("_", "-"): value for name, value in chosen.items()}
    return [trial for trial in trials if all(trial.settings[name] == value for name, value in wanted.items())]


def _ends(trials: Trials, what: str = "accuracy") -> Values:
    """Return a number of the last point of every trial's curve, or of its control, by seed."""
    return _by_seed(trials, lambda t: t.controls[what] if what in t.controls else float(getattr(t.curve()[-1], what)))


def _starts(trials: Trials, what: str = "accuracy") -> Values:
    return _by_seed(trials, lambda trial: float(getattr(trial.curve()[0], what)))


def _by_seed(trials: Trials, number: Callable[[Recorded], float]) -> Values:
    found = {trial.seed: number(trial) for trial in trials}
    if not trials or len(found) < len(trials):
        raise ValueError(f"Expected one trial for each seed, but got {[trial.seed for trial in trials]}.")
    return found


def _beside(reference: str, parts: Mapping[str, Trials]) -> list[list[str]]:
    """Return a column of accuracies, and one of what they differ from a reference by."""
    values = {label: _ends(part) for label, part in parts.items()}
    differences = statistics.against(reference, values)
    return [list(map(spelled, values.values())), [_points(differences.get(label)) for label in values]]


def _differences(ours: Sequence[Values], theirs: Sequence[Values]) -> list[str]:
    """Return a column of differences, corrected for its length."""
    pairs = zip(ours, theirs, strict=True)
    return [_points(c) for c in statistics.corrected([statistics.compare("", a, "", b) for a, b in pairs])]


def _levels(trials: Trials) -> str:
    """Say where the peers began, and what the controls of these trials came to, which must share them."""
    words = [f"Before the exchange {100 * fmean(_unique(trials, lambda t: t.curve()[0].accuracy)):.1f} %"]
    for name in ("isolated", "pooled"):
        levels = _unique(trials, lambda trial, name=name: trial.controls[name])
        if not any(map(math.isnan, levels)):
            words.append(f"{name} {100 * fmean(levels):.1f} %")
    return f"\n{'; '.join(words)}.\n"


def _unique(trials: Trials, number: Callable[[Recorded], float]) -> list[float]:
    """Return a number by seed that is the same for all trials of a seed."""
    found: dict[int, float] = {}
    for trial in trials:
        value = number(trial)
        if found.setdefault(trial.seed, value) != value and not math.isnan(value):
            raise ValueError(f"Expected one level for seed {trial.seed}, but got {found[trial.seed]} and {value}.")
    return list(found.values())


def spelled(values: Values) -> str:
    """Return the mean and the standard deviation over seeds, in percent."""
    numbers = [100 * value for value in values.values()]
    if any(map(math.isnan, numbers)):
        return "—"
    return f"{fmean(numbers):.1f} ± {stdev(numbers):.1f}" if len(numbers) > 1 else f"{numbers[0]:.1f}"


def _points(found: Comparison | None) -> str:
    """Return a mean difference in points with its 95 % interval, if any; bold where it is larger than seed noise."""
    if found is None:
        return ""
    if found.identical:
        return "0 exactly"
    words = f"{100 * found.difference:+.1f}"
    if math.isfinite(found.low):
        words += f" [{100 * found.low:+.1f}, {100 * found.high:+.1f}]"
    return f"**{words}**" if found.larger_than_noise else words


def counted(rounds: float) -> str:
    """Return a number of rounds, or that a target was not reached."""
    return f"{rounds:g}" if math.isfinite(rounds) else "not reached"


def megabytes(value: float) -> str:
    """Return bytes as megabytes, or that a target was not reached."""
    return f"{value / 1e6:.2f} MB" if math.isfinite(value) else "not reached"


def markdown(head: Sequence[str], columns: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table from its columns."""
    lines = [head, ["---"] * len(head), *zip(*columns, strict=True)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
