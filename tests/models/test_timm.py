"""timm's models by name: as timm itself builds them, its weights from the hub's cache, and errors with the way out."""

import subprocess
import sys

import pytest
import timm
import torch
from safetensors.torch import save_file

from fedkd import models
from fedkd.errors import SettingError

RGB = (3, 32, 32)
TAGGED = "timm:test_resnet@r160_in1k"


def build(spec, input_shape=RGB, num_classes=10, seed=0, **options):
    return models.build(spec, input_shape=input_shape, num_classes=num_classes, seed=seed, **options)


def images(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def answer(model, inputs):
    with torch.inference_mode():
        return model.eval()(inputs)


class Harmful:
    """What an attacker would put into a file."""

    def __reduce__(self):
        return (print, ("this must never run",))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A hub's cache, as downloads leave it, with the weights of a fresh model; and a hub that is out of reach."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")

    def keep(name):
        torch.manual_seed(3)
        made = timm.create_model(name)
        repository = tmp_path / "hub" / f"models--timm--{name}"
        (repository / "snapshots" / "c0ffee").mkdir(parents=True)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("c0ffee")
        save_file(made.state_dict(), repository / "snapshots" / "c0ffee" / "model.safetensors")
        return made

    return keep


def test_an_architecture_answers_as_timms_own_with_the_same_weights():
    model = build("timm:test_resnet", num_classes=7)
    theirs = timm.create_model("test_resnet", num_classes=7)
    theirs.load_state_dict(model.state_dict())

    assert torch.equal(answer(model, images(2, *RGB)), answer(theirs, images(2, *RGB)))


def test_weights_are_a_function_of_the_seed():
    torch.manual_seed(1)
    first = build("timm:test_resnet", seed=5).state_dict()
    torch.manual_seed(2)

    assert all(map(torch.equal, first.values(), build("timm:test_resnet", seed=5).state_dict().values()))
    assert not torch.equal(first["fc.weight"], build("timm:test_resnet", seed=6).state_dict()["fc.weight"])


@pytest.mark.parametrize("shape", [(1, 32, 32), (4, 32, 32), (3, 24, 40)])
def test_channels_and_sizes_are_those_of_the_inputs(shape):
    assert answer(build("timm:test_resnet", shape, num_classes=7), images(2, *shape)).shape == (2, 7)


def test_a_vision_transformer_is_built_for_the_size_of_the_inputs():
    model = build("timm:test_vit", (3, 32, 48), num_classes=7)

    assert answer(model, images(2, 3, 32, 48)).shape == (2, 7)
    assert model.patch_embed.img_size == (32, 48)


def test_weights_come_from_the_hubs_cache_without_a_network(cache):
    made = cache("test_resnet.r160_in1k")

    model = build(TAGGED, num_classes=1000)

    assert torch.equal(answer(model, images(2, *RGB)), answer(made, images(2, *RGB)))


def test_pickled_weights_in_the_cache_run_no_code(cache, tmp_path, capsys):
    made = cache("test_resnet.r160_in1k")
    safe = next(tmp_path.rglob("model.safetensors"))
    safe.unlink()
    pickled = safe.with_name("pytorch_model.bin")

    torch.save(made.state_dict(), pickled)
    assert torch.equal(build(TAGGED, num_classes=1000).fc.weight, made.fc.weight)

    torch.save({"state_dict": made.state_dict(), "harm": Harmful()}, pickled)
    with pytest.raises(SettingError, match="without running code"):
        build(TAGGED)
    assert capsys.readouterr().out == ""


def test_a_model_carries_its_weights_once(cache):
    cache("test_resnet.r160_in1k")

    assert not build(TAGGED, num_classes=1000).pretrained_cfg["state_dict"]


def test_other_classes_get_a_new_head_and_grey_the_sum_over_colours(cache):
    made = cache("test_resnet.r160_in1k")

    model = build(TAGGED, (1, 32, 32), num_classes=7)

    ours, theirs = model.state_dict(), made.state_dict()
    changed = {name for name in theirs if ours[name].shape != theirs[name].shape}
    assert changed == {"fc.weight", "fc.bias", "conv1.0.weight"}
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs.keys() - changed)
    torch.testing.assert_close(ours["conv1.0.weight"], theirs["conv1.0.weight"].sum(dim=1, keepdim=True))


@pytest.mark.usefixtures("cache")
def test_weights_that_cannot_be_had_are_an_error_with_the_way_out():
    with pytest.raises(SettingError, match=r"reaches, or one in its cache .*say timm:test_resnet and give its weights"):
        build(TAGGED, key="model")


def test_the_weights_of_an_export_fit_as_a_checkpoint(tmp_path):
    made = timm.create_model("test_resnet", num_classes=10)
    torch.save({"state_dict": made.state_dict(), "arch": "test_resnet"}, tmp_path / "last.pth.tar")
    model = build("timm:test_resnet")

    models.load_checkpoint(model, tmp_path / "last.pth.tar")

    assert torch.equal(answer(model, images(2, *RGB)), answer(made, images(2, *RGB)))


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("timm:test_resnet.r160_in1k", r"timm:test_resnet@r160_in1k with these weights, or timm:test_resnet without"),
        ("timm:", "timm:NAME"),
        ("timm:a/b", "timm:NAME"),
    ],
)
def test_a_spec_in_another_form_is_refused_without_timm(spec, words):
    with pytest.raises(SettingError, match=words) as caught:
        models.check(spec, key="pooled-model")
    assert caught.value.key == "pooled-model"


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("timm:test_nothing", r"a model of timm .*nearest: test_"),
        ("timm:test_resnet@nothing", "and one of r160_in1k"),
        ("timm:test_resnet@", "timm:NAME@TAG"),
    ],
)
def test_names_that_timm_does_not_know_list_what_there_is(spec, words):
    with pytest.raises(SettingError, match=words):
        build(spec)


def test_without_timm_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)

    for refuse in (lambda: build("timm:resnet18", key="model"), lambda: models.check_there("timm:a", key="model")):
        with pytest.raises(SettingError, match=r"`model` .*pip install 'fedkd\[timm\]'"):
            refuse()


def test_a_check_imports_neither_library():
    program = (
        "import sys\nfrom fedkd import models\n"
        "for spec in ('timm:resnet18@a1_in1k', 'hf:google/vit-base-patch16-224'):\n"
        "    models.check(spec), models.check_there(spec, key='models')\n"
        "print(sorted({'torch', 'timm', 'transformers', 'huggingface_hub'} & sys.modules.keys()))"
    )
    found = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert found.stdout == "[]\n"
