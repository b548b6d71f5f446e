"""What the tests of the filter share: a child that puts it on and makes real calls, and a parent that hears of them."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]

SCRIPT = """
import ctypes, errno, mmap, os, select, signal, socket, sys, threading, time, traceback
from functools import partial
from kore.sandbox import notification, seccomp
from kore.sandbox.decoding import call_text
from kore.sandbox.machine import number_of, this_machine
from kore.sandbox.policy import Features

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long

def call(name, *arguments):
    "The result of a real system call: a number, or the name of its errno."
    number = name if isinstance(name, int) else number_of(name, this_machine())
    words = [value if isinstance(value, (bytes, ctypes.Array)) else ctypes.c_ulong(value & (1 << 64) - 1)
             for value in arguments]
    result = libc.syscall(ctypes.c_long(number), *words)
    return errno.errorcode[ctypes.get_errno()] if result == -1 else result

def hook(s):
    {rules}

def child(theirs):
    {before}
    def send(fd):
        return socket.send_fds(theirs, [b"x"], [fd]) == 1
    seccomp.confine(hook, Features({features}), {tracing}, send)
    {body}

seccomp.preload()
ours, theirs = socket.socketpair()
pid = os.fork()
if pid == 0:
    ours.close()
    code = 1
    try:
        child(theirs)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)
theirs.close()
fds = socket.recv_fds(ours, 1, 1)[1]
end = os.pidfd_open(pid)
poller = select.poll()
for fd in (*fds, end):
    poller.register(fd, select.POLLIN)
while not any(fd == end for fd, _ in poller.poll()):
    found = notification.receive(fds[0])
    if found is None:
        poller.unregister(fds[0])
        continue
    text = call_text(found.number, found.arguments, this_machine(), partial(notification.read_memory, found.thread))
    print("heard", text, flush=True)
    {answer}
print("status", os.waitpid(pid, 0)[1])
"""


class Outcome(NamedTuple):
    """How a child fared."""

    said: list[str]
    """The lines it printed."""
    heard: list[str]
    """The calls that its parent was asked about."""
    status: int
    errors: str


def confined(
    body: str, rules: str = "pass", *, before: str = "pass", features: str = "", tracing: bool = False,
    answer: str = "os.kill(pid, signal.SIGKILL)",
) -> Outcome:
    """Run `body` in a process of its own, under the filter of a worker with `rules` in front of it."""
    pytest.importorskip("pyseccomp")
    parts = {"body": body, "rules": rules, "before": before, "answer": answer}
    indented = {name: textwrap.indent(textwrap.dedent(text), "    ").strip() for name, text in parts.items()}
    code = SCRIPT.format(features=features, tracing=tracing, **indented)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    lines = done.stdout.splitlines()
    assert "\nstatus " in f"\n{done.stdout}", f"{done.stdout}\n{done.stderr}"
    return Outcome(
        [line for line in lines[:-1] if not line.startswith("heard ")],
        [line.removeprefix("heard ") for line in lines if line.startswith("heard ")],
        int(lines[-1].split()[1]),
        done.stderr,
    )


def values(body: str, rules: str = "pass", **options: str) -> list[object]:
    """What the expressions in `body`, one a line, are worth in such a process, which lives through all of them."""
    lines = [line.strip() for line in body.strip().splitlines()]
    found = confined("\n".join(f"print(repr(({line})))" for line in lines), rules, **options)
    assert found.status == 0, found
    assert not found.heard
    return [eval(line) for line in found.said]
