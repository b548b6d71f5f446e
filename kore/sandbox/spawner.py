"""The spawner as its worker has it: make it, ask it for programs, hear of their ends (kore.sandbox.spawner_process).

Asking waits for the answer, as posix_spawn(3) would: a millisecond, with a bound. Everything later comes on the channel
of the program, a socket that the event loop polls like the pidfd of a child of its own.
"""

from __future__ import annotations

import array
import contextlib
import errno
import os
import select
import signal
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kore.errors import SandboxError
from kore.sandbox.requests import (
    PIECE_BYTES,
    REPLY_BYTES,
    STATUS,
    TOLD_BYTES_MAX,
    Outcome,
    SpawnerProtocolError,
    pack_request,
    parse_reply,
)
from kore.sandbox.spawner_process import CONFINED, Terms, be_spawner

__all__ = ["Program", "SpawnerClient", "Terms", "start_spawner"]

REPLY_SECONDS_MAX = 10.0
"""For the spawner to start a program and say so, and to get ready; a slow disk may need a second, none ten."""

END_SECONDS_MAX = 1.0
"""For the spawner to end when it is told to; it does nothing else then."""

STATUS_LOST = -1
"""The status of a program whose spawner has ended before it."""

_MEANINGS = {
    Outcome.NOT_FOUND: "{}, in no directory of PATH",
    Outcome.NOT_ALLOWED: "not among the programs of kore.config.sandbox_programs",
    Outcome.TOO_MANY: "as many programs run already as may at a time",
    Outcome.NO_DIRECTORY: "the current directory cannot be entered: {}",
}


class Program:
    """A program that the spawner has started: its pid, its end, and signals to it. Closing it before kills it."""

    __slots__ = ("_channel", "pid", "status")

    def __init__(self, pid: int, channel: int) -> None:
        self.pid = pid
        self.status: int | None = None
        """As waitpid(2) has it, once it is known; STATUS_LOST when nobody can tell it any more."""
        self._channel = channel

    def wait(self, driver: Any, callback: Callable[[int], object]) -> None:
        """Have `driver` call back once, when there may be news."""
        driver.poll(self._channel, select.POLLIN, callback)

    def look(self) -> int | None:
        """The status, if it has ended."""
        if self.status is None:
            try:
                packet = os.read(self._channel, STATUS.size)
            except BlockingIOError:
                return None
            except OSError:
                packet = b""
            self.status = STATUS.unpack(packet)[0] if len(packet) == STATUS.size else STATUS_LOST
        return self.status

    def send_signal(self, number: int) -> None:
        """Send it a signal; nothing happens when it has ended."""
        if self.status is None and self._channel >= 0:
            try:
                os.write(self._channel, bytes((number,)))
            except OSError:
                pass  # its end is on the way to us; or hundreds of signals are on theirs

    def kill(self) -> None:
        """SIGKILL; nothing happens when it has ended."""
        self.send_signal(signal.SIGKILL)

    def close(self) -> None:
        """Nobody asks for it any more: it is killed, if it runs. Any number of times."""
        fd, self._channel = self._channel, -1
        if fd >= 0:
            os.close(fd)

    __del__ = close  # the channel is no socket object: collected in a circle with its loop, it would warn of itself


