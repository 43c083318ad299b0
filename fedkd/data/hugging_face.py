"""Image sets of Hugging Face's library `datasets`: what it saved to disk, parquet files, or a set of the hub.

Which column holds the images and which the labels is told by the set's own features; no code of a set is run.
"""

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fedkd.data.images import ImageError, read_images
from fedkd.errors import SettingError
from fedkd.settings.sources import Place, is_of_hub

if TYPE_CHECKING:
    from datasets import Dataset as Table

Array = npt.NDArray[Any]

_TRAIN, _TEST = ("train", "training"), ("test", "testing", "validation", "valid", "val")
_SPLITS = (*_TRAIN, *_TEST)
_PATIENCE = 10.0  # seconds
_CHOOSE = "name them after its path, as in PATH#IMAGE,LABEL"


def load_set(
    spec: str, place: Place, *, download: bool, key: str
) -> tuple[Array, Array, Array, Array, list[str] | None]:
    """Load `hf:` or `parquet:` data: images [N, H, W, C] uint8, labels, test images and labels, and classes if named.

    The test set is the split `test`, or without one `validation`.

    Raises:
        SettingError: on `key`: the library or the set is not there, a split is absent, or it is not clear which columns
            are meant; an image cannot be read or has another size.
    """
    splits = _splits(spec, place, download=download, key=key)
    train, test = (_split(splits, names, spec, key=key) for names in (_TRAIN, _TEST))
    image, label = _columns(train, place, spec, labelled=True, key=key)
    for column in (image, label):
        if column not in test.column_names:
            raise SettingError(
                key, spec, f"a set whose splits have the same columns; its test split has no {column!r} but "
                f"{_listed(test)}",
            )  # fmt: skip
    images = _images([train, test], image, place, spec, key=key)
    labels, classes = zip(*(_labels(table, label, spec, key=key) for table in (train, test)), strict=True)
    if classes[0] != classes[1]:
        raise SettingError(
            key, spec, f"a set whose splits have the same classes, not {classes[0]} in train and {classes[1]} in test"
        )
    return images[: len(train)], labels[0], images[len(train) :], labels[1], classes[0]


def load_public_set(
    spec: str, place: Place, *, download: bool, key: str
) -> tuple[Array, Array | None, list[str] | None]:
    """Load a proxy set: the images of the split `train`, or of the only one, and labels and classes if it has them.

    Raises:
        SettingError: on `key`, as :func:`load_set`.
    """
    splits = _splits(spec, place, download=download, key=key)
    table = next(iter(splits.values())) if len(splits) == 1 else _split(splits, _TRAIN, spec, key=key)
    image, label = _columns(table, place, spec, labelled=False, key=key)
    labels, classes = _labels(table, label, spec, key=key) if label else (None, None)
    return _images([table], image, place, spec, key=key), labels, classes


def _splits(spec: str, place: Place, *, download: bool, key: str) -> "Mapping[str, Table]":
    """Return the tables of a set by the names of their splits."""
    if importlib.util.find_spec("datasets") is None:
        raise SettingError(key, spec, "another source, or one to be read after `pip install 'fedkd[datasets]'`")
    import datasets

    try:
        if _is_saved(place.path):
            found = datasets.load_from_disk(str(place.path))
        elif files := _parquet_files(place.path):
            found = _read_parquet(files)
        elif place.path.exists():
            raise SettingError(
                key, spec, f"a folder of `save_to_disk`, or of parquet files; {place.path.absolute()} is neither"
            )
        elif is_of_hub(place):
            found = _of_hub(place, spec, download=download, key=key)
        else:
            raise SettingError(key, spec, f"an existing file or folder; there is none at {place.path.absolute()}")
    except SettingError:
        raise
    except Exception as error:  # Arrow and the hub have errors of many kinds, of which this one needs the text alone
        raise SettingError(key, spec, f"a set that can be read ({_brief(error)})") from error
    return found if isinstance(found, Mapping) else {"train": found}


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _is_saved(path: Path) -> bool:
    return any((path / name).is_file() for name in ("dataset_dict.json", "state.json"))


def _parquet_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    return sorted(path.rglob("*.parquet")) if path.is_dir() else []


def _read_parquet(files: Sequence[Path]) -> "Mapping[str, Table]":
    """Return the tables of parquet files by split: that which begins a file's name or is its folder's, else `train`."""
    import pyarrow
    from datasets import Dataset
    from pyarrow import parquet

    by_split: dict[str, list[Path]] = {}
    for file in files:
        first = file.stem.replace("_", "-").partition("-")[0].lower()
        names = (first, file.parent.name.lower())
        by_split.setdefault(next((name for name in names if name in _SPLITS), "train"), []).append(file)
    # Its features come along in the schema. Hugging Face's own reader would first copy the files into its cache.
    return {
        name: Dataset(pyarrow.concat_tables([parquet.read_table(file, partitioning=None) for file in part]))
        for name, part in by_split.items()
    }


