"""One site's life: it introduces itself, starts, learns from what it hears, and answers with what it knows.

A :class:`Peer` knows nothing of Flower: it turns a :class:`~fedkd.protocol.Mail` into an
:class:`~fedkd.protocol.Answer`. Its data and its weights stay with it; only encoded logits on the public
proxy set and numbers about itself go out.
"""

import json
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from clients.site import Place, Site, open_pool, open_site, proxy_subset
from clients.store import Store
from fedkd import metrics, models
from fedkd.codec import BadKnowledge, codec
from fedkd.config import RunConfig
from fedkd.distillation import Distillation
from fedkd.errors import SettingError
from fedkd.protocol import Answer, Arrays, Letter, Mail
from fedkd.seeding import derive
from fedkd.source import source_hash, source_root
from fedkd.training import Optimization, distil, fit, predict

NOT_MEASURED = float("nan")


@dataclass
class _Warm:
    """The model that this process ran last for a peer, and the round whose end it stands at."""

    round: int
    model: nn.Module


_warm: dict[str, _Warm] = {}  # the process's cache, keyed by state folder; the truth is on disk
_WARM_MODELS = 8


class Peer:
    """One site in one run.

    Args:
        place: who and where the peer is.
        config: the run's settings.

    Raises:
        SettingError: the settings ask for what this peer does not have.
    """

    def __init__(self, place: Place, config: RunConfig) -> None:
        torch.set_num_threads(config.threads)
        self.place, self.config = place, config
        self.device = pick_device(config.device)
        self.site: Site = open_site(config, place, self.device)
        self.distillation = Distillation.from_config(config)
        self.codec = codec(config.codec)
        self.how = Optimization.from_config(config)
        self.store = Store(place.state_dir)
        self.classes = len(self.site.commons.source.classes)

    def answer(self, mail: Mail) -> Answer:
        """Do what a mail asks for."""
        started = time.perf_counter()
        answer: Answer = getattr(self, f"_{mail.kind}")(mail)
        seconds = time.perf_counter() - started
        return Answer(
            answer.peer,
            answer.round,
            answer.facts,
            {**answer.metrics, "seconds": seconds},
            answer.series,
            answer.arrays,
        )

    def _introduce(self, mail: Mail) -> Answer:
        """Check all that can be checked before training, and say who came with what."""
        model = self._build()
        commons = self.site.commons
        return self._reply(
            mail,
            facts={
                "model": self.place.model_spec(self.config),
                "parameters": models.parameters_count(model),
                "samples": len(self.site.labels),
                "classes": json.dumps(commons.source.classes),
                "fingerprint": commons.fingerprint,
                "source": source_hash(),
                "source-root": str(source_root()),
                "peers": self.place.of,
                "index": self.place.index,
                "simulated": int(self.place.simulated),
                "device": str(self.device),
            },
        )

    def _start(self, mail: Mail) -> Answer:
        """Round 0: load or make the model, pre-train it on private data, and answer with its first knowledge."""
        model = self._build()
        self._local(model, round=0, epochs=self.config.pretrain_epochs)
        self.store.begin()
        return self._close(mail, model, self._measure(model))

    def _learn(self, mail: Mail) -> Answer:
        """A round: distil from the teachers, train on private data, measure, and answer with new knowledge."""
        model = self._recall(mail.round)
        kd_loss, refused = self._distil(model, mail)
        local_loss = self._local(model, round=mail.round, epochs=self.config.local_epochs)
        found = self._measure(model) if self.config.evaluates(mail.round) else {}
        return self._close(
            mail, model, {**found, "kd_loss": kd_loss, "local_loss": local_loss}, refused="; ".join(refused)
        )

    def _isolated(self, mail: Mail) -> Answer:
        """The control: the same start and the same private batches, without any teacher."""
        model = self._build()
        self.store.load(0, model)
        accuracies = [self._measure(model)["test_accuracy"]]
        found: dict[str, float] = {}
        for round in range(1, self.config.rounds + 1):
            self._local(model, round=round, epochs=self.config.local_epochs)
            found = self._measure(model) if self.config.evaluates(round) else {}
            accuracies.append(found.get("test_accuracy", NOT_MEASURED))
        return self._reply(mail, metrics=found or self._measure(model), series={"test_accuracy": accuracies})

    def _pooled(self, mail: Mail) -> Answer:
        """The ceiling: one model on the private data of all, possible in a simulation only."""
        if not self.place.simulated:
            raise SettingError("controls", "pooled", "left out in a deployment: no peer may see the others' data")
        self.site = open_pool(self.config, self.place, self.device)
        model = self._new(self.config.pooled_model, key="pooled-model")
        epochs = self.config.pretrain_epochs + self.config.rounds * self.config.local_epochs
        self._local(model, round=0, epochs=epochs)
        return self._reply(mail, metrics=self._measure(model), facts={"model": self.config.pooled_model})

    def _build(self) -> nn.Module:
        model = self._new(self.place.model_spec(self.config), key="models")
        checkpoint = self.place.checkpoint_path(self.config)
        if checkpoint is not None:
            models.load_checkpoint(model, checkpoint, key="checkpoints")
        return model

    def _new(self, spec: str, *, key: str) -> nn.Module:
        shape = tuple(self.site.commons.proxy_inputs.shape[1:])
        seed = derive(self.config.seed, "init", self.place.index)
        return models.build(spec, input_shape=shape, num_classes=self.classes, seed=seed).to(self.device)

    def _recall(self, round: int) -> nn.Module:
        """Return the model as it stood before a round, from this process if it ran last here, else from disk."""
        before = self.store.latest(before=round)
        warm = _warm.pop(str(self.store.folder), None)
        if warm is not None and warm.round == before:
            return warm.model
        model = self._new(self.place.model_spec(self.config), key="models")
        self.store.load(before, model)
        return model

    def _close(self, mail: Mail, model: nn.Module, found: dict[str, float], refused: str = "") -> Answer:
        """Save the state, remember the model, and predict what travels next."""
        self.store.save(mail.round, model)
        while len(_warm) >= _WARM_MODELS:
            _warm.pop(next(iter(_warm)))
        _warm[str(self.store.folder)] = _Warm(mail.round, model)
        subset = proxy_subset(self.config, mail.round + 1, self.device)
        logits = predict(model, self.site.commons.proxy_inputs[subset])
        return self._reply(
            mail, metrics=found, arrays=self.codec.encode(logits.cpu().numpy()), facts={"refused": refused}
        )

    def _distil(self, model: nn.Module, mail: Mail) -> tuple[float, list[str]]:
        subset = proxy_subset(self.config, mail.round, self.device)
        heard, weights, refused = self._decode(mail.letters, len(subset))
        if not heard:
            return NOT_MEASURED, refused
        teachers = self.distillation.prepare(torch.stack(heard), weights)
        loss = distil(
            model,
            self.site.commons.proxy_inputs[subset],
            teachers,
            self.distillation,
            epochs=self.config.distill_epochs,
            how=self.how,
            seed=derive(self.config.seed, "distil", self.place.index, mail.round),
        )
        return loss, refused

    def _decode(self, letters: tuple[Letter, ...], count: int) -> tuple[list[Tensor], list[float], list[str]]:
        """Decode what can be used; a bad letter is refused by its sender's name and costs nothing else."""
        heard: list[Tensor] = []
        weights: list[float] = []
        refused: list[str] = []
        for letter in letters:
            try:
                logits = self.codec.decode(letter.arrays, shape=(count, self.classes))
            except BadKnowledge as error:
                refused.append(f"{letter.sender}: {error}")
                continue
            heard.append(torch.from_numpy(logits).to(self.device))
            weights.append(letter.weight)
        return heard, weights, refused

    def _local(self, model: nn.Module, *, round: int, epochs: int) -> float:
        seed = derive(self.config.seed, "local", self.place.index, round)
        return fit(model, self.site.inputs, self.site.labels, epochs=epochs, how=self.how, seed=seed)

    def _measure(self, model: nn.Module) -> dict[str, float]:
        commons = self.site.commons
        logits, labels = predict(model, commons.test_inputs), commons.test_labels
        return {
            "test_accuracy": metrics.accuracy(logits, labels),
            "own_accuracy": metrics.reweighted_accuracy(logits, labels, self.site.label_share),
            "test_loss": metrics.nll(logits, labels),
            "ece": metrics.ece(logits, labels),
            "brier": metrics.brier(logits, labels),
        }

    def _reply(
        self,
        mail: Mail,
        *,
        facts: dict[str, str | int] | None = None,
        metrics: dict[str, float] | None = None,
        series: dict[str, list[float]] | None = None,
        arrays: Arrays | None = None,
    ) -> Answer:
        return Answer(self.place.name, mail.round, facts or {}, metrics or {}, series or {}, arrays or {})


def pick_device(name: str) -> torch.device:
    """Return the device of a setting; ``auto`` is the GPU that this process was given, else the CPU.

    Raises:
        SettingError: no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise SettingError("device", name, "auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise SettingError("device", name, f"a device of this process ({torch.cuda.device_count()} GPUs visible)")
    if device.type == "cuda":
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    return device
