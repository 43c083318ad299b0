"""Arrays of one's own: read right, or refused with their shape."""

import numpy as np
import pytest
import torch

from fedkd.data.arrays import class_names, from_arrays, to_inputs
from fedkd.data.sources import load_source
from fedkd.errors import SettingError


def inputs(shape, layout=None):
    array = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    return array, to_inputs("mine", "x", array, layout, key="dataset")


def source(labels, classes=None):
    x = np.zeros((len(labels), 8, 8), np.uint8)
    return from_arrays("mine", x, np.asarray(labels), x[:1], np.asarray(labels[:1]), classes)


@pytest.mark.parametrize("shape", [(5, 3, 32, 32), (5, 1, 28, 28), (5, 3, 224, 160), (5, 1, 4, 4), (5, 13, 64, 64)])
def test_channels_may_come_first(shape):
    array, found = inputs(shape)

    assert torch.equal(found, torch.from_numpy(array))


@pytest.mark.parametrize("shape", [(5, 32, 32, 3), (5, 28, 28, 1), (5, 4, 4, 1), (5, 8, 8, 2), (5, 64, 64, 13)])
def test_channels_may_come_last(shape):
    array, found = inputs(shape)

    assert torch.equal(found, torch.from_numpy(array).permute(0, 3, 1, 2))


@pytest.mark.parametrize("shape", [(5, 3, 3, 3), (5, 1, 28, 3), (5, 3, 8, 1), (5, 8, 8, 8)])
def test_sizes_that_tell_no_channels_are_refused_unless_the_layout_is_said(shape):
    with pytest.raises(SettingError, match=r"`x` \[5, \d+, \d+, \d\].*`layout`.*NHWC or NCHW"):
        inputs(shape)
    array, first = inputs(shape, "NCHW")
    _, last = inputs(shape, "NHWC")

    assert torch.equal(first, torch.from_numpy(array))
    assert torch.equal(last, torch.from_numpy(array).permute(0, 3, 1, 2))


def test_an_npz_file_can_say_its_layout(tmp_path):
    x, y = np.arange(2 * 3 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3, 3), np.array([0, 1])
    arrays = {"x_train": x, "y_train": y, "x_test": x, "y_test": y}
    np.savez(tmp_path / "said.npz", layout="NCHW", **arrays)
    np.savez(tmp_path / "wrong.npz", layout="HWC", **arrays)

    assert torch.equal(load_source("npz:said.npz", data_dir=tmp_path).train.inputs, torch.from_numpy(x))
    with pytest.raises(SettingError, match="`layout` is one of NHWC, NCHW, not HWC"):
        load_source("npz:wrong.npz", data_dir=tmp_path)


@pytest.mark.parametrize(
    ("labels", "words"),
    [([1, 2, 3], r"1 that no sample has \(0\)"), ([0, 5, 9000], r"8998 .*\(1, 2, 3, 4, 6, 7, 8, 9, 10, 11, ...\)")],
)
def test_labels_that_leave_classes_empty_are_refused_unless_all_have_names(labels, words):
    with pytest.raises(SettingError, match=words):
        source(labels)

    assert source([1, 2, 3], ["none", "a", "b", "c"]).classes == ("none", "a", "b", "c")


@pytest.mark.parametrize("classes", [np.array([b"cat", b"dog"]), np.array(["cat", "dog"]), ["cat", "dog"]])
def test_names_of_classes_are_text(classes):
    assert source([0, 1], classes).classes == ("cat", "dog")


@pytest.mark.parametrize(
    ("classes", "words"),
    [
        (np.array("cat"), r"a list of names \[C\], not \[\]"),
        (np.array([["cat", "dog"]]), r"not \[1, 2\]"),
        (["cat", "cat"], "'cat' comes twice"),
        (np.array([b"\xff", b"dog"]), "UTF-8"),
    ],
)
def test_names_that_are_no_list_of_different_names_are_refused(classes, words):
    with pytest.raises(SettingError, match=words):
        class_names("mine", classes, key="dataset")
