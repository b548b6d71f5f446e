"""The parent's record of one child, and of one worker: its id for life, and the process that has it now.

Only the parent writes here. What a worker shares is one page, the board, on which it notes the route it serves;
the parent reads it when the worker is dead, and believes nothing else of it.
"""

from __future__ import annotations

import mmap
import time
from dataclasses import dataclass, field

from kore.process.channel import Channel
from kore.process.output import Output

BACKOFF_FIRST_SECONDS = 0.1
BACKOFF_SECONDS_MAX = 5.0
"""Delay between restarts of a worker that keeps dying: short enough to heal alone, long enough not to burn a CPU."""

HEALTHY_SECONDS = 10.0
"""A worker that lived this long died of something new: its restart is immediate again."""

BOARD_BYTES = mmap.PAGESIZE


def new_board() -> memoryview:
    """A shared page of unsigned 32-bit words, all zero. Word 0: index + 1 of the route being served."""
    return memoryview(mmap.mmap(-1, BOARD_BYTES)).cast("I")


@dataclass(slots=True)
class Life:
    """Of one child of the parent: the process that is there now, and how those before it fared."""

    pid: int = 0  # 0: none
    channel: Channel | None = None
    ready: bool = False
    started: float = 0.0  # monotonic seconds
    restarts: int = 0
    failures: int = 0  # deaths in a row without a healthy life between them

    def begin(self, pid: int, channel: Channel) -> None:
        """A process is there."""
        self.pid = pid
        self.channel = channel
        self.ready = False
        self.started = time.monotonic()

    def end(self) -> float:
        """The process is gone: free what it had. Its uptime in seconds."""
        self.pid = 0
        self.ready = False
        self.close()
        return time.monotonic() - self.started

    def close(self) -> None:
        """Close the channel: the process is gone, or this one is a child that must not have it."""
        if self.channel is not None:
            self.channel.close()
            self.channel = None

    def next_delay(self, uptime: float) -> float:
        """Seconds until the successor starts, after a life of `uptime` seconds: 0, then 0.1, 0.2 ... 5."""
        if uptime >= HEALTHY_SECONDS:
            self.failures = 0
        delay = 0.0
        if self.failures:
            # The exponent is bounded before it is used: a crash loop of days must not compute 2**100000.
            delay = min(BACKOFF_SECONDS_MAX, BACKOFF_FIRST_SECONDS * 2.0 ** min(self.failures - 1, 16))
        self.failures += 1
        return delay


@dataclass(slots=True, kw_only=True)
class Seat(Life):
    """Worker `worker`: who has the seat, since when, and how its holders fared."""

    worker: int
    board: memoryview = field(default_factory=new_board)
    messages: Channel | None = None
    """The channel of what workers send to workers; the relay's."""
    output: Output | None = None
    """What it writes to its standard streams, when that is for the parent."""
    reopened: set[int] = field(default_factory=set)
    """Descriptors of access logs that were opened again and that the process has not been sent yet."""

    @property
    def label(self) -> str:
        """How the log and the process list call it."""
        return f"[wrk {self.worker}]"

    def taken(self, pid: int, channel: Channel, messages: Channel, output: Output | None) -> None:
        """A process sat down."""
        self.begin(pid, channel)
        self.messages = messages
        self.output = output

    def left(self) -> float:
        """The process is gone: free what it had. Its uptime in seconds."""
        self.reopened.clear()
        return self.end()

    def close(self) -> None:
        """Close the channels, and the output."""
        for channel in (self.channel, self.messages, self.output):
            if channel is not None:
                channel.close()
        self.channel = self.messages = self.output = None
