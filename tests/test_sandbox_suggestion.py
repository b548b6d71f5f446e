"""The line that tracing suggests opens the filter for the call that was refused, and as little else as it can."""

from __future__ import annotations

import errno
import os
import signal
import socket

import pytest

from kore.sandbox import policy, suggestion
from kore.sandbox.machine import X86_64, number_of
from kore.sandbox.policy import DEADLY, Features
from kore.sandbox.program import assemble
from kore.sandbox.rules import ALLOW, KILL_PROCESS, NOTIFY, refuse
from kore.sandbox.seccomp import new_seccomp, parts_of
from kore.sandbox.suggestion import PATHS, line_for
from tests import bpf

pytest.importorskip("pyseccomp")

PID = 4321
WRITES = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC


def decided(call, arguments, hook=(), features=None, *, tracing=False):
    """What a worker's filter with the lines of `hook` decides."""
    rules = new_seccomp(X86_64)
    for line in hook:
        exec(line, {"s": rules})
    worker = policy.worker_rules(features or Features(), PID, deadly=KILL_PROCESS, tracing=tracing)
    program = assemble([*parts_of(rules), *worker], policy.default(tracing=tracing), X86_64)
    return bpf.run(program, number_of(call, X86_64), arguments)


REFUSED = [
    ("mkdir", (4096, 0o777), 's.allow("mkdir")', None),
    ("connect", (3, 4096, 16), 's.allow("connect")', None),
    ("execve", (4096, 0, 0), 's.allow("execve", dangerous=True)', None),
    ("tkill", (1, 9), 's.allow("tkill", dangerous=True)', None),
    ("vfork", (), 's.allow("vfork", dangerous=True)', None),
    ("openat", (0xFFFFFF9C, 4096, WRITES), 's.allow_arg("openat", 2, 0o2001101, dangerous=True)', (0, 0, os.O_RDWR)),
    ("open", (4096, os.O_RDWR), 's.allow_arg("open", 1, 0o2, dangerous=True)', (0, os.O_WRONLY)),
    ("mmap", (0, 4096, 5, 2, 3), 's.allow_arg("mmap", 2, 5, dangerous=True)', (0, 4096, 7)),
    ("mprotect", (0, 4096, 7), 's.allow_arg("mprotect", 2, 7, dangerous=True)', (0, 4096, 5)),
    ("clone", (0x1200011,), 's.allow_arg("clone", 0, 0x1200011, dangerous=True)', (0x11,)),
    ("kill", (1, 15), 's.allow_arg("kill", 1, 15, dangerous=True)', (1, signal.SIGKILL)),
    ("tgkill", (1, 1, 10), 's.allow_arg("tgkill", 2, 10, dangerous=True)', (1, 1, 9)),
    ("ioctl", (1, 0x80045430, 0), 's.allow_arg("ioctl", 1, 0x80045430, dangerous=True)', (1, 0x5412)),
    ("fcntl", (1, 6, 0), 's.allow_arg("fcntl", 1, 6, dangerous=True)', (1, 8)),
    ("prctl", (999,), 's.allow_arg("prctl", 0, 999, dangerous=True)', (1,)),
    ("prctl", ((1 << 64) - 5,), 's.allow_arg("prctl", 0, -5, dangerous=True)', (1,)),
    ("prlimit64", (0, 7, 4096), 's.allow_arg("prlimit64", 1, 7, dangerous=True)', (0, 6, 4096)),
    ("socket", (socket.AF_PACKET, 3, 0), 's.allow_arg("socket", 0, 17, dangerous=True)', (socket.AF_INET, 1, 0)),
    ("socketpair", (2, 1, 0), 's.allow_arg("socketpair", 0, 2)', (10, 1, 0)),
    ("setsockopt", (3, 1, 26), 's.allow_arg("setsockopt", 2, 26, dangerous=True)', (3, 1, 50)),
    ("setsockopt", (3, 0, 1), 's.allow_arg("setsockopt", 1, 0, dangerous=True)', (3, 263, 1)),
    ("setsockopt", (3, 41, 49), 's.allow_arg("setsockopt", 1, 41, dangerous=True)', (3, 263, 1)),
    ("sendto", (3, 0, 0, 0x20000000), 's.allow_arg("sendto", 3, 0x20000000)', (3, 0, 0, 0x20000001)),
    ("sendmsg", (3, 0, 0x20000000), 's.allow_arg("sendmsg", 2, 0x20000000)', (3, 0, 0x20000001)),
    ("sendmmsg", (3, 0, 1, 0x20000000), 's.allow_arg("sendmmsg", 3, 0x20000000)', (3, 0, 1, 0x20000001)),
]
CONNECTS = {"sendto", "sendmsg", "sendmmsg"}


@pytest.mark.parametrize(("call", "arguments", "line", "other"), REFUSED)
def test_the_line_allows_the_call_and_others_stay_refused(call, arguments, line, other):
    features = Features(connect=call in CONNECTS, resolver=call in CONNECTS)
    filled = (*arguments, 0, 0, 0, 0, 0, 0)[:6]
    assert line_for(call, filled) == line
    assert decided(call, filled, features=features) != ALLOW
    assert decided(call, filled, [line], features) == ALLOW
    if other is not None:
        assert decided(call, other, [line], features) == decided(call, other, (), features) != ALLOW


@pytest.mark.parametrize(("call", "arguments", "line", "other"), REFUSED)
def test_tracing_is_asked_about_each_of_them_until_the_line_is_there(call, arguments, line, other):
    features = Features(connect=call in CONNECTS, resolver=call in CONNECTS)
    assert decided(call, arguments, (), features, tracing=True) == NOTIFY
    assert decided(call, arguments, [line], features, tracing=True) == ALLOW


def test_every_call_that_the_policy_refuses_for_an_argument_is_allowed_by_argument():
    by_argument = set()
    for features in (Features(), Features(write=True, connect=True, resolver=True)):
        rules = policy.worker_rules(features, PID, deadly=KILL_PROCESS)
        conditioned = {rule.call for rule in rules if rule.conditions}
        by_argument |= conditioned - {rule.call for rule in rules if rule.action == refuse(errno.ENOSYS)}
    assert by_argument == {*suggestion.ARGUMENT, "setsockopt"}


def test_all_deadly_calls_and_no_others_end_a_worker():
    assert all(suggestion.is_deadly(call) for calls in DEADLY.values() for call in calls)
    assert not any(map(suggestion.is_deadly, ("mkdir", "openat", "kill", "ioctl")))


def test_a_call_without_a_name_has_no_line():
    assert line_for("system call 9999", (0,) * 6) is None


def test_paths_are_arguments_that_are_shown_as_such():
    from kore.sandbox.decoding import SIGNS

    assert {call: SIGNS[call][index] for call, index in PATHS.items()} == dict.fromkeys(PATHS, "s")
