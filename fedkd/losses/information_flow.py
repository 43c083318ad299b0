"""Distillation by information flow: a student learns how like its teacher finds each pair of samples, layer by layer.

Features enter only through kernels over the samples of a batch, so the widths of student and teacher may differ.

    K_cos = (cos + 1)/2,  cos = xy/((‖x‖ + 1e-6)(‖y‖ + 1e-6)),  K_tst = 1/(1 + d),  d = √(‖x − y‖² + 1e-6)

Each kernel's rows are normalised to conditional probabilities P, and student and teacher are compared by the Jeffreys
divergence J = Σ (P_t − P_s)(log P_t − log P_s). J_cos ignores the features' scale, J_tst their translation, both any
rotation.

Source: Passalis et al., CVPR 2020, https://arxiv.org/abs/2005.00727 [paper], https://github.com/passalis/pkth [code].
"""

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["FlowDivergence", "FlowLoss", "features", "flow_divergence", "project", "transfer", "transfer_via_auxiliary"]

_EPSILON = 1e-6


class FlowDivergence(NamedTuple):
    """The Jeffreys divergence under each kernel, scalars in nats."""

    cosine: Tensor
    student_t: Tensor


def flow_divergence(student_features: Tensor, teacher_features: Tensor, *, variant: str = "paper") -> FlowDivergence:
    """Divergence of the pairwise likenesses of a batch.  [B, D_s], [B, D_t] -> 2 scalars, nats; unbounded.

    Antipodal features would make K_cos zero and J infinite: K_cos is held at 1e-6 or more. A feature of all zeros has
    cosine 0 to every other.

    Args:
        student_features: ``[B, D_s]``.
        teacher_features: ``[B, D_t]``, detached.
        variant: ``paper`` leaves a sample's likeness to itself out, sums over the pairs and divides by B [paper];
            ``code`` keeps it and averages over the B² pairs [code].

    Raises:
        ValueError: a mismatched shape, a dtype, a variant, or B = 1 under ``paper``, which leaves no pair.

    >>> student = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
    >>> flow_divergence(student, torch.eye(3), variant="code")
    FlowDivergence(cosine=tensor(0.0212), student_t=tensor(0.0024))
    """
    _check(student_features, teacher_features, variant)
    dtype = torch.float64 if student_features.dtype == torch.float64 else torch.float32
    # In half precision the kernels' differences would drown: autocast is kept out.
    with torch.autocast(student_features.device.type, enabled=False):
        student, teacher = student_features.to(dtype), teacher_features.detach().to(dtype)
        cosine, student_t = (
            _jeffreys(kernel(student), kernel(teacher), variant) for kernel in (_log_cosine, _log_student_t)
        )
    return FlowDivergence(cosine, student_t)


