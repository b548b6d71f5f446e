"""kore.sendobj between real workers: to whom, in order, once, whatever the size and whoever dies or sleeps meanwhile.

The application of these tests runs code in the worker it is told to, and writes what its hook gets to a file for each
process, so that what a worker got can be read after it has died.
"""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path

import pytest

from kore.process.outbox import WAITING_BYTES_MAX
from kore.process.pieces import OBJECT_BYTES_MAX
from kore.process.post import TASKS_MAX
from tests.support import SECONDS, http_get, pids_of, starter, wait_until

APP = """
import asyncio
import json
import sys
import time

got = None

def record(what):
    global got
    if got is None:
        got = open(f"got.{kore.worker()}.{os.getpid()}", "a")
    got.write(json.dumps(what) + "\\n")
    got.flush()

class Code:
    def __init__(self, text):
        self.text = text

class App:
    def onmsg(self, obj):
        if isinstance(obj, Code):
            exec(obj.text, globals())
        else:
            record(obj)

koreapp = App()

@kore.route("^/run/([0-9]+)/([0-9a-f]*)$", domain=home, methods=["get"])
def run(req, worker, text):
    kore.sendobj(Code(bytes.fromhex(text).decode()), worker=int(worker))
    req.response(200, b"sent")
"""


@pytest.fixture
def start(tmp_path, engine):
    with starter(tmp_path) as programs:
        options = "kore.config.sandbox_write = '.'"  # where it records what it got
        yield lambda text="", workers=2: programs.serve(APP + text, workers=workers, io=engine, options=options)


def run(program, worker, code):
    """Have `code` run in a worker."""
    answer = http_get(program.address, f"/run/{worker}/{code.encode().hex()}")
    assert answer.endswith(b"sent"), answer


def got(program, worker, pid=None):
    """What the hook of a worker got, of all its processes or of one."""
    text = "".join(path.read_text() for path in program.directory.glob(f"got.{worker}.{pid or '*'}"))
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def wait_for(program, worker, count, pid=None):
    wait_until(lambda: len(got(program, worker, pid)) >= count, f"worker {worker} has {count} messages")
    return got(program, worker, pid)


def restarted(program, worker, count=1):
    return int(program.wait_for(rf"worker {worker} serves again, pid (\d+)", count=count)[1])


def rss(pid):
    """Bytes of memory that a process has."""
    return int(re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())[1]) * 1024


def test_without_an_id_every_worker_gets_it_once_the_sender_too(start):
    program = start(workers=3)
    run(program, 2, "kore.sendobj('first'); kore.sendobj('end')")
    for worker in (1, 2, 3):
        assert wait_for(program, worker, 2) == ["first", "end"]


def test_with_an_id_only_that_worker_gets_it_be_it_the_sender(start):
    program = start(workers=3)
    run(program, 1, "kore.sendobj('to 3', worker=3); kore.sendobj('to 1', worker=1); kore.sendobj('end')")
    assert wait_for(program, 1, 2) == ["to 1", "end"]
    assert wait_for(program, 2, 1) == ["end"]
    assert wait_for(program, 3, 2) == ["to 3", "end"]


def test_delivery_is_never_inline_and_returns_nothing(start):
    program = start()
    run(program, 1, "record(repr(kore.sendobj('sent', worker=1))); record('after the call')")
    assert wait_for(program, 1, 3) == ["None", "after the call", "sent"]


def test_objects_of_one_sender_arrive_in_order_once_whatever_their_size(start):
    program = start(workers=3)
    # 12 MB: as much as may wait for a receiver that is slow.
    flood = """
async def flood():
    for number in range(400):
        kore.sendobj([number, "x" * (number % 7 * 10000)])
        if number % 20 == 0:
            await kore.suspend(1)
    kore.sendobj("end")
kore.task_create(flood())
"""
    run(program, 1, flood)
    expected = [[number, "x" * (number % 7 * 10000)] for number in range(400)] + ["end"]
    for worker in (1, 2, 3):
        wait_until(lambda w=worker: got(program, w)[-1:] == ["end"], "the last one", seconds=60)
        assert got(program, worker) == expected


