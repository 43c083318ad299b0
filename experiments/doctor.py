"""`fedkd doctor`: what is installed and where things lie, whether it fits together, and whether every loss is right.

A line is `ok`, `WRONG`, or `-` where there is nothing to judge. The losses are computed here and now and compared with
numbers that were worked out apart from this code.
"""

import logging
import os
import platform
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from fedkd.source import app_folder, source_root

FLOWER_COMMANDS = ("flwr", "flower-superlink", "flower-supernode", "flwr-simulation")
_TOLERANCE = 2e-6  # the known answers have six digits
_LITTLE_DISK = 2**30


@dataclass(frozen=True)
class Finding:
    """One line of the examination.

    Attributes:
        part: what it belongs to.
        name: what was looked at.
        detail: what was found.
        fine: False if something is wrong, None if there is nothing to judge.
    """

    part: str
    name: str
    detail: str
    fine: bool | None = None

    def line(self) -> str:
        """Return it as text.

        >>> Finding("losses", "js", "0.059831", fine=True).line()
        'ok     js                0.059831'
        """
        mark = {True: "ok", False: "WRONG", None: "-"}[self.fine]
        return f"{mark:<7}{self.name:<18}{self.detail}".rstrip()


def examine(*, ray: bool = False) -> Iterator[Finding]:
    """Look at everything, one finding at a time.

    Args:
        ray: start a Ray of its own for a moment, too.
    """
    for part in (_packages, _extras, _flower, _machine, _ray if ray else _ray_around, _places, _losses):
        try:
            yield from part()
        except Exception as error:  # whatever is broken here is what the user wants to know
            yield Finding(part.__name__.strip("_"), "broken", f"{type(error).__name__}: {error}", fine=False)


def _packages() -> Iterator[Finding]:
    from packaging.requirements import Requirement

    app = app_folder()
    where = "a clone" if app == source_root().parent else "in the installed package"
    yield Finding("packages", "fedkd", f"{_version('fedkd') or 'not installed'}, {source_root()}")
    yield Finding("packages", "Flower app", f"{app} ({where})", fine=(app / "pyproject.toml").is_file())
    yield Finding("packages", "python", f"{platform.python_version()}, {sys.executable}")
    for text in metadata.requires("fedkd") or [] if _version("fedkd") else []:
        wanted = Requirement(text)
        if wanted.marker is None:
            found = _version(wanted.name)
            said = f"{found or 'not installed'} (needs {wanted.specifier})"
            fine = found is not None and wanted.specifier.contains(found, prereleases=True)
            yield Finding("packages", wanted.name, said, fine=fine)


def _extras() -> Iterator[Finding]:
    from packaging.requirements import Requirement

    if not _version("fedkd"):
        return
    optional = [Requirement(text) for text in metadata.requires("fedkd") or [] if "extra ==" in text]
    for extra in metadata.metadata("fedkd").get_all("Provides-Extra") or []:
        own = [wanted.name for wanted in optional if wanted.marker and wanted.marker.evaluate({"extra": extra})]
        missing = [name for name in own if not _version(name)]
        said = f"not installed: {', '.join(missing)}" if missing else "installed"
        yield Finding("extras", extra, f"{said}  (pip install 'fedkd[{extra}]')" if missing else said)


def _flower() -> Iterator[Finding]:
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
    for command in FLOWER_COMMANDS:
        found = shutil.which(command, path=path)
        yield Finding("flower", command, found or "not found", fine=found is not None)


def _machine() -> Iterator[Finding]:
    import psutil
    import torch

    memory = psutil.virtual_memory()
    yield Finding("machine", "system", platform.platform())
    yield Finding("machine", "CPUs", str(os.cpu_count()))
    yield Finding("machine", "memory", f"{memory.total / 2**30:.1f} GiB, {memory.available / 2**30:.1f} free")
    yield Finding("machine", "bfloat16", _bfloat16())
    if not torch.cuda.is_available():
        yield Finding("machine", "GPUs", f"none that torch {torch.__version__} can use")
    for number in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(number)
        yield Finding("machine", f"cuda:{number}", f"{device.name}, {device.total_memory / 2**30:.1f} GiB")


def _bfloat16() -> str:
    from fedkd.training.fast import bfloat16_pays

    if not bfloat16_pays("cpu"):
        return "not in this processor: `fast = true` computes in float32 on it"
    return "in this processor's instructions: `fast = true` computes in it" + (
        "" if _version("numba") else ", and faster with numba (pip install 'fedkd[fast]')"
    )


def _ray_around() -> Iterator[Finding]:
    found = os.environ.get("RAY_ADDRESS", "")
    yield Finding("ray", "RAY_ADDRESS", found or "not set: `fedkd run` starts a Ray of its own")
    note = Path(tempfile.gettempdir()) / "ray" / "ray_current_cluster"
    if os.access(note, os.R_OK):  # on a shared machine it may be somebody else's
        said = f"{note} names {note.read_text().strip()}: a bare `flwr run` joins it, unless RAY_ADDRESS=local"
        yield Finding("ray", "another Ray", said)


