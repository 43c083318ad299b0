"""What of a model does not train, when its head alone does: what it says of the data is computed once, and kept."""

import hashlib
import os
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from clients.state import make_private, write_whole
from fedkd.data.appearance import Appearance
from fedkd.data.lock import exclusive
from fedkd.data.proxy import fingerprint
from fedkd.data.samples import Samples
from fedkd.training.partial import features, frozen_part, head_name

_MOST_ON_DISK, _MOST_IN_MEMORY = 8 * 2**30, 2**30  # bytes; beyond them those go that were not used for longest
_FEATURES = "features"


@dataclass(frozen=True)
class Body:
    """A model without its head.

    Attributes:
        key: hash over all that its features depend on beside the images; two of one key are one.
        folder: where features are kept.
        make: builds the model anew, on its device.
        head: the name of its head.
    """

    key: str
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
        digest = hashlib.blake2b(f"{head} {probe.device.type} {torch.get_num_threads()}".encode(), digest_size=16)
        said = features(model, head, probe)
        for name, value in (*frozen_part(model, head), ("", said)):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        return cls(digest.hexdigest(), folder, make, head)

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
        make_private(self.folder)
        with exclusive(path.with_suffix(".lock")):  # who needs the same waits for it
            if path.is_file():
                os.utime(path)
                return load_file(path)[_FEATURES]
            found = features(self.make(), self.head, images).cpu()
            write_whole(path, lambda partial: save_file({_FEATURES: found}, str(partial)))
            _forget(self.folder, but=path)
            return found


_memory: OrderedDict[Path, Tensor] = OrderedDict()  # the process's cache; what it holds can be read again


def _remember(path: Path, found: Tensor) -> None:
    _memory[path] = found
    while len(_memory) > 1 and sum(kept.numel() * kept.element_size() for kept in _memory.values()) > _MOST_IN_MEMORY:
        _memory.popitem(last=False)


def _forget(folder: Path, *, but: Path) -> None:
    """Remove what was not used for longest from a folder that holds too much."""
    there = sorted((path.stat().st_mtime, path.stat().st_size, path) for path in folder.glob("*.safetensors"))
    over = sum(size for _, size, _ in there) - _MOST_ON_DISK
    for _, size, path in there:
        if over <= 0:
            return
        if path != but:
            path.unlink(missing_ok=True)
            path.with_suffix(".lock").unlink(missing_ok=True)
            over -= size
