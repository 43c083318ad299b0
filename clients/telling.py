"""What a peer tells of itself beside its logits: its class counts, how sure it is of a sample, what it leaves out.

All of it is found once in a run, of the model with which the peer starts, and for the whole proxy set, as FedAUX and
Selective-FD do [code]; each letter repeats it for the samples that it is about. It lies in the run's folder: what is
told after a crash is what was told before.
"""

import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from clients.data import Site
from clients.learner import Heard
from clients.releases import Private
from clients.state import StateError, make_private, write_whole
from fedkd.data.samples import Inputs, subset
from fedkd.losses import selection
from fedkd.privacy import reproducible_normal, secret_normal
from fedkd.seeding import derive
from fedkd.settings.config import RunConfig
from fedkd.training.loops import predict
from fedkd.wire.claims import COUNTS, DENSITY, MASK, Claims

_FILE = "told.npz"
_SET_ASIDE = 0.2  # of the private samples, to find a threshold by, where nothing is held out
_MOST_ROWS = 2000  # private and public ones that a kernel compares: its matrix is solved
_MOST_REGRESSED = 20_000
_FOR_WIDTH = 1000
_WIDTH = 0.2
"""A kernel's, over the median distance of private samples [ours]: at 1, the published rule of thumb, it is so wide that
the ratio hardly tells known classes from others; on the digits AUC 0.68 at 1, 0.82 at 0.5, 0.90 from 0.25 to 0.15."""


@dataclass(frozen=True)
class Telling:
    """What one peer tells in one run.

    Attributes:
        config: the run's settings.
        site: the peer's data.
        index: its number, of which its random streams are derived.
        folder: the run's, which exists once the peer has started.
        private: what noises the class counts; None: they are told as they are.
        simulated: whether noise comes from the run's seed, so that a run can be repeated.
    """

    config: RunConfig
    site: Site
    index: int
    folder: Path
    private: Private | None
    simulated: bool

    def claims(self, start: Callable[[], nn.Module]) -> Claims:
        """Return what is said of the whole proxy set.

        Args:
            start: returns the model with which the peer starts; called if nothing was found out in this run so far.

        Raises:
            StateError: what was found out cannot be kept, or read.
            BudgetError: nothing is left to pay noised counts with.
        """
        counts = self._counts() if COUNTS in self.config.told else None
        if not {DENSITY, MASK} & set(self.config.told):
            return Claims(counts)
        path = self.folder / _FILE
        try:
            if not path.exists():
                found = self._found_out(start())
                make_private(self.folder)
                write_whole(path, lambda partial: _save(partial, found))
            with np.load(path, allow_pickle=False) as file:
                kept = dict(file)
        except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
            raise StateError(f"cannot keep what is told of samples in {path}, or read it: {error}") from error
        return Claims(counts, kept.get(DENSITY), kept.get(MASK))

    def _counts(self) -> NDArray[np.float32]:
        """Return how many samples of each class the peer trains on, ``[C]``."""
        classes = len(self.site.commons.source.classes)
        counts = torch.bincount(self.site.labels, minlength=classes).float().cpu().numpy()
        return self.private.publish_counts(counts) if self.private else counts

    def _found_out(self, model: nn.Module) -> dict[str, NDArray[Any]]:
        """Return by claim what is said of each proxy sample; of none anything good where there is nothing private."""
        proxy, found = self.site.commons.proxy_inputs, {}
        if not len(self.site.inputs):
            found = {DENSITY: torch.zeros(len(proxy)), MASK: torch.zeros(len(proxy), dtype=torch.bool)}
        else:
            if DENSITY in self.config.told:
                found[DENSITY] = self._density(model)
            if MASK in self.config.told:
                found[MASK] = self._selected(model)
        return {name: found[name].cpu().numpy() for name in found if name in self.config.told}

    def _density(self, model: nn.Module) -> Tensor:
        inputs = self.site.inputs
        drawn = self._drawn(len(inputs), _MOST_REGRESSED, "density").to(inputs.device)
        private = penultimate(model, subset(inputs, drawn))
        public = penultimate(model, self.site.commons.proxy_inputs)
        private, public = selection.bounded(private, public)
        theta = selection.density_coefficients(private, public, penalty=self.config.density_penalty)
        if self.config.density_noise:
            rows = len(private) + len(public)
            deviation = self.config.density_noise * selection.density_sensitivity(rows, self.config.density_penalty)
            theta = theta + deviation * torch.from_numpy(self._normal(len(theta)))
        return selection.density_scores(theta, public).float()

    def _normal(self, count: int) -> NDArray[np.float64]:
        if self.simulated:
            return reproducible_normal((count, 1), derive(self.config.seed, "noise of density", self.index)).ravel()
        return secret_normal((count, 1)).ravel()

    def _selected(self, model: nn.Module) -> Tensor:
        if self.config.selector == "roc":
            return self._confident(model)
        known, held_out = self._set_aside()
        private, held = penultimate(model, known), penultimate(model, held_out)
        public = penultimate(model, self.site.commons.proxy_inputs)
        if self.config.selector == "k-means":
            count = min(len(private), int(self.site.labels.bincount().count_nonzero()))
            centres = selection.k_means(private, count, seed=derive(self.config.seed, "clusters", self.index))
            scores = [-selection.nearest_distance(centres, rows) for rows in (held, public)]
        else:
            private = private[self._drawn(len(private), _MOST_ROWS, "kernel")]
            others = public[self._drawn(len(public), _MOST_ROWS, "kernel")]
            some = private[self._drawn(len(private), _FOR_WIDTH, "width")]
            width = _WIDTH * selection.median_distance(some)
            penalty = len(others) ** -0.5
            ratios = selection.kulsif(private, others, torch.cat([held, public]), width=width, penalty=penalty)
            scores = [ratios[: len(held)], ratios[len(held) :]]
        return selection.at_least_quantile(scores[0], scores[1], self.config.selector_quantile)

    def _confident(self, model: nn.Module) -> Tensor:
        """Return which proxy samples the model is as sure of as of private ones: of those held out, where there are."""
        inputs = self.site.held_out.inputs if len(self.site.held_out.inputs) else self.site.inputs
        private, public = (_confidence(predict(model, rows)) for rows in (inputs, self.site.commons.proxy_inputs))
        return public.double() >= selection.roc_threshold(private, public)

    def _set_aside(self) -> tuple[Inputs, Inputs]:
        """Return private inputs to compare with, and others to find a threshold by; the same where there is but one."""
        inputs, held_out = self.site.inputs, self.site.held_out.inputs
        if len(held_out) or len(inputs) < 2:
            return inputs, held_out if len(held_out) else inputs
        order = self._order(len(inputs), "threshold").to(inputs.device)
        aside = max(1, round(_SET_ASIDE * len(inputs)))
        return subset(inputs, order[aside:]), subset(inputs, order[:aside])

    def _drawn(self, count: int, most: int, purpose: str) -> Tensor:
        """Return the indices of at most so many rows, on the CPU."""
        return self._order(count, purpose)[:most] if count > most else torch.arange(count)

    def _order(self, count: int, purpose: str) -> Tensor:
        generator = torch.Generator().manual_seed(derive(self.config.seed, "telling", purpose, self.index))
        return torch.randperm(count, generator=generator)


