"""Who holds which samples: a labelled training set partitioned over peers by flwr-datasets.

The schemes (the data strategies of arXiv 2402.14922; their exact settings are [ours]):

- `iid`: a uniform random split into equal shares.
- `dirichlet`: every class is dealt out in proportions drawn from Dirichlet(alpha); a small alpha is a strong skew.
- `classes`: `classes_per_peer` classes for each peer; a class that several peers hold is split evenly among them.
- `overlap`: `shared_classes` classes that all peers share, and the others dealt out as the peers' own.
- `quantity`: the same label mix everywhere, but peer p's share of the samples is proportional to p + 1.
"""

import hashlib
import importlib.util
import math
import os
import sys
import warnings
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fedkd.data.lock import exclusive
from fedkd.errors import SettingError
from fedkd.seeding import derive

if TYPE_CHECKING:
    from flwr_datasets.partitioner import Partitioner

Indices = npt.NDArray[np.int64]

SCHEMES = ("iid", "dirichlet", "classes", "overlap", "quantity")

# flwr-datasets gives up after ten draws in which some peer got too little; strong skews need more starts than that.
_DIRICHLET_STARTS = 20


def partition(
    labels: npt.NDArray[Any],
    peers: int,
    scheme: str,
    *,
    seed: int,
    alpha: float = 0.3,
    classes_per_peer: int = 2,
    shared_classes: int = 2,
    min_samples: int = 10,
    cache: Path | None = None,
) -> list[Indices]:
    """Deal the samples out: labels [N] -> one sorted index array per peer, pairwise disjoint.

    Every sample is dealt, except under `classes` where `peers · classes_per_peer` is less than the number of
    classes: nobody can hold the remaining classes then. The same arguments give the same answer.

    Args:
        labels: class of each sample, [N] integers.
        peers: number of peers.
        scheme: one of `SCHEMES`.
        seed: of the run; the partition's own stream is derived from it.
        alpha: concentration of `dirichlet`, > 0.
        classes_per_peer: of `classes`, from 1 to the number of classes.
        shared_classes: of `overlap`, from 1 to one less than the number of classes.
        min_samples: the fewest samples that any peer may end up with.
        cache: a folder that keeps results, so that only the first process that asks imports flwr-datasets.

    Raises:
        SettingError: on `partition`, `partition-alpha`, `classes-per-peer` or `shared-classes`.
    """
    labels = np.asarray(labels, dtype=np.int64)
    split = _Split(peers, scheme, seed, alpha, classes_per_peer, shared_classes, min_samples)
    _check(labels, split)
    if cache is None:
        return _compute(labels, split)

    identity = f"{version('flwr-datasets')} {split}".encode() + labels.tobytes()
    kept = cache / f"partition-{hashlib.blake2b(identity, digest_size=16).hexdigest()}.npz"
    with exclusive(kept.with_suffix(".lock")):
        shares = _read(kept)
        if shares is None:
            shares = _compute(labels, split)
            _write(kept, shares)
    return shares


@dataclass(frozen=True)
class _Split:
    peers: int
    scheme: str
    seed: int
    alpha: float
    classes_per_peer: int
    shared_classes: int
    min_samples: int


def _check(labels: Indices, split: _Split) -> None:
    if labels.ndim != 1:
        raise ValueError(f"Expected argument `labels` to be of shape [N], but got {list(labels.shape)}.")
    if split.peers < 1 or split.min_samples < 1:
        raise ValueError(
            f"Expected `peers` and `min_samples` to be at least 1, but got {split.peers} and {split.min_samples}."
        )
    if split.scheme not in SCHEMES:
        raise SettingError("partition", split.scheme, f"one of {', '.join(SCHEMES)}")
    classes = len(np.unique(labels))
    if split.scheme == "dirichlet" and not (math.isfinite(split.alpha) and split.alpha > 0):
        raise SettingError("partition-alpha", split.alpha, "a finite number > 0")
    if split.scheme == "classes" and not 1 <= split.classes_per_peer <= classes:
        raise SettingError("classes-per-peer", split.classes_per_peer, f"from 1 to {classes}, the number of classes")
    if split.scheme == "overlap" and not 1 <= split.shared_classes < classes:
        raise SettingError("shared-classes", split.shared_classes, f"at least 1 and less than {classes} classes")
    if split.peers * split.min_samples > len(labels):
        raise _unfit(split, f"possible with {len(labels)} samples, at least {split.min_samples} for each peer")


def _unfit(split: _Split, allowed: str) -> SettingError:
    return SettingError("partition", f"{split.scheme} over {split.peers} peers", allowed)


