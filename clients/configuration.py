"""Who and where a peer is: its own configuration, which wins over the run's settings. Imports no torch.

It comes from the SuperNode's ``node-config``, directly or through a TOML file that ``peer-config`` names there. A
deployed peer opens nothing that the server names: its data, proxy set, model, checkpoint and device are its own.
"""

import difflib
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from clients.bounds import NAMES, Bounds
from fedkd.errors import FedkdError, SettingError
from fedkd.models import names
from fedkd.plugins import is_callable_spec
from fedkd.settings.config import PEER, RunConfig, Scalar
from fedkd.settings.rules import NAME, STRATEGIES, STRATEGY, Rule, above, at_least, numbers, split_list
from fedkd.wire.messages import Kind

Own = Mapping[str, Scalar]

_PATH_PREFIXES = ("npz:", "folder:")
_KEYS: dict[str, type] = {
    "name": str,
    "partition-id": int,
    "num-partitions": int,
    "model": str,
    "checkpoint": str,
    "held-out": str,
    "dataset": str,
    "data-dir": str,
    "proxy": str,
    "device": str,
    "state-dir": str,
    "worker": bool,
    "idle-seconds": float,
    "allowed-strategies": str,
    "require-sealed": bool,
    "max-epochs": int,
    "max-payload": int,
    "max-seconds": float,
    "max-epsilon": float,
    "max-delta": float,
    "identity": str,
    "trusted-keys": str,
    **dict.fromkeys(NAMES, int),
}
_RULES = {
    "name": NAME,
    "allowed-strategies": Rule(
        f"a comma-separated choice of {', '.join(STRATEGIES)} or `package.module:Class`",
        lambda v: all(map(STRATEGY.accepts, split_list(v))),
    ),
    "max-epsilon": above(0),
    "max-delta": Rule("a number between 0 and 1, neither of them", lambda v: 0 < v < 1),
}
_PATHS = (
    "peer-config", "state-dir", "data-dir", "checkpoint", "held-out", "dataset", "proxy", "identity", "trusted-keys",
)  # fmt: skip
_SEALED = "true: start the run with `sealed=true` (this peer's `require-sealed`, or its `trusted-keys`)"
_WITHIN = r"[^\s'\",;:)\]]*"  # the rest of a path in a sentence


_BOUNDS = Bounds()


