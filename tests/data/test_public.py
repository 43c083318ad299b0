"""A proxy set as people have it: inputs alone, or with labels that nobody needs."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image

from fedkd.data.sources import load_public, load_source
from fedkd.errors import SettingError

IMAGES = np.random.default_rng(0).integers(0, 256, (6, 5, 4, 3), dtype=np.uint8)


def save(folder, images=IMAGES, *, suffix=".png"):
    folder.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{number}{suffix}")


def channels_first(images):
    return torch.from_numpy(images).permute(0, 3, 1, 2)


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    def write(body):
        (tmp_path / "own_public.py").write_text(f"import numpy as np, torch\n{body}")
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.delitem(sys.modules, "own_public", raising=False)

    return write


def test_a_flat_folder_is_all_its_images_in_the_order_of_their_names(tmp_path):
    save(tmp_path / "images")

    public = load_public("folder:images", data_dir=tmp_path)

    assert torch.equal(public.inputs, channels_first(IMAGES))
    assert public.labels is None and public.classes == ()


@pytest.mark.parametrize("below", ["train", "2024/january"])
def test_images_without_classes_may_lie_deeper(tmp_path, below):
    save(tmp_path / "images" / below)

    public = load_public("folder:images@8", data_dir=tmp_path)

    assert public.inputs.shape == (6, 3, 8, 8) and public.labels is None


def test_a_labelled_folder_needs_no_test_set_and_keeps_its_labels(tmp_path):
    save(tmp_path / "images" / "train" / "cat", IMAGES[:4])
    save(tmp_path / "images" / "train" / "dog", IMAGES[4:])

    public = load_public("folder:images", data_dir=tmp_path)

    assert torch.equal(public.inputs, channels_first(IMAGES))
    assert public.labels.tolist() == [0, 0, 0, 0, 1, 1] and public.classes == ("cat", "dog") and public.named


def test_a_folder_without_images_is_refused_and_says_what_is_there(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "one.heic").touch()

    with pytest.raises(SettingError, match=r"`proxy`.*there are none, but 1 files or folders \(1 .heic\)"):
        load_public("folder:images", data_dir=tmp_path)
    with pytest.raises(SettingError, match=r"`proxy`.*an existing folder"):
        load_public("folder:nowhere", data_dir=tmp_path)


@pytest.mark.parametrize("name", ["x", "x_train", "pictures"])
def test_an_npz_file_may_hold_one_array(tmp_path, name):
    np.savez(tmp_path / "set.npz", **{name: IMAGES})

    public = load_public("npz:set.npz", data_dir=tmp_path)

    assert torch.equal(public.inputs, channels_first(IMAGES)) and public.labels is None


def test_an_npz_file_with_labels_keeps_them_and_needs_no_test_set(tmp_path):
    np.savez(tmp_path / "set.npz", x=IMAGES, y=[0, 1, 0, 1, 0, 1], classes=["a", "b"])

    public = load_public("npz:set.npz", data_dir=tmp_path)

    assert public.labels.tolist() == [0, 1, 0, 1, 0, 1] and public.classes == ("a", "b") and public.named


@pytest.mark.parametrize("labels", [np.zeros(6), np.array(list("abcdef")), np.full(6, -1), np.full(6, 2)])
def test_labels_that_are_none_are_not_known(tmp_path, labels):
    np.savez(tmp_path / "set.npz", x=IMAGES, y=labels, classes=["a", "b"])

    assert load_public("npz:set.npz", data_dir=tmp_path).labels is None


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"first": IMAGES, "second": IMAGES}, "it has first, second"),
        ({}, "it has no array"),
        ({"x": IMAGES, "y": np.zeros(5, int)}, "6 inputs with 5 labels"),
        ({"x": IMAGES[:0]}, "at least one public sample"),
        ({"x": np.full((3, 2), np.nan)}, "NaN"),
        ({"x": np.zeros((3, 8, 8), int)}, r"int64 \[3, 8, 8\]"),
    ],
)
def test_an_npz_file_that_cannot_be_a_proxy_set_is_refused(tmp_path, arrays, words):
    np.savez(tmp_path / "set.npz", **arrays)

    with pytest.raises(SettingError, match=rf"`proxy`.*{words}"):
        load_public("npz:set.npz", data_dir=tmp_path)


@pytest.mark.parametrize(
    ("returned", "shape"),
    [
        ("np.zeros((4, 8, 8), np.uint8)", (4, 1, 8, 8)),
        ("torch.zeros(4, 3, 8, 8, dtype=torch.uint8)", (4, 3, 8, 8)),
        ("torch.zeros(4, 7)", (4, 7)),
    ],
)
def test_a_function_may_return_inputs_alone(own_module, tmp_path, returned, shape):
    own_module(f"def load(): return {returned}")

    public = load_public("own_public:load", data_dir=tmp_path)

    assert public.inputs.shape == shape and public.labels is None
    with pytest.raises(SettingError, match=r"`dataset`.*x_train"):
        load_source("own_public:load", data_dir=tmp_path)


def test_a_function_that_returns_something_else_is_refused(own_module, tmp_path):
    own_module("def load(): return 7")

    with pytest.raises(SettingError, match=r"`proxy`.*inputs alone \(an array or a tensor\).*not int"):
        load_public("own_public:load", data_dir=tmp_path)


def test_any_labelled_source_is_one_too(tmp_path):
    source = load_source("digits", data_dir=tmp_path)

    public = load_public("digits", data_dir=tmp_path)

    assert torch.equal(public.inputs, source.train.inputs) and torch.equal(public.labels, source.train.labels)
