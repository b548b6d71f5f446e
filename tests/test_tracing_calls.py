"""Tracing tells of each call site once, with its line, whatever the call and the thread; and every call goes on."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from tests.support import pids_of
from tests.tracing_harness import body, engine, handler, line_of, start, status, stop, told

__all__ = ["engine", "start"]

MKDIR = handler("os.mkdir(f'made-{time.monotonic_ns()}')\nresult = 1")


def test_a_call_site_is_told_once_with_its_line_and_what_allows_it(start):
    program = start(MKDIR)
    for _ in range(20):
        assert body(program) == "1"
    stop(program)
    (line,) = told(program)
    number = line_of(program, "os.mkdir(")
    assert re.fullmatch(
        rf'worker \d: mkdir\("made-\d+", 0777\), at app\.py:{number} do; to allow it: s\.allow\("mkdir"\)', line
    )
    assert len([name for name in os.listdir(program.directory) if name.startswith("made-")]) == 20


def test_two_lines_are_two_sites_and_the_innermost_line_of_the_application_counts(start):
    text = "def make(path):\n    os.makedirs(path)\n\n" + handler(
        "make('a/b')\nos.makedirs(chr(99))\nos.rename('c', 'd')\nresult = sorted(os.listdir('.'))"
    )
    program = start(text, workers=1)
    assert "['a', 'app.py', 'd'" in body(program)
    stop(program)
    places = [re.search(r": (\w+)\(.*at (\S+ \w+);", line).groups() for line in told(program)]
    assert places == [
        ("mkdir", f"app.py:{line_of(program, 'os.makedirs(path)')} make"),
        ("mkdir", f"app.py:{line_of(program, 'os.makedirs(chr')} do"),
        ("rename", f"app.py:{line_of(program, 'os.rename(')} do"),
    ]


KINDS = """
def call(number, *arguments):
    libc.syscall.restype = ctypes.c_long
    words = [each if isinstance(each, (bytes, ctypes.Array)) else ctypes.c_long(each) for each in arguments]
    ctypes.set_errno(0)
    done = libc.syscall(ctypes.c_long(number), *words)
    return done if done >= 0 else errno.errorcode[ctypes.get_errno()]

MOMENT = (ctypes.c_long * 2)(0, 2_000_000)
NOTHING = (ctypes.c_long * 2)(0, 0)
MASK = (ctypes.c_ulong * 1)(1 << 9)
ROOM = ctypes.create_string_buffer(256)

def every(poll):
    return [
        call({rt_sigtimedwait}, MASK, 0, MOMENT, 8),
        call({epoll_pwait2}, poll.fileno(), ROOM, 1, MOMENT, 0, 0),
        call({semtimedop}, -1, ROOM, 1, MOMENT),
        call({msgrcv}, -1, ROOM, 1, 0, 0),
        call({waitid}, 99, 0, ROOM, 0, 0),
        call({clock_settime}, 99, MOMENT),
        call({utimensat}, -100, b"nowhere", 0, 0),
        call({rmdir}, b"nowhere"),
        call({chroot}, b"nowhere"),
        call({io_getevents}, 0, 0, 1, ROOM, NOTHING),
        call({sched_yield}),
        call({rt_sigsuspend}, 0, 999),
        call({pidfd_send_signal}, -1, 0, 0, 0),
        call({ptrace}, 99, 0, 0, 0),
    ]
"""
NAMES = re.findall(r"\{(\w+)\}", KINDS)


def kinds():
    machine = pytest.importorskip("kore.sandbox.machine")
    return KINDS.format(**{name: machine.number_of(name, machine.this_machine()) for name in NAMES})


@pytest.mark.parametrize("where", ["handler", "thread"])
def test_every_kind_of_call_goes_on_as_without_a_filter_and_has_its_line(start, where):
    """Some wait, some restart after a signal and some never do: here none of them has begun when it is interrupted."""
    head = "import ctypes, errno, select\nlibc = ctypes.CDLL(None, use_errno=True)\n"
    tail = "print(every(select.epoll()))"
    unfiltered = subprocess.run([sys.executable, "-c", head + kinds() + tail], capture_output=True, check=True)
    expected = eval(unfiltered.stdout)
    code = "import select\npoll = select.epoll()\n"
    if where == "handler":
        code += "result = every(poll)"
    else:
        code += "result = await asyncio.get_running_loop().run_in_executor(None, every, poll)"
    kind = "def" if where == "handler" else "async def"
    program = start(handler(code, kind=kind) + kinds(), workers=1)
    assert eval(body(program)) == expected
    stop(program)
    for name in NAMES:
        (line,) = told(program, f": {name}(")
        # The innermost line is that of the helper; it is told of each call, because each is another line of the hook.
        assert f"at app.py:{line_of(program, 'done = libc.syscall')} call; " in line


def test_deadly_calls_are_told_as_such_and_go_on(start):
    program = start(handler("result = libc.chroot(b'/nowhere'), ctypes.get_errno()"), workers=1)
    assert body(program) == "(-1, 2)"
    stop(program)
    (line,) = told(program, "chroot")
    assert 'chroot("/nowhere") would end the worker, at app.py:' in line
    assert line.endswith('; to allow it: s.allow("chroot", dangerous=True)')


def test_arguments_that_are_refused_have_the_narrower_line(start):
    code = """
import socket
socket.socket(socket.AF_INET, socket.SOCK_STREAM).close()
try:
    socket.socket(socket.AF_INET6, socket.SOCK_DGRAM).connect(("::1", 9))
except OSError:
    pass