def _of_hub(place: Place, spec: str, *, download: bool, key: str) -> "Mapping[str, Table]":
    """Load a set of the hub: from the library's cache, or else over the network where that is allowed."""
    import datasets
    from huggingface_hub import HfApi

    found: Mapping[str, Table]
    here = f"{place.path.absolute()} is no folder"
    try:
        with _offline():
            found = datasets.load_dataset(place.name)
    except (OSError, RuntimeError, ValueError) as error:
        if not download:
            cure = "`download = true` would fetch it from the hub; a real site saves it to a folder first"
            raise SettingError(
                key, spec, f"a set that is on this machine; {here}, and the library's cache does not hold it: {cure}"
            ) from error
    else:
        return found
    try:
        HfApi().dataset_info(place.name, timeout=_PATIENCE)  # asks once, where the library tries for half a minute
        found = datasets.load_dataset(place.name)
    except Exception as error:  # of the network, of the hub and of what it gives
        cure = "where there is a network, save it to a folder (`datasets.load_dataset(NAME).save_to_disk(PATH)`)"
        raise SettingError(
            key, spec, f"a set that the hub gives; {here}, and it could not be fetched ({_brief(error)}): {cure}"
        ) from error
    return found


@contextmanager
def _offline() -> Iterator[None]:
    """Keep the library from the network."""
    from datasets import config
    from huggingface_hub import constants

    before = config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = True, True
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before


def _split(splits: "Mapping[str, Table]", names: Sequence[str], spec: str, *, key: str) -> "Table":
    for name in names:
        if name in splits:
            return splits[name]
    raise SettingError(key, spec, f"a set with a split {names[0]}; it has {', '.join(splits)}")


def _columns(table: "Table", place: Place, spec: str, *, labelled: bool, key: str) -> tuple[str, str]:
    """Return the columns of the images and of the labels, the latter empty where there is none and none is needed."""
    if unknown := [column for column in place.columns if column not in table.column_names]:
        raise SettingError(key, spec, f"a set with a column {unknown[0]!r}; it has {_listed(table)}")
    if len(place.columns) > 2:
        raise SettingError(key, spec, f"a set with at most two columns named: {_CHOOSE}")
    images, named, numbers = _candidates(table)
    chosen = list(place.columns)
    if not chosen:
        chosen = [_only(images, "images", table, spec, key=key)]
    if len(chosen) == 1:
        labels = named or numbers
        if len(labels) == 1 or labelled:
            chosen.append(_only(labels, "labels", table, spec, key=key))
        else:
            chosen.append("")
    if chosen[0] not in images:
        raise SettingError(key, spec, f"a set whose column {chosen[0]!r} holds images; it has {_listed(table)}")
    return chosen[0], chosen[1]


def _candidates(table: "Table") -> tuple[list[str], list[str], list[str]]:
    """Return the columns that can hold images, those of labels with names, and those of whole numbers."""
    from datasets import ClassLabel, Image, Value

    features = table.features
    images = [name for name, kind in features.items() if isinstance(kind, Image)]
    # Parquet of another program has encoded files as bytes, or beside their paths.
    images = images or [name for name, kind in features.items() if _is_bytes(kind)]
    named = [name for name, kind in features.items() if isinstance(kind, ClassLabel)]
    numbers = [name for name, kind in features.items() if isinstance(kind, Value) and "int" in kind.dtype]
    return images, named, numbers


def _is_bytes(kind: Any) -> bool:
    inner = kind.get("bytes") if isinstance(kind, dict) else kind
    return getattr(inner, "dtype", "") in ("binary", "large_binary")


def _only(names: Sequence[str], what: str, table: "Table", spec: str, *, key: str) -> str:
    if len(names) != 1:
        found = f"{len(names)} ({', '.join(names)})" if names else "none"
        raise SettingError(
            key, spec, f"a set with one column of {what}, and by its features it has {found}: {_CHOOSE}; it "
            f"has {_listed(table)}",
        )  # fmt: skip
    return names[0]


def _listed(table: "Table") -> str:
    kinds = {name: getattr(kind, "dtype", None) or "struct" for name, kind in table.features.items()}
    shown = {name: type(kind).__name__ for name, kind in table.features.items()}
    return ", ".join(f"{name} ({kinds[name] if shown[name] == 'Value' else shown[name]})" for name in shown)


def _images(tables: "Sequence[Table]", column: str, place: Place, spec: str, *, key: str) -> Array:
    try:
        return read_images((each for table in tables for each in _encoded(table, column)), size=place.size)
    except ImageError as error:
        raise SettingError(key, spec, f"a set of images {error}") from error


def _encoded(table: "Table", column: str) -> Iterator[tuple[str, Path | bytes]]:
    """Yield the name and the file or content of every image, without decoding any."""
    split = str(table.split or "train")
    for number, cell in enumerate(table.data.column(column)):
        name = f"{column!r} of row {number} ({split})"
        value = cell.as_py()
        content = value.get("bytes") if isinstance(value, dict) else value
        if content is None:
            path = value.get("path") if isinstance(value, dict) else None
            if not path:
                raise ImageError(f"in every row, but {name} is empty")
            content = Path(path)
        yield name, content


def _labels(table: "Table", column: str, spec: str, *, key: str) -> tuple[Array, list[str] | None]:
    """Return the labels [N] and the names of the classes, where the feature has them."""
    from datasets import ClassLabel, Value

    kind = table.features[column]
    if not isinstance(kind, ClassLabel) and not (isinstance(kind, Value) and "int" in kind.dtype):
        raise SettingError(
            key,
            spec,
            f"a set whose column {column!r} holds labels, class labels or whole numbers; it has {_listed(table)}",
        )
    labels = np.asarray(table.with_format("numpy")[column][:])
    if not len(labels) or labels.dtype.kind not in "ui" or labels.min() < 0:
        raise SettingError(
            key, spec, f"a set whose labels are known in every row, which those of column {column!r} are not"
        )
    return labels, list(kind.names) if isinstance(kind, ClassLabel) else None
