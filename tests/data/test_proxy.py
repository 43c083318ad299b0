"""The proxy set, its fingerprint, and the scaling that is read off it."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkd.data.normalize import standardizer
from fedkd.data.proxy import fingerprint, foreign_proxy, split_proxy
from fedkd.data.sources import Dataset, Public, Source, as_float
from fedkd.errors import SettingError


def numbered(samples):
    """A training set whose inputs say which sample they are."""
    return Dataset(torch.arange(samples, dtype=torch.float32).view(-1, 1), torch.arange(samples) % 3)


def image_source(*shape, samples=12):
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (samples, *shape), dtype=np.uint8))
    part = Dataset(images, torch.arange(samples) % 3)
    return Source("other", part, part, ("a", "b", "c"))


def drawn(source, *arguments, **how):
    return foreign_proxy(Public.of(source), *arguments, **how)


# --- taken from the training set ---


@settings(max_examples=30, deadline=None)
@given(samples=st.integers(2, 60), share=st.floats(0, 1), seed=st.integers(0, 2**32))
def test_proxy_and_remainder_are_the_training_set(samples, share, seed):
    size = min(max(1, int(share * samples)), samples - 1)

    proxy, remaining = split_proxy(numbered(samples), size, seed=seed)

    taken = proxy.inputs.flatten().to(torch.int64).tolist()
    assert len(taken) == size
    assert sorted(taken + remaining.tolist()) == list(range(samples))
    assert (np.diff(remaining) > 0).all()


def test_proxy_is_a_function_of_the_seed():
    train = numbered(50)
    proxies = [split_proxy(train, 20, seed=seed)[0] for seed in (0, 0, 1)]

    assert proxies[0].fingerprint == proxies[1].fingerprint != proxies[2].fingerprint


def test_labels_are_those_of_the_inputs_and_no_part_of_the_fingerprint():
    train = numbered(50)
    proxy, _ = split_proxy(train, 20, seed=0)
    other, _ = split_proxy(Dataset(train.inputs, (train.labels + 1) % 3), 20, seed=0)

    assert proxy.labels.tolist() == [int(value) % 3 for value in proxy.inputs.flatten()]
    assert other.labels.tolist() != proxy.labels.tolist() and other.fingerprint == proxy.fingerprint


@pytest.mark.parametrize("resized", [False, True])
def test_a_foreign_sources_labels_are_known_where_its_classes_are_the_peers(resized):
    source = image_source(3, 8, 8, samples=40)
    like = torch.zeros(1, 4, 4, dtype=torch.uint8) if resized else source.train.inputs[0]

    proxy = drawn(source, 20, like=like, seed=3, classes=("a", "b", "c"))

    order = [int(label) for label in drawn(source, 20, like=source.train.inputs[0], seed=3, classes=list("abc")).labels]
    images = drawn(source, 20, like=source.train.inputs[0], seed=3).inputs
    where = [next(i for i in range(40) if torch.equal(source.train.inputs[i], image)) for image in images]
    assert proxy.labels.tolist() == order == [i % 3 for i in where]
    for others in (None, ("b", "a", "c"), ("a", "b"), ("a", "b", "c", "d")):
        assert drawn(source, 20, like=like, seed=3, classes=others).labels is None
    unlabelled = Source(
        "other", Dataset(source.train.inputs, torch.zeros(40, dtype=torch.int64)), source.test, source.classes
    )
    assert drawn(unlabelled, 20, like=like, seed=3, classes=("a", "b", "c")).labels is None


def test_every_sample_is_equally_likely_in_the_proxy():
    train = numbered(20)
    taken = torch.cat([split_proxy(train, 5, seed=seed)[0].inputs.flatten() for seed in range(400)])

    counts = torch.bincount(taken.to(torch.int64), minlength=20)
    # 400 draws with probability 1/4: mean 100, standard deviation 8.7.
    assert counts.min() > 60
    assert counts.max() < 140


@pytest.mark.parametrize("size", [-1, 0, 50, 51])
def test_proxy_must_leave_something_to_the_peers(size):
    with pytest.raises(SettingError, match="from 1 to 49") as caught:
        split_proxy(numbered(50), size, seed=0)
    assert caught.value.key == "proxy-size"


# --- another source ---


def test_foreign_proxy_of_the_same_form_is_taken_as_it_is():
    source = image_source(3, 8, 8)

    proxy = drawn(source, 12, like=source.train.inputs[0], seed=0)

    ours = sorted(image.numpy().tobytes() for image in proxy.inputs)
    assert ours == sorted(image.numpy().tobytes() for image in source.train.inputs)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 8, 8), (1, 20, 12), (3, 20, 12)])
@pytest.mark.parametrize("peers", [(1, 8, 8), (3, 8, 8), (3, 32, 32), (1, 5, 9)])
def test_foreign_proxy_takes_the_form_of_the_peers(shape, peers):
    source = image_source(*shape)
    like = torch.zeros(peers, dtype=torch.uint8)

    proxy, again = (drawn(source, 7, like=like, seed=3) for _ in range(2))

    assert proxy.inputs.shape == (7, *peers)
    assert proxy.inputs.dtype == torch.uint8
    assert proxy.fingerprint == again.fingerprint


def test_flat_images_keep_their_colour():
    flat = torch.tensor([200, 100, 50], dtype=torch.uint8).view(1, 3, 1, 1).expand(4, 3, 16, 16).contiguous()
    part = Dataset(flat, torch.tensor([0, 1, 0, 1]))
    source = Source("flat", part, part, ("a", "b"))

    small = drawn(source, 2, like=torch.zeros(3, 5, 5, dtype=torch.uint8), seed=0).inputs
    grey = drawn(source, 2, like=torch.zeros(1, 16, 16, dtype=torch.uint8), seed=0).inputs

    assert torch.equal(small, flat[:2, :, :5, :5])
    luma = 0.299 * 200 + 0.587 * 100 + 0.114 * 50
    assert (grey.float() - luma).abs().max() <= 1


def test_grey_images_become_equal_channels():
    source = image_source(1, 8, 8)

    rgb = drawn(source, 12, like=torch.zeros(3, 8, 8, dtype=torch.uint8), seed=0).inputs

    assert torch.equal(rgb[:, 0], rgb[:, 1])
    assert torch.equal(rgb[:, 1], rgb[:, 2])
    assert sorted(rgb[:, 0].flatten().tolist()) == sorted(source.train.inputs.flatten().tolist())


def test_shrinking_averages_instead_of_dropping_pixels():
    stripes = torch.zeros(4, 1, 32, 32, dtype=torch.uint8)
    stripes[..., ::2] = 255
    part = Dataset(stripes, torch.tensor([0, 1, 0, 1]))

    small = drawn(Source("s", part, part, ("a", "b")), 1, like=torch.zeros(1, 8, 8, dtype=torch.uint8), seed=0)

    assert (small.inputs.float() - 127.5).abs().max() < 20


@pytest.mark.parametrize(
    ("shape", "like"),
    [
        ((3, 8, 8), torch.zeros(5)),
        ((3, 8, 8), torch.zeros(3, 8, 8)),
        ((4, 8, 8), torch.zeros(3, 8, 8, dtype=torch.uint8)),
        ((3, 8, 8), torch.zeros(2, 8, 8, dtype=torch.uint8)),
    ],
)
def test_forms_that_cannot_be_matched_are_refused(shape, like):
    with pytest.raises(SettingError, match="other") as caught:
        drawn(image_source(*shape), 5, like=like, seed=0)
    assert caught.value.key == "proxy"


def test_foreign_proxy_cannot_be_larger_than_its_source():
    source = image_source(3, 8, 8)

    with pytest.raises(SettingError, match="from 1 to 12") as caught:
        drawn(source, 13, like=source.train.inputs[0], seed=0)
    assert caught.value.key == "proxy-size"


# --- fingerprint ---


def test_fingerprint_depends_on_content_order_shape_and_type():
    inputs = torch.arange(24, dtype=torch.uint8).view(4, 6)
    changed = inputs.clone()
    changed[3, 5] += 1
    variants = [
        inputs,
        changed,
        inputs.flip(0),
        inputs.view(6, 4),
        inputs.view(torch.int8),
        inputs[:3],
    ]

    assert len({fingerprint(variant) for variant in variants}) == len(variants)


def test_fingerprint_does_not_depend_on_memory_layout():
    images = torch.arange(2 * 3 * 4 * 5, dtype=torch.float32).view(2, 3, 4, 5)

    assert fingerprint(images) == fingerprint(images.to(memory_format=torch.channels_last))


# --- scaling ---


@pytest.mark.parametrize("shape", [(40, 3, 6, 5), (40, 1, 4, 4)])
def test_auto_standardises_the_proxy_by_channel(shape):
    proxy = torch.from_numpy(np.random.default_rng(0).integers(0, 200, shape, dtype=np.uint8))

    scaled = standardizer("auto", proxy)(proxy).transpose(0, 1).flatten(1)

    assert scaled.mean(dim=1).abs().max() < 1e-5
    assert torch.allclose(scaled.std(dim=1, correction=0), torch.ones(shape[1]), atol=1e-5)


def test_auto_standardises_flat_inputs_by_feature_whatever_their_units():
    rng = np.random.default_rng(0)
    features = torch.from_numpy(rng.normal([0, 1e6, 2e-5], [1, 1e5, 1e-5], (500, 3))).float()

    scaled = standardizer("auto", features)(features)

    assert torch.allclose(scaled.std(dim=0, correction=0), torch.ones(3), atol=1e-4)
    assert scaled.mean(dim=0).abs().max() < 1e-3


def test_constant_features_are_shifted_only():
    proxy = torch.tensor([[0.1, 1.0], [0.1, 3.0], [0.1, 5.0]])

    scaled = standardizer("auto", proxy)(torch.tensor([[1.1, 3.0]]))

    assert torch.allclose(scaled, torch.tensor([[1.0, 0.0]]), atol=1e-6)


def test_auto_does_not_depend_on_the_number_of_threads():
    proxy = torch.from_numpy(np.random.default_rng(0).normal(size=(300, 2, 40, 40))).float()
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(standardizer("auto", proxy))
    finally:
        torch.set_num_threads(threads)

    assert torch.equal(found[0].mean, found[1].mean)
    assert torch.equal(found[0].std, found[1].std)


def test_none_only_brings_bytes_into_the_unit_interval():
    images = image_source(3, 4, 4).train.inputs

    assert torch.equal(standardizer("none", images)(images), as_float(images))


def test_imagenet_agrees_with_torchvision():
    from torchvision.transforms.v2.functional import normalize

    images = image_source(3, 4, 4).train.inputs
    reference = normalize(images / 255, mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])

    assert torch.allclose(standardizer("imagenet", images)(images), reference, atol=1e-6)


def test_symmetric_makes_minus_one_to_one_of_pixels_of_8_bits():
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 3, 2, 2)

    scaled = standardizer("symmetric", images)(images)

    torch.testing.assert_close(scaled[:, 0, 0, 0], torch.tensor([-1.0, -0.6, 1.0]))


@pytest.mark.parametrize(("kind", "shape"), [("imagenet", (5, 1, 4, 4)), ("imagenet", (5, 3)), ("max", (5, 3))])
def test_scalings_that_do_not_apply_are_refused(kind, shape):
    with pytest.raises(SettingError) as caught:
        standardizer(kind, torch.rand(shape), key="normalize")
    assert caught.value.key == "normalize"
    assert "auto" in str(caught.value)
