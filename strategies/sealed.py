"""The relay's side of sealed mail: it sees sizes, and hands each receiver the one wrap that is for it.

A sealed letter is one encrypted payload for all and, for every receiver, the payload's key sealed for that
receiver alone (see ``fedkd.sealing``).
"""

import numpy as np

from fedkd.codec import BadKnowledge
from fedkd.protocol import Arrays


def check_sealed(arrays: Arrays, *, receivers: int) -> None:
    """Refuse what cannot be a sealed letter for all receivers.

    Raises:
        BadKnowledge: another set of arrays, another dtype or shape.
    """
    found = {name: (str(array.dtype), array.ndim) for name, array in arrays.items()}
    if found != {"sealed": ("uint8", 1), "wraps": ("uint8", 2)} or len(arrays["wraps"]) != receivers:
        raise BadKnowledge(f"expected a sealed payload and {receivers} wraps of its key, but got {found}")


def address(arrays: Arrays, receiver: int) -> Arrays:
    """Return a sealed letter for one receiver."""
    return {"sealed": arrays["sealed"], "wrap": np.ascontiguousarray(arrays["wraps"][receiver])}
