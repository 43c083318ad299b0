"""The fast path and what training costs beside arithmetic: the same learning, by whichever way it is computed."""

import copy
import platform
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from federation import federate
from torch import nn

from clients.state import Store
from fedkd import models
from fedkd.errors import SettingError
from fedkd.settings.config import RunConfig
from fedkd.training import fast
from fedkd.training.fast import arranged, bfloat16_pays, compiled, forward
from fedkd.training.loops import Optimization, fit, predict
from fedkd.training.optimizers import Descent


def image_model(name: str = "resnet8") -> nn.Module:
    return models.build(name, input_shape=(1, 12, 12), num_classes=5, seed=0)


def labelled(count: int = 96) -> tuple[torch.Tensor, torch.Tensor]:
    stream = torch.Generator().manual_seed(1)
    return torch.randn(count, 1, 12, 12, generator=stream), torch.randint(5, (count,), generator=stream)


class TwoHeads(nn.Module):
    """A head that only some steps use: its parameters have no gradient in the others."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.rare = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor, rarely: bool) -> torch.Tensor:
        return (self.rare if rarely else self.head)(self.body(x).relu())


def descended(optimizer: str, decay: float, *, ours: bool, fused: bool = False) -> torch.Tensor:
    torch.manual_seed(0)
    model, x = TwoHeads(), torch.randn(20, 6)
    how: Descent | torch.optim.Optimizer
    if ours:
        how = Descent(optimizer, model.parameters(), learning_rate=0.05, momentum=0.9, weight_decay=decay, fused=fused)
    elif optimizer == "sgd":
        how = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=decay)
    else:
        kind = torch.optim.AdamW if optimizer == "adamw" else torch.optim.Adam
        how = kind(model.parameters(), lr=0.05, weight_decay=decay)
    for step in range(7):
        how.zero_grad()
        model(x, step in (2, 5)).square().mean().backward()
        how.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
def test_a_descent_is_bit_by_bit_that_of_torchs_class(optimizer: str, decay: float) -> None:
    assert torch.equal(descended(optimizer, decay, ours=True), descended(optimizer, decay, ours=False))


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
def test_fused_steps_are_the_same_but_for_rounding(optimizer: str) -> None:
    torch.testing.assert_close(
        descended(optimizer, 0.1, ours=True, fused=True), descended(optimizer, 0.1, ours=False), rtol=1e-4, atol=1e-5
    )


def test_training_does_not_import_the_compiler() -> None:
    script = (
        "import sys, torch\n"
        "from fedkd.training.loops import Optimization, fit, predict\n"
        "model, x = torch.nn.Linear(4, 3), torch.randn(8, 4)\n"
        "for name in ('adam', 'adamw', 'sgd'):\n"
        "    fit(model, x, torch.zeros(8, dtype=torch.int64), epochs=1, how=Optimization(name=name), seed=0)\n"
        "predict(model, x)\n"
        "sys.exit('torch._dynamo' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_channels_last_changes_the_order_in_memory_and_no_result() -> None:
    x, _ = labelled(8)
    plain, model = image_model().eval(), arranged(image_model()).eval()
    weight = model.get_submodule("layer2.0.conv2").weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pays", [True, False])
def test_bfloat16_is_used_only_where_it_pays_and_logits_are_float32(
    pays: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.dtype] = []
    model, (x, _) = image_model("cnn-small"), labelled(4)
    model[3].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    monkeypatch.setattr(fast, "bfloat16_pays", lambda device: pays)
    assert forward(model, x, fast=True).dtype == torch.float32
    assert forward(model, x).dtype == torch.float32
    assert seen == [torch.bfloat16 if pays else torch.float32, torch.float32]


def test_bfloat16_never_pays_on_a_device_that_nobody_measured() -> None:
    assert not bfloat16_pays("meta")


def test_a_fast_model_trains_saves_and_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast, "bfloat16_pays", lambda device: True)
    (x, y), model = labelled(), arranged(image_model())
    how = Optimization(learning_rate=0.01, fast=True)
    losses = [fit(model, x, y, epochs=3, how=how, seed=seed) for seed in range(3)]
    assert losses[-1] < losses[0]
    store = Store(tmp_path, "run")
    store.begin()
    store.save(1, model)
    back = arranged(image_model())
    store.load(1, back)
    assert torch.equal(predict(back, x, fast=True), predict(model, x, fast=True))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles with g++")
def test_a_compiled_model_learns_the_same_and_can_be_copied() -> None:
    (x, y), plain, model = labelled(40), image_model("mlp"), compiled(image_model("mlp"))
    losses = [fit(m, x, y, epochs=2, how=Optimization(batch_size=20), seed=0) for m in (plain, model)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    torch.testing.assert_close(predict(copy.deepcopy(model), x), predict(plain, x), rtol=1e-3, atol=1e-3)
    assert model.state_dict().keys() == plain.state_dict().keys()


def test_features_cannot_be_read_from_compiled_models() -> None:
    with pytest.raises(SettingError, match=r"compiled.*infoflow"):
        RunConfig.from_mapping({"compiled": True, "method": "infoflow"})


@pytest.mark.parametrize("method", ["logits", "infoflow"])
def test_a_fast_run_repeats_itself(tmp_path: Path, method: str) -> None:
    settings = {"fast": True, "method": method, "models": "cnn-small,resnet8"}
    first, second = (federate(tmp_path / name, 2, **settings) for name in ("a", "b"))
    assert first.timeless_rows() == second.timeless_rows()


@pytest.mark.slow
def test_a_fast_run_learns_what_a_plain_one_does(tmp_path: Path) -> None:
    """The mean accuracies differ by less than the seeds of the plain run do among themselves."""

    def accuracies(fast: bool) -> list[float]:
        runs = [
            federate(
                tmp_path / f"{fast}-{seed}", 2, models="cnn-small,resnet8", seed=seed, pretrain_epochs=4, fast=fast
            )
            for seed in range(3)
        ]
        return [run.summary()["mean"]["after"] for run in runs]

    plain, quick = accuracies(False), accuracies(True)
    assert abs(statistics.fmean(quick) - statistics.fmean(plain)) < max(plain) - min(plain)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be asked")
def test_kept_memory_is_not_cleared_again_and_again() -> None:
    script = (
        "import resource, sys\n"
        "import numpy as np\n"
        "from fedkd.training.memory import keep_freed_memory\n"
        "if sys.argv[1] == 'keep':\n"
        "    assert keep_freed_memory()\n"
        "def step():\n"
        "    return len([np.ones(2**20) for _ in range(8)])\n"
        "step()\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "for _ in range(5):\n"
        "    step()\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)\n"
    )

    def faults(how: str) -> int:
        return int(subprocess.check_output([sys.executable, "-c", script, how], text=True))

    assert faults("keep") < faults("leave") / 10
