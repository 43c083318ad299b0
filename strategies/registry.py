"""The strategies by name, and one's own as `package.module:Class`."""

from fedkd.errors import SettingError
from fedkd.plugins import load_callable
from fedkd.settings.config import RunConfig
from strategies.averaged import Averaged
from strategies.consensus import Consensus
from strategies.fedavg import FedAvg
from strategies.gossip import Gossip
from strategies.pairwise import Pairwise
from strategies.strategy import Strategy

STRATEGIES: dict[str, type[Strategy]] = {
    "averaged": Averaged,
    "pairwise": Pairwise,
    "gossip": Gossip,
    "consensus": Consensus,
    "fedavg": FedAvg,
}


def strategy_class(config: RunConfig) -> type[Strategy]:
    """Return the class that a run's `strategy` names.

    The relay imports one's own class; whoever names it has also sent the relay its code, so nothing is opened that
    was closed. Peers read the name and import nothing; a deployed one takes part only if its owner allows that name.

    Raises:
        SettingError: there is no such class, or it is no :class:`~strategies.strategy.Strategy`.
    """
    if config.strategy in STRATEGIES:
        return STRATEGIES[config.strategy]
    found = load_callable(config.strategy, key="strategy")
    if not (isinstance(found, type) and issubclass(found, Strategy)):
        raise SettingError("strategy", config.strategy, "a class derived from strategies.strategy.Strategy")
    return found
