"""What one site holds: its private data, the common test set and the public proxy set, on its device."""

import hashlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from clients.body import Body
from clients.configuration import PeerConfig
from clients.eyes import Eyes
from clients.held_out import named_part, split_off, validation_part
from fedkd.data.appearance import Appearance
from fedkd.data.partition import partition
from fedkd.data.proxy import Proxy, foreign_proxy, split_proxy
from fedkd.data.samples import Inputs, Samples, subset
from fedkd.data.shape import shaped
from fedkd.data.sources import Dataset, Source, load_public, load_source
from fedkd.errors import SettingError
from fedkd.models.libraries import folder
from fedkd.plugins import is_callable_spec
from fedkd.seeding import derive
from fedkd.settings.config import RunConfig
from fedkd.settings.data import Data
from fedkd.settings.sources import place


@dataclass(frozen=True)
class Commons:
    """What peers of one data source share whose models see it alike, standardised and on the device.

    Attributes:
        source: the raw data source.
        pool: indices of the training set that are left for the peers.
        look: how the model sees images; a scale alone where it sees them as they are. Made from the public proxy set,
            or as the model's own description says.
        input_shape: of one input of the whole model, ``[C, H, W]`` for images.
        proxy_shape: of the proxy set as it is kept, ``(P, ...)``, which is the same for all peers.
        proxy_inputs: ``[P, ...]``: images, or features where these are computed once.
        fingerprint: hash of the raw proxy set, over content and order.
        proxy_labels: ``[P]`` int64, where they are known. The channel control alone looks at them.
        test_inputs: ``[N, ...]``.
        test_labels: ``[N]`` int64.
        test_fingerprint: hash of the raw test set.
        private: what a model sees of samples of the training set, given their indices.
    """

    source: Source
    pool: np.ndarray
    look: Appearance
    input_shape: tuple[int, ...]
    proxy_shape: tuple[int, ...]
    proxy_inputs: Inputs
    fingerprint: str
    test_inputs: Inputs
    test_labels: Tensor
    test_fingerprint: str
    private: Callable[[np.ndarray], Inputs]
    proxy_labels: Tensor | None = None


@dataclass(frozen=True)
class Labelled:
    """Private samples, standardised and on the device: ``inputs`` ``[N, ...]`` and ``labels`` ``[N]`` int64."""

    inputs: Inputs
    labels: Tensor


@dataclass(frozen=True)
class Site:
    """One peer's view of the data.

    Attributes:
        inputs: private and trained on, ``[N, ...]``, standardised, on the device.
        labels: private, ``[N]`` int64.
        held_out: private and never trained on: what choices are made by; none where nothing is held out.
        label_share: share of each class in all private data, ``[C]``, sums to 1.
        commons: what it shares with the others.
        fingerprints: hashes of the private data, of what is held out of them, of the test set and of the proxy set:
            they tell whether something has changed, and never leave the peer. Empty for a pool.
    """

    inputs: Inputs
    labels: Tensor
    held_out: Labelled
    label_share: Tensor
    commons: Commons
    fingerprints: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _DataSettings:
    """The settings that decide what the data are: the key of the process's cache."""

    dataset: str
    data_dir: str
    download: bool
    proxy: str
    proxy_size: int
    image_size: int
    image_channels: int
    seed: int
    device: str
    validation: float
    named: tuple[str, ...]
    versions: tuple[str, ...]


@dataclass(frozen=True)
class _Split:
    """The settings that decide who holds which of the pool's samples."""

    peers: int
    scheme: str
    alpha: float
    classes_per_peer: int
    shared_classes: int
    cache: Path


def seen_shape(
    config: RunConfig,
    peer_config: PeerConfig,
    device: torch.device,
    versions: tuple[str, ...] = (),
    *,
    pooled: bool = False,
) -> tuple[tuple[int, ...], int]:
    """Return the shape of one input as a peer's model sees it, and how many classes there are, before any is made.

    The arguments and errors are those of :func:`open_site`; ``pooled``: it is the model of the pooled control.
    """
    settings = _data_settings(config, peer_config, device, versions)
    look, raw = _look(settings, Eyes.of(config, peer_config, pooled=pooled)), _raw(settings)
    return tuple(look(raw.proxy.inputs[:1]).shape[1:]), len(raw.source.classes)


