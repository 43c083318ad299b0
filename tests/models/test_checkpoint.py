"""Checkpoints in the forms that training scripts leave: what fits is loaded, what does not is named."""

import argparse
import re

import pytest
import torch
from torch import nn

from fedkd import models
from fedkd.errors import SettingError


class Net(nn.Module):
    """A backbone with batch normalisation, and a head or two."""

    def __init__(self, classes=10, *, seed=0, heads=1):
        super().__init__()
        torch.manual_seed(seed)
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, classes)
        if heads == 2:
            self.second = nn.Linear(4, classes)


SAVED = Net(seed=1).state_dict()
AVERAGED = Net(seed=2).state_dict()
OTHER = {"criterion.weight": torch.ones(10)}


def under(prefix, state=SAVED):
    return {prefix + name: tensor for name, tensor in state.items()}


def load(held, path, model=None, **options):
    torch.save(held, path / "weights.pt")
    model = model or Net()
    models.load_checkpoint(model, path / "weights.pt", **options)
    return model


def same(model, state):
    return all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    "held",
    [
        SAVED,
        {"state_dict": SAVED, "epoch": 3},
        {"model_state_dict": SAVED, "optimizer_state_dict": {"state": {}, "param_groups": []}},
        {"model": SAVED, "optimizer": {"step": torch.tensor(3)}},
        {"model": {"state_dict": SAVED}},
        under("module."),
        under("_orig_mod."),
        under("module._orig_mod."),
        under("_orig_mod.module."),
        {"state_dict": under("model.")},
        {"state_dict": under("net.backbone."), "hyper_parameters": {"lr": 0.1}, "pytorch-lightning_version": "2.5"},
        {"state_dict": under("model._orig_mod.")},
        {"state_dict": under("model.") | OTHER},
        {"model": under("module.")},
        {"state_dict": {name.replace("conv.", "conv._orig_mod."): tensor for name, tensor in SAVED.items()}},
    ],
)
def test_weights_are_found_wherever_a_training_script_keeps_them(tmp_path, held):
    assert same(load(held, tmp_path), SAVED)


@pytest.mark.parametrize(
    "held",
    [
        {"state_dict": SAVED, "state_dict_ema": AVERAGED},
        {"model_ema": AVERAGED, "model": SAVED},
        {"ema": {"module": AVERAGED, "decay": 0.99}, "model": SAVED},
        {"state_dict": under("ema_model.module.", AVERAGED) | under("model.")},
    ],
)
def test_averaged_weights_yield_to_those_that_were_trained(tmp_path, held):
    assert same(load(held, tmp_path), SAVED)


@pytest.mark.parametrize(
    "held",
    [
        {"state_dict_ema": AVERAGED, "epoch": 3},
        {"ema_state_dict": under("module.", AVERAGED)},
        {"model_ema": {"module": AVERAGED, "decay": 0.99}},
        {"state_dict": under("ema_model.", AVERAGED)},
    ],
)
def test_averaged_weights_are_taken_where_they_are_all_there_is(tmp_path, held):
    assert same(load(held, tmp_path), AVERAGED)


def test_two_sets_of_weights_are_not_chosen_from(tmp_path):
    with pytest.raises(SettingError, match=r"not one each of (student\., teacher\.|teacher\., student\.)"):
        load({"state_dict": under("student.") | under("teacher.", AVERAGED)}, tmp_path)


def test_counts_of_batches_that_old_files_lack_stay_the_models(tmp_path):
    old = {name: tensor for name, tensor in SAVED.items() if "num_batches" not in name}
    model = Net()
    model.norm.num_batches_tracked.fill_(5)

    load(old, tmp_path, model)

    assert torch.equal(model.conv.weight, SAVED["conv.weight"])
    assert model.norm.num_batches_tracked == 5


def test_a_misfit_is_named_without_the_prefix_that_fits_best(tmp_path):
    held = under("model.")
    del held["model.conv.bias"]
    held["model.extra"] = torch.ones(2)

    with pytest.raises(SettingError, match=r"\(missing: conv\.bias; unexpected: extra\)"):
        load(held, tmp_path)


