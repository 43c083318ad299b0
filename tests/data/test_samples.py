"""Samples seen through a view: a batch is what the same rows of all that is seen would be."""

import pytest
import torch

from fedkd.data.normalize import standardizer
from fedkd.data.samples import Inputs, Samples, subset
from fedkd.losses.teachers import objective
from fedkd.training.distillation import Distillation
from fedkd.training.loops import Optimization, distil, fit, fit_and_distil, predict

LABELS = torch.arange(40) % 3


def kept(seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (40, 3, 4, 4), generator=generator, dtype=torch.uint8)


def both() -> tuple[torch.Tensor, Samples]:
    scale = standardizer("auto", kept())
    return scale(kept()), Samples(kept(), scale)


def model() -> torch.nn.Module:
    torch.manual_seed(1)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))


def test_a_batch_is_rows_of_all_that_is_seen() -> None:
    seen, samples = both()
    index = torch.tensor([7, 0, 7, 39])
    assert torch.equal(samples[index], seen[index])
    assert torch.equal(samples[5:9], seen[5:9])
    assert torch.equal(samples[[0, -1]], seen[[0, -1]])
    assert torch.equal(subset(samples, index)[1:], seen[index][1:])
    assert (len(samples), samples.shape, samples.device) == (40, seen.shape, seen.device)


def test_a_small_set_is_made_at_once_and_a_large_one_is_not() -> None:
    seen, samples = both()
    settled = samples.settled()
    assert isinstance(settled, torch.Tensor)
    assert torch.equal(settled, seen)
    asked: list[int] = []

    def enlarged(rows: torch.Tensor) -> torch.Tensor:
        asked.append(len(rows))
        return rows.float().repeat(1, 1, 256, 256)

    assert isinstance(Samples(kept(), enlarged).settled(), Samples)  # 480 MiB
    assert sum(asked) <= 1  # and to find that out no more than one sample was made


def test_no_samples_have_a_shape_and_logits() -> None:
    samples = Samples(kept()[:0], standardizer("auto", kept()))
    assert samples.shape == (0, 3, 4, 4)
    assert predict(model(), samples).shape == (0, 3)
    assert predict(model(), both()[0][:0]).shape == (0, 3)


def test_a_transform_comes_before_the_view() -> None:
    seen, samples = both()
    flipped = samples.through(lambda rows: rows.flip(-1))
    assert torch.equal(flipped[:], seen.flip(-1))
    assert torch.equal(samples[:], seen)


@pytest.mark.parametrize("phase", ["fit", "distil", "both"])
def test_training_on_samples_is_training_on_what_is_seen(phase: str) -> None:
    distillation = Distillation(objective("kl"), 0.5, label_weight=0.5)
    teachers = distillation.prepare(torch.randn(2, 40, 3, generator=torch.Generator().manual_seed(2)), torch.ones(2))

    def trained(inputs: Inputs) -> torch.Tensor:
        student, how = model(), Optimization(batch_size=7)
        if phase == "fit":
            fit(student, inputs, LABELS, epochs=2, how=how, seed=3)
        elif phase == "distil":
            distil(student, inputs, teachers, distillation, epochs=2, how=how, seed=3)
        else:
            fit_and_distil(student, (inputs, LABELS), inputs, teachers, distillation, epochs=2, how=how, seed=3)
        return predict(student, inputs)

    seen, samples = both()
    assert torch.equal(trained(samples), trained(seen))