def _ray() -> Iterator[Finding]:
    yield from _ray_around()
    import ray

    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    try:
        answer = ray.get(ray.remote(lambda: os.getpid()).remote(), timeout=60)
        yield Finding("ray", "actor", f"Ray {ray.__version__} ran a task in process {answer}", fine=True)
    finally:
        ray.shutdown()


def _places() -> Iterator[Finding]:
    data = Path("~/.cache/fedkd/data").expanduser()
    held = sorted(entry.name for entry in data.iterdir()) if data.is_dir() else []
    yield Finding("places", "data sets", f"{data} ({', '.join(held) or 'nothing there yet'}); setting `data-dir`")
    places = {
        "results": (Path.cwd() / "runs", "setting `out-dir`; a simulated peer's state lies below it"),
        "deployed peers": (Path("~/.local/state/fedkd").expanduser(), "their state; `state-dir` of a peer"),
        "scratch": (Path(tempfile.gettempdir()), "TMPDIR"),
    }
    for name, (place, about) in places.items():
        there = next(folder for folder in (place, *place.parents) if folder.exists())
        free, writable = shutil.disk_usage(there).free, os.access(there, os.W_OK | os.X_OK)
        said = f"{place} ({about}), {free / 2**30:.1f} GiB free" + ("" if writable else ", not writable")
        yield Finding("places", name, said, fine=writable and free > _LITTLE_DISK)


def _losses() -> Iterator[Finding]:
    from fedkd.losses import divergences

    known = _known_answers()
    for name, (expected, compute) in known.items():
        try:
            found = compute()
        except Exception as error:  # the others are still worth a look
            yield Finding("losses", name, f"{type(error).__name__}: {error}", fine=False)
            continue
        fine = abs(found - expected) <= _TOLERANCE * max(1.0, abs(expected))
        yield Finding("losses", name, f"{found:.6f}" + ("" if fine else f" instead of {expected:.6f}"), fine=fine)
    if own := [name for name in divergences.names() if name not in known]:
        yield Finding("losses", "others", f"{', '.join(own)}: registered, without a known answer")


def _known_answers() -> dict[str, tuple[float, Callable[[], float]]]:
    """Return what each loss is at teacher logits (3, 2, 1, 0) and student logits (1, 1.5, 0, −0.5), T = 1."""
    import torch

    from fedkd.losses import divergences
    from fedkd.losses.information_flow import flow_divergence

    teacher = torch.tensor([[3.0, 2.0, 1.0, 0.0]], dtype=torch.float64)
    student = torch.tensor([[1.0, 1.5, 0.0, -0.5]], dtype=torch.float64)
    first, pair = torch.tensor([0]), {"strong": "top-k", "top_k": 2}
    features = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]], dtype=torch.float64)

    def loss(name: str, **options: object) -> Callable[[], float]:
        return lambda: float(divergences.get(name)(student, teacher, temperature=1.0, **options))

    def flow(variant: str, kernel: str) -> Callable[[], float]:
        other = torch.eye(3, dtype=torch.float64)
        return lambda: float(getattr(flow_divergence(features, other, variant=variant), kernel))

    return {
        "ce": (1.192281, loss("ce")),
        "kl": (0.244744, loss("kl")),
        "reverse_kl": (0.244922, loss("reverse_kl")),
        "jeffreys": (0.489666, loss("jeffreys")),
        "js": (0.059831, loss("js")),
        "td": (0.117054, loss("td")),
        "sed": (0.061657, loss("sed")),
        "msed": (0.061657, lambda: float(divergences.get("msed")(student, teacher.unsqueeze(0)))),  # n = 2: sed
        "mae": (1.0, loss("mae")),
        "dkd": (0.258340, loss("dkd", labels=first, beta=1.0)),  # BCD + WCD with S = {0}
        "cakd": (0.298632, loss("cakd", beta=1.0, **pair)),  # BCD + SCD + WCD with S = {0, 1}
        "bdkd": (0.734588, loss("bdkd")),
        "infoflow cos": (0.046564, flow("paper", "cosine")),
        "infoflow tst": (0.0058875, flow("paper", "student_t")),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def doctor(*, ray: bool = False, out: Callable[[str], None] = print) -> bool:
    """Print all findings, by part; return whether nothing is wrong.

    Args:
        ray: start a Ray of its own for a moment, too.
        out: takes every line.
    """
    part, wrong = "", []
    for finding in examine(ray=ray):
        if finding.part != part:
            out(f"\n{finding.part}" if part else finding.part)
            part = finding.part
        out(f"  {finding.line()}")
        if finding.fine is False:
            wrong.append(f"{finding.part} {finding.name}")
    out(f"\nwrong: {', '.join(wrong)}" if wrong else "\nnothing is wrong")
    return not wrong
