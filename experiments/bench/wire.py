"""How fast knowledge is encoded, checked and decoded, codec by codec, beside a copy of the same memory.

Knowledge of 50,000 samples and 100 classes, one thread, with torch loaded as it is at every peer. Contenders take turns
within each repeat, and figures are those of the fastest repeat, in CPU time, which other work on the machine disturbs
least: gigabytes of float32 logits per second, and bytes on the wire. Decoding checks every array it is given.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from experiments.bench.measuring import leave
from fedkd.errors import SettingError
from fedkd.wire.codecs import Codec, codec, encoded_bytes
from fedkd.wire.messages import Answer, pack_answer, unpack_answer

SHAPE, QUICK_SHAPE = (50_000, 100), (500, 100)
CODECS = ("fp32", "fp16", "int8", "topk:5", "topk:10", "fp16+zstd", "int8+zstd")
REPEATS = 15

_STEPS = ("encode", "decode", "travel")


def run(*, quick: bool = False) -> dict[str, Any]:
    """Time every codec; return ``{"ratio": ..., "memory_gb_s": ..., "rows": [...]}``.

    ``ratio`` is the slower of ``int8``'s and ``topk:5``'s encoding, in GB/s: at least 1 is the goal. A row has the
    ``codec``, its ``bytes``, and the gigabytes of float32 logits per second of ``encode``, ``decode`` and ``travel``
    (packed into a message, unpacked, checked and decoded). ``memory_gb_s`` is a plain copy of the logits into memory
    of its own.

    Args:
        quick: a small array and few repeats, to see that it runs.
    """
    import torch

    shape, repeats = (QUICK_SHAPE, 2) if quick else (SHAPE, REPEATS)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _measure(shape, repeats)
    finally:
        torch.set_num_threads(threads)


def _measure(shape: tuple[int, int], repeats: int) -> dict[str, Any]:
    logits = (3 * np.random.default_rng(0).standard_normal(shape)).astype(np.float32)
    found = {name: one for name in CODECS if (one := _known(name)) is not None}
    jobs: dict[tuple[str, str], Callable[[], object]] = {("", "copy"): logits.copy}
    sizes = {}
    for name, one in found.items():
        arrays = one.encode(logits)
        sizes[name] = encoded_bytes(arrays)
        jobs |= {
            (name, "encode"): lambda one=one: one.encode(logits),
            (name, "decode"): lambda one=one, arrays=arrays: one.decode(arrays, shape=shape),
            (name, "travel"): lambda one=one, arrays=arrays: _travel(one, arrays, shape),
        }
    times: dict[tuple[str, str], list[float]] = {job: [] for job in jobs}
    for _ in range(repeats):
        for job, work in jobs.items():
            began = time.process_time()
            work()
            times[job].append(time.process_time() - began)
    speed = {job: logits.nbytes / 1e9 / min(seconds) for job, seconds in times.items()}
    rows = [
        {"codec": name, "bytes": sizes[name], **{f"{what}_gb_s": speed[name, what] for what in _STEPS}}
        for name in found
    ]
    by_name = {row["codec"]: row for row in rows}
    return {
        "ratio": min(by_name[name]["encode_gb_s"] for name in ("int8", "topk:5")),
        "shape": list(shape),
        "memory_gb_s": speed["", "copy"],
        "rows": rows,
    }


def main(json_path: Path | None = None, *, quick: bool = False) -> None:
    """Print a table of :func:`run`, and write it to ``json_path`` if given."""
    from rich.console import Console
    from rich.table import Table

    result = run(quick=quick)
    samples, classes = result["shape"]
    table = Table(
        box=None,
        title=f"Knowledge of {samples:,} × {classes}, 1 thread; a copy of it: {result['memory_gb_s']:.1f} GB/s",
        caption="GB/s of float32 logits; travel: packed into a message, unpacked, checked and decoded",
    )
    for column in ("codec", "bytes", "of fp32", *(f"{step} GB/s" for step in _STEPS)):
        table.add_column(column, justify="left" if column == "codec" else "right")
    full = 4 * samples * classes
    for row in result["rows"]:
        share = f"{row['bytes'] / full:.1%}"
        table.add_row(row["codec"], f"{row['bytes']:,}", share, *(f"{row[f'{step}_gb_s']:.2f}" for step in _STEPS))
    Console().print(table)
    leave(result, json_path)


def _known(name: str) -> Codec | None:
    """Return a codec, or None where its package is missing."""
    try:
        return codec(name)
    except SettingError:
        return None


def _travel(one: Codec, arrays: dict[str, np.ndarray], shape: tuple[int, int]) -> np.ndarray:
    content = pack_answer(Answer("peer-0", 1, arrays=arrays))
    return one.decode(unpack_answer(content).arrays, shape=shape)
