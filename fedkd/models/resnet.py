"""He et al.'s ResNets for small images, 6n + 2 layers, with option-A shortcuts (arXiv 1512.03385, section 4.2).

Parameters are named as in akamaster/pytorch_resnet_cifar10, whose CIFAR-10 checkpoints load as they are.
"""

from functools import partial

from torch import Tensor, nn

from fedkd.models.layers import NormReLU, PositionMean, subsampled
from fedkd.models.small import image_shape, widened


class BasicBlock(nn.Module):
    """Two 3×3 convolutions around a shortcut without parameters, [B, in, H, W] -> [B, out, H/stride, W/stride].

    Where the form changes, option A takes every second position and pads the new channels with zeros, half of
    them before and half after the old ones.
    """

    def __init__(self, inputs: int, outputs: int, *, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = NormReLU(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = NormReLU(outputs)
        self.stride = stride
        added = outputs - inputs
        self.padding = (added // 2, added - added // 2)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output after its last ReLU."""
        shortcut = x
        if self.stride != 1 or any(self.padding):
            shortcut = subsampled(x, self.stride, self.padding)
        out: Tensor = self.bn2(self.conv2(self.bn1(self.conv1(x))), shortcut)
        return out


class SmallImageResNet(nn.Module):
    """A 3×3 stem, three stages of n blocks with 16, 32 and 64 channels (times width), and a `linear` head."""

    def __init__(self, blocks: int, *, input_shape: tuple[int, ...], num_classes: int, width: float = 1.0) -> None:
        super().__init__()
        channels, _, _ = image_shape(input_shape)
        first, second, third = widened(16, width), widened(32, width), widened(64, width)
        self.conv1 = nn.Conv2d(channels, first, 3, padding=1, bias=False)
        self.bn1 = NormReLU(first)
        self.layer1 = _stage(blocks, first, first, stride=1)
        self.layer2 = _stage(blocks, first, second, stride=2)
        self.layer3 = _stage(blocks, second, third, stride=2)
        self.mean = PositionMean()
        self.linear = nn.Linear(third, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W] -> logits [B, num_classes]."""
        out = self.bn1(self.conv1(x))
        out = self.layer3(self.layer2(self.layer1(out)))
        logits: Tensor = self.linear(self.mean(out))
        return logits


def _stage(blocks: int, inputs: int, outputs: int, *, stride: int) -> nn.Sequential:
    rest = (BasicBlock(outputs, outputs, stride=1) for _ in range(blocks - 1))
    return nn.Sequential(BasicBlock(inputs, outputs, stride=stride), *rest)


resnet8 = partial(SmallImageResNet, 1)
resnet14 = partial(SmallImageResNet, 2)
resnet20 = partial(SmallImageResNet, 3)
resnet32 = partial(SmallImageResNet, 5)
resnet44 = partial(SmallImageResNet, 7)
resnet56 = partial(SmallImageResNet, 9)
