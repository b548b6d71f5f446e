"""The spawner on a real kernel: what it and its programs may, their bounds and ends, and servers that have one."""

from __future__ import annotations

import asyncio
import errno
import os
import re
import resource
import select
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from driver_harness import fds
from engines import skip_unconfined
from reactor_harness import ENGINES, open_loop, run
from spawner_harness import hiring
from support import SECONDS, SERVER_APP, alive, free_port, http_get, open_files, starter, wait_until

import kore
from kore import reactor
from kore.errors import SandboxError
from kore.reactor import spawning
from kore.sandbox import landlock
from kore.sandbox import spawner_process as spawner_module
from kore.sandbox.requests import BODY_BYTES_MAX
from kore.sandbox.spawner import Terms, start_spawner

pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning", "error::ResourceWarning")

needs_landlock = pytest.mark.skipif(landlock.abi() < 6, reason="needs Landlock ABI 6")


@pytest.fixture
def hire():
    """Makes spawners and uses them for kore.proc; each ends with the test."""
    yield from hiring()


@pytest.fixture(params=ENGINES)
def loop(request, hire):
    """A loop on each engine."""
    for loop, _ in open_loop(request.param):
        yield loop


async def said(command: str, **options) -> tuple[bytes, int]:
    """What a program writes, and its status."""
    proc = kore.proc(command, **options)
    heard = b""
    while (piece := await proc.recv(65536)) is not None:
        heard += piece
    return heard, await proc.reap()


def status_of(pid: int | str) -> dict[str, str]:
    """The lines of /proc/PID/status."""
    return dict(re.findall(r"(\w+):\t(.*)", Path(f"/proc/{pid}/status").read_text()))


# What it and its programs may.


