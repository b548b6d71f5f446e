"""What the tests of attacks share: a server in whose workers any code can be run, and words for what became of it.

The code comes in a request and is run by a handler, so it has all that an attacker has who has taken over a worker: its
Python, its memory, every system call by number, its own ring, its sockets. What it returns, or the name of the errno
that it ended with, is the answer; a worker that is killed for it answers nothing, and the log says for which call.
"""

from __future__ import annotations

import contextlib
import os
import socket
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.privileges_harness import a_user, root_directory
from tests.support import READY, SECONDS, Program, free_port, http_get, skip_unless, starter

DEATH = r"worker \d+ \(pid \d+\) was killed (?:for a system call its sandbox forbids, (\w+)|by (\w+))"

AS_ROOT = os.geteuid() == 0

KIT = """
import array, asyncio, ctypes, errno, fcntl, mmap, os, resource, select, signal, socket, struct, sys, threading, time
from kore.process import parent, role, seat
from kore.process.channel import Kind
from kore.reactor import spawning, tasks
from kore.sandbox.machine import number_of, this_machine

seat.BACKOFF_FIRST_SECONDS = 0.0  # many workers die here, and the tests wait for their successors
MACHINE = this_machine()
LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.syscall.restype = ctypes.c_long
KEPT = []
PROBE = ctypes.create_string_buffer(b"before the fork")
EXITS = 77

def sys_call(name, *arguments):
    "A raw system call, by name or number."
    number = name if isinstance(name, int) else number_of(name, MACHINE)
    words = [ctypes.c_ulong((at(word) if isinstance(word, bytes) else word) & 2**64 - 1) for word in arguments]
    result = LIBC.syscall(ctypes.c_long(number), *words)
    if result == -1:
        raise OSError(ctypes.get_errno(), name)
    return result

def at(value):
    "The address of bytes, which stay there."
    KEPT.append(ctypes.create_string_buffer(value, len(value) + 1))
    return ctypes.addressof(KEPT[-1])

def inet(port):
    return struct.pack("=H2s4s8x", socket.AF_INET, struct.pack("!H", port), socket.inet_aton("127.0.0.1"))

def unix(path):
    return struct.pack("=H", socket.AF_UNIX) + path.encode()

class Answer:
    def __init__(self, future):
        self.future = future

    def complete(self, res, flags):
        if not self.future.done():
            self.future.set_result(res)

async def ring(opcode, fd=-1, *, flags=0, ioprio=0, off=0, addr=0, length=0, op_flags=0, file_index=0):
    "An entry on the worker's own ring; its result."
    driver = tasks.process_loop.driver
    answer = Answer(tasks.process_loop.create_future())
    addr = at(addr) if isinstance(addr, bytes) else addr
    off = at(off) if isinstance(off, bytes) else off
    driver.ring.push(opcode, flags, ioprio, fd, off, addr, length, op_flags, driver.register(answer), 0, file_index)
    result = await asyncio.wait_for(answer.future, 2)
    if result < 0:
        raise OSError(-result, "the ring says")
    return result

def apart(call):
    "Call it in a child, where there can be one: what succeeds would change this process."
    try:
        pid = os.fork()
    except OSError:
        return call()
    if pid == 0:
        code = 0
        try:
            call()
        except OSError as error:
            code = error.errno
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code not in (0, EXITS):
        raise OSError(code, "in a child")
    return code

def register(opcode, argument=bytes(4096), count=1):
    return sys_call("io_uring_register", tasks.process_loop.driver.ring.fd, opcode, argument, count)

async def attack(body):
    scope = dict(globals())
    exec("async def attacked():\\n" + "".join(f"    {line}\\n" for line in body.splitlines()), scope)
    try:
        return f"returned {await scope['attacked']()!r}"
    except OSError as error:
        return errno.errorcode.get(error.errno, repr(error))
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
"""

APP = KIT + """
import kore

kore.config.deployment = "docker"
kore.config.workers = {workers}
{options}

kore.server("plain", ip="127.0.0.1", port="{port}", tls=False)
home = kore.domain("*", attach="plain")

@kore.route("/", domain=home, methods=["get"])
def index(req):
    req.response(200, b"hello")

@kore.route("/pid", domain=home, methods=["get"])
def pid(req):
    req.response(200, str(os.getpid()).encode())

@kore.route("/attack", domain=home, methods=["post"])
async def attacked(req):
    req.response(200, (await attack(bytes(req.body).decode())).encode())

{text}
"""


class Target:
    """A running server that is attacked from within."""

    def __init__(self, program: Program, port: int, workers: int) -> None:
        self.program = program
        self.address = ("127.0.0.1", port)
        self.workers = workers
        self.deaths = 0

    def attack(self, code: str, **names: object) -> str:
        """Run `code`, the body of a coroutine, in a worker; what it answers, "" when the connection breaks."""
        given = "".join(f"{name} = {value!r}\n" for name, value in names.items())
        body = (given + textwrap.dedent(code).strip()).encode()
        with socket.create_connection(self.address, timeout=SECONDS) as sock:
            head = f"POST /attack HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
            sock.sendall(head.encode() + body)
            answer = b""
            with contextlib.suppress(ConnectionResetError):
                while piece := sock.recv(65536):
                    answer += piece
        return answer.partition(b"\r\n\r\n")[2].decode()

    def result(self, code: str, **names: object) -> str:
        """What becomes of an attack: its answer, or "killed: CALL" when the worker died of it and is replaced."""
        answer = self.attack(code, **names)
        if answer:
            return answer
        self.deaths += 1
        found = self.program.wait_for(DEATH, count=self.deaths)
        self.program.wait_for("serves again", count=self.deaths)
        return f"killed: {found[1] or found[2]}"

    def serves(self) -> None:
        """It still answers."""
        assert http_get(self.address).endswith(b"hello")


@contextlib.contextmanager
def target(
    directory: Path, engine: str, *lines: str, text: str = "", workers: int = 1, chroot: bool = AS_ROOT,
    user: bool = AS_ROOT,
) -> Iterator[Target]:
    """A server in the sandbox, started as root if we are: for a user, in a root directory of its own, if asked to.

    `lines` are options; `text` is run in the parent, before there are workers. The root has one file, "data".
    """
    skip_unless(engine)
    pytest.importorskip("pyseccomp")
    root = directory / "root"
    if not root.exists():
        root_directory(directory)
        (root / "data").write_bytes(bytes(4096))
    options = [f"kore.config.root = {str(root)!r}"]
    arguments = [] if chroot else ["-n"]
    if user:
        options.append(f"kore.config.runas = {a_user().pw_name!r}")
    else:
        arguments.append("-r")
    port = free_port()
    source = APP.replace("{workers}", str(workers)).replace("{port}", str(port)).replace("{text}", text)
    (directory / "app.py").write_text(source.replace("{options}", "\n".join([*options, *lines])))
    with starter(directory) as programs:
        program = programs.kore(*arguments, "app.py", environment={"KORE_SANDBOX": "yes", "KORE_IO": engine})
        program.wait_for(READY)
        yield Target(program, port, workers)
