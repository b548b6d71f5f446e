"""``kore.proc`` at its edges: pipes and the end are two things, children that cannot be watched or killed."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from reactor_harness import ENGINES, run

import kore
from tests.http_server_harness import request, serving
from tests.support import alive, wait_until

pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning", "error::ResourceWarning")


def test_the_pipes_and_the_process_end_apart(loop) -> None:
    """Output that is closed is at its end, whoever lives on; a process has ended, whoever still holds its output."""

    async def main():
        proc = kore.proc("sh -c 'exec >&- 2>&-; read line; exit 3'")
        assert [await proc.recv(10), await proc.recv(10)] == [None, None]
        assert "running" in repr(proc.reap())
        await proc.send("line\n")
        assert await proc.reap() == 3
        proc = kore.proc(GRANDCHILD)
        assert await proc.reap() == 5
        with pytest.raises(TimeoutError):
            await proc.recv(10, 20)
        await proc.send("line\n")
        assert [await proc.recv(10), await proc.recv(10)] == [b"late\n", None]

    run(loop, main())


GRANDCHILD = """sh -c 'exec 3<&0; sh -c "read line; echo late" <&3 & exit 5'"""
"""A shell gives its children in the background no input of its own: by another number it does."""


def test_what_nobody_reads_stays_in_the_pipe(loop) -> None:
    """A child that floods its output waits; killed, what it wrote can still be read to the end."""

    async def main():
        proc = kore.proc("yes")
        assert await proc.recv(2) == b"y\n"
        proc.kill()
        assert await proc.reap() == 9
        rest = 0
        while (piece := await proc.recv(1 << 30)) is not None:
            rest += len(piece)
        assert rest < 1 << 20

    run(loop, main())


def test_hundreds_of_quick_children(loop) -> None:
    """Each has its own status, and nothing of them stays."""

    async def one(number):
        return await kore.proc(f"sh -c 'exit {number % 250}'").reap()

    async def main():
        results = await kore.gather(*(one(number) for number in range(300)), concurrency=20)
        assert results == [number % 250 for number in range(300)]

    run(loop, main(), seconds=60)


def test_a_long_command_is_refused(loop) -> None:
    """RuntimeError at once: to split it would take seconds, in which everybody waits."""

    async def main():
        assert await kore.proc("true" + " x" * 60_000).reap() == 0
        with pytest.raises(RuntimeError, match="at most 131072 characters long, not 160004"):
            kore.proc("true" + " x" * 80_000)
        with pytest.raises(RuntimeError, match="too long"):
            kore.proc("true", env=["A=" + "x" * 200_000])

    run(loop, main())


def test_where_ended_children_vanish(loop) -> None:
    """With SIGCHLD ignored no status is kept: RuntimeError, at the call or at the reap, and nothing stays open."""

    async def main():
        for _ in range(100):
            with pytest.raises(RuntimeError, match="cannot be watched|somebody else"):
                await kore.proc("true").reap()

    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        run(loop, main(), seconds=60)
    finally:
        signal.signal(signal.SIGCHLD, before)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_child_that_may_not_be_killed(engine) -> None:
    """One that has become another user: kill() is a RuntimeError that says so; dropped, the log has it."""
    setpriv = shutil.which("setpriv")
    if os.geteuid() != 0 or setpriv is None:
        pytest.skip("making a program that changes its user needs root and setpriv")
    with tempfile.TemporaryDirectory() as directory:  # pytest's are root's alone
        Path(directory).chmod(0o755)
        switch = Path(shutil.copy(setpriv, directory))
        switch.chmod(0o4755)
        done = subprocess.run(
            [sys.executable, "-c", KILLING, engine, str(switch)], capture_output=True, text=True, timeout=60,
            check=False, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, cwd="/")
    assert done.stdout.splitlines() == ["ready", "RuntimeError: Operation not permitted", "0"], done.stderr
    assert re.fullmatch(r"kill\(\) of process \d+: .*EPERM.*; it runs on, stop it by hand\n", done.stderr)


KILLING = """
import os, sys
from driver_harness import make_driver
import kore
from kore.reactor import Loop
loop = Loop(make_driver(sys.argv[1]))
os.setgroups([])
os.setresuid(65534, 65534, 65534)
async def main():
    proc = kore.proc(sys.argv[2] + " --reuid 0 sh -c 'echo ready; read line; echo $?'")
    print((await proc.recv(100)).decode().strip())
    try:
        proc.kill()
    except RuntimeError as error:
        print("RuntimeError:", error.__cause__.strerror)
    await proc.send("line\\n")
    print((await proc.recv(100)).decode().strip())
    await proc.reap()
    proc = kore.proc(sys.argv[2] + " --reuid 0 sh -c 'echo ready; read line'")
    await proc.recv(100)
    del proc
loop.run_until_complete(loop.start(main()))
loop.close()
"""

APP = """
kept = []

@kore.route("/keep", domain=home, methods=["get"])
async def keep(req):
    kept.append(kore.proc("sleep 1000"))
    req.response(200, str(kept[0].pid))

@kore.route("/wait", domain=home, methods=["get"])
async def wait(req):
    proc = kore.proc("sleep 1000")
    kore.log(kore.LOG_INFO, f"child {proc.pid} runs")
    await proc.reap()
"""


@pytest.mark.parametrize("engine", ENGINES)
def test_children_end_with_their_worker(tmp_path, engine) -> None:
    """Those of handlers, and those that the application holds on to for the life of the worker."""
    with serving(tmp_path, engine, APP) as server:
        kept = int(server.ask(request("/keep")).body)
        with server.client() as client:
            client.send(request("/wait"))
            server.program.wait_for("child .* runs")
            waiting = int(re.findall(r"child (\d+) runs", server.program.out)[0])
            assert alive(kept)
            assert alive(waiting)
            server.program.process.send_signal(signal.SIGTERM)
            server.program.process.wait(20)
            try:
                wait_until(lambda: not alive(kept) and not alive(waiting), "both are killed")
            finally:
                for pid in filter(alive, (kept, waiting)):
                    os.kill(pid, signal.SIGKILL)
