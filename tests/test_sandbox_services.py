"""The tables of the services' system calls: short, known, none of them dangerous, and the deadly ones deadly."""

from __future__ import annotations

import errno

import pytest

from kore.sandbox import policy, service_policy
from kore.sandbox.machine import AARCH64, X86_64, known_anywhere, number_of
from kore.sandbox.program import assemble
from kore.sandbox.rules import ALLOW, KILL_PROCESS, refuse
from tests import bpf

pytest.importorskip("pyseccomp")

MACHINES = [pytest.param(machine, id=machine.name) for machine in (X86_64, AARCH64)]
PID = 4321


def program(machine, *, write: bool, role: str = "keymgr") -> bytes:
    rules = service_policy.service_rules(role, write=write, resolver=False, pid=PID, deadly=KILL_PROCESS)
    return assemble(rules, policy.default(), machine)


def run(machine, call: str, arguments=(), *, write: bool = False) -> int:
    return bpf.run(program(machine, write=write), number_of(call, machine), arguments, audit=machine.audit)


def test_every_name_is_a_call_says_what_it_is_for_and_is_not_dangerous():
    for table in (*service_policy.CALLS.values(), service_policy.WRITES):
        for call, reason in table.items():
            assert known_anywhere(call), call
            assert reason.strip(), call
            assert call not in policy.DANGEROUS, call


def test_the_key_manager_has_less_than_a_worker():
    """What it alone has, beside files, is nothing: the listing is of its store of certificates."""
    workers = {call for calls in policy.ALLOWED.values() for call in calls}
    assert not set(service_policy.CALLS["keymgr"]) - workers
    assert len(service_policy.CALLS["keymgr"]) < len(policy.ALLOWED["always"])


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("write", [False, True])
def test_deadly_calls_and_rings_are_what_they_are_to_workers(machine, write):
    for call in (call for calls in policy.DEADLY.values() for call in calls):
        if number_of(call, machine) is not None:
            assert run(machine, call, write=write) == KILL_PROCESS, call
    for call in (*policy.RINGS, "io_uring_enter"):
        assert run(machine, call, write=write) == refuse(errno.EPERM)


@pytest.mark.parametrize("machine", MACHINES)
def test_there_is_no_network(machine):
    for call in ("socket", "socketpair", "connect", "bind", "listen", "accept4", "setsockopt", "shutdown"):
        for arguments in ((1, 5, 0), (2, 1, 6), (10, 2, 17), (16, 3, 0), (40, 1, 0)):
            assert run(machine, call, arguments, write=True) == refuse(errno.EACCES), call


@pytest.mark.parametrize("machine", MACHINES)
def test_files_are_written_to_only_where_that_was_declared(machine):
    for flags in (0o1, 0o2, 0o101, 0o1001, 0o20200002):
        assert run(machine, "openat", (-100 & 2**64 - 1, 0, flags)) == refuse(errno.EACCES)
        assert run(machine, "openat", (-100 & 2**64 - 1, 0, flags), write=True) == ALLOW
    assert run(machine, "openat", (-100 & 2**64 - 1, 0, 0o2000000)) == ALLOW
    for call in service_policy.WRITES:
        if number_of(call, machine) is not None:
            assert run(machine, call) == refuse(errno.ENOSYS), call


@pytest.mark.parametrize("machine", MACHINES)
def test_threads_and_no_processes_memory_and_no_code(machine):
    assert run(machine, "clone", (policy.THREAD_FLAGS,)) == ALLOW
    for flags in (17, 0x4111, 0x10000011, policy.THREAD_FLAGS | 0x10000000):
        assert run(machine, "clone", (flags,)) == refuse(errno.EPERM)
    for call in ("mmap", "mprotect"):
        assert run(machine, call, (0, 4096, 3)) == ALLOW
        assert run(machine, call, (0, 4096, 7)) == refuse(errno.EACCES)
    assert run(machine, "kill", (PID, 9)) == ALLOW
    assert run(machine, "kill", (PID + 1, 0)) == refuse(errno.EPERM)
