"""The end of tasks: killed in the middle of a wait, freed, and with exceptions that nobody caught."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import re
import sys
import types
import weakref

import pytest
from reactor_harness import begin_telling, forever, run, soon

from kore import reactor
from kore.reactor import tasks, trace

LIBRARY = """
import asyncio

async def wait(inner, order):
    try:
        await inner
    except BaseException as error:
        order.append(type(error))
        await asyncio.sleep(0)
        raise ValueError("as libraries do")
"""


# Killing.


def test_kill_closes_at_once_as_the_current_coroutine(loop, log):
    seen = []
    lock = reactor.lock()

    async def victim():
        async with lock:
            try:
                await reactor.suspend(100_000)
            finally:
                seen.append((reactor.task_id(), sys.exc_info()[0]))

    async def main():
        mine = reactor.task_id()
        number = reactor.task_create(victim())
        await reactor.suspend(0)
        assert not loop.create_future().done()
        assert reactor.task_kill(number) is True
        assert seen == [(number, GeneratorExit)]
        assert reactor.task_id() == mine
        assert lock.trylock()
        lock.release()
        assert reactor.task_kill(number) is False
        assert reactor.task_kill(-1) is False
        assert reactor.task_kill(2**70) is False
        with pytest.raises(RuntimeError):
            reactor.task_kill(mine)
        with pytest.raises(TypeError):
            reactor.task_kill("0")

    run(loop, main())
    assert log == []
    assert not [entry for entry in loop._timers if not entry[2].cancelled()]


def test_kill_before_the_first_step(loop):
    ran = []

    async def victim():
        ran.append(True)

    async def main():
        coro = victim()
        number = reactor.task_create(coro)
        assert reactor.task_kill(number)
        await reactor.suspend(0)
        assert ran == []
        assert coro.cr_frame is None

    run(loop, main())


def test_kill_cancels_the_pending_wait(loop):
    async def main():
        waiting = loop.create_future()

        async def victim():
            await waiting

        task = loop.start(victim())
        await reactor.suspend(0)
        task.kill()
        assert waiting.cancelled()
        with pytest.raises(GeneratorExit):
            task.result()

    run(loop, main())


def test_killed_after_it_was_woken(loop):
    resumed = []

    async def main():
        waiting = loop.create_future()

        async def victim():
            await waiting
            resumed.append(True)

        task = loop.start(victim())
        await reactor.suspend(0)
        waiting.set_result(None)
        task.kill()
        await reactor.suspend(1)
        assert resumed == []

    run(loop, main())


def test_swallowing_and_ignoring_generator_exit(loop, log, monkeypatch):
    ignored = []
    monkeypatch.setattr(sys, "unraisablehook", lambda arguments: ignored.append(arguments.exc_value))
    seen = []

    async def swallows():
        try:
            await forever()
        except GeneratorExit:
            return

    async def ignores():
        try:
            await forever()
        finally:
            for _ in range(2):
                with contextlib.suppress(GeneratorExit):
                    await reactor.suspend(3600000)
                    seen.append("never")

    async def fails():
        try:
            await forever()
        finally:
            raise KeyError("clean-up")

    async def main():
        for coro in (swallows(), ignores(), fails()):
            number = reactor.task_create(coro)
            await reactor.suspend(0)
            assert reactor.task_kill(number)
            reactor.task_kill(number)  # to give up a clean-up that waits
        del coro
        await reactor.suspend(3)

    run(loop, main())
    gc.collect()
    assert seen == []
    assert [str(exc) for exc in ignored] == ["coroutine ignored GeneratorExit"]
    (text,) = log.texts
    assert text.startswith("coroutine: uncaught exception: KeyError('clean-up'), at test_reactor_kill.py:")


def awaited(order):
    """Coroutines that await each other in several ways, each with a clean-up that waits and then says so."""

    async def coroutine():
        try:
            await forever()
        except GeneratorExit:
            await reactor.suspend(1)
            order.append("coroutine")
            raise

    async def locked():
        async with reactor.lock():
            try:
                await coroutine()
            finally:
                async with asyncio.timeout(5):
                    await asyncio.sleep(0.001)
                order.append(reactor.task_id())

    @types.coroutine
    def generator():
        try:
            yield from locked()
        finally:
            order.append("generator")

    async def wrapped():
        try:
            await generator()
        finally:
            await asyncio.sleep(0)
            order.append("wrapped")

    class Awaitable:
        def __await__(self):
            return wrapped().__await__()

    return Awaitable()


def nested(order):
    """The same within asynchronous generators."""

    @contextlib.asynccontextmanager
    async def context():
        try:
            await awaited(order)
            yield
        finally:
            await asyncio.sleep(0)
            order.append("context")

    async def items():
        try:
            async with context():
                yield 1
        finally:
            await asyncio.sleep(0)
            order.append("items")

    async def outer():
        try:
            async for _ in items():
                pass
        finally:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.001):
                    await forever()
            order.append("outer")

    return outer()


def test_a_clean_up_that_waits(loop, log):
    """It runs to its end, frame by frame from the innermost out, as the same task; then the end is told."""
    order = []
    ends = []

    async def main():
        task = loop.start(nested(order), ends.append)
        number = task._id
        await reactor.suspend(0)
        assert reactor.task_kill(number)
        assert not ends
        while not task.done():
            await reactor.suspend(1)
        assert order == ["coroutine", number, "generator", "wrapped", "context", "items", "outer"]
        assert not reactor.task_kill(number)

    run(loop, main())
    assert len(ends) == 1
    assert isinstance(ends[0], GeneratorExit)
    assert log == []


def test_libraries_are_cancelled(loop, log):
    """Where the application waits for a library of asyncio that has CancelledError, the application GeneratorExit."""
    order = []
    namespace = {}
    exec(compile(LIBRARY, "/usr/lib/python3/dist-packages/some/library.py", "exec"), namespace)
    wait = namespace["wait"]

    async def inner():
        try:
            await forever()
        except BaseException as error:
            order.append(type(error))
            raise

    async def outer():
        try:
            await wait(wait(inner(), order), order)
        except BaseException as error:
            order.append(type(error))
            raise

    async def main():
        task = loop.start(outer())
        await reactor.suspend(0)
        task.kill()
        while not task.done():
            await reactor.suspend(1)

    run(loop, main())
    assert order == [asyncio.CancelledError, asyncio.CancelledError, ValueError, GeneratorExit]
    assert log == []


def test_a_library_that_cancels_by_itself_knows_who_it_was(loop, log):
    """anyio swallows what it has cancelled; a request of httpx ends whenever it is killed, also while it connects."""
    import httpx  # a second that the others need not wait for

    async def get(client, url):
        await client.get(url)

    async def main():
        server = await asyncio.start_server(lambda reader, writer: forever(), "127.0.0.1", 0)
        url = "http://127.0.0.1:%d/" % server.sockets[0].getsockname()[1]
        for turns in range(12):
            async with httpx.AsyncClient(timeout=None) as client:
                task = loop.start(get(client, url))
                for _ in range(turns):
                    await asyncio.sleep(0)
                task.kill()
                async with asyncio.timeout(5):
                    while not task.done():
                        await asyncio.sleep(0)
        server.close()

    run(loop, main())
    assert log == []


def test_a_clean_up_that_waits_for_ever_is_given_up(loop, log, monkeypatch):
    ignored = []
    monkeypatch.setattr(sys, "unraisablehook", lambda arguments: ignored.append(str(arguments.exc_value)))
    monkeypatch.setattr(tasks, "CLEANUP_SECONDS_MAX", 0.01)
    seen = []

    async def stuck():
        try:
            await forever()
        finally:
            try:
                await forever()
            finally:
                seen.append("given up")

    async def main():
        task = loop.start(stuck(), seen.append)
        await reactor.suspend(0)
        task.kill()
        assert seen == []
        while not task.done():
            await reactor.suspend(1)

    run(loop, main())
    assert seen[0] == "given up"
    assert isinstance(seen[1], GeneratorExit)
    assert ignored == []


def test_a_killed_handler_tells_its_server(loop, log):
    ends = []
    task = soon(loop, begin_telling, loop, forever(), ends.append)
    task.kill()
    assert len(ends) == 1
    assert isinstance(ends[0], GeneratorExit)
    assert log == []


def test_killed_outside_of_a_running_loop(loop, log):
    """A worker that stops closes what is left; the clean-up still knows which coroutine it is."""
    lock = reactor.lock()
    seen = []

    async def victim():
        async with lock:
            try:
                await forever()
            finally:
                seen.append(reactor.task_id())

    task = loop.start(victim())
    loop.run_until_complete(asyncio.sleep(0))
    task.kill()
    assert seen == [task._id]
    assert log == []
    assert asyncio._get_running_loop() is None


def test_killing_asyncios_own_task_cancels_it(loop):
    async def main():
        numbers = []

        async def foreign():
            numbers.append(reactor.task_id())
            await forever()

        task = asyncio.create_task(foreign())
        await asyncio.sleep(0)
        assert reactor.task_kill(numbers[0])
        with pytest.raises(asyncio.CancelledError):
            await task

    loop.run_until_complete(main())


def test_a_storm_of_kills(loop, log):
    """Coroutines waiting for everything there is are killed in any order, many while woken; nothing is left."""
    lock = reactor.lock()
    queue = reactor.queue()
    condition = asyncio.Queue()
    served = []

    async def victim(n):
        kind = n % 5
        if kind == 0:
            async with lock:
                await reactor.suspend(n % 3)
        elif kind == 1:
            served.append(await queue.pop())
        elif kind == 2:
            await reactor.gather(victim(n + 2), victim(n + 1), concurrency=1)
        elif kind == 3:
            await condition.get()
        else:
            async with asyncio.timeout(0.001 * (n % 7)):
                await asyncio.sleep(1)

    async def main():
        for turn in range(40):
            ids = [reactor.task_create(victim(n)) for n in range(25)]
            await reactor.suspend(turn % 2)
            for _ in range(5):
                queue.push(turn)
                condition.put_nowait(turn)
            for number in ids[:: turn % 3 + 1]:
                reactor.task_kill(number)
        for number in list(tasks.live):
            if number != reactor.task_id():
                reactor.task_kill(number)
        async with asyncio.timeout(5), lock:
            pass

    run(loop, main())
    texts = {re.sub(r"\(.*", "", text) for text in log.texts}
    assert texts <= {"coroutine: uncaught exception: TimeoutError"}
    assert not tasks.live
    assert not queue._waiters
    assert not lock._waiters


def test_ended_tasks_are_freed_without_the_collector(loop, log):
    class Thing:
        pass

    refs = []

    async def handler(fail):
        thing = Thing()
        refs.append(weakref.ref(thing))
        await asyncio.sleep(0)
        if fail:
            raise KeyError

    async def main():
        for fail in (False, True):
            reactor.task_create(handler(fail))
        await reactor.suspend(2)

    gc.disable()
    try:
        run(loop, main())
        assert [ref() for ref in refs] == [None, None]
    finally:
        gc.enable()


# Exceptions nobody caught.


def test_exceptions_of_tasks_are_logged_in_one_line(loop, log):
    class Strange(Exception):
        def __repr__(self):
            raise ValueError

    async def fail(exc):
        raise exc

    async def main():
        for exc in (KeyError("x"), SystemExit(3), Strange(), GeneratorExit()):
            reactor.task_create(fail(exc))
        await reactor.suspend(1)

    run(loop, main())
    place = f", at test_reactor_kill.py:{fail.__code__.co_firstlineno + 1} fail"
    assert log == [
        (trace.LOG_ERR, f"coroutine: uncaught exception: KeyError('x'){place}"),
        (trace.LOG_ERR, f"coroutine: uncaught exception: SystemExit(3){place}"),
        (trace.LOG_ERR, f"coroutine: uncaught exception: <Strange whose repr() fails>{place}"),
    ]


def test_tracer(loop, log):
    seen = []

    def tracer(*args):
        seen.append(args)
        raise ValueError("inside the tracer")

    for wrong in ((), (tracer, tracer)):
        with pytest.raises(TypeError):
            reactor.tracer(*wrong)
    with pytest.raises(RuntimeError):
        reactor.tracer(5)
    assert reactor.tracer(tracer) is True
    with pytest.raises(RuntimeError):
        reactor.tracer()

    async def fail():
        raise KeyError("x")

    async def main():
        reactor.task_create(fail())
        await reactor.suspend(1)

    run(loop, main())
    bare = ValueError("never raised")
    reactor.report_exception("here", bare)
    reactor.report_exception("here", StopIteration())
    assert log == []
    assert len(seen) == 2
    assert seen[0][0] is KeyError
    assert seen[0][1].args == ("x",)
    assert seen[0][2].tb_frame is not None
    assert seen[1] == (ValueError, bare, None)


def test_an_on_end_that_fails_is_reported(loop, log):
    async def main():
        loop.start(asyncio.sleep(0), lambda _error: 1 / 0)
        await reactor.suspend(1)

    run(loop, main())
    (text,) = log.texts
    assert re.fullmatch(r"coroutine: .* ZeroDivisionError\('.*'\), at test_reactor_kill\.py:\d+ <lambda>", text)


def test_reports_go_to_standard_error_without_a_log(capsys):
    reactor.report_exception("here", KeyError("x"))
    assert capsys.readouterr().err == "here: uncaught exception: KeyError('x')\n"
