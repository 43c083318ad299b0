"""How the learning rate goes, in closed form.

`torch.optim.lr_scheduler` would say the same, but it takes an optimiser of torch's classes, and with these its process
imports torch's compiler (see :mod:`fedkd.training.optimizers`).
"""

import math
from dataclasses import dataclass, replace

_ROUNDING = 1e-9  # of a share of the steps; steps lie further apart


@dataclass(frozen=True)
class Rates:
    """Factors of the learning rate over the steps of a phase.

    Attributes:
        schedule: ``constant``; ``cosine``, ½ + ½ cos πq; or ``step``, a tenth from q = ½ on and a hundredth from ¾ on.
            q goes from 0 to 1 between the warm-up and the end.
        warm_up: share of all steps over which the factor first grows linearly to 1.
        begin: share of all steps that lie before this phase, where several phases share one schedule.
        end: share that it leads to.

    Source: cosine annealing without restarts, Loshchilov and Hutter 2017, arXiv 1608.03983; steps as He et al. 2015,
    arXiv 1512.03385, §4.2, have them on CIFAR-10; a linear warm-up, Goyal et al. 2017, arXiv 1706.02677 [paper].
    """

    schedule: str = "constant"
    warm_up: float = 0.0
    begin: float = 0.0
    end: float = 1.0

    def within(self, begin: float, end: float) -> "Rates":
        """Return the rates of a phase that is a part of what the schedule goes over, given as shares in [0, 1]."""
        return replace(self, begin=begin, end=end)

    def factor(self, step: int, steps: int) -> float:
        """Return the factor of a step, counted from 0, of the steps of the phase.

        >>> [round(Rates("cosine", warm_up=0.5).factor(step, 8), 2) for step in range(8)]
        [0.25, 0.5, 0.75, 1.0, 1.0, 0.85, 0.5, 0.15]
        """
        width = (self.end - self.begin) / steps
        before = self.begin + step * width
        if before < self.warm_up - _ROUNDING:
            return min(1.0, (before + width) / self.warm_up)
        after = (before - self.warm_up) / (1 - self.warm_up) + _ROUNDING
        if self.schedule == "cosine":
            return 0.5 + 0.5 * math.cos(math.pi * min(after, 1.0))
        if self.schedule == "step":
            return 1.0 if after < 0.5 else 0.1 if after < 0.75 else 0.01
        return 1.0
