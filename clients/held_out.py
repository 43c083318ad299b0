"""What a peer never trains on, so that choices can be made by it: its owner's part, or a share drawn at the start.

A model has seen what it was trained on: a choice by accuracy on that prefers whatever preserves what is memorised.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fedkd.errors import SettingError
from fedkd.seeding import derive
from fedkd.settings.config import RunConfig

_MOST_BYTES = 2**27


def named_part(path: str, count: int) -> np.ndarray:
    """Read the part of a training set that its owner held out of a checkpoint's training.

    Args:
        path: a text file of whole numbers, with blanks or line ends between them.
        count: of the training set.

    Returns:
        Indices into the training set ``[n]`` int64, ascending, each once.

    Raises:
        SettingError: the file cannot be read or holds anything else. It says where, and not what: a path that was mixed
            up may name the data themselves, and a peer's errors are read by others.
    """
    allowed = f"a file of whole numbers from 0 to {count - 1}, the indices of the training samples that are held out"
    try:
        file = Path(path).expanduser()
        if file.stat().st_size > _MOST_BYTES:
            raise SettingError("held-out", path, f"a file of at most {_MOST_BYTES} bytes")
        words = file.read_text(encoding="ascii").split()
    except OSError as error:
        raise SettingError("held-out", path, f"{allowed} ({error})") from error
    except UnicodeDecodeError as error:
        raise SettingError("held-out", path, f"{allowed} (it is no text)") from error
    right = [word.isdigit() and len(word) < 16 and int(word) < count for word in words]
    if not all(right) or not words:
        found = f"; number {right.index(False) + 1} of its {len(words)} is none" if words else ""
        raise SettingError("held-out", path, allowed + found)
    return np.unique(np.array(words, dtype=np.int64))


def validation_part(share: float, pool: np.ndarray, named: Sequence[np.ndarray], *, seed: int) -> np.ndarray:
    """Draw what `evaluate-on=validation` measures on, out of what every named part holds out.

    Args:
        share: of the pool.
        pool: indices of the training set that are left for the peers, ``[n]``.
        named: parts that owners held out, as indices.
        seed: of the draw.

    Raises:
        SettingError: no sample is held out by all of them.
    """
    candidates = pool
    for part in named:
        candidates = candidates[np.isin(candidates, part)]
    if not len(candidates):
        raise SettingError("held-out", "no common index", "files that share indices, under evaluate-on validation")
    order = np.random.default_rng(derive(seed, "held-out")).permutation(len(candidates))
    return candidates[order[: max(1, round(share * len(pool)))]]


def split_off(
    own: np.ndarray, config: RunConfig, index: int, named: np.ndarray | None, *, whose: str
) -> tuple[np.ndarray, np.ndarray]:
    """Return what a peer trains on, in every phase, and what it holds out.

    Args:
        own: its samples, as indices into the training set.
        config: the run's settings as they hold at the peer.
        index: the peer's number, of which the draw is derived.
        named: the part that its owner held out, which it never trains on; None: a share is drawn where a choice is due.
        whose: the peer's name, for errors.

    Raises:
        SettingError: nothing is left to train on, or nothing to choose by.
    """
    if named is None and config.regime != "tuned":
        return own, own[:0]
    if named is None:
        if len(own) < 2:
            raise SettingError("regime", config.regime, f"another one: {whose} has no two samples, one to be held out")
        generator = np.random.default_rng(derive(config.seed, "validation", index))
        size = min(max(1, round(config.validation_share * len(own))), len(own) - 1)
        out = np.isin(np.arange(len(own)), generator.permutation(len(own))[:size])
    else:
        out = np.isin(own, named)
        if out.all():
            raise SettingError("held-out", config.held_out, f"some of {whose}'s samples, not all {len(own)}")
        if config.regime == "tuned" and not out.any():
            left = " beyond what evaluate-on validation takes" if config.evaluate_on == "validation" else ""
            raise SettingError("held-out", config.held_out, f"the indices of some samples of {whose}'s{left}")
    return own[~out], own[out]
