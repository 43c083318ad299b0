r"""Differential privacy of what a peer publishes: clipped logits, Gaussian noise, and what it adds up to.

Two data sets are neighbours if one private record of one peer is replaced by any other. The models are not trained
privately, so that one record may change every logit on every proxy sample in every round. What bounds it is the
clipping alone: a row of logits is centred (softmax does not feel it) and scaled down to norm ``clip`` where it is
longer, so that the rows of neighbouring data sets lie at most 2·clip apart, and P rows 2·clip·√P. Gaussian noise of
deviation z·2·clip·√P on every logit makes that one release of noise multiplier z; all rows of all releases count.

Releases may depend on one another: n Gaussian releases of multiplier z are together one of multiplier z/√n, adaptively
chosen or not (Dong, Roth and Su, "Gaussian differential privacy", 2019). Its (ε, δ) is exact (Balle and Wang, ICML
2018) and comes from the package ``dp-accounting``.

Class counts that a peer tells are one more release, made once in a run: among the same neighbours, a record that
changes its label moves two counts by one, √2 in L2, and Gaussian noise of deviation z·√2 on every count has noise
multiplier z.
"""

import hashlib
import math
import os
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedkd.errors import FedkdError, SettingError
from fedkd.settings.config import RunConfig
from fedkd.wire.claims import COUNTS

Logits = NDArray[np.float32]

_GRID_BITS = 16
_MOST_EPSILON = 1e5
_NEIGHBOURS = "one private record of one peer replaced"

COUNTS_SENSITIVITY = math.sqrt(2)
"""How far one record, replaced, can move class counts, in L2."""


@dataclass(frozen=True)
class Mechanism:
    """How knowledge is made private in a run.

    Attributes:
        epsilon: of all releases together, with delta.
        delta: likewise.
        clip: norm to which centred rows of logits are clipped.
        releases: how often a peer publishes: after the start and after every round.
        noise_multiplier: z, of one release; the noise's deviation over the sensitivity.
        beside: what is spent of (ε, δ) on other releases of the run, in the unit of :attr:`cost`.
    """

    epsilon: float
    delta: float
    clip: float
    releases: int
    noise_multiplier: float
    beside: float = 0.0

    @classmethod
    def from_config(cls, config: RunConfig) -> "Mechanism | None":
        """Return the mechanism that a run's settings ask for, or None.

        What class counts cost is taken off first: all that a peer publishes is together (ε, δ)-private.

        Raises:
            FedkdError: the package dp-accounting is missing.
            SettingError: the class counts alone would cost more than the promise allows.
        """
        if not config.privacy_epsilon:
            return None
        releases = config.rounds + 1
        z = noise_multiplier(config.privacy_epsilon, config.privacy_delta, releases)
        counts = CountsMechanism.from_config(config)
        if counts is None:
            return cls(config.privacy_epsilon, config.privacy_delta, config.privacy_clip, releases, z)
        left = releases / z**2 - counts.cost
        if left <= 0:
            least = (releases / z**2) ** -0.5
            allowed = (
                f"above {least:.4g} with `privacy-epsilon` {config.privacy_epsilon:g}, all of which it would spend"
            )
            raise SettingError("counts-noise", config.counts_noise, allowed)
        z = math.sqrt(releases / left)
        return cls(config.privacy_epsilon, config.privacy_delta, config.privacy_clip, releases, z, counts.cost)

    @property
    def cost(self) -> float:
        """What one release spends of a budget: 1/z², which adds up over releases."""
        return self.noise_multiplier**-2

    def deviation(self, rows: int) -> float:
        """Return the noise's standard deviation on every logit of a release of so many rows."""
        return self.noise_multiplier * sensitivity(rows, self.clip)

    def publish(self, logits: Logits, normal: NDArray[np.float64]) -> Logits:
        """Return logits that may leave a peer.

        What follows the noise uses public numbers only: the sum is rounded to 2⁻¹⁶ of its deviation, so that the last
        bits of floating-point numbers tell nothing; then it is shrunk towards 0 as far as noise of this size deserves,
        clip²/(clip² + (C−1)·deviation²), since a softmax would otherwise take it for certainty.

        Args:
            logits: ``[P, C]``, finite.
            normal: independent standard normal numbers ``[P, C]`` that nobody else knows.
        """
        classes = logits.shape[1]
        deviation = self.deviation(len(logits))
        noisy = _on_grid(clipped(logits, self.clip) + deviation * normal, deviation)
        noisy -= noisy.mean(axis=1, keepdims=True)
        shrink = self.clip**2 / (self.clip**2 + (classes - 1) * deviation**2)
        return np.asarray(shrink * noisy, np.float32)

    def statement(self) -> dict[str, Any]:
        """Return what is promised, for the run's results."""
        return {
            "epsilon": self.epsilon,
            "delta": self.delta,
            "epsilon_per_release": spent(self.cost, self.delta),
            "releases": self.releases,
            "noise_multiplier": self.noise_multiplier,
            "clip": self.clip,
            "neighbours": _NEIGHBOURS,
            "covers": "published knowledge; not the metrics that peers report",
        }

    def line(self) -> str:
        """Return what is promised, in one line."""
        return (
            f"privacy: a peer's knowledge of the whole run is ({self.epsilon:g}, {self.delta:g})-private for each of "
            f"its records, {self.releases} releases of ε {spent(self.cost, self.delta):.3g}"
            + (f" and class counts of ε {spent(self.beside, self.delta):.3g}" if self.beside else "")
            + "; reported metrics are not"
        )


