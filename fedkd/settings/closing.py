"""When rounds close."""

from dataclasses import dataclass
from typing import ClassVar

from fedkd.settings.declare import AGAIN, BOOKKEEPING, CHANNEL, EXCHANGE, FREE, RELAY_PATH, Condition, setting
from fedkd.settings.rules import ANY, above, at_least, between


@dataclass(frozen=True)
class Closing:
    """When rounds close."""

    title: ClassVar[str] = "Rounds that close"

    round_timeout: float = setting(
        3600.0,
        above(0),
        "seconds after which a round closes with the answers it has",
        decides=BOOKKEEPING,
        controls=AGAIN,
        costs=FREE,
    )
    min_answers: int = setting(
        1, at_least(1), "fewest answers with which a round may close", decides=EXCHANGE, costs=FREE
    )
    max_staleness: int = setting(
        3,
        at_least(0),
        "rounds for which a silent peer's last knowledge still serves",
        decides=EXCHANGE,
        controls=CHANNEL,
        costs=FREE,
    )
    staleness_decay: float = setting(
        0.5,
        between(0, 1),
        "factor on a teacher's weight per round of its knowledge's age",
        decides=EXCHANGE,
        takes=Condition("max-staleness above 0", lambda c: c.max_staleness > 0),
        costs=FREE,
    )
    resume: str = setting(
        "",
        ANY,
        "folder of a run that was stopped, to be continued from its last closed round",
        decides=BOOKKEEPING,
        opens=RELAY_PATH,
    )
