"""One's own code by name: `package.module:name`; and the libraries whose models go by names of that form."""

import importlib
from collections.abc import Callable
from typing import Any

from fedkd.errors import SettingError

LIBRARIES = ("timm", "hf")
"""What stands before the colon of a library's model: ``timm:resnet18`` is a name there, and no code of one's own."""
READERS = ("npz", "folder", "parquet", "hf")
"""What stands before the path of a data source, and so is no module."""


def is_callable_spec(spec: str) -> bool:
    """Tell whether a spec has the form `package.module:name`.

    >>> is_callable_spec("hospital.data:load"), is_callable_spec("digits"), is_callable_spec("hf:mnist")
    (True, False, False)
    >>> is_callable_spec("timm:resnet18"), is_callable_spec("hf:folder")
    (False, False)
    """
    module, colon, name = spec.partition(":")
    code = bool(colon) and name.isidentifier() and all(part.isidentifier() for part in module.split("."))
    return code and module not in (*READERS, *LIBRARIES)


def load_callable(spec: str, *, key: str) -> Callable[..., Any]:
    """Import and return the callable that `package.module:name` names.

    Raises:
        SettingError: the module cannot be imported, or it has no such callable; `key` is the setting's name.
    """
    module_name, _, name = spec.partition(":")
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # a user's module may fail in any way while it is imported
        raise SettingError(
            key, spec, f"an importable `package.module:name` ({type(error).__name__}: {error})"
        ) from error
    found = getattr(module, name, None)
    if not callable(found):
        raise SettingError(key, spec, f"a callable `{name}` in the module {module_name}")
    return found  # type: ignore[no-any-return]
