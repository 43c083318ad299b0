"""The settings of a run: typed, checked once at the edge, written down in one place.

Flower hands a run's settings over as a flat mapping of kebab-case keys to ``str | int | float | bool``;
:meth:`RunConfig.from_mapping` turns it into a frozen dataclass or raises a
:class:`~fedkd.errors.SettingError` that names the key, the value and what is allowed. The settings
themselves are declared in the modules
of :data:`GROUPS`, by what they are about.

What only a peer can know (can one's own code be imported, does the checkpoint fit, are there that many classes) is
checked by the peers when they introduce themselves, before anyone trains.
"""

import dataclasses
import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from fedkd.errors import SettingError
from fedkd.models import check as check_model
from fedkd.models import comes_trained
from fedkd.settings.closing import Closing
from fedkd.settings.data import SPLIT_SIZE, Data
from fedkd.settings.declare import Scalar, key, of
from fedkd.settings.hearing import Hearing
from fedkd.settings.learning import Attacks, Course, InformationFlow, Learning
from fedkd.settings.rules import STRATEGIES, TEMPERATURES, numbers, split_list
from fedkd.settings.running import Running
from fedkd.settings.training import Training
from fedkd.settings.travelling import Travelling
from fedkd.wire.claims import COUNTS, DENSITY, MASK
from fedkd.wire.codecs import codec

PEER = "{peer}"
"""Stands for a peer's number in the `dataset` of a simulation whose peers have data of their own."""
GROUPS = (Data, Training, Hearing, Learning, InformationFlow, Course, Attacks, Travelling, Closing, Running)
"""The classes that declare the settings, in the order of the documentation."""

_SHARP = 0.5
"""The temperature of a weighed teacher."""


