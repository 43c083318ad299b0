"""What liars say; boasters are sure of all, in any precision that knowledge travels in."""

import numpy as np
import pytest
import torch

from clients.attacks import poison
from fedkd.settings.config import RunConfig
from fedkd.wire.codecs import codec

HONEST = torch.randn(60, 10, generator=torch.Generator().manual_seed(0))


def said(attack, index, round=1, honest=HONEST, **settings):
    return poison(honest, RunConfig(attack=attack, **settings), index=index, round=round)


@pytest.mark.parametrize("attack", ["boast", "boast-all"])
@pytest.mark.parametrize("name", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 16.0])
def test_a_boaster_is_certain_after_its_logits_have_travelled(attack, name, temperature):
    coded = codec(name)
    travelled = coded.decode(coded.encode(said(attack, 4, temperature=temperature).numpy()), shape=(60, 10))

    probs = (torch.from_numpy(np.array(travelled)) / temperature).softmax(dim=1)
    assert torch.equal(probs.max(dim=1).values, torch.ones(60)) and probs.count_nonzero() == 60


def test_one_claims_its_own_class_everywhere():
    for index in (4, 9, 13):
        assert set(said("boast", index).argmax(1).tolist()) == {index % 10}


def test_one_claims_all_classes_evenly_and_each_in_its_own_way():
    prior = said("boast-all", 4).softmax(dim=1).mean(dim=0)
    torch.testing.assert_close(prior, torch.full((10,), 0.1))
    uneven = said("boast-all", 4, honest=HONEST[:57]).argmax(1).bincount(minlength=10)
    assert uneven.max() - uneven.min() == 1
    assert torch.equal(said("boast-all", 4), said("boast-all", 4))
    draws = [said("boast-all", index, round).argmax(1) for index, round in ((4, 1), (3, 1), (4, 2))]
    for one, other in ((0, 1), (0, 2)):
        assert (draws[one] == draws[other]).float().mean() < 0.5


def test_a_flipper_says_of_every_class_what_it_knows_of_the_one_before():
    told = said("flip", 4)
    assert all(torch.equal(told[:, (label + 1) % 10], HONEST[:, label]) for label in range(10))


@pytest.mark.parametrize("attack", ["constant", "collude"])
def test_one_class_a_sample_stands_three_deviations_above_the_mean_of_what_is_true(attack):
    told = said(attack, 4)
    raised = told.max(dim=1).values
    assert (told == told.min()).sum() == told.numel() - len(told)
    torch.testing.assert_close(told.min(), HONEST.mean())
    torch.testing.assert_close(raised, (HONEST.mean() + 3 * HONEST.std()).expand(60))
    assert (set(told.argmax(dim=1).tolist()) == {0}) == (attack == "constant")