open('written', 'w').close()
open('written').close()
result = 1
"""
    program = start(handler(code), workers=1)
    assert body(program) == "1"
    stop(program)
    assert len(told(program, 's.allow_arg("socket", 0, 2, dangerous=True)')) == 1
    assert len(told(program, 's.allow_arg("socket", 0, 10, dangerous=True)')) == 1
    assert len(told(program, "connect(")) == len(told(program, "{[::1]:9}"))
    (line,) = told(program, "openat")
    assert 'openat(AT_FDCWD, "written", O_WRONLY|O_CREAT|O_TRUNC|O_CLOEXEC, 0666)' in line
    assert 's.allow_arg("openat", 2, 0o2001101, dangerous=True)' in line


def test_what_the_hook_allows_or_denies_is_not_told(start):
    hook = """
class koreapp:
    @staticmethod
    def seccomp(s):
        s.allow("mkdir")
        s.deny("rmdir", errno=99)
"""
    code = "os.mkdir('made')\ntry:\n    os.rmdir('made')\nexcept OSError as error:\n    result = error.errno"
    program = start(hook + handler(code), workers=1)
    assert body(program) == "99"
    stop(program)
    assert told(program) == []
    assert os.path.isdir(program.directory / "made")


def test_many_calls_at_the_start_are_all_made_and_each_site_is_told(start):
    lines = "".join(f"        self.count -= libc.rmdir(b'nowhere')  # {number}\n" for number in range(40))
    hook = f"""
class App:
    count = 0

    def workerstart(self):
        for _ in range(100):
            self.turn()
        kore.log(kore.LOG_INFO, f"count {{self.count}}")

    def turn(self):
{lines}
koreapp = App()
"""
    program = start(handler("result = 1") + hook, workers=2)
    assert program.out.count("log=[count 4000]") == 2
    stop(program)
    assert len(told(program)) == 40
    first = line_of(program, "self.count -= ")
    assert {int(re.search(r"app\.py:(\d+) turn;", line)[1]) for line in told(program)} == {*range(first, first + 40)}


def test_a_call_seen_often_is_not_looked_at_each_time_but_its_other_sites_are_found(start):
    code = """
for _ in range(1000):
    libc.rmdir(b'first')
for _ in range(100):
    libc.rmdir(b'second')
libc.unlink(b'third')
result = 1
"""
    program = start(handler(code), workers=1)
    assert body(program) == "1"
    stop(program)
    assert len(told(program, 'rmdir("first")')) == len(told(program, 'rmdir("second")')) == 1
    assert len(told(program, "unlink")) == 1


def test_threads_of_the_executor_have_their_line(start):
    text = "def work(path):\n    os.mkdir(path)\n" + handler(
        """
loop = asyncio.get_running_loop()
await asyncio.gather(*(loop.run_in_executor(None, work, f"in{n}") for n in range(8)))
await loop.run_in_executor(None, os.rmdir, "in0")
result = 1
""",
        kind="async def",
    )
    program = start(text, workers=1)
    assert body(program) == "1"
    stop(program)
    (line,) = told(program, "mkdir")
    assert f"at app.py:{line_of(program, 'os.mkdir(path)')} work;" in line
    (line,) = told(program, "rmdir")  # no frame of the thread's is the application's
    assert re.search(r"at /\S+/thread\.py:\d+ run, which is not the application's; ", line)


def test_calls_of_the_platforms_own_code_are_told_and_no_statement_of_the_hook(start):
    """What kore does about a refusal is kore's business; but it may have been handed a function to call."""
    code = "asyncio.get_running_loop().call_soon(os.mkdir, 'made')\nawait asyncio.sleep(0.001)\nresult = 1"
    program = start(handler(code, kind="async def"), workers=1)
    assert body(program) == "1"
    stop(program)
    (line,) = told(program)
    assert re.search(r', at kore/reactor/\w+\.py:\d+ \w+, which is kore\'s; to allow it: s\.allow\("mkdir"\)$', line)


def test_a_thread_without_python_is_unknown_and_not_waited_for(start):
    code = """
thread = ctypes.c_ulong()
libc.pthread_create(ctypes.byref(thread), None, ctypes.cast(libc.rmdir, ctypes.c_void_p), b"nowhere")
libc.pthread_join(thread, None)
result = 1
"""
    program = start(handler(code), workers=1)
    assert body(program) == "1"
    stop(program)
    (line,) = told(program)
    assert line == 'worker 1: rmdir("nowhere"), at <unknown>; to allow it: s.allow("rmdir")'


def test_a_thread_that_blocks_signals_goes_on_at_once_and_tells_its_line_later(start):
    code = """
old = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
os.mkdir("made")
result = os.path.isdir("made")
signal.pthread_sigmask(signal.SIG_SETMASK, old)
"""
    program = start(handler(code), workers=1)
    assert body(program) == "True"
    stop(program)
    (line,) = told(program)
    assert f"at app.py:{line_of(program, 'signal.pthread_sigmask(signal.SIG_SETMASK')} do;" in line


def test_programs_that_the_application_starts_run_and_their_calls_are_told_as_those_of_a_child(start):
    code = "import subprocess\nresult = subprocess.run(['/bin/echo', 'hi'], capture_output=True).stdout"
    program = start(handler(code), workers=1)
    assert body(program) == "b'hi\\n'"
    stop(program)
    (line,) = told(program, "execve")
    assert line.startswith('a child of worker 1: execve("/bin/echo", ')
    assert line.endswith('s.allow("execve", dangerous=True)')
    (line,) = told(program, "fork()")
    assert f"at app.py:{line_of(program, 'subprocess.run')} do;" in line


def test_the_workers_are_filtered_and_nobody_is_their_debugger(start):
    program = start(MKDIR)
    for pid in pids_of(program):
        assert status(pid, "Seccomp") == "2"
        assert status(pid, "TracerPid") == "0"
    program.wait_for(r"proc=\[parent\] log=\[seccomp_tracing: ")
    stop(program)
