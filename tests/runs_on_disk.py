"""Run folders with made-up numbers, as a finished run leaves them, for the tests of what reads them."""

import math
from pathlib import Path

import numpy as np

from fedkd.results.folder import Measures, PeerSummary, Row, RunFolder, Summary
from fedkd.settings.config import RunConfig
from fedkd.wire.messages import Letter
from strategies.relay.ledger import Ledger


def make_run(
    path: Path,
    accuracies,
    *,
    bytes_per_round=1000,
    isolated=0.4,
    channel=math.nan,
    pooled=0.95,
    samples_seen=(),
    **settings,
) -> Path:
    """Write the folder of a run whose peers had these test accuracies, ``[round][peer]``.

    Losses and Brier scores are their complement; ``samples_seen`` by round, the same of every peer.
    """
    changed = {name.replace("_", "-"): value for name, value in settings.items()}
    config = RunConfig.from_mapping({"rounds": len(accuracies) - 1, **changed})
    folder = RunFolder(path)
    folder.clear()
    folder.write_config(config.to_mapping(), {"run": "feed"})
    peers = [f"peer-{i}" for i in range(len(accuracies[0]))]
    for round, found in enumerate(accuracies):
        folder.append([
            Row(round, peer, "mlp", [], test_accuracy=accuracy, own_accuracy=accuracy, ece=0.1,
                test_loss=1 - accuracy, brier=1 - accuracy,
                samples_seen=samples_seen[round] if samples_seen else math.nan,
                bytes_up=bytes_per_round // 2, bytes_down=bytes_per_round // 2)
            for peer, accuracy in zip(peers, found, strict=True)
        ])  # fmt: skip
    bins = {"confidence": [0.25, 0.75], "accuracy": [0.5, 1.0], "samples": [2.0, 8.0]}
    for peer in peers:
        folder.append_reliability(0, peer, bins)
        folder.append_reliability(config.rounds, peer, bins)
    alone = Measures(isolated, isolated, test_loss=1 - isolated, ece=0.2, brier=1 - isolated)
    entries = [
        PeerSummary(
            peer, "mlp", 10, 20, first, last, first, last, isolated=isolated, isolated_measures=alone, channel=channel
        )
        for peer, first, last in zip(peers, accuracies[0], accuracies[-1], strict=True)
    ]
    spent = bytes_per_round // 2 * len(peers) * len(accuracies)
    totals = {"rounds": config.rounds, "bytes_up": spent, "bytes_down": spent, "seconds": 9.0}
    folder.write_summary(
        Summary(
            entries, isolated=isolated, channel=channel, pooled=pooled, totals=totals,
            round_seconds=[1.0] * len(accuracies), classes=("a", "b"),
        )
    )  # fmt: skip
    ledger = Ledger(round=config.rounds)
    for i, peer in enumerate(peers):
        logits = np.zeros((config.travelling, 2), np.float32)
        logits[: config.travelling // 2, 0] = 1.0 if i else -1.0  # peer-0 differs from the others on one half
        ledger.mailbox.put(i, Letter(peer, config.rounds, {"logits": logits}))
    ledger.save(path)
    return path
