"""Signals and the ends of child processes, as callbacks of the loop.

A signal's byte on the driver's wake-up fd ends the wait, whatever call it is in; Python then runs the handler, which
queues the callback. Children are awaited each on its own (kore.reactor.children), without SIGCHLD.
"""

from __future__ import annotations

import inspect
import signal
import threading
from collections.abc import Callable
from contextvars import copy_context
from types import FrameType
from typing import Any, cast

from kore.driver import Driver
from kore.reactor.base import Base
from kore.reactor.children import STATUS_LOST, Child, OwnChild
from kore.reactor.handles import Soon, soon


class _Watched:
    """A child process whose end somebody wants to hear of. Raises OSError where there is no such child."""

    def __init__(self, loop: Signals, child: Child, callback: Callable[[int, int], object]) -> None:
        self.loop = loop
        self.child = child
        self.callback = callback
        self.context = copy_context()
        child.wait(loop._driver, self.ended)

    def ended(self, result: int) -> None:
        status = STATUS_LOST if result < 0 else self.child.look()
        if status is None:
            self.child.wait(self.loop._driver, self.ended)
            return
        self.loop._children.discard(self)
        self.child.close()
        self.loop.call_soon(self.callback, self.child.pid, status, context=self.context)


class Signals(Base):
    """The part of `Loop` that knows signals and children."""

    def __init__(self, driver: Driver) -> None:
        super().__init__(driver)
        self._signal_handles: dict[int, Soon] = {}
        self._children: set[_Watched] = set()

    def _close_signals(self) -> None:
        """Called by close(), once the driver waits for no child any more. They are left to whoever made them."""
        while self._children:
            self._children.pop().child.close()
        for number in list(self._signal_handles):
            self.remove_signal_handler(number)

    def _wake_on_signals(self) -> int | None:
        """Let signals end the driver's wait; what was set before, None when this is no place for signals."""
        if threading.current_thread() is not threading.main_thread():
            return None
        return signal.set_wakeup_fd(self._driver.wake_fd, warn_on_full_buffer=False)

    def _sleep_on_signals(self, previous: int | None) -> None:
        if previous is not None:
            signal.set_wakeup_fd(previous)

    def add_signal_handler(self, sig: int, callback: Callable[..., Any], *args: Any) -> None:  # type: ignore[override]
        """Call `callback(*args)` in the loop when signal `sig` arrives.

        Raises TypeError or ValueError for what is no signal or a coroutine function, RuntimeError for a signal that
        cannot be caught or outside of the main thread.
        """
        if inspect.iscoroutine(cast("Any", callback)) or inspect.iscoroutinefunction(callback):
            raise TypeError("coroutines cannot be used with add_signal_handler()")
        self._check_signal(sig)
        self._check_closed()
        handle = soon((callback, *args), None)
        try:
            signal.signal(sig, self._on_signal)
            signal.siginterrupt(sig, False)
        except (ValueError, OSError) as exc:
            raise RuntimeError(f"sig {int(sig)} cannot be caught: {exc}") from exc
        self._signal_handles[sig] = handle

    def remove_signal_handler(self, sig: int) -> bool:
        """Undo add_signal_handler; whether there was one. The default action, or Ctrl-C's, is back afterwards."""
        self._check_signal(sig)
        if self._signal_handles.pop(sig, None) is None:
            return False
        signal.signal(sig, signal.default_int_handler if sig == signal.SIGINT else signal.SIG_DFL)
        return True

    def _on_signal(self, sig: int, _frame: FrameType | None) -> None:
        # Runs between two byte codes of the main thread; appending to a list is one.
        handle = self._signal_handles.get(sig)
        if handle is not None:
            self._ready.append(handle)
            self._driver.wake()

    @staticmethod
    def _check_signal(sig: int) -> None:
        if not isinstance(sig, int):
            raise TypeError(f"sig must be an int, not {sig!r}")
        if sig not in signal.valid_signals():
            raise ValueError(f"invalid signal number {sig}")

    def watch_child(self, pid: int, callback: Callable[[int, int], object]) -> None:
        """Call `callback(pid, status)` once child `pid` has ended and was reaped; `status` is that of waitpid(2).

        The status is -1 when somebody else reaped it. Raises OSError where the system knows that there is no such
        child (pidfd_open(2)); elsewhere the status is -1.
        """
        self.watch(OwnChild(pid), callback)

    def watch(self, child: Child, callback: Callable[[int, int], object]) -> None:
        """The same for a child that is known already; it is closed afterwards."""
        self._children.add(_Watched(self, child, callback))