def open_site(
    config: RunConfig,
    peer_config: PeerConfig,
    device: torch.device,
    versions: tuple[str, ...] = (),
    body: Body | None = None,
) -> Site:
    """Load, split and standardise a peer's data.

    Args:
        config: the run's settings as they hold at the peer.
        peer_config: the peer.
        device: where the tensors go.
        versions: of its files, as :func:`file_versions` returns them: data that have changed are read again.
        body: what does not train of its model, where features of it take the images' place.

    Raises:
        SettingError: anything about the data that does not fit the settings.
    """
    settings = _data_settings(config, peer_config, device, versions)
    commons = _commons(settings, _look(settings, Eyes.of(config, peer_config)), body, _augmented(config))
    split = None if peer_config.dataset else _split(config, peer_config)
    trained, held_out = _split_off(_own(settings, split, peer_config.index), config, peer_config, commons)
    # Named by the part, which is another one among more peers: that those are not the run's peers, the relay tells.
    part = f" (part {peer_config.index + 1} of {peer_config.of})" if split else ""
    fingerprints = {
        f"private data{part}": _private_fingerprint(settings, split, peer_config.index),
        f"held-out samples{part}": hashlib.blake2b(held_out.tobytes(), digest_size=16).hexdigest(),
        "test set": commons.test_fingerprint,
        "proxy set": commons.fingerprint,
        "size in which the model sees images": _hash(repr((commons.input_shape, commons.look.interpolation))),
        "choice of what of the model trains": _hash(peer_config.trains(config)),
    }
    if body:
        fingerprints["part of the model that does not train"] = body.weights
    return replace(_site(trained, held_out, commons), fingerprints=fingerprints)


def open_pool(config: RunConfig, peer_config: PeerConfig, device: torch.device, body: Body | None = None) -> Site:
    """Return what all peers train on in one site, and what they hold out, for the pooled control of a simulation.

    Args:
        config: the run's settings.
        peer_config: the peer in whose place the pooled model learns.
        device: where the tensors go.
        body: as :func:`open_site` takes it.
    """
    settings = _data_settings(config, peer_config, device, ())
    commons = _commons(settings, _look(settings, Eyes.of(config, peer_config, pooled=True)), body, _augmented(config))
    parts = _parts(settings, _split(config, peer_config))
    halves = [
        _split_off(commons.pool[part], config, replace(peer_config, index=index), commons)
        for index, part in enumerate(parts)
    ]
    trained, held_out = (np.concatenate(half) for half in zip(*halves, strict=True))
    return _site(trained, held_out, commons)


def _split_off(
    own: np.ndarray, config: RunConfig, peer_config: PeerConfig, commons: Commons
) -> tuple[np.ndarray, np.ndarray]:
    path = peer_config.held_out_path(config)
    named = named_part(path, len(commons.source.train)) if path else None
    return split_off(own, config, peer_config.index, named, whose=peer_config.name)


def file_versions(peer_config: PeerConfig, run: str) -> tuple[str, ...]:
    """Return what changes when the data, the checkpoint or the model's folder that a deployed peer brings change.

    Its worker outlives runs and keeps what it read. What a function returns may change unseen: it is read again in each
    run. A simulated peer's process ends with its runs.

    Args:
        peer_config: the peer.
        run: the run's token.
    """
    if peer_config.simulated:
        return ()
    data_dir = _data_dir(peer_config.data_dir)
    files = [
        _version(Path(path).expanduser()) if path else ""
        for path in (peer_config.checkpoint, peer_config.held_out, folder(peer_config.model))
    ]
    return (*(_source_version(spec, data_dir, run) for spec in (peer_config.dataset, peer_config.proxy)), *files)


def _source_version(spec: str, data_dir: Path, run: str) -> str:
    if is_callable_spec(spec):
        return run
    found = place(spec, data_dir)
    return _version(found.path) if found else ""


def _version(path: Path) -> str:
    """Return a hash of names, times and sizes; an error about a file that is not there is its reader's."""
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        with suppress(OSError):
            found = file.stat()
            digest.update(repr((str(file), found.st_mtime_ns, found.st_size, found.st_ino)).encode())
    return digest.hexdigest()


