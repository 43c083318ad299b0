"""Write the settings where they are repeated: the README's table, and the defaults that Flower reads.

``python -m fedkd.settings`` in a clone, after a setting has changed.
"""

from pathlib import Path

from fedkd.settings.table import with_defaults, with_table

for name, renewed in (("README.md", with_table), ("pyproject.toml", with_defaults)):
    path = Path(name)
    path.write_text(renewed(path.read_text(encoding="utf-8")), encoding="utf-8")
