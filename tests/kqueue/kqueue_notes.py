"""The notes of the kqueue stand-in: what each filter watches, when it holds, and what it says then.

`state()` gives (data, flags, fflags) while a note holds, else None. Notes on fds are asked when epoll calls them ready;
the others, `asked`, each time.
"""

from __future__ import annotations

import errno
import fcntl
import math
import os
import select
import signal
import socket
import stat
import struct
import termios
import time

__name__ = "kore.bsd.kqueue_notes"  # as that of the stand-in

EV_ADD, EV_DELETE, EV_ENABLE, EV_DISABLE = 0x1, 0x2, 0x4, 0x8
EV_ONESHOT, EV_CLEAR, EV_RECEIPT, EV_DISPATCH = 0x10, 0x20, 0x40, 0x80
EV_ERROR, EV_EOF = 0x4000, 0x8000
KEPT = EV_ONESHOT | EV_CLEAR | EV_DISPATCH
"""Flags that a note has from its first EV_ADD on."""

FILTER_READ, FILTER_WRITE, FILTER_PROC, FILTER_SIGNAL, FILTER_TIMER, FILTER_USER = -1, -2, -5, -6, -7, -11

NOTE_EXIT = 0x80000000
NOTE_TRIGGER, NOTE_FFLAGSMASK = 0x01000000, 0x00FFFFFF
NOTE_FFCTRLMASK, NOTE_FFAND, NOTE_FFOR, NOTE_FFCOPY = 0xC0000000, 0x40000000, 0x80000000, 0xC0000000
NOTE_SECONDS, NOTE_MSECONDS, NOTE_USECONDS, NOTE_NSECONDS, NOTE_ABSTIME = 0x1, 0x2, 0x4, 0x8, 0x10
TIMER_UNITS = {0: 1e-3, NOTE_SECONDS: 1.0, NOTE_MSECONDS: 1e-3, NOTE_USECONDS: 1e-6, NOTE_NSECONDS: 1e-9}

# Kept from before a test takes them away to have a system without them.
EPOLLIN, EPOLLOUT, EPOLLET, EPOLLRDHUP = select.EPOLLIN, select.EPOLLOUT, select.EPOLLET, select.EPOLLRDHUP
poll, POLLRDHUP, pidfd_open, waitid, P_PIDFD = select.poll, select.POLLRDHUP, os.pidfd_open, os.waitid, os.P_PIDFD
F_GETPIPE_SZ, MSG_NOSIGNAL = fcntl.F_GETPIPE_SZ, socket.MSG_NOSIGNAL

TCP_INFO, TCP_SYN_SENT, TCP_LISTEN, TCP_UNACKED = socket.TCP_INFO, 2, 10, 24
TCP_SHUT = frozenset({4, 5, 7, 9, 11})
"""FIN_WAIT1, FIN_WAIT2, CLOSE, LAST_ACK, CLOSING: our FIN is sent, or all is over."""

IGNORED_BY_DEFAULT = frozenset({signal.SIGCHLD, signal.SIGURG, signal.SIGWINCH, signal.SIGCONT})

refuses_zombies = False
"""FreeBSD reports the end of a child that has ended already; OpenBSD, NetBSD and macOS say ESRCH."""

no_reader = errno.EPIPE
"""What adding a note for writing says of a pipe that nobody reads any more: EPIPE on FreeBSD, EBADF on NetBSD."""


class Note:
    """What all notes have."""

    asked = True

    def __init__(self, queue, change) -> None:
        self.queue = queue
        self.ident = change.ident
        self.filter = change.filter
        self.flags = change.flags & KEPT
        self.enabled = False
        self.change(change)

    def change(self, change) -> None:
        """Added, or touched by any later change: udata is always what the last one said."""
        self.fflags, self.data, self.udata = change.fflags, change.data, change.udata

    def valid(self) -> bool:
        """Whether what it watches is still that."""
        return True

    def attach(self) -> None:
        """Begin to watch. OSError as kevent(2) says it."""

    def detach(self) -> None:
        """End it."""

    def enable(self, enabled: bool) -> None:
        """EV_ENABLE, EV_DISABLE."""
        self.enabled = enabled

    def clear(self) -> None:
        """EV_CLEAR: it has been reported."""


