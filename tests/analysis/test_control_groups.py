"""Which trials share a run of a control."""

import pytest

from experiments.analysis.settings import control_group
from fedkd.settings.config import RunConfig


def test_epochs_count_for_the_pooled_control_where_peers_do_not_use_them():
    shared = {**RunConfig().to_mapping(), "peers": 2, "controls": ""}
    carrier = {**shared, "controls": "isolated,pooled"}

    for name in ("isolated", "pooled"):
        assert control_group(shared, name) == control_group(carrier, name)
        assert control_group({**shared, "divergence": "js"}, name) == control_group(carrier, name)
    assert control_group({**shared, "local-epochs": 5}, "pooled") != control_group(carrier, "pooled")
    assert control_group({**shared, "local-epochs": 5}, "isolated") == control_group(carrier, "isolated")


TAUGHT = [
    {"divergence": "js"}, {"temperature": 2.0}, {"kd-weight": 0.3}, {"kd-warm-up": 2}, {"match-gradients": True},
    {"t2-scaling": True}, {"distill-epochs": 3}, {"proxy-per-round": 50}, {"schedule": "alternate"}, {"regime": "dml"},
    {"strategy": "consensus"}, {"strategy": "pairwise", "matching": "round-robin"}, {"topology": "erdos-renyi"},
    {"augment-proxy": "crop-flip"}, {"augment": "crop-flip"}, {"learning-rate-schedule": "cosine"},
    {"label-smoothing": 0.1}, {"gradient-clip": 1.0}, {"logit-adjustment": 1.0}, {"vacant-classes": 1.0}, {"rounds": 3},
    {"seed": 1}, {"participation": 0.5},
]  # fmt: skip
NOT_TAUGHT = [
    {"strategy": "pairwise"}, {"strategy": "gossip"}, {"topology": "ring"}, {"codec": "fp16"}, {"robust": "median"},
    {"sharpen": 0.1}, {"attack": "boast"}, {"pooled-model": "mlp"}, {"kd-weight": 0.5}, {"bdkd-delta": 3.0},
    {"weighing": "confidence"}, {"teacher-temperature": 0.5}, {"keep-models": False},
]  # fmt: skip


@pytest.mark.parametrize(("changed", "shared"), [(one, False) for one in TAUGHT] + [(one, True) for one in NOT_TAUGHT])
def test_the_channel_control_is_shared_where_peers_would_be_taught_alike(changed, shared):
    plain, other = ({**RunConfig().to_mapping(), "peers": 4, **more} for more in ({}, changed))
    used = [RunConfig.from_mapping(settings).effective().to_mapping() for settings in (plain, other)]

    for one, two in ((plain, other), used, (plain, used[1])):  # as planned, as run, and one of each
        assert (control_group(one, "channel") == control_group(two, "channel")) == shared


def test_augmented_proxy_images_are_the_students_alone():
    plain = {**RunConfig().to_mapping(), "peers": 4}
    other = {**plain, "augment-proxy": "crop-flip"}

    for name in ("isolated", "pooled"):
        assert control_group(plain, name) == control_group(other, name)
        assert control_group(plain, name) != control_group({**plain, "augment": "crop-flip"}, name)


def test_what_a_search_finds_depends_on_all_that_peers_heard():
    tuned = {**RunConfig().to_mapping(), "peers": 4, "regime": "tuned", "tune-weights": "0.5"}
    other = {**tuned, "codec": "fp16"}

    assert control_group(tuned, "isolated") == control_group(other, "isolated")
    assert control_group(tuned, "channel") != control_group(other, "channel")
