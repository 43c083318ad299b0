"""A run's folder with pandas: its files are plain JSON, one object or one object a line.

In a clone: `python -m experiments.examples.read_run runs/20260101-120000-fedkd`.
"""

import json
import sys
from pathlib import Path

import pandas as pd


def main(folder: Path, target: float = 0.8) -> pd.DataFrame:
    """Print what a run came to, and return its accuracies, rounds × peers."""
    settings = json.loads((folder / "config.json").read_text())["settings"]
    rows = pd.read_json(folder / "rounds.jsonl", lines=True, precise_float=True)
    accuracy = rows.pivot(index="round", columns="peer", values="test_accuracy")
    print(f"{settings['strategy']}, {settings['divergence']}, seed {settings['seed']}")
    print(accuracy.round(3).to_string())

    by_round = rows.groupby("round").agg(
        accuracy=("test_accuracy", "mean"), worst=("test_accuracy", "min"), up=("bytes_up", "sum"),
        down=("bytes_down", "sum"), seconds=("seconds", "max"),
    )  # fmt: skip
    by_round["bytes_so_far"] = (by_round["up"] + by_round["down"]).cumsum()
    reached = by_round[by_round["accuracy"] >= target]
    if reached.empty:
        print(f"a mean accuracy of {target:.0%} was not reached")
    else:
        round, spent = reached.index[0], reached["bytes_so_far"].iloc[0]
        print(f"a mean accuracy of {target:.0%} took {round} rounds and {spent:,} bytes")

    summary = json.loads((folder / "summary.json").read_text())
    peers = pd.DataFrame(summary["peers"]).set_index("peer")
    peers["gain over isolated"] = peers["after"] - peers["isolated"]
    print(peers[["model", "before", "after", "gain over isolated"]].round(3).to_string())
    problems = rows.loc[rows["status"] != "ok", ["round", "peer", "status", "error"]]
    print(problems.to_string(index=False) if len(problems) else "every peer answered in every round")
    return accuracy


if __name__ == "__main__":
    main(Path(sys.argv[1]))
