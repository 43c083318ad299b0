"""The handwritten digits that scikit-learn ships."""

import gzip
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedkd.errors import SettingError
from fedkd.seeding import derive

Array = npt.NDArray[Any]

# The handwritten digits come without a test set; this one is part of the source's definition, like a file would be.
_DIGITS_SPLIT = derive(0, "digits")
_DIGITS_TEST_SHARE = 0.2


def load_digits(*, key: str) -> tuple[Array, Array, Array, Array, list[str]]:
    """Load images [N, 8, 8] uint8, labels, test images and labels (a fixed, stratified fifth), and the classes.

    Raises:
        SettingError: on `key`: scikit-learn is not installed, or has no such file.
    """
    table = _digits_table(key=key)
    labels = table[:, -1]
    # The original grey levels are 0..16; over the full byte they keep their order and are images like any other.
    images = np.rint(table[:, :-1] * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8)
    rng = np.random.default_rng(_DIGITS_SPLIT)
    test = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        test[members[: round(_DIGITS_TEST_SHARE * len(members))]] = True
    digits = [str(digit) for digit in range(10)]
    return images[~test], labels[~test], images[test], labels[test], digits


def _digits_table(*, key: str) -> npt.NDArray[np.int64]:
    """Return [1797, 65]: 64 grey levels and the label, from the file that scikit-learn ships."""
    found = importlib.util.find_spec("sklearn")
    if found is None or not found.submodule_search_locations:
        raise SettingError(key, "digits", "an available source, and scikit-learn, which ships it, is not installed")
    # Read directly: importing scikit-learn would cost every process seconds.
    path = Path(found.submodule_search_locations[0], "datasets", "data", "digits.csv.gz")
    try:
        with gzip.open(path, "rt", encoding="ascii") as lines:
            return np.loadtxt(lines, delimiter=",", dtype=np.int64)
    except FileNotFoundError as error:
        raise SettingError(key, "digits", f"an available source, but scikit-learn has no file {path}") from error
