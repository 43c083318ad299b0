"""The directive ``{settings}``: all settings, a section for each group, from the program at the time of building."""

from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from fedkd.settings.config import GROUPS
from fedkd.settings.table import settings_table


class Settings(SphinxDirective):
    """The tables of :func:`fedkd.settings.table.settings_table`, group by group."""

    def run(self) -> list[nodes.Node]:
        """Return the sections."""
        text = "\n\n".join(f"## {group.title}\n\n{settings_table(group)}" for group in GROUPS)
        return self.parse_text_to_nodes(text, allow_section_headings=True)


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the directive; pages with it are read anew in every build."""
    app.add_directive("settings", Settings)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
