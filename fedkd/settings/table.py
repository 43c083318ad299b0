"""The settings written out: as tables for people, and as the defaults that Flower reads."""

import json
from collections.abc import Iterator
from dataclasses import fields
from typing import NamedTuple, cast

from fedkd.settings.config import GROUPS, RunConfig
from fedkd.settings.declare import Scalar, key, of

_FIRST = "[tool.flwr.app.config]\n"
_MARK = "<!-- settings -->\n"


class Line(NamedTuple):
    """A setting, written out."""

    key: str
    default: str
    allowed: str
    meaning: str


def lines(group: type) -> Iterator[Line]:
    """Yield the settings of a group (of :data:`fedkd.settings.config.GROUPS`), or all of ``RunConfig``."""
    for spec in fields(group):
        about, allowed, default = of(spec), of(spec).rule.phrase, cast(Scalar, spec.default)
        if isinstance(default, bool):
            allowed = "true, false"
        elif isinstance(default, int):
            allowed = allowed.replace("a number", "a whole number")
        yield Line(key(spec.name), _toml(default), allowed, about.help)


def settings_table(group: type = RunConfig) -> str:
    """Return settings as a Markdown table: key, default, allowed, meaning."""
    head = ["| key | default | allowed | meaning |", "|---|---|---|---|"]
    return "\n".join(
        [*head, *(f"| `{each.key}` | `{each.default}` | {each[2]} | {each[3]} |" for each in lines(group))]
    )


def found(word: str) -> list[tuple[str, list[Line]]]:
    """Return the groups' titles and settings, of those that have a word in key, title or meaning; all without one."""
    wanted = word.lower()
    chosen = [
        (group.title, [line for line in lines(group) if wanted in f"{line.key} {line.meaning} {group.title}".lower()])
        for group in GROUPS
    ]
    return [(title, some) for title, some in chosen if some]


def with_table(page: str) -> str:
    """Return a page whose table of settings, after the mark, is up to date.

    Raises:
        ValueError: there is no mark.
    """
    before, after = _parted(page, _MARK)
    rows = after.split("\n")
    rest = next((i for i, row in enumerate(rows) if not row.startswith("|")), len(rows))
    return before + "\n".join([settings_table(), *rows[rest:]])


def with_defaults(project: str) -> str:
    """Return a ``pyproject.toml`` whose defaults for Flower are up to date.

    Raises:
        ValueError: there is no such table.
    """
    before, after = _parted(project, _FIRST)
    body, blank, rest = after.partition("\n\n")
    kept = [line for line in body.split("\n") if " = " not in line]
    new = [f"{name} = {_toml(value)}" for name, value in RunConfig().to_mapping().items()]
    return before + "\n".join([*new, *filter(None, kept)]) + blank + rest


def _parted(text: str, mark: str) -> tuple[str, str]:
    before, there, after = text.partition(mark)
    if not there:
        raise ValueError(f"expected a line {mark.strip()!r}")
    return before + mark, after


def _toml(value: Scalar) -> str:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str | bool) else repr(value)
