"""What a model's file says of the model: enough to build it again, to feed it and to know where it comes from."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedkd.errors import FedkdError

_KEY = "card"


class CardError(FedkdError):
    """A file says nothing of a model, or not in this form."""


@dataclass(frozen=True)
class Card:
    """A model's card, kept in the header of its safetensors file.

    Attributes:
        peer: whose model it is.
        model: what builds it: a name of the registry or ``package.module:factory``.
        classes: their names, in the order of the logits.
        input_shape: shape of one input, ``[C, H, W]`` for images.
        mean: what is subtracted from an input, per channel or feature; 8-bit pixels are divided by 255 first.
        std: what the difference is divided by.
        run: token of the run that left it.
        round: the last round whose end it reached.
        before: test accuracy before round 1; NaN if it was not measured.
        after: test accuracy at the end of ``measured_round``.
        measured_round: the last round in which it was measured; equal to ``round`` unless ``eval-every`` left that out.
        measured_on: ``test``, or ``validation`` where a part of the training set was held out for it.
        version: of fedkd.
        source: hash of the code that trained it.
        commit: the git commit of that code; empty outside git.
        resized: how images of the data source are brought to the height and width of ``input_shape``, with
            antialiasing, before they are scaled; empty: they have them.
        kept_shape: shape of one image as the data source has it; where ``input_shape`` has three channels and this has
            one, it is shown three times. Empty in older files.
    """

    peer: str
    model: str
    classes: tuple[str, ...]
    input_shape: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    run: str
    round: int
    before: float
    after: float
    measured_round: int
    measured_on: str
    version: str
    source: str
    commit: str
    resized: str = ""
    kept_shape: tuple[int, ...] = ()

    def content(self) -> dict[str, Any]:
        """Return it as plain JSON has it: NaN is null."""
        said = asdict(self)
        return {name: None if isinstance(v, float) and math.isnan(v) else v for name, v in said.items()}

    def head(self) -> dict[str, str]:
        """Return it as a safetensors header takes it."""
        return {_KEY: json.dumps(self.content(), ensure_ascii=False)}

    @classmethod
    def read(cls, path: Path) -> "Card":
        """Read the card of a model's file.

        Raises:
            CardError: it cannot be read, or has no card.
        """
        from safetensors import safe_open

        try:
            with safe_open(path, framework="numpy") as file:
                said = json.loads((file.metadata() or {})[_KEY])
            numbers = {name: math.nan if said[name] is None else float(said[name]) for name in ("before", "after")}
            lists = {name: tuple(_list(said[name])) for name in ("classes", "input_shape", "mean", "std")}
            lists["kept_shape"] = tuple(_list(said.get("kept_shape", [])))
            return cls(**{**said, **numbers, **lists})
        except Exception as error:  # safetensors has error types of its own
            reason = "it has no card" if isinstance(error, KeyError) else str(error)
            raise CardError(
                f"Expected the file of a model that a run of fedkd left, but got {path}: {reason}"
            ) from error


def _list(value: Any) -> Sequence[Any]:
    if not isinstance(value, list):
        raise TypeError(f"expected a list, but got {value!r}")
    return value
