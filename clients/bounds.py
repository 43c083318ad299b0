"""How much of what costs memory, time or disk a server may ask of a deployed peer. Imports no torch.

Every setting that costs something names the limit that bounds it where it is declared, in
:mod:`fedkd.settings`. Here is how much a run asks for, and the limits' defaults; epochs are counted by the mail,
in :mod:`clients.limits`.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, fields

from fedkd.errors import FedkdError, SettingError
from fedkd.settings.config import RunConfig
from fedkd.settings.declare import key, of
from fedkd.settings.rules import split_list
from fedkd.wire.messages import Mail


@dataclass(frozen=True)
class Bounds:
    """The most of each quantity; field names are the peer's settings, with underscores.

    Attributes:
        max_batch_size: samples in one training step.
        max_proxy_size: proxy samples.
        max_image_size: pixels a side of the images that a run would have.
        max_features: numbers about one proxy sample that travel beside its logits, of all layers together.
        max_rounds: rounds of a run.
        max_peers: peers of a run, and so letters and keys in a mail.
        max_threads: CPU threads.
        max_text: characters of one text in a mail.
        max_memory: bytes of all that a mail's letters hold, decoded.
        max_models: models that runs left to the owner, who alone removes them.
    """

    max_batch_size: int = 1024
    max_proxy_size: int = 100_000
    max_image_size: int = 256
    max_features: int = 2048
    max_rounds: int = 10_000
    max_peers: int = 1000
    max_threads: int = os.cpu_count() or 1
    max_text: int = 10_000
    max_memory: int = 4 * 2**30
    max_models: int = 100

    def check(self, config: RunConfig) -> None:
        """Refuse settings that ask for more.

        Raises:
            SettingError: names the setting and the limit with its value.
        """
        for limit, setting, asked in _asked(config):
            most: int = getattr(self, limit.replace("-", "_"))
            if asked > most:
                cpus = ", by default its CPUs" if limit == "max-threads" else ""
                raise SettingError(setting, asked, f"at most {most} (this peer's `{limit}`{cpus})")

    def check_mail(self, mail: Mail) -> None:
        """Refuse a mail of too many or too long parts, before anything in it is read.

        Raises:
            FedkdError: names what there is too much of, and the limit with its value.
        """
        texts = [mail.run, mail.state_dir, *(letter.sender for letter in mail.letters)]
        for pairs in (mail.keys, mail.settings):
            texts += [part for pair in pairs.items() for part in pair if isinstance(part, str)]
        for what, asked, limit in (
            ("letters", len(mail.letters), "max-peers"),
            ("keys", len(mail.keys), "max-peers"),
            ("rounds", mail.round, "max-rounds"),
            ("characters of one text", max(map(len, texts)), "max-text"),
        ):
            _refuse_more(what, asked, limit, getattr(self, limit.replace("-", "_")))

    def check_decoded(self, letters: int, samples: int, numbers: int) -> None:
        """Refuse letters that would take too much memory once they are decoded.

        Args:
            letters: how many.
            samples: that each of them is about.
            numbers: about one sample, logits and features.

        Raises:
            FedkdError: names how much that is, and the limit with its value.
        """
        _refuse_more("bytes of decoded letters", 4 * letters * samples * numbers, "max-memory", self.max_memory)


NAMES = tuple(key(spec.name) for spec in fields(Bounds))
"""The limits, as a peer's settings."""


def _asked(config: RunConfig) -> Iterator[tuple[str, str, int]]:
    """Yield each limit but that of the epochs, a setting that it bounds, and how much that asks for."""
    for spec in fields(RunConfig):
        if (limit := of(spec).costs) in NAMES and limit != "max-features":
            yield limit, key(spec.name), getattr(config, spec.name)
    if config.method == "infoflow":
        named = len(split_list(config.flow_layers))
        layers = "layers of flow-layers" if named else "flow-depth"
        yield "max-features", f"{layers} × flow-dimensions", (named or config.flow_depth) * config.flow_dimensions


def _refuse_more(what: str, asked: int, limit: str, most: int) -> None:
    if asked > most:
        raise FedkdError(f"Expected at most {most} {what} in a mail (this peer's `{limit}`), got {asked}.")
