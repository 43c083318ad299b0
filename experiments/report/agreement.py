"""What a run's folder tells beyond its rounds: who agrees with whom, and whether confidence is worth what it says."""

import json
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from experiments.analysis.runs import Run
from fedkd.settings.config import RunConfig
from fedkd.wire.codecs import BadKnowledge, codec
from fedkd.wire.features import without_features
from strategies.relay.ledger import Ledger, LedgerError

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Bins:
    """A reliability diagram's bins that hold samples, by confidence.

    Attributes:
        confidence: mean of the top class.
        accuracy: share that was right.
        samples: how many.
    """

    confidence: Floats
    accuracy: Floats
    samples: Floats

    @property
    def ece(self) -> float:
        """Return the expected calibration error of these bins."""
        gaps = np.abs(self.confidence - self.accuracy)
        return float((gaps * self.samples).sum() / self.samples.sum())


def agreement(run: Run) -> tuple[list[str], Floats] | None:
    """Return the peers and the share of the proxy set on which two agree, ``[K, K]``, from their last knowledge.

    None where that cannot be read from the disk: sealed mail, weights, or fewer than two peers in one round.
    """
    classes = run.summary.get("classes", ())
    if not classes or run.settings["sealed"] or run.settings["strategy"] == "fedavg":
        return None
    config = RunConfig.from_mapping({**run.settings, "peers": 0})
    try:
        letters = [letter for index, letter in Ledger.load(run.path).mailbox if index >= 0]
        newest = max((letter.round for letter in letters), default=0)
        letters = [letter for letter in letters if letter.round == newest]
        shape, decode = (config.travelling, len(classes)), codec(config.codec).decode
        logits = [decode(without_features(letter.arrays), shape=shape) for letter in letters]
    except (LedgerError, BadKnowledge):
        return None
    if len(logits) < 2:
        return None
    votes = np.stack(logits).argmax(axis=2)
    return [letter.sender for letter in letters], (votes[:, None] == votes[None]).mean(axis=2)


def reliability(runs: Iterable[Run]) -> dict[str, Bins]:
    """Return the pooled bins of all peers of some runs, ``before`` and ``after``; empty where runs left none."""
    sums: dict[str, list[Floats]] = {}
    for run in runs:
        path = run.path / "reliability.jsonl"
        for line in path.read_text().splitlines() if path.exists() else []:
            try:
                entry = json.loads(line)
                samples = np.asarray(entry["samples"], dtype=float)
                confidence, right = (
                    np.nan_to_num(np.asarray(entry[name], dtype=float)) * samples for name in ("confidence", "accuracy")
                )
            except (ValueError, KeyError, TypeError):
                continue
            sums.setdefault("after" if entry["round"] else "before", []).append(np.stack([confidence, right, samples]))
    found: dict[str, Bins] = {}
    for name in ("before", "after"):
        if name in sums:
            confidence, right, samples = np.sum(sums[name], axis=0)
            held = samples > 0
            found[name] = Bins(confidence[held] / samples[held], right[held] / samples[held], samples[held])
    return found
