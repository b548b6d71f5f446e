"""The spawner: a process beside each worker that starts programs for it, since the worker's filter lets it start none.

It is forked while the worker still may fork, and gives up its own rights before it hears the first request: programs
run with less than the worker started with, and the worker's filter stays closed. Requests come on one socket; each
child has a channel of its own, on which its end is told, signals are asked for, and the end of whoever holds it is
seen: then the child is killed. The process waits for nothing but events, so that no child and no worker holds it up.
Programs that leave their parents (daemon(3)) become its own children. When the worker is gone it kills what is left, of
all of them, and ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import os
import resource
import select
import signal
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

from kore.errors import SandboxError
from kore.sandbox import landlock
from kore.sandbox.execution import NotInPathError, execute, find
from kore.sandbox.programs import Allowed
from kore.sandbox.requests import (
    DESCRIPTORS,
    HEAD_BYTES,
    PIECE_BYTES,
    STATUS,
    TOLD_BYTES_MAX,
    Outcome,
    Request,
    SpawnerProtocolError,
    body_bytes,
    pack_reply,
    parse_request,
)

CHILDREN_MAX = 1024
"""Children at a time: each costs two descriptors here and three in the worker, which runs out of them before."""

DESCRIPTORS_SPARE = 64
"""Beside those of children: of the process itself, and of the request that is coming in."""

DESCRIPTORS_END = 1 << 20
"""Above any descriptor: fs.nr_open of Linux, unless somebody raised it."""

ROUNDS_MAX = 1000
"""Of killing children at the end: those of the killed become ours, a generation a round."""

CHILDREN_BYTES_MAX = 1 << 20
"""Of the list of children: room for a hundred thousand of them, more than there can be."""

SIGNALS_BYTES_MAX = 64
"""Of signals asked for in one packet; the worker sends one each."""

CONFINED = b"+"
REFUSED = b"-"
"""How the first message begins: ready, with what could not be done, or the reason why not."""

EXIT_PROTOCOL = 3
"""The worker did not keep to the protocol: it may be in other hands."""

_IGNORED = (
    signal.SIGINT, signal.SIGTERM, signal.SIGQUIT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGPIPE)
"""Meant for the worker where they reach the whole group; it ends with the worker."""

_PR_SET_DUMPABLE, _PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 4, 36, 38
_CAPABILITY_VERSION_3 = 0x20080522
_CAPSET_HEADER, _CAPSET_NOTHING = struct.Struct("=Ii"), bytes(24)


def _nothing() -> None:
    pass


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What a spawner and the programs it starts may: its own terms, apart from the worker's."""

    programs: tuple[str, ...] = ()
    """Programs that may be started, or directories of such; empty: any."""
    read: tuple[str, ...] = ("/",)
    write: tuple[str, ...] = ("/dev/null",)
    connect_ports: tuple[int, ...] | None = ()
    """TCP ports to connect to; None: any. Binding to a port is for nobody."""
    proc: int | None = None
    """A descriptor of /proc, in which the spawner finds its children; it may live in a root that has none."""
    prepare: Callable[[], object] = _nothing
    """Called first in the new process: its title."""
    install_filter: Callable[[], object] = _nothing
    """Called last: gives the process its filter of system calls. Whatever it raises ends the start."""


class WorkerGoneError(Exception):
    """The other end of the socket of requests is closed."""


class _Child:
    """A program that runs."""

    __slots__ = ("channel", "pid", "pidfd")

    def __init__(self, pid: int, pidfd: int, channel: socket.socket) -> None:
        self.pid = pid
        self.pidfd = pidfd
        self.channel = channel


def be_spawner(sock: socket.socket, worker: int, terms: Terms) -> NoReturn:
    """Be the spawner from here to the end of the process. Called in the process that `worker` forked, nowhere else."""
    code = 1
    try:
        try:
            told = confine(sock, terms)
        except Exception as error:  # noqa: BLE001 (whatever kept it from giving up a right is the worker's to tell)
            sock.send(REFUSED + f"{type(error).__name__}: {error}".encode()[:TOLD_BYTES_MAX])
            os._exit(code)
        spawner = Spawner(sock, worker, told.allowed, told.children)
        sock.send(CONFINED + "\n".join(told.lines).encode("utf-8", "replace")[:TOLD_BYTES_MAX])
        try:
            spawner.serve()
        except WorkerGoneError:
            code = 0
        except SpawnerProtocolError:
            code = EXIT_PROTOCOL
        finally:
            spawner.kill_all()
    finally:
        os._exit(code)


