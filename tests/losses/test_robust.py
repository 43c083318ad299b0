"""Poisoned knowledge, and what the defences make of it."""

import itertools

import networkx as nx
import numpy as np
import pytest
import torch
from federation import federate
from hypothesis import given
from hypothesis import strategies as st

from clients.attacks import is_attacker, poison
from fedkd.losses.robust import agreement_weights, eigentrust
from fedkd.settings.config import RunConfig

ATTACKS = ["flip", "noise", "constant", "collude"]


@pytest.mark.parametrize("attack", ATTACKS)
def test_poison_is_well_formed_agrees_with_nothing_true_and_follows_from_the_seed(attack):
    logits = torch.nn.functional.one_hot(torch.arange(1, 10).repeat(30), 10).float() * 6 + torch.randn(270, 10)
    config = RunConfig(attack=attack)

    poisoned = poison(logits, config, index=4, round=2)

    assert poisoned.shape == logits.shape and bool(poisoned.isfinite().all())
    assert (poisoned.argmax(-1) == logits.argmax(-1)).float().mean() < 0.2
    assert torch.equal(poisoned, poison(logits, config, index=4, round=2))
    colludes = torch.equal(poisoned, poison(logits, config, index=3, round=2))
    assert colludes == (attack in ("flip", "constant", "collude"))


def test_attackers_are_the_last_peers():
    config = RunConfig(attack="flip", attackers=0.2)

    assert [i for i in range(10) if is_attacker(config, i, 10)] == [8, 9]
    assert not any(is_attacker(RunConfig(), i, 10) for i in range(10))


@pytest.mark.parametrize(
    ("robust", "attackers"),
    [
        ("median", 0.2),
        ("trimmed", 0.2),
        ("agreement", 0.2),
        ("agreement", 0.4),
        ("eigentrust", 0.2),
        ("eigentrust", 0.4),
    ],
)
@pytest.mark.slow
def test_a_defence_keeps_honest_peers_above_an_undefended_mean(tmp_path, robust, attackers):
    """Some of five peers flip their labels. At 40 % half of a peer's teachers lie, and no median helps."""
    settings = {
        "attack": "flip", "attackers": attackers, "proxy_size": 300, "pretrain_epochs": 12, "rounds": 3,
        "distill_epochs": 6, "models": "mlp", "trim": 0.3, "partition": "dirichlet",
        "weighing": "uniform",
    }  # fmt: skip

    def honest(run):
        return sum(peer["after"] for peer in run.summary()["peers"][:3]) / 3

    undefended = honest(federate(tmp_path / "none", 5, robust="none", **settings))
    defended = honest(federate(tmp_path / robust, 5, robust=robust, **settings))

    assert defended > undefended


def test_agreement_leaves_out_two_colluding_copies_of_five_peers():
    torch.manual_seed(0)
    truth = torch.randint(0, 10, (400,))

    def honest():
        logits = torch.nn.functional.one_hot(truth, 10).float() * 4 + torch.randn(400, 10) * 1.5
        return logits

    flipped = torch.nn.functional.one_hot((truth + 1) % 10, 10).float() * 9
    teachers = torch.stack([honest(), honest(), flipped, flipped])

    assert agreement_weights(teachers, honest()).tolist() == [1, 1, 0, 0]


def predictions(classes):
    """Logits whose top classes these are."""
    return torch.nn.functional.one_hot(torch.as_tensor(classes), 4).float()


