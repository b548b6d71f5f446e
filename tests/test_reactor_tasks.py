"""Tasks: asyncio's face on them, the order they run in, and those created before there is a loop."""

from __future__ import annotations

import asyncio
import gc
import sys

import pytest
from reactor_harness import forever, run, soon

from kore import reactor
from kore.reactor import tasks

# Tasks and asyncio.


def test_awaiting_in_both_worlds(loop):
    """kore's awaitables in an asyncio task, asyncio's in kore's, and each other's tasks."""
    queue = reactor.queue()

    async def kore_side():
        await asyncio.sleep(0.001)
        future = loop.create_future()
        loop.call_soon(future.set_result, 5)
        assert await future == 5
        assert await asyncio.wait_for(asyncio.create_task(asyncio.sleep(0, 6)), 1) == 6
        queue.push("hello")
        return "kore"

    async def asyncio_side():
        await reactor.suspend(1)
        assert await queue.pop() == "hello"
        async with reactor.lock():
            await reactor.suspend(0)
        children = await reactor.gather(kore_side())
        assert children == ["kore"]
        return "asyncio"

    async def main():
        task = loop.start(kore_side())
        assert await asyncio.create_task(asyncio_side()) == "asyncio"
        assert await task == "kore"
        ids = asyncio.create_task(number()), asyncio.create_task(number())
        assert await ids[0] != await ids[1]

    async def number():
        first = reactor.task_id()
        await asyncio.sleep(0)
        assert reactor.task_id() == first
        return first

    loop.run_until_complete(main())


def test_the_face_of_asyncio_task(loop, capsys):
    async def main():
        task = asyncio.current_task()
        assert isinstance(task, reactor.Task)
        assert task in asyncio.all_tasks()
        assert asyncio.isfuture(task)
        task.set_name("mine")
        assert task.get_name() == "mine"
        child = loop.start(forever())
        await asyncio.sleep(0)
        assert child._fut_waiter is not None
        assert child.get_coro().cr_code.co_name == "forever"
        assert [frame.f_code.co_name for frame in child.get_stack()] == ["forever"]
        child.print_stack(file=sys.stdout)
        assert "in forever" in capsys.readouterr().out
        assert "pending" in repr(child)
        with pytest.raises(RuntimeError):
            child.set_result(1)
        with pytest.raises(RuntimeError):
            child.set_exception(KeyError())
        assert child.cancelling() == 0
        assert child.cancel("why")
        assert child.cancelling() == 1
        with pytest.raises(asyncio.CancelledError):
            await child
        assert child.cancelled()
        assert not child.cancel()

    run(loop, main())


def test_cancellation_is_asyncios(loop, log):
    seen = []

    async def stubborn():
        try:
            await forever()
        except asyncio.CancelledError as exc:
            seen.append(exc.args)
            asyncio.current_task().uncancel()
        await asyncio.sleep(0)
        return "stayed"

    async def main():
        task = loop.start(stubborn())
        await asyncio.sleep(0)
        task.cancel("please")
        assert await task == "stayed"
        early = loop.start(stubborn())
        early.cancel()
        with pytest.raises(asyncio.CancelledError):
            await early
        assert await asyncio.wait_for(loop.start(asyncio.sleep(0, "ok")), 1) == "ok"
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(loop.start(forever()), 0.001)

    run(loop, main())
    assert seen == [("please",)]
    assert log == []


def test_task_groups(loop):
    ended = []

    async def fail():
        await reactor.suspend(1)
        raise KeyError("x")

    async def sleeper():
        try:
            await forever()
        except asyncio.CancelledError:
            ended.append("cancelled")
            raise

    async def main():
        with pytest.raises(ExceptionGroup) as caught:
            async with asyncio.TaskGroup() as group:
                group.create_task(fail())
                group.create_task(sleeper())
        assert isinstance(caught.value.exceptions[0], KeyError)

    run(loop, main())
    assert ended == ["cancelled"]


class Yielding:
    def __init__(self, thing):
        self.thing = thing

    def __await__(self):
        yield self.thing


def test_bad_yields_are_runtime_errors(loop):
    async def main():
        await Yielding(None)
        with pytest.raises(RuntimeError, match="bad yield"):
            await Yielding(5)
        with pytest.raises(RuntimeError, match="yield was used instead of yield from"):
            await Yielding(loop.create_future())
        with pytest.raises(RuntimeError, match="await on itself"):
            await asyncio.current_task()
        other = asyncio.new_event_loop()
        with pytest.raises(RuntimeError, match="different loop"):
            await other.create_future()
        other.close()

    run(loop, main())


# Public functions.


def test_task_create_gives_ids_and_runs_later(loop, log):
    order = []

    async def child(name):
        order.append((name, reactor.task_id()))

    async def main():
        first = reactor.task_create(child("a"))
        second = reactor.task_create(child("b"))
        assert order == []
        await reactor.suspend(0)
        assert order == [("a", first), ("b", second)]
        assert second == first + 1

    run(loop, main())
    with pytest.raises(TypeError):
        reactor.task_create(child)
    assert log == []


def test_wake_ups_never_run_inline(loop):
    """The order of the reference: the waker's rest, the woken task, the child it created, the waker again."""
    order = []
    queue = reactor.queue()

    async def consumer():
        await queue.pop()
        order.append("task")

    async def child():
        order.append("child")

    async def handler():
        queue.push(1)
        children = reactor.gather(child())
        order.append("handler-rest")
        await children
        order.append("handler-resume")

    async def main():
        reactor.task_create(consumer())
        await reactor.suspend(1)
        await loop.begin(handler())

    run(loop, main())
    assert order == ["handler-rest", "task", "child", "handler-resume"]


def test_tasks_created_before_there_is_a_loop(loop, log):
    order = []

    async def early(name):
        order.append((name, reactor.task_id()))

    dropped = early("dropped")
    ids = [reactor.task_create(early("a")), reactor.task_create(dropped), reactor.task_create(early("b"))]
    assert ids == [ids[0], ids[0] + 1, ids[0] + 2]
    assert reactor.task_kill(ids[1])
    loop.adopt_pending()
    third = reactor.task_create(early("workerstart"))
    loop.run_until_complete(asyncio.sleep(0))
    assert order == [("a", ids[0]), ("b", ids[2]), ("workerstart", third)]
    assert tasks.pending_tasks == []
    del log[:]


def test_discarded_tasks_say_nothing(loop, recwarn):
    async def early():
        raise AssertionError

    reactor.task_create(early())
    reactor.discard_pending()
    gc.collect()
    assert tasks.pending_tasks == []
    assert not recwarn.list


def test_outside_of_coroutines(loop):
    for call in (reactor.task_id, lambda: reactor.coroname("x"), reactor.gather):
        with pytest.raises(RuntimeError):
            call()
        with pytest.raises(RuntimeError):
            soon(loop, call)
    with pytest.raises(RuntimeError):
        reactor.coroname()


def test_foreign_loops_are_refused():
    async def main():
        coro = forever()
        with pytest.raises(RuntimeError):
            reactor.task_create(coro)
        coro.close()
        with pytest.raises(RuntimeError):
            reactor.gather(forever())
        with pytest.raises(RuntimeError):
            reactor.timer(print, 1, 0)
        await reactor.suspend(1)

    asyncio.run(main())
