"""Consensus distillation: a server averages the knowledge of all. A baseline, not server-free."""

from collections.abc import Sequence

import numpy as np

from fedkd.settings.config import RunConfig
from fedkd.wire.messages import Letter, Packed
from strategies.relay.mailbox import Mailbox
from strategies.strategy import Strategy

_ERA_TEMPERATURE = 0.1
_TINY = np.finfo(np.float32).tiny


class Consensus(Strategy):
    """FedMD and DS-FL: the server reads all knowledge, and everyone fits its mean.

    ``fedmd``: the mean of the logits, fitted by mean absolute error (Li and Wang, 2019, arXiv 1910.03581 [paper]).
    ``ds-fl``: the mean of the probabilities, sharpened by softmax(p̄/0.1), fitted by KL (Itahara et al., 2020,
    arXiv 2008.06180, entropy reduction aggregation [paper]). The settings bring that loss: see
    ``RunConfig.effective``.
    """

    def __init__(self, config: RunConfig, peers: int, classes: int) -> None:
        super().__init__(config, peers, classes)
        self._mean: tuple[int, Letter] | None = None

    def teachers(self, peer: int, round: int) -> Sequence[int]:
        """Return everyone: the mean is over all, the peer's own knowledge included."""
        return range(self.peers)

    def letters(self, peer: int, round: int, mailbox: Mailbox) -> tuple[Letter, ...]:
        """Return one letter of the server's."""
        if self._mean is None or self._mean[0] != round:
            heard = super().letters(peer, round, mailbox)
            if not heard:
                return ()
            self._mean = (round, self._average(heard, round))
        return (self._mean[1],)

    def _average(self, heard: Sequence[Letter], round: int) -> Letter:
        shape = (self.config.travelling, self.classes)
        sharpened = self.config.consensus == "ds-fl"
        mean = np.zeros(shape)
        for letter in heard:
            logits = self._codec.decode(letter.arrays, shape=shape)
            mean += letter.weight * (_softmax(logits) if sharpened else logits)
        mean /= sum(letter.weight for letter in heard)
        if sharpened:
            mean = np.log(np.maximum(_softmax(mean / _ERA_TEMPERATURE), _TINY))
        return Letter("server", round - 1, Packed.of(self._codec.encode(mean.astype(np.float32))))


def _softmax(logits: np.ndarray) -> np.ndarray:
    exp: np.ndarray = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(exp / exp.sum(axis=-1, keepdims=True))
