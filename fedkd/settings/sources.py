"""A data source by its name: how it is read, and from where. Imports no torch."""

import re
from dataclasses import dataclass
from pathlib import Path

from fedkd.plugins import READERS

_SIZE, _COLUMNS = r"(?:@(?P<size>[1-9]\d*))?$", r"(?:#(?P<columns>[^#@/]+))?"
_OPTIONS = {"folder": re.compile(_SIZE), **dict.fromkeys(("parquet", "hf"), re.compile(_COLUMNS + _SIZE))}
"""What may follow a path, by the kind of source."""

_OF_HUB = re.compile(r"\w[\w.-]*(?:/[\w.-]+)?")


@dataclass(frozen=True)
class Place:
    """A spec `KIND:PATH`, `folder:PATH@SIZE`, or `parquet:PATH#IMAGE,LABEL@SIZE` and `hf:` likewise, in its parts.

    Attributes:
        kind: one of :data:`fedkd.plugins.READERS`.
        name: the path as it was written, without what follows it.
        path: where that is, if it is one.
        columns: the columns of the images and, after it, of the labels, where they are named.
        size: side in pixels of the squares to which images are resized; None: as they are.
    """

    kind: str
    name: str
    path: Path
    columns: tuple[str, ...] = ()
    size: int | None = None


def place(spec: str, folder: Path | None = None) -> Place | None:
    """Read a spec; None if it names no file, folder or set of the hub.

    Args:
        spec: of a data source.
        folder: where relative paths start. A file there that is called like the whole of PATH is what is meant.

    >>> place("folder:pets@32").size, place("hf:you/pets#photo,kind").columns, place("digits")
    (32, ('photo', 'kind'), None)
    """
    kind, _, text = spec.partition(":")
    if kind not in READERS or not text:
        return None
    whole = _path(text, folder)
    options = _OPTIONS[kind].search(text) if kind in _OPTIONS else None
    if options is None or whole.exists():
        return Place(kind, text, whole)
    name, said = text[: options.start()], options.groupdict()
    columns = tuple(column.strip() for column in (said.get("columns") or "").split(",") if column.strip())
    return Place(kind, name, _path(name, folder), columns, int(said["size"]) if said["size"] else None)


def absolute(spec: str, folder: Path) -> str:
    """Return a spec that means the same in any folder; what can be a set of the hub and is not here stays so.

    >>> absolute("folder:pets@32", Path("/data")), absolute("hf:you/pets", Path("/data"))
    ('folder:/data/pets@32', 'hf:you/pets')
    """
    found = place(spec, folder)
    if found is None or (is_of_hub(found) and not found.path.exists()):
        return spec
    return f"{found.kind}:{found.path}{spec[len(found.kind) + 1 + len(found.name) :]}"


def is_of_hub(place: Place) -> bool:
    """Tell whether a place can be the name of a set of the hub, `name` or `owner/name`, beside a path."""
    return place.kind == "hf" and bool(_OF_HUB.fullmatch(place.name)) and not place.name.endswith(".parquet")


def without_reader(spec: str) -> str:
    """Return the path in a spec, or the spec if there is none.

    >>> without_reader("folder:pets@32"), without_reader("digits")
    ('pets', 'digits')
    """
    found = place(spec)
    return found.name if found else spec


def _path(text: str, folder: Path | None) -> Path:
    path = Path(text).expanduser()
    return folder / path if folder else path
