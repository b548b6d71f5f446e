"""``kore.proc``: starting programs, talking to them, their end and status, timeouts, and dropping them."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from driver_harness import fds
from reactor_harness import ENGINES, open_loop, run, soon
from support import alive, wait_until

import kore
from kore import reactor
from kore.reactor import spawning
from kore.sandbox.spawner import Program, Terms, start_spawner

pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning", "error::ResourceWarning")


@pytest.fixture(params=["here", "spawner"])
def starts(request):
    """Who starts the programs: this process, or a spawner as a worker in the sandbox has one."""
    if request.param == "here":
        yield request.param
        return
    spawner = start_spawner(Terms())
    spawning.use(spawner)
    yield request.param
    spawning.close()
    assert not os.path.exists(f"/proc/{spawner.pid}"), "it ends with its worker"


@pytest.fixture(params=ENGINES)
def loop(request, starts):
    """A loop on each engine; no fd is left open by what ran on it."""
    before = fds()
    for loop, _ in open_loop(request.param):
        yield loop
    gc.collect()
    assert fds() <= before


async def output(proc) -> bytes:
    """All that it writes."""
    heard = b""
    while (piece := await proc.recv(4096)) is not None:
        heard += piece
    return heard


async def said(proc) -> bytes:
    """The same, once it has ended."""
    heard = await output(proc)
    await proc.reap()
    return heard


def script(text: str) -> str:
    """A command that runs Python code."""
    return f"{sys.executable} -c '{text}'"


def known(proc) -> None:
    """Wait, without the loop, until this process could learn that another has ended."""
    child = proc._child._child
    if isinstance(child, Program):
        assert select.select([child._channel], [], [], 20)[0]
    else:
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)


async def gone(pid: int) -> None:
    """Wait until a child has been reaped."""
    async with asyncio.timeout(20):
        while os.path.exists(f"/proc/{pid}"):
            await reactor.suspend(1)


def test_output_and_status(loop) -> None:
    """stdout and stderr in one pipe, None at the end, the exit code, again and again; the pid stays."""

    async def main():
        proc = kore.proc("sh -c 'echo out; echo err >&2; exit 7'")
        assert type(proc) is kore.pyproc
        pid = proc.pid
        assert await output(proc) == b"out\nerr\n"
        assert await proc.recv(10) is None
        assert [await proc.reap(), await proc.reap(), int(proc.reap())] == [7, 7, 7]
        assert type(await proc.reap()) is int
        assert proc.pid == pid
        assert proc.kill() is True
        assert await kore.proc("sh -c 'sleep 0.1; exit 4'").reap() == 4, "who waits for it holds on to it"

    run(loop, main())


def test_input(loop) -> None:
    """Much more than a pipe holds, both ways at once; close_stdin ends it; afterwards send is a RuntimeError."""
    text = os.urandom(1_000_000)

    async def main():
        proc = kore.proc("cat")

        async def feed():
            assert await proc.send(text) is None
            assert await proc.send("äö") is None
            assert proc.close_stdin() is True
            assert proc.close_stdin() is True

        feeder = loop.start(feed())
        assert await output(proc) == text + "äö".encode()
        await feeder
        with pytest.raises(RuntimeError, match="closed"):
            proc.send(b"x")
        assert await proc.reap() == 0

    run(loop, main())


def test_a_child_that_closes_its_input(loop) -> None:
    """RuntimeError, and no signal."""

    async def main():
        proc = kore.proc("sh -c 'exec <&-; echo closed; sleep 100'")
        assert await proc.recv(100) == b"closed\n"
        with pytest.raises(RuntimeError, match="EPIPE"):
            await proc.send(b"x" * 1_000_000)
        proc.kill()
        assert await proc.reap() == 9

    run(loop, main())


def test_words_are_split_as_a_shell_would(loop) -> None:
    """Quotes of both kinds, escapes, empty words, text glued to quotes; no expansion of anything."""

    async def main():
        command = script('import sys; print(sys.argv[1:])') + r""" 'a b' "c d" e\ f x="g h" '' "i"'j' * $HOME"""
        expected = ["a b", "c d", "e f", "x=g h", "", "ij", "*", "$HOME"]
        assert await said(kore.proc(command)) == f"{expected}\n".encode()
        for wrong in ("", "  ", "a 'b", 'a "b', "a\0b"):
            with pytest.raises(ValueError, match="command"):
                kore.proc(wrong)
        for wrong in (b"ls", None, ["ls"]):
            with pytest.raises(TypeError):
                kore.proc(wrong)

    run(loop, main())


def test_the_path_is_searched(loop, tmp_path, monkeypatch) -> None:
    """A word without a slash is looked for in PATH, the child's if `env` has one; else it is taken as it is."""
    (tmp_path / "tool").write_text("#!/bin/sh\necho tool\n")
    (tmp_path / "tool").chmod(0o755)
    (tmp_path / "plain").write_text("no program")
    (tmp_path / "sub").mkdir()

    async def main():
        with pytest.raises(RuntimeError, match=r"'tool' cannot be started: No such file"):
            kore.proc("tool")
        assert await said(kore.proc("tool", env=[f"PATH={tmp_path}"])) == b"tool\n"
        assert await said(kore.proc(f"{tmp_path}/tool")) == b"tool\n"
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        assert await said(kore.proc("tool")) == b"tool\n"
        for name in ("plain", f"{tmp_path}/plain", f"{tmp_path}/sub"):
            with pytest.raises(RuntimeError, match="Permission denied"):
                kore.proc(name)
        with pytest.raises(RuntimeError, match="No such file"):
            kore.proc("sub")

    run(loop, main())


