"""Data for a trial: each site gets its own part of the handwritten digits, and its own copy of the proxy set."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

MODELS = ("mlp", "cnn-small", "resnet8", "cnn-wide", "resnet14", "resnet20")


def write_demo_data(folders: Sequence[Path], *, proxy_size: int = 400) -> None:
    """Write `data.npz` and `proxy.npz` into every folder.

    Args:
        folders: of the peers.
        proxy_size: images that all of them get, taken out of the training set first.
    """
    from fedkd.data.sources import load_source

    source = load_source("digits", data_dir=folders[0])
    (x, y), (x_test, y_test) = (
        (part.inputs.permute(0, 2, 3, 1).numpy(), part.labels.numpy()) for part in (source.train, source.test)
    )
    common: dict[str, Any] = {"x_test": x_test, "y_test": y_test, "classes": np.array(source.classes)}
    for folder, mine in zip(folders, np.array_split(np.arange(proxy_size, len(x)), len(folders)), strict=True):
        np.savez(folder / "data.npz", x_train=x[mine], y_train=y[mine], **common)
        np.savez(folder / "proxy.npz", x_train=x[:proxy_size], y_train=np.zeros(proxy_size, np.int64), **common)
