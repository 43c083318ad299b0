"""A network namespace whose one way out is a cable to this machine. It can be pulled: no packet, no reset arrives."""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator

_NET = f"10.213.{os.getpid() % 256}"  # of this process: other tests may run on this machine
NEAR, FAR = f"{_NET}.1", f"{_NET}.2"  # this machine as the namespace sees it, and the other way round


class Cable:
    """The way out of a namespace.

    Attributes:
        host: this machine's address at its near end.
    """

    host = NEAR

    def __init__(self) -> None:
        self._name, self._near, self._far = (f"{word}{os.getpid()}" for word in ("fedkd-", "fkn", "fkf"))

    def inside(self, command: list[str]) -> list[str]:
        """Return a command as one that runs at the far end."""
        return ["ip", "netns", "exec", self._name, *command]

    def cut(self) -> None:
        _ip("-n", self._name, "link", "set", self._far, "down")

    def mend(self) -> None:
        _ip("-n", self._name, "link", "set", self._far, "up")

    def lay(self) -> None:
        _ip("netns", "add", self._name)
        _ip("link", "add", self._near, "type", "veth", "peer", "name", self._far, "netns", self._name)
        _ip("address", "add", f"{NEAR}/30", "dev", self._near)
        _ip("link", "set", self._near, "up")
        _ip("-n", self._name, "address", "add", f"{FAR}/30", "dev", self._far)
        for device in ("lo", self._far):
            _ip("-n", self._name, "link", "set", device, "up")

    def remove(self) -> None:
        with contextlib.suppress(subprocess.CalledProcessError):  # there was none
            _ip("netns", "delete", self._name)  # and with it both ends of the cable


@contextlib.contextmanager
def cable() -> Iterator[Cable | None]:
    """Yield a cable for a while; None where none can be laid: that needs root and the program ip (iproute2)."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        yield None
        return
    found = Cable()
    try:
        try:
            found.lay()
        except subprocess.CalledProcessError:
            yield None
        else:
            yield found
    finally:
        found.remove()


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)
