"""One's own code by name: `package.module:name`."""

import importlib
from collections.abc import Callable
from typing import Any

from fedkd.errors import SettingError

READERS = ("npz", "folder", "parquet", "hf")
"""What stands before the path of a data source, and so is no module."""


def is_callable_spec(spec: str) -> bool:
    """Tell whether a spec has the form `package.module:name`.

    >>> is_callable_spec("hospital.data:load"), is_callable_spec("digits"), is_callable_spec("hf:mnist")
    (True, False, False)
    """
    module, colon, name = spec.partition(":")
    return (
        bool(colon)
        and module not in READERS
        and name.isidentifier()
        and all(part.isidentifier() for part in module.split("."))
    )


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
