"""Learning from information flow: features of chosen layers travel beside the logits, projected to few dimensions."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedkd.data.samples import Inputs
from fedkd.errors import SettingError
from fedkd.losses.information_flow import FlowLoss, features, project
from fedkd.seeding import derive
from fedkd.settings.config import RunConfig
from fedkd.settings.rules import split_list
from fedkd.training.fast import forward
from fedkd.training.loops import Beside
from fedkd.training.partial import whole_of
from fedkd.wire.features import encode_features
from fedkd.wire.messages import Arrays

_POOL = "mean"
_CHUNK = 512


@dataclass(frozen=True)
class Flow:
    """The layers of one peer's model whose features it sends and learns at.

    Attributes:
        layers: their names, first to last.
        dimensions: to which features are projected.
        weight: of the flow loss beside the logits' loss.
        loss: over the layers, with its schedule over the rounds.
        seed: of the projections.
        fast: whether models compute as :func:`fedkd.training.fast.forward` has it.
    """

    layers: tuple[str, ...]
    dimensions: int
    weight: float
    loss: FlowLoss
    seed: int
    fast: bool = False

    @classmethod
    def from_config(cls, config: RunConfig, model: nn.Module) -> "Flow":
        """Choose the layers of a model as the settings say.

        Raises:
            SettingError: a layer that the model does not have.
        """
        model = whole_of(model)
        layers = split_list(config.flow_layers) or spread_layers(model, config.flow_depth)
        known = dict(model.named_modules())
        for layer in layers:
            if layer not in known:
                raise SettingError("flow-layers", layer, f"among the model's layers, such as {list(known)[1:9]}")
        loss = FlowLoss(initial=config.flow_initial, decay=config.flow_decay, variant=config.flow_variant)
        seed = derive(config.seed, "projection")
        return cls(layers, config.flow_dimensions, config.flow_weight, loss, seed, config.fast)

    def encode(self, model: nn.Module, inputs: Inputs) -> Arrays:
        """Return a model's projected features on the proxy samples ``[P, ...]``, ready to travel."""
        found = self.of(model, inputs)
        return encode_features([project(layer, self.dimensions, seed=self.seed).cpu().numpy() for layer in found])

    def of(self, model: nn.Module, inputs: Inputs) -> list[Tensor]:
        """Return a model's features on inputs ``[P, ...]``: one ``[P, D]`` per layer, in evaluation mode."""
        model.eval()
        chunks: list[list[Tensor]] = []
        with torch.no_grad(), features(whole_of(model), self.layers, pool=_POOL) as found:
            for start in range(0, len(inputs), _CHUNK):
                forward(model, inputs[start : start + _CHUNK], fast=self.fast)
                chunks.append([found[layer].float() for layer in self.layers])
        return [torch.cat(parts) for parts in zip(*chunks, strict=True)]

    @contextmanager
    def beside(
        self, model: nn.Module, teachers: Sequence[Sequence[Tensor]], weights: Sequence[float], *, round: int
    ) -> Iterator[Beside]:
        """Give the loss that pulls a model's features towards its teachers', within the block.

        Args:
            model: the student.
            teachers: of each teacher the features ``[P, d]`` of its layers, first to last; fewer layers than the
                student's belong to its last ones.
            weights: of each teacher, >= 0 and not all 0; one of weight 0 is not heard.
            round: counted from 1; the schedule's epoch 0.
        """
        with features(whole_of(model), self.layers, pool=_POOL) as found:

            def loss(batch: Tensor) -> Tensor:
                own = [found[layer].float() for layer in self.layers]
                terms = [
                    weight * self.loss(own[-len(layers) :], [layer[batch] for layer in layers], epoch=round - 1)
                    for layers, weight in zip(teachers, weights, strict=True)
                    if weight > 0
                ]
                return self.weight * torch.stack(terms).sum() / sum(weights)

            yield loss


def spread_layers(model: nn.Module, count: int) -> tuple[str, ...]:
    """Choose layers evenly over a model's depth: convolutions and linear layers, without the head [ours].

    >>> spread_layers(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)), 2)
    ('1', '2')
    """
    weighted: Mapping[str, nn.Module] = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)
    }
    names = list(weighted)[:-1] or list(weighted)
    return tuple(names[max(0, -(-(i + 1) * len(names) // count) - 1)] for i in range(count))
