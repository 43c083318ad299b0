"""What a relay must remember to go on after it was stopped, in one file that is renamed into place."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from fedkd.errors import FedkdError
from fedkd.wire.messages import Letter, Packed
from strategies.relay.mailbox import Mailbox

_FILE = "relay.safetensors"


class LedgerError(FedkdError):
    """The file is there and cannot be read."""


@dataclass
class Ledger:
    """The state of a relay after a closed round.

    Attributes:
        round: the last round that closed; −1 before the first.
        mailbox: the newest knowledge of every peer.
        started: indices of the peers that have a state.
        bytes_up: of the whole run so far; ``bytes_down`` likewise.
        seconds: wall time of the closed rounds.
        elapsed: wall time of the whole run up to the last of them.
    """

    round: int = -1
    mailbox: Mailbox = field(default_factory=Mailbox)
    started: set[int] = field(default_factory=set)
    bytes_up: int = 0
    bytes_down: int = 0
    seconds: list[float] = field(default_factory=list)
    elapsed: float = 0.0

    def save(self, folder: Path) -> None:
        """Write it to a run folder."""
        tensors = {f"{i}/{name}": array for i, letter in self.mailbox for name, array in letter.arrays.items()}
        head = {
            "round": self.round,
            "letters": {str(i): [letter.sender, letter.round] for i, letter in self.mailbox},
            "started": sorted(self.started),
            "bytes_up": self.bytes_up,
            "bytes_down": self.bytes_down,
            "seconds": self.seconds,
            "elapsed": self.elapsed,
        }
        partial = folder / f".{_FILE}.partial"
        save_file(tensors, partial, metadata={"ledger": json.dumps(head)})
        partial.replace(folder / _FILE)

    @classmethod
    def load(cls, folder: Path) -> "Ledger":
        """Read it from a run folder; an empty one if no round has closed there.

        Raises:
            LedgerError: the file is damaged.
        """
        path = folder / _FILE
        if not path.exists():
            return cls()
        try:
            with safe_open(path, framework="numpy") as file:
                head: Mapping[str, Any] = json.loads(file.metadata()["ledger"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            ledger = cls(
                round=head["round"],
                started=set(head["started"]),
                bytes_up=head["bytes_up"],
                bytes_down=head["bytes_down"],
                seconds=list(head["seconds"]),
                elapsed=head["elapsed"],
            )
            by_peer: dict[str, dict[str, np.ndarray]] = {index: {} for index in head["letters"]}
            for name, array in tensors.items():
                index, _, own_name = name.partition("/")
                by_peer[index][own_name] = array
            for index, (sender, sent) in head["letters"].items():
                ledger.mailbox.put(int(index), Letter(sender, sent, Packed.of(by_peer[index])))
        except (SafetensorError, KeyError, ValueError, TypeError) as error:
            raise LedgerError(f"cannot read {path}: {error}") from error
        return ledger
