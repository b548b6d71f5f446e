"""The loop itself: order of callbacks, timers by a fake clock, waking, signals, children, errors, engines."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import weakref

import pytest
from reactor_harness import SECONDS_MAX, FakeLoop, closing, run

import kore.errors
from kore import reactor
from kore.reactor import engine
from kore.reactor.base import Base, FlowControl


@pytest.fixture
def fake():
    """A loop whose clock is ours."""
    for loop, _ in closing(FakeLoop()):
        yield loop


def test_names_of_asyncio_are_there():
    """Every underscored name the reactor builds on exists in this Python."""
    loop = asyncio.new_event_loop()
    names = [name for name in Base.__annotations__ if not hasattr(loop, name)]
    mixin = asyncio.transports._FlowControlMixin
    names += [name for name in FlowControl.__annotations__ if not hasattr(mixin, name)]
    loop.close()
    assert not names


def test_callbacks_run_in_order_and_later_ones_in_the_next_turn(fake):
    seen = []
    fake.call_soon(lambda: (seen.append(1), fake.call_soon(seen.append, 3)))
    fake.call_soon(seen.append, 2)
    fake.call_soon(fake.stop)
    fake.run_forever()
    assert seen == [1, 2]
    fake.call_soon(fake.stop)
    fake.run_forever()
    assert seen == [1, 2, 3]


def test_cancelled_callbacks_do_not_run_and_keep_nothing(fake):
    class Thing:
        def call(self):
            raise AssertionError

    thing = Thing()
    handles = [fake.call_soon(thing.call), fake.call_later(1, thing.call)]
    ref = weakref.ref(thing)
    del thing
    for handle in handles:
        handle.cancel()
        handle.cancel()
        assert handle.cancelled()
        assert "cancelled" in repr(handle)
    gc.collect()
    assert ref() is None
    fake.call_later(2, fake.stop)
    fake.run_forever()


def test_timers_run_when_due_and_equal_ones_in_order(fake):
    seen = []
    for name, delay in (("c", 3), ("a", 1), ("b", 2), ("a2", 1), ("now", 0)):
        fake.call_later(delay, lambda name=name: seen.append((name, fake.now - 1000)))
    fake.call_later(4, fake.stop)
    fake.run_forever()
    assert seen == [("now", 0), ("a", 1), ("a2", 1), ("b", 2), ("c", 3)]
    assert sum(fake.waits) == 4


def test_timers_cancelled_in_masses_leave_the_heap(fake):
    keep = fake.call_later(5, fake.stop)
    handles = [fake.call_later(10 + n, print) for n in range(1000)]
    for handle in handles:
        handle.cancel()
    assert len(fake._timers) < 200
    assert not keep.cancelled()
    fake.run_forever()
    assert fake.now == 1005


def test_a_cancelled_timer_at_the_head_does_not_end_a_wait(fake):
    fake.call_later(1, print).cancel()
    fake.call_later(5, fake.stop)
    fake.run_forever()
    assert fake.waits == [5.0]


def test_waits_are_bounded(fake):
    """A timer in a million years is no timeout an engine has to understand."""
    fake.call_later(1e15, print)
    fake.call_later(3600 * 24 * 3, fake.stop)
    fake.run_forever()
    assert max(fake.waits) <= 24 * 3600


def test_call_later_wants_a_delay(fake):
    with pytest.raises(TypeError):
        fake.call_later(None, print)
    with pytest.raises(TypeError):
        fake.call_at(None, print)


def test_an_exception_in_a_callback_goes_to_the_handler_and_the_loop_goes_on(fake):
    seen = []
    fake.set_exception_handler(lambda _loop, context: seen.append(context))
    fake.call_soon(lambda: 1 / 0)
    fake.call_soon(fake.stop)
    fake.run_forever()
    assert isinstance(seen[0]["exception"], ZeroDivisionError)
    assert "<lambda>" in seen[0]["message"]


def test_the_same_in_debug_mode_whenever_it_was_turned_on(fake):
    seen = []
    fake.set_exception_handler(lambda _loop, context: seen.append(context["exception"]))
    fake.call_soon(lambda: 1 / 0)
    fake.set_debug(True)
    fake.call_soon(lambda: 1 / 0)
    fake.call_soon_threadsafe(lambda: 1 / 0)
    fake.call_later(0, lambda: 1 / 0)
    assert fake.get_debug()
    fake.call_later(1, fake.stop)
    fake.run_forever()
    fake.set_debug(False)
    assert not fake.get_debug()
    fake.call_soon(lambda: 1 / 0)
    fake.call_soon(fake.stop)
    fake.run_forever()
    assert [type(exc) for exc in seen] == [ZeroDivisionError] * 5


def test_system_exit_leaves_the_loop(fake):
    seen = []
    fake.call_soon(seen.append, 1)
    fake.call_soon(sys.exit, 3)
    fake.call_soon(seen.append, 2)
    fake.call_soon(seen.append, 3)
    with pytest.raises(SystemExit):
        fake.run_forever()
    assert not fake.is_running()
    fake.call_soon(seen.append, 4)
    fake.call_soon(fake.stop)
    fake.run_forever()
    assert seen == [1, 2, 3, 4]


def test_debug_mode_names_slow_callbacks(fake, caplog):
    fake.set_debug(True)

    def slow():
        fake.now += 0.5

    fake.call_soon(slow)
    handle = fake.call_soon(print)
    handle.cancel()
    fake.call_soon(fake.stop)
    with caplog.at_level(logging.WARNING, "asyncio"):
        fake.run_forever()
    assert any("slow" in record.getMessage() and "0.500" in record.getMessage() for record in caplog.records)
    with pytest.raises(TypeError):
        fake.call_soon(1)


def test_close(fake):
    fake.close()
    fake.close()
    assert fake.driver.closed
    with pytest.raises(RuntimeError):
        fake.call_soon(print)
    with pytest.raises(RuntimeError):
        fake.call_later(1, print)
    with pytest.raises(RuntimeError):
        fake.call_soon_threadsafe(print)


def test_another_thread_ends_the_wait(loop):
    """call_soon_threadsafe() works while the loop waits for nothing else."""
    names = []

    def soon():
        names.append(threading.current_thread().name)
        loop.stop()

    thread = threading.Thread(target=lambda: loop.call_soon_threadsafe(soon))
    loop.call_soon(thread.start)
    loop.run_forever()
    thread.join()
    assert names == [threading.main_thread().name]


@pytest.mark.parametrize("debug", [False, True])
def test_nothing_is_lost_that_another_thread_asks_for_in_the_middle_of_a_turn(fake, debug):
    """Between any two byte codes of it, as if another thread or a signal came there each time."""
    fake.set_debug(debug)
    turn, slow_turn = reactor.Loop._run_once.__code__, reactor.Loop._run_ready_slowly.__code__
    turns, asked, seen = [], [], []

    def come_between(frame, event, _arg):
        if event == "call" and frame.f_code is turn:
            turns.append(frame)
        if frame.f_code not in (turn, slow_turn) or len(turns) > 1:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            asked.append(len(asked))
            fake.call_soon_threadsafe(seen.append, asked[-1])
        return come_between

    fake.call_soon(fake.call_soon, fake.call_soon, fake.stop)
    tracing = sys.gettrace()
    sys.settrace(come_between)
    try:
        fake.run_forever()
    finally:
        sys.settrace(tracing)
    assert len(asked) > 50
    assert seen == asked


def test_runner(opened):
    loop, _ = opened

    async def main():
        await asyncio.sleep(0.001)
        assert asyncio.get_running_loop() is loop
        return 7

    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        assert runner.run(main()) == 7
    assert loop.is_closed()


def test_executor_and_names(loop):
    async def main():
        assert await loop.run_in_executor(None, lambda: threading.current_thread().name) != "MainThread"
        assert await asyncio.to_thread(sum, [1, 2]) == 3
        infos = await loop.getaddrinfo("127.0.0.1", 80, type=socket.SOCK_STREAM)
        assert infos[0][4] == ("127.0.0.1", 80)
        assert (await loop.getnameinfo(("127.0.0.1", 80), socket.NI_NUMERICHOST | socket.NI_NUMERICSERV))[1] == "80"

    run(loop, main())


def test_asynchronous_generators_are_closed(loop):
    closed = []

    async def numbers():
        try:
            yield 1
            yield 2
        finally:
            await asyncio.sleep(0)
            closed.append(True)

    async def main():
        async for _ in numbers():
            break
        gc.collect()
        await asyncio.sleep(0.001)

    run(loop, main())
    loop.run_until_complete(loop.shutdown_asyncgens())
    assert closed == [True]


def test_signal_handlers(loop):
    seen = []

    def on_signal(word):
        seen.append((word, asyncio.get_running_loop()))
        loop.stop()

    loop.add_signal_handler(signal.SIGUSR1, on_signal, "first")
    loop.add_signal_handler(signal.SIGUSR1, on_signal, "usr1")
    threading.Timer(0.01, os.kill, (os.getpid(), signal.SIGUSR1)).start()
    loop.run_forever()
    assert seen == [("usr1", loop)]
    assert loop.remove_signal_handler(signal.SIGUSR1)
    assert not loop.remove_signal_handler(signal.SIGUSR1)
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL
    with pytest.raises(RuntimeError):
        loop.add_signal_handler(signal.SIGKILL, print)
    with pytest.raises(ValueError):
        loop.add_signal_handler(4000, print)
    with pytest.raises(TypeError):
        loop.add_signal_handler(signal.SIGUSR1, asyncio.sleep)
    assert signal.set_wakeup_fd(-1) == -1


def test_signals_sent_in_bulk_all_wake(loop):
    """A signal just before the wait is not slept over: each of a thousand arrives before the next is sent."""
    count = 0

    def on_signal():
        nonlocal count
        count += 1
        if count == 1000:
            loop.stop()
        else:
            os.kill(os.getpid(), signal.SIGUSR1)

    loop.add_signal_handler(signal.SIGUSR1, on_signal)
    loop.call_soon(os.kill, os.getpid(), signal.SIGUSR1)
    loop.call_later(SECONDS_MAX, loop.stop)
    loop.run_forever()
    assert count == 1000


def test_keyboard_interrupt_without_runner(loop):
    """Ctrl-C ends run_forever() with KeyboardInterrupt, and the loop can go on afterwards."""
    loop.call_soon(threading.Timer(0.02, os.kill, (os.getpid(), signal.SIGINT)).start)
    with pytest.raises(KeyboardInterrupt):
        loop.run_forever()
    assert loop.run_until_complete(asyncio.sleep(0.001, "on")) == "on"


def test_keyboard_interrupt_with_runner(opened):
    """Ctrl-C cancels the main task first, so that it can clean up."""
    loop, _ = opened
    cleaned = []

    async def main():
        threading.Timer(0.02, os.kill, (os.getpid(), signal.SIGINT)).start()
        try:
            await asyncio.sleep(SECONDS_MAX)
        finally:
            cleaned.append(True)

    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        with pytest.raises(KeyboardInterrupt):
            runner.run(main())
    assert cleaned == [True]


def test_children(loop):
    """The exit of each child is told with its own status, whatever other children do."""
    seen = {}
    other = subprocess.Popen([sys.executable, "-c", "raise SystemExit(5)"])
    pids = []
    for code in (0, 3):
        pid = os.fork()
        if not pid:
            os._exit(code)
        pids.append(pid)

    def ended(pid, status):
        seen[pid] = os.waitstatus_to_exitcode(status)
        if len(seen) == 2:
            loop.stop()

    for pid in pids:
        loop.watch_child(pid, ended)
    loop.call_later(SECONDS_MAX, loop.stop)
    loop.run_forever()
    assert seen == dict(zip(pids, (0, 3), strict=True))
    assert other.wait() == 5


def test_context_variables(loop):
    var = contextvars.ContextVar("var", default=0)

    async def child(n):
        var.set(n)
        await asyncio.sleep(0.001)
        return var.get()

    async def main():
        var.set(9)
        assert await asyncio.gather(child(1), child(2)) == [1, 2]
        assert await reactor.gather(child(3), child(4)) == [3, 4]
        context = contextvars.copy_context()
        context.run(var.set, 11)
        seen = loop.create_future()
        loop.call_soon(lambda: seen.set_result(var.get()), context=context)
        assert await seen == 11
        assert var.get() == 9

    run(loop, main())


def test_an_unknown_engine_is_refused(monkeypatch):
    monkeypatch.setenv("KORE_IO", "carrier-pigeon")
    with pytest.raises(kore.errors.ConfigurationError, match=r"KORE_IO='carrier-pigeon'.*uring, epoll, kqueue"):
        reactor.new_driver()


def test_the_engine_is_found_by_trying(monkeypatch):
    """A refused ring means epoll and a reason in one line; a ring asked for by name is refused loudly."""
    monkeypatch.delenv("KORE_IO", raising=False)
    made = []

    class Fake:
        def __init__(self, name, connects=True, bounded=False):
            self.name = name

        def close(self):
            made.append(self.name)

    def make(name, connects=True, bounded=False):
        if name == "uring":
            raise kore.errors.EngineError("io_uring_setup", 1, "Operation not permitted", "a seccomp filter")
        return Fake(name)

    monkeypatch.setattr(engine, "_make", make)
    name, reason = reactor.select_engine()
    assert name == "epoll"
    assert "io_uring_setup" in reason
    assert "a seccomp filter" in reason
    assert "\n" not in reason
    assert made == ["epoll"]
    assert reactor.new_driver().name == "epoll"
    with pytest.raises(kore.errors.EngineError):
        reactor.new_driver("uring")
    with pytest.raises(kore.errors.EngineError):
        reactor.select_engine("uring")
    monkeypatch.setattr(engine, "_make", Fake)
    assert reactor.select_engine() == ("uring", None)
    assert reactor.select_engine("epoll") == ("epoll", None)
    # A BSD: there is no epoll, and nobody looks for a ring.
    monkeypatch.setattr(engine, "_make", make)
    monkeypatch.delattr(select, "epoll")
    assert reactor.select_engine() == ("kqueue", None)
    assert reactor.new_driver().name == "kqueue"


def test_policy():
    policy = reactor.EventLoopPolicy()
    loop = policy.new_event_loop()
    assert isinstance(loop, reactor.Loop)
    loop.close()
    with pytest.raises(TypeError):
        reactor.PyLock()
