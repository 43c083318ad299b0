"""Which settings matter only beside which others."""

from collections.abc import Iterator

from fedkd.settings.config import RunConfig, key
from fedkd.settings.rules import STRATEGIES


def idle(config: RunConfig) -> dict[str, str]:
    """Return the keys of the settings that do nothing beside the others, and what each of them takes to do something.

    >>> idle(RunConfig(strategy="gossip"))["topology-degree"]
    'topology k-regular or small-world'
    """
    return {key(name): needs for names, needs, used in _conditions(config) if not used for name in names}


def without_effect(config: RunConfig) -> list[tuple[str, str]]:
    """Return the settings that differ from their defaults and do nothing: their keys, and what they take.

    They are no error, for a comparison gives its settings to all trials alike.

    >>> without_effect(RunConfig(fanout=3, temperature=2.0))
    [('fanout', 'strategy gossip')]
    """
    values, defaults = config.to_mapping(), RunConfig().to_mapping()
    return [(name, needs) for name, needs in idle(config).items() if values[name] != defaults[name]]


def _conditions(c: RunConfig) -> Iterator[tuple[tuple[str, ...], str, bool]]:
    """Yield fields, what has to hold for them to be used, and whether it holds."""
    own = c.strategy not in STRATEGIES  # one's own strategy may read anything
    fedavg = c.strategy == "fedavg"
    logits = not fedavg or c.fedavg_start == "distilled"
    peers_combine = not fedavg and c.strategy != "consensus"
    yield ("partition_alpha",), "partition dirichlet", c.partition == "dirichlet"
    yield ("classes_per_peer",), "partition classes", c.partition == "classes"
    yield ("shared_classes",), "partition overlap", c.partition == "overlap"
    yield ("momentum",), "optimizer sgd", c.optimizer == "sgd"
    yield ("topology_degree",), "topology k-regular or small-world", c.topology in ("k-regular", "small-world")
    random = c.topology in ("erdos-renyi", "small-world")
    yield ("topology_probability",), "topology erdos-renyi or small-world", random
    yield ("matching",), "strategy pairwise", own or c.strategy == "pairwise"
    yield ("fanout", "gossip_style"), "strategy gossip", own or c.strategy == "gossip"
    yield ("updates", "max_seconds"), "mode async", c.mode == "async"
    yield ("consensus",), "strategy consensus", own or c.strategy == "consensus"
    yield ("fedavg_start", "fedavg_model"), "strategy fedavg", own or fedavg
    yield ("merge_epochs",), "fedavg-start distilled under strategy fedavg", fedavg and c.fedavg_start == "distilled"
    yield ("combine",), "strategy gossip, or one's own", own or c.strategy == "gossip"
    yield ("average",), "peers that average their teachers", peers_combine and c.combination == "averaged"
    yield ("reduction",), "peers that combine pairwise", peers_combine and c.combination == "pairwise"
    yield ("trim",), "robust trimmed", c.robust == "trimmed"
    tuned = c.regime == "tuned"
    yield ("tune_temperatures", "tune_weights", "tune_every"), "regime tuned", tuned
    held_out = tuned or c.evaluate_on == "validation"
    yield ("validation_share",), "regime tuned or evaluate-on validation", held_out
    yield ("cakd_alpha", "cakd_beta"), "divergence cakd or dkd", c.divergence in ("cakd", "dkd")
    yield ("cakd_mode", "cakd_strong"), "divergence cakd", c.divergence == "cakd"
    yield ("cakd_top_k",), "divergence cakd and cakd-strong top-k", c.divergence == "cakd" and c.cakd_strong == "top-k"
    yield ("bdkd_delta", "bdkd_rule"), "divergence bdkd", c.divergence == "bdkd"
    flow = "flow_layers", "flow_depth", "flow_dimensions", "flow_weight", "flow_initial", "flow_decay", "flow_variant"
    yield (*flow, "flow_auxiliary"), "method infoflow", c.method == "infoflow"
    yield ("flow_auxiliary_epochs",), "flow-auxiliary true", c.method == "infoflow" and c.flow_auxiliary
    turns = not c.joint or "pooled" in c.controls
    yield ("local_epochs",), "losses that take turns (schedule alternate, not regime dml), or a pooled control", turns
    rounds = "distill_epochs", "kd_warm_up", "match_gradients", "schedule", "regime", "method", "topology"
    yield rounds, "rounds of distillation: not strategy fedavg", not fedavg
    objective = "divergence", "temperature", "kd_weight", "t2_scaling"
    yield (*objective, "codec", "proxy_per_round"), "knowledge that travels: not a cold strategy fedavg", logits
    yield ("attackers",), "an attack", c.attack != "none"
    yield ("privacy_delta", "privacy_clip"), "privacy-epsilon above 0", c.privacy_epsilon > 0
    yield ("staleness_decay",), "max-staleness above 0", c.max_staleness > 0
