"""What a peer does with what it hears."""

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
    KNOWLEDGE,
    TRAINING,
    Condition,
    setting,
)
from fedkd.settings.rules import (
    ANY,
    AUGMENTATION,
    DIVERGENCE,
    NUMBERS,
    TEACHER_TEMPERATURE,
    TEMPERATURE_LIST,
    TEMPERATURES,
    WEIGHING,
    WEIGHT,
    above,
    at_least,
    between,
    one_of,
)

if TYPE_CHECKING:
    from fedkd.settings.config import RunConfig

_FORMER_DP = "partitioned (it was `dp` before, which is no differential privacy: for that see `privacy-epsilon`)"
PEERS_COMBINE = Condition("peers that combine their teachers themselves", lambda c: c.peers_combine)
_TUNED = Condition("regime tuned", lambda c: c.regime == "tuned")
_DECOUPLED = Condition("divergence cakd or dkd", lambda c: c.divergence in ("cakd", "dkd"))
_CAKD = Condition("divergence cakd", lambda c: c.divergence == "cakd")
_BALANCED = Condition("divergence bdkd", lambda c: c.divergence == "bdkd")
_INFOFLOW = Condition("method infoflow", lambda c: c.method == "infoflow")


def _local_epochs(c: "RunConfig", kind: str, round: int) -> int:
    if kind == "start":
        return c.local_epochs if c.cold else 0
    if c.joint:
        return 0
    if kind == "isolated":
        return _again(c, round) * max(1, c.local_epochs)
    return c.local_epochs * (1 + c.searches) if kind == "learn" else 0


def _distill_epochs(c: "RunConfig", kind: str, round: int) -> int:
    if kind == "isolated" and c.joint:
        return _again(c, round) * max(1, c.distill_epochs)
    return c.distill_epochs * (1 + c.searches) if kind == "learn" and c.strategy != "fedavg" else 0


def _auxiliary_epochs(c: "RunConfig", kind: str, round: int) -> int:
    return c.flow_auxiliary_epochs if kind == "learn" and c.method == "infoflow" and c.flow_auxiliary else 0


def _again(c: "RunConfig", round: int) -> int:
    """Return how many rounds an isolated control does again; without a barrier a peer may do more than `rounds`."""
    return max(c.rounds, round)