@dataclass(frozen=True)
class Limits:
    """What a peer lets a server ask for; checked before any work starts.

    Attributes:
        strategies: the strategies it takes part in; by default those in which no server reads what it knows.
        sealed: whether it takes part only where mail is sealed.
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
        _check_kind(config, kind)
        self._check_privacy(config, kind)
        for asked in _will_be_asked(config) if kind == "introduce" else (kind,):
            self._check_epochs(_epochs(config, asked, round))
        self.bounds.check(config)

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


@dataclass(frozen=True)
class Place:
    """Who and where a peer is; the server has no say in it.

    Attributes:
        name: the peer's name in messages and results.
        index: its number, 0 <= index < of.
        of: how many peers there are.
        state_dir: the folder of its state.
        cache_dir: where processes of one machine share what they computed.
        simulated: whether it is a stand-in on the machine that runs them all.
        model: its own model; empty: the one dealt out by ``models``.
        checkpoint: its own checkpoint; empty: the one dealt out by ``checkpoints``.
        held_out: file of the indices that it never trains on; empty: the one dealt out by ``held-out``.
        dataset: its own data; empty: its part of the common ``dataset``.
        proxy: its own copy of the public proxy set; empty: the common ``proxy``.
        data_dir: where its data sets lie.
        device: its own choice of device.
        worker: whether a resident process keeps its model between messages.
        idle_seconds: how long that process waits for a mail before it ends.
        identity: file of the private key that proves to the others whose sealed mail it is; empty: none.
        trusted_keys: file of the others' public keys; empty: it believes the relay.
        limits: what it lets a server ask for.
    """

    name: str
    index: int
    of: int
    state_dir: Path
    cache_dir: Path
    simulated: bool = True
    model: str = ""
    checkpoint: str = ""
    held_out: str = ""
    dataset: str = ""
    proxy: str = ""
    data_dir: str = ""
    device: str = ""
    worker: bool = True
    idle_seconds: float = 1800.0
    identity: str = ""
    trusted_keys: str = ""
    limits: Limits = field(default_factory=Limits)

    @property
    def withholds(self) -> bool:
        """Whether what it measures stays with it."""
        return not self.simulated and self.limits.epsilon is not None

    @classmethod
    def of_own(cls, own: Own, *, name: str, root: Path, simulated: bool) -> "Place":
        """Read a peer's own configuration, as :func:`own_settings` returns it.

        Args:
            own: by key. ``trusted-keys`` imply ``require-sealed``, since a server would else ask for plain mail and no
                key would matter; an owner who says ``require-sealed = false`` beside them takes part in both.
            name: the peer's.
            root: the folder of its state unless it names one itself.
            simulated: whether it is a stand-in.

        Raises:
            SettingError: a setting of the resident process where there is none.
        """
        if not simulated and not own.get("worker", True):
            for key in ("max-seconds", "idle-seconds"):
                if key in own:
                    raise SettingError(key, own[key], "left out with `worker = false`: it ends the worker")
        root = Path(str(own.get("state-dir", root)))
        given = {"allowed-strategies": "strategies", "require-sealed": "sealed", "max-epochs": "epochs"}
        given |= {"max-payload": "payload", "max-seconds": "seconds", "max-epsilon": "epsilon", "max-delta": "delta"}
        limits = {field_: own[key] for key, field_ in given.items() if key in own}
        limits.setdefault("sealed", bool(own.get("trusted-keys")))
        if "strategies" in limits:
            limits["strategies"] = split_list(str(limits["strategies"]))  # type: ignore[assignment]
        bounds = Bounds(**{key.replace("-", "_"): int(own[key]) for key in NAMES if key in own})
        texts = {key.replace("-", "_"): str(own.get(key, "")) for key in _TEXTS}
        return cls(
            name=name,
            index=int(own.get("partition-id", 0)),
            of=int(own.get("num-partitions", 1)),
            state_dir=root / name,
            cache_dir=root,
            simulated=simulated,
            worker=bool(own.get("worker", True)),
            idle_seconds=float(own.get("idle-seconds", cls.idle_seconds)),
            limits=Limits(**limits, bounds=bounds),  # type: ignore[arg-type]
            **texts,
        )

    def among(self, peers: int, dataset: str) -> "Place":
        """Return this place in a run.

        Args:
            peers: how many take part; 0: as many as it knows of.
            dataset: the run's setting.
        """
        return replace(self, of=peers or self.of, dataset=self._own_dataset(dataset))

    def settings(self, config: RunConfig) -> RunConfig:
        """Return the run's settings as they hold here, with this peer's own in the place of the server's.

        In a simulation the server and its peers are one user's, so the run's settings fill what a peer leaves open. A
        deployed peer leaves nothing open: no path, data source, code or device that the server names is used; and its
        model stays with it whatever the server says.

        Raises:
            SettingError: a deployed peer lacks what it has to bring, or the server names code for it to run.
        """
        own = {
            "dataset": self._own_dataset(config.dataset),
            "proxy": self.proxy,
            "data_dir": self.data_dir,
            "device": self.device,
            "models": self.model,
            "checkpoints": self.checkpoint,
            "held_out": self.held_out,
        }
        if self.simulated:
            return replace(config, **{key: value for key, value in own.items() if value})  # type: ignore[arg-type]
        for setting, value in (("model", self.model), ("dataset", self.dataset), ("proxy", self.proxy)):
            if not value or value == "split":
                allowed = f"set by peer {self.name} itself: a deployed peer opens nothing that the server names"
                raise SettingError(setting, value, allowed)
        if config.fedavg_model not in names():  # whatever the strategy says: no kind of mail may get to run it
            raise SettingError("fedavg-model", config.fedavg_model, f"one of {', '.join(names())} in a deployment")
        if is_callable_spec(config.divergence):
            raise SettingError("divergence", config.divergence, "one of the library's in a deployment")
        own["device"] = self.device or "auto"
        return replace(config, download=False, keep_models=True, **own)  # type: ignore[arg-type]

    def conceal(self, text: str) -> str:
        """Return a text for others to read, with this peer's own paths replaced by the settings that hold them."""
        own = {key: str(getattr(self, key.replace("-", "_"))) for key in _TEXTS}
        return without_paths(text, {**own, "state-dir": str(self.cache_dir)})

    def _own_dataset(self, dataset: str) -> str:
        """Return this peer's own data: what it brings, or its share of a simulation whose peers all have their own."""
        if self.dataset or not self.simulated or PEER not in dataset:
            return self.dataset
        return dataset.replace(PEER, str(self.index))

    def model_spec(self, config: RunConfig) -> str:
        """Return the model this peer runs."""
        return self.model or _dealt(config.models, self.index)

    def checkpoint_path(self, config: RunConfig) -> Path | None:
        """Return the checkpoint this peer starts from, or None."""
        path = self.checkpoint or _dealt(config.checkpoints, self.index)
        return None if path in ("", "-") else Path(path).expanduser()

    def held_out_path(self, config: RunConfig) -> str:
        """Return the file of what this peer's owner held out, empty where none is known."""
        path = self.held_out or _dealt(config.held_out, self.index)
        return "" if path == "-" else path

    def held_out_paths(self, config: RunConfig) -> tuple[str, ...]:
        """Return the files of what this peer and all that share its data set hold out."""
        own = self.held_out or self.dataset
        paths = [self.held_out_path(config)] if own else split_list(config.held_out)
        return tuple(path for path in dict.fromkeys(paths) if path not in ("", "-"))


_TEXTS = ("model", "checkpoint", "held-out", "dataset", "proxy", "data-dir", "device", "identity", "trusted-keys")


