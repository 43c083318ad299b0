"""What of a model does not train, when its head alone does: what it says of the data is computed once, and kept."""

import hashlib
import logging
import os
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from clients.state import make_private, write_whole
from fedkd.data import appearance, normalize
from fedkd.data.appearance import Appearance
from fedkd.data.lock import exclusive
from fedkd.data.proxy import fingerprint
from fedkd.data.samples import Samples
from fedkd.training import partial
from fedkd.training.partial import features, frozen_part, head_name

_MOST_ON_DISK, _MOST_IN_MEMORY = 8 * 2**30, 2**30  # bytes; beyond them those go that were not used for longest
_FEATURES = "features"
_CODE = hashlib.blake2b(
    b"".join(Path(str(module.__file__)).read_bytes() for module in (appearance, normalize, partial)), digest_size=16
).hexdigest()
"""Of the modules between an image and its features: where they change, features are computed anew."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Body:
    """A model without its head.

    Attributes:
        key: hash over all that its features depend on beside the images; two of one key are one.
        weights: hash over its weights alone.
        folder: where features are kept.
        make: builds the model anew, on its device.
        head: the name of its head.
    """

    key: str
    weights: str = field(compare=False)
    folder: Path = field(compare=False)
    make: Callable[[], nn.Module] = field(compare=False)
    head: str = field(compare=False)

    @classmethod
    def of(cls, make: Callable[[], nn.Module], probe: Tensor, folder: Path) -> "Body":
        """Look at a model.

        Args:
            make: builds it, with its weights.
            probe: two inputs as it sees them, ``[2, ...]``: what it says of them is part of the key, so that another
                way through the same weights is another body.
            folder: where features are kept.

        Raises:
            ValueError: it has no head that could train alone.
        """
        model = make()
        head = head_name(model, probe)
        weights, key = (hashlib.blake2b(digest_size=16) for _ in range(2))
        for name, value in frozen_part(model, head):
            _add(weights, name, value)
        key.update(f"{weights.hexdigest()} {head} {_CODE} {torch.__version__} {_where(probe.device)}".encode())
        _add(key, "", features(model, head, probe))
        return cls(key.hexdigest(), weights.hexdigest(), folder, make, head)

    def features(self, kept: Tensor, look: Appearance, device: torch.device) -> Tensor:
        """Return what the head is given for images as they are kept, ``[N, d]`` float32 on a device.

        They are read from disk where some process of this user computed them before.
        """
        said = f"{self.key} {look!r} {fingerprint(kept)}"
        path = self.folder / f"{hashlib.blake2b(said.encode(), digest_size=16).hexdigest()}.safetensors"
        if path not in _memory:
            _remember(path, self._kept(path, Samples(kept.to(device), look)))
        _memory.move_to_end(path)
        return _memory[path].to(device)

    def _kept(self, path: Path, images: Samples) -> Tensor:
        try:
            make_private(self.folder)
            with exclusive(path.with_suffix(".lock")):  # who needs the same waits for it
                if (found := _read(path)) is None:
                    found = features(self.make(), self.head, images).cpu()
                    write_whole(path, lambda file: save_file({_FEATURES: found}, str(file)))
                    _forget(self.folder, but=path)
                return found
        except OSError as error:  # a full disk, or a home that cannot be written to: a pity, and no more
            _log.warning("features are not kept in %s: %s", self.folder, error)
            return features(self.make(), self.head, images).cpu()


def _read(path: Path) -> Tensor | None:
    try:
        found = load_file(path)[_FEATURES]
        os.utime(path)
    except FileNotFoundError:  # or another process has just removed it
        return None
    return found


def _add(digest: "hashlib.blake2b", name: str, value: Tensor) -> None:
    digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
    digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)


def _where(device: torch.device) -> str:
    """Return what the last bits of a result depend on beside the code."""
    gpu = device.type == "cuda"
    return torch.cuda.get_device_name(device) if gpu else f"{device.type} {torch.get_num_threads()}"


_memory: OrderedDict[Path, Tensor] = OrderedDict()  # the process's cache; what it holds can be read again


def _remember(path: Path, found: Tensor) -> None:
    _memory[path] = found
    while len(_memory) > 1 and sum(kept.numel() * kept.element_size() for kept in _memory.values()) > _MOST_IN_MEMORY:
        _memory.popitem(last=False)


def _forget(folder: Path, *, but: Path) -> None:
    """Remove what was not used for longest from a folder that holds too much; who reads it then computes it anew."""
    there = []
    for path in folder.glob("*.safetensors"):
        with suppress(FileNotFoundError):
            there.append((path.stat().st_mtime, path.stat().st_size, path))
    over = sum(size for _, size, _ in there) - _MOST_ON_DISK
    for _, size, path in sorted(there):
        if over <= 0:
            return
        if path != but:
            path.unlink(missing_ok=True)
            over -= size
