"""From a mail's content to an answer's content, whatever happens on the way. Imports no torch at the top."""

import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from flwr.app import RecordDict

from clients.configuration import PeerConfig
from fedkd.errors import FedkdError
from fedkd.settings.config import RunConfig
from fedkd.wire.messages import Answer, Mail, pack_answer, unpack_mail, wire_bytes

if TYPE_CHECKING:
    from clients.peer import Peer

OpenPeer = Callable[[PeerConfig, RunConfig, str], "Peer"]
Tell = Callable[[BaseException], str]
"""Says of an error what the relay is to know of it, and the rest to the peer's own log."""


def answer(content: RecordDict, peer_config: PeerConfig, open_peer: OpenPeer) -> RecordDict:
    """Check a mail, have a peer answer it, and pack what it says or why it does not.

    Args:
        content: the mail's.
        peer_config: the peer's own configuration.
        open_peer: returns the peer of a configuration, the settings as they hold there, and the run's token.
    """

    def work() -> RecordDict:
        mail, config = check(content, peer_config)
        here = peer_config.among(config.peers, str(mail.settings.get("dataset", "")))
        if mail.kind == "introduce" and here.index >= here.of:
            return pack_answer(Answer(here.name, mail.round, {"spare": 1}))
        # Once a peer trains, the text of an error may say what its data are.
        tell = by_kind if peer_config.withholds and mail.kind != "introduce" else telling(peer_config)
        return always(lambda: _opened(here, config, mail, open_peer), peer_config.name, mail.round, tell)

    return always(work, peer_config.name, round_of(content), telling(peer_config))


def _opened(peer_config: PeerConfig, config: RunConfig, mail: Mail, open_peer: OpenPeer) -> RecordDict:
    began = time.perf_counter()
    peer = open_peer(peer_config, config, mail.run)
    peer.watch.add("start-up", time.perf_counter() - began)
    return pack_answer(peer.answer(mail))


def check(content: RecordDict, peer_config: PeerConfig) -> tuple[Mail, RunConfig]:
    """Return a mail and its settings as they hold at a peer, once they are within its limits.

    Raises:
        FedkdError: the mail has not the form, a setting is wrong, or it asks for more than the peer allows.
    """
    if not peer_config.simulated:
        peer_config.limits.check_payload(wire_bytes(content))
    mail = unpack_mail(content)
    if not peer_config.simulated:
        peer_config.limits.bounds.check_mail(mail)
    config = RunConfig.from_mapping(mail.settings)
    if not peer_config.simulated:
        peer_config.limits.check(config, mail.kind, mail.round)
    return mail, peer_config.settings(config)


def always(work: Callable[[], RecordDict], name: str, round: int, tell: Tell) -> RecordDict:
    """Do what makes an answer; an error is an answer too, because a handler that raises poisons Flower."""
    try:
        return work()
    except (Exception, SystemExit) as error:  # a user's own code may well exit
        return pack_answer(Answer(name, round, error=tell(error)))


def telling(peer_config: PeerConfig) -> Tell:
    """Return how much of an error at a peer leaves it."""
    return frankly if peer_config.simulated else partial(discreetly, conceal=peer_config.conceal)


def frankly(error: BaseException) -> str:
    """Tell all: a simulation's relay and peers are one user's."""
    if isinstance(error, FedkdError):
        return str(error)
    traceback.print_exception(error)
    return f"{type(error).__name__}: {error}"


def discreetly(error: BaseException, *, conceal: Callable[[str], str]) -> str:
    """Tell what the library says, without the peer's paths; of another error, whose text can hold all, the kind."""
    if not isinstance(error, FedkdError):
        return by_kind(error)
    said = conceal(str(error))
    if said != str(error):
        print(error, file=sys.stderr, flush=True)
    return said


def by_kind(error: BaseException) -> str:
    """Tell the kind of an error alone."""
    traceback.print_exception(error)
    return f"{type(error).__name__}: the peer's log says more"


def round_of(content: RecordDict) -> int:
    """Return the round of a mail that may be of any form; 0 if it does not say."""
    head = content.config_records.get("mail")
    found = head.get("round") if head is not None else None
    return found if isinstance(found, int) and found >= 0 else 0
