"""Small models of three families for small inputs; `width` multiplies their hidden units or channels."""

from math import prod

from torch import Tensor, nn


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
    return nn.Sequential(
        nn.Conv2d(channels, first, 3, padding=1),
        *_pooled(),
        nn.Conv2d(first, second, 3, padding=1),
        *_pooled(),
        nn.Flatten(),
        nn.Linear(second * positions, hidden),
        nn.ReLU(),
        nn.Linear(hidden, num_classes),
    )


def cnn_wide(*, input_shape: tuple[int, ...], num_classes: int, width: float = 1.0) -> nn.Module:
    """Three wide convolutions with batch normalisation, averaged over positions: the VGG family."""
    channels, _, _ = image_shape(input_shape)
    first, second, third = widened(32, width), widened(64, width), widened(128, width)
    return nn.Sequential(
        *_normalised_convolution(channels, first),
        *_pooled(),
        *_normalised_convolution(first, second),
        *_pooled(),
        *_normalised_convolution(second, third),
        nn.ReLU(),
        PositionMean(),
        nn.Linear(third, num_classes),
    )


class PositionMean(nn.Module):
    """The mean over image positions, [B, C, H, W] -> [B, C]."""

    def forward(self, maps: Tensor) -> Tensor:
        """Average."""
        return maps.mean(dim=(2, 3))


def _normalised_convolution(inputs: int, outputs: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs)


def _pooled() -> tuple[nn.Module, ...]:
    # ReLU after the maximum is ReLU before it, values and gradients alike, of a quarter of the numbers.
    return nn.MaxPool2d(2, ceil_mode=True), nn.ReLU()
