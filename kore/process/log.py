"""The log: one line per message, forged by nobody, written by the parent alone and never waited for.

A line is ``YYYY-MM-DD HH:MM:SS.mmm UTC proc=[wrk 1] log=[text]``. Text comes from requests and applications, so
control characters are escaped: a message cannot pretend to be two. The sink may be a pipe whose reader sleeps
or a disk that is full; the parent has workers to look after, so what the sink does not take at once waits in a
bounded backlog, and what does not fit there is counted and the count is logged when there is room again.
"""

from __future__ import annotations

import os
import re
import select
import stat
import sys
import syslog
import time
from collections import deque
from typing import Protocol

from kore.errors import StartError

LOG_ERR = 3
LOG_NOTICE = 5
LOG_INFO = 6

TEXT_CHARACTERS_MAX = 8192
"""Characters of one message; the rest is cut and counted. A message must fit the channel it travels on."""

BACKLOG_BYTES_MAX = 1 << 20
"""Bytes of lines kept for a sink that is slow: some seconds of a busy log, and nothing a parent notices."""

CLOSE_SECONDS_MAX = 2.0
"""How long the end of the server waits for a slow reader to take the last lines: they are the ones that explain it."""

RESERVE_BYTES = 1 << 16
"""More of it for the parent's own lines: a flood from a worker must not hide that worker's death."""

PIECE_BYTES = 4096
"""What a pipe that poll(2) reports writable is sure to take without blocking (pipe(7): PIPE_BUF)."""

LOG_FLAGS = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOCTTY
LOG_MODE = 0o644

PARENT = "[parent]"

UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
SHORT_ESCAPES = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}


def _escaped(match: re.Match[str]) -> str:
    character = match[0]
    code = ord(character)
    return SHORT_ESCAPES.get(character) or (f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}")


def cut(text: str) -> str:
    """`text`, at most about TEXT_CHARACTERS_MAX long, with the number of characters that were cut off."""
    excess = len(text) - TEXT_CHARACTERS_MAX
    return text if excess <= 0 else f"{text[:TEXT_CHARACTERS_MAX]}... ({excess} more characters)"


def escape(text: str) -> str:
    r"""`text` on one line: control characters, line separators and lone surrogates are written as escapes.

    They become ``\n``, ``\x1b``, ``\u2028``. A backslash stays as it is: nothing is forged with one.
    """
    return UNSAFE.sub(_escaped, text)


