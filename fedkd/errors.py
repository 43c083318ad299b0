"""Errors a user can cause: the message is the whole story, so no one needs the stack."""

import re

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


class FedkdError(Exception):
    """Base of every error whose message alone tells a user what to do."""


class SettingError(FedkdError, ValueError):
    """A setting, or what it points to, is wrong.

    Args:
        key: the setting's name, as the user writes it (``partition-alpha``).
        value: what was given.
        allowed: what is allowed, as a phrase that completes "Expected setting `key` to be ...".

    >>> raise SettingError("partition-alpha", -1.0, "a number > 0")
    Traceback (most recent call last):
    fedkd.errors.SettingError: Expected setting `partition-alpha` to be a number > 0, but got -1.0.
    """

    def __init__(self, key: str, value: object, allowed: str) -> None:
        super().__init__(f"Expected setting `{key}` to be {allowed}, but got {value!r}.")
        self.key, self.value, self.allowed = key, value, allowed


def one_line(error: BaseException) -> str:
    r"""Return the first line of what another library's error says, without its colours; its kind where it says nothing.

    >>> one_line(ValueError("\x1b[1mno\x1b[0m such file\n\nSee our handbook ...")), one_line(EOFError())
    ('no such file', 'EOFError')
    """
    lines = _COLOURS.sub("", str(error)).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__
