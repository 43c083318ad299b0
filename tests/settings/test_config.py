import dataclasses
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from fedkd.errors import SettingError
from fedkd.losses import divergences
from fedkd.settings.config import RunConfig, recorded
from fedkd.settings.declare import key
from fedkd.settings.rules import DIVERGENCES
from fedkd.settings.table import settings_table

ROOT = Path(__file__).parents[2]


def test_the_app_ships_the_defaults_of_the_dataclass():
    app = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]

    assert app == RunConfig().to_mapping()
    assert RunConfig.from_mapping(app) == RunConfig()


def test_the_readme_documents_every_setting_as_it_is():
    assert settings_table() in (ROOT / "README.md").read_text()


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("partition-alpha", 0, "a number > 0"),
        ("partition-alpha", float("nan"), "a number > 0"),
        ("rounds", 2.5, "a whole number"),
        ("rounds", True, "a whole number"),
        ("rounds", -1, ">= 0"),
        ("dataset", 3, "text"),
        ("download", "yes", "true or false"),
        ("strategy", "telepathy", "averaged"),
        ("average", "votes", "probs, logits"),
        ("controls", "isolated,cheating", "isolated, pooled"),
        ("batch-size", 1, ">= 2"),
        ("run-name", "a/b", "letters"),
        ("temprature", 2.0, "temperature"),
        ("temperature", 1e-46, "[0.001, 10000]"),
        ("tune-temperatures", "1,0.0001", "[0.001, 10000]"),
        ("sharpen", 1e-6, "at least 0.001"),
        ("divergence", "klx", "reverse_kl"),
        ("topology", "compleet", "complete"),
        ("models", "resnet9", "resnet8"),
        ("fedavg-model", "resnet9", "resnet8"),
        ("codec", "fp12", "fp16"),
        ("flow-depth", 10**9, "[1, 64]"),
        ("augment", "mixup", "none, crop-flip, randaugment, or `package.module:function`"),
        ("learning-rate-schedule", "exponential", "constant, cosine, step"),
        ("label-smoothing", 1.0, "[0, 0.99]"),
        ("regime", "dp", "partitioned (it was `dp` before, which is no differential privacy: for that see "),
    ],
)
def test_a_wrong_setting_names_key_value_and_what_is_allowed(name, value, allowed):
    with pytest.raises(SettingError) as caught:
        RunConfig.from_mapping({name: value})

    message = str(caught.value)
    assert f"`{name}`" in message and repr(value) in message and allowed in message


def test_the_divergences_spelled_out_are_those_of_the_library():
    listed = "from fedkd.losses.divergences import names; print(*names())"
    said = subprocess.run([sys.executable, "-c", listed], capture_output=True, text=True, check=True, cwd=ROOT)

    assert tuple(said.stdout.split()) == DIVERGENCES


def test_a_divergence_registered_in_this_process_is_known_by_name():
    @divergences.register("of-a-test")
    def of_a_test(student_logits, teacher_logits, *, temperature=1.0):
        return student_logits.sum(dim=-1)

    assert RunConfig.from_mapping({"divergence": "of-a-test"}).divergence == "of-a-test"


def test_whole_numbers_are_numbers():
    assert RunConfig.from_mapping({"temperature": 4}).temperature == 4.0


def test_settings_survive_flowers_mapping():
    config = dataclasses.replace(RunConfig(), rounds=3, codec="fp16", partition_alpha=0.7)

    assert RunConfig.from_mapping(config.to_mapping()) == config


def test_keys_are_kebab_case():
    assert all(re.fullmatch(r"[a-z0-9-]+", key(f.name)) for f in dataclasses.fields(RunConfig))


