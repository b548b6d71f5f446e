"""A stand-in on Linux for kqueue(2) as Python's `select` module has it, so that the engine of the BSDs is tested here.

It keeps what kqueue(2) of FreeBSD documents, for the filters READ, WRITE, PROC, SIGNAL, TIMER and USER:

- a note is known by its ident and filter; adding it again, or enabling it, changes fflags, data and udata, but neither
  EV_CLEAR nor EV_ONESHOT (kqueue_register(): "the user may change some filter values after the initial EV_ADD");
- deleting what is not there is ENOENT, touching a closed fd EBADF; notes vanish when their fd is closed, whoever holds
  a copy of what it stood for; a kqueue is not inherited by fork;
- errors of changes come as events with EV_ERROR while there is room, and are raised when there is none;
- level-triggered notes are reported as long as they hold, EV_CLEAR ones when something has happened since.

What it can't know: the errno of a socket (SO_ERROR would take it away, so `fflags` is a guess that is never 0), the
space of a unix socket, the backlog of a unix listener (1), and that a unix socket other than a stream has been shut for
writing. A signal's note stands in the place of its Python handler and calls that, so that it is for the main thread.
A note stays where its number is closed and given to a copy of the same file before the next call. There are no vnode
events; a file that grows is seen at the next call. Not there: NOTE_LOWAT, NOTE_FORK, NOTE_EXEC.

An fd's readiness comes from epoll, one for each filter because edge or level is a matter of the note; what epoll says
is then looked at with poll(2), since epoll also reports what a copy of a closed fd keeps alive.
"""

from __future__ import annotations

import errno
import math
import os
import select
import threading
import time
import weakref

from kqueue_notes import (
    EV_ADD,
    EV_CLEAR,
    EV_DELETE,
    EV_DISABLE,
    EV_DISPATCH,
    EV_ENABLE,
    EV_ERROR,
    EV_ONESHOT,
    EV_RECEIPT,
    FILTER_PROC,
    FILTER_READ,
    FILTER_SIGNAL,
    FILTER_TIMER,
    FILTER_USER,
    FILTER_WRITE,
    FdNote,
    ProcessNote,
    ReadNote,
    SignalNote,
    TimerNote,
    UserNote,
    WriteNote,
)

__name__ = "kore.bsd.kqueue_standin"
"""By this the watchdog of the loop knows who waits in the kernel; a real kqueue has no frame in Python."""

# Kept from before a test takes them away to have a system without them.
epoll, EPOLLIN = select.epoll, select.EPOLLIN
eventfd, eventfd_read, eventfd_write = os.eventfd, os.eventfd_read, os.eventfd_write
EFD_FLAGS = os.EFD_NONBLOCK | os.EFD_CLOEXEC

SPIN_SECONDS = 0.001
"""A pause when epoll goes on reporting what no note is about: a copy of a closed fd, a socket never connected."""

KINDS = {
    FILTER_READ: ReadNote, FILTER_WRITE: WriteNote, FILTER_PROC: ProcessNote, FILTER_SIGNAL: SignalNote,
    FILTER_TIMER: TimerNote, FILTER_USER: UserNote,
}

opened: weakref.WeakSet[kqueue] = weakref.WeakSet()


class kevent:  # noqa: N801 -- the name it stands for
    """See `select.kevent`."""

    __slots__ = ("data", "fflags", "filter", "flags", "ident", "udata")

    def __init__(self, ident, filter=FILTER_READ, flags=EV_ADD, fflags=0, data=0, udata=0) -> None:  # noqa: A002
        self.ident = ident if isinstance(ident, int) else ident.fileno()
        if self.ident < 0:
            raise OverflowError("can't convert negative value to unsigned int")
        self.filter = filter
        self.flags = flags
        self.fflags = fflags
        self.data = data
        self.udata = udata

    def _all(self):
        return tuple(getattr(self, name) for name in ("ident", "filter", "flags", "fflags", "data", "udata"))

    def __eq__(self, other):
        return self._all() == other._all() if isinstance(other, kevent) else NotImplemented

    __hash__ = None

    def __repr__(self) -> str:
        ident, kind, flags, fflags, data, udata = self._all()
        return (f"<select.kevent ident={ident} filter={kind} flags={flags:#x} fflags={fflags:#x} data={data:#x} "
                f"udata={udata:#x}>")


