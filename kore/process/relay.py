"""The relay: what workers send to workers goes through the parent, which passes it on and never waits for anybody.

Each worker has a line here: what it is sending, and the bounded queue of what it has not taken. A worker that does not
read fills its own queue and loses what comes after, which is counted and told; nobody else notices. Objects are
passed on when they are whole, so what a worker that dies had begun to send reaches nobody, and what it had sent
reaches everybody. The line ends with its worker's process: the successor starts with an empty one, and gets
what is sent from the fork of its process on, once it listens.
"""

from __future__ import annotations

import selectors
from collections.abc import Callable, Iterable

from kore.process.channel import Channel, ChannelError
from kore.process.log import LOG_ERR, LOG_NOTICE, Log
from kore.process.outbox import Outbox
from kore.process.pieces import TO_ALL, TO_OTHERS, Assembly, Whole

MESSAGES_PER_TURN = 64
"""Messages read from one worker, at most 4 MiB, before the others, the log and the signals get their turn."""

TELL_SECONDS = 1.0
"""From the first object that is lost until that is logged, with their number: a flood is one line a second."""


class Line:
    """One worker's process as the relay sees it."""

    __slots__ = ("assembly", "channel", "dropped", "events", "outbox", "worker")

    def __init__(self, worker: int, channel: Channel) -> None:
        self.worker = worker
        self.channel = channel
        self.assembly = Assembly()
        self.outbox = Outbox(channel)
        self.events = 0  # what the selector waits for; 0: nothing any more
        self.dropped = 0  # objects it did not get and that have not been told of


class Relay:
    """The lines of all workers. The parent calls join() after a fork and leave() after a death."""

    def __init__(
        self, selector: selectors.BaseSelector, log: Log, after: Callable[[float, Callable[[], None]], None]
    ) -> None:
        self._selector = selector
        self._log = log
        self._after = after
        self._lines: dict[int, Line] = {}

    def join(self, worker: int, channel: Channel, on_nonsense: Callable[[ChannelError], None]) -> None:
        """A process of `worker` is there; `on_nonsense` hears when it sends what no worker of ours sends."""
        line = self._lines[worker] = Line(worker, channel)

        def ready() -> None:
            try:
                self._hear(line)
            except ChannelError as error:
                self._ignore(line)
                on_nonsense(error)
            line.outbox.flush()
            self._watch(line)

        self._selector.register(channel, selectors.EVENT_READ, ready)
        line.events = selectors.EVENT_READ

    def leave(self, worker: int) -> None:
        """The process is dead: pass on what it had sent (no more than its channel held), forget what it was to get."""
        line = self._lines.pop(worker)
        self._ignore(line)
        line.outbox.gone = True
        try:
            while (message := line.channel.receive_message()) is not None:
                self._take(line, message)
        except (EOFError, ChannelError):
            pass  # all has been said
        waiting = line.outbox.objects()
        if waiting:
            self._log.parent(LOG_NOTICE, f"{waiting} messages for worker {worker} were not taken before it died")
        self._tell(line)

    def _hear(self, line: Line) -> None:
        try:
            for _ in range(MESSAGES_PER_TURN):
                message = line.channel.receive_message()
                if message is None:
                    return
                self._take(line, message)
        except EOFError:
            self._ignore(line)

    def _take(self, source: Line, message: bytes) -> None:
        whole = source.assembly.add(message)
        if whole is not None:
            for line in self._targets(source, whole):
                self._pass_on(line, whole)

    def _targets(self, source: Line, whole: Whole) -> Iterable[Line]:
        """Whom it is for. A worker without a process just now is nobody: its successor gets what comes later."""
        if whole.target == TO_ALL:
            return self._lines.values()
        if whole.target == TO_OTHERS:
            return [line for line in self._lines.values() if line is not source]
        line = self._lines.get(whole.target)
        return () if line is None else (line,)

    def _pass_on(self, line: Line, whole: Whole) -> None:
        if not line.outbox.put(whole.pieces):
            if not line.dropped:
                self._after(TELL_SECONDS, lambda: self._tell(line))
            line.dropped += 1
        self._watch(line)

    def _watch(self, line: Line) -> None:
        """Wait for room on its channel only while something waits for that."""
        if line.events:
            events = selectors.EVENT_READ | (selectors.EVENT_WRITE if line.outbox.waiting else 0)
            if events != line.events:
                self._selector.modify(line.channel, events, self._selector.get_key(line.channel).data)
                line.events = events

    def _ignore(self, line: Line) -> None:
        if line.events:
            self._selector.unregister(line.channel)
            line.events = 0

    def _tell(self, line: Line) -> None:
        count, line.dropped = line.dropped, 0
        if count:
            text = f"{count} messages for worker {line.worker} were dropped: it does not take them fast enough"
            self._log.parent(LOG_ERR, text)