# --- heads ---


def test_a_head_for_other_classes_is_an_error_that_says_how_to_replace_it(tmp_path):
    with pytest.raises(SettingError, match=r"head\.weight \[10, 4\] instead of \[7, 4\].*`replace-head=true`"):
        load(SAVED, tmp_path, Net(7))


@pytest.mark.parametrize("heads", [1, 2])
def test_a_head_for_other_classes_is_replaced_where_asked_for(tmp_path, heads):
    model, fresh = Net(7, seed=5, heads=heads), Net(7, seed=5, heads=heads).state_dict()
    held = Net(10, seed=1, heads=heads).state_dict()

    load({"state_dict": under("model.", held)}, tmp_path, model, new_head=7)

    head = {name for name in fresh if name.startswith(("head", "second"))}
    assert all(torch.equal(model.state_dict()[name], fresh[name]) for name in head)
    assert all(torch.equal(model.state_dict()[name], held[name]) for name in fresh.keys() - head)


def test_a_backbone_alone_gets_a_head_where_asked_for(tmp_path):
    backbone = {name: tensor for name, tensor in SAVED.items() if not name.startswith("head")}

    model = load(backbone, tmp_path, Net(7), new_head=7)
    assert torch.equal(model.conv.weight, SAVED["conv.weight"])

    with pytest.raises(SettingError, match=r"missing: head\.weight, head\.bias"):
        load(backbone, tmp_path, Net(7))


def test_a_head_that_fits_is_kept_though_a_new_one_was_allowed(tmp_path):
    assert same(load(SAVED, tmp_path, new_head=10), SAVED)


def test_nothing_but_the_head_is_ever_replaced(tmp_path):
    wider = {**SAVED, "conv.weight": torch.ones(4, 3, 5, 5)}

    with pytest.raises(SettingError, match=r"of another shape: conv\.weight") as caught:
        load(wider, tmp_path, Net(7), new_head=7)
    assert "head." not in str(caught.value) and "replace-head" not in str(caught.value)


# --- files that hold more than weights ---


@pytest.mark.parametrize(
    "held", [{"state_dict": SAVED, "args": argparse.Namespace(lr=0.1)}, nn.Linear(2, 2)], ids=["arguments", "module"]
)
def test_a_file_that_would_run_code_says_how_to_save_its_weights_and_the_cure_works(tmp_path, held):
    with pytest.raises(SettingError) as caught:
        load(held, tmp_path)
    message = str(caught.value)
    assert "\n" not in message and "\x1b" not in message
    assert ("argparse.Namespace" if isinstance(held, dict) else "Linear") in message

    first, second = re.findall("`(it = .*?|torch.save.*?)`", message)
    names = {"torch": torch, "FILE": tmp_path / "weights.pt"}
    exec(f"{first}\n{second.replace('weights.pt', str(tmp_path / 'saved.pt'))}", names)

    saved = torch.load(tmp_path / "saved.pt", weights_only=True)
    expected = held["state_dict"] if isinstance(held, dict) else held.state_dict()
    assert all(torch.equal(saved[name], tensor) for name, tensor in expected.items())


def test_a_file_without_weights_lists_where_they_are_looked_for(tmp_path):
    with pytest.raises(SettingError, match="state_dict, model_state_dict"):
        load({"epoch": 3, "optimizer": {"step": torch.tensor(3)}}, tmp_path)


@pytest.mark.parametrize("content", [b"", b"junk", b"PK\x03\x04junk", b"version https://git-lfs.github.com/spec/v1\n"])
def test_what_is_no_file_of_torch_is_one_short_line(tmp_path, content):
    (tmp_path / "weights.pt").write_bytes(content)

    with pytest.raises(SettingError, match="safetensors file or a state dict") as caught:
        models.load_checkpoint(Net(), tmp_path / "weights.pt")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
