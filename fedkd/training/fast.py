"""The fast path: the same training in fewer bits and in the order of memory that convolutions like best.

Its results agree with those without it within the noise of a seed, not bit by bit, and differ between machines.
"""

from collections.abc import Mapping
from functools import lru_cache

import torch
from torch import Tensor, nn

_VARIANTS = 64  # of one forward method: architectures that share it, by shapes of batches, by training and evaluation


def arranged(model: nn.Module) -> nn.Module:
    """Put a model's convolutions into channels-last order, in place; what they compute stays the same."""
    return model.to(memory_format=torch.channels_last)


def forward(model: nn.Module, inputs: Tensor, *, fast: bool = False) -> Tensor:
    """Return a model's logits ``[B, C]`` for inputs ``[B, ...]``, in float32.

    Args:
        model: on the device of the inputs.
        inputs: float32.
        fast: compute in bfloat16 where the device does so faster.
    """
    if not (fast and bfloat16_pays(inputs.device.type)):
        logits: Tensor = model(inputs)
        return logits.float()
    with torch.autocast(inputs.device.type, dtype=torch.bfloat16):
        logits = model(inputs)
    return logits.float()


def compiled(model: nn.Module) -> nn.Module:
    """Have a model compile what it computes when it is first called, in place; on a GPU into CUDA graphs.

    Models of one architecture share what was compiled; every shape of batch is compiled by itself.
    """
    import torch._dynamo

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _VARIANTS)
    model.compile(mode="reduce-overhead", dynamic=False)
    return model


@lru_cache
def bfloat16_pays(device: str) -> bool:
    """Tell whether a type of device has instructions for bfloat16; without them it is emulated, and slow."""
    if device == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device != "cpu":
        return False
    capabilities: Mapping[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()  # an older torch does not say
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16"))
