"""How fast the losses are, forward and backward, against the shortest correct PyTorch expression of each.

One thread, float32, T = 4. The plain expression, our function, our prepared objective and our KL take turns within each
repeat, and ratios are taken turn by turn, so that drift of the machine cancels; all figures are medians. Times are of
the processor, so that what else runs on the machine counts only by the caches that it fills. The process keeps freed
memory, as every peer's does: glibc otherwise hands large arrays back and has them cleared anew, at one call more often
than at another, and the figures swing by a factor of three.
"""

import math
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from experiments.bench.measuring import leave
from fedkd.losses import divergences
from fedkd.losses.balanced import balanced
from fedkd.losses.decoupled import dkd
from fedkd.losses.teachers import objective
from fedkd.training.memory import keep_freed_memory

SIZES = ((128, 10), (128, 100), (512, 1000))
TEMPERATURE = 4.0
TEACHERS = 3
SEVERAL = ("kl of 3", "msed")  # have all the teachers, the others one

Loss = Callable[[Tensor], Tensor]


def _plain_kl(student: Tensor, teacher: Tensor) -> Tensor:
    log_q, log_p = (torch.log_softmax(z / TEMPERATURE, dim=-1) for z in (student, teacher))
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def _plain_reverse_kl(student: Tensor, teacher: Tensor) -> Tensor:
    return _plain_kl(teacher, student)


def _plain_js(student: Tensor, teacher: Tensor) -> Tensor:
    q, p = (torch.softmax(z / TEMPERATURE, dim=-1) for z in (student, teacher))
    log_m = ((p + q) / 2).log()
    return (F.kl_div(log_m, p, reduction="batchmean") + F.kl_div(log_m, q, reduction="batchmean")) / 2


def _plain_td(student: Tensor, teacher: Tensor) -> Tensor:
    q, p = (torch.softmax(z / TEMPERATURE, dim=-1) for z in (student, teacher))
    return ((p - q) ** 2 / (p + q)).sum(dim=-1).mean() / 2


def _entropy(probs: Tensor) -> Tensor:
    entropy: Tensor = torch.special.entr(probs).sum(dim=-1)
    return entropy


def _plain_sed(student: Tensor, teacher: Tensor) -> Tensor:
    q, p = (torch.softmax(z / TEMPERATURE, dim=-1) for z in (student, teacher))
    return (_entropy((p + q) / 2) - (_entropy(p) + _entropy(q)) / 2).expm1().mean()


def _plain_msed(student: Tensor, teachers: Tensor) -> Tensor:
    members = torch.softmax(torch.cat([student.unsqueeze(0), teachers]) / TEMPERATURE, dim=-1)
    return (_entropy(members.mean(dim=0)) - _entropy(members).mean(dim=0)).expm1().mean() / (len(members) - 1)


def _plain_balanced(student: Tensor, teacher: Tensor) -> Tensor:
    log_q, log_p = (torch.log_softmax(z / TEMPERATURE, dim=-1) for z in (student, teacher))
    q, p = log_q.exp(), log_p.exp()
    flat = (_entropy(q) > _entropy(p)).detach()
    forward, reverse = (p * (log_p - log_q)).sum(dim=-1), (q * (log_q - log_p)).sum(dim=-1)
    return torch.where(flat, forward + 2 * reverse, 2 * forward + reverse).mean()


