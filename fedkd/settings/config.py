"""The settings of a run: typed, checked once at the edge, written down in one place.

Flower hands a run's settings over as a flat mapping of kebab-case keys to ``str | int | float | bool``;
:meth:`RunConfig.from_mapping` turns it into a frozen dataclass or raises a
:class:`~fedkd.errors.SettingError` that names the key, the value and what is allowed. The table in the
README and the defaults in ``pyproject.toml`` are checked against this module by the tests.

What only a peer can know (can one's own code be imported, does the checkpoint fit, are there that many classes) is
checked by the peers when they introduce themselves, before anyone trains.
"""

import dataclasses
import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from fedkd.errors import SettingError
from fedkd.models import check as check_model
from fedkd.settings.rules import (
    ANY,
    DIVERGENCE,
    EPSILON,
    NAME,
    NON_EMPTY,
    NUMBERS,
    STRATEGIES,
    STRATEGY,
    TEMPERATURE_LIST,
    TEMPERATURES,
    TOPOLOGY,
    WEIGHT,
    Rule,
    above,
    at_least,
    between,
    numbers,
    one_of,
    some_of,
    split_list,
)
from fedkd.wire.codecs import codec

Scalar = str | int | float | bool
PARTITIONS = ("iid", "dirichlet", "classes", "overlap", "quantity")
CONTROLS = ("isolated", "pooled")
PEER = "{peer}"
"""Stands for a peer's number in the `dataset` of a simulation whose peers have data of their own."""
OPTIMIZERS = ("adam", "adamw", "sgd")
_FORMER_DP = "partitioned (it was `dp` before, which is no differential privacy: for that see `privacy-epsilon`)"


FREE = "free"
"""Of a quantity on which neither memory nor time nor disk of a peer depends."""
COSTS = ("max-epochs", "max-batch-size", "max-proxy-size", "max-features", "max-rounds", "max-peers", "max-threads")
"""What a setting can cost a deployed peer: its own settings that bound it."""


def _setting(default: Scalar, rule: Rule, help: str, costs: str = "") -> Any:
    """Declare a setting: its default, what is allowed, its help.

    A number, and a list of which each entry costs something, also says which of a peer's limits bounds it, of
    :data:`COSTS`; or that it is :data:`FREE`.
    """
    return field(default=default, metadata={"rule": rule, "help": help, "costs": costs})


