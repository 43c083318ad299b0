"""What travels."""

from dataclasses import dataclass
from typing import ClassVar

from fedkd.settings.declare import AGAIN, CHANNEL, EXCHANGE, FREE, KNOWLEDGE, Condition, setting
from fedkd.settings.rules import ANY, EPSILON, NON_EMPTY, above, at_least, between

_PRIVATE = Condition("privacy-epsilon above 0", lambda c: c.privacy_epsilon > 0)


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
        1e-5, between(1e-12, 0.1), "`privacy-epsilon`: its δ", decides=EXCHANGE, takes=_PRIVATE, costs=FREE
    )
    privacy_clip: float = setting(
        5.0,
        above(0),
        "`privacy-epsilon`: norm to which a sample's logits are clipped",
        decides=EXCHANGE,
        takes=_PRIVATE,
        costs=FREE,
    )
