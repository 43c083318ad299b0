"""What a peer lets a server ask for. Imports no torch."""

from collections.abc import Mapping
from dataclasses import dataclass

from clients.bounds import Bounds
from fedkd.errors import FedkdError, SettingError
from fedkd.settings.config import RunConfig
from fedkd.settings.declare import declared
from fedkd.wire.claims import MASK
from fedkd.wire.messages import Kind

_SEALED = "true: start the run with `sealed=true` (this peer's `require-sealed`, or its `trusted-keys`)"
_BOUNDS = Bounds()


@dataclass(frozen=True)
class Limits:
    """What a peer lets a server ask for; checked before any work starts.

    Attributes:
        strategies: the strategies it takes part in; by default those in which no server reads what it knows.
        sealed: whether it takes part only where mail is sealed.
        tell: what it tells beside its logits where a run asks for it, of :data:`fedkd.wire.claims.CLAIMS`.
        epochs: the most epochs that one mail may cost, all phases together.
        payload: the most bytes of arrays in one mail.
        seconds: the longest time that one mail may take.
        epsilon: the ε that all it ever publishes may amount to; None: it demands no differential privacy. With a
            limit, what it measures stays with it too.
        delta: the δ that goes with it.
        bounds: the most of every other quantity.
    """

    strategies: tuple[str, ...] = ("averaged", "pairwise", "gossip")
    sealed: bool = False
    tell: tuple[str, ...] = ()
    epochs: int = 200
    payload: int = 256 * 2**20
    seconds: float = 24 * 3600.0
    epsilon: float | None = None
    delta: float = 1e-5
    bounds: Bounds = _BOUNDS

    def check_payload(self, size: int) -> None:
        """Refuse a mail whose arrays are larger than this peer allows.

        Raises:
            FedkdError: names both sizes.
        """
        if size > self.payload:
            raise FedkdError(
                f"Expected at most {self.payload} bytes in a mail (this peer's `max-payload`), got {size}."
            )

    def check(self, config: RunConfig, kind: Kind, round: int = 0) -> None:
        """Refuse settings that ask for more than this peer allows.

        Args:
            config: the run's settings.
            kind: what the peer is asked for.
            round: of the mail: the isolated control does all rounds up to it again.

        Raises:
            SettingError: names the setting and the limit.
        """
        if config.strategy not in self.strategies:
            allowed = f"one of {', '.join(self.strategies)} (this peer's `allowed-strategies`)"
            raise SettingError("strategy", config.strategy, allowed)
        if self.sealed and not config.sealed:
            raise SettingError("sealed", config.sealed, _SEALED)
        self._check_told(config)
        _check_kind(config, kind)
        self._check_privacy(config, kind)
        for asked in _will_be_asked(config) if kind == "introduce" else (kind,):
            self._check_epochs(_epochs(config, asked, round))
        self.bounds.check(config)

    def _check_told(self, config: RunConfig) -> None:
        for what in config.told:
            if what not in self.tell:
                setting = "selector" if what == MASK else "weighing"
                value = str(config.to_mapping()[setting])
                cure = f'`tell = "{",".join((*self.tell, what))}"` in its own settings'
                allowed = f"one for which this peer tells nothing but {', '.join(self.tell) or 'its logits'}"
                raise SettingError(setting, value, f"{allowed} (unless its owner allows {what}: {cure})")

    def _check_epochs(self, epochs: Mapping[str, int]) -> None:
        if (total := sum(epochs.values())) > self.epochs:
            setting = max(epochs, key=lambda name: epochs[name])
            allowed = f"at most {self.epochs} epochs in a mail with all else (this peer's `max-epochs`), not {total}"
            raise SettingError(setting, epochs[setting], allowed)

    def _check_privacy(self, config: RunConfig, kind: Kind) -> None:
        if self.epsilon is None:
            return
        if not 0 < config.privacy_epsilon <= self.epsilon:
            allowed = f"more than 0 and at most {self.epsilon:g} (this peer's `max-epsilon`)"
            raise SettingError("privacy-epsilon", config.privacy_epsilon, allowed)
        if config.privacy_delta > self.delta:
            allowed = f"at most {self.delta:g} (this peer's `max-delta`)"
            raise SettingError("privacy-delta", config.privacy_delta, allowed)
        if kind == "isolated":
            raise SettingError("controls", "isolated", "left out: with `max-epsilon` a peer tells no measurements")


def _will_be_asked(config: RunConfig) -> tuple[Kind, ...]:
    """Return what a run asks of a peer; not the isolated control, whose refusal costs its own number only."""
    return ("start", "merge", "learn") if config.merges else ("start", "learn")


def _check_kind(config: RunConfig, kind: Kind) -> None:
    """Refuse a mail that belongs to no run of real sites with these settings."""
    if kind == "pooled":
        raise SettingError("controls", "pooled", "left out in a deployment: no peer may see the others' data")
    if kind == "channel":
        raise SettingError("controls", "channel", "left out in a deployment: it learns the proxy set's labels")
    if kind == "merge" and not config.merges:
        found = f"{config.strategy}, fedavg-start {config.fedavg_start}"
        raise SettingError("strategy", found, "fedavg, fedavg-start distilled where knowledge is to become weights")


def _epochs(config: RunConfig, kind: Kind, round: int) -> dict[str, int]:
    """Return the epochs that a mail costs, by the setting that asks for them, as each setting declares it.

    What trains nothing and still goes through the data counts too: an evaluated round of the isolated control, and a
    trial of a search.
    """
    found = {}
    for name, about in declared(RunConfig).items():
        if about.epochs:
            factor = "rounds" if kind == "isolated" else about.beside
            found[f"{factor} × {name}" if factor else name] = about.epochs(config, kind, round)
    return found
