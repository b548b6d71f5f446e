"""What kore's coroutines wait for: suspend, gather, timer. Each rule of the reference is one test."""

from __future__ import annotations

import asyncio
import gc
import threading
import time

import pytest
from reactor_harness import forever, run

from kore import reactor

# Types.


@pytest.mark.parametrize(
    ("made", "name"),
    [
        (reactor.lock, "kore.lock"),
        (reactor.queue, "kore.queue"),
        (lambda: reactor.queue(1, 2), "kore.queue"),
        (lambda: reactor.queue().pop(), "kore.queueop"),
        (lambda: reactor.lock().acquire(), "kore.lockop"),
        (lambda: reactor.suspend(1), "kore.suspend"),
        (reactor.gather, "kore.pygather_op"),
        (lambda: reactor.timer(print, 1000, 0), "kore.timer"),
    ],
)
def test_types_show_as_kores_and_cannot_be_called(fake, made, name):
    async def main():
        thing = made()
        kind = type(thing)
        assert f"{kind.__module__}.{kind.__qualname__}" == name
        assert f"<{name} object" in repr(thing)
        with pytest.raises(TypeError):
            kind()
        with pytest.raises(AttributeError):
            thing.anything = 1

    run(fake, main())


def test_types_for_isinstance(fake):
    assert isinstance(reactor.lock(), reactor.PyLock)
    assert isinstance(reactor.queue(), reactor.PyQueue)

    async def main():
        assert isinstance(reactor.timer(print, 1, 1), reactor.PyTimer)

    run(fake, main())


# suspend


def test_suspend_counts_from_the_first_await(fake):
    async def main():
        op = reactor.suspend(100)
        await asyncio.sleep(1)
        before = fake.now
        assert await op is None
        assert fake.now == pytest.approx(before + 0.1)
        await op
        assert fake.now == pytest.approx(before + 0.1)

    run(fake, main())


@pytest.mark.parametrize("delay", [0, -5])
def test_suspend_of_nothing_gives_others_a_turn(fake, delay):
    order = []

    async def other():
        order.append("other")

    async def main():
        reactor.task_create(other())
        await reactor.suspend(delay)
        order.append("main")

    run(fake, main())
    assert order == ["other", "main"]


def test_suspend_arguments(fake):
    async def main():
        for wrong in (1.0, "1", None):
            with pytest.raises(TypeError):
                reactor.suspend(wrong)
        await reactor.suspend(True)

    run(fake, main())
    with pytest.raises(RuntimeError):
        reactor.suspend(1)


def test_suspend_really_waits(loop):
    async def main():
        started = time.monotonic()
        await reactor.suspend(20)
        assert time.monotonic() - started >= 0.02

    run(loop, main())


# gather


async def after(milliseconds, result):
    await reactor.suspend(milliseconds)
    if isinstance(result, BaseException):
        raise result
    return result


def test_gather_gives_results_in_the_order_of_its_arguments(fake):
    async def main():
        assert await reactor.gather() == []
        assert await reactor.gather(after(30, "a"), after(10, "b"), after(20, "c")) == ["a", "b", "c"]
        assert fake.now == pytest.approx(1000.03)

    run(fake, main())


def test_gather_concurrency_is_a_sliding_window(fake):
    """The reference's own example, which takes 400 ms in batches."""

    async def main():
        children = [after(300, 0), after(100, 1), after(100, 2), after(100, 3)]
        assert await reactor.gather(*children, concurrency=2) == [0, 1, 2, 3]
        assert fake.now == pytest.approx(1000.3)
        assert await reactor.gather(after(1, 1), after(1, 2), concurrency=0) == [1, 2]
        assert await reactor.gather(after(1, 1), concurrency=5) == [1]
        assert await reactor.gather(after(1, 1), concurrency=None) == [1]
        assert fake.now == pytest.approx(1000.303)

    run(fake, main())


def test_gather_exceptions_are_results(faked):
    fake, log = faked

    async def main():
        results = await reactor.gather(
            after(1, KeyError("x")), after(1, SystemExit(2)), after(1, asyncio.CancelledError()), after(2, 5)
        )
        assert [type(result) for result in results] == [KeyError, SystemExit, asyncio.CancelledError, int]

    run(fake, main())
    assert log == []


def test_gather_children_start_at_the_call_but_never_inline(fake):
    started = []

    async def child(name):
        started.append(name)

    async def main():
        op = reactor.gather(child(1), child(2))
        assert started == []
        await reactor.suspend(1)
        assert started == [1, 2]
        assert await op == [None, None]
        with pytest.raises(RuntimeError):
            await op

    run(fake, main())


def test_gather_arguments(fake, recwarn):
    async def main():
        first = after(1, 1)
        with pytest.raises(TypeError):
            reactor.gather(first, 5)
        assert first.cr_frame is None
        with pytest.raises(TypeError):
            reactor.gather(fake.create_future())
        with pytest.raises(TypeError):
            reactor.gather(after(1, 1), concurrency="2")
        with pytest.raises(ValueError):
            reactor.gather(after(1, 1), concurrency=-1)

    run(fake, main())
    with pytest.raises(RuntimeError):
        reactor.gather(after(1, 1))
    gc.collect()
    assert not recwarn.list


def test_a_killed_child_is_a_result(fake):
    ids = []

    async def child():
        ids.append(reactor.task_id())
        await forever()

    async def main():
        op = reactor.gather(child(), after(5, "other"))
        await reactor.suspend(1)
        assert reactor.task_kill(ids[0])
        results = await op
        assert isinstance(results[0], GeneratorExit)
        assert results[1] == "other"

    run(fake, main())


