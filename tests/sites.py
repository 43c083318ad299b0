"""Sites with files of their own: each has its part of the digits, its own copy of the proxy set and another model."""

from pathlib import Path
from typing import Any

from experiments.deploy.demo import MODELS, write_demo_data


def deployed(sites: list[dict[str, Any]], **own: Any) -> dict[int, dict[str, Any]]:
    """Return the sites' own configurations as deployed ones that work in the test's process, by their nodes.

    Changes are written with underscores.
    """
    changed = {name.replace("_", "-"): value for name, value in own.items()}
    return {i: {**site, "simulated": False, "worker": False, **changed} for i, site in enumerate(sites)}


def make_sites(folder: Path, peers: int = 3, *, proxy_size: int = 60) -> list[dict[str, Any]]:
    """Write the files of some peers; return each one's own configuration."""
    folders = [folder / f"site-{i}" for i in range(peers)]
    for site in folders:
        site.mkdir(parents=True)
    write_demo_data(folders, proxy_size=proxy_size)
    return [
        {
            "name": f"site-{i}",
            "partition-id": i,
            "num-partitions": peers,
            "model": MODELS[i],
            "dataset": f"npz:{site / 'data.npz'}",
            "proxy": f"npz:{site / 'proxy.npz'}",
        }
        for i, site in enumerate(folders)
    ]
