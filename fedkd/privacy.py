r"""Differential privacy of what a peer publishes: clipped logits, Gaussian noise, and what it adds up to.

Two data sets are neighbours if one private record of one peer is replaced by any other. The models are not trained
privately, so that one record may change every logit on every proxy sample in every round. What bounds it is the
clipping alone: a row of logits is centred (softmax does not feel it) and scaled down to norm ``clip`` where it is
longer, so that the rows of neighbouring data sets lie at most 2·clip apart, and P rows 2·clip·√P. Gaussian noise of
deviation z·2·clip·√P on every logit makes that one release of noise multiplier z; all rows of all releases count.

Releases may depend on one another: n Gaussian releases of multiplier z are together one of multiplier z/√n, adaptively
chosen or not (Dong, Roth and Su, "Gaussian differential privacy", 2019). Its (ε, δ) is exact (Balle and Wang, ICML
2018) and comes from the package ``dp-accounting``.
"""

import hashlib
import math
import os
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedkd.errors import FedkdError
from fedkd.settings.config import RunConfig

Logits = NDArray[np.float32]

_GRID_BITS = 16
_MOST_EPSILON = 1e5


@dataclass(frozen=True)
class Mechanism:
    """How knowledge is made private in a run.

    Attributes:
        epsilon: of all releases together, with delta.
        delta: likewise.
        clip: norm to which centred rows of logits are clipped.
        releases: how often a peer publishes: after the start and after every round.
        noise_multiplier: z, of one release; the noise's deviation over the sensitivity.
    """

    epsilon: float
    delta: float
    clip: float
    releases: int
    noise_multiplier: float

    @classmethod
    def from_config(cls, config: RunConfig) -> "Mechanism | None":
        """Return the mechanism that a run's settings ask for, or None.

        Raises:
            FedkdError: the package dp-accounting is missing.
        """
        if not config.privacy_epsilon:
            return None
        releases = config.rounds + 1
        z = noise_multiplier(config.privacy_epsilon, config.privacy_delta, releases)
        return cls(config.privacy_epsilon, config.privacy_delta, config.privacy_clip, releases, z)

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
        step = 2.0 ** (math.floor(math.log2(deviation)) - _GRID_BITS)
        noisy = np.rint((clipped(logits, self.clip) + deviation * normal) / step) * step
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
            "neighbours": "one private record of one peer replaced",
            "covers": "published knowledge; not the metrics that peers report",
        }

    def line(self) -> str:
        """Return what is promised, in one line."""
        return (
            f"privacy: a peer's knowledge of the whole run is ({self.epsilon:g}, {self.delta:g})-private for each of "
            f"its records, {self.releases} releases of ε {spent(self.cost, self.delta):.3g}; reported metrics are not"
        )


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
            'Setting `privacy-epsilon` needs the package dp-accounting, which is missing: pip install "fedkd[privacy]".'
        ) from error
    return privacy_loss_mechanism, common
