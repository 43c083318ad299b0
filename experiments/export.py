"""`fedkd export`: a peer's model as a file that loads without fedkd, its scaling of inputs inside."""

import contextlib
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model
from torch import Tensor, nn

from fedkd import models
from fedkd.errors import FedkdError, SettingError
from fedkd.models.card import Card, CardError
from fedkd.results.claim import MODELS

_WHERE = (
    f"{MODELS}/*.safetensors",
    f"*/{MODELS}/*.safetensors",
    f"state/*/{MODELS}/*.safetensors",
    f"peers/*/state/*/{MODELS}/*.safetensors",
)
"""Below a run's folder or a real peer's own, its `state-dir`, its part of a deployment, a trial on one machine."""

_TOLERANCE = 1e-4  # between logits of the same weights, computed by other kernels


class ExportError(FedkdError):
    """There is no such model, or it cannot be written in that form."""


class Raw(nn.Module):
    """A model with its scaling of inputs before it: ``[B, ...]`` float32 of the model's own size -> logits.

    Args:
        model: takes scaled inputs.
        card: says how they are scaled.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, card: Card) -> None:
        super().__init__()
        shape = (1, -1) + (1,) * (len(card.input_shape) - 1)
        self.model = model
        self.register_buffer("mean", torch.tensor(card.mean).view(shape))
        self.register_buffer("std", torch.tensor(card.std).view(shape))

    def forward(self, inputs: Tensor) -> Tensor:
        """Return logits ``[B, C]``."""
        logits: Tensor = self.model((inputs - self.mean) / self.std)
        return logits


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        file: the model.
        about: the JSON beside it: classes, input, accuracy, where it comes from.
        card: of the model.
    """

    file: Path
    about: Path
    card: Card