# --- fds ---------------------------------------------------------------------------------------------------------


def identity(fd: int):
    """What an fd stands for; None when it is closed."""
    try:
        found = os.fstat(fd)
    except OSError:
        return None
    return found.st_dev, found.st_ino, stat.S_IFMT(found.st_mode)


def tcp_info(sock) -> bytes:
    """The kernel's struct tcp_info; empty for other sockets."""
    try:
        return sock.getsockopt(socket.IPPROTO_TCP, TCP_INFO, 104)
    except OSError:
        return b""


def socket_type(sock) -> int:
    """SOCK_STREAM or what else it is."""
    return sock.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE)


class FdNote(Note):
    """An fd that becomes readable or writable."""

    asked = False
    armed = False
    events = 0
    other_way = 0
    """How an end of a pipe is open for which this note never holds (pipe_kqfilter(), pipe_nfiltops)."""

    def attach(self) -> None:
        """Note what the fd is now."""
        self.identity = identity(self.ident)
        kind = self.identity[2]
        mode = fcntl.fcntl(self.ident, fcntl.F_GETFL) & os.O_ACCMODE
        self.silent = stat.S_ISFIFO(kind) and mode == self.other_way
        self.asked = stat.S_ISREG(kind) or stat.S_ISDIR(kind) or self.silent  # epoll does not know files
        self.is_socket = stat.S_ISSOCK(kind)
        self.is_pipe = stat.S_ISFIFO(kind)
        self.is_datagram = self.is_socket and self.on_socket(socket_type) == socket.SOCK_DGRAM
        info = self.on_socket(tcp_info) if self.is_socket else b""
        self.connecting = bool(info) and info[0] == TCP_SYN_SENT

    def valid(self) -> bool:
        """Whether the fd has not been closed since."""
        return self.identity == identity(self.ident)

    def enable(self, enabled: bool) -> None:
        """Into or out of the epoll; into it again, so that it is evaluated anew."""
        super().enable(enabled)
        if self.asked:
            return
        poller = self.queue._sets[self.filter]
        if self.armed:
            self.detach()
        if enabled:
            try:
                poller.register(self.ident, self.events | (EPOLLET if self.flags & EV_CLEAR else 0))
            except FileExistsError:  # left by a closed fd of the same number, of which there is a copy
                poller.modify(self.ident, self.events | (EPOLLET if self.flags & EV_CLEAR else 0))
            self.armed = True

    def detach(self) -> None:
        """Out of the epoll."""
        if self.armed:
            self.armed = False
            try:
                self.queue._sets[self.filter].unregister(self.ident)
            except OSError:
                pass  # the fd was closed

    def on_socket(self, ask):
        """`ask` of the fd as a socket object."""
        sock = socket.socket(fileno=self.ident)
        try:
            return ask(sock)
        finally:
            sock.detach()

    def bits(self) -> int:
        """What poll(2) says of the fd."""
        poller = poll()
        poller.register(self.ident, select.POLLIN | select.POLLOUT | select.POLLPRI | POLLRDHUP)
        found = poller.poll(0)
        bits = found[0][1] if found else 0
        if self.is_socket and bits & select.POLLHUP and not bits & (select.POLLIN | POLLRDHUP | select.POLLERR):
            return 0  # never connected: Linux calls that hung up and writable, the BSDs call it nothing
        return bits

    def failed(self, bits: int) -> int:
        """POLLERR where it ends a socket; an error of datagrams passes (filt_soread(): "temporary udp error")."""
        return bits & select.POLLERR if self.is_socket and not self.is_datagram else 0

    def error(self, bits: int) -> int:
        """The socket's error: what it may be, since asking would take it away."""
        if not self.failed(bits):
            return 0
        return errno.ECONNREFUSED if self.connecting else errno.ECONNRESET

    def waiting(self) -> int:
        """FIONREAD; 0 where there is no such thing."""
        try:
            return struct.unpack("i", fcntl.ioctl(self.ident, termios.FIONREAD, b"\0\0\0\0"))[0]
        except OSError:
            return 0


