"""The field's methods, and ours, as presets: settings that stand in the place of the defaults.

``preset=NAME`` is a word among the others, wherever settings are words (``fedkd run``, ``tune``, ``compare``, ``deploy
run``, a notebook), and a key of a recipe, where a list of presets is an axis. It is no setting of a run: it is put into
settings before anything is checked, and whatever else is said wins, so a run's folder says what was run and not what
it was called. A setting of its own would have to be carried to peers that can do nothing with a name; an option
``--preset`` would be one more way to say what words say.

A preset is a file ``experiments/recipes/methods/NAME.toml``::

    title = "FedMD"
    teacher = "the mean of all peers' logits"      # what makes the method: what a peer is given to learn from
    source = "Li and Wang 2019, arXiv 1910.03581"
    differs = ["no transfer learning first"]       # from the paper, one phrase each
    [settings]
    strategy = "consensus"
"""

import difflib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fedkd.errors import SettingError

if TYPE_CHECKING:  # the command line lists the presets in its help, and needs NumPy for none of that
    from fedkd.settings.declare import Scalar

PRESET = "preset"
"""The word, and the key of a recipe."""
FOLDER = Path(__file__).parent.parent / "recipes" / "methods"


@dataclass(frozen=True)
class Preset:
    """One method.

    Attributes:
        name: of its file.
        title: what the field calls it.
        teacher: what a peer is given to learn from.
        source: paper and, where there is one, the authors' repository.
        differs: in what these settings are not the paper's method, one phrase each.
        settings: by kebab-case key; those that are missing are the defaults.
    """

    name: str
    title: str
    teacher: str
    source: str
    differs: tuple[str, ...]
    settings: "Mapping[str, Scalar]"


def names() -> tuple[str, ...]:
    """Return the names of all presets, sorted.

    >>> "fedmd" in names() and "ours" in names()
    True
    """
    return tuple(sorted(path.stem for path in FOLDER.glob("*.toml")))


def preset(name: str) -> Preset:
    """Return a preset.

    Raises:
        SettingError: there is none of that name.

    >>> preset("feddf").settings["average"]
    'logits'
    """
    if name not in names():
        near = difflib.get_close_matches(name, names()) or names()
        raise SettingError(PRESET, name, "a known preset (nearest: " + ", ".join(near) + ")")
    content = tomllib.loads((FOLDER / f"{name}.toml").read_text(encoding="utf-8"))
    return Preset(
        name, content["title"], content["teacher"], content["source"], tuple(content["differs"]), content["settings"]
    )


def table() -> str:
    """Return the presets as a Markdown table: name, teacher, settings, source, differences."""
    head = ["| `preset` | a peer's teacher | settings | source | differs |", "|---|---|---|---|---|"]
    return "\n".join([*head, *(_row(preset(name)) for name in names())])


def _row(method: Preset) -> str:
    settings = " ".join(f"`{key}={_word(value)}`" for key, value in method.settings.items())
    differs = "; ".join(method.differs)
    cells = (f"`{method.name}` ({method.title})", method.teacher, settings, method.source, differs)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _word(value: "Scalar") -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)