@pytest.mark.parametrize(
    ("settings", "joint", "weight"),
    [
        ({}, True, 0.5),
        ({"schedule": "alternate"}, False, 1.0),
        ({"schedule": "alternate", "optimizer": "sgd"}, False, 1.0),
        ({"schedule": "alternate", "optimizer": "sgd", "kd-weight": 3.0}, False, 3.0),
        ({"regime": "dml"}, True, 1.0),
        ({"regime": "dml", "schedule": "alternate"}, True, 1.0),
        ({"regime": "dml", "kd-weight": 2.0}, True, 2.0),
        ({"regime": "tuned"}, True, 0.5),
        ({"regime": "partitioned"}, True, 0.5),
        ({"method": "infoflow"}, True, 0.5),
        ({"kd-weight": 0.9}, True, 0.9),
        ({"strategy": "consensus"}, False, 1.0),
        ({"strategy": "consensus", "kd-weight": 0.5}, True, 0.5),
        ({"strategy": "consensus", "regime": "dml"}, True, 1.0),
        ({"strategy": "fedavg"}, False, 1.0),
        ({"strategy": "fedavg", "fedavg-start": "distilled"}, False, 1.0),
    ],
)
def test_without_a_weight_labels_and_teachers_weigh_alike_where_one_gives_way_to_the_other(settings, joint, weight):
    config = RunConfig.from_mapping(settings)

    assert (config.joint, config.distillation_weight) == (joint, weight)
    used = RunConfig.from_mapping(config.effective().to_mapping())  # as peers get it
    assert (used.joint, used.distillation_weight) == (joint, weight)


@pytest.mark.parametrize(("name", "divergence"), [("fedmd", "mae"), ("ds-fl", "kl")])
def test_a_consensus_baseline_is_the_published_method_unless_it_is_given_a_weight(name, divergence):
    method = RunConfig.from_mapping({"strategy": "consensus", "consensus": name, "temperature": 4.0}).effective()
    mixed = RunConfig.from_mapping({"strategy": "consensus", "consensus": name, "kd-weight": 0.5}).effective()

    assert (method.divergence, method.temperature, method.schedule) == (divergence, 1.0, "alternate")
    assert (mixed.divergence, mixed.schedule) == (divergence, "mixed")


def test_evaluation_is_due_every_nth_round_and_in_the_last():
    config = dataclasses.replace(RunConfig(), rounds=7, eval_every=3)

    assert [round for round in range(8) if config.evaluates(round)] == [0, 3, 6, 7]


@pytest.mark.parametrize(
    ("settings", "way"), [({}, "`schedule=alternate`"), ({"regime": "dml"}, "with `regime=vanilla`")]
)
def test_epochs_that_would_leave_nothing_to_train_are_refused_with_the_way_out(settings, way):
    for key_ in ("local-epochs", "distill-epochs"):
        with pytest.raises(SettingError, match=f"`{key_}` to be at least 1 .*{way}, but got 0"):
            RunConfig.from_mapping({**settings, key_: 0})


@pytest.mark.parametrize("key_", ["augment", "augment-proxy"])
def test_features_that_are_computed_once_are_not_augmented(key_):
    with pytest.raises(SettingError, match=f"`{key_}` to be none where a head trains alone"):
        RunConfig.from_mapping({"train": "all,head", key_: "crop-flip"})


def test_a_rate_over_a_run_of_which_nobody_knows_the_rounds_is_refused():
    gossip = {"strategy": "gossip", "mode": "async", "learning-rate-over": "run"}
    with pytest.raises(SettingError, match=r"`learning-rate-over` to be phase under mode async, .* but got 'run'"):
        RunConfig.from_mapping({**gossip, "learning-rate-schedule": "cosine"})
    RunConfig.from_mapping(gossip)  # nothing varies: no contradiction


@pytest.mark.parametrize(
    ("said", "size", "scale"),
    [
        ({"models": "mlp,resnet18@IMAGENET1K_V1", "normalize": "auto"}, "data", "proxy"),
        ({"models": "resnet18@IMAGENET1K_V1", "normalize": "imagenet"}, "data", "imagenet"),
        ({"models": "mlp,my.module:net", "normalize": "auto"}, "", "auto"),
        ({"models": "resnet18@IMAGENET1K_V1", "normalize": "auto", "input-size": ""}, "", "auto"),
    ],
)
def test_older_runs_saw_images_as_they_were_whatever_weights_their_models_had(said, size, scale):
    found = recorded(said)
    assert (found["input-size"], found["normalize"]) == (size, scale)


def test_more_than_the_proxy_set_holds_cannot_travel_in_a_round():
    with pytest.raises(SettingError, match="`proxy-per-round` to be at most 400"):
        RunConfig.from_mapping({"proxy-per-round": 500})
    assert RunConfig.from_mapping({"proxy-per-round": 500, "proxy": "npz:own.npz"}).travelling == 500
