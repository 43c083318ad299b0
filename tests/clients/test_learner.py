"""How a peer learns in a round, on a model and data that are small enough to try every choice by hand."""

import copy
import dataclasses
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from clients.data import proxy_subset
from clients.learner import Heard, Learner, stack
from fedkd.losses.robust import eigentrust
from fedkd.losses.weighing import Way, discrimination
from fedkd.results.profile import Stopwatch
from fedkd.settings.config import RunConfig
from fedkd.training.distillation import Distillation, teacher_or_self
from fedkd.training.loops import predict

CLASSES, PROXY = 4, 24


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Models this small are not worth a second one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def stream(seed):
    return torch.Generator().manual_seed(seed)


def data(count, seed):
    inputs = torch.randn(count, 6, generator=stream(seed))
    return inputs, inputs[:, :CLASSES].argmax(dim=1)


def site():
    (inputs, labels), (kept, kept_labels) = data(40, 1), data(30, 2)
    return SimpleNamespace(
        inputs=inputs, labels=labels, held_out=SimpleNamespace(inputs=kept, labels=kept_labels),
        label_share=torch.full((CLASSES,), 1 / CLASSES), commons=SimpleNamespace(proxy_inputs=data(PROXY, 3)[0]),
    )  # fmt: skip


def learner(index=0, **settings):
    changed = {
        "proxy-size": PROXY, "learning-rate": 0.05, "optimizer": "sgd", "momentum": 0.0, "distill-epochs": 2,
        "local-epochs": 1, **{name.replace("_", "-"): value for name, value in settings.items()},
    }  # fmt: skip
    return Learner(RunConfig.from_mapping(changed), site(), index, auxiliary=model, watch=Stopwatch())


def model():
    made = nn.Linear(6, CLASSES)
    with torch.no_grad():
        made.weight.copy_(torch.randn(CLASSES, 6, generator=stream(4)))
        made.bias.zero_()
    return made


def wise(seed, sharp=6.0):
    """A teacher that knows the proxy set's labels."""
    labels = data(PROXY, 3)[1]
    return sharp * nn.functional.one_hot(labels, CLASSES) + torch.randn(PROXY, CLASSES, generator=stream(seed))


def heard(*logits, weights=None):
    return Heard(torch.stack(logits), torch.ones(len(logits)) if weights is None else torch.tensor(weights))


PLAIN = {"weighing": "uniform", "robust": "none"}
TAUGHT = heard(wise(5), wise(6))


def after(made, teachers, *, round=1, memo=None):
    student = model()
    found = made.learn(student, teachers, round=round, memo={} if memo is None else memo)
    return student, found


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


@pytest.mark.parametrize("schedule", ["mixed", "alternate"])
def test_without_teachers_a_round_is_the_isolated_controls(schedule):
    alone, loss = model(), learner(schedule=schedule).alone
    expected = loss(alone, round=3)

    student, found = after(learner(schedule=schedule), None, round=3)

    assert same(student, alone) and not same(student, model())
    assert found["local_loss"] == expected and math.isnan(found["kd_loss"])
    other = model()
    learner(schedule=schedule).alone(other, round=4)
    assert not same(other, alone)  # a round has batches of its own, and so has a peer
    other = model()
    learner(1, schedule=schedule).alone(other, round=3)
    assert not same(other, alone)


def test_taking_turns_a_control_trains_on_its_labels_alone_and_else_on_the_batches_of_a_shared_step():
    local, turns, mixed = model(), model(), model()
    learner(local_epochs=3).local(local, round=2, epochs=3)
    learner(local_epochs=3, schedule="alternate").alone(turns, round=2)
    learner(local_epochs=3).alone(mixed, round=2)

    assert same(turns, local) and not same(mixed, local)


def test_losses_and_what_was_used_are_told_as_the_schedule_has_them():
    mixed = after(learner(kd_weight=0.3, temperature=2.0), TAUGHT)[1]
    turns = after(learner(schedule="alternate", temperature=2.0), TAUGHT)[1]

    assert mixed["kd_loss"] > 0 and math.isnan(mixed["local_loss"])
    assert turns["kd_loss"] > 0 and turns["local_loss"] > 0
    assert (mixed["temperature"], mixed["kd_weight"]) == (2.0, 0.3)
    assert (turns["temperature"], turns["kd_weight"]) == (2.0, 1.0)