@dataclass(frozen=True)
class Learning:
    """What a peer does with what it hears."""

    title: ClassVar[str] = "What a peer does with what it hears"

    divergence: str = setting(
        "kl",
        DIVERGENCE,
        "loss between student and teacher",
        decides=EXCHANGE,
        controls=CHANNEL,
        takes=KNOWLEDGE,
        opens=CODE,
    )
    temperature: float = setting(
        1.0,
        between(*TEMPERATURES),
        "softmax temperature of both sides",
        decides=EXCHANGE,
        controls=CHANNEL,
        takes=KNOWLEDGE,
        costs=FREE,
    )
    kd_weight: float = setting(
        -1.0,
        WEIGHT,
        "weight of the distillation loss, under `mixed` the α of (1−α)·CE + α·KD; "
        "-1: 0.5 under `mixed`, 1 under `alternate` and `dml`",
        decides=EXCHANGE,
        controls=CHANNEL,
        takes=KNOWLEDGE,
        costs=FREE,
    )
    t2_scaling: bool = setting(
        False,
        ANY,
        "multiply the distillation loss by the temperature squared",
        decides=EXCHANGE,
        controls=CHANNEL,
        takes=KNOWLEDGE,
    )
    match_gradients: bool = setting(
        False,
        ANY,
        "scale the distillation loss so that its first gradient has the norm of `kl`'s",
        decides=EXCHANGE,
        controls=CHANNEL,
        takes=DISTILS,
    )
    combine: str = setting(
        "averaged",
        one_of("averaged", "pairwise"),
        "`gossip`, one's own strategy: how a peer combines its teachers",
        decides=EXCHANGE,
        takes=Condition("strategy gossip, or one's own", lambda c: c.own_strategy or c.strategy == "gossip"),
    )
    average: str = setting(
        "probs",
        one_of("probs", "logits"),
        "what `averaged` averages over the teachers",
        decides=EXCHANGE,
        takes=Condition("peers that average their teachers", lambda c: c.peers_combine and c.combination == "averaged"),
    )
    reduction: str = setting(
        "mean",
        one_of("mean", "sum"),
        "how `pairwise` adds up one divergence per teacher",
        decides=EXCHANGE,
        takes=Condition("peers that combine pairwise", lambda c: c.peers_combine and c.combination == "pairwise"),
    )
    weighing: str = setting(
        "discrimination",
        WEIGHING,
        "how much each teacher counts, for each proxy sample and class; `uniform`: all alike, as most papers have it",
        decides=EXCHANGE,
        takes=PEERS_COMBINE,
        opens=CODE,
        absent="uniform",
    )
    teacher_temperature: float = setting(
        -1.0,
        TEACHER_TEMPERATURE,
        "τ by which the teachers are sharpened once they are combined, p^(1/τ); 1: as they are; "
        "-1: 0.5, or 1 under `weighing=uniform` and beside `sharpen`",
        decides=EXCHANGE,
        takes=PEERS_COMBINE,
        costs=FREE,
        absent=1.0,
    )
    sharpen: float = setting(
        0.0, at_least(0), "`averaged`: ERA temperature that sharpens the teacher; 0: off", decides=EXCHANGE, costs=FREE
    )
    robust: str = setting(
        "eigentrust",
        one_of("none", "median", "trimmed", "agreement", "eigentrust"),
        "defence against poisoned knowledge; `median` and `trimmed` where peers average their teachers",
        decides=EXCHANGE,
        takes=Condition(
            "peers that combine their teachers themselves, and, for eigentrust, no selector",
            lambda c: c.peers_combine and (c.robust != "eigentrust" or c.selector == "none"),
        ),
        absent="none",
    )
    trim: float = setting(
        0.2,
        between(0, 0.49),
        "`trimmed`: share of the teachers cut at each end",
        decides=EXCHANGE,
        takes=Condition("robust trimmed", lambda c: c.robust == "trimmed"),
        costs=FREE,
    )
    regime: str = setting(
        "vanilla",
        one_of("vanilla", "tuned", "dml", "partitioned", former={"dp": _FORMER_DP}),
        "how teacher, student and labels are weighed",
        decides=EXCHANGE,
        controls=CHANNEL,
        takes=DISTILS,
    )
    tune_temperatures: str = setting(
        "1,2,4,8,16",
        TEMPERATURE_LIST,
        "`tuned`: temperatures tried",
        decides=EXCHANGE,
        takes=_TUNED,
        costs=EPOCHS,
    )
    tune_weights: str = setting(
        "0.1,0.3,0.5,0.7,0.9,1",
        NUMBERS,
        "`tuned`: weights tried",
        decides=EXCHANGE,
        takes=_TUNED,
        epochs=lambda c, kind, _: c.searches if kind == "learn" else 0,
        beside="tune-temperatures",
        costs=EPOCHS,
    )
    tune_every: int = setting(
        0,
        at_least(0),
        "`tuned`: search again every n rounds; 0: before round 1 only",
        decides=EXCHANGE,
        takes=_TUNED,
        costs=FREE,
    )
    validation_share: float = setting(
        0.2,
        between(0.01, 0.9),
        "`tuned`: share of the private data that is held out before the start, unless a `held-out` part is known",
        decides=TRAINING,
        takes=Condition("regime tuned or evaluate-on validation", lambda c: c.holds_out),
        controls=lambda c: CONTROLS if c.holds_out else (),
        costs=FREE,
    )
    cakd_alpha: float = setting(
        1.0,
        at_least(0),
        "`cakd`, `dkd`: weight of the strongly correlated classes' part",
        decides=EXCHANGE,
        controls=CHANNEL,
        takes=_DECOUPLED,
        costs=FREE,
    )
    cakd_beta: float = setting(
        8.0,
        at_least(0),
        "`cakd`, `dkd`: weight of the other classes' part",
        decides=EXCHANGE,
        controls=CHANNEL,
        takes=_DECOUPLED,
        costs=FREE,
    )
    cakd_mode: str = setting(
        "free",
        one_of("free", "scaled"),
        "`cakd`: `scaled` is KL at α = β = 1",
        decides=EXCHANGE,
        controls=CHANNEL,
        takes=_CAKD,
    )
    cakd_strong: str = setting(
        "top-k",
        one_of("top-k", "label"),
        "`cakd`: strong classes are the teacher's top k, or its top one alone",
        decides=EXCHANGE,
        controls=CHANNEL,
        takes=_CAKD,
    )
    cakd_top_k: int = setting(
        2,
        at_least(1),
        "`cakd`: how many under `top-k`",
        decides=EXCHANGE,
        controls=CHANNEL,
        takes=Condition(
            "divergence cakd and cakd-strong top-k", lambda c: c.divergence == "cakd" and c.cakd_strong == "top-k"
        ),
        costs=FREE,
    )
    bdkd_delta: float = setting(
        2.0,
        above(0),
        "`bdkd`: weight of the favoured direction; 1 is Jeffreys",
        decides=EXCHANGE,
        controls=CHANNEL,
        takes=_BALANCED,
        costs=FREE,
    )
    bdkd_rule: str = setting(
        "sharpen_if_flat",
        one_of("sharpen_if_flat", "opposite", "none"),
        "`bdkd`: which direction is favoured when",
        decides=EXCHANGE,
        controls=CHANNEL,
        takes=_BALANCED,
    )
    kd_warm_up: int = setting(
        0,
        at_least(0),
        "rounds over which the distillation loss grows linearly to its weight",
        decides=EXCHANGE,
        controls=CHANNEL,
        takes=DISTILS,
        costs=FREE,
    )
    norm_statistics: str = setting(
        "both",
        one_of("both", "private"),
        "of which batches batch normalisation takes its running statistics: private and proxy ones, or `private` ones "
        "alone, for sites whose images look unlike the proxy set's",
        decides=EXCHANGE,
        controls=CHANNEL,
        takes=DISTILS,
    )
    augment_proxy: str = setting(
        "none",
        AUGMENTATION,
        "as `augment`, of the proxy images that a student learns on; its teachers spoke of the plain ones",
        decides=EXCHANGE,
        controls=CHANNEL,
        takes=KNOWLEDGE,
        opens=CODE,
    )


