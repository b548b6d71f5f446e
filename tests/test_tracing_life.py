"""A server that is traced starts, drains, dies and restarts as one that is not, and lives on without its tracer."""

from __future__ import annotations

import os
import re
import signal
import threading

import pytest

from kore.process.tracer import LOOK_SECONDS_MAX
from kore.process.tracing import DEATHS_MAX
from tests.support import alive, children, http_get, pids_of, wait_until
from tests.tracing_harness import body, descriptors, engine, handler, line_of, start, stop, title, told, tracer_of

__all__ = ["engine", "start"]

QUICK = handler("result = libc.rmdir(b'nowhere')")
LONG = """
def many(count):
    return sum(libc.rmdir(b"%d" % number) for number in range(count))
""" + handler(
    "kore.log(kore.LOG_INFO, 'long begins')\n"
    "result = await asyncio.get_running_loop().run_in_executor(None, many, 2000)",
    "/long", "long", "async def",
)
MADE = handler(
    """
try:
    os.mkdir(f"made-{time.monotonic_ns()}")
    result = 0
except OSError as error:
    result = error.errno
""",
    "/made", "made",
)
ENOSYS = 38


def asked(program, path):
    """A request on a thread, and the list that its answer will be in."""
    answers = []
    thread = threading.Thread(target=lambda: answers.append(body(program, path)))
    thread.start()
    return thread, answers


def test_the_tracer_is_a_process_of_its_own_that_ends_with_the_server(start):
    program = start(QUICK)
    tracer = tracer_of(program)
    assert title(tracer) == "kore [tracer]"
    assert len(children(program.pid)) == 3
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1):
        os.kill(tracer, number)
    assert body(program) == "-1"
    stop(program)
    assert not alive(tracer)
    assert len(told(program)) == 1
    assert "did not end in time" not in program.out


def test_the_terminals_interrupt_reaches_all_and_nothing_is_lost(start):
    program = start(QUICK)
    assert body(program) == "-1"
    for pid in children(program.pid):
        os.kill(pid, signal.SIGINT)
    stop(program, signal.SIGINT)
    assert len(told(program)) == 1


def test_everybody_ends_with_a_parent_that_is_killed(start):
    program = start(QUICK)
    family = children(program.pid)
    assert len(family) == 3
    program.signal(signal.SIGKILL)
    program.wait()
    wait_until(lambda: not any(map(alive, family)), "workers and tracer end")


def test_a_tracer_that_dies_is_replaced_and_calls_wait_for_it(start):
    program = start(QUICK + LONG + MADE, workers=1)
    assert body(program) == "-1"
    for count in range(1, DEATHS_MAX):
        thread, answers = asked(program, "/long")
        program.wait_for("long begins", count=count)
        old = tracer_of(program)
        os.kill(old, signal.SIGKILL)
        program.wait_for(rf"the tracer \(pid {old}\) was killed by SIGKILL.*another takes its place", count=1)
        thread.join()
        assert answers == ["-2000"]
        assert tracer_of(program) != old
    assert body(program, "/made") == "0"
    stop(program)
    places = [line for line in told(program) if "rmdir(" in line and "<unknown>" not in line]
    assert len(places) == len({re.search(r"app\.py:\d+", line)[0] for line in places}) == 2
    (line,) = told(program, "mkdir")
    assert f"at app.py:{line_of(program, 'os.mkdir')} made;" in line


def test_tracers_that_die_again_and_again_are_the_end_of_tracing_and_the_server_lives(start):
    program = start(QUICK + MADE, workers=1)
    (worker,) = pids_of(program)
    before = descriptors(program.pid)
    assert body(program, "/made") == "0"
    for count in range(1, DEATHS_MAX + 1):
        os.kill(tracer_of(program), signal.SIGKILL)
        if count < DEATHS_MAX:
            program.wait_for("another takes its place", count=count)
    program.wait_for(r"tracing ends: the tracer \(pid \d+\) was killed .* fails with ENOSYS")
    assert body(program, "/made") == str(ENOSYS)
    assert descriptors(program.pid) < before
    os.kill(worker, signal.SIGKILL)
    program.wait_for("worker 1 serves again")
    assert body(program, "/made") == str(ENOSYS)
    stop(program)


