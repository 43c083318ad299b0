"""Eight small architectures of four families, cheap enough for a study on a CPU: ``experiments.studies.fleet:NAME``.

The larger four see their images at half resolution, which quarters their cost.
"""

from collections.abc import Callable
from functools import partial

from torch import nn

from fedkd.models import resnet, small


def _halved(
    factory: Callable[..., nn.Module],
    *,
    input_shape: tuple[int, ...],
    num_classes: int,
    width: float = 1.0,
    relative: float = 1.0,
) -> nn.Module:
    channels, height, image_width = small.image_shape(input_shape)
    shape = (channels, height // 2, image_width // 2)
    inner = factory(input_shape=shape, num_classes=num_classes, width=relative * width)
    return nn.Sequential(nn.AvgPool2d(2), inner)


def _relative(
    factory: Callable[..., nn.Module],
    relative: float,
    *,
    input_shape: tuple[int, ...],
    num_classes: int,
    width: float = 1.0,
) -> nn.Module:
    return factory(input_shape=input_shape, num_classes=num_classes, width=relative * width)


mlp = small.mlp
mlp_wide = partial(_relative, small.mlp, 2.0)
lenet = small.cnn_small
lenet_narrow = partial(_relative, small.cnn_small, 0.5)
vgg = partial(_halved, small.cnn_wide, relative=0.5)
vgg_wide = partial(_halved, small.cnn_wide, relative=0.75)
resnet8 = partial(_halved, resnet.resnet8)
resnet8_narrow = partial(_halved, resnet.resnet8, relative=0.5)