def format_line(label: str, text: str, now: float) -> bytes:
    """The line for `text` from the process `label` (``[parent]``, ``[wrk 1]``) at `now`, seconds since the epoch."""
    millisecond = int(now * 1000)
    second = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(millisecond // 1000))
    return f"{second}.{millisecond % 1000:03d} UTC proc={label} log=[{escape(text)}]\n".encode()


class Sink(Protocol):
    """Where lines go."""

    def write(self, priority: int, label: str, text: str) -> bool:
        """Take one message; False when it had to be dropped. Never raises, never blocks for long."""

    def flush(self) -> None:
        """Write what waits, as far as it goes without blocking."""

    def waiting_fd(self) -> int | None:
        """The fd to watch for writability while lines wait; None when nothing does."""

    def fds(self) -> tuple[int, ...]:
        """The fds that are this sink's alone and that no worker may keep."""

    def reopen(self) -> None:
        """Open the file again, after a rotation."""

    def close(self) -> None:
        """Write what can be written and release the sink."""


class DescriptorSink:
    """Lines written to a descriptor: standard output, or a file."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        # A regular file never makes a writer wait for a reader and epoll refuses it: written to directly.
        self._direct = stat.S_ISREG(os.fstat(fd).st_mode)
        self._backlog: deque[bytes] = deque()
        self._backlog_bytes = 0

    def write(self, priority: int, label: str, text: str) -> bool:  # noqa: ARG002 (the line does not show it)
        room = BACKLOG_BYTES_MAX + (RESERVE_BYTES if label == PARENT else 0)
        line = format_line(label, text, time.time())
        if not self._backlog:
            try:
                line = self._write_now(line)
            except OSError:
                # A reader that is gone (EPIPE) or a full disk (ENOSPC) loses the line, not the server.
                return False
            if not line:
                return True
        elif self._backlog_bytes + len(line) > room:
            return False
        self._backlog.append(line)
        self._backlog_bytes += len(line)
        return True

    def _write_now(self, line: bytes) -> bytes:
        """Write without blocking; what is left."""
        while line:
            if self._direct:
                line = line[os.write(self._fd, line) :]
                continue
            poller = select.poll()
            poller.register(self._fd, select.POLLOUT)
            if not poller.poll(0):
                return line
            line = line[os.write(self._fd, line[:PIECE_BYTES]) :]
        return line

    def flush(self) -> None:
        while self._backlog:
            line = self._backlog.popleft()
            self._backlog_bytes -= len(line)
            try:
                rest = self._write_now(line)
            except OSError:
                continue
            if rest:
                self._backlog.appendleft(rest)
                self._backlog_bytes += len(rest)
                return

    def waiting_fd(self) -> int | None:
        return self._fd if self._backlog else None

    def fds(self) -> tuple[int, ...]:
        return ()

    def reopen(self) -> None:
        """Standard output is not ours to open again."""

    def close(self) -> None:
        self.flush()


def open_log(path: str) -> int:
    """Open a logfile once more, after a rotation; the descriptor. Raises OSError.

    Never waits: a fifo whose reader is gone (fifo(7)) would otherwise stop the parent until there is another.
    """
    fd = os.open(path, LOG_FLAGS | os.O_NONBLOCK, LOG_MODE)
    os.set_blocking(fd, True)
    return fd


class FileSink(DescriptorSink):
    """Lines appended to a file that the parent opens by its absolute path, again after a rotation."""

    def __init__(self, path: str) -> None:
        self.path = os.path.abspath(path)
        try:
            fd = os.open(self.path, LOG_FLAGS, LOG_MODE)
        except OSError as error:
            raise StartError(f"logfile {self.path}: {error.strerror}") from error
        super().__init__(fd)

    def fds(self) -> tuple[int, ...]:
        return (self._fd,)

    def reopen(self) -> None:
        """Raises OSError and keeps the old file when the new one cannot be opened."""
        self.flush()
        fd = open_log(self.path)
        os.close(self._fd)
        self._fd = fd
        self._direct = stat.S_ISREG(os.fstat(fd).st_mode)

    def close(self) -> None:
        self.flush()
        os.close(self._fd)


class SyslogSink:
    """Messages to syslog(3), facility daemon, identity ``kore`` with the pid; the time is syslogd's to add."""

    def __init__(self) -> None:
        syslog.openlog("kore", syslog.LOG_PID, syslog.LOG_DAEMON)

    def write(self, priority: int, label: str, text: str) -> bool:
        level = priority if 0 <= priority <= 7 else syslog.LOG_INFO
        syslog.syslog(level, f"proc={label} log=[{escape(text)}]")
        return True

    def flush(self) -> None:
        """syslog(3) keeps nothing back."""

    def waiting_fd(self) -> int | None:
        return None

    def fds(self) -> tuple[int, ...]:
        return ()

    def reopen(self) -> None:
        """Rotation is the business of syslogd."""

    def close(self) -> None:
        syslog.closelog()


class Log:
    """The parent's log on one sink, with the count of what the sink could not take."""

    def __init__(self, sink: Sink) -> None:
        self.sink = sink
        self._dropped = 0

    def write(self, priority: int, label: str, text: str) -> None:
        """Log `text` as `label`. Never raises; a line the sink cannot take is counted."""
        gap = self._dropped and not self._report_dropped()
        if (gap and label != PARENT) or not self.sink.write(priority, label, text):
            self._dropped += 1

    def _report_dropped(self) -> bool:
        """Say how many were lost, once the backlog is gone: one gap that grows, rather than many with a line each."""
        if self.sink.waiting_fd() is not None:
            return False
        text = f"{self._dropped} log lines were dropped: the log could not be written fast enough"
        if not self.sink.write(LOG_NOTICE, PARENT, text):
            return False
        self._dropped = 0
        return True

    def parent(self, priority: int, text: str) -> None:
        """Log `text` as the parent."""
        self.write(priority, PARENT, text)

    def flush(self) -> None:
        """Write what waits, without blocking, then the count of what was lost."""
        self.sink.flush()
        if self._dropped:
            self._report_dropped()

    def reopen(self) -> None:
        """Open the logfile again; a failure is logged into the old one."""
        try:
            self.sink.reopen()
        except OSError as error:
            self.parent(LOG_ERR, f"logfile cannot be opened again, the old one stays: {error}")

    def close(self) -> None:
        """Write what waits, for CLOSE_SECONDS_MAX at most, and release the sink. Called once, last."""
        deadline = time.monotonic() + CLOSE_SECONDS_MAX
        self.flush()
        while (fd := self.sink.waiting_fd()) is not None and (left := deadline - time.monotonic()) > 0:
            poller = select.poll()
            poller.register(fd, select.POLLOUT)
            poller.poll(left * 1000)
            self.flush()
        self.sink.close()


def standard_output() -> DescriptorSink:
    """The sink on standard output, below Python's own buffer (which is flushed first, to keep the order)."""
    try:
        sys.stdout.flush()
        return DescriptorSink(1)
    except (OSError, ValueError, AttributeError):
        # Started with standard output closed: there is nowhere to write to, which is no reason not to serve.
        return DescriptorSink(os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC))
