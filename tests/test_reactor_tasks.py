"""Tasks: first steps, ids, asyncio's face, killing, cancelling, exceptions, traces, tasks created before the loop."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import os
import re
import sys
import weakref

import pytest
from reactor_harness import ENGINES, open_loop, run

from kore import reactor
from kore.reactor import tasks, trace


@pytest.fixture(params=ENGINES)
def opened(request):
    """A loop on each engine, and its log."""
    yield from open_loop(request.param)


@pytest.fixture
def loop(opened):
    return opened[0]


@pytest.fixture
def log(opened):
    return opened[1]


def soon(loop, function, *args):
    """Call `function` from inside the loop, outside of any task, as the server calls handlers; its result."""
    future = loop.create_future()

    def call():
        try:
            future.set_result(function(*args))
        except BaseException as exc:
            future.set_exception(exc)

    loop.call_soon(call)
    return loop.run_until_complete(future)


async def forever():
    await asyncio.get_running_loop().create_future()


# Beginning handlers.


def test_begin_runs_a_coroutine_that_does_not_wait_to_its_end(loop):
    seen = []

    async def handler():
        seen.append((reactor.task_id(), asyncio.current_task()))

    assert soon(loop, loop.begin, handler(), seen.append) is None
    assert soon(loop, loop.begin, handler(), seen.append) is None
    assert seen[1][0] == seen[0][0] + 1
    with pytest.raises(RuntimeError):
        reactor.task_id()
    assert soon(loop, asyncio.current_task) is None


def test_begin_raises_what_the_first_step_raises(loop, log):
    async def handler():
        raise KeyError("x")

    ends = []
    for _ in range(3):
        with pytest.raises(KeyError):
            soon(loop, loop.begin, handler(), ends.append)
    assert ends == []
    assert log == []
    assert soon(loop, asyncio.current_task) is None


def test_begin_makes_a_task_of_a_coroutine_that_waits(loop):
    ends = []

    async def handler(seconds):
        await asyncio.sleep(seconds)
        ends.append("body")
        if not seconds:
            raise KeyError("late")

    def begin():
        first = loop.begin(handler(0.001), ends.append)
        second = loop.begin(handler(0), ends.append)
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
            loop.begin(coro, None)

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
        loop.begin(first(), None)
        return loop.begin(second(), lambda _error: None)

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
        loop.begin(writing(), None)
        loop.begin(reading(), None)

    soon(loop, begin)
    assert seen == [None]


def test_done_callbacks_of_a_handler_that_does_not_wait_are_called(loop):
    done = []

    async def handler():
        asyncio.current_task().add_done_callback(lambda task: done.append(task.done()))

    soon(loop, loop.begin, handler(), None)
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
        loop.begin(handler(False), None)
        task = loop.begin(handler(True), lambda _error: None)
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
        loop.begin(inner(), None)
        with pytest.raises(KeyError):
            loop.begin(failing(), None)
        assert reactor.task_id() == mine
        order.append("outer")

    async def main():
        mine = reactor.task_id()
        loop.begin(outer(), None)
        waiting = loop.begin(forever(), order.append)
        assert reactor.task_id() == mine
        waiting.kill()

    soon(loop, loop.begin, outer(), None)
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

    task = soon(loop, loop.begin, handler(), seen.append)
    loop.run_until_complete(task)
    assert seen == ["quick", "late", None]


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
        await loop.begin(handler(), lambda _error: None)

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
            await reactor.suspend(1)
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
        del coro
        await reactor.suspend(3)

    run(loop, main())
    gc.collect()
    assert seen == []
    assert [str(exc) for exc in ignored] == ["coroutine ignored GeneratorExit"]
    assert log.texts == ["coroutine: uncaught exception: KeyError('clean-up')"]


def test_a_killed_handler_tells_its_server(loop, log):
    ends = []
    task = soon(loop, loop.begin, forever(), ends.append)
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
    assert log == [
        (trace.LOG_ERR, "coroutine: uncaught exception: KeyError('x')"),
        (trace.LOG_ERR, "coroutine: uncaught exception: SystemExit(3)"),
        (trace.LOG_ERR, "coroutine: uncaught exception: <Strange whose repr() fails>"),
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
    assert log.texts == ["coroutine: uncaught exception: ZeroDivisionError('division by zero')"]


def test_reports_go_to_standard_error_without_a_log(capsys):
    reactor.report_exception("here", KeyError("x"))
    assert capsys.readouterr().err == "here: uncaught exception: KeyError('x')\n"


# Traces of coroutines.


def test_corotrace_lines(loop, log):
    file = os.path.basename(__file__)

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
        f"coro {victim} created <forever> @ [{file}:{born}]",
        f"coro {me} suspended <main> @ [{file}:{mine + 3}]",
        f"coro {number} running <traced> @ [{file}:{first}]",
        f"coro 'main' suspended <traced> @ [{file}:{first + 2}]",
        f"coro {victim} running <forever> @ [{file}:{born}]",
        f"coro {victim} suspended <forever> @ [{file}:{born + 1}]",
        f"coro 'main' wokeup <traced> @ [{file}:{first + 2}]",
        f"coro 'main' running <traced> @ [{file}:{first + 2}]",
        "coro 'main' deleted <unknown> @ [unknown:-1]",
        f"coro {me} wokeup <main> @ [{file}:{mine + 3}]",
        f"coro {me} running <main> @ [{file}:{mine + 3}]",
        f"coro {victim} killed <forever> @ [{file}:{born + 1}]",
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
        loop.begin(nothing(), None)

    def begin():
        loop.begin(nothing(), None)
        loop.begin(on(), None)
        loop.begin(nothing(), None)
        with pytest.raises(KeyError):
            loop.begin(fails(), None)
        loop.begin(inside(), None)
        return loop.begin(waits(), lambda _error: None)

    loop.run_until_complete(soon(loop, begin))
    events = [line.split()[2] for line in log.texts]
    nothing_ = ["created", "running", "deleted"]
    assert events[:1] == ["deleted"]  # of the one that turned it on
    assert events[1:7] == nothing_ * 2
    assert events[7:13] == ["created", "running", *nothing_, "deleted"]
    assert events[13:] == ["created", "running", "suspended", "running", "deleted"]
    reactor.corotrace(False)
    del log[:]
    assert soon(loop, loop.begin, nothing(), None) is None
    assert log == []


def test_corotrace_arguments(loop):
    for value in (256, -1):
        with pytest.raises(OverflowError):
            reactor.corotrace(value)
    for value in ("1", 1.0, None):
        with pytest.raises(TypeError):
            reactor.corotrace(value)
