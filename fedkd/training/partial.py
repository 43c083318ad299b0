"""Models of which only a part trains: the rest stays as it came, and what it computes can be computed once."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fedkd.data.samples import Inputs


class Partly(nn.Module):
    """A model whose last layers train.

    Its state dict is that of the whole model. What does not train has no gradient, and what it has of statistics, as
    batch normalisation has, stays as it is.

    Args:
        whole: the model.
        layers: how many of its last layers train, >= 1; a layer is a module with parameters of its own.

    Raises:
        ValueError: fewer than one, or the model has no more layers than that.
    """

    def __init__(self, whole: nn.Module, layers: int) -> None:
        super().__init__()
        self.whole = whole
        found = [module for module in whole.modules() if any(True for _ in module.parameters(recurse=False))]
        if layers < 1:
            raise ValueError(f"{layers} of its layers cannot train")
        if layers >= len(found):
            raise ValueError(f"of its {len(found)} layers at most {len(found) - 1} can train alone")
        trained = set(found[-layers:])
        for parameter in whole.parameters():
            parameter.requires_grad_(False)
        for module in trained:
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(True)
        buffered = (module for module in whole.modules() if any(True for _ in module.buffers(recurse=False)))
        still = {*found, *buffered} - trained
        every = list(whole.modules())
        after = every[min(map(every.index, trained)) :]  # dropout that lies before is still too
        self._changing = [module for module in after if module not in still]
        whole.eval()

    def forward(self, inputs: Tensor) -> Tensor:
        """Return logits ``[B, C]``."""
        logits: Tensor = self.whole(inputs)
        return logits

    def train(self, mode: bool = True) -> "Partly":
        """Put what trains, and what has no weights and comes after it, into a mode; the rest evaluates."""
        self.training = mode
        for module in self._changing:  # each of itself alone, for below it there may be one that stays
            module.training = mode
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Return the whole model's."""
        return self.whole.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load the whole model's."""
        return self.whole.load_state_dict(*args, **kwargs)


class OnFeatures(Partly):
    """A model whose head alone trains, on features that the rest of it computed before.

    Args:
        whole: the model; :func:`head_name` says what it has to be.

    Raises:
        ValueError: it has no linear layer, or nothing else.
    """

    def __init__(self, whole: nn.Module) -> None:
        super().__init__(whole, 1)
        self._head = _last_linear(whole)
        for parameter in whole.parameters():
            parameter.requires_grad_(False)
        whole.get_submodule(self._head).requires_grad_(True)

    def forward(self, features: Tensor) -> Tensor:
        """Return logits ``[B, C]`` for features ``[B, d]``."""
        logits: Tensor = self.whole.get_submodule(self._head)(features)
        return logits

    def train(self, mode: bool = True) -> "OnFeatures":
        """Note a mode. Nothing changes: a linear layer knows no difference, and the rest is not run."""
        self.training = mode
        return self


def whole_of(model: nn.Module) -> nn.Module:
    """Return the model whose layers have the names that they have in its state dict."""
    return model.whole if isinstance(model, Partly) else model


def head_name(model: nn.Module, inputs: Tensor) -> str:
    """Return the name of a model's head: its last linear layer, which has to make its logits of one vector a sample.

    Args:
        model: on the device of the inputs; it is left in evaluation mode.
        inputs: a few, ``[B, ...]``.

    Raises:
        ValueError: it has no such layer, or does something with what that layer says.
    """
    name = _last_linear(model)
    seen: list[Tensor] = []
    head = model.get_submodule(name)
    hook = head.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach()))
    try:
        with torch.no_grad():
            logits = model.eval()(inputs)
    finally:
        hook.remove()
    if len(seen) != 1 or seen[0].ndim != 2:
        raise ValueError(f"its last linear layer, {name}, is not given one vector a sample")
    with torch.no_grad():
        if not torch.equal(head(seen[0]), logits):
            raise ValueError(f"its logits are not what its last linear layer, {name}, says")
    return name


def _last_linear(model: nn.Module) -> str:
    linear: list[str] = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise ValueError("it has no linear layer")
    return linear[-1]


@torch.no_grad()
def features(model: nn.Module, head: str, inputs: Inputs, *, at_once: int = 64) -> Tensor:
    """Return what a model's head is given for each sample, in evaluation mode.

    Args:
        model: on the device of the inputs.
        head: its name.
        inputs: ``[N, ...]``.
        at_once: samples in one forward pass.

    Returns:
        ``[N, d]`` float32.
    """
    layer = model.get_submodule(head)
    chunks: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _, given: chunks.append(given[0].detach().float().clone()))
    try:
        model.eval()
        for start in range(0, len(inputs), at_once):
            model(inputs[start : start + at_once])
    finally:
        hook.remove()
    width = getattr(layer, "in_features", 0)
    return torch.cat(chunks) if chunks else torch.zeros(0, width, device=inputs.device)


def frozen_part(model: nn.Module, head: str) -> Iterable[tuple[str, Tensor]]:
    """Yield the names and values of all that a model's head does not own, by which its features are told apart."""
    layer = model.get_submodule(head)
    own = {id(value) for value in (*layer.parameters(), *layer.buffers())}  # a state dict may name them otherwise
    for name, value in sorted(model.state_dict(keep_vars=True).items()):
        if id(value) not in own:
            yield name, value