@pytest.mark.parametrize("size", [0, 1, 65_000, 65_536, 200_000, 5_000_000])
def test_an_object_may_be_large(start, size):
    program = start()
    run(program, 1, f"kore.sendobj('abc' * {size} + 'end', worker=2)")
    assert wait_for(program, 2, 1) == ["abc" * size + "end"]


def test_the_longest_object_arrives_and_a_longer_one_is_refused(start):
    program = start()
    run(program, 1, f"kore.sendobj('x' * {OBJECT_BYTES_MAX - 100}, worker=2)")
    (text,) = wait_for(program, 2, 1)
    assert text == "x" * (OBJECT_BYTES_MAX - 100)
    run(program, 1, f"kore.sendobj('x' * {OBJECT_BYTES_MAX}, worker=2)")
    program.wait_for(r"koreapp.onmsg: uncaught exception: ValueError\('a message of \d+ bytes: at most 16777216")
    run(program, 2, "record('still here')")
    assert wait_for(program, 2, 2)[-1] == "still here"


@pytest.mark.parametrize("worker", [-1, 0, 3, 4, 1001])
def test_an_id_that_no_worker_has_is_a_runtime_error(start, worker):
    program = start()
    run(program, 1, f"kore.sendobj('x', worker={worker})")
    program.wait_for(r"koreapp.onmsg: uncaught exception: RuntimeError\(.*their ids are 1 to 2")


@pytest.mark.parametrize("worker", ["True", "'1'", "1.0"])
def test_an_id_of_another_type_is_a_type_error(start, worker):
    program = start()
    run(program, 1, f"kore.sendobj('x', worker={worker})")
    program.wait_for("koreapp.onmsg: uncaught exception: TypeError")


def test_what_cannot_be_pickled_raises_at_the_call(start):
    program = start()
    run(program, 1, """
try:
    kore.sendobj(lambda: None)
except Exception as error:
    record(type(error).__name__)
""")
    assert wait_for(program, 1, 1)[0] in ("AttributeError", "PicklingError")


def test_sendobj_while_the_application_is_loaded_is_an_error_and_no_crash(start):
    program = start("""
try:
    kore.sendobj("from the parent")
except RuntimeError as error:
    kore.log(kore.LOG_INFO, f"refused: {error}")
""")
    program.wait_for(r"proc=\[parent\] log=\[refused: sendobj: workers send to workers")


def test_what_workers_send_from_workerstart_reaches_all_of_them(start):
    program = start("App.workerstart = lambda self: kore.sendobj(f'worker {kore.worker()} is there')\n", workers=3)
    for worker in (1, 2, 3):
        assert sorted(wait_for(program, worker, 3)) == [f"worker {k} is there" for k in (1, 2, 3)]


def test_without_a_hook_messages_are_dropped(start):
    program = start("del App.onmsg\n")
    assert http_get(program.address, "/run/1/00").endswith(b"sent")
    assert http_get(program.address).endswith(b"hello")
    program.signal(signal.SIGTERM)
    assert program.wait() == 0
    assert "onmsg" not in program.out


def test_what_the_hook_raises_is_logged_and_the_next_message_comes(start):
    program = start("""
class Poison:
    def __reduce__(self):
        return (int, ("no number",))
""")
    for poison in ("1 / 0", "raise SystemExit(3)", "kore.sendobj(Poison(), worker=1)"):
        run(program, 1, poison)
    for name in ("ZeroDivisionError", "SystemExit", "ValueError"):
        program.wait_for(rf"proc=\[wrk 1\] log=\[koreapp.onmsg: uncaught exception: {name}")
    run(program, 1, "record('next')")
    assert wait_for(program, 1, 1) == ["next"]


def test_a_tracer_hears_of_it_instead_of_the_log(start):
    program = start("kore.tracer(lambda kind, value, traceback: kore.log(kore.LOG_INFO, f'traced {kind.__name__}'))\n")
    run(program, 1, "1 / 0")
    program.wait_for("traced ZeroDivisionError")
    assert "uncaught" not in program.out


