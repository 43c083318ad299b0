"""The directive ``{settings} FIRST LAST``: a part of the settings' table, from the program at the time of building."""

from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from fedkd.settings.config import settings_table


class Settings(SphinxDirective):
    """Rows of :func:`fedkd.settings.config.settings_table` from the first key to the last, both included."""

    required_arguments = 2

    def run(self) -> list[nodes.Node]:
        """Return the table."""
        head, line, *rows = settings_table().splitlines()
        keys = [row.split("`")[1] for row in rows]
        first, last = self.arguments
        for key in (first, last):
            if key not in keys:
                raise self.error(f"Expected a setting's key, but got {key!r}.")
        chosen = rows[keys.index(first) : keys.index(last) + 1]
        return self.parse_text_to_nodes("\n".join([head, line, *chosen]))


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the directive; pages with it are read anew in every build."""
    app.add_directive("settings", Settings)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