@dataclass(frozen=True)
class RunConfig:
    """Every setting of a run. Field names are the kebab-case keys with underscores."""

    # What the peers know and what they share
    dataset: str = _setting(
        "digits",
        NON_EMPTY,
        "`digits`, `mnist`, `fashion-mnist`, `cifar10`, `cifar100`, `svhn`, `npz:PATH`, `folder:PATH` or "
        "`package.module:function`; with `{peer}` in a path each peer, by its number, has data of its own",
    )
    data_dir: str = _setting("", ANY, "folder where torchvision's data sets lie; empty: `~/.cache/fedkd/data`")
    download: bool = _setting(False, ANY, "let torchvision download a missing data set")
    partition: str = _setting("dirichlet", one_of(*PARTITIONS), "how the training set is split over the peers")
    partition_alpha: float = _setting(0.3, above(0), "concentration of `dirichlet`: small is skewed", FREE)
    classes_per_peer: int = _setting(2, at_least(1), "classes a peer holds under `classes`", FREE)
    shared_classes: int = _setting(2, at_least(1), "classes every peer holds under `overlap`", FREE)
    proxy: str = _setting(
        "split",
        NON_EMPTY,
        "`split`: public images taken from the training set before partitioning; or any data source",
    )
    proxy_size: int = _setting(400, at_least(1), "images in the public proxy set", "max-proxy-size")
    normalize: str = _setting(
        "auto",
        one_of("auto", "imagenet", "none"),
        "input scaling: `auto` takes mean and deviation from the proxy set",
    )

    # The peers' models and how they train
    models: str = _setting(
        "mlp,cnn-small,cnn-wide,resnet8,resnet14,resnet20",
        NON_EMPTY,
        "model names, dealt out over the peers in order",
    )
    checkpoints: str = _setting("", ANY, "checkpoint paths, dealt out like `models`; `-` or empty: none")
    held_out: str = _setting(
        "",
        ANY,
        "files of the indices of training samples that the `checkpoints` were not trained on, dealt out alike; peers "
        "choose by them and never train on them; `-` or empty: none is known",
    )
    pretrain_epochs: int = _setting(20, at_least(0), "epochs on private data before round 1", "max-epochs")
    optimizer: str = _setting("adam", one_of(*OPTIMIZERS), "optimiser of every training phase")
    learning_rate: float = _setting(0.001, above(0), "learning rate of every training phase", FREE)
    momentum: float = _setting(0.9, between(0, 0.999), "momentum of `sgd`", FREE)
    weight_decay: float = _setting(0.0, at_least(0), "weight decay", FREE)
    batch_size: int = _setting(32, at_least(2), "images per step", "max-batch-size")

    # Who hears whom
    rounds: int = _setting(10, at_least(0), "communication rounds", "max-rounds")
    strategy: str = _setting("averaged", STRATEGY, "who hears whom and how a peer combines what it hears")
    topology: str = _setting("complete", TOPOLOGY, "who is whose neighbour")
    topology_degree: int = _setting(4, at_least(1), "neighbours of a peer under `k-regular` and `small-world`", FREE)
    topology_probability: float = _setting(
        0.3, between(0, 1), "edge or rewiring probability of the random topologies", FREE
    )
    matching: str = _setting(
        "all", one_of("all", "round-robin"), "`pairwise`: hear every neighbour, or one partner a round"
    )
    fanout: int = _setting(1, at_least(1), "`gossip`: neighbours drawn by each peer in a round", FREE)
    gossip_style: str = _setting("pull", one_of("pull", "push", "push-pull"), "`gossip`: who hears whom after a draw")
    mode: str = _setting(
        "sync", one_of("sync", "async"), "`gossip`: rounds with a barrier, or new mail for whoever answers"
    )
    updates: int = _setting(0, at_least(0), "`async`: answers after which the run ends; 0: peers × rounds", FREE)
    max_seconds: float = _setting(0.0, at_least(0), "`async`: seconds after which the run ends; 0: no limit", FREE)
    participation: float = _setting(1.0, between(0.001, 1), "share of the peers that take part in a round", FREE)
    consensus: str = _setting(
        "fedmd", one_of("fedmd", "ds-fl"), "`consensus`: the server's mean (a baseline with a server)"
    )
    fedavg_start: str = _setting(
        "cold",
        one_of("cold", "pretrained", "distilled"),
        "`fedavg`: start from scratch, from the mean of what each peer pre-trained, or from a model distilled from the "
        "peers' own",
    )
    merge_epochs: int = _setting(
        20, at_least(1), "`fedavg-start=distilled`: epochs over the proxy set in the merging", "max-epochs"
    )
    fedavg_model: str = _setting("cnn-wide", NON_EMPTY, "`fedavg`: the one architecture that is averaged")

    # What a peer does with what it hears
    divergence: str = _setting("kl", DIVERGENCE, "loss between student and teacher")
    temperature: float = _setting(1.0, between(*TEMPERATURES), "softmax temperature of both sides", FREE)
    kd_weight: float = _setting(
        -1.0,
        WEIGHT,
        "weight of the distillation loss, under `mixed` the α of (1−α)·CE + α·KD; "
        "-1: 0.5 under `mixed`, 1 under `alternate` and `dml`",
        FREE,
    )
    t2_scaling: bool = _setting(False, ANY, "multiply the distillation loss by the temperature squared")
    match_gradients: bool = _setting(
        False, ANY, "scale the distillation loss so that its first gradient has the norm of `kl`'s"
    )
    combine: str = _setting(
        "averaged", one_of("averaged", "pairwise"), "`gossip`, one's own strategy: how a peer combines its teachers"
    )
    average: str = _setting("probs", one_of("probs", "logits"), "what `averaged` averages over the teachers")
    reduction: str = _setting("mean", one_of("mean", "sum"), "how `pairwise` adds up one divergence per teacher")
    sharpen: float = _setting(0.0, at_least(0), "`averaged`: ERA temperature that sharpens the teacher; 0: off", FREE)
    robust: str = _setting(
        "none", one_of("none", "median", "trimmed", "agreement"), "defence of `averaged` against poisoned knowledge"
    )
    trim: float = _setting(0.2, between(0, 0.49), "`trimmed`: share of the teachers cut at each end", FREE)
    regime: str = _setting(
        "vanilla",
        one_of("vanilla", "tuned", "dml", "partitioned", former={"dp": _FORMER_DP}),
        "how teacher, student and labels are weighed",
    )
    tune_temperatures: str = _setting("1,2,4,8,16", TEMPERATURE_LIST, "`tuned`: temperatures tried", "max-epochs")
    tune_weights: str = _setting("0.1,0.3,0.5,0.7,0.9,1", NUMBERS, "`tuned`: weights tried", "max-epochs")
    tune_every: int = _setting(0, at_least(0), "`tuned`: search again every n rounds; 0: before round 1 only", FREE)
    validation_share: float = _setting(
        0.2,
        between(0.01, 0.9),
        "`tuned`: share of the private data that is held out before the start, unless a `held-out` part is known",
        FREE,
    )
    cakd_alpha: float = _setting(
        1.0, at_least(0), "`cakd`, `dkd`: weight of the strongly correlated classes' part", FREE
    )
    cakd_beta: float = _setting(8.0, at_least(0), "`cakd`, `dkd`: weight of the other classes' part", FREE)
    cakd_mode: str = _setting("free", one_of("free", "scaled"), "`cakd`: `scaled` is KL at α = β = 1")
    cakd_strong: str = _setting(
        "top-k", one_of("top-k", "label"), "`cakd`: strong classes are the teacher's top k, or its top one alone"
    )
    cakd_top_k: int = _setting(2, at_least(1), "`cakd`: how many under `top-k`", FREE)
    bdkd_delta: float = _setting(2.0, above(0), "`bdkd`: weight of the favoured direction; 1 is Jeffreys", FREE)
    bdkd_rule: str = _setting(
        "sharpen_if_flat", one_of("sharpen_if_flat", "opposite", "none"), "`bdkd`: which direction is favoured when"
    )
    kd_warm_up: int = _setting(
        0, at_least(0), "rounds over which the distillation loss grows linearly to its weight", FREE
    )
    method: str = _setting(
        "logits", one_of("logits", "infoflow"), "`infoflow`: peers exchange projected features beside the logits"
    )
    flow_layers: str = _setting(
        "", ANY, "`infoflow`: layer names, first to last; empty: evenly spread over the model", "max-features"
    )
    flow_depth: int = _setting(3, between(1, 64), "`infoflow`: how many layers are spread", "max-features")
    flow_dimensions: int = _setting(
        64, between(2, 4096), "`infoflow`: features per layer that travel, by random projection", "max-features"
    )
    flow_weight: float = _setting(1.0, at_least(0), "`infoflow`: weight of the flow loss beside the logits' loss", FREE)
    flow_initial: float = _setting(100.0, at_least(0), "`infoflow`: weight of all layers but the last in round 1", FREE)
    flow_decay: float = _setting(
        0.7, between(0.001, 1), "`infoflow`: its factor per round (the critical-phase schedule)", FREE
    )
    flow_variant: str = _setting("paper", one_of("paper", "code"), "`infoflow`: the paper's formula, or its code's")
    flow_auxiliary: bool = _setting(
        False, ANY, "`infoflow`: learn through an auxiliary teacher, the peer's own model at double width"
    )
    flow_auxiliary_epochs: int = _setting(
        20, at_least(1), "`flow-auxiliary`: its epochs over the proxy set per round", "max-epochs"
    )
    schedule: str = _setting(
        "mixed",
        one_of("alternate", "mixed"),
        "distil, then train on private data; or both losses in every step. `consensus` alternates, as its papers do, "
        "unless `kd-weight` is given",
    )
    distill_epochs: int = _setting(2, at_least(0), "epochs over the proxy set per round", "max-epochs")
    local_epochs: int = _setting(
        1, at_least(0), "epochs over private data per round; `mixed` does not use it", "max-epochs"
    )

    attack: str = _setting(
        "none", one_of("none", "flip", "noise", "constant", "collude"), "what simulated attackers do to their knowledge"
    )
    attackers: float = _setting(0.2, between(0, 0.9), "share of the peers that attack, the last ones", FREE)

    # What travels
    codec: str = _setting(
        "fp32", NON_EMPTY, "encoding of logits on the wire: `fp32`, `fp16`, `int8` or `topk:K`, with `+zstd` compressed"
    )
    proxy_per_round: int = _setting(
        0, at_least(0), "proxy samples whose logits travel, drawn anew each round; 0: all", "max-proxy-size"
    )
    sealed: bool = _setting(False, ANY, "encrypt knowledge end to end: the relay sees sizes only")
    privacy_epsilon: float = _setting(
        0.0,
        EPSILON,
        "ε of all knowledge that a peer publishes in the run, by clipping and Gaussian noise; 0: off",
        FREE,
    )
    privacy_delta: float = _setting(1e-5, between(1e-12, 0.1), "`privacy-epsilon`: its δ", FREE)
    privacy_clip: float = _setting(
        5.0, above(0), "`privacy-epsilon`: norm to which a sample's logits are clipped", FREE
    )

    # Rounds that close
    round_timeout: float = _setting(
        3600.0, above(0), "seconds after which a round closes with the answers it has", FREE
    )
    min_answers: int = _setting(1, at_least(1), "fewest answers with which a round may close", FREE)
    max_staleness: int = _setting(3, at_least(0), "rounds for which a silent peer's last knowledge still serves", FREE)
    staleness_decay: float = _setting(
        0.5, between(0, 1), "factor on a teacher's weight per round of its knowledge's age", FREE
    )
    resume: str = _setting("", ANY, "folder of a run that was stopped, to be continued from its last closed round")

    # The run
    peers: int = _setting(
        0,
        at_least(0),
        "peers that take part; 0, in a simulation: one for each Flower node; more than that share the nodes",
        "max-peers",
    )
    trials: str = _setting(
        "", ANY, 'file of trials to run one after another on the same peers, `{"name": ..., "settings": {...}}` a line'
    )
    eval_every: int = _setting(1, at_least(1), "evaluate in every n-th round (and always in the last)", FREE)
    evaluate_on: str = _setting(
        "test",
        one_of("test", "validation"),
        "the test set; or a `validation-share` of the training set that no peer then holds, to choose settings by",
    )
    controls: str = _setting("isolated,pooled", some_of(*CONTROLS), "control runs added to the result")
    pooled_model: str = _setting("cnn-wide", NON_EMPTY, "model of the pooled control")
    device: str = _setting(
        "auto", NON_EMPTY, "`auto` (the GPU that Ray gave the actor, else the CPU), `cpu`, `cuda`, `cuda:N`"
    )
    threads: int = _setting(
        1, at_least(1), "torch CPU threads of a peer; results depend on it, not on the number of actors", "max-threads"
    )
    fast: bool = _setting(
        False, ANY, "compute in bfloat16 where that is faster, with fused steps, channels last; not bit by bit the same"
    )
    compiled: bool = _setting(
        False, ANY, "compile models, on a GPU into CUDA graphs: minutes for each architecture in each actor"
    )
    profile: bool = _setting(False, ANY, "measure where each peer's time goes, and leave a table and a figure of it")
    seed: int = _setting(0, at_least(0), "seed of every random stream", FREE)
    out_dir: str = _setting(
        "", ANY, "folder for the results; empty: `runs/<time>-<run-name>` where the run was started"
    )
    keep_models: bool = _setting(
        True, ANY, "leave each peer's final model in `models/` of the results; real peers keep theirs in any case"
    )
    run_name: str = _setting("fedkd", NAME, "name of the run")

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Scalar]) -> "RunConfig":
        """Check a flat mapping of kebab-case keys; missing keys take their defaults.

        Raises:
            SettingError: an unknown key, a wrong type or a value that is not allowed.
        """
        known = {key(f.name): f for f in dataclasses.fields(cls)}
        values: dict[str, Scalar] = {}
        for name, value in mapping.items():
            if name not in known:
                near = difflib.get_close_matches(name, known, n=3) or sorted(known)
                raise SettingError(name, value, "a known key (nearest: " + ", ".join(near) + ")")
            values[known[name].name] = _checked(known[name], name, value)
        config = cls(**values)  # type: ignore[arg-type]
        config._check_names()
        config._check_together()
        return config

    def _check_names(self) -> None:
        """Check what names something, as far as that can be told without importing it."""
        codec(self.codec)
        for spec in split_list(self.models):
            check_model(spec)
        for key_, spec in (("fedavg-model", self.fedavg_model), ("pooled-model", self.pooled_model)):
            check_model(spec, key=key_)

    def _check_together(self) -> None:
        """Check what one key alone cannot tell."""
        for name, allowed, wrong in self._contradictions():
            if wrong:
                raise SettingError(name, getattr(self, name.replace("-", "_")), allowed)

    def _contradictions(self) -> Iterator[tuple[str, str, bool]]:
        server = self.strategy in ("consensus", "fedavg")
        averaged = self.combination == "averaged" and not server
        own_data = "a data source of its own, since `dataset` gives every peer its own data"
        yield "proxy", own_data, PEER in self.dataset and self.proxy == "split"
        yield "mode", f"sync under strategy {self.strategy}", self.mode == "async" and self.strategy != "gossip"
        asynchronous = self.mode == "async"
        yield "proxy-per-round", "0 under mode async: ages mix there", asynchronous and self.proxy_per_round > 0
        pull = "pull under mode async, where nobody waits to be pushed to"
        yield "gossip-style", pull, asynchronous and self.gossip_style != "pull"
        yield (
            "participation",
            "1 under mode async, where whoever answers gets new mail",
            (asynchronous and self.participation < 1),
        )
        yield "proxy-per-round", f"at most `proxy-size` ({self.proxy_size})", self.proxy_per_round > self.proxy_size
        yield "sealed", f"false under {self.strategy}, whose server has to read the knowledge", self.sealed and server
        yield "robust", "none unless peers average their teachers", self.robust != "none" and not averaged
        yield "sharpen", "0 unless peers average their teachers", self.sharpen > 0 and not averaged
        yield "sharpen", f"0, or at least {TEMPERATURES[0]:g}", 0 < self.sharpen < TEMPERATURES[0]
        yield "topology", f"complete under {self.strategy}", server and self.topology != "complete"
        yield "method", f"logits under strategy {self.strategy}", self.method == "infoflow" and server
        infoflow = self.method == "infoflow"
        yield "robust", "none or agreement under infoflow", infoflow and self.robust in ("median", "trimmed")
        yield "attack", "none under infoflow", infoflow and self.attack != "none"
        yield "compiled", "false under infoflow, which looks into the models", infoflow and self.compiled
        yield "proxy-size", "at least 2 that travel, under infoflow", infoflow and self.travelling < 2
        fedavg = self.strategy == "fedavg"
        yield "regime", "vanilla under fedavg", fedavg and self.regime != "vanilla"
        yield "attack", "none under fedavg", fedavg and self.attack != "none"
        below_1 = "less than 1 under schedule mixed, where 1 would leave the labels out, or else `schedule=alternate`"
        yield "kd-weight", below_1, self.joint and self.regime != "dml" and self.kd_weight >= 1
        turns = "`schedule=alternate`" + " with `regime=vanilla`" * (self.regime == "dml")
        some = f"at least 1 where labels and knowledge share every step (schedule mixed, regime dml), or else {turns}"
        yield "local-epochs", some, self.joint and self.local_epochs == 0
        yield "distill-epochs", some, self.joint and self.distill_epochs == 0
        private = self.privacy_epsilon > 0
        yield "privacy-epsilon", "0 under mode async: releases are not counted there", private and asynchronous
        yield "privacy-epsilon", "0 under fedavg, whose weights are not noised", private and fedavg
        yield "privacy-epsilon", "0 under infoflow, whose features are not noised", private and infoflow
        tuned = self.regime == "tuned"
        beyond = max(numbers(self.tune_weights)) > 1 and self.joint
        yield "tune-weights", "at most 1 under schedule mixed", tuned and beyond
        yield "match-gradients", "false under regime tuned, which chooses the weight", tuned and self.match_gradients
        # Adam's step does not change when its loss is scaled: alone in a phase, a weight would do nothing.
        where = "schedule alternate" if self.schedule == "alternate" else "strategy consensus without a `kd-weight`"
        needs = f"under {where} and optimizer adam or adamw, whose steps ignore a loss's scale: "
        needs += "take `schedule=mixed kd-weight=0.5`, or `optimizer=sgd`"
        blind = not self.joint and self.optimizer != "sgd" and not fedavg and self.method == "logits"
        yield "kd-weight", f"1, or left out, {needs}", blind and self.distillation_weight != 1 and not tuned
        yield "match-gradients", f"false {needs}", blind and self.match_gradients
        yield "t2-scaling", f"false {needs}", blind and self.t2_scaling
        yield "kd-warm-up", f"0 {needs}", blind and self.kd_warm_up > 0
        yield "regime", f"vanilla, dml or partitioned {needs}", blind and tuned and len(numbers(self.tune_weights)) > 1

    def effective(self) -> "RunConfig":
        """Return the settings that a run really uses.

        A consensus baseline brings its method's loss and schedule; weights travel as they are, whatever the codec; a
        ``kd-weight`` that is left out gets its value.
        """
        used = dataclasses.replace(self, kd_weight=self.distillation_weight)
        if self.strategy == "fedavg" and self.fedavg_start != "distilled":
            return dataclasses.replace(used, codec="fp32")
        if self.strategy != "consensus":
            return used
        loss, schedule = "mae" if self.consensus == "fedmd" else "kl", self.schedule if self.joint else "alternate"
        return dataclasses.replace(used, divergence=loss, temperature=1.0, schedule=schedule)

    @property
    def combination(self) -> str:
        """How a peer combines its teachers: ``averaged`` or ``pairwise``."""
        if self.strategy == "gossip" or self.strategy not in STRATEGIES:
            return self.combine
        return "pairwise" if self.strategy == "pairwise" else "averaged"

    @property
    def joint(self) -> bool:
        """Whether labels and teachers share every step, instead of taking turns.

        FedMD and DS-FL take turns as published; since `schedule` cannot tell a default from a choice, the weight that
        only sharing needs is what asks for it. Federated averaging has no teachers in its rounds.
        """
        if self.strategy == "fedavg":
            return False
        shared = self.schedule == "mixed" and (self.strategy != "consensus" or self.kd_weight > 0)
        return shared or self.regime == "dml"

    @property
    def distillation_weight(self) -> float:
        """What the distillation loss is multiplied by: ``kd-weight``, or what leaving it out stands for."""
        if self.kd_weight > 0:
            return self.kd_weight
        return 0.5 if self.joint and self.regime != "dml" else 1.0

    @property
    def travelling(self) -> int:
        """How many proxy samples' logits travel in a round."""
        return self.proxy_per_round or self.proxy_size

    def to_mapping(self) -> dict[str, Scalar]:
        """Return the settings as Flower's flat mapping."""
        return {key(f.name): getattr(self, f.name) for f in dataclasses.fields(self)}

    def evaluates(self, round: int) -> bool:
        """Tell whether peers evaluate at the end of a round."""
        return round % self.eval_every == 0 or round == self.rounds


def key(field_name: str) -> str:
    """Return the kebab-case key of a field."""
    return field_name.replace("_", "-")


def _checked(spec: "dataclasses.Field[Scalar]", name: str, value: Scalar) -> Scalar:
    default: Scalar = spec.default  # type: ignore[assignment]
    kind = type(default)
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        words = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
        raise SettingError(name, value, words[kind])
    rule: Rule = spec.metadata["rule"]
    if not rule.accepts(value):
        raise SettingError(name, value, rule.former.get(value, rule.phrase))
    return value


def settings_table() -> str:
    """Return the settings as a Markdown table: key, default, allowed, meaning."""
    lines = ["| key | default | allowed | meaning |", "|---|---|---|---|"]
    for spec in dataclasses.fields(RunConfig):
        rule: Rule = spec.metadata["rule"]
        default = f'"{spec.default}"' if isinstance(spec.default, str) else str(spec.default).lower()
        if isinstance(spec.default, bool):
            allowed = "true, false"
        elif isinstance(spec.default, int):
            allowed = rule.phrase.replace("a number", "a whole number")
        else:
            allowed = rule.phrase
        lines.append(f"| `{key(spec.name)}` | `{default}` | {allowed} | {spec.metadata['help']} |")
    return "\n".join(lines)