ASYNC = """
tasks = 0
gate = None
async def hook(self, obj):
    global tasks
    if isinstance(obj, Code):
        exec(obj.text, globals())
        return
    tasks += 1
    if obj == "fail early":
        raise ValueError(obj)
    if gate is None:
        await kore.suspend(1)
    else:
        await gate.wait()
    if obj == "fail late":
        raise ValueError(obj)
    record([obj, kore.task_id() >= 0])
App.onmsg = hook
"""


def test_an_async_hook_runs_as_a_task_and_its_exceptions_are_reported_alike(start):
    program = start(ASYNC)
    run(program, 1, "[kore.sendobj(text, worker=1) for text in ('fail early', 'fail late', 'good')]")
    assert wait_for(program, 1, 1) == [["good", True]]
    for text in ("early", "late"):
        program.wait_for(rf"koreapp.onmsg: uncaught exception: ValueError\('fail {text}'\)")


def test_async_hooks_are_bounded_and_none_is_lost(start):
    program = start(ASYNC)
    count = 2 * TASKS_MAX + 500
    run(program, 1, f"""
async def watch():
    global gate
    gate = asyncio.Event()
    for number in range({count}):
        kore.sendobj(number, worker=1)
    while tasks < {TASKS_MAX - 1}:
        await kore.suspend(10)
    await kore.suspend(200)
    kore.log(kore.LOG_INFO, f"tasks {{tasks}}")
    gate.set()
kore.task_create(watch())
""")
    assert int(program.wait_for(r"log=\[tasks (\d+)\]")[1]) <= TASKS_MAX
    assert sorted(number for number, _ in wait_for(program, 1, count)) == list(range(count))


def test_threads_may_send_and_their_objects_stay_whole(start):
    program = start()
    run(program, 1, """
def send(letter):
    for number in range(30):
        kore.sendobj(letter * 150000, worker=2)
async def threads():
    loop = asyncio.get_running_loop()
    await asyncio.gather(*[loop.run_in_executor(None, send, letter) for letter in "abcd"])
    kore.sendobj("end", worker=2)
kore.task_create(threads())
""")
    messages = wait_for(program, 2, 121)
    assert messages[-1] == "end"
    assert sorted(messages[:-1]) == [letter * 150000 for letter in "abcd" for _ in range(30)]


def test_a_killed_worker_costs_the_others_nothing_and_nothing_is_doubled(start):
    program = start(workers=3)
    _, second, _ = pids_of(program)
    run(program, 1, """
async def flood():
    for number in range(3000):
        kore.sendobj(number)
        if number % 10 == 0:
            await kore.suspend(1)
    kore.sendobj("end")
kore.task_create(flood())
""")
    wait_for(program, 2, 300)
    os.kill(second, signal.SIGKILL)
    successor = restarted(program, 2)
    for worker in (1, 3):
        wait_until(lambda w=worker: got(program, w)[-1:] == ["end"], "the last one")
        assert got(program, worker) == [*range(3000), "end"]
    wait_until(lambda: got(program, 2, successor)[-1:] == ["end"], "the last one")
    before, after = got(program, 2, second), got(program, 2, successor)
    assert before == list(range(len(before))), "the first process got them in order and once, up to its death"
    assert after == [*range(3000 - len(after) + 1, 3000), "end"], "the successor gets all from some point on"
    assert len(before) + len(after) <= 3001


def test_after_restarts_messages_are_delivered_once_and_the_hook_runs(start):
    program = start(workers=2)
    _, pid = pids_of(program)
    for count in (1, 2, 3):
        os.kill(pid, signal.SIGKILL)
        pid = restarted(program, 2, count)
        run(program, 1, f"kore.sendobj(['round', {count}])")
        assert wait_for(program, 2, 1, pid) == [["round", count]]
    run(program, 1, "record('done')")
    assert wait_for(program, 1, 4) == [["round", 1], ["round", 2], ["round", 3], "done"]
    run(program, 2, "record('done')")
    assert wait_for(program, 2, 2, pid) == [["round", 3], "done"]


