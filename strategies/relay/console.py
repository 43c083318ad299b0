"""What a run says while it goes on, and the table at its end."""

import math
from collections.abc import Sequence

from fedkd.results.folder import Row, Summary
from fedkd.settings.config import RunConfig
from fedkd.wire.claims import COUNTS, DENSITY, MASK
from fedkd.wire.messages import one_line
from strategies.topology import Topology

MOST_SHOWN = 40
"""Peers that are listed one by one; of more, the results have the rest."""

_SHOWN = 500  # characters of what went wrong at a peer; the whole text is in its row
_NAME = 60  # characters of a name in the table
_WIDTH = 80  # columns of the table


def round_line(round: int, rounds: int, rows: Sequence[Row], durations: Sequence[float], *, unit: str = "round") -> str:
    """Return the progress line of a closed round: accuracy, bytes up and down together, seconds.

    Args:
        round: the round that closed; 0 is the start.
        rounds: how many there are.
        rows: its rows.
        durations: seconds that every round so far took, round 0 first.
        unit: what is counted.
    """
    accuracies = [row.test_accuracy for row in rows if 0 <= row.test_accuracy <= 1]
    found = "accuracy not measured".ljust(38)
    if accuracies:
        mean = sum(accuracies) / len(accuracies)
        found = f"accuracy {mean:5.1%} (min {min(accuracies):5.1%}, max {max(accuracies):5.1%})"
    carried = sum(row.bytes_up + row.bytes_down for row in rows)
    line = f"{unit} {round:>3}/{rounds}  {found}  {size(carried)}  {durations[-1]:.1f} s"
    if 0 < round < rounds:
        ours = durations[1:]
        line += f"  ~{sum(ours) / len(ours) * (rounds - round):.0f} s left"
    problems = [one_line(f"{row.peer}: {row.error}", _SHOWN) for row in rows if row.error]
    if (more := len(problems) - MOST_SHOWN) > 0:
        problems[MOST_SHOWN:] = [f"and {more:,} more peers with a problem"]
    return "\n".join([line, *problems])


def size(count: int) -> str:
    """Return a number of bytes in words of constant width.

    >>> size(48_000)
    ' 48.0 kB'
    """
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.95 or unit == "GB":
            return f"{count:5.1f} {unit}"
        count /= 1000  # type: ignore[assignment]
    raise AssertionError("unreachable")


def summary_table(summary: Summary) -> str:
    """Return the table at the end of a run: every peer before and after, then the controls."""
    from rich.console import Console
    from rich.table import Table

    table = Table("peer", "model", title="test accuracy", title_justify="left", box=None)
    for name in ("before", "after", "gain", "own classes", "isolated"):
        table.add_column(name, justify="right")
    for p in summary.peers[:MOST_SHOWN]:
        table.add_row(
            one_line(p.peer, _NAME), one_line(p.model, _NAME), _share(p.before), _share(p.after), _points(p.gain),
            _share(p.own_after), _share(p.isolated),
        )  # fmt: skip
    if (more := len(summary.peers) - MOST_SHOWN) > 0:
        table.add_row(f"and {more:,} more")
    mean = summary.mean
    table.add_row()
    table.add_row(
        "mean", "", _share(mean("before")), _share(mean("after")), _points(mean("gain")), _share(mean("own_after")),
        _share(summary.isolated),
    )  # fmt: skip
    before = mean("before")
    for name, model, after in (
        ("isolated", "local training only", summary.isolated),
        ("true labels", "in place of teachers", summary.channel),
        ("pooled", f"{summary.pooled_model} on all data", summary.pooled),
    ):
        if math.isfinite(after):
            same = name != "pooled"  # peers, with the same start
            table.add_row(name, model, _share(before) if same else "", _share(after),
                          _points(after - before) if same else "")  # fmt: skip
    # Names are the peers' own choice: what looks like markup in them is text.
    console = Console(width=_WIDTH, force_terminal=False, no_color=True, markup=False, emoji=False)
    with console.capture() as captured:
        console.print(table)
    lines = [line.rstrip() for line in captured.get().rstrip().splitlines()]
    said = pooled_line(summary.pooled_samples_seen, summary.samples_seen), channel_line(summary.share_of_channel)
    return "\n".join([*lines, *filter(None, said)])


def pooled_line(pooled: float, peers: float) -> str:
    """Return on how many private samples the pooled control was trained, and its peers; empty if that is not known.

    >>> pooled_line(28000, 35000)
    'pooled: trained on 28,000 private samples, repeats counted; the peers together on 35,000'
    """
    if not math.isfinite(pooled + peers):
        return ""
    return f"pooled: trained on {pooled:,.0f} private samples, repeats counted; the peers together on {peers:,.0f}"


def channel_line(share: float) -> str:
    """Return how much of what true labels would bring the exchange brought; empty if that is not known.

    >>> channel_line(0.25)
    'channel: the exchange brought 25 % of what the true labels of the proxy set would have'
    """
    if not math.isfinite(share):
        return ""
    return f"channel: the exchange brought {100 * share:.0f} % of what the true labels of the proxy set would have"


def telling_line(config: RunConfig) -> str:
    """Return what a run's peers tell beside their logits; empty where it is nothing.

    >>> telling_line(RunConfig(weighing="density", selector="roc"))
    'peers tell beside their logits: how sure they are of each sample; which samples they leave out (roc)'
    """
    noise = f" with noise of {config.counts_noise:g} times what one record moves" if config.counts_noise else ""
    words = {
        COUNTS: f"how many samples of each class they have{noise}",
        DENSITY: "how sure they are of each sample",
        MASK: f"which samples they leave out ({config.selector})",
    }
    return f"peers tell beside their logits: {'; '.join(words[what] for what in config.told)}" if config.told else ""


def topology_line(topology: Topology) -> str:
    """Return what a run says of its topology."""
    stats = topology.stats()
    degree = f"{stats.degree_mean:.3g}"
    if stats.degree_min != stats.degree_max:
        degree += f" ({stats.degree_min} to {stats.degree_max})"
    return (
        f"topology {topology.name}: {topology.peers} peers, degree {degree}, diameter {stats.diameter}, "
        f"spectral gap {stats.spectral_gap:.3f}"
    )


def closing_line(summary: Summary, *, controls: float = 0.0) -> str:
    """Return the one sentence that answers the user's question.

    Args:
        summary: of the run; its seconds are those until the last round closed.
        controls: seconds of the controls after it; 0: there were none.
    """
    totals = summary.totals
    line = f"mean accuracy {_share(summary.mean('before'))} → {_share(summary.mean('after'))}"
    if math.isfinite(summary.isolated):
        gain = summary.gain_over_isolated
        line += f", {abs(100 * gain):.1f} points {'below' if gain < 0 else 'above'} isolated"
    rounds = f"{totals['rounds']:.0f} round{'' if totals['rounds'] == 1 else 's'} in {totals['seconds']:.1f} s"
    return (
        f"{line}; {rounds}{f', controls in {controls:.1f} s' if controls else ''}; "
        f"{size(int(totals['bytes_up'])).strip()} up, {size(int(totals['bytes_down'])).strip()} down"
    )


def _share(value: float) -> str:
    return f"{value:.1%}" if 0 <= value <= 1 else "–"


def _points(value: float) -> str:
    return f"{100 * value:+.1f}" if abs(value) <= 1 else "–"
