"""``kore.queue`` and kore.lock: each rule of the reference is one test."""

from __future__ import annotations

import asyncio

import pytest
from reactor_harness import Log, run

from kore import reactor

# queue


def test_queue_without_waiting(fake):
    async def main():
        queue = reactor.queue()
        assert queue.popnow() is None
        assert queue.push(1) is True
        queue.push(None)
        queue.push(3)
        assert queue.popnow() == 1
        assert await queue.pop() is None
        op = queue.pop()
        assert await op == 3
        with pytest.raises(RuntimeError):
            await op

    run(fake, main())
    with pytest.raises(RuntimeError):
        reactor.queue().pop()


def test_queue_serves_waiters_in_order(fake):
    queue = reactor.queue()
    got = []

    async def consumer(n):
        got.append((n, await queue.pop()))

    async def main():
        for n in range(3):
            reactor.task_create(consumer(n))
        await reactor.suspend(1)
        for item in "abc":
            queue.push(item)
        assert got == []
        await reactor.suspend(1)
        assert got == [(0, "a"), (1, "b"), (2, "c")]

    run(fake, main())


def test_queue_orders_waiters_by_await_not_by_call(fake):
    queue = reactor.queue()
    got = []

    async def consumer(n, op):
        got.append((n, await op))

    async def main():
        first, second = queue.pop(), queue.pop()
        reactor.task_create(consumer("second", second))
        reactor.task_create(consumer("first", first))
        await reactor.suspend(1)
        queue.push(1)
        queue.push(2)
        await reactor.suspend(1)
        assert got == [("second", 1), ("first", 2)]

    run(fake, main())


@pytest.mark.parametrize("thief", ["popnow", "barging"])
def test_a_robbed_waiter_is_first_in_line_again(fake, thief):
    """Where the C platform leaves it asleep for ever."""
    queue = reactor.queue()
    got = []

    async def consumer(n):
        got.append((n, await queue.pop()))

    async def main():
        for n in range(2):
            reactor.task_create(consumer(n))
        await reactor.suspend(1)
        queue.push("stolen")
        assert (queue.popnow() if thief == "popnow" else await queue.pop()) == "stolen"
        await reactor.suspend(1)
        assert got == []
        queue.push("a")
        queue.push("b")
        await reactor.suspend(1)
        assert got == [(0, "a"), (1, "b")]

    run(fake, main())


@pytest.mark.parametrize("end", ["kill", "cancel"])
@pytest.mark.parametrize("woken", [False, True])
def test_a_waiter_that_ends_leaves_the_line_and_passes_its_wake_up_on(fake, end, woken):
    queue = reactor.queue()
    got = []

    async def consumer(n):
        got.append((n, await queue.pop()))

    async def main():
        victim, other = fake.start(consumer("victim")), fake.start(consumer("other"))
        await reactor.suspend(1)
        if woken:
            queue.push("x")
        getattr(victim, end)()
        await reactor.suspend(1)
        if not woken:
            queue.push("x")
        await other
        assert got == [("other", "x")]

    run(fake, main())


def test_queue_can_be_filled_before_there_is_a_loop(loop):
    queue = reactor.queue()
    queue.push("early")

    async def main():
        assert await queue.pop() == "early"
        loop.call_later(0.001, queue.push, "late")
        assert await queue.pop() == "late"

    run(loop, main())


# lock


def test_lock_excludes_and_is_fair(fake):
    lock = reactor.lock()
    order = []

    async def user(n):
        async with lock as value:
            assert value is None
            order.append(("in", n))
            await reactor.suspend(1)
            order.append(("out", n))

    async def main():
        await reactor.gather(*(user(n) for n in range(3)))
        assert order == [(way, n) for n in range(3) for way in ("in", "out")]
        assert await lock.acquire() is None
        assert lock.release() is None

    run(fake, main())