def _log_cosine(features: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(features, dim=-1, keepdim=True)
    # Features of all zeros are left: divided by epsilon, their gradient would explode.
    unit = features / torch.where(norm > 0, norm + _EPSILON, 1)
    return ((unit @ unit.T + 1) / 2).clamp_min(_EPSILON).log()


def _log_student_t(features: Tensor) -> Tensor:
    # Distances by way of ‖x‖² + ‖y‖² − 2xy lose digits to a common offset, and those of a sample to itself come out
    # only nearly zero.
    features = features - features.mean(dim=0)
    square = features.square().sum(dim=-1)
    squared = (square.unsqueeze(1) + square - 2 * features @ features.T).clamp_min(0)
    itself = torch.eye(len(features), dtype=torch.bool, device=features.device)
    return -torch.log1p((squared.masked_fill(itself, 0) + _EPSILON).sqrt())


def _jeffreys(log_student: Tensor, log_teacher: Tensor, variant: str) -> Tensor:
    batch = len(log_student)
    if variant == "paper":
        others = ~torch.eye(batch, dtype=torch.bool, device=log_student.device)
        log_student, log_teacher = (log[others].reshape(batch, batch - 1) for log in (log_student, log_teacher))
    log_student, log_teacher = log_student.log_softmax(dim=-1), log_teacher.log_softmax(dim=-1)
    terms = (log_teacher.exp() - log_student.exp()) * (log_teacher - log_student)
    return terms.sum() / batch if variant == "paper" else terms.mean()


@dataclass(frozen=True)
class FlowLoss:
    """Information-flow loss over layers, Σ_l α_l·(J_cos + J_tst), with the critical-phase schedule.

    The last layer has weight 1 throughout, the others ``initial·decay^epoch``: strong while a network's flow forms,
    gone later.

    Args:
        initial: weight of the intermediate layers in epoch 0; 100 [code].
        decay: its factor per epoch, in (0, 1]; 0.7 [code].
        variant: ``paper`` or ``code``, see :func:`flow_divergence`.

    >>> FlowLoss().weights(layers=3, epoch=1)
    [70.0, 70.0, 1.0]
    """

    initial: float = 100.0
    decay: float = 0.7
    variant: str = "paper"

    def __post_init__(self) -> None:
        if self.initial < 0:
            raise ValueError(f"Expected argument `initial` to be >= 0, but got {self.initial!r}.")
        if not 0 < self.decay <= 1:
            raise ValueError(f"Expected argument `decay` to be in (0, 1], but got {self.decay!r}.")
        _check_variant(self.variant)

    def weights(self, *, layers: int, epoch: int) -> list[float]:
        """Return α_l for each of ``layers`` layers, first to last, in ``epoch`` (from 0)."""
        return [self.initial * self.decay**epoch] * (layers - 1) + [1.0]

    def __call__(self, student_features: Sequence[Tensor], teacher_features: Sequence[Tensor], *, epoch: int) -> Tensor:
        """Return the loss of a batch: features ``[B, D]`` of as many student as teacher layers, first to last."""
        if not student_features or len(student_features) != len(teacher_features):
            raise ValueError(
                "Expected arguments `student_features` and `teacher_features` to hold equally many layers, at least 1, "
                f"but got {len(student_features)} and {len(teacher_features)}."
            )
        weights = self.weights(layers=len(student_features), epoch=epoch)
        flows = [
            flow_divergence(student, teacher, variant=self.variant)
            for student, teacher in zip(student_features, teacher_features, strict=True)
        ]
        terms = [weight * (flow.cosine + flow.student_t) for weight, flow in zip(weights, flows, strict=True)]
        return torch.stack(terms).sum()


@contextmanager
def features(model: nn.Module, layers: Sequence[str], *, pool: str = "none") -> Iterator[Mapping[str, Tensor]]:
    """Take the features of named layers from every forward pass within the block.

    Args:
        model: any module.
        layers: names as in ``model.named_modules()``.
        pool: feature maps ``[B, C, H, W]`` are flattened (``none``, as in the authors' code) or averaged over their
            places (``mean``), which is smaller and the same at every resolution [ours].

    Yields:
        The layers' outputs of the latest pass, ``[B, D]`` by name, in the order of ``layers``.

    Raises:
        ValueError: a layer the model does not have, or one whose output is no batch of vectors or maps.

    >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
    >>> with features(model, ["1", "3"], pool="mean") as found:
    ...     logits = model(torch.zeros(5, 1, 4, 4))
    >>> {name: tuple(tensor.shape) for name, tensor in found.items()}
    {'1': (5, 4), '3': (5, 2)}
    """
    if pool not in ("none", "mean"):
        raise ValueError(f"Expected argument `pool` to be one of ['none', 'mean'], but got {pool!r}.")
    modules = {name: module for name, module in model.named_modules() if name}
    for layer in layers:
        if layer not in modules:
            close = difflib.get_close_matches(layer, modules) or list(modules)[:12]
            raise ValueError(
                f"Expected argument `layers` to be layers of the model, such as {close}, but got {layer!r}."
            )
    found: dict[str, Tensor] = {}
    handles = [modules[layer].register_forward_hook(_taking(found, layers, layer, pool)) for layer in layers]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _taking(found: dict[str, Tensor], layers: Sequence[str], layer: str, pool: str) -> Callable[..., None]:
    def take(_module: nn.Module, _inputs: Any, output: Any) -> None:
        if not isinstance(output, Tensor) or output.dim() < 2:
            shown = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(f"Expected layer {layer!r} to give a tensor [B, D, ...], but got {shown}.")
        flat = output.flatten(2).mean(dim=-1) if pool == "mean" and output.dim() > 2 else output.flatten(1)
        # Copied, as an in-place activation behind the layer would change what was taken.
        found[layer] = flat.clone()

    return take


def project(features: Tensor, dimensions: int = 64, *, seed: int) -> Tensor:
    """Project features to few dimensions by a random Gaussian matrix, to exchange them.  [N, D] -> [N, min(D, d')].

    Entries N(0, 1/d') keep squared distances and cosines in expectation, each to about 1/√d' (Johnson-Lindenstrauss)
    [ours]; that noise is a floor under the flow divergence to features so projected. The matrix depends on D, d' and
    the seed alone: the same on every machine and in every round.

    >>> project(torch.ones(2, 500), 16, seed=0).shape
    torch.Size([2, 16])
    """
    if features.dim() != 2 or not features.is_floating_point():
        raise ValueError(
            f"Expected argument `features` to be floats [N, D], but got {features.dtype} of {list(features.shape)}."
        )
    if dimensions < 1:
        raise ValueError(f"Expected argument `dimensions` to be >= 1, but got {dimensions!r}.")
    width = features.shape[-1]
    if width <= dimensions:
        return features
    matrix = torch.randn(width, dimensions, generator=torch.Generator().manual_seed(seed)) / dimensions**0.5
    projected: Tensor = features @ matrix.to(features)
    return projected


def transfer(
    student: nn.Module,
    teacher: nn.Module,
    inputs: Tensor,
    *,
    student_layers: Sequence[str],
    teacher_layers: Sequence[str],
    loss: FlowLoss,
    epochs: int,
    seed: int,
    batch_size: int = 128,
    learning_rate: float = 1e-3,
    pool: str = "none",
) -> list[float]:
    """Train a student on its teacher's information flow alone, without labels; return the mean loss of each epoch.

    Adam at 1e-3 and batches of 128 [code]. Both models are on the device of ``inputs`` ``[N, ...]``, and are left in
    the mode, training or evaluation, that they came in.

    Raises:
        ValueError: layers that do not exist or pair up, or fewer than two inputs or samples in a batch.

    Source: arXiv 2005.00727 §3 [paper], with its code's settings [code].

    >>> from torch import nn
    >>> _ = torch.manual_seed(0)
    >>> student, teacher = nn.Sequential(nn.Linear(4, 2)), nn.Sequential(nn.Linear(4, 8), nn.ReLU())
    >>> losses = transfer(student, teacher, torch.randn(64, 4), student_layers=["0"], teacher_layers=["1"],
    ...                   loss=FlowLoss(), epochs=20, seed=0, learning_rate=0.01)
    >>> losses[-1] < losses[0]
    True
    """
    if len(inputs) < 2 or batch_size < 2:
        raise ValueError(
            "Expected arguments `inputs` and `batch_size` to allow for pairs of samples, "
            f"but got {len(inputs)} inputs and batch_size={batch_size!r}."
        )
    modes = [(module, module.training) for model in (student, teacher) for module in model.modules()]
    student.train()
    teacher.eval()
    optimizer = torch.optim.Adam(student.parameters(), lr=learning_rate)
    generator = torch.Generator().manual_seed(seed)
    losses = []
    try:
        with (
            features(student, student_layers, pool=pool) as of_student,
            features(teacher, teacher_layers, pool=pool) as of_teacher,
        ):
            for epoch in range(epochs):
                total = 0.0
                order = torch.randperm(len(inputs), generator=generator)
                # A last batch of one sample has no pairs.
                batches = [index for index in torch.split(order, batch_size) if len(index) > 1]
                for index in batches:
                    batch = inputs[index.to(inputs.device)]
                    student(batch)
                    with torch.no_grad():
                        teacher(batch)
                    value = loss(
                        [of_student[layer] for layer in student_layers],
                        [of_teacher[layer] for layer in teacher_layers],
                        epoch=epoch,
                    )
                    optimizer.zero_grad()
                    value.backward()  # type: ignore[no-untyped-call]
                    optimizer.step()
                    total += value.item()
                losses.append(total / len(batches))
    finally:
        for module, training in modes:
            module.training = training
    return losses


def transfer_via_auxiliary(
    student: nn.Module,
    teacher: nn.Module,
    make_auxiliary: Callable[[], nn.Module],
    inputs: Tensor,
    *,
    student_layers: Sequence[str],
    teacher_layer: str,
    loss: FlowLoss,
    auxiliary_epochs: int,
    epochs: int,
    seed: int,
    batch_size: int = 128,
    learning_rate: float = 1e-3,
    pool: str = "none",
) -> nn.Module:
    """Train a student through an auxiliary teacher of its own family, and return that auxiliary teacher.

    The layers of unlike networks do not correspond. So a network of the student's architecture, at about double width,
    first learns the teacher's last representation, ``teacher_layer``, at its own last of ``student_layers``; then the
    student learns from it layer by layer, under the same names.

    Args:
        student: trained in place.
        teacher: unchanged.
        make_auxiliary: builds the auxiliary network, on the device of ``inputs``, already trained on labels or not.
        inputs: ``[N, ...]``, without labels.
        student_layers: layers of student and auxiliary alike, first to last.
        teacher_layer: the teacher's last representation.
        loss: the loss and schedule of the second step.
        auxiliary_epochs: epochs of the first step.
        epochs: epochs of the second step.
        seed: of the order of the batches.
        batch_size: at least 2.
        learning_rate: Adam's.
        pool: see :func:`features`.

    Source: arXiv 2005.00727 §3 [paper].

    >>> from torch import nn
    >>> def family(width):
    ...     return nn.Sequential(nn.Linear(4, 4 * width), nn.ReLU(), nn.Linear(4 * width, 3))
    >>> auxiliary = transfer_via_auxiliary(
    ...     family(1), family(5), lambda: family(2), torch.randn(8, 4), student_layers=["0", "2"], teacher_layer="2",
    ...     loss=FlowLoss(), auxiliary_epochs=1, epochs=1, seed=0)
    >>> auxiliary[0].out_features
    8
    """
    auxiliary = make_auxiliary()
    transfer(
        auxiliary,
        teacher,
        inputs,
        student_layers=student_layers[-1:],
        teacher_layers=[teacher_layer],
        loss=loss,
        epochs=auxiliary_epochs,
        seed=seed,
        batch_size=batch_size,
        learning_rate=learning_rate,
        pool=pool,
    )
    transfer(
        student,
        auxiliary,
        inputs,
        student_layers=student_layers,
        teacher_layers=student_layers,
        loss=loss,
        epochs=epochs,
        seed=seed,
        batch_size=batch_size,
        learning_rate=learning_rate,
        pool=pool,
    )
    return auxiliary


def _check(student_features: Tensor, teacher_features: Tensor, variant: str) -> None:
    for name, tensor in (("student_features", student_features), ("teacher_features", teacher_features)):
        if tensor.dim() != 2 or tensor.numel() == 0 or not tensor.is_floating_point():
            raise ValueError(
                f"Expected argument `{name}` to be floats of shape [B, D] with B, D >= 1, "
                f"but got {tensor.dtype} of shape {list(tensor.shape)}."
            )
    if len(student_features) != len(teacher_features):
        raise ValueError(
            "Expected arguments `student_features` and `teacher_features` to hold the same B samples, "
            f"but got shapes {list(student_features.shape)} and {list(teacher_features.shape)}."
        )
    _check_variant(variant)
    if variant == "paper" and len(student_features) == 1:
        raise ValueError(
            "Expected argument `student_features` to hold B >= 2 samples with variant='paper', "
            f"but got shape {list(student_features.shape)}."
        )


def _check_variant(variant: str) -> None:
    if variant not in ("paper", "code"):
        raise ValueError(f"Expected argument `variant` to be one of ['paper', 'code'], but got {variant!r}.")
