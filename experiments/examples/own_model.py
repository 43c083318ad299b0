"""Your own model and its weights.

    export PYTHONPATH=experiments/examples
    python -m own_model own.safetensors                  # stands for the training that you have done already
    fedkd run --peers 2 models=own_model:network,mlp checkpoints=own.safetensors,- pooled-model=mlp

A model is a function that takes `input_shape` ([C, H, W] for images) and `num_classes`, and returns a `torch.nn.Module`
from inputs [B, *input_shape] to logits [B, num_classes]. Weights are a state dict, `.safetensors` or of `torch.save`.
Everybody's model may be another one. torchvision's, timm's and transformers' need no module: they come by name, as in
`models=resnet18@IMAGENET1K_V1,timm:resnet18@a1_in1k,hf:FOLDER`.
"""

import sys
from math import prod
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fedkd.data.normalize import standardizer
from fedkd.data.proxy import split_proxy
from fedkd.data.sources import load_source
from fedkd.seeding import derive
from fedkd.settings import RunConfig


class Residual(nn.Module):
    """A hidden layer around a shortcut, [B, D] -> [B, D]."""

    def __init__(self, units: int) -> None:
        super().__init__()
        self.layer = nn.Linear(units, units)

    def forward(self, x: Tensor) -> Tensor:
        """Return x + relu(layer(x))."""
        return x + torch.relu(self.layer(x))


def network(*, input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """Return a small residual network for inputs of any shape."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(prod(input_shape), 96), Residual(96), Residual(96), nn.Linear(96, num_classes)
    )


def main(path: Path, epochs: int = 5) -> None:
    """Train the network on what a run will leave to its peers, scaled as there, and save its weights."""
    config, source = RunConfig(), load_source("digits", data_dir=Path())
    # A run takes its public proxy set out of the training set first: a model that has seen it would know the answers.
    proxy, left = split_proxy(source.train, config.public_size, seed=derive(config.seed, "proxy"))
    train = source.train.subset(left)
    inputs, labels = standardizer(config.normalize, proxy.inputs)(train.inputs), train.labels
    torch.manual_seed(0)
    model = network(input_shape=tuple(inputs.shape[1:]), num_classes=len(source.classes))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(epochs):
        for batch in torch.randperm(len(labels)).split(32):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs[batch]), labels[batch]).backward()
            optimizer.step()
    save_file(model.state_dict(), path)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
