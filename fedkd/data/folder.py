"""Image folders: `train/CLASS/*` and `test/CLASS/*`; as a proxy set also images alone, however deep they lie."""

import logging
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedkd.data.images import SUFFIXES, ImageError, read_images
from fedkd.errors import SettingError
from fedkd.settings.sources import Place

Array = npt.NDArray[Any]

_log = logging.getLogger(__name__)
_KINDS_SHOWN = 3


def load_folder(spec: str, place: Place, *, key: str) -> tuple[Array, Array, Array, Array, list[str]]:
    """Load `folder:PATH` or `folder:PATH@SIZE`: images [N, H, W, C] uint8, labels, test images and labels, classes.

    The classes are the folders in `train`, sorted by name; hidden ones and what archives leave behind (`__MACOSX`) are
    none. A class's images may lie in folders of their own. Images are grey if all of them are, else RGB. They must have
    one size, unless SIZE says to which square of SIZE × SIZE pixels they are resized. How many files are left out is
    said in the log.

    Raises:
        SettingError: on `key`, naming the folder or file that is absent, empty, unreadable or of another size.
    """
    root = place.path
    for part in ("train", "test"):
        if not (root / part).is_dir():
            raise SettingError(key, spec, f"a folder with train/ and test/; there is no {(root / part).absolute()}")
    found = {part: _Part.of(root / part) for part in ("train", "test")}
    classes = found["train"].classes
    unknown = sorted(set(found["test"].classes) - set(classes))
    if unknown:
        raise SettingError(key, spec, f"a folder whose test classes are among those of train, not {', '.join(unknown)}")
    files = {part: those.labelled(classes, spec, key=key) for part, those in found.items()}
    images = _read([path for part in files.values() for path, _ in part], place, spec, key=key)
    labels = np.array([label for part in files.values() for _, label in part])
    _tell_skipped(spec, [those.left_out for those in found.values()])
    count = len(files["train"])
    return images[:count], labels[:count], images[count:], labels[count:], classes


def load_public_folder(spec: str, place: Place, *, key: str) -> tuple[Array, Array | None, list[str]]:
    """Load a folder as a proxy set: images [N, H, W, C] uint8, and where there are `train/CLASS/*` labels and classes.

    Without classes it is all images in `train/`, or without that in the folder, however deep, in the order of their
    paths.

    Raises:
        SettingError: on `key`, as :func:`load_folder`.
    """
    if not place.path.is_dir():
        raise SettingError(key, spec, f"an existing folder; there is none at {place.path.absolute()}")
    root = place.path / "train" if (place.path / "train").is_dir() else place.path
    part = _Part.of(root)
    if root != place.path and any(part.images[name] for name in part.classes):
        files = part.labelled(part.classes, spec, key=key)
        images = _read([path for path, _ in files], place, spec, key=key)
        _tell_skipped(spec, [part.left_out])
        return images, np.array([label for _, label in files]), part.classes
    inside = [path for name in part.classes for path in part.images[name]]
    alone = sorted(part.loose + inside, key=lambda path: path.relative_to(root).parts)
    if not alone:
        others = f", but {_kinds(part.skipped)}" if part.skipped else ""
        raise SettingError(key, spec, f"a folder with images; in {root.absolute()} there are none{others}")
    images = _read(alone, place, spec, key=key)
    _tell_skipped(spec, [part.skipped])
    return images, None, []


@dataclass
class _Part:
    """What lies in `train/` or `test/`.

    Attributes:
        root: that folder.
        images: by class, however deep below its folder, in an order that is the same on every machine.
        loose: images that are in no class.
        skipped: files that are no images by their names, and hidden folders.
    """

    root: Path
    images: dict[str, list[Path]] = field(default_factory=dict)
    loose: list[Path] = field(default_factory=list)
    skipped: list[Path] = field(default_factory=list)

    @classmethod
    def of(cls, root: Path) -> "_Part":
        part = cls(root)
        for entry in sorted(root.iterdir()):
            if entry.is_dir() and not _hidden(entry.name):
                part.images[entry.name] = _below(entry, part.skipped)
            elif entry.is_dir() or not _is_image(entry):
                part.skipped.append(entry)
            else:
                part.loose.append(entry)
        return part

    @property
    def classes(self) -> list[str]:
        return list(self.images)

    @property
    def left_out(self) -> list[Path]:
        return self.loose + self.skipped

    def labelled(self, classes: Sequence[str], spec: str, *, key: str) -> list[tuple[Path, int]]:
        """Return the images in classes with their labels.

        Raises:
            SettingError: there are none, or a class has files of which none is an image.
        """
        for name in (name for name in self.classes if not self.images[name]):
            own = [path for path in self.skipped if path.is_relative_to(self.root / name) and not _hidden(path.name)]
            if own:  # not what keeps an empty folder in an archive, such as .gitkeep
                raise SettingError(
                    key, spec, f"a folder with images in every class that has files; in {self.root / name} is only "
                    f"{_kinds(own)}",
                )  # fmt: skip
        found = [(path, label) for label, name in enumerate(classes) for path in self.images.get(name, ())]
        if not found:
            there = f", but {len(self.loose)} that are in no class" if self.loose else ""
            raise SettingError(
                key, spec, f"a folder with images in {self.root.name}/CLASS/; there are none in {self.root}{there}"
            )
        return found


def _below(folder: Path, skipped: list[Path]) -> list[Path]:
    """Return the images at any depth; add to `skipped` what else is there."""
    found: list[Path] = []
    for place, folders, files in os.walk(folder):
        skipped += [Path(place, name) for name in folders if _hidden(name)]
        folders[:] = [name for name in folders if not _hidden(name)]
        for path in (Path(place, name) for name in files):
            (found if _is_image(path) else skipped).append(path)
    return sorted(found, key=lambda path: path.relative_to(folder).parts)


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not _hidden(path.name)


def _hidden(name: str) -> bool:
    """Tell whether a name is one that archives, systems and editors leave behind."""
    return name.startswith((".", "__MACOSX", "@eaDir"))


def _read(files: Sequence[Path], place: Place, spec: str, *, key: str) -> Array:
    try:
        return read_images(((str(path), path) for path in files), size=place.size)
    except ImageError as error:
        raise SettingError(key, spec, f"a folder of images {error}") from error


def _tell_skipped(spec: str, parts: Sequence[Sequence[Path]]) -> None:
    """Say in one line what was left out: somebody may miss it."""
    if left_out := [path for part in parts for path in part]:
        _log.warning("%s: left out %s, such as %s", spec, _kinds(left_out), left_out[0])


def _kinds(paths: Sequence[Path]) -> str:
    """Return how many files there are, of which kinds."""
    kinds = Counter(path.suffix.lower() or "no suffix" for path in paths).most_common()
    named = [f"{count} {kind}" for kind, count in kinds[:_KINDS_SHOWN]]
    more = sum(count for _, count in kinds[_KINDS_SHOWN:])
    return f"{len(paths)} files or folders ({', '.join([*named, *([f'{more} others'] * bool(more))])})"
