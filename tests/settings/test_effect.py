"""Settings that do nothing are said; what a run's strategy or divergence reads is not."""

import pytest
from federation import federate

from fedkd.settings.config import RunConfig
from fedkd.settings.effect import without_effect


@pytest.mark.parametrize(
    ("settings", "idle"),
    [
        ({"fanout": 3}, {"fanout"}),
        ({"fanout": 3, "strategy": "gossip"}, set()),
        ({"fanout": 3, "strategy": "my.module:Mine"}, set()),
        ({"combine": "pairwise"}, {"combine"}),
        ({"reduction": "sum"}, {"reduction"}),
        ({"reduction": "sum", "strategy": "pairwise"}, set()),
        ({"reduction": "sum", "strategy": "gossip", "combine": "pairwise"}, set()),
        ({"average": "logits", "strategy": "pairwise"}, {"average"}),
        ({"privacy_clip": 1.0, "privacy_delta": 1e-6}, {"privacy-clip", "privacy-delta"}),
        ({"cakd_beta": 1.0, "divergence": "dkd"}, set()),
        ({"cakd_top_k": 3, "divergence": "cakd", "cakd_strong": "label"}, {"cakd-top-k"}),
        ({"local_epochs": 2, "controls": ""}, {"local-epochs"}),
        ({"local_epochs": 2, "controls": "", "schedule": "alternate"}, set()),
        ({"local_epochs": 2, "controls": "", "strategy": "consensus"}, set()),
        ({"local_epochs": 2, "controls": "", "strategy": "fedavg"}, set()),
        ({"updates": 5}, {"updates"}),
        ({"learning_rate_over": "run"}, {"learning-rate-over"}),
        ({"learning_rate_over": "run", "learning_rate_warm_up": 0.1}, set()),
        ({"augment_proxy": "crop-flip", "strategy": "fedavg"}, {"augment-proxy"}),
        ({"augment_proxy": "crop-flip", "strategy": "fedavg", "fedavg_start": "distilled"}, set()),
    ],
)
def test_a_setting_that_does_nothing_is_named(settings, idle):
    assert {key for key, _ in without_effect(RunConfig(**settings))} == idle


def test_nothing_is_idle_by_default():
    assert without_effect(RunConfig()) == []


def test_a_run_says_what_has_no_effect(tmp_path, capsys):
    federate(tmp_path, 2, fanout=3, rounds=1)
    assert "`fanout` = 3 has no effect: it takes strategy gossip" in capsys.readouterr().out


def test_a_run_says_that_epochs_are_for_the_pooled_control_alone(tmp_path, capsys):
    federate(tmp_path, 2, local_epochs=2, rounds=1, controls="pooled", pooled_model="mlp")

    assert "`local-epochs` = 2 is for the pooled control alone: peers go by `distill-epochs`" in capsys.readouterr().out