class kqueue:  # noqa: N801 -- the name it stands for
    """See `select.kqueue`."""

    def __init__(self) -> None:
        self._epoll = epoll()
        self._sets = {FILTER_READ: epoll(), FILTER_WRITE: epoll()}
        self._poke = eventfd(0, EFD_FLAGS)
        self._poked = False
        self._notes = {}
        self._lock = threading.RLock()
        self._suspects = set()
        self.closed = False
        for fd in (*self._sets.values(), self._poke):
            self._epoll.register(fd, EPOLLIN)
        opened.add(self)

    def fileno(self) -> int:
        """An fd that poll(2) knows, as a kqueue is."""
        self._check()
        return self._epoll.fileno()

    def close(self) -> None:
        """Close it, and forget all notes."""
        if self.closed:
            return
        self.closed = True
        opened.discard(self)
        for note in self._notes.values():
            if not isinstance(note, FdNote):
                note.detach()
        self._notes.clear()
        self._epoll.close()
        for each in self._sets.values():
            each.close()
        os.close(self._poke)

    def __del__(self) -> None:
        if hasattr(self, "_lock"):
            self.close()

    def _check(self) -> None:
        if self.closed:
            raise ValueError("I/O operation on closed kqueue object")

    def poke(self) -> None:
        """End a wait: something has happened that no fd tells of."""
        self._poked = True
        eventfd_write(self._poke, 1)

    # --- kevent(2) -----------------------------------------------------------------------------------------

    def control(self, changelist, max_events, timeout=None, /):
        """See `select.kqueue.control`: apply the changes, then wait (seconds) for at most `max_events` events."""
        self._check()
        if max_events < 0:
            raise ValueError(f"Length of eventlist must be 0 or positive, got {max_events}")
        if timeout is not None and timeout < 0:
            raise ValueError("timeout must be positive or None")
        failures = []
        for change in changelist or ():
            number = self._changed(change)
            if not number and not change.flags & EV_RECEIPT:
                continue
            if len(failures) == max_events:
                if number:
                    raise OSError(number, os.strerror(number))
                break  # kevent(2): without room for a receipt "subsequent changes will not get processed"
            failures.append(kevent(change.ident, change.filter, EV_ERROR, change.fflags, number, change.udata))
        if failures or not max_events:
            return failures  # "if nevents is zero, kevent() will return immediately even if there is a timeout"
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            with self._lock:
                events, spurious = self._scan(max_events)
            left = None if deadline is None else deadline - time.monotonic()
            if events or (left is not None and left <= 0):
                return events
            if spurious:
                # Not sleep(): where the tests move the clock, by libfaketime, that fails with EINVAL.
                select.select((), (), (), SPIN_SECONDS)
            else:
                self._epoll.poll(self._until(left))

    def _until(self, left):
        """Seconds to wait: until a timer, at most `left`."""
        times = [
            note.when - time.monotonic() for note in list(self._notes.values())
            if isinstance(note, TimerNote) and note.enabled and note.when < math.inf
        ]
        if left is not None:
            times.append(left)
        # epoll counts milliseconds, and rounds up.
        return max(min(times), 0) if times else None

    def _changed(self, change) -> int:
        """Apply one change; an errno, or 0."""
        if change.filter not in KINDS or not ~change.flags & (EV_ENABLE | EV_DISABLE):
            return errno.EINVAL
        try:
            with self._lock:
                self._apply(change)
        except OSError as error:
            return error.errno
        return 0

    def _apply(self, change) -> None:
        kind, key = KINDS[change.filter], (change.filter, change.ident)
        if issubclass(kind, FdNote):
            os.fstat(change.ident)  # EBADF before anything else, as fget() comes before the look for a note
        note = self._notes.get(key)
        if note is not None and not note.valid():
            self._forget(note)
            note = None
        if change.flags & EV_DELETE:
            if note is None:
                raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
            self._forget(note)
            return
        if note is None:
            if not change.flags & EV_ADD:
                raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
            note = kind(self, change)
            note.attach()
            self._notes[key] = note
        else:
            note.change(change)
        enabled = note.enabled
        if change.flags & EV_DISABLE:
            enabled = False
        elif change.flags & (EV_ENABLE | EV_ADD):
            enabled = True
        note.enable(enabled)
        self.poke()

    def _forget(self, note) -> None:
        note.detach()
        self._notes.pop((note.filter, note.ident), None)

    # --- what is ready ---------------------------------------------------------------------------------------

    def _scan(self, most):
        """The events there are, at most so many, and whether epoll reported what none of them is about."""
        if self._poked:
            self._poked = False
            eventfd_read(self._poke)
        found, spurious = [], False
        for note in list(self._notes.values()):
            if len(found) < most and note.asked and note.enabled and (state := note.state()) is not None:
                found.append(self._report(note, *state))
        for kind in (FILTER_READ, FILTER_WRITE):
            if len(found) == most:
                break
            for fd, _ in self._sets[kind].poll(0, most - len(found)):
                note = self._notes.get((kind, fd))
                if note is None or not note.valid():
                    self._rebuild(kind)
                    spurious = True
                    break
                state = note.state()
                if state is not None:
                    self._suspects.discard(note)
                    found.append(self._report(note, *state))
                else:
                    spurious = True
                    self._suspected(note)
        return found, spurious

    def _report(self, note, data, flags, fflags):
        """The event of a note that holds, and what becomes of the note."""
        event = kevent(note.ident, note.filter, note.flags | flags, fflags, data, note.udata)
        if event.flags & EV_ONESHOT:
            self._forget(note)
            return event
        if note.flags & EV_CLEAR:
            note.clear()
        if note.flags & EV_DISPATCH:
            note.enable(False)
        return event

    def _suspected(self, note) -> None:
        """epoll calls it ready and poll(2) does not. Once that is a race; twice, a copy of a closed fd."""
        if note in self._suspects:
            self._suspects.discard(note)
            self._rebuild(note.filter)
        else:
            self._suspects.add(note)

    def _rebuild(self, kind) -> None:
        """An epoll without what nothing can be unregistered from any more, under the same number."""
        fd = self._sets[kind].fileno()
        new = epoll()
        os.dup2(new.fileno(), fd, inheritable=False)
        new.close()
        self._epoll.register(fd, EPOLLIN)
        for note in [note for note in self._notes.values() if note.filter == kind]:
            if note.valid():
                note.armed = False
                note.enable(note.enabled)
            else:
                del self._notes[kind, note.ident]


def forked() -> None:
    """kqueue(2): "the queue is not inherited by a child created with fork(2)"."""
    for each in list(opened):
        each._notes.clear()  # a detaching signal note would undo a handler that the child may want
        each.close()


os.register_at_fork(after_in_child=forked)
