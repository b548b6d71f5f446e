"""The listening sockets, looked after by the parent: one that a worker has stopped is made to listen again.

Workers share them, and what one of them does to such a socket is done to all: a connect(2) to no address (AF_UNSPEC)
ends the listening, and neither Landlock nor a filter of system calls sees the address. So where workers may connect the
parent looks now and then. Being told (EPOLLHUP) would not do: a connect to somewhere, right behind, hides it.
Workers whose accept fails try again by themselves. A UNIX socket cannot be stopped like that.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
from collections.abc import Callable, Sequence
from typing import Final

from kore.application.servers import Listener, set_backlog
from kore.process.log import LOG_ERR, Log
from kore.readiness.syscalls import listens

LOOK_SECONDS: Final = 1.0
"""How long a listener is down at most. Who stops it again and again gets no more of the parent's time than that."""

_NOBODY: Final = bytes(16)
"""A struct sockaddr of the family AF_UNSPEC."""


class Listening:
    """The watch over `listeners`; there is none without any."""

    def __init__(
        self, log: Log, after: Callable[[float, Callable[[], None]], None], listeners: Sequence[Listener], backlog: int,
    ) -> None:
        self._log = log
        self._after = after
        self._backlog = backlog
        self._listeners = [one for one in listeners if one.sock.family in (socket.AF_INET, socket.AF_INET6)]
        if self._listeners:
            after(LOOK_SECONDS, self._look)

    def _look(self) -> None:
        for listener in self._listeners:
            if listens(listener.sock):
                continue
            try:
                listen_again(listener, self._backlog)
            except OSError as error:
                self._log.parent(LOG_ERR, f"server {listener.name}: a worker has stopped its socket for good: {error}")
            else:
                self._log.parent(LOG_ERR, f"server {listener.name}: a worker had stopped its socket; it listens again")
        self._after(LOOK_SECONDS, self._look)


def listen_again(listener: Listener, backlog: int) -> None:
    """Have a TCP socket that was bound listen, whatever has become of it. Raises OSError."""
    try:
        set_backlog(listener, backlog)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        # It was connected to somewhere meanwhile (listen(2)); the address it is bound to stays.
        connect = ctypes.CDLL(None, use_errno=True).connect
        if connect(ctypes.c_int(listener.sock.fileno()), _NOBODY, ctypes.c_uint(len(_NOBODY))):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number)) from None
        set_backlog(listener, backlog)
