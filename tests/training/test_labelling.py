"""A labels' loss of one's own stands wherever a model is trained on private labels, and nowhere else."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedkd.settings.config import RunConfig
from fedkd.training.distillation import Distillation
from fedkd.training.loops import Optimization, fit, fit_alone, fit_and_distil

HOW = Optimization(name="sgd", momentum=0.0, learning_rate=0.1, batch_size=8)
GENERATOR = torch.Generator().manual_seed(0)
INPUTS, LABELS = torch.randn(20, 4, generator=GENERATOR), torch.randint(3, (20,), generator=GENERATOR)
PROXY = torch.randn(16, 4, generator=GENERATOR)


def train(way, labelling, *, weight=0.5):
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    how = {"epochs": 2, "how": HOW, "seed": 3, "labelling": labelling}
    if way == "fit":
        fit(model, INPUTS, LABELS, **how)
    elif way == "fit_alone":
        fit_alone(model, (INPUTS, LABELS), proxy_count=16, **how)
    else:
        distillation = Distillation.from_config(RunConfig(kd_weight=weight))
        teachers = distillation.prepare(torch.zeros(1, 16, 3), torch.ones(1))
        fit_and_distil(model, (INPUTS, LABELS), PROXY, teachers, distillation, **how)
    return model.state_dict()


@pytest.mark.parametrize("way", ["fit", "fit_alone", "fit_and_distil"])
def test_one_that_is_cross_entropy_gives_the_same_model_bit_by_bit(way):
    plain = train(way, None)
    same = train(way, lambda logits, batch: F.cross_entropy(logits, LABELS[batch]))
    other = train(way, lambda logits, batch: F.cross_entropy(2 * logits, LABELS[batch]))

    assert all(torch.equal(plain[name], same[name]) for name in plain)
    assert not torch.equal(plain["weight"], other["weight"])


def test_it_gets_the_logits_and_the_indices_of_the_same_samples():
    seen = []

    def labelling(logits, batch):
        seen.append((logits.detach().clone(), batch))
        return 0 * logits.sum()

    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    fit(model, INPUTS, LABELS, epochs=1, how=HOW, seed=0, labelling=labelling)  # no step moves it

    assert torch.cat([batch for _, batch in seen]).sort().values.tolist() == list(range(20))
    for logits, batch in seen:
        torch.testing.assert_close(logits, model(INPUTS[batch]).detach())
