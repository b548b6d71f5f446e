"""The tracer: it hears of every call that a worker's filter forbids, finds out who makes it, tells, and lets it go on.

It holds the listeners of the workers' filters. A thread that makes a forbidden call is stopped by the kernel until the
tracer has answered. Which line of Python that is, only the thread itself can tell: it is sent a signal, for which
faulthandler has a handler that writes the thread's stack to a pipe; the kernel then makes the interrupted call again,
whichever it is, because it had not begun, and what comes here a second time is answered. So when the stack is needed
it is there, and nobody waits for time to pass; a thread that does not come again has LOOK_SECONDS_MAX.

A thread that blocks signals, as those do that start a process, is answered at once and writes its stack when it
unblocks them. A thread without the handler, such as one of a program that was started, is not asked.
"""

from __future__ import annotations

import ctypes
import os
import select
import selectors
import time
from collections import deque
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Final

from kore.process.channel import Channel, Kind
from kore.process.log import LOG_ERR
from kore.process.role import log_body
from kore.process.sites import RULES_MAX, SITES_MAX, Site
from kore.sandbox import notification
from kore.sandbox.decoding import call_text, path_text
from kore.sandbox.machine import name_of, number_of, this_machine
from kore.sandbox.notification import Notification
from kore.sandbox.stack import DUMP_BYTES_MAX, Ownership, Place, places_of
from kore.sandbox.suggestion import PATHS, is_deadly, line_for

LABEL: Final = "[tracer]"

LOOK_SECONDS_MAX: Final = 1.0
"""For a thread to write its stack and come again; it takes some microseconds of a processor that is free."""

LOOKS_IN_VAIN_MAX: Final = 256
"""Stacks of a call looked at in a row without a new place; then the call is known, and only each
LOOKED_AT_EACH-th is looked at: the others are answered at once."""

LOOKED_AT_EACH: Final = 16

CALLS_PER_TURN: Final = 64
"""Calls of one worker heard before the others get their turn."""

LATE_MAX: Final = 256
"""Threads remembered that did not come again in time."""


@dataclass(frozen=True, slots=True)
class Brief:
    """What a tracer must know."""

    signal: int
    """The signal for which the workers write a stack."""
    folder: str
    """Where the application lies, absolute."""


@dataclass(slots=True)
class _Look:
    """A stack that was asked for."""

    call: Notification
    site: Site
    deadline: float
    posted: bool
    """The thread blocks the signal: its call has been answered already."""
    dump: bytes = b""
    """What has come of its stack."""


@dataclass(slots=True)
class _Traced:
    """A worker's process: there is one pipe for its stacks, so one look at a time; other calls wait for its end."""

    worker: int
    pid: int
    listener: int
    stacks: int
    look: _Look | None = None
    waiting: deque[Notification] = field(default_factory=deque)
    late: dict[int, int] = field(default_factory=dict)
    """Threads that did not come again in time, and the number of their call: it is not looked at when they do."""


@dataclass(frozen=True, slots=True)
class _Thread:
    """What the kernel tells of a thread: its process, and whether it would handle the signal, and when."""

    process: int
    caught: bool
    blocked: bool
    pending: bool
    """It is blocked, and was sent already."""


def run(brief: Brief, channel: Channel) -> int:
    """Be a tracer until the parent closes the channel; the exit code. Called in the forked process."""
    tracer = Tracer(brief, channel)
    try:
        tracer.loop()
    except Exception as error:  # noqa: BLE001 (the parent starts another, and must know why)
        channel.send_last(Kind.LOG, log_body(LOG_ERR, f"the tracer ends by {error!r}"))
        return 1
    return 0


