"""What a peer's images and learning rates go through: its controls have the same, and nobody else sees it."""

from types import SimpleNamespace

import pytest
import torch
from federation import federate
from torch import nn

from clients.learner import Heard, Learner
from fedkd.data.normalize import standardizer
from fedkd.data.samples import Samples
from fedkd.results.profile import Stopwatch
from fedkd.settings.config import RunConfig
from fedkd.training.loops import Descent
from fedkd.training.rates import Rates

CLASSES, PRIVATE, PROXY, BATCH = 3, 36, 24, 8
TAUGHT = Heard(torch.zeros(1, PROXY, CLASSES), torch.ones(1))
SCHEDULES = pytest.mark.parametrize("schedule", ["mixed", "alternate"])


def kept(count, seed):
    return torch.randint(256, (count, 1, 8, 8), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def told(count, seed, into):
    """Samples that note what a model is about to see of them."""
    scale = standardizer("none", kept(count, seed))
    return Samples(kept(count, seed), lambda rows: into.append(rows.clone()) or scale(rows))


def learner(index=0, **settings):
    """A peer with images, whose site notes in ``saw`` and ``shown`` what models see of its private ones and of the
    proxy set."""
    saw, shown = [], []
    commons = SimpleNamespace(proxy_inputs=told(PROXY, 2, shown), proxy_labels=torch.arange(PROXY) % CLASSES)
    site = SimpleNamespace(
        inputs=told(PRIVATE, 1, saw), labels=torch.arange(PRIVATE) % CLASSES, commons=commons, saw=saw, shown=shown,
        held_out=SimpleNamespace(inputs=told(12, 3, []), labels=torch.arange(12) % CLASSES),
        label_share=torch.full((CLASSES,), 1 / CLASSES),
    )  # fmt: skip
    changed = {
        "proxy-size": PROXY, "batch-size": BATCH, "optimizer": "sgd", "augment": "crop-flip", "weighing": "uniform",
        "robust": "none", "rounds": 4, **{name.replace("_", "-"): value for name, value in settings.items()},
    }  # fmt: skip
    return Learner(RunConfig.from_mapping(changed), site, index, auxiliary=model, watch=Stopwatch())


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, CLASSES))


def trained(made, way, round=2):
    student = model()
    if way == "peer":
        made.learn(student, TAUGHT, round=round, memo={})
    elif way == "isolated":
        made.alone(student, round=round)
    else:
        made.shown_labels(student, round=round, temperature=1.0, weight=0.5, memo={})
    return student


def saw(way, *, index=0, round=2, **settings):
    made = learner(index, **settings)
    trained(made, way, round)
    return made.site.saw


def alike(one, other):
    return len(one) == len(other) > 0 and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def same(one, other):
    return alike(list(one.state_dict().values()), list(other.state_dict().values()))


@SCHEDULES
@pytest.mark.parametrize("settings", [{}, {"augment_proxy": "crop-flip"}, {"divergence": "js"}])
def test_a_control_sees_the_augmented_images_that_its_peer_saw(schedule, settings):
    peer, isolated, channel = (saw(way, schedule=schedule, **settings) for way in ("peer", "isolated", "channel"))

    assert alike(peer, isolated) and alike(peer, channel)
    assert alike(peer, saw("peer", schedule=schedule))  # whatever becomes of the proxy images, and of the teachers
    assert not alike(peer, saw("peer", schedule=schedule, augment="none"))


@SCHEDULES
def test_every_round_and_every_peer_has_draws_of_its_own(schedule):
    plain, first = (saw("isolated", schedule=schedule, augment=augment) for augment in ("none", "crop-flip"))

    assert not alike(first, saw("isolated", schedule=schedule, round=3))
    assert not alike(first, saw("isolated", schedule=schedule, index=1))
    assert [len(batch) for batch in first] == [len(batch) for batch in plain]
    changed = [(a != b).flatten(1).any(dim=1) for a, b in zip(first, plain, strict=True)]
    assert all(bool(batch.any()) for batch in changed)


def test_the_trials_of_a_search_see_what_the_peer_then_sees():
    seen = saw("peer", regime="tuned", tune_temperatures="1,2", tune_weights="0.5")

    assert alike(seen, 3 * saw("isolated"))


def test_a_student_sees_augmented_proxy_images_of_its_own_and_the_control_the_same():
    peer, channel, other, plain = (learner(index, augment_proxy=augment) for index, augment in (
        (0, "crop-flip"), (0, "crop-flip"), (1, "crop-flip"), (0, "none"),
    ))  # fmt: skip
    for made, way in ((peer, "peer"), (channel, "channel"), (other, "peer"), (plain, "peer")):
        trained(made, way)

    assert alike(peer.site.shown, channel.site.shown)
    assert not alike(peer.site.shown, other.site.shown) and not alike(peer.site.shown, plain.site.shown)