@dataclass(frozen=True)
class RunConfig(
    Running, Closing, Travelling, Attacks, Course, InformationFlow, Learning, Hearing, Training, Data,
):  # fmt: skip
    """Every setting of a run. Field names are the kebab-case keys with underscores.

    Whoever needs a part of them takes that part (:data:`GROUPS`), of which this is one. The fields of a class's first
    base come last.
    """

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
        some = f"at most {self.public_size}, the samples of the proxy set (`proxy-size`)"
        yield "proxy-per-round", some, 0 < self.public_size < self.proxy_per_round
        yield "sealed", f"false under {self.strategy}, whose server has to read the knowledge", self.sealed and server
        means = self.robust in ("median", "trimmed")
        yield "robust", "none, agreement or eigentrust unless peers average their teachers", means and not averaged
        yield "sharpen", "0 unless peers average their teachers", self.sharpen > 0 and not averaged
        yield "sharpen", f"0, or at least {TEMPERATURES[0]:g}", 0 < self.sharpen < TEMPERATURES[0]
        both = self.sharpen > 0 and self.teacher_temperature not in (1, -1)
        yield "teacher-temperature", "1, or left out, beside `sharpen`: the teacher is sharpened in one way", both
        yield "topology", f"complete under {self.strategy}", server and self.topology != "complete"
        yield "method", f"logits under strategy {self.strategy}", self.method == "infoflow" and server
        infoflow = self.method == "infoflow"
        yield "robust", "none, agreement or eigentrust under infoflow", infoflow and means
        yield "attack", "none under infoflow", infoflow and self.attack != "none"
        yield "compiled", "false under infoflow, which looks into the models", infoflow and self.compiled
        yield "proxy-size", "at least 2 that travel, under infoflow", infoflow and 0 < self.travelling < 2
        fedavg = self.strategy == "fedavg"
        partly = split_list(self.train) not in ((), ("all",))
        yield "train", "all under fedavg, where whole models are averaged", fedavg and partly
        yield "train", "all or last:N under infoflow, which looks into the models", infoflow and "head" in self.train
        head = "head" in split_list(self.train)
        yield "augment", "none where a head trains alone, on features computed once", head and self.augment != "none"
        yield (
            "augment-proxy",
            "none where a head trains alone, on features computed once",
            head and self.augment_proxy != "none",
        )
        sizes = len(set(split_list(self.input_size))) > 1
        yield "input-size", "one for all under fedavg, whose model is everybody's", fedavg and sizes
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
        yield from self._contradictions_of_claims()
        over_run = self.learning_rate_over == "run"
        unknown = "phase under mode async, where nobody knows how many rounds a peer will have"
        yield "learning-rate-over", unknown, asynchronous and self.rate_varies and over_run
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

    def _contradictions_of_claims(self) -> Iterator[tuple[str, str, bool]]:
        server = self.strategy in ("consensus", "fedavg")
        private, selects = self.privacy_epsilon > 0, self.selector != "none"
        counts, density = self.weighing == COUNTS, self.weighing == DENSITY
        told = f"one for which peers tell nothing more, under {self.strategy}: its server combines what they know"
        yield "weighing", told, server and (counts or density)
        yield "selector", f"none under {self.strategy}, whose server averages over all peers", server and selects
        infoflow = self.method == "infoflow"
        yield "selector", "none under infoflow, whose features travel for every sample", infoflow and selects
        compares = selects and self.robust not in ("none", "eigentrust")
        yield "selector", f"none with `robust={self.robust}`, which compares all teachers on every sample", compares
        whole = "none under a `weighing` that compares all that teachers say with what the peer itself does"
        yield "selector", whole, selects and self.weighing in ("similarity", "kt-pfl")
        inside = density or self.selector in ("kulsif", "k-means")
        yield "compiled", "false where density or a selector looks into the models", self.compiled and inside
        noised = "above 0 with a `privacy-epsilon`: class counts are published too"
        yield "counts-noise", noised, private and counts and self.counts_noise == 0
        never = "with a `privacy-epsilon`: what is told of samples comes of private data, and no noise bounds it"
        yield "weighing", f"another one {never}", private and density
        yield "selector", f"none {never}", private and selects

    def effective(self) -> "RunConfig":
        """Return the settings that a run really uses.

        A consensus baseline brings its method's loss and schedule; weights travel as they are, whatever the codec; a
        ``kd-weight`` that is left out gets its value.
        """
        used = dataclasses.replace(self, kd_weight=self.distillation_weight)
        if self.peers_combine:
            used = dataclasses.replace(used, teacher_temperature=self.combined_temperature)
        if self.strategy == "fedavg" and self.fedavg_start != "distilled":
            return dataclasses.replace(used, codec="fp32")
        if self.strategy != "consensus":
            return used
        loss, schedule = "mae" if self.consensus == "fedmd" else "kl", self.schedule if self.joint else "alternate"
        return dataclasses.replace(used, divergence=loss, temperature=1.0, schedule=schedule)

    @property
    def own_strategy(self) -> bool:
        """Whether the strategy is one's own, which may read any setting."""
        return self.strategy not in STRATEGIES

    @property
    def peers_combine(self) -> bool:
        """Whether peers form a teacher of what they hear, and no server."""
        return self.strategy not in ("consensus", "fedavg")

    @property
    def cold(self) -> bool:
        """Whether a server averages a model that knows nothing yet."""
        return self.strategy == "fedavg" and self.fedavg_start == "cold"

    @property
    def merges(self) -> bool:
        """Whether a server averages a model into which the peers' own were distilled."""
        return self.strategy == "fedavg" and self.fedavg_start == "distilled"

    @property
    def without_channel(self) -> str:
        """Why there can be no channel control; empty where there can."""
        if self.strategy == "fedavg":
            return "federated averaging has no rounds of distillation"
        if self.combination == "pairwise" and self.reduction == "sum":
            return "a sum of divergences weighs by the number of teachers, and true labels are one"
        return ""

    @property
    def holds_out(self) -> bool:
        """Whether a part of the private or of the training data is held out to choose by."""
        return self.regime == "tuned" or self.evaluate_on == "validation"

    @property
    def searches(self) -> int:
        """How many trials a search of a tuned peer has."""
        tuned = self.regime == "tuned" and self.strategy != "fedavg"
        return len(numbers(self.tune_temperatures)) * len(numbers(self.tune_weights)) if tuned else 0

    @property
    def combination(self) -> str:
        """How a peer combines its teachers: ``averaged`` or ``pairwise``."""
        if self.strategy == "gossip" or self.own_strategy:
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
    def combined_temperature(self) -> float:
        """By which the combined teacher is sharpened: ``teacher-temperature``, or what leaving it out stands for.

        1 where a server combines, whatever the setting.
        """
        if not self.peers_combine:
            return 1.0
        if self.teacher_temperature > 0:
            return self.teacher_temperature
        return 1.0 if self.weighing == "uniform" or self.sharpen > 0 else _SHARP

    @property
    def defence(self) -> str:
        """How peers defend themselves: ``robust``, but for ``eigentrust`` where not all say something of a sample."""
        sparse = self.robust == "eigentrust" and self.selector != "none"
        return self.robust if self.peers_combine and not sparse else "none"

    @property
    def rate_varies(self) -> bool:
        """Whether the learning rate is not the same in all steps."""
        return self.learning_rate_schedule != "constant" or self.learning_rate_warm_up > 0

    @property
    def public_size(self) -> int:
        """How many samples the proxy set has; 0: all of one that only the peers know."""
        return self.proxy_size or (SPLIT_SIZE if self.proxy == "split" else 0)

    @property
    def travelling(self) -> int:
        """How many proxy samples' logits travel in a round; 0: all of a proxy set that only the peers know."""
        return self.proxy_per_round or self.public_size

    def knowing(self, proxy_size: int) -> "RunConfig":
        """Return these settings where it is known how many samples the proxy set has.

        Raises:
            SettingError: a setting that does not go with so many.
        """
        known = dataclasses.replace(self, proxy_size=proxy_size)
        known._check_together()
        return known

    @property
    def told(self) -> tuple[str, ...]:
        """What peers tell beside their logits, of :data:`fedkd.wire.claims.CLAIMS`."""
        if not self.peers_combine:
            return ()
        weighed = (self.weighing,) if self.weighing in (COUNTS, DENSITY) else ()
        return (*weighed, MASK) if self.selector != "none" else weighed

    def share_of_run(self, round: int) -> tuple[float, float]:
        """Return which part of the rounds in which peers train a round is: where it begins and ends, in [0, 1].

        A round of federated averaging measures before it trains: what starts from scratch trains in round 0 too, and
        the last one only measures.

        >>> RunConfig(rounds=4).share_of_run(1), RunConfig(rounds=4, strategy="fedavg").share_of_run(1)
        ((0.0, 0.25), (0.25, 0.5))
        """
        first = 0 if self.cold else 1
        trained = max(1, self.rounds - (self.strategy == "fedavg" and not self.cold))
        return (round - first) / trained, (round - first + 1) / trained

    def to_mapping(self) -> dict[str, Scalar]:
        """Return the settings as Flower's flat mapping."""
        return {key(f.name): getattr(self, f.name) for f in dataclasses.fields(self)}

    def evaluates(self, round: int) -> bool:
        """Tell whether peers evaluate at the end of a round."""
        return round % self.eval_every == 0 or round == self.rounds