class Tracer:
    """The state of a tracer."""

    def __init__(self, brief: Brief, channel: Channel) -> None:
        self.brief = brief
        self.channel = channel
        self.ownership = Ownership(brief.folder)
        self.machine = this_machine()
        self._selector = selectors.DefaultSelector()
        self._selector.register(channel, selectors.EVENT_READ, self._orders)
        self._traced: dict[int, _Traced] = {}  # by listener
        self._stacks: dict[tuple[int, int], int] = {}  # by worker and pid, until the listener comes
        self._told: set[tuple[str, str]] = set()
        self._vain: dict[str, int] = {}  # by rule: looks in a row that found nothing new
        self._open = True

    def loop(self) -> None:
        """Hear and answer until the parent is gone."""
        while self._open:
            deadlines = [traced.look.deadline for traced in self._traced.values() if traced.look is not None]
            timeout = max(0.0, min(deadlines) - time.monotonic()) if deadlines else None
            for key, _ in self._selector.select(timeout):
                key.data()
            now = time.monotonic()
            for traced in list(self._traced.values()):
                if traced.look is not None and traced.look.deadline <= now:
                    self._expire(traced, traced.look)
        for traced in self._traced.values():
            self._end_look(traced)

    # The parent's words.

    def _orders(self) -> None:
        try:
            while (message := self.channel.receive_fd()) is not None:
                kind, body, fd = message
                worker, pid, again = map(int, body.split())
                assert fd is not None
                if kind is Kind.STACKS:
                    self._stacks[worker, pid] = fd
                elif kind is Kind.LISTENER:
                    self._join(_Traced(worker, pid, fd, self._stacks.pop((worker, pid))), again=bool(again))
        except EOFError:
            self._open = False

    def _join(self, traced: _Traced, *, again: bool) -> None:
        """A worker to trace; `again`: another tracer had it, which may have left calls unanswered that it had heard."""
        self._traced[traced.listener] = traced
        self._selector.register(traced.listener, selectors.EVENT_READ, lambda: self._hear(traced))
        if again:
            for thread in _threads_of(traced.pid):
                found = self._thread(thread)
                if found is not None and found.caught and not found.blocked:
                    _signal_thread(found.process, thread, self.brief.signal)

    def _forget(self, traced: _Traced) -> None:
        """Nobody is under the filter any more."""
        del self._traced[traced.listener]
        self._selector.unregister(traced.listener)
        self._end_look(traced)
        os.close(traced.listener)
        os.close(traced.stacks)

    # Calls.

    def _hear(self, traced: _Traced) -> None:
        for _ in range(CALLS_PER_TURN):
            call = notification.receive(traced.listener)
            if call is None:
                if notification.poll(traced.listener) & select.POLLHUP:
                    self._forget(traced)
                return
            self._take(traced, call)

    def _take(self, traced: _Traced, call: Notification) -> None:
        look = traced.look
        if look is None or look.posted:
            self._begin(traced, call)
        elif call.thread != look.call.thread:
            traced.waiting.append(call)  # no more than there are threads
        elif call.number == look.call.number and call.arguments == look.call.arguments:
            self._end_look(traced)
            notification.go_on(traced.listener, call)
            self._go_on(traced)
        else:  # another handler came first, and makes calls of its own
            self._answer(traced, call, self._site(traced, call))

    def _go_on(self, traced: _Traced) -> None:
        """Take the calls that waited for the end of a look, up to the next that has to be looked at."""
        while traced.waiting and (traced.look is None or traced.look.posted):
            self._begin(traced, traced.waiting.popleft())

    def _begin(self, traced: _Traced, call: Notification) -> None:
        """Ask the thread for its stack, or answer where that is not worth it or not possible."""
        name = name_of(call.number, self.machine)
        if not self._worth(line_for(name, call.arguments) or name):
            notification.go_on(traced.listener, call)
            return
        thread = self._thread(call.thread)
        site = self._site(traced, call)
        if thread is not None and thread.process != traced.pid:
            site = replace(site, child=True)
        late = traced.late.pop(call.thread, None) == call.number
        if late or thread is None or not thread.caught or (thread.blocked and (thread.pending or traced.look)):
            self._answer(traced, call, site)
            return
        self._end_look(traced)
        _read_all(traced.stacks)  # what came too late for an earlier look
        if not notification.still_waits(traced.listener, call):
            return  # it comes again, or its thread is dead
        if not _signal_thread(thread.process, call.thread, self.brief.signal):
            self._answer(traced, call, site)
            return
        traced.look = _Look(call, site, time.monotonic() + LOOK_SECONDS_MAX, thread.blocked)
        if thread.blocked:
            notification.go_on(traced.listener, call)
            self._selector.register(traced.stacks, selectors.EVENT_READ, lambda: self._posted(traced))

    def _answer(self, traced: _Traced, call: Notification, site: Site) -> None:
        """Let it go on, without a stack."""
        self._tell(site, [])
        notification.go_on(traced.listener, call)

    def _posted(self, traced: _Traced) -> None:
        """A stack arrives of a thread that has gone on: it is enough when a line of the application is there."""
        if traced.look is None:
            return  # ended in this very turn
        traced.look.dump += _read_all(traced.stacks)
        if self.ownership.innermost(places_of(traced.look.dump)) or len(traced.look.dump) >= DUMP_BYTES_MAX:
            self._end_look(traced)

    def _end_look(self, traced: _Traced) -> None:
        """End a look at a thread that has gone on, is late or is gone: tell what is known of its place."""
        look, traced.look = traced.look, None
        if look is not None:
            if look.posted:
                self._selector.unregister(traced.stacks)
            self._tell(look.site, places_of(look.dump + _read_all(traced.stacks)))

    def _expire(self, traced: _Traced, look: _Look) -> None:
        """The thread did not write its stack in time, or did not come again."""
        self._end_look(traced)
        if not look.posted and not notification.go_on(traced.listener, look.call):
            if len(traced.late) >= LATE_MAX:
                traced.late.clear()
            traced.late[look.call.thread] = look.call.number  # whenever it comes again, it is not asked again
        self._go_on(traced)

    def _thread(self, thread: int) -> _Thread | None:
        """Raises nothing; None when it is gone."""
        try:
            with open(f"/proc/{thread}/status", "rb") as file:
                fields = dict(line.split(b":", 1) for line in file.read().splitlines() if b":" in line)
        except OSError:
            return None
        bit = 1 << (self.brief.signal - 1)
        caught, blocked, pending = (bool(int(fields[name], 16) & bit) for name in (b"SigCgt", b"SigBlk", b"SigPnd"))
        return _Thread(int(fields[b"Tgid"]), caught, blocked, pending)

    # Telling.

    def _worth(self, rule: str) -> bool:
        """Whether another stack of a call that `rule` allows may tell something new."""
        vain = self._vain.get(rule)
        if vain is None:
            if len(self._vain) >= RULES_MAX:
                return False
            vain = 0
        self._vain[rule] = vain + 1
        return vain < LOOKS_IN_VAIN_MAX or vain % LOOKED_AT_EACH == 0

    def _site(self, traced: _Traced, call: Notification) -> Site:
        """What is known of a call before its place is. Its thread waits, so its memory says what is meant."""
        read = partial(notification.read_memory, call.thread)
        name = name_of(call.number, self.machine)
        line = line_for(name, call.arguments)
        text = call_text(call.number, call.arguments, self.machine, read)
        directory = None
        path = path_text(call.arguments[PATHS[name]], read) if name in PATHS else None
        if path is not None:
            directory = os.path.dirname(path) or "."
        return Site(traced.worker, text, line, is_deadly(name), directory=directory)

    def _tell(self, site: Site, places: list[Place]) -> None:
        """Tell the parent, unless it knows; one that its channel does not take is told of the next time."""
        found = self.ownership.innermost(places)
        place = found or (places[0] if places else None)
        whole = site
        if place is not None:
            kores = self.ownership.platforms(place.file)
            text = f"{kores or self._shown(place.file)}:{place.line} {place.function}"
            whole = replace(site, place=text, own=found is not None, kores=kores is not None)
        if whole.key in self._told or len(self._told) >= SITES_MAX + RULES_MAX:
            return
        if self.channel.send(Kind.SITE, whole.body()):
            self._told.add(whole.key)
            self._vain[whole.key[0]] = 0

    def _shown(self, file: str) -> str:
        """Files of the application's are called as they are in its folder."""
        folder = self.brief.folder.rstrip(os.sep) + os.sep
        return file.removeprefix(folder)


def _read_all(fd: int) -> bytes:
    """What is in the pipe now."""
    found = b""
    try:
        while len(found) < DUMP_BYTES_MAX and (piece := os.read(fd, DUMP_BYTES_MAX)):
            found += piece
    except BlockingIOError:
        pass
    return found


def _threads_of(pid: int) -> list[int]:
    try:
        return [int(thread) for thread in os.listdir(f"/proc/{pid}/task")]
    except OSError:
        return []


def _signal_thread(process: int, thread: int, number: int) -> bool:
    """tgkill(2), which reaches a thread of that process and no other; False when it is gone or not ours to signal."""
    if thread <= 0:
        return False  # a process of another namespace
    call = number_of("tgkill", this_machine())  # musl has no function for it
    assert call is not None
    return int(ctypes.CDLL(None).syscall(*map(ctypes.c_long, (call, process, thread, number)))) == 0