def test_the_environment(loop, monkeypatch) -> None:
    """The worker's by default; `env` is the whole of it; the wrong kinds are told at the call."""
    monkeypatch.setenv("KORE_TEST", "inherited")

    async def main():
        assert b"KORE_TEST=inherited\n" in await said(kore.proc("env"))
        assert b"KORE_TEST=inherited\n" in await said(kore.proc("env", env=None))
        assert await said(kore.proc("/usr/bin/env", env=["A=b=c", "D=", "Ä=ö"])) == "A=b=c\nD=\nÄ=ö\n".encode()
        assert await said(kore.proc("/usr/bin/env", env=[])) == b""
        many = [f"N{number}=x" for number in range(100)]
        assert len((await said(kore.proc("/usr/bin/env", env=many))).split()) == 100
        for error, wrong in (
            (RuntimeError, ("A=b",)), (RuntimeError, {"A": "b"}), (TypeError, [b"A=b"]), (TypeError, [None]),
            (ValueError, ["A"]), (ValueError, ["=b"]), (ValueError, ["A=\0"]),
        ):
            with pytest.raises(error, match="env"):
                kore.proc("env", env=wrong)
        with pytest.raises(TypeError):
            kore.proc("env", None, [])

    run(loop, main())


@pytest.mark.parametrize(("ending", "status"), [
    ("sys.exit(0)", 0), ("sys.exit(255)", 255), ("os.kill(os.getpid(), 9)", 9), ("os.kill(os.getpid(), 15)", 15),
])
def test_statuses(loop, ending, status) -> None:
    """Exit codes as they are, after a signal its number."""

    async def main():
        assert await kore.proc(script(f"import os, sys; {ending}")).reap() == status

    run(loop, main())


def test_a_reap_that_is_not_awaited(loop) -> None:
    """An int at once when the process has ended; else a thing that becomes one, and says so until then."""

    async def main():
        proc = kore.proc("cat")
        early = proc.reap()
        for use in (int, bool, str, hash, lambda r: r == 0, lambda r: r < 1, lambda r: f"{r:d}"):
            with pytest.raises(RuntimeError, match="has not ended"):
                use(early)
        assert "running" in repr(early)
        proc.close_stdin()
        assert await early == 0
        assert await early == 0
        assert early == 0
        assert early != 1
        assert early < 1
        assert not early
        assert (int(early), str(early), repr(early), f"{early:03d}", hash(early)) == (0, "0", "0", "000", hash(0))
        assert [10, 20][early] == 10
        late = proc.reap()
        assert isinstance(late, int)
        assert late == 0
        assert await late == 0
        proc = kore.proc("sh -c 'exit 3'")
        known(proc)
        assert isinstance(proc.reap(), int), "it has ended: one look tells"
        assert proc.reap() == 3

    run(loop, main())


def test_several_wait_for_the_same_end(loop) -> None:
    """Every coroutine that reaps gets the status; one that is killed meanwhile takes nothing from the others."""

    async def main():
        proc = kore.proc("cat")

        async def reap():
            return await proc.reap()

        tasks = [loop.start(reap()) for _ in range(5)]
        await reactor.suspend(10)
        tasks.pop(2).kill()
        proc.kill()
        assert [await task for task in tasks] == [9] * 4

    run(loop, main())


