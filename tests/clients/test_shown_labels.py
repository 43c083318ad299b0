"""A round with true labels for a teacher, and a calibrated round, against a loop that is written out here."""

import pytest
import torch
from test_learner import CLASSES, PROXY, data, learner, model, same
from torch.nn import functional as F

from clients.data import proxy_subset
from fedkd.seeding import derive

TRUTH = data(PROXY, 3)[1]
CALIBRATED = {"logit_adjustment": 0.7, "vacant_classes": 0.5, "logit_suppression": 0.1}


def shown(made, *, round=3, temperature=1.0, weight=0.5, memo=None):
    made.site.commons.proxy_labels = TRUTH
    student = model()
    memo = {} if memo is None else memo
    made.shown_labels(student, round=round, temperature=temperature, weight=weight, memo=memo)
    return student


def permutations(count, size, seed):
    """Batches as a data loader would give them: a permutation of the data an epoch, the last chunk what is left."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randperm(count, generator=generator).split(size)


def plain_round(made, *, round=3, temperature=1.0, weight=0.5, taught=True, labels_loss=None):
    """Mixed steps by hand, with torch's own optimiser and losses."""
    config, student = made.config, model()
    labels_loss = labels_loss or (lambda student, batch: F.cross_entropy(student(inputs[batch]), labels[batch]))
    inputs, labels, proxy = made.site.inputs, made.site.labels, made.site.commons.proxy_inputs
    subset, seed = proxy_subset(config, round, "cpu"), derive(config.seed, "distil", made.index, round)
    proxy, truth = proxy[subset], TRUTH[subset]
    optimizer = torch.optim.SGD(student.parameters(), lr=config.learning_rate)
    private = (batch for epoch in permutations(len(inputs), 32, derive(seed, "private")) for batch in epoch)
    epochs = permutations(len(proxy), 32, seed)
    for _ in range(config.distill_epochs):
        for batch in next(epochs):
            loss = labels_loss(student, next(private))
            if taught:
                kd = F.cross_entropy(student(proxy[batch]) / temperature, truth[batch])
                loss = weight * kd + (1 - weight) * loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return student