def test_taking_turns_is_distilling_and_then_training_on_ones_own_labels():
    student, _ = after(learner(schedule="alternate"), TAUGHT)
    first, _ = after(learner(schedule="alternate", local_epochs=0), TAUGHT)
    learner(schedule="alternate").local(first, round=1, epochs=1)

    assert same(student, first)


def test_with_a_warm_up_the_first_rounds_are_taught_less_and_later_ones_as_without():
    def moved(round, **settings):
        made = learner(schedule="alternate", local_epochs=0, divergence="js", **settings)
        return float((after(made, TAUGHT, round=round)[0].weight - model().weight).detach().norm())

    assert moved(1, kd_warm_up=10) < moved(5, kd_warm_up=10) < moved(5) == moved(5, kd_warm_up=1)


def test_whom_agreement_does_not_believe_is_not_heard():
    lie = wise(7).roll(1, dims=1)
    among = heard(wise(5), wise(6), lie, lie.clone())

    student = model()
    trained = learner()
    trained.local(student, round=1, epochs=25)  # a peer that knows enough to tell
    ways = {}
    for name, teachers in {"agreement": among, "none": heard(wise(5), wise(6))}.items():
        ways[name] = copy.deepcopy(student)
        learner(robust=name).learn(ways[name], teachers, round=1, memo={})
    believed = copy.deepcopy(student)
    learner().learn(believed, among, round=1, memo={})

    assert same(ways["agreement"], ways["none"]) and not same(believed, ways["none"])


@pytest.mark.parametrize("settings", [{"robust": "eigentrust"}, {"weighing": "similarity"}, {"regime": "partitioned"}])
def test_what_a_peer_says_itself_is_not_predicted_again_where_it_is_known(settings, monkeypatch):
    own, predicted = predict(model(), data(PROXY, 3)[0]), []
    monkeypatch.setattr(
        "clients.learner.predict", lambda *args, **kwargs: predicted.append(1) or predict(*args, **kwargs)
    )
    told, untold = model(), model()

    learner(**settings).learn(told, heard(wise(5), wise(6)), round=1, memo={}, own=own)
    assert predicted == []
    learner(**settings).learn(untold, heard(wise(5), wise(6)), round=1, memo={})

    assert predicted == [1] and same(told, untold)


def test_a_share_of_a_weight_stays_one_where_agreement_judges():
    weighed = heard(wise(5), wise(6), weights=[1.0, 0.25])
    student = model()
    learner().local(student, round=1, epochs=25)
    with_judge, without = copy.deepcopy(student), copy.deepcopy(student)

    learner(robust="agreement").learn(with_judge, weighed, round=1, memo={})
    learner(robust="none").learn(without, weighed, round=1, memo={})

    assert same(with_judge, without) and not same(without, after(learner(robust="none"), TAUGHT)[0])


def test_partitioned_a_peer_hears_a_teacher_where_that_is_surer_than_itself():
    unsure = heard(wise(5, sharp=0.1), wise(6, sharp=9.0))
    own = predict(model(), data(PROXY, 3)[0])

    student, found = after(learner(regime="partitioned", **PLAIN), unsure)

    expected, alike = after(learner(**PLAIN), Heard(teacher_or_self(unsure.logits, own), unsure.weights))
    assert (same(student, expected) and found == alike) or math.isnan(found["local_loss"])
    assert not same(student, after(learner(**PLAIN), unsure)[0])


TUNED = {"regime": "tuned", "tune_temperatures": "1,6", "tune_weights": "0.2,0.9", "validation_share": 0.2}


def test_tuned_a_peer_takes_what_does_best_on_what_it_held_out():
    def score(temperature, weight):
        student, _ = after(learner(temperature=temperature, kd_weight=weight), lying)
        logits = predict(student, data(30, 2)[0]).double()
        labels = data(30, 2)[1]
        return (logits.argmax(1) == labels).double().mean(), -nn.functional.cross_entropy(logits, labels)

    for lying in (heard(wise(7).roll(1, dims=1)), TAUGHT):  # with bad teachers, and with good ones
        memo = {}
        found = after(learner(**TUNED), lying, memo=memo)[1]
        best = max(itertools.product((1.0, 6.0), (0.2, 0.9)), key=lambda pair: score(*pair))
        assert (found["temperature"], found["kd_weight"]) == best == (memo["temperature"], memo["kd_weight"])


