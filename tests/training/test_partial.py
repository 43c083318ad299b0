"""Models of which a part trains."""

import copy

import pytest
import torch
from torch import nn

from fedkd import models
from fedkd.training.loops import Optimization, fit, predict
from fedkd.training.partial import OnFeatures, Partly, features, head_name

SHAPE, CLASSES = (3, 8, 8), 4
LABELS = torch.arange(24) % CLASSES


def inputs() -> torch.Tensor:
    return torch.randn(24, *SHAPE, generator=torch.Generator().manual_seed(0))


def built(spec: str = "resnet8") -> nn.Module:
    return models.build(spec, input_shape=SHAPE, num_classes=CLASSES, seed=1)


def fitted(model: nn.Module, seen: torch.Tensor) -> nn.Module:
    fit(model, seen, LABELS, epochs=2, how=Optimization(batch_size=8, learning_rate=0.01), seed=2)
    return model


@pytest.mark.parametrize("spec", ["resnet8", "cnn-small", "mlp", "mobilenet_v3_small"])
def test_a_head_on_features_is_the_whole_model_with_a_still_body(spec):
    """The independent route: the whole model, run on images, of which an optimiser moves the head alone."""
    whole = built(spec)
    on_features = OnFeatures(copy.deepcopy(whole))
    found = features(whole, head_name(whole, inputs()[:2]), inputs())
    trained = fitted(on_features, found).state_dict()

    head = whole.get_submodule(head_name(whole, inputs()[:2]))
    before = {name: value.clone() for name, value in whole.state_dict().items()}
    optimizer = torch.optim.Adam(head.parameters(), lr=0.01)
    order = torch.Generator().manual_seed(2)
    whole.eval()
    for _ in range(2):
        for batch in torch.randperm(24, generator=order).split(8):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(whole(inputs()[batch]), LABELS[batch]).backward()
            optimizer.step()
    moved = {name for name, value in whole.state_dict().items() if not torch.equal(value, before[name])}
    assert {name for name, value in trained.items() if not torch.equal(value, before[name])} == moved
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(trained[name], value, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(predict(on_features, found), predict(whole, inputs()), rtol=1e-3, atol=1e-4)


def test_features_do_not_depend_on_how_many_are_computed_at_once_beyond_rounding():
    whole = built()
    head = head_name(whole, inputs()[:2])
    torch.testing.assert_close(features(whole, head, inputs(), at_once=5), features(whole, head, inputs()))
    assert features(whole, head, inputs()[:0]).shape == (0, 64)


@pytest.mark.parametrize("layers", [1, 3])
def test_the_last_layers_train_and_nothing_else_changes_statistics_neither(layers):
    whole = built()
    before = {name: value.clone() for name, value in whole.state_dict().items()}
    after = fitted(Partly(whole, layers), inputs()).state_dict()
    changed = {name.rpartition(".")[0] for name, value in after.items() if not torch.equal(value, before[name])}
    named = [name for name, module in whole.named_modules() if list(module.parameters(recurse=False))]
    assert changed == set(named[-layers:])


def test_what_trains_is_what_is_counted():
    whole = built()
    head = whole.get_submodule(head_name(whole, inputs()[:2]))
    of_head = sum(parameter.numel() for parameter in head.parameters())
    assert models.parameters_count(OnFeatures(whole)) == models.parameters_count(Partly(whole, 1)) == of_head


def test_the_state_is_the_whole_models():
    whole, other = built(), models.build("resnet8", input_shape=SHAPE, num_classes=CLASSES, seed=9)
    for part in (OnFeatures(copy.deepcopy(other)), Partly(copy.deepcopy(other), 2)):
        assert part.state_dict().keys() == whole.state_dict().keys()
        part.load_state_dict(whole.state_dict())
        assert all(torch.equal(value, whole.state_dict()[name]) for name, value in part.state_dict().items())


class Temperature(nn.Module):
    """Divides what its last linear layer says."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Flatten(), nn.Linear(192, CLASSES)

    def forward(self, x):
        return self.head(self.body(x)) / 2


class Sequence(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x):
        return self.head(x.flatten(1, 2)).mean(dim=1)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (Temperature(), "its logits are not what its last linear layer, head, says"),
        (Sequence(), "its last linear layer, head, is not given one vector a sample"),
        (nn.Sequential(nn.Conv2d(3, CLASSES, 8), nn.Flatten()), "it has no linear layer"),
    ],
)
def test_a_model_without_such_a_head_is_refused(model, said):
    with pytest.raises(ValueError, match=said):
        head_name(model, inputs()[:2])


def test_more_layers_than_there_are_cannot_train_alone():
    with pytest.raises(ValueError, match="of its 2 layers at most 1 can train alone"):
        Partly(nn.Sequential(nn.Flatten(), nn.Linear(192, 5), nn.Linear(5, CLASSES)), 2)


def test_no_layers_cannot_train():
    with pytest.raises(ValueError, match="0 of its layers cannot train"):
        Partly(built(), 0)


def test_dropout_before_what_trains_is_off_and_after_it_is_on():
    def chain() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Flatten(),
            nn.Linear(192, 64),
            nn.Dropout(0.5),
            nn.Linear(64, 64),
            nn.Dropout(0.5),
            nn.Linear(64, CLASSES),
        )

    last, two = Partly(chain(), 1).train(), Partly(chain(), 2).train()
    assert torch.equal(last(inputs()), last(inputs()))
    assert not torch.equal(two(inputs()), two(inputs()))
