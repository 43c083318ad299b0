"""From a mail's letters to the teachers that a peer learns from: opened, decoded, refused where they cannot be used."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from clients.configuration import PeerConfig
from clients.flow import Flow
from clients.learner import Heard, Memo, stack
from clients.telling import with_claims
from fedkd.settings.config import RunConfig
from fedkd.wire.claims import Claims, decode_claims, decode_rows, without_claims
from fedkd.wire.codecs import BadKnowledge, codec
from fedkd.wire.features import decode_features, without_features
from fedkd.wire.messages import Arrays, Letter, Mail

if TYPE_CHECKING:
    from clients.keys import Secrets

_PLACED = 3
"""What letters take that are weighed by sample or class, over what they take whole, measured at 100 classes."""


class Hearing:
    """Reads what one peer is sent in one run.

    Args:
        config: the run's settings.
        peer_config: the peer, whose limits letters must keep.
        classes: C, of its models.
        device: where the tensors go.
        flow: whose features travel beside the logits; None: nobody's.
        secrets: what opens sealed mail; None: mail is plain.
    """

    def __init__(
        self,
        config: RunConfig,
        peer_config: PeerConfig,
        *,
        classes: int,
        device: torch.device,
        flow: Flow | None,
        secrets: "Secrets | None",
    ) -> None:
        self._config, self._peer_config, self._classes, self._device = config, peer_config, classes, device
        self._layers = len(flow.layers) if flow else 0
        self._secrets, self._codec = secrets, codec(config.codec)

    def hear(self, mail: Mail, memo: Memo) -> tuple[Heard | None, list[str]]:
        """Decode what can be used; a bad letter is refused by its sender's name and costs nothing else.

        Args:
            mail: with logits ``[P, C]`` of each teacher.
            memo: what of sealed mail is remembered against a replay; added to.

        Returns:
            What was heard, None if there was no teacher; and why letters were refused.

        Raises:
            FedkdError: more letters than the peer has memory for.
        """
        letters, claims, refused = [], [], []
        if not self._peer_config.simulated:
            self._check_memory(len(mail.letters))
        for letter in mail.letters:
            if letter.weight == 0:
                continue
            try:
                knowledge, said = self._decode(self._unsealed(letter, mail, memo), letter.weight)
            except BadKnowledge as error:
                refused.append(f"{letter.sender}: {error}")
                continue
            if said.rows(self._config.travelling):  # who knows nothing of any sample is no teacher in this round
                letters.append(knowledge)
                claims.append(said)
        if heard := stack(letters):
            heard = with_claims(heard, claims)
        return heard, refused

    def _check_memory(self, letters: int) -> None:
        config = self._config
        numbers = self._classes + config.flow_dimensions * self._layers + len(config.told)
        placed = config.weighing != "uniform" or config.selector != "none"
        bounds = self._peer_config.limits.bounds
        bounds.check_decoded(letters, config.travelling, numbers * (_PLACED if placed else 1))

    def _decode(self, arrays: Arrays, weight: float) -> tuple[tuple[Tensor, float, list[Tensor]], Claims]:
        count, rest = self._config.travelling, without_features(arrays)
        shape = (count, self._classes)
        said = decode_claims(rest, shape=shape, told=self._config.told)
        logits = decode_rows(self._codec, without_claims(rest), said, shape=shape)
        found = decode_features(arrays, count=count, dimensions=self._config.flow_dimensions)
        if len(found) != self._layers:
            raise BadKnowledge(f"expected features of {self._layers} layers, not {len(found)}")
        features = [torch.from_numpy(layer).to(self._device) for layer in found]
        return (torch.from_numpy(logits).to(self._device), weight, features), said

    def _unsealed(self, letter: Letter, mail: Mail, memo: Memo) -> Arrays:
        if self._secrets is None:
            return letter.arrays
        if self._config.mode == "async":  # rounds are each peer's own count there, and may only rise
            return self._secrets.open(letter, memo, oldest=0, newest=None)
        oldest = mail.round - 1 - self._config.max_staleness
        return self._secrets.open(letter, memo, oldest=oldest, newest=mail.round - 1)