@dataclass(frozen=True)
class InformationFlow:
    """How features of chosen layers are learned from, beside the logits."""

    title: ClassVar[str] = "Information flow"

    method: str = setting(
        "logits",
        one_of("logits", "infoflow"),
        "`infoflow`: peers exchange projected features beside the logits",
        decides=EXCHANGE,
        takes=DISTILS,
    )
    flow_layers: str = setting(
        "",
        ANY,
        "`infoflow`: layer names, first to last; empty: evenly spread over the model",
        decides=EXCHANGE,
        takes=_INFOFLOW,
        costs="max-features",
    )
    flow_depth: int = setting(
        3,
        between(1, 64),
        "`infoflow`: how many layers are spread",
        decides=EXCHANGE,
        takes=_INFOFLOW,
        costs="max-features",
    )
    flow_dimensions: int = setting(
        64,
        between(2, 4096),
        "`infoflow`: features per layer that travel, by random projection",
        decides=EXCHANGE,
        takes=_INFOFLOW,
        costs="max-features",
    )
    flow_weight: float = setting(
        1.0,
        at_least(0),
        "`infoflow`: weight of the flow loss beside the logits' loss",
        decides=EXCHANGE,
        takes=_INFOFLOW,
        costs=FREE,
    )
    flow_initial: float = setting(
        100.0,
        at_least(0),
        "`infoflow`: weight of all layers but the last in round 1",
        decides=EXCHANGE,
        takes=_INFOFLOW,
        costs=FREE,
    )
    flow_decay: float = setting(
        0.7,
        between(0.001, 1),
        "`infoflow`: its factor per round (the critical-phase schedule)",
        decides=EXCHANGE,
        takes=_INFOFLOW,
        costs=FREE,
    )
    flow_variant: str = setting(
        "paper",
        one_of("paper", "code"),
        "`infoflow`: the paper's formula, or its code's",
        decides=EXCHANGE,
        takes=_INFOFLOW,
    )
    flow_auxiliary: bool = setting(
        False,
        ANY,
        "`infoflow`: learn through an auxiliary teacher, the peer's own model at double width",
        decides=EXCHANGE,
        takes=_INFOFLOW,
    )
    flow_auxiliary_epochs: int = setting(
        20,
        at_least(1),
        "`flow-auxiliary`: its epochs over the proxy set per round",
        decides=EXCHANGE,
        takes=Condition("flow-auxiliary true", lambda c: c.method == "infoflow" and c.flow_auxiliary),
        epochs=_auxiliary_epochs,
        costs=EPOCHS,
    )


@dataclass(frozen=True)
class Course:
    """What a round is made of."""

    title: ClassVar[str] = "The course of a round"

    schedule: str = setting(
        "mixed",
        one_of("alternate", "mixed"),
        "distil, then train on private data; or both losses in every step. `consensus` alternates, as its papers do, "
        "unless `kd-weight` is given",
        decides=EXCHANGE,
        controls=CHANNEL,
        takes=DISTILS,
    )
    distill_epochs: int = setting(
        2,
        at_least(0),
        "epochs over the proxy set per round",
        decides=EXCHANGE,
        takes=DISTILS,
        controls=lambda c: AGAIN if c.joint else CHANNEL,
        epochs=_distill_epochs,
        costs=EPOCHS,
    )
    local_epochs: int = setting(
        1,
        at_least(0),
        "epochs over private data per round; `mixed` does not use it",
        decides=EXCHANGE,
        takes=Condition(
            "losses that take turns (schedule alternate, not regime dml), or a pooled control",
            lambda c: not c.joint or "pooled" in c.controls,
        ),
        controls=lambda c: ("pooled",) if c.joint else CONTROLS,
        epochs=_local_epochs,
        costs=EPOCHS,
    )


@dataclass(frozen=True)
class Attacks:
    """What hostile peers do, in a simulation."""

    title: ClassVar[str] = "Attacks, in simulation"

    attack: str = setting(
        "none",
        one_of("none", "flip", "noise", "constant", "collude", "boast", "boast-all"),
        "what simulated attackers do to their knowledge",
        decides=EXCHANGE,
    )
    attackers: float = setting(
        0.2,
        between(0, 0.9),
        "share of the peers that attack, the last ones",
        decides=EXCHANGE,
        takes=Condition("an attack", lambda c: c.attack != "none"),
        costs=FREE,
    )