@pytest.mark.parametrize(("every", "due"), [(0, [1]), (1, [1, 2, 3, 4, 5]), (2, [1, 3, 5]), (3, [1, 4])])
def test_a_search_is_made_at_first_and_then_as_often_as_was_asked(every, due):
    made, searched, memo = learner(tune_every=every, **TUNED), [], {}
    for round in range(1, 6):
        if memo:
            memo |= {"temperature": 3.0, "kd_weight": 0.5}  # none of those that a search tries
        found = after(made, TAUGHT, round=round, memo=memo)[1]
        searched += [round] if found["temperature"] != 3.0 else []
    assert searched == due


def test_matched_gradients_are_measured_once_and_kept():
    made, memo = learner(match_gradients=True, divergence="js", **PLAIN), {}
    after(made, TAUGHT, memo=memo)
    own = predict(model(), data(PROXY, 3)[0])
    expected = Distillation.from_config(made.config).matched(own, TAUGHT.logits, TAUGHT.weights)
    assert memo == {"gradient_factor": pytest.approx(expected)}

    student, _ = after(made, TAUGHT, round=2, memo={"gradient_factor": 3.0})
    other, _ = after(made, TAUGHT, round=2, memo={"gradient_factor": 1.0})
    assert not same(student, other)
    assert same(other, after(learner(divergence="js", **PLAIN), TAUGHT, round=2)[0])


def test_merging_teaches_what_the_teachers_know_on_the_proxy_set_of_round_one():
    inputs, labels = data(PROXY, 3)
    made = learner(strategy="fedavg", fedavg_start="distilled", merge_epochs=30)
    student = model()
    made.merge(student, TAUGHT)

    assert (student(inputs).argmax(1) == labels).float().mean() > (model()(inputs).argmax(1) == labels).float().mean()
    again = model()
    learner(5, strategy="fedavg", fedavg_start="distilled", merge_epochs=30).merge(again, TAUGHT)
    assert same(again, student)  # whichever peer does it


def test_merging_is_about_the_subset_that_the_first_knowledge_is_about():
    made = learner(strategy="fedavg", fedavg_start="distilled", merge_epochs=150, proxy_per_round=12, learning_rate=0.5)
    labels = torch.randint(0, CLASSES, (12,), generator=stream(8))  # by no rule that another sample would follow
    student = model()
    made.merge(student, heard(8.0 * nn.functional.one_hot(labels, CLASSES)))

    inputs = data(PROXY, 3)[0]
    said = {t: student(inputs[proxy_subset(made.config, t, "cpu")]).argmax(1) for t in range(4)}
    right = {t: float((top == labels).float().mean()) for t, top in said.items()}
    assert max(right, key=right.get) == 1 and right[1] > 0.6


def test_letters_are_stacked_in_their_order_with_their_weights_and_features():
    one, other = wise(5), wise(6)
    features = [torch.ones(2, 3)]

    plain = stack([(one, 1.0, []), (other, 0.5, [])])
    rich = stack([(one, 1.0, features), (other, 0.5, features)])

    assert torch.equal(plain.logits, torch.stack([one, other])) and plain.weights.tolist() == [1.0, 0.5]
    assert not plain.features and len(rich.features) == 2 and stack([]) is None


# --- whom it believes -------------------------------------------------------------------------------------------------


def experts():
    """Two teachers that know classes 0 and 1 and one that knows the others; what they do not know they take for their
    first."""
    labels = data(PROXY, 3)[1]
    sure, low = 12.0 * nn.functional.one_hot(labels, CLASSES), (labels < 2)[:, None]
    guesses = [
        1.0 * nn.functional.one_hot(torch.full_like(labels, first), CLASSES) - 6.0 * torch.eye(CLASSES)[others].sum(0)
        for first, others in ((0, [2, 3]), (2, [0, 1]))
    ]
    return [torch.where(low, sure, guesses[0]), torch.where(low, sure, guesses[0]), torch.where(low, guesses[1], sure)]


