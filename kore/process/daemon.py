"""Going into the background, with somebody in front who waits until the server serves.

daemon(3) lets the command succeed at once, and a start that fails afterwards fails unheard. Here the process that
was started stays until the daemon says through a pipe that it serves, and ends with its exit code; what could
not be logged to a terminal any more is printed by it.
"""

from __future__ import annotations

import os
import sys

VERDICT_BYTES_MAX = 4096  # an exit code and one line of text


class Daemon:
    """The background side: tells the process in front how the start went. Exactly one verdict, then silence."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._told = False

    def ready(self) -> None:
        """The server serves: the command ends with exit code 0."""
        self._tell(0, "")

    def failed(self, code: int, text: str) -> None:
        """The start failed: the command prints `text` and ends with `code`."""
        self._tell(code, text)

    def fds(self) -> tuple[int, ...]:
        """The fd that workers must not keep: the process in front waits for its end."""
        return () if self._told else (self._fd,)

    def _tell(self, code: int, text: str) -> None:
        if self._told:
            return
        self._told = True
        try:
            os.write(self._fd, b"%d\n" % code + text.encode("utf-8", "backslashreplace")[: VERDICT_BYTES_MAX - 8])
        except OSError:
            pass  # nobody waits in front any more
        os.close(self._fd)


def daemonise() -> Daemon:
    """Fork into the background: an own session, standard streams on /dev/null, the directory kept.

    Returns in the background; the process in front waits for the verdict and exits here, never to return.
    Raises OSError when there is no process to be had.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    reading, writing = os.pipe()
    if os.fork() != 0:
        os.close(writing)
        _wait_in_front(reading)
    os.close(reading)
    os.setsid()
    # A session leader could acquire a terminal by opening one; its child cannot (setsid(2)).
    if os.fork() != 0:
        os._exit(0)
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    if null > 2:
        os.close(null)
    return Daemon(writing)


def _wait_in_front(fd: int) -> None:
    verdict = b""
    while len(verdict) < VERDICT_BYTES_MAX and (piece := os.read(fd, VERDICT_BYTES_MAX)):
        verdict += piece
    code, _, text = verdict.partition(b"\n")
    if text:
        sys.stderr.write(text.decode("utf-8", "replace").rstrip("\n") + "\n")
        sys.stderr.flush()
    # No verdict at all: the daemon died before it could say anything.
    os._exit(int(code) if code else 255)