def penultimate(model: nn.Module, inputs: Inputs) -> Tensor:
    """Return what a model's last linear layer is given, on the CPU; its logits where there is no such layer, or no use.

    Args:
        model: on the device of the inputs, ``[N, ...]``.
        inputs: float32.

    Returns:
        ``[N, d]`` float32; a layer that works along a sequence is given the mean over its places [ours].
    """
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    seen: list[Tensor] = []

    def see(module: nn.Module, given: tuple[Tensor, ...]) -> None:
        if given:
            rows = given[0].detach().float()
            seen.append(rows.cpu() if rows.dim() == 2 else rows.flatten(1, -2).mean(dim=1).cpu())

    hook = linear[-1].register_forward_pre_hook(see) if linear else None
    try:
        logits = predict(model, inputs)
    finally:
        if hook:
            hook.remove()
    found = torch.cat(seen) if seen else logits.cpu()
    return found if len(found) == len(inputs) else logits.cpu()


def with_claims(heard: Heard, claims: Sequence[Claims]) -> Heard:
    """Add what teachers say of themselves to what was heard of them, in their order.

    Where teachers leave samples out and say nothing else of them, a sample that was sent has certainty 1.
    """
    counts, certainty = [said.counts for said in claims], [said.certainty for said in claims]
    sent = [None if said.sent is None else said.sent.astype(np.float32) for said in claims]
    device = heard.logits.device
    told = _stacked(certainty, device)
    return replace(heard, counts=_stacked(counts, device), certainty=_stacked(sent, device) if told is None else told)


def _stacked(arrays: Sequence[NDArray[np.float32] | None], device: torch.device) -> Tensor | None:
    there = [array for array in arrays if array is not None]
    return torch.from_numpy(np.stack(there)).to(device) if there else None


def _confidence(logits: Tensor) -> Tensor:
    """Return the greatest probability of each row ``[N, C]``."""
    return F.softmax(logits.double(), dim=-1).max(dim=-1).values.cpu()


def _save(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    with path.open("wb") as file:  # given a name, numpy would add to it
        np.savez(file, **arrays)  # type: ignore[arg-type]
