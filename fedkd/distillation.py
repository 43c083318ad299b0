"""The objective that a peer minimises on the proxy set: divergence, teachers, weight and temperature."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fedkd import divergences
from fedkd.config import RunConfig
from fedkd.errors import SettingError
from fedkd.teachers import Objective, Prepared, objective


@dataclass(frozen=True)
class Distillation:
    """Batch mean of an objective, times its weight.

    Attributes:
        objective: per-sample loss of a student against its teachers.
        scale: ``kd-weight``, times T² under ``t2-scaling`` (Hinton et al., 2015): the gradient of a softmax
            at temperature T shrinks by 1/T².
    """

    objective: Objective
    scale: float

    @classmethod
    def from_config(cls, config: RunConfig) -> "Distillation":
        """Build what a run's settings ask for.

        Raises:
            SettingError: the divergence does not exist.
        """
        if config.divergence not in divergences.names():
            raise SettingError("divergence", config.divergence, "one of " + ", ".join(divergences.names()))
        scale = config.kd_weight * (config.temperature**2 if config.t2_scaling else 1.0)
        return cls(
            objective(config.divergence, combine="averaged", average=config.average, temperature=config.temperature),
            scale,
        )

    def prepare(self, teacher_logits: Tensor, weights: list[float]) -> Prepared:
        """Compute what depends on the teachers alone, once for the whole proxy set.

        Args:
            teacher_logits: ``[K, N, C]``.
            weights: one number >= 0 per teacher.
        """
        return self.objective.prepare(teacher_logits, weights=torch.tensor(weights, device=teacher_logits.device))

    def __call__(self, student_logits: Tensor, teachers: Prepared) -> Tensor:
        """Return the scaled batch mean, a scalar."""
        return self.scale * self.objective(student_logits, teachers).mean()