def _compute(labels: Indices, split: _Split) -> list[Indices]:
    flwr = _partitioners()
    rng = np.random.default_rng(derive(split.seed, "partition"))
    # The partitioners cut runs out of the order they find, so that order must carry no meaning.
    order = rng.permutation(len(labels))
    if split.scheme == "dirichlet":
        return _dirichlet(labels, order, split)

    classes = rng.permutation(np.unique(labels)).tolist()
    if split.scheme == "iid":
        partitioner = flwr.IidPartitioner(split.peers)
    elif split.scheme == "quantity":
        partitioner = flwr.LinearPartitioner(split.peers)
    elif split.scheme == "classes":
        partitioner = _by_hands(_deal_evenly(classes, split.peers, split.classes_per_peer))
    else:
        core, own = classes[: split.shared_classes], classes[split.shared_classes :]
        partitioner = _by_hands([core + hand for hand in _deal_apart(own, split.peers)])
    try:
        shares = _apply(partitioner, labels, order, split.peers)
    except ValueError as error:  # a class with fewer samples than holders
        raise _unfit(split, f"possible with these samples ({error})") from error
    smallest = min(len(share) for share in shares)
    if smallest < split.min_samples:
        raise _unfit(split, f"a split with at least {split.min_samples} samples for each peer, not {smallest}")
    return shares


def _dirichlet(labels: Indices, order: Indices, split: _Split) -> list[Indices]:
    for start in range(_DIRICHLET_STARTS):
        partitioner = _partitioners().DirichletPartitioner(
            num_partitions=split.peers,
            partition_by="label",
            alpha=float(split.alpha),
            min_partition_size=split.min_samples,
            seed=derive(split.seed, "partition", start),
        )
        try:
            return _apply(partitioner, labels, order, split.peers)
        except ValueError:
            continue
    raise SettingError(
        "partition-alpha",
        split.alpha,
        f"large enough to give each of {split.peers} peers at least {split.min_samples} of {len(labels)} samples",
    )


def _deal_evenly(classes: Sequence[int], peers: int, per_peer: int) -> list[list[int]]:
    """Deal a fixed number of classes to each peer, going round, so that none is left out that need not be.

    >>> _deal_evenly([0, 1, 2, 3, 4], peers=3, per_peer=2)
    [[0, 1], [2, 3], [4, 0]]
    """
    return [[classes[(peer * per_peer + i) % len(classes)] for i in range(per_peer)] for peer in range(peers)]


def _deal_apart(classes: Sequence[int], peers: int) -> list[list[int]]:
    """Deal all classes, each to one peer while there are enough of them.

    >>> _deal_apart([0, 1, 2, 3, 4], peers=3), _deal_apart([0, 1], peers=3)
    ([[0, 3], [1, 4], [2]], [[0], [1], [0]])
    """
    return [list(classes[peer::peers]) or [classes[peer % len(classes)]] for peer in range(peers)]


def _by_hands(hands: Sequence[Sequence[int]]) -> "Partitioner":
    """Return flwr-datasets' partitioner by classes, with the peers' classes given instead of drawn.

    Its own modes ("random", "deterministic") leave classes out although the peers have room for them.
    """

    class ByHands(_partitioners().PathologicalPartitioner):  # type: ignore[misc]
        def _determine_partition_id_to_unique_labels(self) -> None:
            self._unique_labels = sorted(self.dataset.unique(self._partition_by))
            self._partition_id_to_unique_labels = {peer: list(hand) for peer, hand in enumerate(hands)}

    return ByHands(len(hands), partition_by="label", num_classes_per_partition=1, shuffle=False)


@cache
def _partitioners() -> Any:
    """Return flwr-datasets' partitioners, without the figures and the statistics that its package imports with them.

    Those are three quarters of the time of an import for which all peers wait at the start of a run. Whoever asks for
    the package itself later gets it whole.
    """
    package = "flwr_datasets"
    if package in sys.modules:
        return importlib.import_module(f"{package}.partitioner")
    found = importlib.util.find_spec(package)
    if found is None:
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)
    sys.modules[package] = importlib.util.module_from_spec(found)  # not executed
    try:
        return importlib.import_module(f"{package}.partitioner")
    finally:
        del sys.modules[package]


def _apply(partitioner: "Partitioner", labels: Indices, order: Indices, peers: int) -> list[Indices]:
    from datasets import Dataset

    partitioner.dataset = Dataset.from_dict({"label": labels[order], "index": order})
    with warnings.catch_warnings():
        # They count redraws, and advise on settings that are not this project's.
        warnings.simplefilter("ignore")
        shares = [partitioner.load_partition(peer).with_format("numpy")["index"][:] for peer in range(peers)]
    return [np.sort(np.asarray(share, dtype=np.int64)) for share in shares]


def _read(path: Path) -> list[Indices] | None:
    """Return a kept partition, or None where there is none that can be read."""
    try:
        with np.load(path, allow_pickle=False) as kept:
            indices, sizes = kept["indices"], kept["sizes"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        return None
    return np.split(indices, np.cumsum(sizes)[:-1])


def _write(path: Path, shares: Sequence[Indices]) -> None:
    unfinished = path.with_suffix(f".{os.getpid()}.tmp")
    with unfinished.open("wb") as file:
        np.savez(file, indices=np.concatenate(shares), sizes=[len(share) for share in shares])
    unfinished.replace(path)