def test_a_sender_that_dies_leaves_what_it_had_sent(start):
    program = start()
    run(program, 1, """
for number in range(20):
    kore.sendobj([number, "x" * 400000], worker=2)
kore.fatal("sent and gone")
""")
    program.wait_for(r"log=\[sent and gone\]")
    assert [number for number, _ in wait_for(program, 2, 20)] == list(range(20))


def test_a_worker_that_sleeps_holds_up_nobody_and_gets_its_own_afterwards(start):
    program = start(workers=3)
    # All of it in one request: another one might be accepted by the worker that sleeps.
    run(program, 1, """
kore.sendobj(Code("time.sleep(2); record('awake')"), worker=2)
kore.sendobj(Code("record('asleep still')"), worker=2)
for number in range(200):
    kore.sendobj(number)
""")
    for worker in (1, 3):
        assert wait_for(program, worker, 200) == list(range(200))
    assert got(program, 2) == [], "the others did not wait for it"
    assert wait_for(program, 2, 202) == ["awake", "asleep still", *range(200)]


def test_a_flood_to_a_stopped_worker_is_bounded_in_the_parent_and_told(start):
    program = start(workers=3)
    stopped = pids_of(program)[1]
    run(program, 3, "record('ready')")
    wait_for(program, 3, 1)
    run(program, 1, """
async def flood(_=None):
    for number in range(150):
        while True:
            try:
                kore.sendobj([number, "x" * 1000000], worker=2)
                break
            except RuntimeError:
                await kore.suspend(5)
        await kore.suspend(1)
    for number in range(100):
        kore.log(kore.LOG_INFO, f"line {number} of a flooding worker")
    kore.sendobj("end", worker=3)
async def begin():
    await kore.suspend(300)
    await flood()
kore.task_create(begin())
record("begun")
""")
    wait_for(program, 1, 1)
    os.kill(stopped, signal.SIGSTOP)
    before = rss(program.pid)
    assert wait_for(program, 3, 2) == ["ready", "end"], "the others talk to each other"
    assert rss(program.pid) - before < 3 * WAITING_BYTES_MAX
    program.wait_for(r"proc=\[parent\] log=\[\d+ messages for worker 2 were dropped: it does not take them fast")
    program.wait_for("line 99 of a flooding worker")
    assert len(re.findall(r"log=\[line \d+ of a flooding worker\]", program.out)) == 100, "no line lost its room"
    os.kill(stopped, signal.SIGCONT)
    numbers = [number for number, _ in wait_for(program, 2, 16)]
    assert numbers == list(range(len(numbers))), "what it was kept for it arrives whole, in order and once"


def test_when_the_parent_is_slow_the_caller_is_told_and_what_was_taken_arrives(start):
    program = start()
    run(program, 1, """
async def fill():
    await kore.suspend(300)
    number = 0
    try:
        while number < 200:
            kore.sendobj([number, "x" * 1000000], worker=1)
            number += 1
    except RuntimeError as error:
        record([str(error), number])
kore.task_create(fill())
record("begun")
""")
    wait_for(program, 1, 1)
    os.kill(program.pid, signal.SIGSTOP)
    try:
        _, (text, count) = wait_for(program, 1, 2)
        assert text.startswith("the parent is slow: ")
        assert 16 <= count < 40
    finally:
        os.kill(program.pid, signal.SIGCONT)
    messages = wait_for(program, 1, 2 + count)
    assert [number for number, _ in messages[2:]] == list(range(count))


def test_a_stop_in_the_middle_of_a_flood_is_a_stop(start):
    program = start("""
async def endless():
    while True:
        try:
            kore.sendobj("x" * 50000)
        except RuntimeError:
            pass
        await kore.suspend(1)
App.workerstart = lambda self: kore.task_create(endless())
App.onmsg = lambda self, obj: None
""")
    program.signal(signal.SIGTERM)
    assert program.wait(SECONDS) == 0, program.out
    assert "is killed" not in program.out
    assert program.err == ""
