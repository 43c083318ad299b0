"""How a setting is declared: in one place, with all that anything in the project has to know of it.

From a declaration come the check of its value, the tables of the documentation and the defaults in ``pyproject.toml``
(``python -m fedkd.settings`` writes them), what sets the variants of a comparison apart, what its controls depend on,
which pre-trained models trials can share, and what a deployed peer bounds, replaces by its own or refuses.
"""

from collections.abc import Callable
from dataclasses import Field, dataclass, field, fields
from typing import TYPE_CHECKING, Any

from fedkd.plugins import is_callable_spec
from fedkd.settings.rules import Rule, split_list

if TYPE_CHECKING:
    from fedkd.settings.config import RunConfig

Scalar = str | int | float | bool

DATA = "data"
"""Says which data are there: results under different ones are not compared."""
START = "start"
"""Says which models peers come with: not compared either."""
TRAINING = "training"
"""Says how they are trained: with it their starts and their controls change."""
EXCHANGE = "exchange"
"""Says what peers do with one another: what a comparison varies. Their starts know nothing of it."""
MACHINE = "machine"
"""Numbers depend on it, but it is no method: the seed, the device."""
BOOKKEEPING = "bookkeeping"
"""Says when rounds close, what is measured, and what is left where."""
DECIDES = (DATA, START, TRAINING, EXCHANGE, MACHINE, BOOKKEEPING)
"""What a setting can decide."""

SOURCE, FILES, PATH, CODE = "source", "files", "path", "code"
"""What a setting can have a peer open: data (a path or code), files in a comma-separated list, another path, code."""
RELAY_PATH, RELAY_CODE = "relay's path", "relay's code"
"""What the relay alone opens, on the server."""
SIMULATED_CODE = "code, in a simulation"
"""What no deployed peer opens, since it is asked for nothing that it is for."""
OPENS = (SOURCE, FILES, PATH, CODE, RELAY_PATH, RELAY_CODE, SIMULATED_CODE)
"""All of these."""
_NAMES_CODE = (SOURCE, CODE, RELAY_CODE, SIMULATED_CODE)

FREE = "free"
"""Of a quantity on which neither memory nor time nor disk of a peer depends."""
EPOCHS = "max-epochs"
COSTS = (
    EPOCHS, "max-batch-size", "max-proxy-size", "max-image-size", "max-features", "max-rounds", "max-peers",
    "max-threads",
)  # fmt: skip
"""What a setting can cost a deployed peer: its own settings that bound it."""

CONTROLS = ("isolated", "pooled", "channel")
AGAIN = ("isolated", "channel")
"""The controls that do a peer's rounds again."""
CHANNEL = ("channel",)
"""That which is taught in them."""

Controls = Callable[["RunConfig"], tuple[str, ...]]
Epochs = Callable[["RunConfig", str, int], int]


@dataclass(frozen=True)
class Condition:
    """What a setting takes to have an effect.

    Attributes:
        phrase: for people.
        holds: whether the other settings are so.
    """

    phrase: str
    holds: Callable[["RunConfig"], bool]


DISTILS = Condition("rounds of distillation: not strategy fedavg", lambda c: c.strategy != "fedavg")
KNOWLEDGE = Condition(
    "knowledge that travels: not a cold strategy fedavg", lambda c: c.strategy != "fedavg" or c.merges
)


@dataclass(frozen=True)
class Declared:
    """What is known of a setting beside its default.

    Attributes:
        rule: what it may be.
        help: what it means.
        decides: one of :data:`DECIDES`.
        takes: what it takes to have an effect; None: nothing.
        costs: which of a deployed peer's limits bounds it, of :data:`COSTS`, or :data:`FREE`. Every number has one, and
            a list of which each entry costs something.
        epochs: how many epochs it adds to a mail of a kind, in a round.
        beside: another setting that its epochs are multiplied by.
        opens: what it names, if a path or code, of :data:`OPENS`.
        own: the setting of a deployed peer's own that stands in its place there.
        controls: the controls that depend on it, beside other settings.
        absent: what runs did that are older than the setting; None: its default.
    """

    rule: Rule
    help: str
    decides: str
    takes: Condition | None = None
    costs: str = ""
    epochs: Epochs | None = None
    beside: str = ""
    opens: str = ""
    own: str = ""
    controls: Controls = lambda config: ()
    absent: Scalar | None = None

    def names_code(self, value: Scalar) -> bool:
        """Tell whether a value of this setting is code of one's own."""
        named = split_list(value) if isinstance(value, str) and self.opens in _NAMES_CODE else ()
        return any(is_callable_spec(name) for name in named)


def setting(
    default: Scalar,
    rule: Rule,
    help: str,
    *,
    decides: str,
    takes: Condition | None = None,
    costs: str = "",
    epochs: Epochs | None = None,
    beside: str = "",
    opens: str = "",
    own: str = "",
    controls: Controls | tuple[str, ...] | None = None,
    absent: Scalar | None = None,
) -> Any:
    """Declare a setting, as a field of a dataclass; the arguments are those of :class:`Declared`.

    Controls depend on all that decides data, start, training or machine; on other settings where these say so.

    Raises:
        ValueError: a word that means nothing here; a number without a word about its cost.
    """
    if decides not in DECIDES or opens not in ("", *OPENS) or costs not in ("", FREE, *COSTS):
        raise ValueError(f"a setting with unknown words: decides={decides!r}, opens={opens!r}, costs={costs!r}")
    if not costs and isinstance(default, int | float) and not isinstance(default, bool):
        raise ValueError(f"a number needs the limit of a peer that bounds it, of {', '.join(COSTS)}, or {FREE}")
    if controls is None:
        controls = () if decides in (EXCHANGE, BOOKKEEPING) else CONTROLS
    depending = controls if callable(controls) else _always(controls)
    declared = Declared(rule, help, decides, takes, costs, epochs, beside, opens, own, depending, absent)
    return field(default=default, metadata={"declared": declared})


def _always(controls: tuple[str, ...]) -> Controls:
    return lambda config: controls


def declared(config: "type[RunConfig]") -> dict[str, Declared]:
    """Return what is declared of each setting, by its kebab-case key, in the order of their declaration."""
    return {key(spec.name): of(spec) for spec in fields(config)}


def of(spec: "Field[Any]") -> Declared:
    """Return what is declared of a field."""
    found: Declared = spec.metadata["declared"]
    return found


def key(field_name: str) -> str:
    """Return the kebab-case key of a field."""
    return field_name.replace("_", "-")
