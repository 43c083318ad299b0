"""Where a peer computes."""

import torch

from fedkd.errors import SettingError


def pick_device(name: str, *, repeatable: bool = True) -> torch.device:
    """Return the device of a setting; ``auto`` is the GPU that this process was given, else the CPU.

    Args:
        name: the setting.
        repeatable: whether a GPU has to choose the same kernels in every run, or may try which are the fastest.

    Raises:
        SettingError: no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise SettingError("device", name, "auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise SettingError("device", name, f"a device of this process ({torch.cuda.device_count()} GPUs visible)")
    if device.type == "cuda":
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = repeatable, not repeatable
    return device