def test_recv_times_out_like_a_socket(loop) -> None:
    """TimeoutError after so many milliseconds from the call, nothing lost, the process as it was."""

    async def main():
        proc = kore.proc("cat")
        with pytest.raises(TimeoutError):
            await proc.recv(10, 20)
        await proc.send(b"hello")
        assert await proc.recv(2, 10_000) == b"he"
        assert await proc.recv(10) == b"llo"
        op = proc.recv(10)
        with pytest.raises(RuntimeError, match="pending"):
            proc.recv(10)
        del op
        proc.close_stdin()
        assert await proc.recv(10, 10_000) is None
        assert await proc.reap() == 0

    run(loop, main())


@pytest.mark.parametrize("waiting", ["reap", "recv", "send", "chatty"])
def test_the_timeout_of_a_process(loop, waiting) -> None:
    """TimeoutError, once, in whatever waits for this process; it lives on, and can be waited for again."""

    async def main():
        proc = kore.proc("yes" if waiting == "chatty" else "sleep 1000", 50)
        began = loop.time()
        with pytest.raises(TimeoutError, match="has not ended"):
            if waiting == "reap":
                await proc.reap()
            elif waiting == "send":
                await proc.send(bytes(10_000_000))
            else:
                while await proc.recv(10):
                    pass
        assert 0.045 < loop.time() - began < 10
        assert alive(proc.pid)
        proc.kill()
        assert await proc.reap() == 9

    run(loop, main())


def test_a_timeout_that_nobody_waited_for(loop) -> None:
    """The next one who does is told, also when the process has ended since; not when it ended in time."""

    async def main():
        proc = kore.proc("cat", 20)
        await reactor.suspend(60)
        proc.close_stdin()
        known(proc)
        with pytest.raises(TimeoutError):
            await proc.reap()
        assert await proc.reap() == 0
        proc = kore.proc("true", timeout=10_000)
        assert await proc.reap() == 0
        for none in (0, -1, None):
            proc = kore.proc("cat", none)
            await reactor.suspend(30)
            proc.close_stdin()
            assert await proc.reap() == 0
        for error, wrong in ((TypeError, 1.5), (TypeError, "1"), (ValueError, -2)):
            with pytest.raises(error):
                kore.proc("true", wrong)
        left = [entry for entry in loop._timers if not entry[2].cancelled()]
        assert len(left) == 1, "the test's own"

    run(loop, main())


def test_outside_of_coroutines(loop) -> None:
    """RuntimeError."""
    with pytest.raises(RuntimeError, match="coroutine"):
        kore.proc("true")
    with pytest.raises(RuntimeError, match="coroutine"):
        soon(loop, kore.proc, "true")


def test_a_dropped_process_is_killed_and_reaped(loop) -> None:
    """Without a wait: the loop is not held up by a child that ignores every signal it can and is deep in a sleep."""

    async def main():
        proc = kore.proc(script(
            "import signal, time\n"
            "for number in range(1, 32):\n"
            "    if number not in (9, 19): signal.signal(number, signal.SIG_IGN)\n"
            'print("ready", flush=True)\n'
            "time.sleep(1000)"))
        assert b"ready" in await proc.recv(100)
        os.kill(proc.pid, signal.SIGTERM)
        pid = proc.pid
        began = loop.time()
        del proc
        assert loop.time() - began < 0.05
        await gone(pid)

    run(loop, main())


def test_a_killed_coroutine_takes_its_process_along(loop) -> None:
    """The last reference goes with the frame, whatever the coroutine was waiting for."""

    async def main():
        pids = []

        async def victim(how):
            proc = kore.proc("sleep 1000")
            pids.append(proc.pid)
            await {"recv": lambda: proc.recv(10), "reap": proc.reap, "send": lambda: proc.send(bytes(1 << 20))}[how]()

        for how in ("recv", "reap", "send"):
            for turns in (0, 1, 20):
                number = reactor.task_create(victim(how))
                for _ in range(turns):
                    await reactor.suspend(0)
                reactor.task_kill(number)
        assert len(pids) == 6
        for pid in pids:
            await gone(pid)

    run(loop, main())


def test_killed_reads_lose_nothing(loop) -> None:
    """Output read by coroutines that are killed again and again comes whole."""

    async def main():
        proc = kore.proc("cat")
        rng = random.Random(5)
        got = []

        async def read():
            got.append(await proc.recv(rng.choice((1, 3, 1000))))

        for _ in range(5):  # killed for sure: nothing is there
            task = loop.start(read())
            await reactor.suspend(0)
            task.kill()
        assert not got
        for number in range(200):
            task = loop.start(read())
            await reactor.suspend(0)
            await proc.send(b"%04d" % number)
            await reactor.suspend(rng.choice((0, 0, 1)))
            task.kill()
        proc.close_stdin()
        got.append(await output(proc))
        assert b"".join(got) == b"".join(b"%04d" % number for number in range(200))
        assert await proc.reap() == 0

    run(loop, main())


