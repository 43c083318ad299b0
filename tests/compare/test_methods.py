"""What a peer is taught by each method's preset, against loops written from the methods' own formulas."""

import math
from functools import cache

import numpy as np
import pytest
import torch
from federation import federate

from experiments.launch.presets import names, preset
from fedkd.losses.weighing import Evidence
from fedkd.settings.config import RunConfig
from fedkd.training.belief import Belief
from fedkd.training.distillation import Distillation
from fedkd.wire.codecs import codec
from fedkd.wire.messages import Letter, Packed
from strategies.consensus import Consensus
from strategies.relay.mailbox import Mailbox

K, N, C = 4, 11, 5
RNG = np.random.default_rng(7)
TEACHERS = 2 * RNG.standard_normal((K, N, C)).astype(np.float32)
TEACHERS[0, :, 1] -= 6  # who hardly ever speaks of a class
OWN = 2 * RNG.standard_normal((N, C)).astype(np.float32)
STUDENT = 2 * RNG.standard_normal((N, C)).astype(np.float32)
COUNTS = np.array(
    [[9, 0, 3, 1, 0], [0, 0, 5, 5, 2], [4, 0, 0, 1, 7], [1, 0, 2, 0, 0]], np.float32
)  # nobody has class 1
SENT = RNG.random((K, N)) < 0.6
SENT[0] |= ~SENT.any(axis=0)
SCORES = RNG.uniform(0.05, 0.95, (K, N)).astype(np.float32)


def softmax(row):
    shifted = [math.exp(value - max(row)) for value in row]
    return np.array([value / sum(shifted) for value in shifted])


def mean(rows):
    return sum(np.asarray(row, float) for row in rows) / len(rows)


def fedmd(x):
    return mean([*TEACHERS[:, x], OWN[x]])  # logits, the peer's own among them


def ds_fl(x):
    return softmax(mean([softmax(z[x]) for z in [*TEACHERS, OWN]]) / 0.1)


def feddf(x):
    return softmax(mean(TEACHERS[:, x]))


def fedaux(x):
    return softmax(sum(SCORES[k, x] * TEACHERS[k, x].astype(float) for k in range(K)) / sum(SCORES[:, x].astype(float)))


def of_those_that_sent(x):
    return mean([softmax(TEACHERS[k, x]) for k in range(K) if SENT[k, x]])


def by_class(x):
    found = np.zeros(C)
    for c in range(C):
        held = COUNTS[:, c] if COUNTS[:, c].sum() else np.ones(K)  # a class that nobody holds: all alike
        for k in range(K):
            found[c] += held[k] / held.sum() * softmax(TEACHERS[k, x])[c]
    return found / found.sum()


def plain_mean(x):
    return mean([softmax(z[x]) for z in TEACHERS])


def ours(x):
    found = np.zeros(C)
    for c in range(C):
        told = []
        for k in range(K):
            of_class = [softmax(TEACHERS[k, sample])[c] for sample in range(N)]
            middle = sum(of_class) / N
            told.append(math.sqrt(sum((value - middle) ** 2 for value in of_class) / N))
        found[c] = sum(told[k] * softmax(TEACHERS[k, x])[c] for k in range(K)) / sum(told)
    squared = (found / found.sum()) ** 2  # p^(1/τ), τ = ½
    return squared / squared.sum()


def onto_the_simplex(row):
    """Project by bisection on the shift that makes the positive parts sum to 1."""
    low, high = min(row) - 1, max(row)
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(max(value - middle, 0) for value in row) > 1 else (low, middle)
    return np.array([max(value - low, 0) for value in row])


@cache
def kt_pfl_row():
    """Minimise mean KL(Σ c_k p_k ‖ p_own) + ρ‖c − 1/K‖² by projected gradient with differences for slopes."""
    theirs = np.array([[softmax(TEACHERS[k, x] / 10) for x in range(N)] for k in range(K)])
    own = np.array([softmax(OWN[x] / 10) for x in range(N)])

    def cost(row):
        mixed = np.tensordot(row, theirs, 1)
        return (mixed * np.log(mixed / own)).sum() / N + 0.7 * ((row - 1 / K) ** 2).sum()

    row = np.full(K, 1 / K)
    for _ in range(400):
        slope = [(cost(row + 1e-5 * unit) - cost(row - 1e-5 * unit)) / 2e-5 for unit in np.eye(K)]
        row = onto_the_simplex(row - 0.2 * np.array(slope))
    return row


def kt_pfl(x):
    return sum(weight * softmax(TEACHERS[k, x] / 10) for k, weight in enumerate(kt_pfl_row()))


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def complexity(p):
    return math.exp(-sum(a * math.log(a) for a in p))


def js(p, q):
    return kl(p, (p + q) / 2) / 2 + kl(q, (p + q) / 2) / 2


def sed(p, q):
    return complexity((p + q) / 2) / math.sqrt(complexity(p) * complexity(q)) - 1


def msed(members):
    others = math.prod(map(complexity, members)) ** (1 / len(members))
    return (complexity(mean(members)) / others - 1) / (len(members) - 1)