def test_lock_errors(fake):
    lock, other = reactor.lock(), reactor.lock()

    async def stranger():
        with pytest.raises(RuntimeError):
            lock.release()
        with pytest.raises(RuntimeError):
            await lock.__aexit__(None, None, None)
        assert lock.trylock() is False

    async def main():
        with pytest.raises(RuntimeError):
            lock.release()
        await lock.acquire()
        with pytest.raises(RuntimeError):
            lock.acquire()
        assert lock.trylock() is False
        assert await reactor.gather(stranger()) == [None]
        lock.release()
        op = other.acquire()
        with pytest.raises(RuntimeError):
            lock.acquire()
        await op
        with pytest.raises(RuntimeError):
            await op
        other.release()
        del op
        lock.acquire()
        assert lock.trylock() is True
        lock.release()

    run(fake, main())
    for call in (lock.acquire, lock.trylock):
        with pytest.raises(RuntimeError):
            call()
    with pytest.raises(RuntimeError):
        lock.__aenter__()


def test_a_kept_acquire_does_not_follow_the_spare_task(loop):
    """An awaitable left over by one handler is not the next handler's."""
    lock = reactor.lock()
    left, seen = [], []

    async def first():
        left.append(lock.acquire())

    async def second():
        async with lock:
            seen.append(True)

    def begin():
        loop.begin(first())
        loop.begin(second())

    loop.call_soon(begin)
    loop.run_until_complete(asyncio.sleep(0))
    assert seen == [True]


def test_exceptions_pass_through_a_lock(fake):
    lock = reactor.lock()

    async def main():
        with pytest.raises(KeyError):
            async with lock:
                raise KeyError
        assert lock.trylock()
        lock.release()

    run(fake, main())


def test_a_release_hands_nothing_over(fake):
    """Who asks first gets it; the woken one goes back to the head of the line."""
    lock = reactor.lock()
    order = []

    async def user(n):
        async with lock:
            order.append(n)

    async def main():
        await lock.acquire()
        for n in range(2):
            reactor.task_create(user(n))
        await reactor.suspend(1)
        lock.release()
        assert lock.trylock()
        order.append("grabbed")
        await reactor.suspend(1)
        lock.release()
        await reactor.suspend(1)
        assert order == ["grabbed", 0, 1]

    run(fake, main())


@pytest.mark.parametrize("woken", [False, True])
@pytest.mark.parametrize("end", ["kill", "cancel"])
def test_a_waiter_for_a_lock_that_ends_leaves_the_line(fake, end, woken):
    lock = reactor.lock()
    order = []

    async def user(n):
        async with lock:
            order.append(n)

    async def main():
        await lock.acquire()
        victim, other = fake.start(user("victim")), fake.start(user("other"))
        await reactor.suspend(1)
        if woken:
            lock.release()
        getattr(victim, end)()
        await reactor.suspend(1)
        if not woken:
            lock.release()
        await other
        assert order == ["other"]

    run(fake, main())


@pytest.mark.parametrize("kind", ["kore", "asyncio", "first step", "killed"])
def test_a_lock_whose_owner_ends_is_released_and_logged(loop, log, kind):
    lock = reactor.lock()

    async def owner(wait):
        await lock.acquire()
        await reactor.suspend(wait)

    async def careless():
        await lock.acquire()

    async def main():
        if kind == "kore":
            await loop.start(owner(1))
        elif kind == "asyncio":
            await asyncio.create_task(owner(1))
            await asyncio.sleep(0)
        elif kind == "killed":
            task = loop.start(owner(1000))
            await reactor.suspend(0)
            task.kill()
        else:
            loop.begin(careless())
        assert len(log) == 1
        assert "without releasing its lock" in log.texts[0]
        async with asyncio.timeout(1), lock:
            pass

    run(loop, main())
    assert len(log) == 1


def test_a_lock_in_an_asyncio_task_that_releases_is_not_logged(loop, log):
    lock = reactor.lock()

    async def user():
        async with lock:
            await asyncio.sleep(0)

    async def main():
        await asyncio.gather(user(), user())
        await asyncio.sleep(0)

    loop.run_until_complete(main())
    assert log == Log()