class ReadNote(FdNote):
    """EVFILT_READ: `data` bytes can be read, or so many connections accepted; EV_EOF at the end of input."""

    events = EPOLLIN | EPOLLRDHUP
    other_way = os.O_WRONLY

    def state(self):
        """See the module."""
        if self.silent:
            return None
        if self.asked:
            left = os.fstat(self.ident).st_size - os.lseek(self.ident, 0, os.SEEK_CUR)
            return (left, 0, 0) if left else None
        bits = self.bits()
        ended = bits & (POLLRDHUP | select.POLLHUP) or self.failed(bits)
        if not bits & (select.POLLIN | select.POLLERR) and not ended:
            return None
        return self.amount(), EV_EOF if ended else 0, self.error(bits)

    def amount(self) -> int:
        """Bytes, or connections."""
        if self.is_socket and self.on_socket(lambda sock: sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)):
            info = self.on_socket(tcp_info)
            return struct.unpack_from("I", info, TCP_UNACKED)[0] if info else 1
        return self.waiting()


def shut_for_writing(sock) -> bool:
    """Whether this end has sent its FIN, or for a unix stream what stands for one."""
    if sock.family == socket.AF_UNIX and socket_type(sock) == socket.SOCK_STREAM:
        try:
            sock.send(b"", socket.MSG_DONTWAIT | MSG_NOSIGNAL)  # nothing, unless it is the end
        except BrokenPipeError:
            return True
        except OSError:
            return False  # not connected
        return False
    info = tcp_info(sock)
    return bool(info) and info[0] in TCP_SHUT


class WriteNote(FdNote):
    """EVFILT_WRITE: there is room for `data` bytes; EV_EOF when nobody will read them."""

    events = EPOLLOUT
    other_way = os.O_RDONLY

    def attach(self) -> None:
        """`no_reader`: of a pipe the other end is closed (pipe_kqfilter(); OpenBSD reports it as an event by now)."""
        super().attach()
        if self.is_pipe and not self.silent and self.bits() & select.POLLERR:
            raise OSError(no_reader, os.strerror(no_reader))

    def state(self):
        """See the module."""
        if self.silent:
            return None
        if self.asked:
            return 0, 0, 0
        bits = self.bits()
        ended = bits & (select.POLLERR | select.POLLHUP) if self.is_pipe else bits & select.POLLHUP or self.failed(bits)
        if self.is_socket and bits and not ended:
            ended = self.on_socket(shut_for_writing)
        if not bits & (select.POLLOUT | select.POLLERR) and not ended:
            return None
        return 0 if ended and self.is_pipe else self.room(), EV_EOF if ended else 0, self.error(bits)

    def room(self) -> int:
        """Bytes that a write would take, about."""
        if not self.is_socket:
            try:
                return fcntl.fcntl(self.ident, F_GETPIPE_SZ) - self.waiting()
            except OSError:
                return 0
        size = self.on_socket(lambda sock: sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF))
        try:
            return size - struct.unpack("i", fcntl.ioctl(self.ident, termios.TIOCOUTQ, b"\0\0\0\0"))[0]
        except OSError:
            return size


# --- the others --------------------------------------------------------------------------------------------------


class UserNote(Note):
    """EVFILT_USER: NOTE_TRIGGER makes it hold; the low bits of fflags are the program's."""

    triggered = False

    def __init__(self, queue, change) -> None:
        """Not triggered by what adds it: FreeBSD's kernel has taken its fflags away when it looks at them."""
        super().__init__(queue, change)
        self.fflags = change.fflags & NOTE_FFLAGSMASK
        self.triggered = False

    def change(self, change) -> None:
        """Trigger it, and combine the program's bits as asked for. With EV_CLEAR it is untriggered instead."""
        before = getattr(self, "fflags", 0)
        super().change(change)
        control, bits = change.fflags & NOTE_FFCTRLMASK, change.fflags & NOTE_FFLAGSMASK
        self.fflags = {
            NOTE_FFAND: before & bits, NOTE_FFOR: before | bits, NOTE_FFCOPY: bits}.get(control, before)
        self.triggered = (self.triggered or bool(change.fflags & NOTE_TRIGGER)) and not change.flags & EV_CLEAR

    def state(self):
        """See the module."""
        return (self.data, 0, self.fflags) if self.triggered else None

    def clear(self) -> None:
        """Until the next trigger; the program's bits stay."""
        self.triggered = False


