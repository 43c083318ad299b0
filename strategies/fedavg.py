"""Federated averaging: a server averages weights of one architecture. A baseline, not server-free."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import strategy as flower

from fedkd.settings.config import RunConfig
from fedkd.wire.codecs import BadKnowledge
from fedkd.wire.messages import Answer, Arrays, Kind, Letter, Packed
from strategies.relay.mailbox import SERVER, Mailbox
from strategies.strategy import Strategy

_MOST_SAMPLES = 10**9
_Layout = tuple[tuple[str, tuple[int, ...]], ...]


class FedAvg(Strategy):
    """Flower's FedAvg over the peers' weights, weighed by their numbers of samples (McMahan et al., 2017).

    Peers train ``fedavg-model``, whatever their own model is. A cold run starts from one initialisation that all
    derive from the seed, with the first local epochs in round 0. A pretrained run has each peer pre-train that
    architecture on its own data from that initialisation, as peers that exchange logits pre-train theirs; round 1
    averages what they got. A distilled run starts from the peers' own
    pre-trained models: their logits are merged into one model on the proxy set, by one of the peers, and that model
    is what everyone gets in round 1 (arXiv 2402.14922: clients' knowledge merged before FedAvg [paper]; on the
    proxy set, with the exchange charged as bytes and as a round [ours]).

    The accuracy of round t is that of the averaged model every peer receives in round t.

    Only the peers know the architecture: the weights that most of them send at the start say what it is, others are
    refused.
    """

    def __init__(self, config: RunConfig, peers: int, classes: int) -> None:
        super().__init__(replace(config, topology="complete"), peers, classes)
        self._average: tuple[int, Letter] | None = None
        self._weighed: dict[str, tuple[int, int]] = {}  # by peer: the round of its newest weights, and their samples

    def teachers(self, peer: int, round: int) -> Sequence[int]:
        """Return everyone: the server reads all weights."""
        return range(self.peers)

    def check(self, answer: Answer, *, kind: Kind = "learn") -> None:
        """Refuse weights that cannot be averaged; logits, sent for a distilled start, are checked as such."""
        if kind == "start" and self.config.fedavg_start == "distilled":
            return super().check(answer)
        merged = kind == "merge"  # the model that was distilled at the start
        if answer.round == self.config.rounds and not answer.arrays and not merged:
            return None  # the last average is only measured
        _check_finite(answer.arrays)
        if self._average is not None and (found := _layout(answer.arrays)) != _layout(self._average[1].arrays):
            raise BadKnowledge(f"expected weights like the average's, but got other names or shapes: {found[:4]}")
        if not merged:
            self._weighed[answer.peer] = (answer.round, _samples(answer))
        return None

    def left_out(self, round: int, mailbox: Mailbox) -> Mapping[int, str]:
        """Return the peers whose first weights have other names or shapes than most peers' have."""
        if round > 0 or self.config.fedavg_start == "distilled":
            return {}
        first = [(index, _layout(letter.arrays)) for index, letter in mailbox if index != SERVER]
        common = _most_common(layout for _, layout in first)
        return {
            index: f"expected weights like most peers', but got other names or shapes: {layout[:4]}"
            for index, layout in first
            if layout != common
        }

    def to_merge(self, mailbox: Mailbox) -> tuple[Letter, ...] | None:
        """Return all logits, for a distilled start."""
        if self.config.fedavg_start != "distilled":
            return None
        return tuple(letter for _, letter in mailbox)

    def letters(self, peer: int, round: int, mailbox: Mailbox) -> tuple[Letter, ...]:
        """Return the server's average of what came in the round before."""
        if self._average is None or self._average[0] != round:
            newest = (letter for index, letter in mailbox if index != SERVER and letter.round == round - 1)
            fresh = [letter for letter in newest if self._weighed.get(letter.sender, (-1, 0))[0] == letter.round]
            merged = mailbox.get(SERVER)
            if self._average is None and merged is not None:
                self._average = (round, merged)
            elif fresh:
                self._average = (round, Letter("server", round - 1, Packed.of(self._aggregate(fresh, round))))
            elif self._average is None:
                return ()
        return (self._average[1],)

    def _aggregate(self, letters: Sequence[Letter], round: int) -> Arrays:
        common = _most_common(_layout(letter.arrays) for letter in letters)
        replies = [
            Message(
                RecordDict(
                    {
                        "arrays": ArrayRecord({name: Array(array) for name, array in letter.arrays.items()}),
                        "metrics": MetricRecord({"num-examples": self._weighed[letter.sender][1]}),
                    }
                ),
                dst_node_id=index,
                message_type="train",
            )
            for index, letter in enumerate(letters)
            if _layout(letter.arrays) == common
        ]
        arrays, _ = flower.FedAvg().aggregate_train(round, replies)
        if arrays is None:
            raise BadKnowledge(f"Flower's FedAvg averaged nothing in round {round}")
        return {name: array.numpy().astype(np.float32) for name, array in arrays.items()}


def _most_common(layouts: Iterable[_Layout]) -> _Layout:
    return max(Counter(layouts).items(), key=lambda found: found[1], default=((), 0))[0]


def _layout(arrays: Arrays) -> _Layout:
    return tuple(sorted((name, array.shape) for name, array in arrays.items()))


def _check_finite(arrays: Arrays) -> None:
    if not arrays:
        raise BadKnowledge("expected weights, but got no array")
    for name, array in arrays.items():
        if array.dtype != np.float32 or not np.isfinite(array).all():
            raise BadKnowledge(f"expected weights `{name}` to be finite float32, but got {array.dtype}")


def _samples(answer: Answer) -> int:
    """Return how many samples a peer says it trained on: the weight of its weights."""
    value = answer.metrics.get("samples", math.nan)
    if not 1 <= value <= _MOST_SAMPLES or value != int(value):
        raise BadKnowledge(f"expected metric `samples` to be a whole number from 1 to {_MOST_SAMPLES}, but got {value}")
    return int(value)
