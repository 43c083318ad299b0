"""Small models of three families for small inputs; `width` multiplies their hidden units or channels."""

from collections import OrderedDict
from math import prod

from torch import nn

from fedkd.models.layers import NormPoolReLU, NormReLU, PoolReLU, PositionMean


def image_shape(input_shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Return [C, H, W], or refuse inputs that are not images.

    Raises:
        ValueError: the shape is not [C, H, W].
    """
    if len(input_shape) != 3:
        raise ValueError(f"it takes images [C, H, W], not {list(input_shape)}")
    channels, height, width = input_shape
    return channels, height, width


def widened(channels: int, width: float) -> int:
    """Return a number of channels times `width`, rounded, at least one."""
    return max(1, round(channels * width))


def mlp(*, input_shape: tuple[int, ...], num_classes: int, width: float = 1.0) -> nn.Module:
    """Two hidden layers of 128 units on the flattened input, whatever its shape."""
    hidden = widened(128, width)
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(prod(input_shape), hidden),
        nn.ReLU(),
        nn.Linear(hidden, hidden),
        nn.ReLU(),
        nn.Linear(hidden, num_classes),
    )


def cnn_small(*, input_shape: tuple[int, ...], num_classes: int, width: float = 1.0) -> nn.Module:
    """Two convolutions with pooling and a hidden layer, without normalisation: the LeNet family."""
    channels, height, image_width = image_shape(input_shape)
    first, second, hidden = widened(16, width), widened(32, width), widened(64, width)
    # Two poolings, each rounding up, so that an image of any size passes.
    positions = -(-height // 4) * -(-image_width // 4)
    return _chain(
        {
            0: nn.Conv2d(channels, first, 3, padding=1),
            1: PoolReLU(),
            3: nn.Conv2d(first, second, 3, padding=1),
            4: PoolReLU(),
            6: nn.Flatten(),
            7: nn.Linear(second * positions, hidden),
            8: nn.ReLU(),
            9: nn.Linear(hidden, num_classes),
        }
    )


def cnn_wide(*, input_shape: tuple[int, ...], num_classes: int, width: float = 1.0) -> nn.Module:
    """Three wide convolutions with batch normalisation, averaged over positions: the VGG family."""
    channels, _, _ = image_shape(input_shape)
    first, second, third = widened(32, width), widened(64, width), widened(128, width)
    return _chain(
        {
            0: nn.Conv2d(channels, first, 3, padding=1, bias=False),
            1: NormPoolReLU(first),
            4: nn.Conv2d(first, second, 3, padding=1, bias=False),
            5: NormPoolReLU(second),
            8: nn.Conv2d(second, third, 3, padding=1, bias=False),
            9: NormReLU(third),
            11: PositionMean(),
            12: nn.Linear(third, num_classes),
        }
    )


def _chain(layers: dict[int, nn.Module]) -> nn.Sequential:
    """Chain layers under the numbers that checkpoints know their parameters by, from when each operator was a layer."""
    return nn.Sequential(OrderedDict((str(number), layer) for number, layer in layers.items()))
