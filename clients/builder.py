"""The models that a peer builds: its own, as it comes or bare, and those of baselines and controls."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import nn

from clients.body import Body
from clients.configuration import PeerConfig
from fedkd import models
from fedkd.errors import SettingError
from fedkd.seeding import derive
from fedkd.settings.config import RunConfig
from fedkd.settings.rules import trained_layers
from fedkd.training.fast import arranged, compiled
from fedkd.training.partial import OnFeatures, Partly


@dataclass(frozen=True)
class Builder:
    """Builds models on a peer's device, each with an initialisation that derives from the seed and what it is for.

    Attributes:
        config: the run's settings as they hold at the peer.
        peer_config: the peer's own.
        shape: of one input.
        classes: how many a model tells apart.
        device: where it computes.
        key: the setting that names the peer's own model.
    """

    config: RunConfig
    peer_config: PeerConfig
    shape: tuple[int, ...]
    classes: int
    device: torch.device
    key: str = "models"

    def body(self) -> Body | None:
        """Return what of this peer's own model does not train, where its head alone does.

        Raises:
            SettingError: the model has no head.
        """
        if self.trains != "head":
            return None
        make = replace(self, peer_config=replace(self.peer_config, train="all")).own
        probe = torch.randn(2, *self.shape, generator=torch.Generator().manual_seed(0)).to(self.device)
        with self._says(self._spec):
            return Body.of(make, probe, self.peer_config.features_dir)

    def bare(self) -> nn.Module:
        """Return this peer's architecture with its own initialisation."""
        return self._in_part(self._new(self._spec, key=self.key, seed_key=self.peer_config.index))

    def own(self) -> nn.Module:
        """Return this peer's model as it comes: its checkpoint, or its own initialisation.

        Raises:
            SettingError: the checkpoint does not fit.
        """
        model = self.bare()
        checkpoint = self.peer_config.checkpoint_path(self.config)
        if checkpoint is not None:
            new_head = self.classes if self.config.replace_head else None
            models.load_checkpoint(model, checkpoint, key="checkpoints", new_head=new_head)
        return model

    def widened(self) -> nn.Module:
        """Return this peer's architecture at double width, to be its auxiliary teacher."""
        return self._new(self._spec, key=self.key, seed_key="auxiliary", width=2.0)

    def common(self) -> nn.Module:
        """Return the one architecture that is averaged, with the initialisation that all peers derive alike."""
        return self._new(self.config.fedavg_model, key="fedavg-model", seed_key="common")

    @property
    def trains(self) -> str:
        """What of the peer's own model trains: ``all``, ``head`` or ``last:N``."""
        return self.peer_config.trains(self.config)

    @property
    def _spec(self) -> str:
        return self.peer_config.model_spec(self.config)

    def _in_part(self, model: nn.Module) -> nn.Module:
        if self.trains == "all":
            return model
        ours = models.is_ours(self._spec) or self._spec.startswith("timm:")
        with self._says(self._spec):
            if ours and not models.comes_trained(self._spec) and not self.peer_config.checkpoint_path(self.config):
                raise ValueError("nobody trained it, and what does not train stays as chance made it")
            return OnFeatures(model) if self.trains == "head" else Partly(model, trained_layers(self.trains))

    @contextmanager
    def _says(self, spec: str) -> Iterator[None]:
        try:
            yield
        except ValueError as error:
            raise SettingError("train", self.trains, f"all for the model {spec}: {error}") from error

    def _new(self, spec: str, *, key: str, seed_key: int | str, width: float = 1.0) -> nn.Module:
        seed = derive(self.config.seed, "init", seed_key)
        model = models.build(spec, input_shape=self.shape, num_classes=self.classes, seed=seed, width=width, key=key)
        model = model.to(self.device)
        # On a CPU this order is the faster one in float32 too. One's own model may count on the other (`view`).
        if self.config.fast or (self.device.type == "cpu" and models.is_ours(spec)):
            model = arranged(model)
        return compiled(model) if self.config.compiled else model


@lru_cache(maxsize=256)
def body_of(builder: Builder, run: str) -> Body | None:
    """Return what of a peer's own model does not train: the same for as long as a run lasts, so it is looked at once.

    Args:
        builder: the peer's.
        run: the run's token.

    Raises:
        SettingError: the model has no head.
    """
    return builder.body()
