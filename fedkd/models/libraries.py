"""Model specs of other libraries, `timm:NAME` and `hf:NAME`: read, checked and looked for without importing any."""

import importlib
import importlib.util
import re
from pathlib import Path
from types import ModuleType

from fedkd.errors import SettingError, one_line
from fedkd.plugins import LIBRARIES

HF = "hf:"
TIMM_FORM = "timm:NAME, or timm:NAME@TAG with the weights that timm calls NAME.TAG"
HF_FORM = "hf:FOLDER or hf:NAME on the Hugging Face hub"

_EXTRAS = {"timm": "timm", "hf": "transformers"}
_TIMM = re.compile(r"timm:\w+(@[\w.-]+)?", re.ASCII)


def is_library_spec(spec: str) -> bool:
    """Tell whether a spec names a model of another library.

    >>> is_library_spec("timm:resnet18"), is_library_spec("resnet18"), is_library_spec("my.module:net")
    (True, False, False)
    """
    library, colon, _ = spec.partition(":")
    return bool(colon) and library in LIBRARIES


def check_form(spec: str, *, key: str) -> None:
    """Refuse a spec of another library's model that is not written as one.

    >>> check_form("timm:resnet18@a1_in1k", key="models")
    >>> check_form("timm:resnet18.a1_in1k", key="models")
    Traceback (most recent call last):
    fedkd.errors.SettingError: Expected setting `models` to be timm:resnet18@a1_in1k with these weights,
    or timm:resnet18 without any, but got 'timm:resnet18.a1_in1k'.

    Raises:
        SettingError: on `key`.
    """
    if spec.startswith(HF):
        if not spec.removeprefix(HF).strip():
            raise SettingError(key, spec, HF_FORM)
    elif not _TIMM.fullmatch(spec):
        # timm's own name for weights: read as an architecture it would leave them out without a word.
        name, _, tag = spec.removeprefix("timm:").partition(".")
        meant = f"timm:{name}@{tag}"
        allowed = f"{meant} with these weights, or timm:{name} without any" if _TIMM.fullmatch(meant) else TIMM_FORM
        raise SettingError(key, spec, allowed)


def check_there(spec: str, *, key: str) -> None:
    """Refuse a library's model whose library is not installed, or whose folder is not there; imports nothing of it.

    Raises:
        SettingError: on `key`, with the extra to install.
    """
    if not is_library_spec(spec):
        return
    extra = _EXTRAS[spec.partition(":")[0]]
    try:
        found = importlib.util.find_spec(extra) is not None
    except ValueError:  # what stands in its place was not imported from anywhere
        found = False
    if not found:
        raise SettingError(key, spec, _needs(extra))
    path = spec.removeprefix(HF)
    if spec.startswith(HF) and path.startswith(("/", "./", "../", "~")) and folder(spec) is None:
        raise SettingError(key, spec, f"{HF_FORM}; there is no folder {Path(path).expanduser().absolute()}")


def library(spec: str, *, key: str) -> ModuleType:
    """Import and return the library of a spec.

    Raises:
        SettingError: on `key`: it cannot be imported, with the extra to install.
    """
    extra = _EXTRAS[spec.partition(":")[0]]
    check_there(spec, key=key)
    try:
        return importlib.import_module(extra)
    except ImportError as error:
        raise SettingError(key, spec, f"{_needs(extra)} ({one_line(error)})") from error


def folder(spec: str) -> Path | None:
    """Return the folder that a spec `hf:FOLDER` names; None: it names none, or a model of the hub.

    What is a folder is taken for one, as transformers does it.
    """
    path = Path(spec.removeprefix(HF)).expanduser()
    return path if spec.startswith(HF) and path.is_dir() else None


def whole(spec: str, base: Path) -> str:
    """Return a spec whose folder, if it names one, is found from anywhere.

    Args:
        spec: any model spec.
        base: where relative paths start.
    """
    if not spec.startswith(HF):
        return spec
    path = base / Path(spec.removeprefix(HF)).expanduser()
    return f"{HF}{path}" if path.is_dir() or spec.removeprefix(HF).startswith((".", "~")) else spec


def named(spec: str) -> str:
    """Return a spec as it is the same wherever its folder lies: of a folder, its last part.

    >>> named("hf:/models/ada/vit"), named("hf:google/vit-base-patch16-224"), named("timm:resnet18")
    ('hf:vit', 'hf:google/vit-base-patch16-224', 'timm:resnet18')
    """
    path = spec.removeprefix(HF)
    if spec.startswith(HF) and (path.startswith(("/", ".", "~")) or folder(spec) is not None):
        return HF + Path(path).expanduser().resolve().name
    return spec


def _needs(extra: str) -> str:
    return f"a model of a library that is installed: `pip install 'fedkd[{extra}]'`"
