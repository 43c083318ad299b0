"""Features beside logits: what comes back is what was sent, and what cannot be features is refused by its name."""

import numpy as np
import pytest

from fedkd.wire.codecs import BadKnowledge
from fedkd.wire.features import decode_features, encode_features, without_features

LAYERS = [np.arange(6, dtype=np.float32).reshape(3, 2), np.ones((3, 1), np.float32)]


def test_layers_come_back_in_their_order_with_widths_of_their_own():
    found = decode_features({"logits": LAYERS[0], **encode_features(LAYERS)}, count=3, dimensions=2)

    assert len(found) == 2
    for one, other in zip(found, LAYERS, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_letter_without_features_has_none_and_logits_are_left():
    arrays = {"logits": LAYERS[0], **encode_features(LAYERS)}

    assert decode_features({"logits": LAYERS[0]}, count=3, dimensions=2) == []
    assert without_features(arrays).keys() == {"logits"}


@pytest.mark.parametrize(
    ("arrays", "named"),
    [
        ({"flow.0": np.ones(3, np.float16)}, r"`flow.0` \[3, 1 to 2\], but got \(3,\)"),
        ({"flow.0": np.ones((3, 2, 1), np.float16)}, r"got \(3, 2, 1\)"),
        ({"flow.0": np.ones((3, 0), np.float16)}, r"got \(3, 0\)"),
        ({"flow.0": np.ones((3, 3), np.float16)}, r"got \(3, 3\)"),
        ({"flow.1": np.ones((3, 2), np.float16)}, r"`flow.0` .* but got None"),
        ({"flow.0": np.ones((2, 2), np.float16)}, r"3"),
    ],
)
def test_what_cannot_be_features_is_refused_with_its_name_and_shape(arrays, named):
    with pytest.raises(BadKnowledge, match=named):
        decode_features(arrays, count=3, dimensions=2)
