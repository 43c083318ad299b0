"""What travels."""

from dataclasses import dataclass
from typing import ClassVar

from fedkd.settings.declare import AGAIN, CHANNEL, EXCHANGE, FREE, KNOWLEDGE, Condition, setting
from fedkd.settings.rules import ANY, EPSILON, NON_EMPTY, above, at_least, between, one_of

_PRIVATE = Condition("privacy-epsilon above 0", lambda c: c.privacy_epsilon > 0)
_NOISED = Condition("privacy-epsilon or counts-noise above 0", lambda c: c.privacy_epsilon > 0 or c.counts_noise > 0)
_COUNTS = Condition("weighing counts", lambda c: c.own_strategy or c.weighing == "counts")
_DENSITY = Condition("weighing density", lambda c: c.own_strategy or c.weighing == "density")
_QUANTILE = Condition("selector kulsif or k-means", lambda c: c.selector in ("kulsif", "k-means"))


@dataclass(frozen=True)
class Travelling:
    """What travels."""

    title: ClassVar[str] = "What travels"

    codec: str = setting(
        "fp32",
        NON_EMPTY,
        "encoding of logits on the wire: `fp32`, `fp16`, `int8` or `topk:K`, with `+zstd` compressed",
        decides=EXCHANGE,
        takes=KNOWLEDGE,
    )
    proxy_per_round: int = setting(
        0,
        at_least(0),
        "proxy samples whose logits travel, drawn anew each round; 0: all",
        decides=EXCHANGE,
        takes=KNOWLEDGE,
        controls=lambda c: AGAIN if c.joint else CHANNEL,
        costs="max-proxy-size",
    )
    sealed: bool = setting(False, ANY, "encrypt knowledge end to end: the relay sees sizes only", decides=EXCHANGE)
    privacy_epsilon: float = setting(
        0.0,
        EPSILON,
        "ε of all knowledge that a peer publishes in the run, by clipping and Gaussian noise; 0: off",
        decides=EXCHANGE,
        costs=FREE,
    )
    privacy_delta: float = setting(
        1e-5, between(1e-12, 0.1), "δ beside every ε", decides=EXCHANGE, takes=_NOISED, costs=FREE
    )
    privacy_clip: float = setting(
        5.0,
        above(0),
        "`privacy-epsilon`: norm to which a sample's logits are clipped",
        decides=EXCHANGE,
        takes=_PRIVATE,
        costs=FREE,
    )
    counts_noise: float = setting(
        0.0,
        at_least(0),
        "`weighing=counts`: noise on the class counts that are told, in multiples of what one record moves; 0: none",
        decides=EXCHANGE,
        takes=_COUNTS,
        costs=FREE,
    )
    density_penalty: float = setting(
        1e-5,
        above(0),
        "`weighing=density`: λ of the regression that tells private samples from public ones; noise takes a larger one",
        decides=EXCHANGE,
        takes=_DENSITY,
        costs=FREE,
    )
    density_noise: float = setting(
        0.0,
        at_least(0),
        "`weighing=density`: noise on its coefficients, as a multiple of 2/(nλ); 0: none",
        decides=EXCHANGE,
        takes=_DENSITY,
        costs=FREE,
    )
    selector: str = setting(
        "none",
        one_of("none", "kulsif", "k-means", "roc"),
        "which proxy samples a peer answers on: all, or those like its private ones; the others do not travel",
        decides=EXCHANGE,
        takes=Condition("peers that combine their teachers themselves", lambda c: c.peers_combine),
        controls=lambda c: CHANNEL if c.selector != "none" else (),  # who sends nothing at all teaches nobody
    )
    selector_quantile: float = setting(
        0.25,
        between(0, 1),
        "`kulsif`, `k-means`: quantile of held-out private samples that a proxy sample has to reach",
        decides=EXCHANGE,
        takes=_QUANTILE,
        costs=FREE,
    )
