"""A TCP connection in the middle that can be cut: it goes on accepting, and delivers nothing, like a lost route."""

import contextlib
import selectors
import socket
import threading
from typing import Self

_CHUNK = 1 << 16


class TcpLink:
    """Forwards connections until it is cut, and again once it is mended.

    Args:
        listen: where to listen; port 0: any free one.
        target: where connections go.
    """

    def __init__(self, listen: tuple[str, int], target: tuple[str, int]) -> None:
        self._listener, self._target = socket.create_server(listen), target
        self.host, self.port = self._listener.getsockname()
        self._mended, self._closed = threading.Event(), False
        self._mended.set()
        self._open: list[socket.socket] = []

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._closed = True
        self._mended.set()
        for each in (self._listener, *self._open):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def cut(self) -> None:
        self._mended.clear()

    def mend(self) -> None:
        self._mended.set()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while not self._closed:
                near, _ = self._listener.accept()
                self._open.append(near)
                threading.Thread(target=self._forward, args=(near,), daemon=True).start()

    def _forward(self, near: socket.socket) -> None:
        with contextlib.suppress(OSError), near, socket.create_connection(self._target) as far:
            self._open.append(far)
            with selectors.DefaultSelector() as ready:
                ready.register(near, selectors.EVENT_READ, far)
                ready.register(far, selectors.EVENT_READ, near)
                while True:
                    for key, _ in ready.select():
                        self._mended.wait()
                        data = key.fileobj.recv(_CHUNK)
                        if not data:
                            return
                        key.data.sendall(data)
