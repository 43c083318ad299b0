"""What a command writes for its user takes the place of what it wrote before, never of a file of somebody else's."""

import json
from collections.abc import Iterable
from pathlib import Path

from fedkd.errors import SettingError

REPORT = ("report.html", "figures", "tables")
"""What a report writes into its folder."""
GENERATOR = '<meta name="generator" content="fedkd">'
"""The line of a page by which it is known to be a report."""
_HEAD = 2000  # characters


def refuse_foreign(folder: Path, names: Iterable[str], *, key: str, ours: bool) -> None:
    """Refuse a folder in which files of somebody else's have the names that will be written; touch nothing.

    Args:
        folder: where it will be written.
        names: of the files and folders.
        key: the option that says where, for the error.
        ours: whether what is there was written by the same command.

    Raises:
        SettingError: names the files, and the way out.
    """
    if folder.exists() and not folder.is_dir():
        raise SettingError(key, str(folder), "a folder, and there is a file of that name")
    if not ours and (there := [name for name in names if (folder / name).exists()]):
        allowed = f"a folder without files of others; fedkd has not made the {', '.join(there)} there: take another"
        raise SettingError(key, str(folder), allowed)


def refuse_foreign_file(path: Path, *, key: str, ours: bool) -> None:
    """Refuse a file that somebody else made.

    Args:
        path: the file, which need not exist.
        key: the option that says where, for the error.
        ours: whether what is there was written by the same command.

    Raises:
        SettingError: names the file, and the way out.
    """
    if path.exists() and not ours:
        raise SettingError(key, str(path), "a new file, or one that this command made; take another, or remove it")


def refuse_existing(path: Path, *, key: str) -> None:
    """Refuse a file that exists, of a kind that does not tell who made it.

    Raises:
        SettingError: names the file, and the way out.
    """
    if path.exists():
        raise SettingError(key, str(path), "a new file; take another, or remove it")


def is_report(folder: Path) -> bool:
    """Tell whether a folder holds a report of ours."""
    return GENERATOR in _head(folder / "report.html")


def is_json_with(path: Path, keys: Iterable[str]) -> bool:
    """Tell whether a file holds a JSON object with some keys."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.keys() >= set(keys)


def is_csv_with(path: Path, columns: Iterable[str]) -> bool:
    """Tell whether a file is a table with some columns."""
    header = _head(path).partition("\n")[0].strip().split(",")
    return set(header) >= set(columns)


def _head(path: Path) -> str:
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            return file.read(_HEAD)
    except OSError:
        return ""
