"""How one model sees the data: in what size, in how many channels and on what scale."""

from dataclasses import dataclass

import torch
from torch import Tensor

from clients.configuration import PeerConfig
from fedkd.data.appearance import INTERPOLATIONS, Appearance, fits
from fedkd.data.normalize import standardizer
from fedkd.errors import SettingError
from fedkd.models import comes_trained, own_preprocessing
from fedkd.settings.config import RunConfig


@dataclass(frozen=True)
class Eyes:
    """What decides how one model sees the data.

    Attributes:
        spec: the model's.
        checkpoint: whether it starts from one.
        input_size: a number of pixels; ``data``: as the data are; empty: as the model's own description says.
        normalize: the setting.
    """

    spec: str
    checkpoint: bool
    input_size: str
    normalize: str

    @classmethod
    def of(cls, config: RunConfig, peer_config: PeerConfig, *, pooled: bool = False) -> "Eyes":
        """Return those of the model that a peer trains.

        Args:
            config: the run's settings.
            peer_config: the peer.
            pooled: it is the model of the pooled control.
        """
        size = peer_config.input_size_of(config)
        if config.strategy == "fedavg" and not pooled:
            return cls(config.fedavg_model, False, size, config.normalize)
        brought = peer_config.checkpoint_path(config) is not None
        return cls(peer_config.model_spec(config), brought, size, config.normalize)

    def look(self, proxy: Tensor) -> Appearance:
        """Return how the model sees the data, unless the settings say something else: as who trained it before says.

        A model that nobody trained takes the data as they are, whatever its architecture is known for.

        Args:
            proxy: the public proxy inputs as they are kept, ``[P, ...]``.

        Raises:
            SettingError: they cannot be seen so.
        """
        own = own_preprocessing(self.spec) if self.checkpoint or comes_trained(self.spec) else None
        if own and self.normalize == "auto":
            self._check_pixels(proxy)
            mean, std = own.mean, own.std
        else:
            scale = standardizer("auto" if self.normalize in ("auto", "proxy") else self.normalize, proxy)
            mean, std = tuple(scale.mean.tolist()), tuple(scale.std.tolist())
        size = (int(self.input_size),) * 2 if self.input_size.isdigit() else own.size if own else None
        look = Appearance(
            mean,
            std,
            None if self.input_size == "data" else size,
            own.channels if own and len(mean) == own.channels else None,
            _interpolation(own.interpolation) if own else "bilinear",
        )
        said = ("input-size", self.input_size) if self.input_size.isdigit() else ("models", self.spec)
        fits(tuple(proxy.shape[1:]), look, key=said[0], value=said[1])
        return look

    def _check_pixels(self, proxy: Tensor) -> None:
        """Refuse a model's own scale, which is of pixels from 0 to 1, for numbers that are something else."""
        if proxy.dtype == torch.uint8 or not proxy.numel():
            return
        low, high = float(proxy.min()), float(proxy.max())
        if low < 0 or high > 1:
            raise SettingError(
                "normalize",
                self.normalize,
                f"proxy or none for the model {self.spec}: its own scale is of 8-bit pixels or of numbers from 0 to 1, "
                f"and the proxy set's go from {low:g} to {high:g}",
            )


def _interpolation(name: str) -> str:
    """Return the way of resizing that comes nearest to a name of Pillow's: `lanczos` and others are bicubic here."""
    return name if name in INTERPOLATIONS else "bicubic"
