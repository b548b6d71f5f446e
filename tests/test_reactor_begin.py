"""Handlers: their first step at once, the spare task that most of them share, and the lines of their traces."""

from __future__ import annotations

import asyncio
import contextvars
import os

import pytest
from reactor_harness import begin_telling, forever, run, soon

from kore import reactor
from kore.reactor import tasks, trace

# Beginning handlers.


def test_begin_runs_a_coroutine_that_does_not_wait_to_its_end(loop):
    seen = []

    async def handler():
        seen.append((reactor.task_id(), asyncio.current_task()))

    assert soon(loop, begin_telling, loop, handler(), seen.append) is None
    assert soon(loop, begin_telling, loop, handler(), seen.append) is None
    assert seen[1][0] == seen[0][0] + 1
    with pytest.raises(RuntimeError):
        soon(loop, reactor.task_id)
    assert soon(loop, asyncio.current_task) is None


def test_begin_raises_what_the_first_step_raises(loop, log):
    async def handler():
        raise KeyError("x")

    ends = []
    for _ in range(3):
        with pytest.raises(KeyError):
            soon(loop, begin_telling, loop, handler(), ends.append)
    assert ends == []
    assert log == []
    assert soon(loop, asyncio.current_task) is None


def test_the_clean_up_of_a_killed_task_may_begin_a_handler(loop):
    """Killed by a callback of the driver, the handler is not taken for the one killed, nor the next one."""
    seen = []

    async def handler():
        seen.append(asyncio.current_task())

    async def victim():
        try:
            await forever()
        finally:
            loop.begin(handler())
            seen.append(asyncio.current_task())

    task = loop.start(victim())
    loop.run_until_complete(asyncio.sleep(0))

    def kill():
        task.kill()
        loop.begin(handler())

    soon(loop, kill)
    begun, killed, next_one = seen
    assert killed is task
    assert len({begun, killed, next_one}) == 3
    assert soon(loop, asyncio.current_task) is None


def test_protocols_of_asyncio_have_no_current_task(loop):
    """In a turn without handlers it is None, as on asyncio's own loops."""
    seen = []

    class Asking(asyncio.Protocol):
        def connection_made(self, transport):
            seen.append(asyncio.current_task())

        data_received = eof_received = connection_lost = lambda self, *_: seen.append(asyncio.current_task())

    async def main():
        server = await loop.create_server(Asking, "127.0.0.1", 0)
        _, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        writer.write(b"x")
        await writer.drain()
        while len(seen) < 2:
            await asyncio.sleep(0)
        writer.close()
        await writer.wait_closed()
        while len(seen) < 4:
            await asyncio.sleep(0)
        server.close()

    run(loop, main())
    assert seen == [None] * 4


def test_begin_makes_a_task_of_a_coroutine_that_waits(loop):
    ends = []

    async def handler(seconds):
        await asyncio.sleep(seconds)
        ends.append("body")
        if not seconds:
            raise KeyError("late")

    def begin():
        first = begin_telling(loop, handler(0.001), ends.append)
        second = begin_telling(loop, handler(0), ends.append)
        assert first is not second
        assert first._id + 1 == second._id
        assert {first, second} <= asyncio.all_tasks(loop)
        return first, second

    first, second = soon(loop, begin)
    loop.run_until_complete(asyncio.wait([first, second]))
    assert ends[:3:2] == ["body", "body"]
    assert isinstance(ends[1], KeyError)
    assert ends[3] is None
    assert not asyncio.all_tasks(loop)
    assert not tasks.live


def test_the_spare_task_is_used_again_unless_kept(loop):
    kept = []

    async def plain():
        kept.append(id(asyncio.current_task()))

    async def keeping():
        kept.append(asyncio.current_task())

    def begin():
        for coro in (plain(), plain(), keeping(), plain()):
            loop.begin(coro)

    soon(loop, begin)
    assert kept[0] == kept[1] == id(kept[2])
    assert kept[3] != kept[0]
    assert kept[2].done()
    assert kept[2].result() is None
    assert kept[2].get_coro().__name__ == "keeping"


@pytest.mark.parametrize(
    "say",
    [
        lambda task: task.cancel(),
        lambda task: task.set_name("told"),
        lambda task: task.add_done_callback(lambda _task: None),
        lambda _task: reactor.coroname("told"),
        lambda _task: reactor.lock().trylock(),
    ],
)
def test_what_is_said_to_a_task_never_reaches_the_next_handler(loop, say):
    ids, seen = [], []

    async def first():
        task = asyncio.current_task()
        say(task)
        ids.append(task._id)

    async def second():
        task = asyncio.current_task()
        seen.append((task.get_name(), task._coroname, task.cancelling(), task._must_cancel, task._locks))
        await asyncio.sleep(0)
        seen.append("after")

    def begin():
        loop.begin(first())
        return loop.begin(second())

    loop.run_until_complete(soon(loop, begin))
    assert seen == [(f"kore-{ids[0] + 1}", None, 0, False, None), "after"]


def test_what_is_written_on_a_task_never_reaches_the_next_handler(loop):
    """A library that writes on the current task must not hand one client's data to the next."""
    seen = []

    async def writing():
        asyncio.current_task().user = "alice"

    async def reading():
        seen.append(getattr(asyncio.current_task(), "user", None))

    def begin():
        loop.begin(writing())
        loop.begin(reading())

    soon(loop, begin)
    assert seen == [None]


