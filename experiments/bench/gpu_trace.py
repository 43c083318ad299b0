"""What single phases of training do on a GPU: kernels and their time, launches, and what waits for the device."""

import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from fedkd.models import build
from fedkd.settings.config import RunConfig
from fedkd.training.distillation import Distillation
from fedkd.training.fast import arranged
from fedkd.training.loops import Optimization, distil, fit, fit_and_distil, predict

_WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")
_LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx", "cudaGraphLaunch")
_EPOCHS = 1

Phase = Callable[[], object]


def trace(name: str, size: Mapping[str, Any], device: str) -> list[dict[str, Any]]:
    """Look into the phases of a peer's round, in float32 and on the fast path, each after one that warms up.

    Args:
        name: the model.
        size: ``batch``, ``proxy``, ``private`` and ``side``, as the benchmark has them.
        device: ``cuda``, or ``cpu``, where there is no kernel to count.

    Returns:
        A line for each phase: ``model``, ``phase``, ``fast``, ``steps``; ``wall_ms`` and ``gpu_ms`` a step, the latter
        the time in kernels and copies; ``launches`` a step; ``waits``, how often the host waited for the device in the
        whole phase, by torch's own guard, with the place in the code, and ``calls``, CUDA's own calls that wait, which
        count the end of the profile as well.
    """
    found = []
    for fast in (False, True):
        for phase, (steps, work) in _phases(name, size, device, fast=fast).items():
            work()
            found.append({"model": name, "phase": phase, "fast": fast, "steps": steps, **_look(work, steps, device)})
    return found


def _phases(name: str, size: Mapping[str, Any], device: str, *, fast: bool) -> dict[str, tuple[int, Phase]]:
    batch, shape = size["batch"], (3, size["side"], size["side"])
    stream = torch.Generator().manual_seed(0)
    private, proxy = (torch.randn(size[kind], *shape, generator=stream).to(device) for kind in ("private", "proxy"))
    labels = (torch.arange(size["private"]) % 10).to(device)
    logits = torch.randn(3, size["proxy"], 10, generator=stream).to(device)
    model = build(name, input_shape=shape, num_classes=10, seed=0).to(device)
    model = arranged(model) if fast else model
    how = Optimization(batch_size=batch, fast=fast)
    loss = Distillation.from_config(RunConfig())
    teachers = loss.prepare(logits, torch.ones(3, device=device))
    own, both = _EPOCHS * -(-size["private"] // batch), _EPOCHS * -(-size["proxy"] // batch)
    return {
        "train": (own, lambda: fit(model, private, labels, epochs=_EPOCHS, how=how, seed=0)),
        "distil": (both, lambda: distil(model, proxy, teachers, loss, epochs=_EPOCHS, how=how, seed=0)),
        "both": (
            both,
            lambda: fit_and_distil(model, (private, labels), proxy, teachers, loss, epochs=_EPOCHS, how=how, seed=0),
        ),
        "predict": (1, lambda: predict(model, proxy, fast=fast)),
    }


def _look(work: Phase, steps: int, device: str) -> dict[str, Any]:
    if device != "cuda":
        began = time.perf_counter()
        work()
        return {"wall_ms": 1000 * (time.perf_counter() - began) / steps}
    torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    torch.cuda.synchronize()
    wall = time.perf_counter() - began
    with profile(activities=[ProfilerActivity.CUDA]) as seen:  # the CPU's operators take minutes to sum up
        work()
    events = seen.key_averages()
    calls = {event.key: event.count for event in events if event.key.startswith(_WAITS)}
    on_gpu = sum(event.self_device_time_total for event in events if event.device_type == DeviceType.CUDA)
    launches = sum(event.count for event in events if event.key in _LAUNCHES)
    return {
        "wall_ms": 1000 * wall / steps,
        "gpu_ms": on_gpu / 1000 / steps,
        "launches": launches / steps,
        "waits": _waits(work),
        "calls": {name: count for name, count in calls.items() if not name.startswith("cudaMemcpyAsync")},
    }


def _waits(work: Phase) -> dict[str, int]:
    """Return how often the host waits for the device, by place, as torch's synchronisation guard has it."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            work()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    of_cuda = [warning for warning in told if "synchroniz" in str(warning.message)]
    return dict(Counter(f"{'/'.join(warning.filename.split('/')[-2:])}:{warning.lineno}" for warning in of_cuda))