class SpawnerClient:
    """A spawner, as its worker has it. Closed by the worker at its end."""

    def __init__(self, pid: int, sock: socket.socket, told: tuple[str, ...]) -> None:
        self.pid = pid
        self.told = told
        """What it could not give up, and which paths of its terms are not there: lines for the log."""
        self._sock = sock
        self._broken = ""
        self._gone = False  # its end of the socket is closed, which its exit alone does
        self._serial = 0
        self._lock = threading.Lock()  # a request and its reply are one, and a process may have several loops

    def spawn(
        self, program: str, arguments: Sequence[str], environment: Mapping[str, str], streams: tuple[int, int, int], *,
        directory: str | None = None, new_session: bool = False,
    ) -> Program:
        """Run a program on the descriptors `streams`: standard input, output, error. They stay open here.

        It is looked for in the PATH of `environment` if it has no slash. Raises OSError as execve(2), chdir(2) and
        fork(2) do, EACCES for a program that is not allowed, EAGAIN for too many, EPIPE when the spawner has ended.
        """
        where = os.getcwd() if directory is None else os.path.abspath(directory)
        here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            here.setblocking(False)
            with there, self._lock:
                self._serial = self._serial + 1 & 0xFFFFFFFF
                message = pack_request(self._serial, where, program, arguments, environment, new_session=new_session)
                outcome, number, pid = self._ask(message, [there.fileno(), *streams])
        except BaseException:
            here.close()
            raise
        if outcome is Outcome.STARTED:
            return Program(pid, here.detach())
        here.close()
        meaning = _MEANINGS.get(outcome, "{}").format(os.strerror(number))
        raise OSError(number, meaning, program)

    def _ask(self, message: bytes, descriptors: list[int]) -> tuple[Outcome, int, int]:
        """Send a request, wait for the reply. Raises OSError; EPIPE when no request is possible any more."""
        if self._broken:
            raise self._end("")
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))]
        try:
            self._sock.sendmsg([message[:PIECE_BYTES]], rights, socket.MSG_NOSIGNAL)
        except ConnectionError as error:
            self._gone = True
            raise self._end(str(error)) from error
        try:
            for at in range(PIECE_BYTES, len(message), PIECE_BYTES):
                self._sock.send(message[at : at + PIECE_BYTES], socket.MSG_NOSIGNAL)
        except OSError as error:  # half a request: what comes next would be taken for its other half
            raise self._end(str(error)) from error
        while True:
            try:
                packet = self._sock.recv(REPLY_BYTES + 1)
                serial, outcome, number, pid = parse_reply(packet)
            except TimeoutError:  # when the late answer comes, the channel is closed, and the program is killed
                reason = f"the spawner has not answered for {REPLY_SECONDS_MAX:g} s"
                raise OSError(errno.ETIMEDOUT, reason) from None
            except (ConnectionError, SpawnerProtocolError) as error:
                raise self._end(str(error)) from error
            if serial == self._serial:
                return outcome, number, pid

    def _end(self, reason: str) -> OSError:
        """No request is possible any more; the error that says so."""
        self._broken = self._broken or f"the spawner (pid {self.pid}) has ended ({reason})"
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_WR)  # should it live: it ends of that
        return OSError(errno.EPIPE, f"{self._broken}: no program can be started in this worker any more")

    def close(self) -> None:
        """End the spawner, and with it all it has started; waits for that a little."""
        how = 0 if self._gone else os.WNOHANG
        try:
            self._sock.settimeout(END_SECONDS_MAX)
            self._sock.shutdown(socket.SHUT_WR)
            while self._sock.recv(REPLY_BYTES):
                pass  # of a request that was given up
            how = 0  # its end of the socket is closed by its exit, so the kernel is just about to tell of that
        except ConnectionError:
            how = 0  # the same, and it had not read all
        except OSError:
            pass  # it does not end
        finally:
            self._sock.close()
        try:
            os.waitpid(self.pid, how)
        except OSError:
            pass  # reaped by somebody else


def start_spawner(terms: Terms) -> SpawnerClient:
    """Fork a spawner and wait until it is confined.

    Call it in a worker that has one thread, no ring, and its final user. Raises SandboxError.
    """
    worker = os.getpid()
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        pid = os.fork()
    except OSError as error:
        here.close()
        there.close()
        raise SandboxError("the spawner of programs cannot be forked", error.strerror or str(error)) from error
    if pid == 0:
        here.close()
        be_spawner(there, worker, terms)
    there.close()
    here.settimeout(REPLY_SECONDS_MAX)
    try:
        first = here.recv(TOLD_BYTES_MAX)
    except OSError as error:
        first = f"-{error}".encode()
    if first[:1] != CONFINED:
        here.close()
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        reason = first[1:].decode("utf-8", "replace") or "it ended at once"
        raise SandboxError("the spawner of programs cannot be confined", reason)
    lines = first[1:].decode("utf-8", "replace")
    return SpawnerClient(pid, here, tuple(lines.split("\n")) if lines else ())