@dataclass(frozen=True)
class CountsMechanism:
    """How the class counts that a peer tells are made private; one release in a run.

    Attributes:
        delta: beside the ε that is told of it.
        noise_multiplier: z; the noise's deviation over the sensitivity √2.
    """

    delta: float
    noise_multiplier: float

    @classmethod
    def from_config(cls, config: RunConfig) -> "CountsMechanism | None":
        """Return the mechanism that a run's settings ask for; None where counts are not told, or as they are.

        Raises:
            FedkdError: the package dp-accounting is missing.
            SettingError: noise that hides nothing.
        """
        if COUNTS not in config.told or not config.counts_noise:
            return None
        if not math.isfinite(spent(config.counts_noise**-2, config.privacy_delta)):
            raise SettingError(
                "counts-noise", config.counts_noise, "0, or as much as hides anything: its ε is infinite"
            )
        return cls(config.privacy_delta, config.counts_noise)

    @property
    def cost(self) -> float:
        """What the release spends of a budget: 1/z², which adds up over releases."""
        return self.noise_multiplier**-2

    @property
    def deviation(self) -> float:
        """The noise's standard deviation on every count, in samples."""
        return self.noise_multiplier * COUNTS_SENSITIVITY

    def publish(self, counts: NDArray[np.float32], normal: NDArray[np.float64]) -> NDArray[np.float32]:
        """Return counts ``[C]`` that may leave a peer, >= 0; rounded to a grid of the noise, as logits are.

        Args:
            counts: of each class.
            normal: independent standard normal numbers ``[C]`` that nobody else knows.
        """
        noisy = _on_grid(counts.astype(np.float64) + self.deviation * normal, self.deviation)
        return np.asarray(np.maximum(noisy, 0), np.float32)

    def statement(self) -> dict[str, Any]:
        """Return what is promised where nothing but the counts is private, for the run's results."""
        return {
            "epsilon": spent(self.cost, self.delta),
            "delta": self.delta,
            "counts_noise_multiplier": self.noise_multiplier,
            "neighbours": _NEIGHBOURS,
            "covers": "class counts that peers tell; not their logits, nor the metrics that they report",
        }

    def line(self) -> str:
        """Return what is promised where nothing but the counts is private, in one line."""
        return (
            f"privacy: the class counts that a peer tells are ({spent(self.cost, self.delta):.3g}, {self.delta:g})-"
            "private for each of its records; its logits and reported metrics are not"
        )


def promise(config: RunConfig) -> dict[str, Any]:
    """Return what a run promises, for its results; nothing where it promises nothing.

    Raises:
        FedkdError: the package dp-accounting is missing.
        SettingError: the promise cannot be kept.
    """
    counts, mechanism = CountsMechanism.from_config(config), Mechanism.from_config(config)
    if mechanism is None:
        return counts.statement() if counts else {}
    told = {"epsilon_of_counts": spent(counts.cost, counts.delta)} if counts else {}
    return {**mechanism.statement(), **told}