def proxy_subset(config: RunConfig, round: int, device: torch.device) -> Tensor:
    """Return the indices of the proxy samples that a round is about, ``[P]`` int64, drawn from (seed, round)."""
    if config.travelling == config.public_size:
        return torch.arange(config.public_size, device=device)
    generator = torch.Generator().manual_seed(derive(config.seed, "proxy-subset", round))
    drawn = torch.randperm(config.public_size, generator=generator)[: config.travelling]
    return drawn.sort().values.to(device)


def proxy_samples(config: RunConfig, round: int, inputs: Inputs) -> Inputs:
    """Return the proxy samples that a round is about, of all that there are."""
    if config.travelling == config.proxy_size:
        return inputs
    return subset(inputs, proxy_subset(config, round, inputs.device))


def _site(own: np.ndarray, held_out: np.ndarray, commons: Commons) -> Site:
    trained, kept = _labelled(own, commons), _labelled(held_out, commons)
    counts = torch.bincount(torch.cat([trained.labels, kept.labels]), minlength=len(commons.source.classes)).double()
    return Site(trained.inputs, trained.labels, kept, counts / counts.sum(), commons)


def _labelled(own: np.ndarray, commons: Commons) -> Labelled:
    labels = commons.source.train.labels[torch.from_numpy(own)]
    return Labelled(commons.private(own), labels.to(commons.test_labels.device))


def _own(settings: _DataSettings, split: _Split | None, index: int) -> np.ndarray:
    """Return the indices of a peer's private samples; without a split all that are left for the peers."""
    pool = _raw(settings).pool
    return pool if split is None else pool[_parts(settings, split)[index]]


@lru_cache(maxsize=4096)
def _private_fingerprint(settings: _DataSettings, split: _Split | None, index: int) -> str:
    train, own = _raw(settings).source.train, torch.from_numpy(_own(settings, split, index))
    return _fingerprint(train.inputs[own], train.labels[own])


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _fingerprint(inputs: Tensor, labels: Tensor) -> str:
    """Return a hash over content and order."""
    digest = hashlib.blake2b(repr((inputs.shape, inputs.dtype)).encode(), digest_size=16)
    for tensor in (inputs, labels):
        digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()


@lru_cache(maxsize=2)
def _parts(settings: _DataSettings, split: _Split) -> list[np.ndarray]:
    """Return every peer's indices into the pool, once for all the peers that this process works for."""
    raw = _raw(settings)
    return partition(
        raw.source.train.labels.numpy()[raw.pool],
        split.peers,
        split.scheme,
        seed=derive(settings.seed, "partition"),
        alpha=split.alpha,
        classes_per_peer=split.classes_per_peer,
        shared_classes=split.shared_classes,
        cache=split.cache,
    )


def _split(config: Data, peer_config: PeerConfig) -> _Split:
    return _Split(
        peer_config.of, config.partition, config.partition_alpha, config.classes_per_peer, config.shared_classes,
        peer_config.cache_dir,
    )  # fmt: skip


def _data_settings(
    config: RunConfig, peer_config: PeerConfig, device: torch.device, versions: tuple[str, ...]
) -> _DataSettings:
    if peer_config.dataset and config.proxy == "split":
        raise SettingError(
            "proxy", "split", f"a data source of its own, since peer {peer_config.name} brings its own data set"
        )
    return _DataSettings(
        config.dataset, config.data_dir, config.download, config.proxy,
        config.public_size, config.image_size, config.image_channels, config.seed, str(device),
        config.validation_share if config.evaluate_on == "validation" else 0.0, peer_config.held_out_paths(config),
        versions,
    )  # fmt: skip


def _data_dir(data_dir: str) -> Path:
    return Path(data_dir or "~/.cache/fedkd/data").expanduser()


@dataclass(frozen=True)
class _Raw:
    """The data as they are kept: ``pool`` holds the indices of the training set that are left for the peers."""

    source: Source
    pool: np.ndarray
    proxy: Proxy
    test: Dataset
    test_fingerprint: str


