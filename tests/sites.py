"""Sites with files of their own: each has its part of the digits as an npz, and its own copy of the proxy set."""

from pathlib import Path
from typing import Any

import numpy as np

from fedkd.data.sources import load_source

MODELS = ("mlp", "cnn-small", "resnet8")


def make_sites(folder: Path, peers: int = 3, *, proxy_size: int = 60) -> list[dict[str, Any]]:
    """Write the files of some peers; return each one's own configuration."""
    source = load_source("digits", data_dir=folder)
    x, y = (part.numpy() for part in (source.train.inputs.permute(0, 2, 3, 1), source.train.labels))
    test = {"x_test": source.test.inputs.permute(0, 2, 3, 1).numpy(), "y_test": source.test.labels.numpy()}
    public, private = slice(0, proxy_size), np.arange(proxy_size, len(x))
    own = []
    for i, mine in enumerate(np.array_split(private, peers)):
        site = folder / f"site-{i}"
        site.mkdir(parents=True)
        np.savez(site / "data.npz", x_train=x[mine], y_train=y[mine], classes=source.classes, **test)
        np.savez(site / "proxy.npz", x_train=x[public], y_train=y[public], classes=source.classes, **test)
        own.append(
            {
                "name": f"site-{i}",
                "partition-id": i,
                "num-partitions": peers,
                "model": MODELS[i % len(MODELS)],
                "dataset": f"npz:{site / 'data.npz'}",
                "proxy": f"npz:{site / 'proxy.npz'}",
            }
        )
    return own
