"""What a confined worker writes to its standard output and error: a pipe to the parent, who logs its lines as its.

A worker that kept the parent's would hold the terminal of whoever started the server, or the file that the log is
written to: it could write lines there in anybody's name, or over those that are there. The pipe is the worker's own.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable

READ_BYTES_MAX = 4096
"""Read of one worker at a time, before others get their turn: two thousand lines of one letter, some milliseconds."""

LAST_BYTES_MAX = 1 << 16
"""Read of a worker that is dead: all that a pipe holds (pipe(7)), unless it was made larger."""

LINE_BYTES_MAX = 8192
"""A longer line is logged in parts."""


class Output:
    """The parent's end of the pipe of one worker. Closed with the worker's seat."""

    def __init__(self, log: Callable[[str], None]) -> None:
        """`log` takes a line. Raises OSError when there is no pipe to be had."""
        self._log = log
        self._line = b""
        self.fd, self.writing = os.pipe()
        """The worker's end is closed by the parent after the fork: `close_writing`."""
        os.set_blocking(self.fd, False)

    def fileno(self) -> int:
        """The end to read from, for selectors."""
        return self.fd

    def read(self, most: int = READ_BYTES_MAX) -> int | None:
        """Log what is there, as far as lines are whole; how much it was, None at the end."""
        try:
            data = os.read(self.fd, most)
        except BlockingIOError:
            return 0
        *lines, self._line = (self._line + data).split(b"\n")
        for line in lines:
            self._tell(line)
        while len(self._line) > LINE_BYTES_MAX:
            self._tell(self._line[:LINE_BYTES_MAX])
            self._line = self._line[LINE_BYTES_MAX:]
        return len(data) or None

    def read_last(self) -> None:
        """The worker is dead: log what it left, with a line that has no end."""
        left = LAST_BYTES_MAX
        while left > 0 and (count := self.read(left)):
            left -= count
        if left <= 0:
            self._log("(there was more, which is not read)")
        self._tell(self._line)
        self._line = b""

    def _tell(self, line: bytes) -> None:
        if line:  # empty ones space a text out on a terminal, and say nothing in a log
            self._log(line.decode("utf-8", "backslashreplace"))

    def close_writing(self) -> None:
        """In the parent: the worker alone has the other end, so that its end is seen."""
        os.close(self.writing)

    def close(self) -> None:
        """Read no more."""
        os.close(self.fd)

    def take(self) -> None:
        """In the worker: have it for standard output and error, and nothing for standard input.

        Lines leave as they end, as they do on a terminal: whoever reads the log does not wait for eight kilobytes.
        """
        null = os.open(os.devnull, os.O_RDONLY)
        for fd, number in ((null, 0), (self.writing, 1), (self.writing, 2)):
            os.dup2(fd, number)
        os.close(null)
        os.close(self.writing)
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(line_buffering=True)


def flush_own() -> None:
    """In the parent, before it forks: what waits in Python's buffers would be written once more by each worker."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError, AttributeError):
            pass  # closed, or nobody reads it
