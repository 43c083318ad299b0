"""How the site is built: `sphinx-build -W -n --keep-going docs build/docs`, without a network."""

import sys
from pathlib import Path

from fedkd import __version__

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "fedkd"
author = "The fedkd maintainers"
copyright = author
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "docstrings", "mathml", "settings_table"]
exclude_patterns = ["_ext"]

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3  # links between pages read `page.md#heading`, as on a forge

autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
autodoc_typehints_format = "short"
napoleon_use_ivar = True
add_module_names = False
python_use_unqualified_type_names = True
default_role = "code"
highlight_language = "none"

# Types of other libraries: resolving them would need their inventories, and so a network.
nitpick_ignore_regex = [
    (r"py:.*", r"(torch|Tensor|nn|np|numpy|pd|pandas|flwr|cryptography)(\..*)?"),
    (r"py:.*", r"(pathlib|Path|collections|typing|abc|socket|types|dataclasses)(\..*)?"),
    (r"py:class", r"fedkd\..*\.(F|_Function)"),  # type variables
]

html_theme = "furo"
html_title = f"fedkd {version}"
html_static_path = ["_static"]
html_css_files = ["math.css"]
html_math_renderer = "mathml"
html_show_copyright = False
html_copy_source = False
pygments_style = "friendly"