def promise_line(config: RunConfig) -> str:
    """Return what a run promises, in one line; empty where it promises nothing. Raises as :func:`promise`."""
    mechanism = Mechanism.from_config(config) or CountsMechanism.from_config(config)
    return mechanism.line() if mechanism else ""


def sensitivity(rows: int, clip: float) -> float:
    """Return how far one record can move a release of so many rows of norm ``clip``, in L2.

    >>> sensitivity(400, 5.0)
    200.0
    """
    return 2 * clip * math.sqrt(rows)


def clipped(logits: Logits, clip: float) -> NDArray[np.float64]:
    """Return rows ``[P, C]`` centred, and scaled down to norm ``clip`` where they are longer.

    >>> clipped(np.array([[9.0, 3.0], [0.2, 0.0]], np.float32), clip=2**0.5).round(3)
    array([[ 1. , -1. ],
           [ 0.1, -0.1]])
    """
    rows = logits.astype(np.float64)
    rows -= rows.mean(axis=1, keepdims=True)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    # A hair within the ball: the sensitivity holds in spite of rounding.
    return np.asarray(rows * ((1 - 1e-9) * clip / np.maximum(norms, clip)))


def _on_grid(noisy: NDArray[np.float64], deviation: float) -> NDArray[np.float64]:
    """Round to 2⁻¹⁶ of the noise's deviation: the last bits of floating-point numbers can tell what was hidden."""
    step = 2.0 ** (math.floor(math.log2(deviation)) - _GRID_BITS)
    return np.asarray(np.rint(noisy / step) * step)


def secret_normal(shape: tuple[int, int]) -> NDArray[np.float64]:
    """Return standard normal numbers from the operating system's cryptographic source."""
    return _normal(os.urandom(8 * shape[0] * shape[1]), shape)


def reproducible_normal(shape: tuple[int, int], seed: int) -> NDArray[np.float64]:
    """Return standard normal numbers that everyone who knows the seed can subtract: for simulations only.

    >>> reproducible_normal((1, 2), 0) == reproducible_normal((1, 2), 0)
    array([[ True,  True]])
    """
    return _normal(hashlib.shake_256(seed.to_bytes(8, "big")).digest(8 * shape[0] * shape[1]), shape)


def _normal(randomness: bytes, shape: tuple[int, int]) -> NDArray[np.float64]:
    from scipy.special import ndtri

    uniform = ((np.frombuffer(randomness, np.uint64) >> np.uint64(11)) + 0.5) * 2.0**-53
    uniform = np.minimum(uniform, 1 - 2.0**-53)  # the greatest is rounded to 1, whose normal number is infinite
    return np.asarray(ndtri(uniform), np.float64).reshape(shape)


def noise_multiplier(epsilon: float, delta: float, releases: int) -> float:
    """Return the z with which so many releases are together (ε, δ)-private.

    Raises:
        FedkdError: the package dp-accounting is missing.
    """
    losses, common = _accounting()
    promise = common.DifferentialPrivacyParameters(epsilon, delta)
    found = losses.GaussianPrivacyLoss.from_privacy_guarantee(promise, sensitivity=math.sqrt(releases))
    return float(found.standard_deviation)


def spent(cost: float, delta: float) -> float:
    """Return the ε, with δ, of releases whose costs 1/z² add up to ``cost``; infinity beyond 100,000.

    Raises:
        FedkdError: the package dp-accounting is missing.
    """
    from scipy.optimize import brentq

    if cost <= 0:
        return 0.0
    losses, _ = _accounting()
    loss = losses.GaussianPrivacyLoss(1.0, sensitivity=math.sqrt(cost))

    def excess(epsilon: float) -> float:
        return float(loss.get_delta_for_epsilon(epsilon)) - delta

    if excess(0.0) <= 0:
        return 0.0
    if excess(_MOST_EPSILON) > 0:
        return math.inf
    return float(brentq(excess, 0.0, _MOST_EPSILON, xtol=1e-9))


def _accounting() -> tuple[Any, Any]:
    try:
        from dp_accounting.pld import common, privacy_loss_mechanism
    except ImportError as error:
        raise FedkdError(
            "Setting `counts-noise` or `privacy-epsilon` needs the package dp-accounting, which is missing: "
            'pip install "fedkd[privacy]".'
        ) from error
    return privacy_loss_mechanism, common
