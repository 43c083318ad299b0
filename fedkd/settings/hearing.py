"""Who hears whom."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fedkd.settings.declare import (
    AGAIN,
    CHANNEL,
    CODE,
    CONTROLS,
    DISTILS,
    EPOCHS,
    EXCHANGE,
    FREE,
    RELAY_CODE,
    RELAY_PATH,
    Condition,
    setting,
)
from fedkd.settings.rules import NON_EMPTY, STRATEGY, TOPOLOGY, at_least, between, one_of

if TYPE_CHECKING:
    from fedkd.settings.config import RunConfig

_GOSSIP = Condition("strategy gossip", lambda c: c.own_strategy or c.strategy == "gossip")
_ASYNC = Condition("mode async", lambda c: c.mode == "async")
_FEDAVG = Condition("strategy fedavg", lambda c: c.own_strategy or c.strategy == "fedavg")

_NOBODY_ALONE = ("complete", "ring", "torus", "star", "k-regular", "exponential")


def _who_hears(c: "RunConfig") -> tuple[str, ...]:
    """Return what depends on who hears whom: the channel control, unless everybody hears somebody in each round."""
    hears = {
        "averaged": True,
        "pairwise": c.matching == "all",
        "gossip": c.gossip_style != "push",
        "consensus": True,
    }
    always = hears.get(c.strategy, False) and c.topology in _NOBODY_ALONE and c.participation == 1
    return () if always else CHANNEL


@dataclass(frozen=True)
class Hearing:
    """Who hears whom."""

    title: ClassVar[str] = "Who hears whom"

    rounds: int = setting(
        10, at_least(0), "communication rounds", decides=EXCHANGE, controls=CONTROLS, costs="max-rounds"
    )
    strategy: str = setting(
        "averaged",
        STRATEGY,
        "who hears whom and how a peer combines what it hears",
        decides=EXCHANGE,
        controls=_who_hears,
        opens=RELAY_CODE,
    )
    topology: str = setting(
        "complete",
        TOPOLOGY,
        "who is whose neighbour",
        decides=EXCHANGE,
        controls=_who_hears,
        takes=DISTILS,
        opens=RELAY_PATH,
    )
    topology_degree: int = setting(
        4,
        at_least(1),
        "neighbours of a peer under `k-regular` and `small-world`",
        decides=EXCHANGE,
        controls=_who_hears,
        takes=Condition("topology k-regular or small-world", lambda c: c.topology in ("k-regular", "small-world")),
        costs=FREE,
    )
    topology_probability: float = setting(
        0.3,
        between(0, 1),
        "edge or rewiring probability of the random topologies",
        decides=EXCHANGE,
        controls=_who_hears,
        takes=Condition("topology erdos-renyi or small-world", lambda c: c.topology in ("erdos-renyi", "small-world")),
        costs=FREE,
    )
    matching: str = setting(
        "all",
        one_of("all", "round-robin"),
        "`pairwise`: hear every neighbour, or one partner a round",
        decides=EXCHANGE,
        controls=_who_hears,
        takes=Condition("strategy pairwise", lambda c: c.own_strategy or c.strategy == "pairwise"),
    )
    fanout: int = setting(
        1,
        at_least(1),
        "`gossip`: neighbours drawn by each peer in a round",
        decides=EXCHANGE,
        controls=_who_hears,
        takes=_GOSSIP,
        costs=FREE,
    )
    gossip_style: str = setting(
        "pull",
        one_of("pull", "push", "push-pull"),
        "`gossip`: who hears whom after a draw",
        decides=EXCHANGE,
        controls=_who_hears,
        takes=_GOSSIP,
    )
    mode: str = setting(
        "sync",
        one_of("sync", "async"),
        "`gossip`: rounds with a barrier, or new mail for whoever answers",
        decides=EXCHANGE,
    )
    updates: int = setting(
        0,
        at_least(0),
        "`async`: answers after which the run ends; 0: peers × rounds",
        decides=EXCHANGE,
        takes=_ASYNC,
        costs=FREE,
    )
    max_seconds: float = setting(
        0.0,
        at_least(0),
        "`async`: seconds after which the run ends; 0: no limit",
        decides=EXCHANGE,
        takes=_ASYNC,
        costs=FREE,
    )
    participation: float = setting(
        1.0,
        between(0.001, 1),
        "share of the peers that take part in a round",
        decides=EXCHANGE,
        controls=AGAIN,
        costs=FREE,
    )
    consensus: str = setting(
        "fedmd",
        one_of("fedmd", "ds-fl"),
        "`consensus`: the server's mean (a baseline with a server)",
        decides=EXCHANGE,
        takes=Condition("strategy consensus", lambda c: c.own_strategy or c.strategy == "consensus"),
    )
    fedavg_start: str = setting(
        "cold",
        one_of("cold", "pretrained", "distilled"),
        "`fedavg`: start from scratch, from the mean of what each peer pre-trained, or from a model distilled from the "
        "peers' own",
        decides=EXCHANGE,
        takes=_FEDAVG,
        controls=lambda c: AGAIN if c.strategy == "fedavg" else (),
    )
    merge_epochs: int = setting(
        20,
        at_least(1),
        "`fedavg-start=distilled`: epochs over the proxy set in the merging",
        decides=EXCHANGE,
        takes=Condition("fedavg-start distilled under strategy fedavg", lambda c: c.merges),
        epochs=lambda c, kind, _: c.merge_epochs if kind == "merge" else 0,
        costs=EPOCHS,
    )
    fedavg_model: str = setting(
        "cnn-wide",
        NON_EMPTY,
        "`fedavg`: the one architecture that is averaged",
        decides=EXCHANGE,
        takes=_FEDAVG,
        opens=CODE,
        controls=lambda c: AGAIN if c.strategy == "fedavg" and not c.merges else (),
    )