def recorded(settings: Mapping[str, Scalar]) -> dict[str, Scalar]:
    """Return all settings of a run, given those that it recorded; of one younger than the run, what it did without.

    >>> recorded({"strategy": "gossip"})["weighing"], RunConfig().weighing
    ('uniform', 'discrimination')
    """
    specs = dataclasses.fields(RunConfig)
    older = {key(spec.name): of(spec).absent for spec in specs}
    found = {**RunConfig().to_mapping(), **{name: v for name, v in older.items() if v is not None}, **settings}
    if "input-size" not in settings and any(map(comes_trained, split_list(str(found["models"])))):
        found["input-size"] = "data"  # weights of torchvision's saw images as they are, on the proxy set's scale
        found["normalize"] = "proxy" if found["normalize"] == "auto" else found["normalize"]
    return found


def spelled(settings: Mapping[str, Scalar]) -> dict[str, Scalar]:
    """Return the settings of a simulated run so that two which mean the same are equal.

    Runs that are older than the default of `proxy-size` say how many samples `split` takes.

    >>> spelled({"proxy": "split", "proxy-size": 400, "seed": 1})
    {'proxy': 'split', 'proxy-size': 0, 'seed': 1}
    """
    usual = settings.get("proxy") == "split" and settings.get("proxy-size") == SPLIT_SIZE
    return {**settings, **({"proxy-size": 0} if usual else {})}


def _checked(spec: "dataclasses.Field[Scalar]", name: str, value: Scalar) -> Scalar:
    default: Scalar = spec.default  # type: ignore[assignment]
    kind = type(default)
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        words = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
        raise SettingError(name, value, words[kind])
    rule = of(spec).rule
    if not rule.accepts(value):
        raise SettingError(name, value, rule.former.get(value, rule.phrase))
    return value
