"""Running statistics of batch normalisation between private and proxy images."""

import copy

import pytest
import torch
from torch import nn

from fedkd import models
from fedkd.losses.teachers import objective
from fedkd.training.distillation import Distillation
from fedkd.training.loops import Optimization, distil, fit, fit_and_distil
from fedkd.training.statistics import StillStatistics

CLASSES = 3
OWN, PUBLIC = torch.zeros(24, 1, 8, 8), torch.full((24, 1, 8, 8), 5.0)  # as dark and as bright as can be
LABELS = torch.arange(24) % CLASSES
DISTILLATION = Distillation(objective("kl"), 0.5, label_weight=0.5)
TEACHERS = DISTILLATION.prepare(torch.zeros(1, 24, CLASSES), torch.ones(1))


def built() -> nn.Module:
    return models.build("resnet8", input_shape=(1, 8, 8), num_classes=CLASSES, seed=0)


def statistics(model: nn.Module) -> list[torch.Tensor]:
    return [value.clone() for name, value in model.named_buffers() if "running" in name]


def both(own_statistics: bool) -> nn.Module:
    model, how = built(), Optimization(batch_size=8, own_statistics=own_statistics)
    fit_and_distil(model, (OWN, LABELS), PUBLIC, TEACHERS, DISTILLATION, epochs=2, how=how, seed=1)
    return model


def test_proxy_batches_move_the_running_statistics_unless_they_are_private():
    """Under statistics of one's own the first layer's mean is that of what private images make of it: nothing."""
    mixed, own = (next(iter(statistics(both(choice)))) for choice in (False, True))
    assert mixed.abs().max() > 0.1
    assert own.abs().max() == 0


def test_distilling_alone_leaves_statistics_of_ones_own_as_they_were():
    model, how = built(), Optimization(batch_size=8, own_statistics=True)
    before = statistics(model)
    distil(model, PUBLIC, TEACHERS, DISTILLATION, epochs=1, how=how, seed=1)
    assert all(torch.equal(*pair) for pair in zip(before, statistics(model), strict=True))
    fit(model, OWN + 1, LABELS, epochs=1, how=how, seed=1)
    assert not all(torch.equal(*pair) for pair in zip(before, statistics(model), strict=True))


def test_in_the_block_a_batch_is_normalised_as_ever():
    model = built().train()
    other = copy.deepcopy(model)
    with StillStatistics(model):
        inside = model(PUBLIC + torch.arange(24.0).view(-1, 1, 1, 1))
    assert torch.equal(inside, other(PUBLIC + torch.arange(24.0).view(-1, 1, 1, 1)))


@pytest.mark.parametrize("momentum", [0.1, None])
def test_after_the_block_and_after_an_error_in_it_layers_are_as_before(momentum):
    layer = nn.BatchNorm2d(2, momentum=momentum)
    with pytest.raises(ZeroDivisionError), StillStatistics(layer):
        assert 1 / 0
    assert layer.momentum == momentum