@dataclass(frozen=True, slots=True)
class _Confined:
    allowed: Allowed
    lines: tuple[str, ...]
    children: int | None
    """The list of this process's children (proc(5)), open."""


def confine(sock: socket.socket, terms: Terms) -> _Confined:
    """Give up everything but `terms`, in order. Raises SandboxError, OSError."""
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, _wake)  # ignored, it would have the kernel throw statuses away
    signal.set_wakeup_fd(-1)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    gc.freeze()  # what the worker made is shared with it as long as nobody writes to it
    terms.prepare()
    children = _open_children(terms.proc)
    _keep_only(sock.fileno(), *(() if children is None else (children,)))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft = max(soft, 2 * CHILDREN_MAX + DESCRIPTORS_SPARE)  # programs inherit it, and are not to have less than now
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))
    _drop_capabilities()
    _prctl("PR_SET_NO_NEW_PRIVS", _PR_SET_NO_NEW_PRIVS, 1)
    _prctl("PR_SET_CHILD_SUBREAPER", _PR_SET_CHILD_SUBREAPER, 1)
    _prctl("PR_SET_DUMPABLE", _PR_SET_DUMPABLE, 0)  # the programs run as the same user: none may look into us
    allowed = Allowed(terms.programs)
    rules = landlock.Rules(
        read=terms.read, execute=allowed.executables(), write=terms.write, connect_ports=terms.connect_ports)
    lines = [f"kore.config.sandbox_programs: {line}" for line in allowed.missing]
    of_the_kernel = landlock.missing(landlock.abi())  # whoever starts the workers tells of it, once for all of them
    lines += [line for line in landlock.restrict_self(rules) if line not in of_the_kernel]
    terms.install_filter()
    return _Confined(allowed, tuple(lines), children)


def _wake(_number: int, _frame: object) -> None:
    """A child has ended: the descriptor that signals wake says so to the loop."""


def _open_children(proc: int | None) -> int | None:
    """The list of our own children, if there is one (CONFIG_PROC_CHILDREN). It stays that, and readable."""
    if proc is None:
        return None
    try:
        return os.open("thread-self/children", os.O_RDONLY | os.O_CLOEXEC, dir_fd=proc)
    except OSError:
        return None


def _keep_only(*kept: int) -> None:
    """Close every descriptor but these; the standard ones are /dev/null."""
    null = _nowhere()
    for fd in range(3):
        if fd not in kept:
            os.dup2(null, fd)
    first = 3
    for fd in sorted(kept):
        os.closerange(first, fd)
        first = max(first, fd + 1)
    os.closerange(first, DESCRIPTORS_END)


def _nowhere() -> int:
    """A descriptor without content; behind a chroot, where there may be no /dev, a socket whose other end is closed."""
    try:
        return os.open("/dev/null", os.O_RDWR)
    except OSError:
        left, right = socket.socketpair()
        right.close()
        return left.detach()