def close(one, other):
    return all(torch.allclose(a, b, atol=1e-6) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("divergence", ["kl", "ce"])
@pytest.mark.parametrize(("temperature", "weight"), [(1.0, 0.5), (4.0, 0.2)])
@pytest.mark.parametrize("subset", [0, 10])
def test_true_labels_are_taught_by_cross_entropy_on_the_rounds_own_batches(divergence, temperature, weight, subset):
    made = learner(divergence=divergence, proxy_per_round=subset, robust="median", sharpen=0.1)
    student = shown(made, temperature=temperature, weight=weight)

    assert close(student, plain_round(made, temperature=temperature, weight=weight))
    assert not close(student, plain_round(made, temperature=temperature, weight=weight, taught=False))


def test_logits_that_labels_have_not_are_compared_by_kl():
    by_mae = shown(learner(divergence="mae", schedule="alternate"), weight=1.0)

    assert same(by_mae, shown(learner(divergence="kl", schedule="alternate"), weight=1.0))


@pytest.mark.parametrize("divergence", ["bdkd", "cakd", "dkd", "jeffreys", "js", "msed", "reverse_kl", "sed", "td"])
def test_under_every_divergence_labels_are_learned(divergence):
    made = learner(divergence=divergence, distill_epochs=40)
    student = shown(made, weight=0.9)

    inputs = made.site.commons.proxy_inputs
    before, after = (F.cross_entropy(m(inputs), TRUTH) for m in (model(), student))
    assert after < before
    assert (student(inputs).argmax(1) == TRUTH).sum() > (model()(inputs).argmax(1) == TRUTH).sum()


def test_the_factor_that_matches_gradients_is_the_labels_own_and_is_kept():
    made, memo = learner(divergence="js", match_gradients=True), {}
    shown(made, memo=memo)

    factor = memo["gradient_factor"]
    assert factor > 1 and not same(shown(made, memo=memo), shown(learner(divergence="js")))
    shown(made, round=5, memo=memo)
    assert memo["gradient_factor"] == factor


def test_a_peer_that_does_not_know_the_labels_cannot_be_asked():
    made = learner()
    made.site.commons.proxy_labels = None
    with pytest.raises(ValueError, match="labels to be known"):
        made.shown_labels(model(), round=1, temperature=1.0, weight=0.5, memo={})


def some_classes(made):
    """Take the last class out of what a peer has."""
    kept = made.site.labels != CLASSES - 1
    made.site.inputs, made.site.labels = made.site.inputs[kept], made.site.labels[kept]
    counts = torch.bincount(made.site.labels, minlength=CLASSES)
    made.shares = (counts + 1) / (counts.sum() + CLASSES)
    return made


def test_a_calibrated_round_by_hand():
    made = some_classes(learner(**CALIBRATED))
    made.site.labels[made.site.labels == 2] = 1  # two vacant classes
    counts = torch.bincount(made.site.labels, minlength=CLASSES)
    made.shares = prior = (counts + 1) / (counts.sum() + CLASSES)
    former, vacant = model()(made.site.inputs).detach(), [2, 3]

    def labels_loss(student, batch):
        z, y = student(made.site.inputs[batch]), made.site.labels[batch]
        adjusted = F.cross_entropy(z + 0.7 * prior.log(), y)
        kept = F.kl_div(
            z[:, vacant].log_softmax(1), former[batch][:, vacant].softmax(1), reduction="batchmean"
        )  # as torch has it
        spread = (z - prior.log() - torch.tensor(float(CLASSES)).log()) * (1 - F.one_hot(y, CLASSES))
        suppressed = (prior * spread.exp().mean(0).log()).sum()
        return adjusted + 0.5 * kept + 0.1 * suppressed

    assert close(shown(made), plain_round(made, labels_loss=labels_loss))
    alone = model()
    made.alone(alone, round=3)
    assert close(alone, plain_round(made, taught=False, labels_loss=labels_loss))


def test_labels_are_smoothed_in_the_labels_loss_and_not_where_they_stand_for_a_teacher():
    made = learner(label_smoothing=0.3)

    def labels_loss(student, batch):
        target = 0.7 * F.one_hot(made.site.labels[batch], CLASSES) + 0.3 / CLASSES
        return -(target * student(made.site.inputs[batch]).log_softmax(1)).sum(1).mean()

    assert close(shown(made), plain_round(made, labels_loss=labels_loss))
    alone = model()
    made.alone(alone, round=3)
    assert close(alone, plain_round(made, taught=False, labels_loss=labels_loss))


def test_before_the_first_round_there_is_nothing_to_keep():
    start, plain, adjusted = model(), model(), model()
    learner(vacant_classes=5.0).local(start, round=0, epochs=2)
    learner().local(plain, round=0, epochs=2)
    learner(logit_adjustment=1.0).local(adjusted, round=0, epochs=2)

    assert same(start, plain) and not same(adjusted, plain)


def test_what_a_model_says_is_not_adjusted():
    """A model that is trained on skewed labels under their prior predicts as if there were as many of each class."""
    made, plain = learner(logit_adjustment=1.0), learner()
    for one in (made, plain):
        rare = torch.arange(len(one.site.labels)) % 5 > 0
        drop = (one.site.labels == 0) & rare
        one.site.inputs, one.site.labels = one.site.inputs[~drop], one.site.labels[~drop]
        counts = torch.bincount(one.site.labels, minlength=CLASSES)
        one.shares = (counts + 1) / (counts.sum() + CLASSES)
    said = []
    for one in (made, plain):
        student = model()
        one.local(student, round=1, epochs=60)
        said.append(student(data(400, 9)[0]).softmax(1)[:, 0].mean())
    assert said[0] > said[1] + 0.02
