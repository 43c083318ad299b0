"""Makes reStructuredText of docstrings that are written to be read in the source.

They hold formulas with bars, |z_t − z_s|, that would be substitutions, and one-line descriptions of attributes with a
colon, that napoleon would take for a type.
"""

import re
from typing import Any

from sphinx.application import Sphinx

_BEFORE_NAPOLEON, _AFTER_NAPOLEON = 400, 600
_LITERAL_OR_BAR = re.compile(r"(``.*?``|`[^`]*`)|\|")
_plain: dict[str, list[str]] = {}


def _keep(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    if what in ("attribute", "data", "property"):
        _plain[name] = list(lines)


def _mend(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    lines[:] = _plain.pop(name, lines)
    if lines[:1] and lines[0].startswith("Alias for field number"):  # the fields of a NamedTuple
        lines.clear()
    in_doctest = False
    for number, line in enumerate(lines):
        in_doctest = line.lstrip().startswith(">>>") or (in_doctest and bool(line.strip()))
        if not in_doctest:
            lines[number] = _LITERAL_OR_BAR.sub(lambda match: match[1] or r"\|", line)


def setup(app: Sphinx) -> dict[str, Any]:
    """Work before and after napoleon."""
    app.connect("autodoc-process-docstring", _keep, priority=_BEFORE_NAPOLEON)
    app.connect("autodoc-process-docstring", _mend, priority=_AFTER_NAPOLEON)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