def test_a_gather_that_another_thread_collects(loop):
    """Its children are killed all the same, and by the loop's own thread."""
    killed_in = []

    async def child():
        try:
            await forever()
        finally:
            killed_in.append(threading.get_ident())

    async def main():
        ring = [reactor.gather(child(), child())]
        ring.append(ring)
        await reactor.suspend(1)
        gc.disable()
        try:
            del ring
            await loop.run_in_executor(None, gc.collect)
        finally:
            gc.enable()
        await reactor.suspend(1)

    run(loop, main())
    assert killed_in == [threading.get_ident()] * 2


@pytest.mark.parametrize("end", ["kill", "cancel", "drop", "drop-unawaited"])
def test_children_end_with_their_gather(faked, end):
    fake, log = faked
    closed = []

    async def child(name):
        try:
            await forever()
        except GeneratorExit:
            closed.append(name)
            raise

    async def never():
        closed.append("never")

    async def parent():
        await reactor.gather(child(1), child(2), never(), concurrency=2)

    async def main():
        if end.startswith("drop"):
            op = reactor.gather(child(1), child(2), never(), concurrency=2)
            await reactor.suspend(1)
            del op
            gc.collect()
        else:
            task = fake.start(parent())
            await reactor.suspend(1)
            getattr(task, end)()
            await reactor.suspend(1)
            assert task.done()
        assert closed == [1, 2]

    run(fake, main())
    assert log == []
    assert not reactor.tasks.live


# timer


def test_timers_repeat_from_the_turn_they_fired_in(fake):
    fired = []

    def slow():
        fired.append(round(fake.now - 1000, 6))
        fake.now += 0.05
        if len(fired) == 3:
            timer.close()
            fake.call_later(1, fake.stop)

    async def start():
        return reactor.timer(slow, 100, 0)

    timer = run(fake, start())
    fake.run_forever()
    assert fired == [0.1, 0.2, 0.3]


def test_oneshot_data_and_order(fake):
    fired = []

    async def main():
        reactor.timer(lambda: fired.append("a"), 10, reactor.TIMER_ONESHOT)
        reactor.timer(fired.append, 10, reactor.TIMER_ONESHOT, data="b")
        reactor.timer(fired.append, 10, reactor.TIMER_ONESHOT, data=None)
        early = reactor.timer(fired.append, 5, 1, data="early")
        never = reactor.timer(fired.append, 5, 0, data="never")
        assert never.close() is True
        assert never.close() is True
        gc.collect()
        await reactor.suspend(50)
        assert early.close() is True

    run(fake, main())
    assert fired == ["early", "a", "b", None]


def test_zero_delay_timers_fire_once_a_turn_each(loop):
    """Where two of them make the C platform's worker spin for ever."""
    fired = []
    turns = 0

    def turn():
        nonlocal turns
        turns += 1
        loop.call_soon(turn)

    async def main():
        timers = [reactor.timer(fired.append, 0, 0, data=n) for n in range(2)]
        loop.call_soon(turn)
        await reactor.suspend(10)
        for timer in timers:
            timer.close()
        return turns

    taken = run(loop, main())
    assert fired[:4] == [0, 1, 0, 1]
    assert taken > 1
    assert abs(len(fired) - 2 * taken) <= 4


def test_a_timer_stops_itself_and_survives_exceptions(faked):
    fake, log = faked
    fired = []

    def callback():
        fired.append(True)
        if len(fired) == 2:
            timer.close()
        raise KeyError("timer")

    async def start():
        return reactor.timer(callback, 1, 0)

    timer = run(fake, start())
    fake.call_later(1, fake.stop)
    fake.run_forever()
    assert len(fired) == 2
    place = f", at test_reactor_waits.py:{callback.__code__.co_firstlineno + 4} callback"
    assert log.texts == [f"pytimer_run: uncaught exception: KeyError('timer'){place}"] * 2


def test_timers_run_in_no_coroutine_and_run_what_they_return(fake):
    seen = []

    async def returned():
        seen.append(reactor.task_id())

    def callback():
        with pytest.raises(RuntimeError):
            reactor.task_id()
        return returned()

    async def main():
        reactor.timer(callback, 1, 1)
        await reactor.suspend(5)

    run(fake, main())
    assert len(seen) == 1


def test_timer_arguments(fake):
    with pytest.raises(RuntimeError):
        reactor.timer(print, 1, 0)

    async def main():
        for wrong in ((5, 1, 0), (print, 1.0, 0), (print, 1, "0"), (print, None, 0), (print, 1), (print,)):
            with pytest.raises(TypeError):
                reactor.timer(*wrong)
        for flags in (2, 3, -1):
            with pytest.raises(RuntimeError):
                reactor.timer(print, 1, flags)
        with pytest.raises(ValueError):
            reactor.timer(print, -1, 0)
        reactor.timer(print, 2**64 - 1, 0).close()

    run(fake, main())


def test_timers_can_be_set_before_the_workers_loop_runs(fake):
    """In workerstart: the loop is there, it does not run yet."""
    fake.adopt_pending()
    reactor.timer(fake.stop, 10, reactor.TIMER_ONESHOT)
    fake.run_forever()
    assert fake.now == pytest.approx(1000.01)


def test_time_is_the_monotonic_clock_in_milliseconds():
    before = time.monotonic_ns() // 1_000_000
    now = reactor.time()
    assert isinstance(now, int)
    assert before <= now <= time.monotonic_ns() // 1_000_000
