"""Whole servers whose workers have a filter on: deaths have names, hooks are heard, the parent keeps its head."""

from __future__ import annotations

import functools
import os
import platform
import re
import signal
import socket
from pathlib import Path

import pytest

from tests.support import SECONDS, children, http_get, pids_of, skip_unless, starter, wait_until

pytest.importorskip("pyseccomp")


@pytest.fixture(params=["uring", "epoll"])
def engine(request):
    skip_unless(request.param)
    return request.param


@pytest.fixture
def start(tmp_path, engine, monkeypatch):
    monkeypatch.setenv("KORE_SANDBOX", "yes")
    with starter(tmp_path) as programs:
        yield functools.partial(programs.serve, io=engine)


def handler(code: str, path: str = "/do") -> str:
    """A route that runs `code` and answers with the value of `result`."""
    lines = "".join(f"    {line}\n" for line in code.strip().splitlines())
    return (
        "import ctypes, threading, time\n"
        f"@kore.route({path!r}, domain=home, methods=['get'])\n"
        f"def do(req):\n{lines}    req.response(200, repr(result).encode())\n"
    )


def body(program, path: str = "/do") -> str:
    return http_get(program.address, path).partition(b"\r\n\r\n")[2].decode()


def listeners(pid: int) -> int:
    found = 0
    for fd in os.listdir(f"/proc/{pid}/fd"):
        try:
            found += "seccomp notify" in os.readlink(f"/proc/{pid}/fd/{fd}")
        except OSError:
            pass  # closed meanwhile
    return found


def status(pid: int | str, field: str) -> str:
    return re.search(rf"^{field}:\s*(\S+)", Path(f"/proc/{pid}/status").read_text(), re.M)[1]


def stop(program) -> str:
    program.signal(signal.SIGTERM)
    assert program.wait() == 0, program.out + program.err
    return program.out


def test_every_thread_of_every_worker_has_one_filter_and_the_parent_has_none(start):
    program = start(handler("threading.Thread(target=time.sleep, args=(60,), daemon=True).start()\nresult = 1"))
    assert body(program) == "1"
    for pid in pids_of(program):
        for thread in os.listdir(f"/proc/{pid}/task"):
            text = Path(f"/proc/{pid}/task/{thread}/status").read_text()
            assert re.search(r"^Seccomp:\s*2$", text, re.M)
            assert re.search(r"^Seccomp_filters:\s*1$", text, re.M)
            assert re.search(r"^NoNewPrivs:\s*1$", text, re.M)
        assert listeners(pid) == 0
    assert status(program.pid, "Seccomp") == "0"
    assert listeners(program.pid) == 2


def test_a_deadly_call_ends_its_worker_and_is_named_twice(start):
    program = start(handler("os.execv('/bin/true', ['true'])"), workers=1)
    (first,) = pids_of(program)
    assert body(program) == ""
    program.wait_for(rf'worker 1 \(pid {first}\) is killed: its sandbox forbids execve\("/bin/true", 0x\w+, 0x\w+\)')
    program.wait_for(
        rf"worker 1 \(pid {first}\) was killed for a system call its sandbox forbids, execve, while serving .*/do"
    )
    program.wait_for("worker 1 serves again")
    assert body(program, "/") == "hello"
    stop(program)


def test_a_deadly_call_of_a_thread_ends_the_whole_worker(start):
    code = """
thread = threading.Thread(target=lambda: ctypes.CDLL(None).ptrace(16, 1, 0, 0))
thread.start()
thread.join()
"""
    program = start(handler(code), workers=1)
    assert body(program) == ""
    program.wait_for(r"is killed: its sandbox forbids ptrace\(16, 1, 0, 0\)")
    program.wait_for("worker 1 serves again")
    stop(program)


def test_many_deaths_leave_no_descriptor_behind_and_successors_get_no_listener_of_others(start):
    program = start(handler("ctypes.CDLL(None).chroot(b'/')"), workers=2)
    before = len(os.listdir(f"/proc/{program.pid}/fd"))
    for count in range(1, 4):
        assert body(program) == ""
        program.wait_for("worker . serves again", count=count)
        assert [listeners(pid) for pid in children(program.pid)] == [0, 0]
    wait_until(lambda: len(os.listdir(f"/proc/{program.pid}/fd")) <= before, "the old listeners are closed")
    assert listeners(program.pid) == 2
    assert 'chroot("/")' in stop(program)


