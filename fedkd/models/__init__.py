"""Models: a registry, torchvision's, checkpoints, and one's own by `package.module:factory`."""

from fedkd.models.checkpoint import load_checkpoint
from fedkd.models.registry import build, check, is_ours, names, parameters_count, register

__all__ = ["build", "check", "is_ours", "load_checkpoint", "names", "parameters_count", "register"]