def test_it_has_given_up_what_it_can(hire) -> None:
    """Before the first request: capabilities, new privileges, core files, descriptors, and being looked into."""
    inheritable = os.open("/dev/null", os.O_RDONLY)
    os.set_inheritable(inheritable, True)
    spawner = hire(prepare=lambda: Path("/proc/self/comm").write_text("spawner"))
    os.close(inheritable)
    status = status_of(spawner.pid)
    assert status["Name"] == "spawner"
    assert status["NoNewPrivs"] == "1"
    assert {int(status[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")} == {0}
    assert status["Threads"] == "1"
    assert "Max core file size        0 " in Path(f"/proc/{spawner.pid}/limits").read_text()
    if os.geteuid() != 0:  # root alone can look into what is not dumpable
        with pytest.raises(PermissionError):
            os.listdir(f"/proc/{spawner.pid}/fd")
        return
    open_there = sorted(open_files(spawner.pid))
    assert [name.partition(":")[0] for name in open_there] == ["/dev/null"] * 3 + ["anon_inode"] * 2 + ["socket"] * 3


def test_its_programs_have_no_privileges(loop, hire) -> None:
    """Neither by birth nor by a set-user-ID file."""
    hire()

    async def main():
        text, status = await said("grep -E ^(Cap|NoNew|Seccomp|SigIgn) /proc/self/status")
        found = dict(line.split() for line in text.decode().splitlines())
        assert status == 0
        assert {int(found[name], 16) for name in ("CapInh:", "CapPrm:", "CapEff:", "CapAmb:")} == {0}
        assert found["NoNewPrivs:"] == "1"

    run(loop, main())


@needs_landlock
def test_files_of_its_programs(loop, hire, tmp_path) -> None:
    """They read and run what is there, write to /dev/null and where they are told they may, and nowhere else."""
    (tmp_path / "may").mkdir()
    (tmp_path / "file").write_text("there")
    hire(write=("/dev/null", str(tmp_path / "may")))

    async def main():
        assert await said(f"cat {tmp_path}/file") == (b"there", 0)
        assert await said("sh -c 'echo x > /dev/null'") == (b"", 0)
        assert await said(f"sh -c 'echo x > {tmp_path}/may/new && cat {tmp_path}/may/new'") == (b"x\n", 0)
        for attempt in (f"touch {tmp_path}/new", f"rm {tmp_path}/file", f"mkdir {tmp_path}/new", "touch /tmp/kore-new"):
            text, status = await said(attempt)
            assert b"Permission denied" in text
            assert status == 1
        text, status = await said(f"sh -c 'cp /bin/true {tmp_path}/may/own && chmod +x {tmp_path}/may/own && "
                                  f"{tmp_path}/may/own && echo ran'")
        assert text == b"ran\n", "any program may run: what is written as well"

    run(loop, main())


@needs_landlock
def test_processes_and_ports_are_out_of_reach(loop, hire) -> None:
    """Of the worker and everybody else: no signal, no trace, no memory, no connection; but their own children."""
    hire()
    code = (
        "import ctypes, os, socket, sys\n"
        "worker, port = int(sys.argv[1]), int(sys.argv[2])\n"
        "def refused(call, *args):\n"
        "    try: call(*args)\n"
        "    except OSError as error: return error.errno\n"
        "    return 0\n"
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        "def trace(): \n"
        "    if libc.ptrace(0x4206, worker, 0, 0) < 0: raise OSError(ctypes.get_errno(), '')\n"
        "print(refused(os.kill, worker, 0), refused(trace), refused(open, f'/proc/{worker}/mem'),\n"
        "      refused(socket.socket().connect, ('127.0.0.1', port)),\n"
        "      refused(socket.socket().bind, ('127.0.0.1', 0)))\n"
    )

    async def main():
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
            text, status = await said(f'{sys.executable} -c "{code}" {os.getpid()} {port}')
            assert (text.decode().split(), status) == (
                [str(errno.EPERM), str(errno.EPERM), str(errno.EACCES), str(errno.EACCES), str(errno.EACCES)], 0)
            hire(connect_ports=(port,))
            text, _ = await said(f'{sys.executable} -c "{code}" {os.getpid()} {port}')
            assert text.split()[3] == b"0"
        assert await said("sh -c 'sleep 1000 & kill $! && echo killed'") == (b"killed\n", 0)

    run(loop, main())


@needs_landlock
def test_programs_that_are_listed(loop, hire, tmp_path) -> None:
    """They start, with their interpreters; others do not, neither here nor by them. What is not there is told."""
    script = tmp_path / "script"
    script.write_text("#!/bin/sh\necho script; /bin/ls / 2>&1; exit 7\n")
    script.chmod(0o755)
    cat = subprocess.run(["sh", "-c", "command -v cat"], capture_output=True, text=True).stdout.strip()
    spawner = hire(programs=(str(script), cat, str(tmp_path / "gone")))
    assert spawner.told == (f"kore.config.sandbox_programs: {tmp_path / 'gone'}: No such file or directory",)

    async def main():
        assert await said("cat /dev/null") == (b"", 0)
        text, status = await said(str(script))
        assert text.startswith(b"script\n")
        assert b"Permission denied" in text
        assert status == 7
        for other in ("ls", "/bin/ls", "sh -c true", sys.executable):
            with pytest.raises(RuntimeError, match="cannot be started: not among the programs of .*sandbox_programs"):
                kore.proc(other)
        with pytest.raises(RuntimeError, match="No such file"):
            kore.proc("/bin/no-such-program")

    run(loop, main())


def test_no_programs(loop) -> None:
    """`none`: no spawner, and proc() says which option to change."""
    spawning.refuse("kore.config.sandbox_programs is none")

    async def main():
        with pytest.raises(RuntimeError, match="'true' cannot be started: kore.config.sandbox_programs is none"):
            kore.proc("true")
        with pytest.raises(PermissionError, match="sandbox_programs is none"):
            await asyncio.create_subprocess_exec("true")

    run(loop, main())
    spawning.use(None)


def test_a_filter_that_cannot_be_installed(hire) -> None:
    """A right that cannot be given up is an error of the start, with its reason; nothing is left running."""
    order = []

    def fail():
        raise SandboxError("filter", "no such call")

    mine = Path(f"/proc/self/task/{os.getpid()}/children")  # zombies too
    before, others = fds(), mine.read_text()
    with pytest.raises(SandboxError, match="programs cannot be confined: SandboxError: filter: no such call"):
        start_spawner(Terms(install_filter=fail))
    with pytest.raises(SandboxError, match="it ended at once"):
        start_spawner(Terms(install_filter=lambda: os._exit(9)))
    assert fds() == before
    assert mine.read_text() == others

    def probe():
        order.append(status_of("self")["NoNewPrivs"])
        raise SandboxError("filter", f"{order}")

    with pytest.raises(SandboxError, match=r"\['1'\]"):
        start_spawner(Terms(install_filter=probe))


# Bounds, and ends.


def test_thousands_of_quick_children(loop, hire) -> None:
    """One after the other and many at once; nothing of them is left, here or there."""
    spawner = hire()

    async def main():
        async def some(count):
            for number in range(count):
                assert await kore.proc(f"sh -c 'exit {number % 200}'").reap() == number % 200

        await kore.gather(*(some(40) for _ in range(50)))

    run(loop, main(), seconds=120)
    if os.geteuid() == 0:
        wait_until(lambda: len(os.listdir(f"/proc/{spawner.pid}/fd")) == 8, "it has closed what it had of them")
    assert not Path(f"/proc/{spawner.pid}/task/{spawner.pid}/children").read_text()


def test_children_at_a_time(loop, hire, monkeypatch) -> None:
    """Not more than a bound, by number or by the descriptors there are; an end makes room."""

    async def full(most):
        procs = [kore.proc("sleep 1000") for _ in range(most)]
        with pytest.raises(RuntimeError, match="as many programs run already as may at a time"):
            kore.proc("true")
        procs.pop().kill()
        async with asyncio.timeout(SECONDS):
            while True:
                try:
                    assert await kore.proc("true").reap() == 0
                    return
                except RuntimeError:
                    await reactor.suspend(1)

    monkeypatch.setattr(spawner_module, "CHILDREN_MAX", 3)
    hire()
    run(loop, full(3))
    monkeypatch.undo()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)

    def few():
        resource.setrlimit(resource.RLIMIT_NOFILE, (74, 74))

    hire(prepare=few)
    run(loop, full(5))
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == limits


def test_large_requests(loop, hire) -> None:
    """What execve(2) takes goes through; what it does not is E2BIG, wherever that is found."""
    hire()

    async def main():
        env = [f"N{number}={'x' * 1000}" for number in range(1000)]
        text, _ = await said("/usr/bin/env", env=env)
        assert len(text) == sum(len(entry) + 1 for entry in env)
        for size in (200_000, BODY_BYTES_MAX + 1):  # a string may have 128 KiB
            with pytest.raises(RuntimeError, match="Argument list too long"):
                kore.proc("true", env=["A=" + "x" * size])
        assert await said("echo on") == (b"on\n", 0)

    run(loop, main())


def test_the_directory_is_the_workers(loop, hire, tmp_path, monkeypatch) -> None:
    """Also when it was changed since; one that is gone is told."""
    hire()
    monkeypatch.chdir(tmp_path)

    async def main():
        assert await said("pwd") == (os.fsencode(tmp_path) + b"\n", 0)
        with pytest.raises(FileNotFoundError, match="the current directory cannot be entered"):
            await asyncio.create_subprocess_exec("true", cwd=str(tmp_path / "gone"))

    run(loop, main())


def test_a_spawner_that_was_killed(loop, hire) -> None:
    """Its children are lost: told as such; and so is the next attempt."""
    spawner = hire()

    async def main():
        proc = kore.proc("sleep 1000")
        os.kill(spawner.pid, signal.SIGKILL)
        os.waitid(os.P_PID, spawner.pid, os.WEXITED | os.WNOWAIT)  # its sockets close before that
        with pytest.raises(RuntimeError, match="is lost"):
            await proc.reap()
        os.kill(proc.pid, signal.SIGKILL)
        for _ in range(2):
            with pytest.raises(RuntimeError, match=rf"the spawner \(pid {spawner.pid}\) has ended"):
                kore.proc("true")

    run(loop, main())


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_end_of_a_worker_ends_its_programs(number) -> None:
    """However it ends; the signals of a terminal, meant for the worker, leave the spawner be."""
    reader, writer = os.pipe()
    worker = os.fork()
    if worker == 0:
        try:
            spawner = start_spawner(Terms())
            for other in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
                os.kill(spawner.pid, other)
            null = os.open("/dev/null", os.O_RDWR)
            program = spawner.spawn(
                sys.executable, [sys.executable, "-c", "import signal, time; signal.signal(15, 1); time.sleep(1000)"],
                os.environ, (null, null, null))
            os.write(writer, f"{spawner.pid} {program.pid}".encode())
            signal.pause()
        finally:
            os._exit(1)
    os.close(writer)
    pids = [int(word) for word in os.read(reader, 100).split()]
    os.close(reader)
    assert all(alive(pid) for pid in pids)
    os.kill(worker, number)
    os.waitpid(worker, 0)
    wait_until(lambda: not any(alive(pid) for pid in pids), "the spawner and its program end")


def test_a_grandchild_does_not_keep_a_spawner() -> None:
    """Not even one that was handed the worker's end of the socket: the spawner sees the end of the worker itself."""
    reader, writer = os.pipe()
    worker = os.fork()
    if worker == 0:
        try:
            spawner = start_spawner(Terms())
            kept = spawner.spawn(
                "sh", ["sh", "-c", f"sleep 1000 <&0 >/dev/null & echo {spawner.pid} $!; wait"], os.environ,
                (spawner._sock.fileno(), writer, writer))
            signal.pause()
        finally:
            os._exit(kept is None)
    os.close(writer)
    spawner, grandchild = map(int, os.read(reader, 100).split())
    os.close(reader)
    try:
        os.kill(worker, signal.SIGKILL)
        os.waitpid(worker, 0)
        wait_until(lambda: not alive(spawner), "the spawner ends")
        assert alive(grandchild)
    finally:
        os.kill(grandchild, signal.SIGKILL)


DAEMON = """
import os, sys, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.write(1, b"%d " % os.getpid())
        time.sleep(1000)
    time.sleep(1000 * int(sys.argv[1]))
    os._exit(0)
"""


@pytest.mark.parametrize("stays", ["0", "1"], ids=["an orphan", "with its parent"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_program_that_became_a_daemon_ends_with_its_worker(number, stays) -> None:
    """A session of its own, no parent any more: it comes to the spawner, who knows all its children."""
    reader, writer = os.pipe()
    worker = os.fork()
    if worker == 0:
        try:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            spawner = start_spawner(Terms(proc=os.open("/proc", os.O_PATH)))
            null = os.open("/dev/null", os.O_RDWR)
            program = spawner.spawn(
                sys.executable, [sys.executable, "-c", DAEMON, stays], os.environ, (null, writer, null))
            while program.look() is None:
                select.select([program._channel], [], [])
            os.write(writer, b"%d." % spawner.pid)
            signal.pause()
        finally:
            os._exit(1)
    os.close(writer)
    said = b""
    while not (b"." in said and b" " in said):
        assert select.select([reader], [], [], SECONDS)[0], said
        said += os.read(reader, 100)
    os.close(reader)
    pids = [int(word) for word in said.replace(b".", b" ").split()]
    assert all(alive(pid) for pid in pids)
    assert len(pids) == 2
    try:
        os.kill(worker, number)
        os.waitpid(worker, 0)
        wait_until(lambda: not any(alive(pid) for pid in pids), "the spawner and the daemon end")
    finally:
        for pid in filter(alive, pids):
            os.kill(pid, signal.SIGKILL)


def test_orphans_that_end_are_buried(hire) -> None:
    """What others left to the spawner is no zombie for long, and costs no program its status."""
    reader, writer = os.pipe()
    spawner = hire()
    code = "import os\nfor _ in range(20):\n    if os.fork() == 0:\n        os._exit(os.fork() and 0)\nos._exit(7)"
    null = os.open("/dev/null", os.O_RDWR)
    program = spawner.spawn(sys.executable, [sys.executable, "-c", code], os.environ, (null, writer, null))
    os.close(writer)
    assert os.read(reader, 1) == b"", "all have ended"
    while program.look() is None:
        select.select([program._channel], [], [], SECONDS)
    assert os.waitstatus_to_exitcode(program.look()) == 7
    listed = Path(f"/proc/{spawner.pid}/task/{spawner.pid}/children")
    wait_until(lambda: not listed.read_text(), "nobody is left")
    program.close()
    os.close(reader)
    os.close(null)


# asyncio's children.


def test_children_of_asyncio(loop, hire, tmp_path) -> None:
    """Pipes, files, the same output for both, directory, environment, a shell, signals and statuses."""
    hire()

    async def main():
        exec_ = asyncio.create_subprocess_exec
        pipe = asyncio.subprocess.PIPE
        child = await exec_("cat", stdin=pipe, stdout=pipe)
        assert await child.communicate(b"x" * 300_000) == (b"x" * 300_000, None)
        assert child.returncode == 0
        child = await asyncio.create_subprocess_shell(
            "pwd; echo $A >&2; exit 3", stdout=pipe, stderr=asyncio.subprocess.STDOUT, cwd=tmp_path, env={"A": "b"})
        assert await child.communicate() == (os.fsencode(tmp_path) + b"\nb\n", None)
        assert child.returncode == 3
        child = await asyncio.create_subprocess_shell(
            "echo out; echo err >&2", stdin=asyncio.subprocess.DEVNULL, stdout=pipe, stderr=pipe,
            start_new_session=True)
        assert await child.communicate() == (b"out\n", b"err\n")
        with open(tmp_path / "file", "wb") as file:
            child = await exec_("echo", "to a file", stdout=file)
            assert await child.wait() == 0
        assert (tmp_path / "file").read_text() == "to a file\n"
        for act, code in ((lambda c: c.kill(), -9), (lambda c: c.terminate(), -15), (lambda c: c.send_signal(1), -1)):
            child = await exec_("sleep", "1000")
            act(child)
            assert await child.wait() == code
        with pytest.raises(FileNotFoundError):
            await exec_("no-such-program", stdin=pipe)
        with pytest.raises(PermissionError):
            await exec_("/dev/null", stdin=pipe)
        for option in ({"preexec_fn": print}, {"pass_fds": (3,)}, {"user": "nobody"}):
            with pytest.raises(ValueError, match=f"{next(iter(option))}: not in the sandbox.*kore.proc"):
                await exec_("true", **option)

    run(loop, main())


# In a server.

APP = """
@kore.route("/proc", domain=home, methods=["get"])
async def proc(req):
    try:
        child = kore.proc("sh -c 'echo $PPID; exit 3'")
    except RuntimeError as error:
        req.response(500, str(error).encode())
        return
    req.response(200, b"%s %d" % ((await child.recv(100)).strip(), await child.reap()))

@kore.route("/leave", domain=home, methods=["get"])
async def leave(req):
    leave.child = kore.proc("sleep 1000")
    req.response(200, str(leave.child.pid).encode())
"""


def serve(start, options: str, environment: dict[str, str]):
    """A server of one worker with that application, and its address."""
    port = free_port()
    text = SERVER_APP.format(text=APP, workers=1, options=options, port=port, deployment="dev")
    return start.app(text, environment=environment), ("127.0.0.1", port)


def body(response: bytes) -> bytes:
    return response.partition(b"\r\n\r\n")[2]


@pytest.mark.parametrize("io", ENGINES)
def test_in_a_worker(tmp_path, io) -> None:
    """Programs are the spawner's children; it is named, and ends with its worker, as they do."""
    skip_unconfined(io)
    with starter(tmp_path) as start:
        program, address = serve(start, "", {"KORE_IO": io, "KORE_SANDBOX": "yes"})
        worker = int(body(http_get(address, "/pid")))
        spawner, status = map(int, body(http_get(address, "/proc")).split())
        assert status == 3
        assert int(status_of(spawner)["PPid"]) == worker
        assert "proc 1" in Path(f"/proc/{spawner}/cmdline").read_text()
        child = int(body(http_get(address, "/leave")))
        assert alive(child)
        program.signal(signal.SIGTERM)
        assert program.wait() == 0
        wait_until(lambda: not alive(spawner) and not alive(child), "both end")


def test_a_worker_that_may_start_none(tmp_path) -> None:
    """There is no spawner, and proc() says why."""
    with starter(tmp_path) as start:
        _, address = serve(start, 'kore.config.sandbox_programs = "none"', {"KORE_SANDBOX": "yes"})
        assert b"sandbox_programs is none" in body(http_get(address, "/proc"))
        worker = int(body(http_get(address, "/pid")))
        assert not Path(f"/proc/{worker}/task/{worker}/children").read_text()
