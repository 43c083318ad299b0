"""Which settings matter only beside which others."""

from fedkd.settings.config import RunConfig
from fedkd.settings.declare import declared


def idle(config: RunConfig) -> dict[str, str]:
    """Return the keys of the settings that do nothing beside the others, and what each of them takes to do something.

    >>> idle(RunConfig(strategy="gossip"))["topology-degree"]
    'topology k-regular or small-world'
    """
    conditions = {name: about.takes for name, about in declared(RunConfig).items()}
    return {name: takes.phrase for name, takes in conditions.items() if takes and not takes.holds(config)}


def without_effect(config: RunConfig) -> list[tuple[str, str]]:
    """Return the settings that differ from their defaults and do nothing: their keys, and what they take.

    They are no error, for a comparison gives its settings to all trials alike.

    >>> without_effect(RunConfig(fanout=3, temperature=2.0))
    [('fanout', 'strategy gossip')]
    """
    values, defaults = config.to_mapping(), RunConfig().to_mapping()
    return [(name, needs) for name, needs in idle(config).items() if values[name] != defaults[name]]
