"""What a setting may be: phrases for people, and the checks behind them."""

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fedkd.plugins import is_callable_spec

STRATEGIES = ("averaged", "pairwise", "gossip", "consensus", "fedavg")
TOPOLOGIES = ("complete", "ring", "torus", "star", "k-regular", "erdos-renyi", "small-world", "exponential")
DATASETS = ("digits", "mnist", "fashion-mnist", "cifar10", "cifar100", "svhn")
SOURCES = (
    f"one of {', '.join(DATASETS)}, npz:PATH, folder:PATH, parquet:PATH, hf:NAME_OR_PATH or package.module:function"
)
DIVERGENCES = (
    "bdkd", "cakd", "ce", "dkd", "jeffreys", "js", "kl", "mae", "msed", "reverse_kl", "sed", "td",
)  # fmt: skip
"""The library's. Spelled out here, since a relay imports no torch; the tests compare them with the registry."""
WEIGHINGS = (
    "uniform", "predicted-prior", "discrimination", "confidence", "entropy", "energy", "variance", "similarity",
    "kt-pfl", "counts", "density",
)  # fmt: skip
"""The library's; compared with :mod:`fedkd.losses.weighing` by the tests."""


@dataclass(frozen=True)
class Rule:
    """What is allowed for one setting: a phrase for people and the check behind it.

    Attributes:
        phrase: completes "Expected setting `key` to be ...".
        accepts: the check.
        former: values that had another name once, and what to say of each.
    """

    phrase: str
    accepts: Callable[[Any], bool]
    former: Mapping[Any, str] = field(default_factory=dict)


def at_least(low: float) -> Rule:  # noqa: D103
    return Rule(f"a number >= {low:g}", lambda v: math.isfinite(v) and v >= low)


def above(low: float) -> Rule:  # noqa: D103
    return Rule(f"a number > {low:g}", lambda v: math.isfinite(v) and v > low)


def between(low: float, high: float) -> Rule:  # noqa: D103
    return Rule(f"a number in [{low:g}, {high:g}]", lambda v: math.isfinite(v) and low <= v <= high)


def one_of(*names: str, former: Mapping[Any, str] | None = None) -> Rule:  # noqa: D103
    return Rule("one of " + ", ".join(names), lambda v: v in names, former or {})


def some_of(*names: str) -> Rule:  # noqa: D103
    return Rule(
        "a comma-separated choice of " + ", ".join(names) + " (or empty)",
        lambda v: set(split_list(v)) <= set(names),
    )


def one_entry(listed: Rule) -> Rule:
    """Return the rule for one entry of a list that a rule is for."""
    return Rule(listed.phrase.partition(", or a comma")[0], lambda v: len(split_list(v)) <= 1 and listed.accepts(v))


STRATEGY = Rule(
    f"one of {', '.join(STRATEGIES)}, or `package.module:Class`", lambda v: v in STRATEGIES or is_callable_spec(v)
)
DIVERGENCE = Rule(
    f"one of {', '.join(DIVERGENCES)}, or `package.module:function`",
    lambda v: v in DIVERGENCES or is_callable_spec(v) or v in _registered(),
)
WEIGHING = Rule(
    f"one of {', '.join(WEIGHINGS)}, or `package.module:function`", lambda v: v in WEIGHINGS or is_callable_spec(v)
)
AUGMENTATION = Rule(
    "none, crop-flip, randaugment, or `package.module:function`",
    lambda v: v in ("none", "crop-flip", "randaugment") or is_callable_spec(v),
)
TOPOLOGY = Rule(
    f"one of {', '.join(TOPOLOGIES)}, or `file:PATH`",
    lambda v: v in TOPOLOGIES or (v.startswith("file:") and v != "file:"),
)
TEMPERATURES = (0.001, 10_000.0)
"""Beyond them a softmax is a step or flat, and float32 overflows."""
EPSILON = Rule("0, or a number in [0.001, 10000]", lambda v: v == 0 or 1e-3 <= v <= 1e4)
"""Below it the search for its noise takes minutes, or does not end."""
CHANNELS = Rule("0, 1 or 3", lambda v: v in (0, 1, 3))
WEIGHT = Rule("a number > 0, or -1", lambda v: math.isfinite(v) and (v > 0 or v == -1))
TEACHER_TEMPERATURE = Rule("a number in [0.05, 20], or -1", lambda v: 0.05 <= v <= 20 or v == -1)
ANY = Rule("any text", lambda v: True)
NON_EMPTY = Rule("a non-empty text", lambda v: bool(v.strip()))
NUMBERS = Rule("a comma-separated list of numbers > 0", lambda v: _numbers(v) is not None)
TEMPERATURE_LIST = Rule(
    f"a comma-separated list of numbers in [{TEMPERATURES[0]:g}, {TEMPERATURES[1]:g}]",
    lambda v: all(TEMPERATURES[0] <= number <= TEMPERATURES[1] for number in _numbers(v) or (0.0,)),
)
TRAINED = Rule(
    "all, head or last:N with N >= 1, or a comma-separated list of them",
    lambda v: all(entry in ("all", "head") or trained_layers(entry) > 0 for entry in split_list(v)),
)
INPUT_SIZE = Rule(
    "data, a number of pixels from 1 to 2048 or -, or a comma-separated list of them (or empty)",
    lambda v: all(entry in ("data", "-") or _whole(entry) in range(1, 2049) for entry in split_list(v)),
)
NAME = Rule(
    "letters, digits, '.', '_' or '-', the first a letter or digit",
    lambda v: v[:1].isalnum() and all(c.isalnum() or c in "._-" for c in v),
)


def split_list(text: str) -> tuple[str, ...]:
    """Split a comma-separated setting.

    >>> split_list("mlp, cnn-small")
    ('mlp', 'cnn-small')
    """
    return tuple(part.strip() for part in text.split(",") if part.strip())


def numbers(text: str) -> tuple[float, ...]:
    """Read a comma-separated list of numbers.

    >>> numbers("1, 0.5")
    (1.0, 0.5)
    """
    return tuple(float(part) for part in split_list(text))


def trained_layers(entry: str) -> int:
    """Return N of ``last:N``; 0 of anything else.

    >>> trained_layers("last:3"), trained_layers("head"), trained_layers("last:-1")
    (3, 0, 0)
    """
    kind, _, count = entry.partition(":")
    return max(_whole(count), 0) if kind == "last" else 0


def _whole(text: str) -> int:
    return int(text) if text.isascii() and text.isdigit() else -1


def _numbers(text: str) -> tuple[float, ...] | None:
    try:
        found = numbers(text)
    except ValueError:
        return None
    return found if found and all(math.isfinite(v) and v > 0 for v in found) else None


def _registered() -> list[str]:
    """Return the divergences that this process knows by name, one's own included; none where torch is not loaded."""
    registry = sys.modules.get("fedkd.losses.divergences")
    return registry.names() if registry else []
