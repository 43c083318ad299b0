"""What a strategy decides: who hears whom in a round, and with what weight."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace

from fedkd.settings.config import RunConfig
from fedkd.settings.rules import split_list
from fedkd.wire.claims import claims_layout, decode_claims, decode_rows, without_claims
from fedkd.wire.codecs import BadKnowledge, codec
from fedkd.wire.features import decode_features, without_features
from fedkd.wire.messages import Answer, Kind, Letter
from strategies.relay.mailbox import Mailbox
from strategies.relay.sealed import address, check_sealed, most_sealed
from strategies.topology import Topology, topology


class Strategy(ABC):
    """Who hears whom. How a peer combines what it hears follows from the settings, on the peer's side.

    Args:
        config: the run's settings.
        peers: how many peers there are; they are numbered 0 .. peers − 1.
        classes: how many classes their models tell apart.

    Attributes:
        topology: the graph of neighbours; None for a single peer.
    """

    def __init__(self, config: RunConfig, peers: int, classes: int) -> None:
        self.config, self.peers, self.classes = config, peers, classes
        self._codec = codec(config.codec)
        self.topology: Topology | None = None
        if peers > 1:
            self.topology = topology(
                config.topology,
                peers,
                degree=config.topology_degree,
                probability=config.topology_probability,
                seed=config.seed,
            )

    @abstractmethod
    def teachers(self, peer: int, round: int) -> Sequence[int]:
        """Return the peers that one peer hears in a round (counted from 1), ascending, itself not among them."""

    def check(self, answer: Answer, *, kind: Kind = "learn") -> None:
        """Refuse knowledge that no peer could use.

        Args:
            answer: holds it.
            kind: the kind of the mail that it answers.

        Raises:
            BadKnowledge: what is wrong with it.
        """
        shape, dimensions = (self.config.travelling, self.classes), self.config.flow_dimensions
        chosen = len(split_list(self.config.flow_layers)) or self.config.flow_depth
        layers = chosen if self.config.method == "infoflow" else 0
        if self.config.sealed:
            claims = claims_layout(shape, self.config.told)
            most = most_sealed(self._codec, shape, layers=layers, dimensions=dimensions, claims=claims)
            check_sealed(answer.arrays, receivers=self.peers, most=most)
            return
        rest = without_features(answer.arrays)
        if (found := len(answer.arrays) - len(rest)) > layers:
            raise BadKnowledge(f"expected features of at most {layers} layers, but got {found}")
        said = decode_claims(rest, shape=shape, told=self.config.told)
        decode_rows(self._codec, without_claims(rest), said, shape=shape)
        decode_features(answer.arrays, count=shape[0], dimensions=dimensions)

    def letters(self, peer: int, round: int, mailbox: Mailbox) -> tuple[Letter, ...]:
        """Return what a peer hears in a round: its teachers' newest knowledge, weighed down by its age."""
        letters = []
        for teacher in self.teachers(peer, round):
            letter = mailbox.get(teacher)
            if letter is None:
                continue
            age = self.age(teacher, letter, round, mailbox)
            usable = age == 0 or (age <= self.config.max_staleness and not self.config.proxy_per_round)
            weight = self.config.staleness_decay**age
            if usable and weight > 0:
                arrays = address(letter.arrays, peer) if self.config.sealed else letter.arrays
                letters.append(replace(letter, arrays=arrays, weight=weight))
        return tuple(letters)

    def age(self, teacher: int, letter: Letter, round: int, mailbox: Mailbox) -> int:
        """Return how many rounds old a letter is; without rounds, as many peers' answers as there are make one."""
        if self.config.mode == "async":
            return mailbox.updates_since(teacher) // self.peers
        return max(0, round - 1 - letter.round)

    def left_out(self, round: int, mailbox: Mailbox) -> Mapping[int, str]:
        """Return the peers whose knowledge of a round does not fit the others', with the reason; usually none."""
        return {}

    def to_merge(self, mailbox: Mailbox) -> tuple[Letter, ...] | None:
        """Return the knowledge that one peer is to distil into a common model after the start; None: there is none."""
        return None

    def neighbours(self, peer: int, round: int) -> tuple[int, ...]:
        """Return a peer's neighbours on the topology in a round."""
        return self.topology.neighbours(peer, round) if self.topology else ()
