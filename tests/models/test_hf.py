"""Classifiers of transformers by folder or name: their own logits, a new head and nothing else, errors with a cure."""

import copy
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn

from fedkd import models
from fedkd.errors import SettingError
from fedkd.models.libraries import named, whole

pytestmark = pytest.mark.slow  # transformers alone takes seconds to import
RGB = (3, 8, 8)


@pytest.fixture(scope="module")
def theirs():
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(3)
    form = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return ViTForImageClassification(ViTConfig(**form, image_size=8, patch_size=4, num_labels=10)).eval()


@pytest.fixture
def folder(theirs, tmp_path):
    theirs.save_pretrained(tmp_path / "vit")
    return tmp_path / "vit"


def build(spec, input_shape=RGB, num_classes=10, seed=0, **options):
    return models.build(str(spec), input_shape=input_shape, num_classes=num_classes, seed=seed, **options)


def of(folder):
    return f"hf:{folder}"


def answer(model, inputs):
    with torch.inference_mode():
        return model.eval()(inputs)


def images(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_logits_are_the_classifiers_own(folder, theirs):
    logits = answer(build(of(folder)), images(4, *RGB))

    assert torch.equal(logits, answer(theirs, images(4, *RGB)).logits)


def test_grey_images_are_given_to_it_three_times_over(folder, theirs):
    grey = images(4, 1, 8, 8)

    logits = answer(build(of(folder), (1, 8, 8)), grey)

    assert torch.equal(logits, answer(theirs, grey.expand(-1, 3, -1, -1)).logits)


def test_other_classes_get_a_new_head_by_the_seed_and_keep_the_rest(folder, theirs, capfd):
    first, again, other = (build(of(folder), num_classes=7, seed=seed).state_dict() for seed in (0, 0, 1))

    new = {name for name in first if not torch.equal(first[name], other[name])}
    assert new == {"classifier.weight"}
    assert all(map(torch.equal, first.values(), again.values()))
    kept = {name: tensor for name, tensor in theirs.state_dict().items() if not name.startswith("classifier")}
    assert all(torch.equal(first[name], tensor) for name, tensor in kept.items())
    assert "LOAD REPORT" not in "".join(capfd.readouterr())


def test_the_seed_alone_decides_wherever_the_folder_lies(folder, theirs, tmp_path):
    theirs.save_pretrained(tmp_path / "elsewhere" / "vit")

    first, second = (build(of(at), num_classes=7) for at in (folder, tmp_path / "elsewhere" / "vit"))

    assert all(map(torch.equal, first.state_dict().values(), second.state_dict().values()))
    assert named(of(folder)) == "hf:vit"


def test_its_state_has_the_classifiers_names_alone_and_inside_of_another_model(folder, theirs, tmp_path):
    model = build(of(folder))
    assert list(model.state_dict()) == list(theirs.state_dict())

    changed = copy.deepcopy(model)
    nn.init.ones_(changed.model.classifier.weight)
    save_model(nn.Sequential(changed), str(tmp_path / "state.safetensors"))
    back = nn.Sequential(copy.deepcopy(model))
    load_model(back, tmp_path / "state.safetensors")

    assert "0.classifier.weight" in load_file(tmp_path / "state.safetensors")
    assert torch.equal(answer(back, images(2, *RGB)), answer(changed, images(2, *RGB)))
    assert not torch.equal(answer(model, images(2, *RGB)), answer(changed, images(2, *RGB)))


def test_the_weights_in_its_folder_fit_as_a_checkpoint(folder, theirs, tmp_path):
    model = build(of(folder))
    changed = {name: tensor + 1 for name, tensor in theirs.state_dict().items()}
    save_file(changed, tmp_path / "weights.safetensors")

    models.load_checkpoint(model, tmp_path / "weights.safetensors")

    assert torch.equal(model.state_dict()["vit.embeddings.cls_token"], changed["vit.embeddings.cls_token"])


def test_it_trains_in_float32_whatever_its_weights_were_saved_in(folder, theirs):
    copy.deepcopy(theirs).half().save_pretrained(folder)
    model = build(of(folder))

    model(images(2, *RGB)).sum().backward()

    assert model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(("name", "changed"), [("cls_token", torch.zeros(1, 1, 8)), ("cls_token", None)])
def test_weights_that_lack_more_than_a_head_are_refused(folder, name, changed):
    state = load_file(folder / "model.safetensors")
    key = next(one for one in state if name in one)
    del state[key]
    save_file({**state, **({} if changed is None else {key: changed})}, folder / "model.safetensors", {"format": "pt"})

    with pytest.raises(SettingError, match=r"nothing but a head \(vit\.embeddings\.cls_token"):
        build(of(folder), num_classes=7)


def test_a_backbone_without_a_head_gets_one(folder, theirs):
    theirs.vit.save_pretrained(folder)

    state = build(of(folder), num_classes=7).state_dict()

    assert state["classifier.weight"].shape == (7, 16)
    assert torch.equal(state["vit.embeddings.cls_token"], theirs.state_dict()["vit.embeddings.cls_token"])


def test_what_is_no_classifier_says_so_in_one_line(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    config = json.loads((folder / "config.json").read_text())
    (folder / "model.safetensors").unlink()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "config.json").write_text(json.dumps({"model_type": "bert"}))
    own = {**config, "model_type": "mine", "auto_map": {"AutoModelForImageClassification": "code.Mine"}}
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "config.json").write_text(json.dumps(own))
    (tmp_path / "code" / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Mine: ...")

    for place in (tmp_path / "empty", folder, tmp_path / "text", tmp_path / "code"):
        with pytest.raises(SettingError, match="an image classifier of transformers") as caught:
            build(of(place), key="model")
        assert "\n" not in str(caught.value) and "\x1b" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


def test_inputs_that_it_does_not_take_are_an_error(folder):
    with pytest.raises(SettingError, match=r"2 channels \(this one is for 3"):
        build(of(folder), (2, 8, 8))
    with pytest.raises(SettingError, match=r"doesn't match model"):
        build(of(folder), (3, 16, 16))


def test_a_hub_out_of_reach_is_an_error_with_the_way_out(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")

    for refuse in (build, models.own_preprocessing):
        with pytest.raises(SettingError, match=r"`models` .*one in its cache .*name the folder of a local copy"):
            refuse("hf:somebody/vit-of-theirs")


def test_a_folder_that_is_not_there_is_refused_before_anything_is_imported(monkeypatch):
    with pytest.raises(SettingError, match="there is no folder"):
        models.check_there("hf:./nowhere", key="models")
    with pytest.raises(SettingError, match="hf:FOLDER"):
        models.check("hf:")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(SettingError, match=r"pip install 'fedkd\[transformers\]'"):
        build("hf:google/vit-base-patch16-224")


def test_a_relative_folder_is_found_from_anywhere(folder):
    assert whole("hf:vit", folder.parent) == of(folder)
    assert whole("hf:./vit", Path("/somewhere")) == f"hf:{os.sep}somewhere/vit"
    assert whole("hf:google/vit", folder.parent) == "hf:google/vit"
    assert whole("resnet20", folder.parent) == "resnet20"