def test_experts_that_are_weighed_by_what_they_speak_of_teach_more_than_their_mean():
    labels, inputs = data(PROXY, 3)[1], data(PROXY, 3)[0]
    how = {
        "distill_epochs": 100,
        "schedule": "alternate",
        "local_epochs": 0,
        "learning_rate": 0.3,
        "teacher_temperature": 0.1,
        "robust": "none",
    }

    right = {
        name: (predict(after(learner(weighing=name, **how), heard(*experts()))[0], inputs).argmax(-1) == labels).sum()
        for name in ("uniform", "predicted-prior", "discrimination")
    }

    assert min(right["predicted-prior"], right["discrimination"]) > right["uniform"] + 1


@pytest.mark.parametrize("divergence", ["kl", "js", "msed", "cakd", "bdkd"])
@pytest.mark.parametrize("regime", ["vanilla", "partitioned", "tuned", "dml"])
def test_every_divergence_and_regime_takes_weights_by_class(divergence, regime):
    made = learner(divergence=divergence, regime=regime, weighing="predicted-prior", teacher_temperature=0.5)

    student, found = after(made, TAUGHT)

    assert math.isfinite(found["kd_loss"]) and all(bool(v.isfinite().all()) for v in student.state_dict().values())


def test_with_uniform_weights_the_teacher_is_the_plain_mean_of_the_probabilities():
    mean = TAUGHT.logits.softmax(-1).mean(0)
    sharper = (mean**2 / (mean**2).sum(-1, keepdim=True)).log()

    plain, at_once = (after(learner(**PLAIN), teachers)[0] for teachers in (TAUGHT, heard(mean.log())))
    sharpened, then = (
        after(learner(**PLAIN, **settings), teachers)[0]
        for settings, teachers in (({"teacher_temperature": 0.5}, TAUGHT), ({}, heard(sharper)))
    )

    for one, other in ((plain, at_once), (sharpened, then)):
        for a, b in zip(one.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert not same(plain, sharpened)


def test_by_default_teachers_are_weighed_by_how_they_discriminate_and_trusted_and_sharpened():
    teachers = heard(*experts(), wise(7).roll(1, dims=1))
    own = predict(model(), data(PROXY, 3)[0])
    weights = eigentrust(teachers.logits, own).reshape(-1, 1, 1) * discrimination(teachers.logits)
    mean = (weights / weights.sum(0) * teachers.logits.softmax(-1)).sum(0)
    teacher = heard((mean.square() / mean.square().sum(-1, keepdim=True)).log())

    by_default, at_once = after(learner(), teachers)[0], after(learner(**PLAIN), teacher)[0]

    for a, b in zip(by_default.parameters(), at_once.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_what_a_peer_says_itself_is_not_weighed_by_the_classes_that_a_teacher_knows():
    """``partitioned``: the student's own rows have one weight for all classes."""
    made = learner(regime="partitioned", weighing="discrimination")
    judged = made._judge(model(), heard(*experts()), 1, None)

    own = (judged.logits != torch.stack(experts())).any(-1)
    rows = judged.placed.expand_as(judged.logits)
    assert bool(own.any()) and bool((~own).any())
    assert bool((rows[own] == rows[own][:, :1]).all()) and bool((rows[~own] != rows[~own][:, :1]).any())


def test_teachers_are_weighed_before_the_student_takes_the_place_of_one():
    """``partitioned`` replaces a teacher's samples by the student's own, of which the teacher never spoke."""
    seen = []

    def spying(evidence):
        seen.append(evidence.logits)
        return torch.ones(len(evidence.logits), 1, 1)

    made = learner(regime="partitioned")
    made.belief = dataclasses.replace(made.belief, name="own", way=Way(spying))
    after(made, TAUGHT)

    assert torch.equal(seen[0], TAUGHT.logits)


def test_what_vacant_classes_are_kept_from_there_is_nothing_of_before_round_1():
    made = learner(vacant_classes=1.0)

    assert made._labelling(model(), 0) is None
    assert made._labelling(model(), 1) is not None
