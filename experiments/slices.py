"""The slices of Fashion-MNIST and CIFAR-10 that studies and benchmarks run on, drawn once and always the same."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Arrays = Mapping[str, npt.NDArray[Any]]

PER_CLASS = {"fashion-mnist": (400, 150), "cifar10": (500, 150)}
"""Training and test images of each class."""


def fashion_mnist(folder: Path) -> Arrays:
    """Return Fashion-MNIST's slice from the folder that holds ``FashionMNIST/raw``, with its files unpacked."""
    from torchvision.datasets import FashionMNIST

    train, test = (FashionMNIST(str(folder), train=part, download=False) for part in (True, False))
    return _slice("fashion-mnist", train.data.numpy(), train.targets.numpy(), test.data.numpy(), test.targets.numpy())


def cifar10(file: Path) -> Arrays:
    """Return CIFAR-10's slice from an ``npz`` with ``x_train``, ``y_train``, ``x_test`` and ``y_test``."""
    with np.load(file) as found:
        return _slice("cifar10", *(found[name] for name in ("x_train", "y_train", "x_test", "y_test")))


def _slice(
    name: str,
    x_train: npt.NDArray[Any],
    y_train: npt.NDArray[Any],
    x_test: npt.NDArray[Any],
    y_test: npt.NDArray[Any],
) -> Arrays:
    rng = np.random.default_rng(0)
    train, test = (_drawn(labels, count, rng) for labels, count in zip((y_train, y_test), PER_CLASS[name], strict=True))
    return {"x_train": x_train[train], "y_train": y_train[train], "x_test": x_test[test], "y_test": y_test[test]}


def _drawn(labels: npt.NDArray[Any], count: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    chosen = [rng.permutation(np.flatnonzero(labels == label))[:count] for label in np.unique(labels)]
    return np.sort(np.concatenate(chosen))