class ProcessNote(Note):
    """EVFILT_PROC with NOTE_EXIT: the process has ended, with `data` as its status; reported once."""

    pidfd = -1

    def __init__(self, queue, change) -> None:
        super().__init__(queue, change)
        self.flags |= EV_CLEAR

    def attach(self) -> None:
        """ESRCH: there is none, or it is dead and this system refuses those."""
        if self.fflags != NOTE_EXIT:
            raise OSError(errno.EINVAL, "this stand-in knows NOTE_EXIT only")
        self.pidfd = pidfd_open(self.ident)
        if refuses_zombies and self.ended() is not None:
            self.detach()
            raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH))
        self.queue._epoll.register(self.pidfd, EPOLLIN)

    def detach(self) -> None:
        """Close what watches it; with that epoll forgets it."""
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1

    def ended(self):
        """Its status as wait(2) has it, None while it runs; 0 for what is no child of ours, or nobody's any more."""
        try:
            found = waitid(P_PIDFD, self.pidfd, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            poller = poll()
            poller.register(self.pidfd, select.POLLIN)
            return 0 if poller.poll(0) else None
        if found is None:
            return None
        code = found.si_status
        return {os.CLD_EXITED: code << 8, os.CLD_DUMPED: code | 0x80}.get(found.si_code, code)

    def state(self):
        """See the module."""
        status = self.ended()
        return None if status is None else (status, EV_EOF | EV_ONESHOT, NOTE_EXIT)


class SignalNote(Note):
    """EVFILT_SIGNAL: `data` signals were sent since it was last reported, also ignored ones but SIGCHLD."""

    def __init__(self, queue, change) -> None:
        super().__init__(queue, change)
        self.flags |= EV_CLEAR
        self.count = 0

    def attach(self) -> None:
        """Stand before the signal's handler, which is called as before."""
        self.handler = signal.getsignal(self.ident)
        if self.ident == signal.SIGCHLD and self.handler == signal.SIG_IGN:
            return  # kqueue(2): "which, if ignored, will not be recorded by the filter"
        try:
            self.handler = signal.signal(self.ident, self.sent)
        except ValueError as error:
            raise OSError(errno.EINVAL, str(error)) from None

    def sent(self, number, frame) -> None:
        """Count it; then what would have been without the note."""
        self.count += 1
        self.queue.poke()
        if callable(self.handler):
            self.handler(number, frame)
        elif self.handler == signal.SIG_DFL and number not in IGNORED_BY_DEFAULT:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def detach(self) -> None:
        """Put the handler back, unless there is another by now."""
        if signal.getsignal(self.ident) == self.sent:
            signal.signal(self.ident, self.handler)

    def state(self):
        """See the module."""
        return (self.count, 0, 0) if self.count else None

    def clear(self) -> None:
        """Count from 0 again."""
        self.count = 0


class TimerNote(Note):
    """EVFILT_TIMER: each `data` milliseconds, or what fflags says; reports how often that was since the last time."""

    def __init__(self, queue, change) -> None:
        self.flags = change.flags & KEPT
        self.started = False
        super().__init__(queue, change)
        if not change.fflags & NOTE_ABSTIME:
            self.flags |= EV_CLEAR

    def change(self, change) -> None:
        """Begin anew when added again, and forget what has expired; else only udata is new. EINVAL: no such time."""
        self.udata = change.udata
        if self.started and not change.flags & EV_ADD:
            return
        absolute, unit = change.fflags & NOTE_ABSTIME, TIMER_UNITS.get(change.fflags & ~NOTE_ABSTIME)
        if unit is None or change.data < 0:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        self.started = True
        self.once = bool(absolute or self.flags & EV_ONESHOT)
        # "Periodic timers with a specified timeout of 0 will be silently adjusted to timeout after 1 of the time units"
        self.period = (change.data if self.once else max(change.data, 1)) * unit
        now = time.monotonic()
        self.when = now + (max(self.period - time.time(), 0) if absolute else self.period)

    def state(self):
        """See the module."""
        late = time.monotonic() - self.when
        if late < 0:
            return None
        return 1 if self.once else int(late / self.period) + 1, 0, 0

    def clear(self) -> None:
        """The next time; a time that was meant once is over."""
        if self.once:
            self.when = math.inf
        else:
            self.when += self.period * (int((time.monotonic() - self.when) / self.period) + 1)