def absolute(teacher, logits):
    return sum(abs(a - b) for a, b in zip(teacher, logits, strict=True)) / C


# By preset: what a peer's teacher says of sample x, the divergence from it, and the temperature of both.
METHODS = {
    "fedmd": (fedmd, absolute, None),
    "ds-fl": (ds_fl, kl, 1),
    "feddf": (feddf, kl, 1),
    "fedaux": (fedaux, kl, 1),
    "selective-fd": (of_those_that_sent, kl, 1),
    "idkd": (of_those_that_sent, kl, 1),
    "kt-pfl": (kt_pfl, kl, 10),
    "by-class": (by_class, kl, 1),
    "sisap-js": (plain_mean, js, 1),
    "sisap-sed": (plain_mean, sed, 1),
    "ours": (ours, kl, 1),
}


def used(name):
    return RunConfig.from_mapping({**preset(name).settings, "proxy-size": N}).effective()


def heard(config):
    """Return what reaches a peer of the others' logits: of a server one letter, else each teacher's."""
    if config.strategy != "consensus":
        return torch.from_numpy(TEACHERS)
    box = Mailbox()
    for peer, logits in enumerate([*TEACHERS, OWN]):
        box.put(peer, Letter(f"peer-{peer}", 0, Packed.of(codec("fp32").encode(logits))))
    (letter,) = Consensus(config, K + 1, C).letters(K, 1, box)
    return torch.from_numpy(codec("fp32").decode(letter.arrays, shape=(N, C)))[None]


def prepared(config):
    """Return the objective, the logits and the weights of the teachers, as a peer has them in a round."""
    logits, tells = heard(config), config.told
    belief, whole = Belief.from_config(config), torch.ones(len(logits))
    certainty = SCORES if "density" in tells else SENT.astype(np.float32) if "mask" in tells else None
    evidence = Evidence(
        logits,
        config.temperature,
        torch.from_numpy(OWN) if belief.needs_own else None,
        torch.from_numpy(COUNTS) if "counts" in tells else None,
        None if certainty is None else torch.from_numpy(certainty),
    )
    placed = belief.by_place(whole, evidence)
    return Distillation.from_config(config), logits, whole if placed is None else placed


def test_every_preset_is_held_against_a_formula():
    assert set(names()) == {*METHODS, "sisap-msed"}


@pytest.mark.parametrize("name", METHODS)
def test_a_peers_teacher_is_the_methods(name):
    expected, _, temperature = METHODS[name]
    distillation, logits, weights = prepared(used(name))

    found = distillation.objective.combine(logits, weights=weights)
    found = found if temperature is None else torch.softmax(found / temperature, -1)

    np.testing.assert_allclose(found.numpy(), [expected(x) for x in range(N)], atol=2e-5)


@pytest.mark.parametrize("name", METHODS)
def test_a_peers_loss_is_the_methods(name):
    teacher, divergence, temperature = METHODS[name]
    distillation, logits, weights = prepared(used(name))

    loss = distillation(torch.from_numpy(STUDENT), distillation.prepare(logits, weights))

    said = [STUDENT[x].astype(float) if temperature is None else softmax(STUDENT[x] / temperature) for x in range(N)]
    assert float(loss) == pytest.approx(mean([[divergence(teacher(x), said[x])] for x in range(N)])[0], rel=1e-4)
    assert distillation.factor == 1


def test_the_loss_of_multi_way_sed_is_that_of_all_at_once():
    distillation, logits, weights = prepared(used("sisap-msed"))

    loss = distillation(torch.from_numpy(STUDENT), distillation.prepare(logits, weights))

    each = [[msed([softmax(STUDENT[x]), *(softmax(z[x]) for z in TEACHERS)])] for x in range(N)]
    assert float(loss) == pytest.approx(mean(each)[0], rel=1e-4)


@pytest.mark.parametrize("name", ["selective-fd", "idkd"])
def test_a_sample_that_nobody_answers_on_teaches_nothing(name, monkeypatch):
    nobody = SENT.copy()
    nobody[:, 3] = False
    monkeypatch.setitem(globals(), "SENT", nobody)
    distillation, logits, weights = prepared(used(name))
    student = torch.from_numpy(STUDENT).requires_grad_()

    distillation(student, distillation.prepare(logits, weights)).backward()

    assert bool((student.grad[3] == 0).all()) and bool((student.grad[4] != 0).any())


TRAINED_ALIKE = {
    "rounds": 1, "optimizer": "adam", "learning_rate": 0.002, "batch_size": 32, "weight_decay": 0.0, "local_epochs": 1,
}  # fmt: skip


@pytest.mark.parametrize("name", names())
def test_peers_learn_by_every_preset(tmp_path, name):
    settings = {key.replace("-", "_"): value for key, value in preset(name).settings.items()}

    run = federate(tmp_path, 3, **{**settings, **TRAINED_ALIKE})

    learned = [row for row in run.rows() if row["round"] == 1]
    assert [row["status"] for row in learned] == ["ok"] * 3
    assert all(math.isfinite(row["kd_loss"]) and row["test_accuracy"] > 0.15 for row in learned)  # chance: 0.1
    assert all(row["teachers"] for row in learned)
