"""How one model sees the data: in what size, in how many channels and on what scale."""

from dataclasses import dataclass

from torch import Tensor

from clients.body import Body
from clients.configuration import PeerConfig
from fedkd.data.appearance import INTERPOLATIONS, Appearance, fits
from fedkd.data.normalize import standardizer
from fedkd.models import comes_trained, own_preprocessing
from fedkd.settings.config import RunConfig


@dataclass(frozen=True)
class Eyes:
    """What decides how one model sees the data: two of one kind see alike.

    Attributes:
        spec: the model's.
        checkpoint: whether it starts from one.
        input_size: a number of pixels; ``data``: as the data are; empty: as the model's own description says.
        normalize: the setting.
        body: what of the model does not train, where features of it take the images' place.
    """

    spec: str
    checkpoint: bool
    input_size: str
    normalize: str
    body: Body | None = None

    @classmethod
    def of(cls, config: RunConfig, peer_config: PeerConfig, body: Body | None = None) -> "Eyes":
        """Return those of the model that a peer trains."""
        size = peer_config.input_size_of(config)
        if config.strategy == "fedavg":
            return cls(config.fedavg_model, False, size, config.normalize, body)
        brought = peer_config.checkpoint_path(config) is not None
        return cls(peer_config.model_spec(config), brought, size, config.normalize, body)

    def look(self, proxy: Tensor) -> Appearance:
        """Return how the model sees the data, unless the settings say something else: as who trained it before says.

        A model that nobody trained takes the data as they are, whatever its architecture is known for.

        Args:
            proxy: the public proxy inputs as they are kept, ``[P, ...]``.

        Raises:
            SettingError: they cannot be seen so.
        """
        described = (self.checkpoint or comes_trained(self.spec)) and self.input_size != "data"
        own = own_preprocessing(self.spec) if described else None
        size = (int(self.input_size),) * 2 if self.input_size.isdigit() else own.size if own else None
        if own and self.normalize == "auto":
            mean, std = own.mean, own.std
        else:
            scale = standardizer("auto" if self.normalize in ("auto", "proxy") else self.normalize, proxy)
            mean, std = tuple(scale.mean.tolist()), tuple(scale.std.tolist())
        channels = own.channels if own and len(mean) == own.channels else None
        kind = own.interpolation if own else "bilinear"
        look = Appearance(mean, std, size, channels, kind if kind in INTERPOLATIONS else "bicubic")
        fits(tuple(proxy.shape[1:]), look, key="input-size" if size else "models", value=self.input_size or self.spec)
        return look
