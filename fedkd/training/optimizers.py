"""Gradient descent by torch's own functional optimisers, without what the classes around them import.

The first object of a ``torch.optim`` class makes its process import torch's compiler, which is seconds of work in
every actor that trains; the functions that do the classes' arithmetic do not.
"""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

_BETAS, _EPSILON = (0.9, 0.999), 1e-8


class Descent:
    """An optimiser for one phase of training: bit by bit what the class of that name in ``torch.optim`` does.

    Args:
        name: ``adam``, ``adamw`` or ``sgd``.
        parameters: what is descended on; those that need no gradient are left out.
        learning_rate: step size.
        momentum: of ``sgd``; ignored by the others.
        weight_decay: decoupled for ``adamw``, as an L2 term otherwise.
        fused: whether all parameters are updated by one kernel; its results differ in the last bits.

    Source: torch.optim's functional API.
    """

    def __init__(
        self,
        name: str,
        parameters: Iterable[Tensor],
        *,
        learning_rate: float,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        fused: bool = False,
    ) -> None:
        self.name, self.learning_rate, self.weight_decay, self.fused = name, learning_rate, weight_decay, fused
        self.momentum = momentum
        self.parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self._moments: dict[Tensor, tuple[Tensor, Tensor, Tensor]] = {}
        self._buffers: dict[Tensor, Tensor | None] = {}

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for parameter in self.parameters:
            parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """Take a step along the gradients; a parameter without one stays where it is."""
        moving = [parameter for parameter in self.parameters if parameter.grad is not None]
        gradients = [parameter.grad for parameter in moving if parameter.grad is not None]
        # `None` leaves it to torch which of its ways is best on the parameters' device, as its classes do.
        fused = True if self.fused else None
        if self.name == "sgd":
            # None is a buffer's first step; the fused kernel takes no mixture, and 0 comes to the same.
            buffers = [
                self._buffers[p] if p in self._buffers else torch.zeros_like(p) if self.fused else None for p in moving
            ]
            sgd(
                moving, gradients, buffers, fused=fused, lr=self.learning_rate, momentum=self.momentum,
                weight_decay=self.weight_decay, dampening=0, nesterov=False, maximize=False,
            )  # fmt: skip
            self._buffers.update(zip(moving, buffers, strict=True))
            return
        if not moving:
            return
        means, squares, steps = (list(kind) for kind in zip(*map(self._moments_of, moving), strict=True))
        (adamw if self.name == "adamw" else adam)(
            moving, gradients, means, squares, [], steps, fused=fused, lr=self.learning_rate, beta1=_BETAS[0],
            beta2=_BETAS[1], eps=_EPSILON, weight_decay=self.weight_decay, amsgrad=False, maximize=False,
        )  # fmt: skip

    def _moments_of(self, parameter: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return a parameter's mean gradient, mean squared gradient and number of steps."""
        if parameter not in self._moments:
            # A step counter on a GPU would cost a kernel per parameter, but for the one kernel that reads them all.
            count = torch.zeros((), device=parameter.device if self.fused else "cpu")
            self._moments[parameter] = torch.zeros_like(parameter), torch.zeros_like(parameter), count
        return self._moments[parameter]
