"""Who and where a peer is: its own configuration, which wins over the run's settings. Imports no torch.

A deployed peer opens nothing that the server names: its data, proxy set, model, checkpoint and device are its own.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path

from clients.bounds import NAMES, Bounds
from clients.limits import Limits
from clients.own_settings import Own, without_paths
from fedkd.errors import SettingError
from fedkd.models import names
from fedkd.settings.config import PEER, RunConfig
from fedkd.settings.declare import CODE, FILES, PATH, SOURCE, Declared, Scalar, declared
from fedkd.settings.rules import split_list

_TEXTS = (
    "model", "checkpoint", "held-out", "input-size", "train", "dataset", "proxy", "data-dir", "device", "identity",
    "trusted-keys",
)  # fmt: skip


@dataclass(frozen=True)
class PeerConfig:
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
        replace_head: whether its model gets a new head where the checkpoint's is for other classes.
        held_out: file of the indices that it never trains on; empty: the one dealt out by ``held-out``.
        input_size: at which its model sees images; empty: the one dealt out by ``input-size``.
        train: what of its model trains; empty: what is dealt out by ``train``.
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
    replace_head: bool = False
    held_out: str = ""
    input_size: str = ""
    train: str = ""
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
    def features_dir(self) -> Path:
        """Where features of frozen models are kept: at the peer; those of simulated ones once for all a user's runs."""
        return Path("~/.cache/fedkd/features").expanduser() if self.simulated else self.state_dir / "features"

    @property
    def withholds(self) -> bool:
        """Whether what it measures stays with it."""
        return not self.simulated and self.limits.epsilon is not None

    @classmethod
    def of_own(cls, own: Own, *, name: str, root: Path, simulated: bool) -> "PeerConfig":
        """Read a peer's own configuration, as :func:`clients.own_settings.own_settings` returns it.

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
        given |= {"tell": "tell"}
        limits = {field_: own[key] for key, field_ in given.items() if key in own}
        limits.setdefault("sealed", bool(own.get("trusted-keys")))
        for listed in {"strategies", "tell"} & limits.keys():
            limits[listed] = split_list(str(limits[listed]))  # type: ignore[assignment]
        bounds = Bounds(**{key.replace("-", "_"): int(own[key]) for key in NAMES if key in own})
        texts = {key.replace("-", "_"): str(own.get(key, "")) for key in _TEXTS}
        return cls(
            name=name,
            index=int(own.get("partition-id", 0)),
            of=int(own.get("num-partitions", 1)),
            state_dir=root / name,
            cache_dir=root,
            simulated=simulated,
            replace_head=bool(own.get("replace-head", False)),
            worker=bool(own.get("worker", True)),
            idle_seconds=float(own.get("idle-seconds", cls.idle_seconds)),
            limits=Limits(**limits, bounds=bounds),  # type: ignore[arg-type]
            **texts,
        )

    def among(self, peers: int, dataset: str) -> "PeerConfig":
        """Return this configuration as it is in a run.

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
        own = {name: self._own(about.own, config) for name, about in declared(RunConfig).items() if about.own}
        if self.simulated:
            given = {name.replace("-", "_"): value for name, value in own.items() if value}
            return replace(config, **given)  # type: ignore[arg-type]
        for setting, value in (("model", self.model), ("dataset", self.dataset), ("proxy", self.proxy)):
            if not value or value == "split":
                allowed = f"set by peer {self.name} itself: a deployed peer opens nothing that the server names"
                raise SettingError(setting, value, allowed)
        for name, about in declared(RunConfig).items():
            if not about.own:
                _refuse_foreign(name, config.to_mapping()[name], about)
        if config.fedavg_model not in names():  # whatever the strategy says: no kind of mail may get to run it
            raise SettingError("fedavg-model", config.fedavg_model, f"one of {', '.join(names())} in a deployment")
        own["device"] = self.device or "auto"
        given = {name.replace("-", "_"): value for name, value in own.items()}
        return replace(config, download=False, keep_models=True, **given)  # type: ignore[arg-type]

    def conceal(self, text: str) -> str:
        """Return a text for others to read, with this peer's own paths replaced by the settings that hold them."""
        own = {key: str(getattr(self, key.replace("-", "_"))) for key in _TEXTS}
        return without_paths(text, {**own, "state-dir": str(self.cache_dir)})

    def _own(self, key: str, config: RunConfig) -> Scalar:
        """Return the value of a setting of this peer's own; empty where it has none."""
        if key == "dataset":
            return self._own_dataset(config.dataset)
        value: Scalar = getattr(self, key.replace("-", "_"))
        return value

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

    def input_size_of(self, config: RunConfig) -> str:
        """Return the size at which this peer's model sees images: pixels, ``data``, or empty: what it says itself."""
        size = self.input_size or _dealt(config.input_size, self.index)
        return "" if size == "-" else size

    def trains(self, config: RunConfig) -> str:
        """Return what of this peer's model trains: ``all``, ``head`` or ``last:N``."""
        return self.train or _dealt(config.train, self.index) or "all"

    def as_pooled(self, config: RunConfig) -> "PeerConfig":
        """Return the peer in whose place the pooled control's model learns: as the first that has the same model.

        It sees the images as that one does, and where only a part of it trains, the rest is that one's, with its
        checkpoint. Where no peer has that model it learns as a peer without a checkpoint would.
        """
        listed, model = split_list(config.models), config.pooled_model
        if model not in listed:
            return replace(self, model=model, checkpoint="-", input_size="-", train="all")
        like = replace(self, index=listed.index(model), checkpoint="", input_size="", train="")
        size, trains = like.input_size_of(config) or "-", like.trains(config)
        found = like.checkpoint_path(config) if trains != "all" else None
        return replace(self, model=model, checkpoint=str(found or "-"), input_size=size, train=trains)

    def held_out_path(self, config: RunConfig) -> str:
        """Return the file of what this peer's owner held out, empty where none is known."""
        path = self.held_out or _dealt(config.held_out, self.index)
        return "" if path == "-" else path

    def held_out_paths(self, config: RunConfig) -> tuple[str, ...]:
        """Return the files of what this peer and all that share its data set hold out."""
        own = self.held_out or self.dataset
        paths = [self.held_out_path(config)] if own else split_list(config.held_out)
        return tuple(path for path in dict.fromkeys(paths) if path not in ("", "-"))


def _dealt(dealt: str, index: int) -> str:
    choices = split_list(dealt)
    return choices[index % len(choices)] if choices else ""


def _refuse_foreign(name: str, value: Scalar, about: Declared) -> None:
    """Refuse what a server would have a deployed peer open."""
    if about.opens == CODE and about.names_code(value):
        raise SettingError(name, value, "one of the library's in a deployment")
    if about.opens in (SOURCE, FILES, PATH) and value:
        raise SettingError(name, value, "left out in a deployment: a peer opens nothing that the server names")