@given(data=st.data(), teachers=st.integers(1, 6), samples=st.sampled_from([4, 16]))
def test_agreement_believes_whom_an_independent_calculation_does(data, teachers, samples):
    """The rule of the docstring in numpy; with 4 classes and 4 or 16 samples every number of it is exact."""
    rows = st.lists(st.integers(0, 3), min_size=samples, max_size=samples)
    truth = np.array(data.draw(rows))
    noise = np.array(
        [data.draw(st.lists(st.booleans(), min_size=samples, max_size=samples)) for _ in range(teachers + 1)]
    )
    lies = np.array([data.draw(rows) for _ in range(teachers + 1)])
    top = np.where(noise, lies, truth)  # the last row is the peer itself

    scores = []
    for one in range(teachers):
        others = sorted(np.mean(top[one] == top[other]) for other in range(teachers + 1) if other != one)
        above = [share for share in others if sum(other >= share for other in others) >= (len(others) + 1) // 2]
        scores.append(max(above) - 0.25)  # the least share that half of them reach, or the upper one of two
    best = max(scores)
    expected = [float(score >= best / 2) if best > 0 else 1.0 for score in scores]

    found = agreement_weights(predictions(top[:-1]), predictions(top[-1]))

    assert found.tolist() == expected


@given(seed=st.integers(0, 2**32 - 1), teachers=st.integers(2, 6))
def test_agreement_knows_neither_the_order_of_teachers_nor_the_names_of_classes_nor_how_sure_they_are(seed, teachers):
    stream = torch.Generator().manual_seed(seed)
    logits = torch.randn(teachers + 1, 16, 4, generator=stream)
    logits[: teachers // 2 + 1, :, 0] += 2  # some that agree
    order, classes = torch.randperm(teachers, generator=stream), torch.randperm(4, generator=stream)

    found = agreement_weights(logits[:-1], logits[-1])

    assert set(found.tolist()) <= {0.0, 1.0} and found.any()
    assert torch.equal(agreement_weights(logits[:-1][order], logits[-1]), found[order])
    assert torch.equal(agreement_weights(logits[:-1][..., classes], logits[-1][..., classes]), found)
    assert torch.equal(agreement_weights(3 * logits[:-1] + 1, 0.5 * logits[-1]), found)


@pytest.mark.parametrize(("wrong", "believed"), [(0, 1), (5, 1), (6, 1), (7, 0), (16, 0)])
def test_a_teacher_half_as_good_beyond_chance_as_the_best_is_still_believed(wrong, believed):
    """Three that are right: 12/16 beyond the chance of 4/16. With 6 errors a teacher is 6/16 beyond it."""
    truth = torch.arange(16) % 4
    doubtful = truth.clone()
    doubtful[:wrong] = (doubtful[:wrong] + 1) % 4

    found = agreement_weights(predictions(torch.stack([truth, truth, doubtful])), predictions(truth))

    assert found.tolist() == [1, 1, believed]


def test_where_nobody_agrees_beyond_chance_all_are_believed():
    """Teachers each of whom is alone with its opinion: there is no majority to trust, and none is thrown out."""
    alone = torch.stack([torch.full((16,), one) for one in range(3)])

    assert agreement_weights(predictions(alone), predictions(torch.full((16,), 3))).tolist() == [1, 1, 1]
    # Exactly at chance: each pair shares a quarter of the samples.
    quarter = torch.stack([torch.arange(16) % 4, torch.arange(16) // 4])
    assert agreement_weights(
        predictions(quarter), predictions((torch.arange(16) % 4 + torch.arange(16) // 4) % 4)
    ).all()


def pagerank(said, own_share):
    """Trust by networkx: a personalised PageRank of squared correlations, which are numpy's, class by class."""
    count, _, classes = said.shape
    own, graph = count - 1, nx.DiGraph()
    graph.add_nodes_from(range(count))
    centred = [[said[k, :, c] - said[k, :, c].mean() for c in range(classes)] for k in range(count)]
    for j, k in itertools.permutations(range(count), 2):
        together = sum(float(np.dot(a, b)) for a, b in zip(centred[j], centred[k], strict=True))
        norm = sum(float(np.linalg.norm(a) * np.linalg.norm(b)) for a, b in zip(centred[j], centred[k], strict=True))
        if norm > 1e-9 and together > 0:
            graph.add_edge(j, k, weight=(together / norm) ** 2)
    means = [degree / own for _, degree in graph.out_degree(weight="weight")]
    typical = sorted(means[:-1])[(own - 1) // 2]
    alone = min(1.0, means[-1] / typical / 0.5) if typical else float(means[-1] > 0)
    begin = dict.fromkeys(range(own), (1 - alone) / own) | {own: alone}
    ranks = nx.pagerank(graph, alpha=1 - own_share, personalization=begin, dangling=begin, tol=1e-13, max_iter=10_000)
    trust = np.array([ranks[k] for k in range(own)])
    return trust / trust.max()


@given(
    seed=st.integers(0, 2**32 - 1),
    teachers=st.integers(1, 6),
    own_share=st.sampled_from([0.2, 0.5, 0.9]),
    silent=st.sampled_from([None, "own", "first"]),
    knows=st.booleans(),
)
def test_eigentrust_is_a_personalised_pagerank_of_squared_correlations(seed, teachers, own_share, silent, knows):
    stream = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(teachers + 1, 12, 3, generator=stream)
    logits[: teachers // 2 + 1] += 3 * torch.eye(3).repeat(4, 1)
    logits[-1] += 3 * torch.eye(3).repeat(4, 1) * knows
    if silent:  # says the same of everything, and agrees with nobody
        logits[-1 if silent == "own" else 0] = torch.tensor([5.0, 0.0, 0.0])

    found = eigentrust(logits[:-1], logits[-1], temperature=1.5, own_share=own_share)

    said = torch.softmax(logits.double() / 1.5, dim=-1).numpy()
    np.testing.assert_allclose(found.numpy(), pagerank(said, own_share), atol=2e-5)


def test_a_whisper_is_compared_as_a_shout_is():
    """Teachers that hardly lean to any class, on few samples, still agree or do not."""
    stream = torch.Generator().manual_seed(3)
    logits = 0.05 * torch.randn(5, 4, 3, generator=stream) + 0.1 * torch.eye(3)[[0, 1, 2, 0]]
    found = eigentrust(logits[:-1], logits[-1], temperature=1.0, own_share=0.5)
    np.testing.assert_allclose(found.numpy(), pagerank(torch.softmax(logits.double(), dim=-1).numpy(), 0.5), atol=2e-5)
    assert len(set(found.tolist())) > 2


def test_a_peer_that_knows_nothing_believes_all_alike():
    """Its own chance agreement is not where trust begins: else a liar may have all of it."""
    stream = torch.Generator().manual_seed(2)
    truth = torch.arange(300) % 5
    honest = 4 * torch.nn.functional.one_hot(truth, 5) + torch.randn(7, 300, 5, generator=stream)
    liars = honest[:2].roll(1, dims=-1)
    teachers = torch.cat([honest, liars])

    for _ in range(20):
        knows_nothing = torch.randn(5, 5, generator=stream)[truth] + torch.randn(300, 5, generator=stream)
        trust = eigentrust(teachers, knows_nothing)
        assert trust[:7].min() > 0.8
    assert eigentrust(teachers, honest[0])[7:].max() < 0.01


@pytest.mark.parametrize("attack", [*ATTACKS, "boast", "boast-all"])
def test_experts_for_other_classes_are_trusted_and_liars_are_not(attack):
    """Seven peers who each know three of ten classes, as neighbours on a ring do; two of nine lie together."""
    stream = torch.Generator().manual_seed(0)
    truth = torch.arange(400) % 10
    experts = []
    for k in range(7):
        known = {(k + i) % 10 for i in range(4)}
        margin = torch.tensor([5.0 if int(label) in known else 0.0 for label in truth]).unsqueeze(-1)
        seen = torch.tensor([0.0 if c in known else -3.0 for c in range(10)])
        truly = torch.nn.functional.one_hot(truth, 10)
        experts.append(margin * truly + seen + torch.randn(400, 10, generator=stream))
    config = RunConfig(attack=attack, seed=1)
    liars = [poison(experts[k], config, index=7 + k, round=1) for k in range(2)]

    trust = eigentrust(torch.stack([*experts[1:], *liars]), experts[0])

    assert trust[:6].min() > 3 * trust[6:].max()
    if attack in ("boast", "constant"):
        assert trust[6:].max() == 0
    believed = agreement_weights(torch.stack([*experts[1:], *liars]), experts[0])
    assert believed[:6].min() == 0  # the other rule takes an expert for a liar


def test_a_long_letter_is_looked_at_in_blocks(monkeypatch):
    stream = torch.Generator().manual_seed(4)
    logits = torch.randn(5, 50, 3, generator=stream) + 2 * torch.randn(50, 3, generator=stream)
    at_once = eigentrust(logits[:-1], logits[-1])

    monkeypatch.setattr("fedkd.losses.robust._BLOCK", 100)

    torch.testing.assert_close(eigentrust(logits[:-1], logits[-1]), at_once)


def test_a_letter_of_numbers_beyond_all_softmax_is_not_trusted_and_spoils_nothing():
    stream = torch.Generator().manual_seed(4)
    logits = torch.randn(4, 30, 3, generator=stream) + 3 * torch.eye(3).repeat(10, 1)
    mad = torch.full((30, 3), 3e38)
    mad[::2, 0] = -3e38

    found = eigentrust(torch.stack([*logits[1:], mad]), logits[0], temperature=0.5)

    assert found[3] == 0
    torch.testing.assert_close(found[:3], eigentrust(logits[1:], logits[0], temperature=0.5))


def test_eigentrust_knows_neither_the_order_of_teachers_nor_the_names_of_classes_nor_constants():
    stream = torch.Generator().manual_seed(3)
    logits = torch.randn(6, 20, 4, generator=stream)
    logits[:4, :, 0] += torch.randn(20, generator=stream)
    order, classes = torch.randperm(5, generator=stream), torch.randperm(4, generator=stream)

    found = eigentrust(logits[:-1], logits[-1])

    torch.testing.assert_close(eigentrust(logits[:-1][order], logits[-1]), found[order])
    torch.testing.assert_close(eigentrust(logits[:-1][..., classes], logits[-1][..., classes]), found)
    torch.testing.assert_close(eigentrust(logits[:-1] + 7, logits[-1] - 2), found)


def test_copies_of_a_liar_have_no_more_than_honest_peers_give_them():
    """Colluders, a few less than half: what flows to them begins at the peer."""
    stream = torch.Generator().manual_seed(5)
    honest = 4 * torch.eye(4).repeat(50, 1) + torch.randn(7, 200, 4, generator=stream)
    liar = 4 * torch.nn.functional.one_hot(torch.randint(4, (200,), generator=stream), 4).float()

    def trusted(copies):
        trust = eigentrust(torch.stack([*honest[1:], *[liar] * copies]), honest[0])
        return trust[6:].sum() / trust.sum()

    assert trusted(5) < 0.1 and trusted(1) < 0.01


@pytest.mark.parametrize("own_share", [0.0, -1.0, 1.5])
def test_a_share_that_is_none_is_refused(own_share):
    with pytest.raises(ValueError, match="own_share"):
        eigentrust(torch.zeros(2, 3, 4), torch.zeros(3, 4), own_share=own_share)


def test_where_nobody_says_anything_all_are_trusted_alike():
    assert eigentrust(torch.zeros(3, 5, 4), torch.zeros(5, 4)).tolist() == [1.0, 1.0, 1.0]