def export(run: Path, *, peer: str | None, form: str, out: Path | None = None) -> Exported:
    """Write a peer's model as a file that loads without fedkd, and a JSON file that says how to use it.

    Args:
        run: a run's folder, a real peer's own folder, or the file of a model.
        peer: whose model; None: the only one there.
        form: one of :data:`FORMATS`.
        out: the file; None: the peer's name in the current folder.

    Raises:
        FedkdError: there is no such model, a file is there already, or the model cannot be written in that form.
    """
    if form not in FORMATS:
        raise SettingError("--format", form, f"one of {', '.join(FORMATS)}")
    if form == "onnx":
        _need_onnx()
    found = find(run, peer)
    card = Card.read(found)
    file = out or Path(f"{card.peer}.{FORMATS[form].suffix}")
    about = file.with_name(f"{file.name}.json")
    for path in (file, about):
        if path.exists():
            raise SettingError("--out", str(path), "a file that is not there yet: nothing is overwritten")
    with _whole(file) as partial:
        FORMATS[form].write(found, card, partial)
    with _whole(about) as partial:
        partial.write_text(json.dumps(_about(card, form), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return Exported(file, about, card)


def find(run: Path, peer: str | None) -> Path:
    """Return the file of a peer's model: of several runs at a real peer, the newest.

    Raises:
        ExportError: there is none, or it is not clear whose.
    """
    run = run.expanduser()
    if run.is_file():
        return run
    files = next((there for where in _WHERE if (there := sorted(run.glob(where)))), [])
    cards: dict[Path, Card] = {}
    for file in files:
        with contextlib.suppress(CardError):
            cards[file] = Card.read(file)
    if not cards:
        raise ExportError(
            f"Expected a run's folder with models in {MODELS}/, but {run} has none: "
            "a comparison, or a run with `keep-models = false`, keeps none, and real peers keep theirs themselves."
        )
    names = sorted({card.peer for card in cards.values()})
    if peer is None and len(names) > 1:
        raise SettingError("--peer", peer, f"one of {', '.join(names)}")
    own = [file for file, card in cards.items() if card.peer == (peer or names[0])]
    if not own:
        raise SettingError("--peer", peer, f"one of {', '.join(names)}")
    return max(own, key=lambda file: file.stat().st_mtime_ns)


def load(file: Path, card: Card) -> nn.Module:
    """Build a model and give it the weights of its file, in evaluation mode.

    Raises:
        SettingError: what builds it cannot be imported or builds another model now.
        ExportError: the weights do not fit.
    """
    model = models.build(card.model, input_shape=card.input_shape, num_classes=len(card.classes), seed=0, key="model")
    try:
        load_model(model, file)
    except Exception as error:
        raise ExportError(f"The weights of {file} do not fit what {card.model} builds now: {error}") from error
    return model.eval()


def load_raw(file: Path) -> Raw:
    """Build the model of a file, in evaluation mode, with its scaling of inputs before it.

    Raises:
        FedkdError: the file has no card, or what builds the model cannot be imported or builds another one now.
    """
    card = Card.read(file)
    return Raw(load(file, card), card).eval()


def _about(card: Card, form: str) -> dict[str, Any]:
    inside = form != "safetensors"
    scaled = "inside of the model" if inside else "(inputs - mean) / std per channel, before the model"
    resized = {"resized": f"{card.resized}, with antialiasing, before"} if card.resized else {}
    return {
        "format": form,
        "input": {
            "dtype": "float32",
            "shape": ["batch", *card.input_shape],
            "pixels": "8 bits divided by 255",
            **resized,
        },
        "scaling": scaled,
        "output": {"logits": ["batch", len(card.classes)]},
        **card.content(),
    }


def _copy(found: Path, card: Card, file: Path) -> None:
    file.write_bytes(found.read_bytes())


def _torchscript(found: Path, card: Card, file: Path) -> None:
    raw, example = _raw(found, card)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces that TorchScript will go some day; until then it is asked for
        with torch.no_grad():
            traced = torch.jit.trace(raw, example, check_trace=False)
        torch.jit.save(traced, str(file), _extra_files={"card.json": json.dumps(card.content())})
        _compare(torch.jit.load(str(file)), raw, card)


def _pt2(found: Path, card: Card, file: Path) -> None:
    raw, example = _raw(found, card)
    program = torch.export.export(raw, (example,), dynamic_shapes=_batch_is_free())
    torch.export.save(program, str(file), extra_files={"card.json": json.dumps(card.content())})
    _compare(torch.export.load(str(file)).module(), raw, card)


def _onnx(found: Path, card: Card, file: Path) -> None:
    import onnx

    raw, example = _raw(found, card)
    with warnings.catch_warnings(), contextlib.redirect_stdout(None):
        warnings.simplefilter("ignore")
        torch.onnx.export(
            raw, (example,), str(file), input_names=["inputs"], output_names=["logits"], dynamo=True,
            dynamic_shapes=_batch_is_free(), external_data=False, verbose=False,
        )  # fmt: skip
    content = onnx.load(str(file))
    onnx.helper.set_model_props(content, {"card": json.dumps(card.content())})
    onnx.save(content, str(file))


def _need_onnx() -> None:
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401 - what torch's exporter is made of
    except ImportError as error:
        raise ExportError(f"The format onnx needs {error.name or 'onnx'}: pip install 'fedkd[export]'.") from error


def _raw(found: Path, card: Card) -> tuple[Raw, Tensor]:
    """Return a model that takes raw inputs, and two of those."""
    raw = load_raw(found)
    for parameter in raw.parameters():
        parameter.requires_grad_(False)
    return raw, torch.rand(2, *card.input_shape, generator=torch.Generator().manual_seed(0))


def _batch_is_free() -> dict[str, dict[int, Any]]:
    return {"inputs": {0: torch.export.Dim("batch", min=1)}}


@torch.no_grad()
def _compare(loaded: Callable[[Tensor], Tensor], raw: Raw, card: Card) -> None:
    """See that what was written answers as the model does, to batches of other sizes too."""
    for size in (1, 3):
        inputs = torch.rand(size, *card.input_shape, generator=torch.Generator().manual_seed(size))
        if not torch.allclose(loaded(inputs), raw(inputs), rtol=_TOLERANCE, atol=_TOLERANCE):
            raise ExportError(
                f"{card.model} cannot be written in this form: for {size} inputs the file answers otherwise."
            )


@contextlib.contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """Yield the path to write a file to that is then there as a whole, and replaces none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".export-") as folder:
        partial = Path(folder) / path.name
        yield partial
        try:
            os.link(partial, path)
        except FileExistsError as error:
            raise SettingError("--out", str(path), "a file that is not there yet: nothing is overwritten") from error
        except OSError:  # a disk without links
            partial.rename(path)


@dataclass(frozen=True)
class _Format:
    suffix: str
    write: Callable[[Path, Card, Path], None]


FORMATS: Mapping[str, _Format] = {
    "safetensors": _Format("safetensors", _copy),
    "torchscript": _Format("pt", _torchscript),
    "pt2": _Format("pt2", _pt2),
    "onnx": _Format("onnx", _onnx),
}