def test_what_a_peer_predicts_it_predicts_of_images_as_they_are():
    made = learner(augment_proxy="crop-flip", robust="eigentrust", vacant_classes=1.0)
    trained(made, "peer")

    whole = [rows for rows in made.site.shown + made.site.saw if len(rows) > BATCH + 1]
    assert alike(whole, [kept(PROXY, 2), kept(PRIVATE, 1)])  # to judge its teachers by, and for its vacant classes


def unchanged(images):
    torch.rand(7)
    return images


@SCHEDULES
def test_draws_take_nothing_from_dropout_and_from_the_order_of_the_batches(schedule):
    own = f"{__name__}:unchanged"
    with_draws = trained(learner(schedule=schedule, augment=own, augment_proxy=own), "peer")

    assert same(with_draws, trained(learner(schedule=schedule, augment="none"), "peer"))


def test_whoever_merges_sees_the_same():
    made = [learner(index, augment_proxy="crop-flip", strategy="fedavg", fedavg_start="distilled") for index in (0, 5)]
    for one in made:
        one.merge(model(), TAUGHT)
    assert alike(made[0].site.shown, made[1].site.shown)


# --- learning rates ---------------------------------------------------------------------------------------------------

COSINE = {"learning_rate_schedule": "cosine", "learning_rate_warm_up": 0.3, "learning_rate": 1.0}


@pytest.fixture
def rates(monkeypatch):
    """The learning rates of all steps."""
    found, step = [], Descent.step

    def noted(descent):
        found.append(descent.learning_rate)
        step(descent)

    monkeypatch.setattr(Descent, "step", noted)
    return found


def of(rates, work):
    rates.clear()
    work()
    return list(rates)


@pytest.mark.parametrize("round", [1, 3])
@pytest.mark.parametrize("over", ["phase", "run"])
@SCHEDULES
def test_a_control_descends_as_fast_as_its_peer_in_the_same_round(rates, schedule, over, round):
    settings = {"schedule": schedule, "learning_rate_over": over, "distill_epochs": 2, **COSINE}
    peer, isolated, channel = (
        of(rates, lambda way=way: trained(learner(**settings), way, round)) for way in ("peer", "isolated", "channel")
    )
    assert peer == channel and len(set(peer)) > 1
    assert isolated == (peer if schedule == "mixed" else peer[6:])  # after six steps on the proxy set


def test_over_a_run_the_rounds_are_one_schedule_in_which_a_missed_one_is_left_out(rates):
    settings = {"schedule": "alternate", "learning_rate_over": "run", **COSINE}
    whole = [Rates("cosine", 0.3).factor(step, 4 * 5) for step in range(4 * 5)]
    found = {t: of(rates, lambda t=t: trained(learner(**settings), "isolated", t)) for t in (4, 1, 2)}

    for round, used in found.items():
        assert used == pytest.approx(whole[5 * (round - 1) : 5 * round])


def test_over_a_phase_each_phase_is_a_schedule(rates):
    found = of(rates, lambda: trained(learner(schedule="alternate", distill_epochs=2, **COSINE), "peer"))
    assert found == pytest.approx(
        [Rates("cosine", 0.3).factor(step, steps) for steps in (6, 5) for step in range(steps)]
    )


def test_what_is_trained_before_the_rounds_is_a_phase_of_its_own(rates):
    one, other = (
        of(rates, lambda s=settings: learner(**s, **COSINE).ahead(model(), epochs=2))
        for settings in ({"learning_rate_over": "run", "rounds": 9}, {"learning_rate_over": "phase"})
    )
    assert one == other == pytest.approx([Rates("cosine", 0.3).factor(step, 10) for step in range(10)])


@pytest.mark.parametrize(
    ("start", "trains"), [("cold", range(4)), ("pretrained", range(1, 4)), ("distilled", (1, 2, 3))]
)
def test_an_average_goes_through_one_schedule_in_the_rounds_in_which_it_is_trained(rates, start, trains):
    settings = {"strategy": "fedavg", "fedavg_start": start, "learning_rate_over": "run", **COSINE}
    found = of(rates, lambda: [learner(**settings).local(model(), round=t, epochs=1) for t in trains])

    steps = 5 * len(trains)
    assert found == pytest.approx([Rates("cosine", 0.3).factor(step, steps) for step in range(steps)])


# --- a run ------------------------------------------------------------------------------------------------------------


def test_a_run_repeats_itself_and_augmented_proxy_images_change_no_control(tmp_path):
    recipe = {
        "augment": "crop-flip", "label_smoothing": 0.1, "gradient_clip": 1.0, "learning_rate_over": "run",
        "learning_rate_schedule": "cosine", "learning_rate_warm_up": 0.1, "controls": "isolated",
    }  # fmt: skip
    first, again, proxy = (
        federate(tmp_path / name, 2, **recipe, augment_proxy=augment)
        for name, augment in (("a", "none"), ("b", "none"), ("c", "crop-flip"))
    )

    assert first.timeless_rows() == again.timeless_rows()
    assert [p["isolated_measures"] for p in first.summary()["peers"]] == [
        p["isolated_measures"] for p in proxy.summary()["peers"]
    ]
    assert first.timeless_rows() != proxy.timeless_rows()