def test_a_worker_that_ends_otherwise_is_reported_as_before(start):
    program = start(workers=1)
    os.kill(pids_of(program)[0], signal.SIGKILL)
    program.wait_for("was killed by SIGKILL, by hand or for want of memory")
    program.wait_for("worker 1 serves again")
    stop(program)


HOOKS = """
class koreapp:
    @staticmethod
    def seccomp(s):
        assert type(s) is kore.pyseccomp
        kore.log(kore.LOG_INFO, f"hook {kore.worker()} {os.getpid()}")
        s.deny("uname", errno=1)
        %s
        s.deny("getppid", errno=2)

def kore_seccomp_hook():
    kore.log(kore.LOG_INFO, f"function {kore.worker()} {os.getpid()}")
"""
ASK = """
import errno
libc = ctypes.CDLL(None, use_errno=True)
result = [(libc.uname(0), ctypes.get_errno()), libc.getppid()]
"""


def test_both_hooks_are_called_in_each_worker_and_their_rules_come_first(start):
    program = start(HOOKS % "" + handler(ASK))
    assert body(program) == "[(-1, 1), -2]"  # the C library takes getppid for a call that cannot fail
    pids = pids_of(program)
    for name in ("function", "hook"):
        found = sorted(re.findall(rf"log=\[{name} (\d) (\d+)\]", program.out))
        assert {int(pid) for _, pid in found} == set(pids)
        assert [worker for worker, _ in found] == ["1", "2"]
    os.kill(pids[0], signal.SIGKILL)
    program.wait_for(r"log=\[hook \d \d+\]", count=3)
    program.wait_for("serves again")
    stop(program)


@pytest.mark.parametrize("statement", ["s.allow('nonsense')", "s.allow('execve')", "1 / 0"])
def test_an_exception_in_the_hook_is_told_and_the_rules_before_it_hold(start, statement):
    program = start(HOOKS % statement + handler(ASK), workers=1)
    found = eval(body(program))
    assert found[0] == (-1, 1)
    assert found[1] == program.pid
    program.wait_for(r"koreapp\.seccomp: .*(RuntimeError|ZeroDivisionError)")
    stop(program)


def test_raw_statements_that_the_kernel_does_not_take_stop_the_server(start):
    hook = "class koreapp:\n    @staticmethod\n    def seccomp(s):\n        s.bpf_stmt(0x20, 3)\n"
    program = start(hook, wait=False)
    assert program.wait() == 1
    assert re.search(r"seccomp filter: it cannot be installed .*Invalid argument", program.out + program.err)


def test_a_hook_that_takes_away_what_hands_over_the_listener_stops_the_server(start):
    hook = "class koreapp:\n    @staticmethod\n    def seccomp(s):\n        s.deny('sendmsg')\n"
    program = start(hook, wait=False)
    assert program.wait() == 1
    assert "the hook denies sendmsg" in program.out + program.err


OPENED = """
class koreapp:
    @staticmethod
    def seccomp(s):
        s.allow("clone", dangerous=True)
        s.allow("wait4")
"""


def test_a_process_that_the_application_made_dies_alone(start):
    code = """
pid = os.fork()
if pid == 0:
    os.execv("/bin/true", ["true"])
result = os.waitpid(pid, 0) == (pid, 9)
"""
    program = start(OPENED + handler(code), workers=1)
    pids = pids_of(program)
    assert body(program) == "True"
    program.wait_for(r'process \d+ of worker 1 is killed: its sandbox forbids execve\("/bin/true"')
    assert pids_of(program) == pids
    stop(program)


BODIES = """
@kore.route("/put", domain=home, methods=["put"])
def put(req):
    assert req.body_path is not None, "it is in a file"
    req.response(200, str(len(req.body)).encode())
"""


def test_files_are_served_and_bodies_kept_in_files(start, tmp_path):
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "page.html").write_text("x" * 100_000)
    text = BODIES + "home.filemaps({'/files/': 'files'})\n"
    program = start(text, options="kore.config.http_body_disk_offload = 1000", workers=1)
    assert body(program, "/files/page.html") == "x" * 100_000
    with socket.create_connection(program.address, timeout=SECONDS) as client:
        client.sendall(b"PUT /put HTTP/1.1\r\nHost: x\r\nContent-Length: 50000\r\nConnection: close\r\n\r\n")
        client.sendall(b"y" * 50_000)
        answer = b"".join(iter(lambda: client.recv(65536), b""))
    assert answer.endswith(b"\r\n\r\n50000")
    stop(program)


