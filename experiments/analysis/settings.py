"""What settings mean to a comparison: which say what data are there, which do anything, and what controls depend on."""

from collections.abc import Iterable, Mapping
from dataclasses import replace

from fedkd.settings.config import RunConfig, recorded
from fedkd.settings.declare import BOOKKEEPING, DATA, EXCHANGE, START, TRAINING, Scalar, declared
from fedkd.settings.effect import idle
from fedkd.settings.rules import numbers

_DECLARED = declared(RunConfig)
SCENARIO_KEYS = tuple(key for key, about in _DECLARED.items() if about.decides in (DATA, START))
"""Settings that say which data and models are there: results under different ones are not compared."""

VARIANT_KEYS = tuple(key for key, about in _DECLARED.items() if about.decides in (TRAINING, EXCHANGE))
"""Settings that set variants apart."""


def label(settings: Mapping[str, Scalar], keys: Iterable[str]) -> str:
    """Return what sets settings apart, leaving out what has no effect under them.

    >>> settings = {"strategy": "averaged", "divergence": "sed", "temperature": 4.0, "reduction": "mean"}
    >>> label(settings, ["divergence", "strategy", "temperature", "reduction"])
    'sed · averaged · temperature 4'
    """
    without, used = _idle(settings), _resolved(settings)
    telling = [key for key in keys if key not in without]
    words = [_word(key, used[key]) for key in telling if used[key] is not False]
    return " · ".join(words or [f"no {key}" for key in telling])


def has_effect(settings: Mapping[str, Scalar], key: str) -> bool:
    """Tell whether a setting does anything under the others.

    >>> has_effect({"topology": "ring", "topology-degree": 4}, "topology-degree")
    False
    """
    return key not in _idle(settings)


def effective(settings: Mapping[str, Scalar], keys: Iterable[str]) -> tuple[Scalar | None, ...]:
    """Return the values of some settings, None for those without an effect: equal where the same is run."""
    without, used = _idle(settings), _resolved(settings)
    return tuple(None if key in without else used[key] for key in keys)


def _resolved(settings: Mapping[str, Scalar]) -> dict[str, Scalar]:
    """Return settings with what three of them stand for: how steps are shared, and by which weight and sharpness."""
    config = config_of(settings)
    if config.strategy == "fedavg":
        return dict(settings)
    return {
        **settings,
        "schedule": "mixed" if config.joint else "alternate",
        "kd-weight": config.distillation_weight,
        "teacher-temperature": config.combined_temperature,
    }


def _idle(settings: Mapping[str, Scalar]) -> dict[str, str]:
    return idle(config_of(settings))


def config_of(settings: Mapping[str, Scalar]) -> RunConfig:
    """Return settings that were checked when their run began; see :func:`recorded` for those that it has not."""
    values = {key.replace("-", "_"): value for key, value in recorded(settings).items()}
    return replace(RunConfig(), **values)


def control_group(settings: Mapping[str, Scalar], name: str) -> tuple[Scalar | None, ...]:
    """Return what a trial's run of a control depends on: equal for two trials whose runs of it would be the same."""
    config = config_of(settings)
    depends = [key for key, about in _DECLARED.items() if name in about.controls(config)]
    # What belongs to the exchange may do nothing there and still count for a control, as epochs do for the pooled one.
    own = [key for key in depends if _DECLARED[key].decides in (EXCHANGE, BOOKKEEPING)]
    shared = [key for key in depends if key not in own]
    tuned = config.regime == "tuned"  # then a part of each peer's data is held out of its control too
    if name == "channel":  # it does what the isolated control does, and is taught as the peer is
        taught = [key for key in own if "isolated" not in _DECLARED[key].controls(config)]
        own = [key for key in own if key not in taught]
        used = effective(config.effective().to_mapping(), taught)
    common = (*effective(settings, shared), *(settings[key] for key in own), *own, tuned)
    if name == "pooled":
        return common
    if name == "channel":
        common = (*common, *used, *taught)
    alone = [value for key, value in settings.items() if key not in depends and _DECLARED[key].decides != BOOKKEEPING]
    repeated = name == "channel" and tuned  # what each peer's search found, which depends on all that it heard
    return (*common, config.joint, *(alone if repeated or _decides_alone(settings) else ()))


def _decides_alone(settings: Mapping[str, Scalar]) -> bool:
    """Tell whether no other trial can know in which rounds a trial's peers train on private data.

    Without a barrier those learn again who answer first; and where labels share the steps, a search may choose a weight
    that leaves none to them.
    """
    searched = settings["regime"] == "tuned" and config_of(settings).joint
    return settings["mode"] == "async" or (searched and max(numbers(str(settings["tune-weights"]))) >= 1)


def control_groups(settings: Mapping[str, Scalar], name: str) -> list[tuple[Scalar | None, ...]]:
    """Return the groups whose control serves a trial, the best first.

    Federated averaging is measured against what the peers' own models reach by themselves, which is what a site would
    have without it: beside an exchange of logits, or else in as many local epochs as it has itself. Only where nobody
    ran either, averaging of one architecture is measured against that architecture alone.
    """
    own = control_group(settings, name)
    if name != "isolated" or settings["strategy"] != "fedavg":
        return [own]
    beside = control_group({**settings, "strategy": "averaged"}, name)
    return list(dict.fromkeys((beside, control_group({**settings, "fedavg-start": "distilled"}, name), own)))


def from_scratch(settings: Mapping[str, Scalar]) -> bool:
    """Tell whether a trial averages a model that knows nothing yet."""
    return settings["strategy"] == "fedavg" and settings["fedavg-start"] == "cold"


def leaves_own_models(settings: Mapping[str, Scalar]) -> bool:
    """Tell whether nothing of the peers' own models is used in a trial, but one architecture for all."""
    return settings["strategy"] == "fedavg" and settings["fedavg-start"] != "distilled"


def _word(key: str, value: Scalar) -> str:
    if isinstance(value, bool):
        return key
    if isinstance(value, int | float):
        return f"{key} {value:g}"
    return value.replace(",", ", ") or f"no {key}"