@pytest.mark.parametrize("close_range", [True, False])
def test_what_a_child_inherits(loop, monkeypatch, close_range) -> None:
    """Three descriptors, though others are inheritable; no signal ignored or blocked; the directory.

    Also where the C library or the kernel has no close_range(2).
    """
    if not close_range:
        monkeypatch.setattr(spawning, "_close_range", None)
    inheritable = os.open("/dev/null", os.O_RDONLY)
    os.set_inheritable(inheritable, True)
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1, signal.SIGUSR2])
    ignored = signal.signal(signal.SIGUSR1, signal.SIG_IGN)

    async def main():
        proc = kore.proc("sh -c 'ls -l /proc/self/fd; grep Sig /proc/self/status; pwd'")
        return (await said(proc)).decode()

    try:
        text = run(loop, main())
    finally:
        os.close(inheritable)
        signal.signal(signal.SIGUSR1, ignored)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    lines = text.splitlines()
    open_there = [line.split("-> ")[1] for line in lines if "->" in line]
    assert [target.split(":")[0] for target in open_there[:3]] == ["pipe"] * 3
    assert open_there[3].endswith("/fd"), "the listing that ls has open itself"
    assert len(open_there) == 4
    masks = {line.split(":")[0]: int(line.split()[1], 16) for line in lines if line.startswith(("SigB", "SigI"))}
    assert masks["SigBlk"] == 0
    assert masks["SigIgn"] & ~(3 << 31) == 0, "but 32 and 33, which are the C library's own"
    assert lines[-1] == os.getcwd()


def test_without_standard_descriptors(tmp_path) -> None:
    """A server whose own stdin, stdout and stderr are closed starts children all the same."""
    code = (
        "import os, sys\n"
        "for fd in (0, 1, 2): os.close(fd)\n"
        "from kore import reactor\n"
        "import kore\n"
        "loop = reactor.new_event_loop()\n"
        "async def main():\n"
        "    proc = kore.proc('cat')\n"
        "    await proc.send('through')\n"
        "    text = await proc.recv(100)\n"
        "    proc.close_stdin()\n"
        "    with open('result', 'wb') as file: file.write(text + b' %d' % await proc.reap())\n"
        "loop.run_until_complete(loop.start(main()))\n"
        "loop.close()\n"
    )
    paths = (str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", ""))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, timeout=60, check=False)
    assert done.returncode == 0
    assert (tmp_path / "result").read_bytes() == b"through 0"


def test_beside_other_children(loop, starts) -> None:
    """Statuses of subprocess and of asyncio's children are left alone, and one that was taken is told as such."""

    async def main():
        other = subprocess.Popen(["sh", "-c", "exit 5"])
        proc = kore.proc("sh -c 'exit 6'")
        third = await asyncio.create_subprocess_exec("sh", "-c", "exit 7")
        assert await third.wait() == 7
        assert await proc.reap() == 6
        assert other.wait() == 5
        if starts == "spawner":
            return  # whose children nobody else can wait for
        proc = kore.proc("sh -c 'exit 8'")
        os.waitpid(proc.pid, 0)
        with pytest.raises(RuntimeError, match="somebody else"):
            await proc.reap()
        with pytest.raises(RuntimeError, match="somebody else"):
            int(proc.reap())
        proc.kill()

    run(loop, main())


def test_out_of_descriptors(loop) -> None:
    """RuntimeError that says so, nothing left of the attempt, and the next one works."""
    import resource

    async def main():
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        before = fds()
        for spare in (0, 1, 2, 3, 64):
            lowest = os.dup(0)
            os.close(lowest)
            resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + spare, hard))
            try:
                if spare < 4:  # two pipes
                    with pytest.raises(RuntimeError, match="Too many open files"):
                        kore.proc("true")
                else:
                    assert await kore.proc("true").reap() == 0
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            async with asyncio.timeout(20):
                while fds() != before:
                    await reactor.suspend(0)

    run(loop, main())


def test_the_loop_closed_before_the_end(loop, starts) -> None:
    """The process is killed when its object goes; nothing of it stays open."""
    kept = []

    async def main():
        kept.append(kore.proc("sleep 1000", 50_000))

    run(loop, main())
    pid = kept[0].pid
    loop.close()
    kept.clear()
    wait_until(lambda: not alive(pid), "the child is killed")
    if starts == "here":
        os.waitpid(pid, 0)
