"""Whom a peer believes: what it hears and the settings become weights."""

import pytest
import torch

from fedkd.errors import FedkdError, SettingError
from fedkd.losses.robust import agreement_weights, eigentrust
from fedkd.losses.weighing import WAYS, Evidence
from fedkd.settings.config import RunConfig
from fedkd.settings.rules import WEIGHINGS
from fedkd.training.belief import Belief

K, N, C = 4, 9, 3
HONEST = 4 * torch.nn.functional.one_hot(torch.arange(N) % C, C).float()
TEACHERS = torch.stack([HONEST, HONEST + 0.1, HONEST.roll(1, -1), HONEST - 0.2])
WEIGHTS = torch.tensor([1.0, 0.5, 1.0, 0.0])


def first_teacher_alone(evidence):
    weights = torch.zeros(len(evidence.logits), 1, 1)
    weights[0] = 1
    return weights


def by_own_confidence(evidence):
    return evidence.own_logits.softmax(-1).amax(-1).reshape(1, -1, 1).expand(len(evidence.logits), -1, 1)


def no_tensor(evidence):
    return [1.0] * len(evidence.logits)


def flat(evidence):
    return torch.ones(len(evidence.logits))


def negative(evidence):
    return -torch.ones(len(evidence.logits), 1, 1)


def other_in_a_run(evidence):
    return torch.ones(len(evidence.logits) + (len(evidence.logits) > 2), 1, 1)


def failing(evidence):
    raise SystemExit("no")


def belief(**settings):
    return Belief.from_config(RunConfig.from_mapping({k.replace("_", "-"): v for k, v in settings.items()}))


def test_uniform_weights_are_those_that_the_letters_came_with():
    made = belief(weighing="uniform", robust="none")

    assert made.whole(WEIGHTS, Evidence(TEACHERS)) is WEIGHTS and not made.needs_own
    assert made.by_place(WEIGHTS, Evidence(TEACHERS)) is None


@pytest.mark.parametrize(
    "name", ["predicted-prior", "discrimination", "confidence", "entropy", "energy", "variance", "similarity", "kt-pfl"]
)
def test_a_way_is_asked_about_whoever_is_left_and_old_knowledge_counts_less(name):
    made = belief(weighing=name)
    left = TEACHERS[:3]

    found = made.by_place(WEIGHTS, Evidence(TEACHERS, own_logits=HONEST))

    expected = WAYS[name].weigh(Evidence(left, own_logits=HONEST)) * WEIGHTS[:3].reshape(-1, 1, 1)
    torch.testing.assert_close(found[:3], expected)
    assert bool((found[3] == 0).all())


def test_agreement_leaves_a_liar_out_before_teachers_are_weighed():
    made = belief(robust="agreement", weighing="energy")
    weights = made.whole(WEIGHTS, Evidence(TEACHERS, own_logits=HONEST))

    assert made.needs_own
    assert weights.tolist() == (WEIGHTS * agreement_weights(TEACHERS, HONEST)).tolist() == [1.0, 0.5, 0.0, 0.0]
    found = made.by_place(weights, Evidence(TEACHERS, own_logits=HONEST))
    torch.testing.assert_close(
        found[:2].sum(0), (WAYS["energy"].weigh(Evidence(TEACHERS[:2])) * WEIGHTS[:2].reshape(-1, 1, 1)).sum(0)
    )


def test_eigentrust_weighs_whole_teachers_at_the_temperature_of_the_distillation():
    teachers = TEACHERS + torch.randn(K, N, C, generator=torch.Generator().manual_seed(0))
    evidence = Evidence(teachers, temperature=2.0, own_logits=HONEST)
    made = belief(robust="eigentrust", weighing="discrimination", temperature=2.0)

    weights = made.whole(WEIGHTS, evidence)

    trust = eigentrust(teachers, HONEST, temperature=2.0)
    assert made.needs_own and trust[2] < trust[:2].min()
    assert not torch.equal(trust, eigentrust(teachers, HONEST))
    assert torch.equal(weights, WEIGHTS * trust)


@pytest.mark.parametrize("name", ["uniform", "predicted-prior", "density"])
def test_what_was_not_sent_counts_for_nothing(name):
    certainty = torch.rand(K, N, generator=torch.Generator().manual_seed(0)) + 0.1
    certainty[0, :4] = 0

    found = belief(weighing=name).by_place(WEIGHTS, Evidence(TEACHERS, certainty=certainty))

    assert bool((found[0, :4] == 0).all()) and bool((found[0, 4:] > 0).all()) and bool((found[1] > 0).all())


