"""Augmented images: each of a batch is drawn for itself, from a stream that belongs to its phase alone."""

from itertools import product

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torchvision.transforms import v2

from fedkd.data.augment import Augmentation, crop_flip, each
from fedkd.data.normalize import standardizer
from fedkd.data.samples import Samples
from fedkd.errors import SettingError
from fedkd.seeding import seeded


def images(count: int = 24, *shape: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    pixels = torch.randint(256, (count, *(shape or (3, 16, 24))), generator=torch.Generator().manual_seed(0))
    return pixels.to(dtype)


def samples(kept: torch.Tensor) -> Samples:
    return Samples(kept, standardizer("none", kept))


def named(spec: str, kept: torch.Tensor | None = None) -> Augmentation | None:
    return Augmentation.named(spec, samples(images() if kept is None else kept), key="augment-proxy")


def shifted(image: torch.Tensor, down: int, right: int, *, mirrored: bool) -> torch.Tensor:
    """One image by torchvision: what is cut out of it with mirrored edges around it."""
    height, width = image.shape[-2:]
    padded = v2.functional.pad(image, [width // 8, height // 8], padding_mode="reflect")
    cut = v2.functional.crop(padded, height // 8 + down, width // 8 + right, height, width)
    return v2.functional.horizontal_flip(cut) if mirrored else cut


@pytest.mark.parametrize("shape", [(3, 16, 24), (1, 8, 8), (2, 28, 28), (3, 32, 32)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_each_image_is_one_of_its_shifts_mirrored_or_not(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    given = images(6, *shape, dtype=dtype)
    with seeded(3):
        found = crop_flip(given)

    assert found.dtype == dtype
    downs, rights = (range(-(side // 8), side // 8 + 1) for side in shape[1:])
    for image, seen in zip(given, found, strict=True):
        possible = product(downs, rights, (False, True))
        assert any(torch.equal(seen, shifted(image, d, r, mirrored=m)) for d, r, m in possible)


def test_in_a_batch_of_one_image_all_shifts_come_up_about_as_often() -> None:
    image = images(1, 1, 8, 8)[0]
    with seeded(1):
        found = crop_flip(image.expand(1800, -1, -1, -1))

    counts = [
        int((found == shifted(image, down, right, mirrored=mirrored)).flatten(1).all(dim=1).sum())
        for down, right, mirrored in product((-1, 0, 1), (-1, 0, 1), (False, True))
    ]
    assert sum(counts) == 1800  # 18 ways, 100 each; a standard deviation is 10
    assert min(counts) > 50 and max(counts) < 150


def test_an_image_of_less_than_eight_pixels_is_mirrored_only() -> None:
    given = images(40, 3, 5, 7)
    found = crop_flip(given)
    same = (found == given).flatten(1).all(dim=1)
    assert torch.equal(torch.where(same.view(-1, 1, 1, 1), given, given.flip(-1)), found)
    assert 0 < same.sum() < 40


def test_a_transform_of_one_image_draws_for_each() -> None:
    image = images(1, 3, 8, 8)
    found = each(v2.RandomErasing(p=1.0))(image.expand(12, -1, -1, -1).clone())
    assert found.shape == (12, 3, 8, 8) and len({one.numpy().tobytes() for one in found}) > 6
    assert each(v2.Identity())(image[:0]).shape == (0, 3, 8, 8)


@pytest.mark.parametrize("spec", ["crop-flip", f"{__name__}:brighter"])
def test_a_phase_repeats_itself_and_its_batches_are_drawn_anew(spec: str) -> None:
    made, given, index = named(spec), samples(images()), torch.arange(24)
    assert made is not None
    before = torch.random.get_rng_state()
    first, again, other = (made.of(given, seed) for seed in (5, 5, 6))
    batches = [first[index] for _ in range(3)]

    assert all(torch.equal(again[index], batch) for batch in batches)
    assert not any(torch.equal(batch, given[index]) for batch in batches)
    assert not torch.equal(batches[0], batches[1]) and not torch.equal(other[index], batches[0])
    assert torch.equal(torch.random.get_rng_state(), before)  # dropout draws what it did
    assert torch.equal(given.kept, images())


def test_what_is_augmented_is_what_is_kept_and_it_is_seen_as_everything_is() -> None:
    kept, given = images(8, 1, 8, 8), []

    def view(rows: torch.Tensor) -> torch.Tensor:
        given.append(rows.dtype)
        return F.interpolate(rows.float(), scale_factor=4)

    made = named("crop-flip", kept)
    assert made is not None
    assert made.of(Samples(kept, view), 0)[torch.arange(4)].shape == (4, 1, 32, 32)
    assert given == [torch.uint8]


@pytest.mark.slow
def test_randaugment_draws_for_each_image_and_repeats_itself() -> None:
    kept = images(1, 3, 32, 32).expand(16, -1, -1, -1).clone()
    made = named("randaugment", kept)
    assert made is not None
    first, again = (made.of(samples(kept), 2)[torch.arange(16)] for _ in range(2))
    assert torch.equal(first, again)
    assert len({one.numpy().tobytes() for one in first}) > 12


def test_none_is_none() -> None:
    assert Augmentation.named("none", torch.zeros(3, 5), key="augment") is None


def test_what_was_computed_once_cannot_be_augmented() -> None:
    with pytest.raises(SettingError, match=r"`augment` to be none where a model's head trains alone.*got 'crop-flip'"):
        Augmentation.named("crop-flip", torch.zeros(4, 30), key="augment")


@pytest.mark.parametrize(
    ("spec", "kept", "allowed"),
    [
        ("crop-flip", torch.zeros(4, 30), r"none for inputs \[30\], which are no images"),
        (f"{__name__}:brighter", torch.zeros(4, 30), r"none for inputs \[30\]"),
        ("randaugment", images(2, 3, 8, 8, dtype=torch.float32), "none, crop-flip or .* float32 images of 3 channels"),
        ("randaugment", images(2, 4, 8, 8), "none, crop-flip or .* uint8 images of 4 channels"),
    ],
)
def test_inputs_that_cannot_be_augmented_are_refused_with_key_value_and_cure(
    spec: str, kept: torch.Tensor, allowed: str
) -> None:
    with pytest.raises(SettingError, match=f"`augment-proxy` to be {allowed}.*got '{spec}'"):
        named(spec, kept)


def brighter(batch: torch.Tensor) -> torch.Tensor:
    return (batch.float() * torch.rand(len(batch), 1, 1, 1)).to(batch.dtype)


def darker_in_place(batch: torch.Tensor) -> torch.Tensor:
    return batch.fill_(0)


def as_floats(batch: torch.Tensor) -> torch.Tensor:
    return batch.float()


def halved(batch: torch.Tensor) -> torch.Tensor:
    return batch[..., ::2]


def nothing(batch: torch.Tensor) -> None:
    return None


def failing(batch: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("no camera")


def elsewhere(batch: torch.Tensor) -> torch.Tensor:
    return batch.roll(int(np.random.default_rng().integers(1, 1000)), dims=-1).add(np.random.randint(200))


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("as_floats", r"for torch.uint8 \[2, 3, 16, 24\] on cpu it returned torch.float32"),
        ("halved", r"it returned torch.uint8 \[2, 3, 16, 12\]"),
        ("nothing", "it returned NoneType"),
        ("failing", "RuntimeError: no camera"),
        ("elsewhere", "it drew elsewhere"),
        ("absent", "a callable `absent`"),
    ],
)
def test_ones_own_function_that_cannot_augment_is_found_before_any_training(name: str, complaint: str) -> None:
    with pytest.raises(SettingError, match=f"`augment-proxy`.*{complaint}.*{__name__}:{name}"):
        named(f"{__name__}:{name}")


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("name", ["brighter", "darker_in_place"])
def test_ones_own_function_may_draw_and_write_in_place(name: str, dtype: torch.dtype) -> None:
    kept = images(4, 3, 8, 8, dtype=dtype)
    made = named(f"{__name__}:{name}", kept)
    assert made is not None
    made.of(samples(kept), 0)[torch.tensor([0, 1])]
    assert torch.equal(kept, images(4, 3, 8, 8, dtype=dtype))