def own_settings(node_config: Own) -> dict[str, Scalar]:
    """Return a peer's own configuration: what its ``peer-config`` file says, and over it what ``node-config`` says.

    Paths in the file are relative to the file.

    Raises:
        SettingError: the file is unreadable, has an unknown key, or a value that is not allowed.
    """
    own: dict[str, Scalar] = {}
    if path := str(node_config.get("peer-config", "")):
        own |= _read(Path(path).expanduser())
    own |= {key: value for key, value in node_config.items() if key != "peer-config"}
    for key in _KEYS.keys() & own.keys():
        own[key] = _checked(key, own[key])
    return own


def without_paths(text: str, own: Own) -> str:
    """Replace a peer's own paths, and what lies below them, by the names of the settings that hold them.

    >>> without_paths("no file '/data/ada/scans.npz'", {"dataset": "npz:/data/ada/scans.npz"})
    "no file '<dataset>'"
    """
    paths = {os.environ.get("HOME", "").rstrip(os.sep): "home"}
    paths |= {str(own[key]).removeprefix("npz:").removeprefix("folder:"): key for key in _PATHS if own.get(key)}
    for path in sorted(filter(lambda path: os.sep in path, paths), key=len, reverse=True):
        text = re.sub(re.escape(re.sub(r"@\d+$", "", path)) + _WITHIN, f"<{paths[path]}>", text)
    return text


def _read(path: Path) -> dict[str, Scalar]:
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SettingError("peer-config", str(path), f"a readable TOML file ({error})") from error
    for key in found.keys() - _KEYS.keys():
        near = difflib.get_close_matches(key, _KEYS) or sorted(_KEYS)
        raise SettingError(key, found[key], f"a known key of {path} (nearest: {', '.join(near)})")
    return {key: _from_here(key, value, path.absolute().parent) for key, value in found.items()}


def _from_here(key: str, value: Scalar, folder: Path) -> Scalar:
    """Make a file's relative path absolute."""
    if not isinstance(value, str) or not value:
        return value
    if key in ("checkpoint", "held-out", "data-dir", "state-dir", "identity", "trusted-keys"):
        return str(folder / Path(value).expanduser())
    for prefix in _PATH_PREFIXES if key in ("dataset", "proxy") else ():
        if value.startswith(prefix):
            return prefix + str(folder / Path(value.removeprefix(prefix)).expanduser())
    return value


def _checked(key: str, value: Scalar) -> Scalar:
    kind = _KEYS[key]
    if kind is float and type(value) is int:
        value = float(value)
    if kind is bool and value in ("true", "false"):  # `node-config` on a command line knows them quoted only
        value = value == "true"
    if type(value) is not kind:
        words = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
        raise SettingError(key, value, words[kind])
    rule = _RULES.get(key) or (at_least(0) if kind in (int, float) else None)
    if rule and not rule.accepts(value):
        raise SettingError(key, value, rule.phrase)
    return value


def _merges(config: RunConfig) -> bool:
    return config.strategy == "fedavg" and config.fedavg_start == "distilled"


def _will_be_asked(config: RunConfig) -> tuple[Kind, ...]:
    """Return what a run asks of a peer; not the isolated control, whose refusal costs its own number only."""
    return ("start", "merge", "learn") if _merges(config) else ("start", "learn")


def _check_kind(config: RunConfig, kind: Kind) -> None:
    """Refuse a mail that belongs to no run of real sites with these settings."""
    if kind == "pooled":
        raise SettingError("controls", "pooled", "left out in a deployment: no peer may see the others' data")
    if kind == "merge" and not _merges(config):
        found = f"{config.strategy}, fedavg-start {config.fedavg_start}"
        raise SettingError("strategy", found, "fedavg, fedavg-start distilled where knowledge is to become weights")


def _epochs(config: RunConfig, kind: Kind, round: int) -> dict[str, int]:
    """Return the epochs that a mail costs, by the setting that asks for them.

    What trains nothing and still goes through the data counts too: an evaluated round of the isolated control, and a
    trial of a search.
    """
    local, distil = {"local-epochs": config.local_epochs}, {"distill-epochs": config.distill_epochs}
    if kind == "merge":
        return {"merge-epochs": config.merge_epochs}
    if kind == "isolated":
        ((setting, epochs),) = (distil if config.joint else local).items()
        rounds = max(config.rounds, round)  # without a barrier a peer may do more than `rounds`
        return {f"rounds × {setting}": rounds * max(1, epochs)}
    if kind == "start":
        cold = config.strategy == "fedavg" and config.fedavg_start == "cold"
        return local if cold else {"pretrain-epochs": config.pretrain_epochs}
    if kind != "learn":
        return {}
    if config.strategy == "fedavg":
        return local
    searched = config.regime == "tuned"
    trials = len(numbers(config.tune_temperatures)) * len(numbers(config.tune_weights)) if searched else 0
    steps = distil if config.joint else distil | local
    return {
        **{setting: epochs * (1 + trials) for setting, epochs in steps.items()},
        "tune-temperatures × tune-weights": trials,
        "flow-auxiliary-epochs": config.flow_auxiliary_epochs if config.flow_auxiliary else 0,
    }


def _dealt(dealt: str, index: int) -> str:
    choices = split_list(dealt)
    return choices[index % len(choices)] if choices else ""