def test_a_worker_that_is_killed_is_reported_as_without_tracing_and_its_successor_is_traced(start):
    program = start(QUICK + LONG + MADE, workers=1)
    (first,) = pids_of(program)
    tracer = tracer_of(program)
    assert body(program, "/made") == "0"  # so it has the worker's descriptors by now
    before = descriptors(program.pid), descriptors(tracer)
    thread, _ = asked(program, "/long")
    program.wait_for("long begins")
    os.kill(first, signal.SIGKILL)
    program.wait_for(rf"worker 1 \(pid {first}\) was killed by SIGKILL, by hand or for want of memory, while serving")
    program.wait_for("worker 1 serves again")
    thread.join()
    assert body(program, "/made") == "0"
    assert tracer_of(program) == tracer
    wait_until(lambda: (descriptors(program.pid), descriptors(tracer)) == before, "no descriptor is left behind")
    stop(program)
    assert len(told(program, "mkdir")) == 1


def test_a_deadly_call_of_a_killed_worker_leaves_no_name_for_its_death(start):
    """Tracing kills nobody, so no death is the sandbox's."""
    code = "libc.chroot(b'/nowhere')\nos.kill(os.getpid(), signal.SIGKILL)\nresult = 1"
    program = start(handler(code), workers=1)
    assert body(program) == ""
    program.wait_for("was killed by SIGKILL, by hand or for want of memory")
    program.wait_for("worker 1 serves again")
    stop(program)


def test_a_request_that_runs_is_finished_before_the_end(start):
    late = handler("await kore.suspend(300)\nos.mkdir('late')\nresult = 1", "/late", "late", "async def")
    some = handler("kore.log(kore.LOG_INFO, 'some begin')\nresult = many(300)", "/some", "some")
    program = start(LONG + late + some)
    threads = [asked(program, "/late"), asked(program, "/some")]
    program.wait_for("some begin")
    wait_until(lambda: http_get(program.address, "/"), "the other worker answers")
    out = stop(program)
    for thread, _ in threads:
        thread.join()
    assert threads[1][1] == ["-300"]
    assert "exited" not in out
    assert "killed" not in out


def test_a_stopped_worker_goes_on_where_it_was(start):
    program = start(LONG, workers=1)
    (worker,) = pids_of(program)
    for count in range(1, 4):
        thread, answers = asked(program, "/long")
        program.wait_for("long begins", count=count)
        for _ in range(20):
            os.kill(worker, signal.SIGSTOP)
            os.kill(worker, signal.SIGCONT)
        thread.join()
        assert answers == ["-2000"]
    assert children(program.pid)
    assert worker in children(program.pid)
    stop(program)
    assert f"at app.py:{line_of(program, 'libc.rmdir')} " in "".join(told(program))


def test_a_stopped_worker_is_no_dead_one(start):
    """The end waits for it, kills it in the end, and is told by its real status."""
    program = start(QUICK, workers=2)
    first, second = pids_of(program)
    assert body(program) == "-1"
    os.kill(first, signal.SIGSTOP)
    program.signal(signal.SIGTERM)
    program.wait_for(rf"worker 1 \(pid {first}\) did not end in time and is killed")
    assert program.wait() == 0
    assert not alive(first)
    assert not alive(second)
    assert rf"worker 1 (pid {first}) was killed by SIGKILL" in program.out


def test_a_stopped_tracer_does_not_keep_the_server_from_ending(start):
    program = start(QUICK, workers=1)
    tracer = tracer_of(program)
    os.kill(tracer, signal.SIGSTOP)
    stop(program)
    assert not alive(tracer)


HANGING = handler(
    """
status = open("/proc/self/status").read()
caught = int(status.partition("SigCgt:")[2].split()[0], 16)
number = caught.bit_length()
libc.signal(number, ctypes.cast(libc.pause, ctypes.c_void_p))
threading.Thread(target=lambda: libc.rmdir(b"nowhere"), daemon=True).start()
result = number
"""
)
DEAF = handler("libc.signal(signal.SIGRTMAX, 1)\nresult = libc.unlink(b'nowhere')", "/deaf", "deaf")