@lru_cache(maxsize=2)
def _raw(settings: _DataSettings) -> _Raw:
    data_dir = _data_dir(settings.data_dir)
    form = settings.image_size, settings.image_channels
    source = _source(settings.dataset, data_dir, settings.download, settings.versions, form)
    if len(source.classes) < 2:
        raise SettingError("dataset", settings.dataset, "data of at least two classes")
    proxy, pool = _proxy(settings, source, data_dir)
    test, pool = _test(settings, source, pool)
    return _Raw(source, pool, proxy, test, _fingerprint(test.inputs, test.labels))


def _augmented(config: RunConfig) -> tuple[bool, bool]:
    """Return whether private samples, and those of the proxy set, stay as they are kept, for training augments them."""
    return config.augment != "none", config.augment_proxy != "none"


@lru_cache(maxsize=64)
def _look(settings: _DataSettings, eyes: Eyes) -> Appearance:
    """Find out once how a model sees the data: statistics of a large proxy set take long."""
    return eyes.look(_raw(settings).proxy.inputs)


@lru_cache(maxsize=8)
def _commons(settings: _DataSettings, look: Appearance, body: Body | None, augmented: tuple[bool, bool]) -> Commons:
    raw = _raw(settings)
    see = _features_of(body, look, settings) if body else partial(_seen, look, settings.device)
    as_kept = partial(_seen, look, settings.device, settle=False)
    own, public = (as_kept if changing and not body else see for changing in augmented)
    return Commons(
        source=raw.source,
        pool=raw.pool,
        look=look,
        input_shape=tuple(look(raw.proxy.inputs[:1]).shape[1:]),
        proxy_shape=tuple(raw.proxy.inputs.shape),
        proxy_inputs=public(raw.proxy.inputs),
        fingerprint=raw.proxy.fingerprint,
        test_inputs=see(raw.test.inputs),
        test_labels=raw.test.labels.to(settings.device),
        test_fingerprint=raw.test_fingerprint,
        private=_private(raw.source.train.inputs, own, whole=body is not None),
        proxy_labels=None if raw.proxy.labels is None else raw.proxy.labels.to(settings.device),
    )


def _seen(look: Appearance, device: str, kept: Tensor, *, settle: bool = True) -> Inputs:
    samples = Samples(kept.to(device), look)
    return samples.settled() if settle else samples


def _private(kept: Tensor, see: Callable[[Tensor], Inputs], *, whole: bool) -> Callable[[np.ndarray], Inputs]:
    """Return what gives the inputs of a model for samples of the training set; ``whole``: all are seen once."""
    if whole:
        return lambda own: see(kept)[torch.from_numpy(own)]
    return lambda own: see(kept[torch.from_numpy(own)])


def _features_of(body: Body, look: Appearance, settings: _DataSettings) -> Callable[[Tensor], Inputs]:
    return lambda kept: body.features(kept, look, torch.device(settings.device))


@lru_cache(maxsize=2)
def _source(dataset: str, data_dir: Path, download: bool, versions: tuple[str, ...], form: tuple[int, int]) -> Source:
    """Read a data set once for trials that differ in their seeds, until its files change.

    Its images are brought to a form, size and channels; those of the proxy set follow them.
    """
    size, channels = form
    return shaped(load_source(dataset, data_dir=data_dir, download=download), size=size, channels=channels)


def _test(settings: _DataSettings, source: Source, pool: np.ndarray) -> tuple[Dataset, np.ndarray]:
    """Return what peers are measured on, and what is left for them to train on."""
    if not settings.validation:
        return source.test, pool
    named = [named_part(path, len(source.train)) for path in settings.named]
    measured = validation_part(settings.validation, pool, named, seed=settings.seed)
    return source.train.subset(measured), pool[~np.isin(pool, measured)]


def _proxy(settings: _DataSettings, source: Source, data_dir: Path) -> tuple[Proxy, np.ndarray]:
    if settings.proxy == "split":
        return split_proxy(source.train, settings.proxy_size, seed=derive(settings.seed, "proxy"))
    other = load_public(settings.proxy, data_dir=data_dir, download=settings.download)
    proxy = foreign_proxy(
        other,
        settings.proxy_size,
        like=source.train.inputs[0],
        seed=derive(settings.seed, "proxy"),
        classes=source.classes if settings.proxy == settings.dataset or (source.named and other.named) else None,
    )
    return proxy, np.arange(len(source.train))
