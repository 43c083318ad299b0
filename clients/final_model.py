"""The model that a run leaves to a peer's owner: the last state that the peer reached, under a name that stays.

It is another name of the newest round's file, so that it costs no disk while the run goes on, needs no message at the
run's end, and is there too if the peer was late, cut off or asynchronous then.
"""

import hashlib
import math
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from itertools import count
from pathlib import Path

from clients.configuration import PeerConfig
from clients.data import Commons
from clients.state import StateError, write_whole
from fedkd import __version__
from fedkd.errors import FedkdError
from fedkd.models.card import Card, CardError
from fedkd.results.claim import MODELS
from fedkd.results.folder import git_commit
from fedkd.settings.config import RunConfig
from fedkd.source import source_hash
from fedkd.wire.messages import Mail

_PLAIN = re.compile(r"[\w-]{1,64}", re.ASCII)


class Final:
    """Keeps one peer's model of one run.

    Args:
        peer_config: who and where the peer is.
        config: the run's settings as they hold there.
        commons: its test set, classes and scaling.
    """

    def __init__(self, peer_config: PeerConfig, config: RunConfig, commons: Commons) -> None:
        self._peer_config, self._config, self._commons = peer_config, config, commons

    def begin(self, mail: Mail) -> None:
        """Put aside what a real peer has under the run's name already: a start that comes again replaces no model.

        Raises:
            FedkdError: there is no room for one more.
        """
        kept = self.path(mail)
        earlier = _card(kept)
        if self._peer_config.simulated or (earlier is not None and earlier.round == 0):
            return
        self.check_room()
        if earlier is not None:
            free = (kept.with_name(f"{kept.stem}.{n}{kept.suffix}") for n in count(1))
            kept.rename(next(path for path in free if not path.exists()))

    def check_room(self) -> None:
        """Refuse to begin a run at a real peer that keeps as many models as its owner has room for.

        Raises:
            FedkdError: names the limit and the cure.
        """
        most, folder = self._peer_config.limits.bounds.max_models, self._peer_config.state_dir / MODELS
        if not self._peer_config.simulated and len(list(folder.glob("*.safetensors"))) >= most:
            raise FedkdError(
                f"this peer keeps at most {most} models (its `max-models`), and has as many: its owner removes some "
                f"from {folder}, or raises the limit"
            )

    def card(self, mail: Mail, model: str, found: Mapping[str, float]) -> Card | None:
        """Return what is to be said of a state at the end of a round; None where no model is kept.

        Args:
            mail: of the round.
            model: the name of the architecture.
            found: what was measured in the round.
        """
        if not self._config.keep_models:
            return None
        look = self._commons.look
        accuracy, earlier = found.get("test_accuracy", math.nan), _card(self.path(mail))
        card = Card(
            peer=self._peer_config.name,
            model=model,
            classes=tuple(self._commons.source.classes),
            input_shape=self._commons.input_shape,
            mean=look.mean,
            std=look.std,
            run=mail.run,
            round=mail.round,
            before=accuracy if earlier is None or mail.kind == "start" else earlier.before,
            after=accuracy,
            measured_round=mail.round,
            measured_on=self._config.evaluate_on,
            version=__version__,
            source=source_hash(),
            commit=_commit(),
            resized="" if look.size is None else look.interpolation,
            kept_shape=self._commons.proxy_shape[1:],
        )
        if math.isnan(accuracy) and earlier is not None and earlier.measured_round < mail.round:
            card = replace(card, after=earlier.after, measured_round=earlier.measured_round)
        return card

    def keep(self, mail: Mail, state: Path) -> None:
        """Give a state, a file that is only ever replaced as a whole, the name that stays.

        Raises:
            StateError: the disk refuses.
        """
        kept = self.path(mail)
        try:
            kept.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            if mail.round >= self._config.rounds:
                write_whole(kept, lambda partial: _name(state, partial))
            else:  # a power cut may cost this name, not the state: no wait for the disk in every round
                partial = kept.with_suffix(".partial")
                _name(state, partial)
                partial.replace(kept)
                partial.unlink(missing_ok=True)  # of two names of one file, renaming leaves both
        except OSError as error:
            raise StateError(f"cannot keep the model of round {mail.round} in {kept.parent}: {error}") from error

    def path(self, mail: Mail) -> Path:
        """Return where the model of a mail's run is: with the results of a simulation, or at the peer."""
        if self._peer_config.simulated and mail.state_dir:
            return Path(mail.state_dir).parent / MODELS / f"{self._peer_config.name}.safetensors"
        return self._peer_config.state_dir / MODELS / f"{_plain(mail.run)}.safetensors"


@lru_cache(maxsize=1)
def _commit() -> str:
    return os.environ.get("FEDKD_COMMIT") or git_commit(Path(__file__).parent)


def _name(state: Path, name: Path) -> None:
    """Give a file a second name, or copy it where there is no such thing."""
    name.unlink(missing_ok=True)
    try:
        os.link(state, name)
    except OSError:
        shutil.copyfile(state, name)


@lru_cache(maxsize=64)
def _read(path: Path, version: tuple[int, int]) -> Card | None:
    try:
        return Card.read(path)
    except CardError:
        return None


def _card(path: Path) -> Card | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return _read(path, (found.st_ino, found.st_mtime_ns))


def _plain(run: str) -> str:
    """Return a run's token as a file's name; it is the server's, and may hold anything."""
    return run if _PLAIN.fullmatch(run) else hashlib.sha256(run.encode(errors="replace")).hexdigest()[:16]