def test_where_nothing_counts_whole_teachers_do_for_what_they_sent():
    silent, partly = torch.zeros(K, N), torch.zeros(K, N)
    partly[1, 2] = 0.5  # one sample has no deviation
    made = belief(weighing="discrimination")

    assert made.by_place(WEIGHTS, Evidence(TEACHERS, certainty=silent)) is None
    found = made.by_place(WEIGHTS, Evidence(TEACHERS, certainty=partly))
    assert found[1, 2].tolist() == [0.5] and found.sum() == 0.5
    boasters = torch.zeros(2, N, C)
    boasters[:, :, 0] = 40
    assert made.by_place(torch.ones(2), Evidence(boasters)) is None


def test_a_class_that_no_sender_of_a_sample_has_is_left_to_all_of_its_senders():
    certainty = torch.ones(2, N)
    certainty[1, 0] = 0  # only the first, which has class 0 alone, sends sample 0
    counts = torch.tensor([[10.0, 0.0, 0.0], [5.0, 5.0, 5.0]])

    found = belief(weighing="counts").by_place(
        torch.ones(2), Evidence(TEACHERS[:2], counts=counts, certainty=certainty)
    )

    assert found[0, 0].tolist() == [10.0, 1.0, 1.0] and found[1, 0].tolist() == [0.0, 0.0, 0.0]
    assert found[:, 1].tolist() == counts.tolist()


@pytest.mark.parametrize("size", [1e20, 1.9e30])
@pytest.mark.parametrize("name", [name for name in WEIGHINGS if name not in ("counts", "density")])
def test_one_letter_of_huge_logits_spoils_no_other(name, size):
    teachers = TEACHERS.clone()
    teachers[2, 0] = size * torch.tensor([1.0, -1.0, 0.5])

    found = belief(weighing=name).by_place(torch.ones(K), Evidence(teachers, own_logits=HONEST))

    if found is not None:
        assert bool(found.isfinite().all()) and bool((found[:2].flatten(1).sum(1) > 0).all())


def infinite(evidence):
    weights = torch.ones(len(evidence.logits), 1, 1)
    weights[0] = float("nan")
    return weights


def test_a_teacher_whose_weight_is_no_number_counts_for_nothing():
    found = belief(weighing=f"{__name__}:infinite").by_place(torch.ones(K), Evidence(TEACHERS, own_logits=HONEST))

    assert found.flatten().tolist() == [0.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("settings", [{"strategy": "consensus"}, {"strategy": "fedavg", "fedavg_start": "distilled"}])
def test_where_a_server_combines_nothing_is_weighed(settings):
    told = {key.replace("_", "-"): value for key, value in settings.items()}
    for more in ({}, {"weighing": "discrimination", "teacher-temperature": 0.5, "robust": "agreement"}):
        config = RunConfig.from_mapping({**told, **more}).effective()
        made = Belief.from_config(config)

        assert (made.name, made.robust, config.combined_temperature) == ("uniform", "none", 1.0)
        assert not made.needs_own


def test_beside_a_selector_nobody_is_judged_by_what_was_not_sent():
    assert belief(selector="roc").robust == "none" and belief().robust == "eigentrust"


def test_ones_own_function_weighs():
    alone = belief(weighing=f"{__name__}:first_teacher_alone")
    confident = belief(weighing=f"{__name__}:by_own_confidence")

    assert alone.by_place(WEIGHTS, Evidence(TEACHERS, own_logits=HONEST)).flatten().tolist() == [1.0, 0.0, 0.0, 0.0]
    assert confident.needs_own
    assert confident.by_place(WEIGHTS, Evidence(TEACHERS, own_logits=HONEST)).shape == (K, N, 1)


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("no_tensor", "returned list"),
        ("flat", r"returned \[2\]"),
        ("negative", "no weights"),
        ("failing", "SystemExit: no"),
        ("missing", "missing"),
    ],
)
def test_ones_own_function_that_cannot_weigh_is_found_before_any_training(name, complaint):
    with pytest.raises(SettingError, match=complaint):
        belief(weighing=f"{__name__}:{name}")


def test_ones_own_function_that_goes_wrong_later_is_named():
    made = belief(weighing=f"{__name__}:other_in_a_run")

    with pytest.raises(FedkdError, match=r"weighing = .*other_in_a_run: expected a function"):
        made.by_place(torch.ones(K), Evidence(TEACHERS, own_logits=HONEST))


def test_an_unknown_way_is_refused_with_those_there_are():
    with pytest.raises(SettingError, match=r"`weighing` to be one of uniform, predicted-prior, .*'prior'"):
        belief(weighing="prior")
