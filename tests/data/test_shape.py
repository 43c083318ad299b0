"""Images of one form: all of a source's alike, and whatever cannot be brought to it refused."""

import pytest
import torch

from fedkd.data.shape import shaped
from fedkd.data.sources import Dataset, Source
from fedkd.errors import SettingError


def source(*shape, dtype=torch.uint8):
    part = Dataset(torch.full((4, *shape), 7, dtype=dtype), torch.tensor([0, 1, 0, 1]))
    return Source("mine", part, part, ("a", "b"))


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 8, 8), (3, 20, 12)])
@pytest.mark.parametrize(
    ("wanted", "form"), [({"size": 16, "channels": 3}, (3, 16, 16)), ({"size": 6, "channels": 1}, (1, 6, 6))]
)
def test_private_and_test_images_take_the_form_and_keep_their_labels(shape, wanted, form):
    found = shaped(source(*shape), **wanted)

    for part in (found.train, found.test):
        assert part.inputs.shape == (4, *form) and part.inputs.dtype == torch.uint8
        assert (part.inputs == 7).all() and part.labels.tolist() == [0, 1, 0, 1]


def test_what_is_not_said_stays_as_it_is():
    images = source(3, 20, 12)

    assert shaped(images) is images
    assert shaped(images, size=5).train.inputs.shape == (4, 3, 5, 5)
    assert shaped(images, channels=1).train.inputs.shape == (4, 1, 20, 12)
    assert shaped(images, channels=3).train is images.train


@pytest.mark.parametrize(
    ("shape", "dtype"), [((7,), torch.float32), ((3, 8, 8), torch.float32), ((4, 8, 8), torch.uint8)]
)
def test_inputs_that_are_no_8_bit_images_are_refused(shape, dtype):
    with pytest.raises(SettingError, match=r"`dataset` to be 8-bit images.*`image-size`"):
        shaped(source(*shape, dtype=dtype), size=8)