def _plain_dkd(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    strong = F.one_hot(labels, student.shape[-1]).bool()
    q, p = (torch.softmax(z / TEMPERATURE, dim=-1) for z in (student, teacher))
    pair_q, pair_p = (torch.stack([v[strong], 1 - v[strong]], dim=-1) for v in (q, p))
    log_q, log_p = (
        torch.log_softmax((z / TEMPERATURE).masked_fill(strong, -1000.0), dim=-1) for z in (student, teacher)
    )
    between = F.kl_div(pair_q.log(), pair_p, reduction="batchmean")
    return between + 8 * F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def _contenders(name: str, student: Tensor, teachers: Tensor, labels: Tensor) -> dict[str, Loss]:
    """Return the plain, our own and our prepared form of a loss, and our KL: student logits -> scalar."""
    teacher, index = teachers[0], torch.arange(len(student))
    several = name in SEVERAL
    prepared_objective = objective(
        name.split()[0], combine="pairwise" if several else "averaged", temperature=TEMPERATURE
    )
    prepared = prepared_objective.prepare(teachers if several else teachers[:1], labels=labels)
    forms: Mapping[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
        "ce": (lambda z: F.cross_entropy(z / TEMPERATURE, (teacher / TEMPERATURE).softmax(dim=-1)), divergences.ce),
        "kl": (lambda z: _plain_kl(z, teacher), divergences.kl),
        "reverse_kl": (lambda z: _plain_reverse_kl(z, teacher), divergences.reverse_kl),
        "jeffreys": (lambda z: _plain_kl(z, teacher) + _plain_reverse_kl(z, teacher), divergences.jeffreys),
        "js": (lambda z: _plain_js(z, teacher), divergences.js),
        "td": (lambda z: _plain_td(z, teacher), divergences.td),
        "sed": (lambda z: _plain_sed(z, teacher), divergences.sed),
        "bdkd": (lambda z: _plain_balanced(z, teacher), balanced),
        "dkd": (
            lambda z: _plain_dkd(z, teacher, labels),
            lambda z, t, *, temperature: dkd(z, t, labels, temperature=temperature),
        ),
        "kl of 3": (
            lambda z: torch.stack([_plain_kl(z, one) for one in teachers]).mean(),
            lambda z, _, *, temperature: torch.stack(
                [divergences.kl(z, one, temperature=temperature) for one in teachers]
            ),
        ),
        "msed": (
            lambda z: _plain_msed(z, teachers),
            lambda z, _, *, temperature: divergences.msed(z, teachers, temperature=temperature),
        ),
    }
    plain, own = forms[name]
    kl = forms["kl of 3" if several else "kl"][1]
    return {
        "plain": plain,
        "ours": lambda z: own(z, teacher, temperature=TEMPERATURE).mean(),
        "kl": lambda z: kl(z, teacher, temperature=TEMPERATURE).mean(),
        # Indexed anew each time, as a training step does it.
        "prepared": lambda z: prepared_objective(z, prepared[index]).mean(),
    }


LOSSES = ("kl", "ce", "reverse_kl", "jeffreys", "js", "td", "sed", "bdkd", "dkd", "kl of 3", "msed")


def _seconds(loss: Loss, student: Tensor, calls: int) -> float:
    started = time.process_time()
    for _ in range(calls):
        student.grad = None
        loss(student).backward()  # type: ignore[no-untyped-call]
    return (time.process_time() - started) / calls


def _measure(name: str, batch: int, classes: int, *, repeats: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    student = (3 * torch.randn(batch, classes, generator=generator)).requires_grad_()
    teachers = 3 * torch.randn(TEACHERS, batch, classes, generator=generator)
    labels = torch.randint(classes, (batch,), generator=generator)
    contenders = _contenders(name, student, teachers, labels)
    values = {form: loss(student).item() for form, loss in contenders.items() if form != "kl"}
    if any(not math.isclose(value, values["plain"], rel_tol=1e-3) for value in values.values()):
        raise ArithmeticError(f"The forms of {name} at {batch}x{classes} differ: {values}.")
    calls = max(1, int(2e-3 / min(_seconds(loss, student, 3) for loss in contenders.values())))
    times: dict[str, list[float]] = {form: [] for form in contenders}
    for _ in range(repeats):
        for form, loss in contenders.items():
            times[form].append(_seconds(loss, student, calls))
    medians = {form: statistics.median(seconds) for form, seconds in times.items()}

    def ratio(form: str, base: str) -> float:
        return statistics.median(a / b for a, b in zip(times[form], times[base], strict=True))

    return {
        "loss": name,
        "batch": batch,
        "classes": classes,
        **{f"{form}_us": 1e6 * medians[form] for form in ("plain", "ours", "prepared")},
        "ours_to_plain": ratio("ours", "plain"),
        "prepared_to_plain": ratio("prepared", "plain"),
        "ours_to_kl": ratio("ours", "kl"),
        "prepared_to_kl": ratio("prepared", "kl"),
    }


def run(quick: bool = False) -> dict[str, Any]:
    """Time every loss at every size; an ``ArithmeticError`` if the forms of one do not agree in value.

    Args:
        quick: the smallest size and few repeats, to see that it runs.

    Returns:
        ``{"ratio": ..., "rows": [{"loss", "batch", "classes", "plain_us", "ours_us", "prepared_us", "ours_to_plain",
        "prepared_to_plain", "ours_to_kl", "prepared_to_kl"}]}``; times in microseconds per forward and backward pass,
        KL our function of as many teachers. ``ratio`` is the largest ``ours_to_plain``: at most 1 where no function of
        ours is slower than its shortest expression.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    keep_freed_memory()
    try:
        sizes, repeats = (SIZES[:1], 3) if quick else (SIZES, 41)
        rows = [_measure(name, *size, repeats=repeats) for size in sizes for name in LOSSES]
    finally:
        torch.set_num_threads(threads)
    return {"ratio": max(row["ours_to_plain"] for row in rows), "rows": rows}


def main(json_path: Path | None = None, *, quick: bool = False) -> None:
    """Print the table of :func:`run`, and write it to ``json_path`` if given."""
    from rich.console import Console
    from rich.table import Table

    result = run(quick)
    table = Table(
        box=None,
        title=f"Losses, forward + backward, 1 thread, torch {torch.__version__}",
        caption="plain: the shortest correct PyTorch expression; prepared: the teacher's side made once; "
        "KL: ours, of as many teachers (3 for msed)",
    )
    for column in ("B × C", "loss", "plain µs", "ours µs", "prepared µs", "ours/plain", "prepared/plain", "ours/KL"):
        table.add_column(column, justify="left" if column == "loss" else "right", no_wrap=True)
    for row in result["rows"]:
        table.add_row(
            f"{row['batch']} × {row['classes']}",
            row["loss"],
            *(f"{row[column]:.0f}" for column in ("plain_us", "ours_us", "prepared_us")),
            *(f"{row[column]:.2f}" for column in ("ours_to_plain", "prepared_to_plain", "ours_to_kl")),
            end_section=row["loss"] == LOSSES[-1],
        )
    Console().print(table)
    leave(result, json_path)