def _drop_capabilities() -> None:
    """Empty the permitted, effective and inheritable sets (capset(2)); no_new_privs keeps execve from filling them."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = ctypes.create_string_buffer(_CAPSET_HEADER.pack(_CAPABILITY_VERSION_3, 0), _CAPSET_HEADER.size)
    if libc.capset(header, ctypes.create_string_buffer(_CAPSET_NOTHING, len(_CAPSET_NOTHING))) != 0:
        raise SandboxError("spawner: capset", os.strerror(ctypes.get_errno()))


def _prctl(name: str, option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    zero = ctypes.c_ulong(0)
    if libc.prctl(ctypes.c_int(option), ctypes.c_ulong(value), zero, zero, zero) != 0:
        raise SandboxError(f"spawner: prctl({name})", os.strerror(ctypes.get_errno()))


class Spawner:
    """The loop of the process: requests, channels and ends, whichever comes."""

    def __init__(self, sock: socket.socket, worker: int, allowed: Allowed, children: int | None) -> None:
        self._sock = sock
        self._list = children
        self._sock.setblocking(False)
        self._allowed = allowed
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._children_max = min(CHILDREN_MAX, (limit - DESCRIPTORS_SPARE) // 2)
        self._epoll = select.epoll()
        self._epoll.register(sock, select.EPOLLIN)
        # The end of the socket may be held open by a program that was given the worker's end of it.
        self._worker = os.pidfd_open(worker)
        self._epoll.register(self._worker, select.EPOLLIN)
        if os.getppid() != worker:
            raise WorkerGoneError  # and the pidfd is perhaps a stranger's
        self._ended, ended = socket.socketpair()
        self._wake_out = ended  # kept open
        for end in (self._ended, ended):
            end.setblocking(False)
        signal.set_wakeup_fd(ended.fileno(), warn_on_full_buffer=False)
        self._epoll.register(self._ended, select.EPOLLIN)
        self._channels: dict[int, _Child] = {}
        self._pidfds: dict[int, _Child] = {}
        self._message = bytearray()  # of a request that is not here whole
        self._descriptors: list[int] = []  # its descriptors

    def serve(self) -> NoReturn:
        """Until the worker is gone (WorkerGoneError), or not to be believed (SpawnerProtocolError)."""
        while True:
            for fd, _ in self._epoll.poll():
                # A number that was closed and used again since means a look for nothing, no more.
                if fd == self._worker:
                    raise WorkerGoneError
                elif fd == self._sock.fileno():
                    self._hear()
                elif fd == self._ended.fileno():
                    self._bury()
                elif fd in self._pidfds:
                    self._reap(self._pidfds[fd])
                elif fd in self._channels:
                    self._obey(self._channels[fd])

    def kill_all(self) -> None:
        """The end: nothing that was started for this worker outlives it."""
        for child in self._pidfds.values():
            _signal(child, signal.SIGKILL)
        for _ in range(ROUNDS_MAX):
            children = self._all_children()
            if not children:
                return
            for pid in children:
                os.kill(pid, signal.SIGKILL)  # nobody else reaps it, so that the pid is still its
            for pid in children:
                os.waitpid(pid, 0)

    def _all_children(self) -> list[int]:
        """All processes whose parent is this one, those among them that others left. None where nobody lists them."""
        if self._list is None:
            return []
        os.lseek(self._list, 0, os.SEEK_SET)
        text = b""
        while len(text) < CHILDREN_BYTES_MAX and (piece := os.read(self._list, 65536)):
            text += piece
        return [int(pid) for pid in text.split()]

    def _bury(self) -> None:
        """Reap what has ended and was not started here, but left to us; the others by the way."""
        try:
            while self._ended.recv(4096):
                pass
        except BlockingIOError:
            pass
        started = {child.pid: child for child in self._pidfds.values()}
        with contextlib.suppress(ChildProcessError):
            while (found := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) is not None:
                if found.si_pid in started:
                    self._reap(started.pop(found.si_pid))
                else:
                    os.waitpid(found.si_pid, 0)

    def _hear(self) -> None:
        """One packet of requests."""
        try:
            packet, control, flags, _ = self._sock.recvmsg(
                PIECE_BYTES, socket.CMSG_SPACE(2 * DESCRIPTORS * 4), socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return
        except ConnectionError:
            raise WorkerGoneError from None
        for level, kind, data in control:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                count = len(data) // 4
                self._descriptors += struct.unpack(f"={count}i", data[: count * 4])
        if not packet:
            raise WorkerGoneError
        if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC) or len(self._descriptors) != DESCRIPTORS:
            raise SpawnerProtocolError("not what a request looks like")
        self._message += packet
        length = HEAD_BYTES + body_bytes(self._message)
        if len(self._message) < length:
            return
        message, descriptors = bytes(self._message), self._descriptors
        self._message, self._descriptors = bytearray(), []
        if len(message) > length:
            raise SpawnerProtocolError("more than the head says")
        try:
            self._start(parse_request(message), socket.socket(fileno=descriptors[0]), descriptors[1:])
        except OSError as error:
            if error.errno == errno.ENOTSOCK:
                raise SpawnerProtocolError("a channel that is none") from None
            raise
        finally:
            for fd in descriptors[1:]:
                os.close(fd)

    def _start(self, request: Request, channel: socket.socket, streams: list[int]) -> None:
        """Start a program and say what became of it."""
        outcome, number, pid = Outcome.TOO_MANY, errno.EAGAIN, 0
        if len(self._pidfds) < self._children_max:
            outcome, number, pid = self._try(request, streams)
        if outcome is Outcome.STARTED:
            try:
                self._watch(_Child(pid, os.pidfd_open(pid), channel))
            except OSError as error:
                os.kill(pid, signal.SIGKILL)  # nobody would see its end; it dies at once
                os.waitpid(pid, 0)
                outcome, number, pid = Outcome.FAILED, error.errno or errno.EIO, 0
        if outcome is not Outcome.STARTED:
            channel.close()
        try:
            self._sock.send(pack_reply(request.serial, outcome, number, pid), socket.MSG_NOSIGNAL)
        except BlockingIOError:
            raise SpawnerProtocolError("replies are not read") from None
        except ConnectionError:
            raise WorkerGoneError from None

    def _try(self, request: Request, streams: list[int]) -> tuple[Outcome, int, int]:
        try:
            os.chdir(request.directory)
        except OSError as error:
            return Outcome.NO_DIRECTORY, error.errno or errno.EIO, 0
        try:
            path = find(
                request.program, {os.fsdecode(name): os.fsdecode(text) for name, text in request.environment.items()})
            if not self._allowed.includes(path):
                return Outcome.NOT_ALLOWED, errno.EACCES, 0
            pid = execute(
                path, list(request.arguments), request.environment,
                stdin=streams[0], stdout=streams[1], stderr=streams[2], new_session=request.new_session)
        except NotInPathError as error:
            return Outcome.NOT_FOUND, error.errno or errno.ENOENT, 0
        except OSError as error:
            return Outcome.FAILED, error.errno or errno.EIO, 0
        return Outcome.STARTED, 0, pid

    def _watch(self, child: _Child) -> None:
        """Hear of its end and of its channel. Raises OSError for a channel that epoll does not take."""
        child.channel.setblocking(False)
        try:
            self._epoll.register(child.pidfd, select.EPOLLIN)
            self._epoll.register(child.channel, select.EPOLLIN)
        except OSError:
            os.close(child.pidfd)
            raise
        self._pidfds[child.pidfd] = child
        self._channels[child.channel.fileno()] = child

    def _reap(self, child: _Child) -> None:
        """Tell the status of a child that has ended."""
        pid, status = os.waitpid(child.pid, os.WNOHANG)
        if not pid:
            return
        del self._pidfds[child.pidfd]
        os.close(child.pidfd)
        try:
            child.channel.send(STATUS.pack(status), socket.MSG_NOSIGNAL)
        except OSError:
            pass  # nobody wants to know
        self._close_channel(child)

    def _obey(self, child: _Child) -> None:
        """Signals asked for on a channel; its end asks for the child's."""
        try:
            wanted = child.channel.recv(SIGNALS_BYTES_MAX)
        except BlockingIOError:
            return
        except OSError:
            wanted = b""
        if not wanted:
            self._close_channel(child)
            _signal(child, signal.SIGKILL)
        for number in wanted:
            if not 0 < number < signal.NSIG:
                raise SpawnerProtocolError("a signal that is none")
            _signal(child, number)

    def _close_channel(self, child: _Child) -> None:
        if self._channels.pop(child.channel.fileno(), None) is not None:
            self._epoll.unregister(child.channel)
            child.channel.close()


def _signal(child: _Child, number: int) -> None:
    try:
        signal.pidfd_send_signal(child.pidfd, number)
    except ProcessLookupError:
        pass  # it has ended; its status is about to be taken