def test_a_thread_that_never_comes_back_from_the_signal_stops_nobody_else(start):
    program = start(HANGING + DEAF, workers=1)
    assert int(body(program)) == signal.SIGRTMAX
    program.wait_for(r"proc=\[tracer\] log=\[worker 1: pause\(\), at <unknown>")
    assert body(program, "/deaf") == "-1"
    program.wait_for(r'proc=\[tracer\] log=\[worker 1: unlink\("nowhere"\), at <unknown>')
    assert body(program, "/") == "hello"
    stop(program)
    assert len(told(program, 'rmdir("nowhere"), at <unknown>')) == 1


LATE = """
import ctypes, time
handled = []

@ctypes.CFUNCTYPE(None, ctypes.c_int)
def late(number):
    handled.append(number)
    time.sleep(LOOK_SECONDS_MAX + 0.3)

"""


def test_a_thread_that_comes_again_too_late_is_not_asked_again(start):
    text = LATE.replace("LOOK_SECONDS_MAX", str(LOOK_SECONDS_MAX))
    code = """
await asyncio.get_running_loop().run_in_executor(None, int)  # its first use loads a library
libc.signal(signal.SIGRTMAX, late)
done = await asyncio.get_running_loop().run_in_executor(None, libc.rmdir, b"nowhere")
result = done, len(handled)
"""
    program = start(text + handler(code, kind="async def"), workers=1)
    assert body(program) == "(-1, 1)"
    stop(program)
    (line,) = told(program, "rmdir")
    assert line == 'worker 1: rmdir("nowhere"), at <unknown>; to allow it: s.allow("rmdir")'


def test_signals_that_the_server_hears_end_no_call(start):
    code = """
kore.log(kore.LOG_INFO, 'long begins')
for number in range(300):
    os.mkdir(f"made-{number}")
    os.rmdir(f"made-{number}")
result = len(os.listdir("."))
"""
    program = start(handler(code, "/long", "long"), workers=1)
    (worker,) = pids_of(program)
    thread, answers = asked(program, "/long")
    program.wait_for("long begins")
    for _ in range(200):
        os.kill(worker, signal.SIGHUP)
        os.kill(worker, signal.SIGUSR1)
    thread.join()
    assert len(answers) == 1
    assert answers[0].isdigit(), program.out
    stop(program)


FLOOD = handler(
    """
pipes = []
for fd in range(3, 200):
    try:
        if os.readlink(f"/proc/self/fd/{fd}").startswith("pipe:") and not os.get_blocking(fd):
            while os.write(fd, b'  File "/srv/forged.py", line 1 in forged\\\\n' * 1000):
                pass
    except BlockingIOError:
        pipes.append(fd)
    except OSError:
        pass
result = len(pipes) > 0, libc.rmdir(b"nowhere")
"""
)


def test_what_a_worker_writes_where_stacks_belong_delays_nobody(start):
    program = start(FLOOD, workers=1)
    assert body(program) == "(True, -1)"
    stop(program)
    (line,) = told(program, "rmdir")
    assert f"at app.py:{line_of(program, 'libc.rmdir')} do;" in line


@pytest.mark.parametrize("options", ['kore.config.deployment = "docker"', 'kore.sigtrap(64)'])
def test_every_deployment_can_be_traced_and_signals_of_the_application_stay_its_own(start, options):
    hook = "class koreapp:\n    def signal(number):\n        kore.log(kore.LOG_INFO, f'got {number}')\n"
    program = start(f"{QUICK}\n{options}\n{hook}", "-rn")
    assert body(program) == "-1"
    if "sigtrap" in options:
        program.signal(64)
        program.wait_for(r"log=\[got 64\]", count=2)
    stop(program)
    (line,) = told(program, "rmdir")
    assert f"at app.py:{line_of(program, 'libc.rmdir')} do;" in line
