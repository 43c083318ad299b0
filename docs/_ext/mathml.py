"""Formulas as MathML, which browsers draw by themselves: neither scripts nor fonts come from elsewhere."""

import re
from typing import Any

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.writers.html5 import HTML5Translator

_logger = logging.getLogger(__name__)

_FUNCTION = re.compile(r"<mi>(log|ln)</mi>(?P<bracket><mo[^>]*>&#x00028;)?")
_THIN = '<mspace width="0.167em" />'


def _mathml(node: nodes.Element, display: str) -> str:
    latex = node.astext()
    try:
        found = convert(latex, display=display)
    except Exception as error:  # the converter's errors have no common class
        _logger.warning("Expected a formula in LaTeX, but got %r: %r", latex, error, location=node)
        return ""
    if "\\" in found:  # what it does not know it leaves as it is
        _logger.warning("Expected a formula without unknown commands, but got %r", latex, location=node)
    return _FUNCTION.sub(_spaced, found)


def _spaced(function: re.Match[str]) -> str:
    """Set a function apart from its neighbours, as TeX does and the converter does not."""
    behind = function["bracket"] or _THIN
    return f"{_THIN}<mi>{function[1]}</mi>{behind}"


def _inline(translator: HTML5Translator, node: nodes.math) -> None:
    translator.body.append(_mathml(node, "inline"))
    raise nodes.SkipNode


def _block(translator: HTML5Translator, node: nodes.math_block) -> None:
    translator.body.append(f'<div class="math">{_mathml(node, "block")}</div>')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the renderer for `html_math_renderer = "mathml"`."""
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