def test_done_callbacks_of_a_handler_that_does_not_wait_are_called(loop):
    done = []

    async def handler():
        asyncio.current_task().add_done_callback(lambda task: done.append(task.done()))

    soon(loop, loop.begin, handler())
    loop.run_until_complete(asyncio.sleep(0))
    assert done == [True]


def test_each_first_step_has_a_context_of_its_own(loop):
    var = contextvars.ContextVar("var", default=0)
    seen = []

    async def handler(wait):
        seen.append(var.get())
        var.set(var.get() + 1)
        assert asyncio.current_task().get_context()[var] == 1
        if wait:
            await asyncio.sleep(0)
        seen.append(var.get())

    def begin():
        loop.begin(handler(False))
        task = loop.begin(handler(True))
        seen.append(var.get())
        return task

    loop.run_until_complete(soon(loop, begin))
    assert seen == [0, 1, 0, 0, 1]


def test_begin_inside_a_task_or_another_first_step(loop):
    order = []

    async def inner():
        order.append(("inner", reactor.task_id()))

    async def failing():
        raise KeyError

    async def outer():
        mine = reactor.task_id()
        loop.begin(inner())
        with pytest.raises(KeyError):
            loop.begin(failing())
        assert reactor.task_id() == mine
        order.append("outer")

    async def main():
        mine = reactor.task_id()
        loop.begin(outer())
        waiting = begin_telling(loop, forever(), order.append)
        assert reactor.task_id() == mine
        waiting.kill()

    soon(loop, loop.begin, outer())
    run(loop, main())
    assert [item if isinstance(item, str) else item[0] for item in order[:4]] == ["inner", "outer", "inner", "outer"]
    assert isinstance(order[4], GeneratorExit)


def test_timeouts_work_in_a_first_step(loop):
    seen = []

    async def handler():
        async with asyncio.timeout(10):
            seen.append("quick")
        try:
            async with asyncio.timeout(0.001):
                await reactor.suspend(10_000)
        except TimeoutError:
            seen.append("late")

    task = soon(loop, begin_telling, loop, handler(), seen.append)
    loop.run_until_complete(task)
    assert seen == ["quick", "late", None]


# Traces of coroutines.


def test_corotrace_lines(loop, log):
    file = os.path.basename(__file__)
    harness = os.path.basename(forever.__code__.co_filename)

    async def traced():
        reactor.coroname("main")
        await reactor.suspend(1)

    async def main():
        reactor.task_create(traced())
        victim = reactor.task_create(forever())
        await reactor.suspend(5)
        reactor.task_kill(victim)
        return victim

    first = traced.__code__.co_firstlineno
    born = forever.__code__.co_firstlineno
    mine = main.__code__.co_firstlineno
    loop.run_until_complete(asyncio.sleep(0))
    reactor.corotrace(1)
    victim = loop.run_until_complete(loop.start(main()))
    reactor.corotrace(0)
    me, number = victim - 2, victim - 1
    assert {priority for priority, _ in log} == {trace.LOG_NOTICE}
    assert log.texts == [
        f"coro {me} created <main> @ [{file}:{mine}]",
        f"coro {me} running <main> @ [{file}:{mine}]",
        f"coro {number} created <traced> @ [{file}:{first}]",
        f"coro {victim} created <forever> @ [{harness}:{born}]",
        f"coro {me} suspended <main> @ [{file}:{mine + 3}]",
        f"coro {number} running <traced> @ [{file}:{first}]",
        f"coro 'main' suspended <traced> @ [{file}:{first + 2}]",
        f"coro {victim} running <forever> @ [{harness}:{born}]",
        f"coro {victim} suspended <forever> @ [{harness}:{born + 1}]",
        f"coro 'main' wokeup <traced> @ [{file}:{first + 2}]",
        f"coro 'main' running <traced> @ [{file}:{first + 2}]",
        "coro 'main' deleted <unknown> @ [unknown:-1]",
        f"coro {me} wokeup <main> @ [{file}:{mine + 3}]",
        f"coro {me} running <main> @ [{file}:{mine + 3}]",
        f"coro {victim} killed <forever> @ [{harness}:{born + 1}]",
        f"coro {me} deleted <unknown> @ [unknown:-1]",
    ]


def test_corotrace_of_handlers(loop, log):
    """Handlers that never wait are traced too, also when one of them turns tracing on, and no more once it is off."""

    async def on():
        reactor.corotrace(True)

    async def nothing():
        pass

    async def waits():
        await asyncio.sleep(0)

    async def fails():
        raise KeyError

    async def inside():
        loop.begin(nothing())

    def begin():
        loop.begin(nothing())
        loop.begin(on())
        loop.begin(nothing())
        with pytest.raises(KeyError):
            loop.begin(fails())
        loop.begin(inside())
        return loop.begin(waits())

    loop.run_until_complete(soon(loop, begin))
    events = [line.split()[2] for line in log.texts]
    nothing_ = ["created", "running", "deleted"]
    assert events[:1] == ["deleted"]  # of the one that turned it on
    assert events[1:7] == nothing_ * 2
    assert events[7:13] == ["created", "running", *nothing_, "deleted"]
    assert events[13:] == ["created", "running", "suspended", "running", "deleted"]
    reactor.corotrace(False)
    del log[:]
    assert soon(loop, loop.begin, nothing()) is None
    assert log == []


def test_corotrace_arguments(loop):
    for value in (256, -1):
        with pytest.raises(OverflowError):
            reactor.corotrace(value)
    for value in ("1", 1.0, None):
        with pytest.raises(TypeError):
            reactor.corotrace(value)
