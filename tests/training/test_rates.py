"""Learning rates and clipped gradients, against torch's own schedulers and loops."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, MultiStepLR, SequentialLR

from fedkd.training.loops import Optimization, fit
from fedkd.training.rates import Rates

STEPS = 48


def torchs(schedule: str, warm: int, steps: int, optimizer: torch.optim.Optimizer) -> LRScheduler:
    rest = steps - warm
    after: LRScheduler
    if schedule == "cosine":
        after = CosineAnnealingLR(optimizer, T_max=rest)
    elif schedule == "step":
        after = MultiStepLR(optimizer, [-(-rest // 2), -(-3 * rest // 4)], gamma=0.1)
    else:
        after = LinearLR(optimizer, start_factor=1.0)
    if warm == 0:
        return after
    growing = LinearLR(optimizer, start_factor=1 / warm, total_iters=max(warm - 1, 1))
    return SequentialLR(optimizer, [growing, after], milestones=[warm])


@pytest.mark.parametrize("warm", [0, 1, 4, 12, 40])
@pytest.mark.parametrize("schedule", ["constant", "cosine", "step"])
def test_the_closed_form_is_torchs_schedulers(schedule: str, warm: int) -> None:
    optimizer = SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler, expected = torchs(schedule, warm, STEPS, optimizer), []
    for _ in range(STEPS):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()

    rates = Rates(schedule, warm / STEPS)
    assert [rates.factor(step, STEPS) for step in range(STEPS)] == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("warm_up", [0.0, 0.1, 0.25, 0.6])
@pytest.mark.parametrize("schedule", ["constant", "cosine", "step"])
def test_the_parts_of_a_run_have_the_rates_of_the_whole(schedule: str, warm_up: float) -> None:
    rates = Rates(schedule, warm_up)
    parts = [rates.within(part / 6, (part + 1) / 6).factor(step, STEPS // 6) for part in range(6) for step in range(8)]
    assert parts == pytest.approx([rates.factor(step, STEPS) for step in range(STEPS)], abs=1e-7)


def test_a_constant_rate_is_the_rate_itself() -> None:
    assert {Rates().factor(step, steps) for steps in (1, 3, 7) for step in range(steps)} == {1.0}


@pytest.mark.parametrize("clip", [0.0, 0.05, 1e9])
@pytest.mark.parametrize(("schedule", "warm"), [("cosine", 5), ("step", 0), ("constant", 10)])
def test_training_is_a_plain_loop_with_a_scheduler_and_a_limit_on_the_norm(
    schedule: str, warm: int, clip: float
) -> None:
    stream = torch.Generator().manual_seed(0)
    inputs, labels = torch.randn(40, 6, generator=stream), torch.randint(3, (40,), generator=stream)
    torch.manual_seed(0)
    ours, plain = nn.Linear(6, 3), nn.Linear(6, 3)
    plain.load_state_dict(ours.state_dict())
    how = Optimization("sgd", 0.5, 0.9, batch_size=8, gradient_clip=clip, rates=Rates(schedule, warm / 20))
    fit(ours, inputs, labels, epochs=4, how=how, seed=7)

    optimizer, norms = SGD(plain.parameters(), lr=0.5, momentum=0.9), []
    scheduler, order = torchs(schedule, warm, 20, optimizer), torch.Generator().manual_seed(7)
    for _ in range(4):
        for batch in torch.randperm(40, generator=order).split(8):
            optimizer.zero_grad()
            F.cross_entropy(plain(inputs[batch]), labels[batch]).backward()
            gradients = [p.grad for p in plain.parameters() if p.grad is not None]
            norms.append(float(torch.cat([g.flatten() for g in gradients]).norm()))
            for gradient in gradients if 0 < clip < norms[-1] else ():
                gradient *= clip / norms[-1]
            optimizer.step()
            scheduler.step()

    assert min(norms) > 0.05  # so that a limit of that is one
    for one, other in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
