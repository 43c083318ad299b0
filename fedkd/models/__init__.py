"""Models: a registry, other libraries', checkpoints, and one's own by `package.module:factory`."""

from fedkd.models.checkpoint import load_checkpoint
from fedkd.models.libraries import check_there
from fedkd.models.preprocessing import Preprocessing, comes_trained, own_preprocessing
from fedkd.models.registry import build, check, is_ours, names, parameters_count, register

__all__ = [
    "Preprocessing",
    "build",
    "check",
    "check_there",
    "comes_trained",
    "is_ours",
    "load_checkpoint",
    "names",
    "own_preprocessing",
    "parameters_count",
    "register",
]