FORGERIES = {
    "a pipe": "channel.send_fd(Kind.LISTENER, b'', os.pipe()[0])",
    "nothing": "channel.send(Kind.LISTENER)",
    "a descriptor with a log line": "channel.send_fd(Kind.LOG, b'\\6hello', 0)",
    "a descriptor with ready": "channel.send_fd(Kind.READY, b'', 0)",
}


@pytest.mark.parametrize("what", FORGERIES)
def test_forged_descriptors_end_who_sends_them(start, what):
    code = f"""
from kore.process import role
from kore.process.channel import Kind
channel = role.role.channel
result = {FORGERIES[what]}
if result:
    time.sleep(30)
"""
    program = start(handler(code), workers=1)
    before = len(os.listdir(f"/proc/{program.pid}/fd"))
    if body(program):
        assert what != "nothing"  # the kernel does not even pass descriptors (Linux 6.16)
        assert body(program, "/") == "hello"
        stop(program)
        return
    program.wait_for(r"worker 1 \(pid \d+\) is killed: it sent a descriptor")
    program.wait_for("worker 1 serves again")
    wait_until(lambda: len(os.listdir(f"/proc/{program.pid}/fd")) <= before, "it is closed")
    stop(program)


def test_without_a_filter_nobody_may_send_a_listener(start, monkeypatch):
    monkeypatch.setenv("KORE_SANDBOX", "no")
    code = """
from kore.process import role
from kore.process.channel import Kind
from kore.sandbox import seccomp
from kore.sandbox.machine import this_machine
from kore.sandbox.program import assemble
from kore.sandbox.rules import ALLOW
fd = seccomp.install(assemble([], ALLOW, this_machine()), listener=True)
result = role.role.channel.send_fd(Kind.LISTENER, b"", fd)
if result:
    time.sleep(30)
"""
    program = start(handler(code), workers=1)
    assert status(pids_of(program)[0], "Seccomp") == "0"
    if body(program) == "False":  # the kernel does not even pass descriptors (Linux 6.16)
        stop(program)
        return
    program.wait_for(r"worker 1 \(pid \d+\) is killed: it sent a descriptor with a LISTENER")
    stop(program)


WAITS = """
import select, threading
ends = os.pipe()
found = []

def wait():
    poller = select.poll()
    poller.register(ends[0], select.POLLIN)
    found.append(threading.get_native_id())
    try:
        found.append(poller.poll(60_000) == [(ends[0], select.POLLIN)])
    except OSError as error:
        found.append(error.errno)

@kore.route("/begin", domain=home, methods=["get"])
def begin(req):
    global thread
    thread = threading.Thread(target=wait)
    thread.start()
    while not found:
        pass
    req.response(200, b"%d" % found[0])

@kore.route("/end", domain=home, methods=["get"])
def end(req):
    os.write(ends[1], b"x")
    thread.join()
    req.response(200, repr(found[1]).encode())
"""
WITHOUT = "class koreapp:\n    @staticmethod\n    def seccomp(s):\n        s.deny('restart_syscall', errno=38)\n"


def in_call(pid: int, thread: int, *numbers: str) -> bool:
    return Path(f"/proc/{pid}/task/{thread}/syscall").read_text().split()[0] in numbers


@pytest.mark.skipif(platform.machine() != "x86_64", reason="reads the numbers of system calls on x86-64")
@pytest.mark.parametrize(("rules", "goes_on"), [("", True), (WITHOUT, False)], ids=["with", "without"])
def test_a_wait_that_is_stopped_goes_on_by_a_call_of_its_own(start, rules, goes_on):
    """Restart_syscall(2): nobody writes it, the kernel makes it. Without it SIGCONT breaks waits.

    Those of libc's locks are among them, and it aborts then. So nobody else may wait here: the watchdog is off, and
    the worker has done with waiting for the interpreter's lock.
    """
    program = start(rules + WAITS, workers=1, options="kore.config.http_request_ms = 0")
    (pid,) = pids_of(program)
    thread = int(body(program, "/begin"))
    wait_until(lambda: in_call(pid, thread, "7"), "the thread waits in poll")
    wait_until(lambda: in_call(pid, pid, "426", "232", "281"), "the worker waits for its ring, or by epoll")
    os.kill(pid, signal.SIGSTOP)
    wait_until(lambda: status(f"{pid}/task/{thread}", "State") == "T", "the thread is stopped")
    os.kill(pid, signal.SIGCONT)
    assert (body(program, "/end") == "True") is goes_on
