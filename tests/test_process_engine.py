"""Engines and processes: where a ring exists, what happens where none can be had, and that a forced engine is alone."""

from __future__ import annotations

import errno
import functools
import os
import select
import signal
import subprocess
import sys

import pytest

from tests.support import READY, SERVER_APP, children, free_port, open_files, pids_of, starter


@pytest.fixture
def start(tmp_path, engine):
    with starter(tmp_path) as programs:
        yield functools.partial(programs.serve, io=engine)


def test_no_ring_exists_in_the_parent(start, engine):
    program = start()
    assert not [link for link in open_files(program.pid) if "io_uring" in link]
    for pid in pids_of(program):
        assert sum("io_uring" in link for link in open_files(pid)) == (1 if engine == "uring" else 0)


NO_RING = """
import ctypes, os, struct, sys
# A seccomp filter (seccomp(2)) as containers have it: io_uring_setup is EPERM, everything else is allowed.
def step(code, jt, jf, k):
    return struct.pack("HBBI", code, jt, jf, k)
program = step(0x20, 0, 0, 0) + step(0x15, 0, 1, 425) + step(0x06, 0, 0, 0x00050001) + step(0x06, 0, 0, 0x7fff0000)
code = ctypes.create_string_buffer(program)
class Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_void_p)]
libc = ctypes.CDLL(None)
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, ctypes.byref(Program(4, ctypes.addressof(code))), 0, 0) == 0
os.execv(sys.executable, [sys.executable, "-m", "kore", "app.py"])
"""


@pytest.fixture
def ringless(tmp_path):
    with starter(tmp_path) as programs:
        source = SERVER_APP.format(text="", workers=1, options="", port=free_port(), deployment="dev")
        (tmp_path / "app.py").write_text(source)
        yield lambda environment: programs.python(NO_RING, environment)


def test_a_kernel_that_refuses_rings_is_a_line_of_the_log_and_epoll(ringless):
    program = ringless({})
    program.wait_for(READY)
    line = program.wait_for(r"proc=\[parent\] log=\[(.*using epoll.*)\]\n")[1]
    assert "io_uring_setup" in line or "io_uring_queue_init" in line
    assert "errno 1" in line
    assert "engine epoll" in program.out


def test_a_ring_that_was_demanded_and_refused_is_no_start(ringless):
    program = ringless({"KORE_IO": "uring"})
    assert program.wait() == 1
    assert program.err.startswith("kore: KORE_IO=uring: ")
    assert program.err.count("\n") == 1
    assert "ready" not in program.out


def test_kqueue_demanded_where_there_is_none_is_no_start(tmp_path):
    if hasattr(select, "kqueue"):
        pytest.skip("there is a kqueue here")
    with starter(tmp_path) as programs:
        program = programs.serve(io="kqueue", wait=False)
        assert program.wait() == 1
        assert program.err.startswith("kore: KORE_IO=kqueue: kqueue: there is no kqueue on this system (errno 38): ")
        assert program.err.count("\n") == 1


def test_forced_epoll_makes_no_call_of_io_uring(tmp_path):
    strace = subprocess.run(["which", "strace"], capture_output=True, check=False)
    if strace.returncode != 0:
        pytest.skip("strace is not installed")
    source = SERVER_APP.format(text="", workers=1, options="", port=free_port(), deployment="dev")
    (tmp_path / "app.py").write_text(source)
    with starter(tmp_path) as programs:
        trace = "strace -f -qq -o trace -e trace=io_uring_setup,io_uring_enter,io_uring_register"
        command = [*trace.split(), sys.executable, "-m", "kore", "app.py"]
        program = programs.command(*command, environment={"KORE_IO": "epoll"})
        try:
            program.wait_for(READY)
        except AssertionError:
            if errno.errorcode[errno.EPERM] in program.err or "ptrace" in program.err:
                pytest.skip("strace may not trace here")
            raise
        (pid,) = children(program.pid)
        os.kill(pid, signal.SIGTERM)
        program.wait()
    assert "io_uring" not in (tmp_path / "trace").read_text()
