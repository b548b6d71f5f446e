"""An attacker inside a worker turns to the processes around it: forged messages, floods, and no end of everything.

The parent and the other worker live and serve; who forges is killed, ignored, or refused by the kernel.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from pathlib import Path

import pytest

from kore.process.channel import Kind
from tests.attacks_harness import target
from tests.support import SECONDS, alive, children, http_get, skip_unless, wait_until

SO_PASSRIGHTS = 83
HEARS = (
    "class koreapp:\n    @staticmethod\n    def onmsg(message):\n"
    "        kore.log(kore.LOG_INFO, f'heard {message!r} in {kore.worker()}')\n"
)


@pytest.fixture(params=["uring", "epoll"])
def engine(request):
    skip_unless(request.param)
    return request.param


@pytest.fixture
def victim(tmp_path, engine):
    """A server of two workers that is attacked; afterwards it still serves, with no descriptor more than before."""
    with target(tmp_path, engine, text=HEARS, workers=2) as server:
        server.serves()
        before = fds(server.program.pid)
        yield server
        server.serves()
        wait_until(lambda: len(children(server.program.pid)) == 2, "both workers are there")
        wait_until(lambda: fds(server.program.pid) <= before, "the parent has closed what it was sent")
        server.program.signal(signal.SIGTERM)
        assert server.program.wait() == 0, server.program.out + server.program.err


def fds(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def others(server, pid: int) -> list[int]:
    return [worker for worker in children(server.program.pid) if worker != pid]


FORGED = {
    "an unknown kind": ("sock.send(b'\\xc8' + bytes(100))", "a message of unknown kind 200"),
    "kind zero": ("sock.send(bytes(50))", "a message of unknown kind 0"),
    "too long": ("sock.send(b'\\2' + bytes(70_000))", "a message of more than 65536 bytes"),
    "of the parent": ("sock.send(bytes((Kind.STOP, 15)))", "a STOP, which no worker sends here"),
    "of the relay": ("sock.send(bytes((Kind.OBJECT, 0, 0, 0)) + b'x')", "a OBJECT, which no worker sends here"),
    "a log to reopen": ("sock.send(bytes((Kind.REOPEN,)) + b'1')", "a REOPEN, which no worker sends here"),
    "a second listener": ("sock.send(bytes((Kind.LISTENER,)))", "a descriptor that is no listener, or a second one"),
}
"""On the channel of the parent: what is sent, and what the log says of it."""


@pytest.mark.parametrize("what", FORGED)
def test_forged_messages_on_the_channel_end_who_sends_them(victim, what):
    code, reason = FORGED[what]
    before = set(children(victim.program.pid))
    assert victim.result(f"sock = role.role.channel.sock\n{code}\nawait asyncio.sleep(30)") == "killed: SIGKILL"
    victim.program.wait_for(rf"is killed: it sent {reason}")
    assert len(before & set(children(victim.program.pid))) == 1, "the other lives"


IGNORED = {
    "an empty log line": "sock.send(bytes((Kind.LOG,)))",
    "a log line of noise": "sock.send(bytes((Kind.LOG, 255)) + os.urandom(5000))",
    "a log line of many lines": (
        "sock.send(bytes((Kind.LOG, 6)) + b'one\\r\\n2026-01-01 proc=[parent] log=[goodbye]\\x1b')"
    ),
    "ready again": "[sock.send(bytes((Kind.READY,)) + bytes(100)) for _ in range(50)]",
    "a count that is none": "sock.send(bytes((Kind.DROPPED,)) + b'\\xff\\n' * 1000)",
    "a huge count": "sock.send(bytes((Kind.DROPPED,)) + b'9' * 60_000)",
}


@pytest.mark.parametrize("what", IGNORED)
def test_messages_that_say_nothing_true_change_nothing(victim, what):
    """Everybody lives, and the log has the line as this worker's, escaped: nobody speaks in the parent's name."""
    before = children(victim.program.pid)
    assert victim.attack(f"sock = role.role.channel.sock\n{IGNORED[what]}\nreturn 1") == "returned 1"
    victim.attack("role.role.log(6, 'the last')")
    victim.program.wait_for(r"proc=\[wrk \d\] log=\[the last\]")
    assert children(victim.program.pid) == before
    assert "\x1b" not in victim.program.out
    assert not [line for line in victim.program.out.splitlines() if line.endswith("[goodbye]") or line[:3] != "202"]


RELAYED = {
    "too short": ("sock.send(bytes((Kind.OBJECT, 0)))", "a OBJECT of 2 bytes among the messages for workers"),
    "not for workers": ("sock.send(bytes((Kind.LOG, 0, 0, 0)) + b'x')", "a LOG of 5 bytes among the messages"),
    "mixed": (
        "sock.send(bytes((Kind.OBJECT, 0, 1, 1)) + b'x')\nsock.send(bytes((Kind.OBJECT, 0, 2, 0)) + b'x')",
        "pieces of different objects in one",
    ),
    "without end": (
        "sock.setblocking(True)\nwhile True:\n    sock.send(bytes((Kind.OBJECT, 0, 2, 1)) + bytes(60_000))",
        "an object of more than 16777216 bytes",
    ),
    "unknown": ("sock.send(bytes((99, 0, 0, 0)))", "a message of unknown kind 99"),
}
"""On the channel of what workers send to workers."""


@pytest.mark.parametrize("what", RELAYED)
def test_forged_messages_to_workers_end_who_sends_them(victim, what):
    code, reason = RELAYED[what]
    assert victim.result(f"sock = role.role.post._channel.sock\n{code}\nawait asyncio.sleep(30)") == "killed: SIGKILL"
    victim.program.wait_for(rf"is killed: it sent {reason}")
    assert "heard" not in victim.program.out


def test_nonsense_for_a_worker_reaches_its_hook_at_most(victim):
    """What is no pickle, or for nobody, or a broadcast of nothing: logged, and everybody lives."""
    before = children(victim.program.pid)
    code = """
sock = role.role.post._channel.sock
for target in (0, 1, 2, 3, 99, 0xFFFF):
    for body in (b"", b"nonsense", b"\\x80\\x05", b"c__nowhere__\\nnothing\\n."):
        for kind in (Kind.OBJECT, Kind.BROADCAST):
            sock.send(struct.pack("!BHB", kind, target, 0) + body)
role.role.post.send(Kind.OBJECT, 0, __import__("pickle").dumps("the last"))
return 1
"""
    assert victim.attack(code) == "returned 1"
    victim.program.wait_for("heard 'the last' in 1")
    victim.program.wait_for("heard 'the last' in 2")
    assert children(victim.program.pid) == before


LINGER = """
mine = None
for fd in range(3, 100):
    sock = None
    try:
        sock = socket.socket(fileno=os.dup(fd))
        if sock.family == socket.AF_INET and sock.getpeername()[1] == PEER:
            mine = sock
    except OSError:
        pass
mine.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 3600))
try:
    while True:
        os.write(mine.fileno(), bytes(100_000))
except BlockingIOError:
    pass
rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("=i", mine.fileno()))]
try:
    {channel}.sendmsg([MESSAGE], rights)
    role.role.log(6, "it went out")
except OSError as error:
    role.role.log(6, errno.errorcode[error.errno])
os._exit(9)
"""


@pytest.mark.parametrize(("channel", "message"), [
    ("role.role.channel.sock", bytes((Kind.LOG, 6))), ("role.role.post._channel.sock", bytes((Kind.OBJECT, 0, 99, 0))),
], ids=["channel", "messages"])  # fmt: skip
def test_the_parent_is_not_left_with_a_socket_that_takes_long_to_close(victim, channel, message):
    """A TCP socket that lingers, for a peer that reads nothing: who closes it last waits, an hour if it is told so."""
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.getsockopt(socket.SOL_SOCKET, SO_PASSRIGHTS)
        except OSError:
            pytest.skip("this kernel has no SO_PASSRIGHTS (Linux 6.16)")
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        sock.connect(victim.address)
        body = f"PEER = {sock.getsockname()[1]}\nMESSAGE = {message!r}\n{LINGER.format(channel=channel)}".encode()
        sock.sendall(b"POST /attack HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        victim.program.wait_for(r"log=\[EPERM\]")
        victim.program.wait_for("exited with code 9")
        victim.program.wait_for("serves again")


FLOODS = {
    "log lines": "for number in range(200_000):\n    role.role.log(6, f'{number} ' + 'x' * 1000)",
    "empty log lines": "for number in range(200_000):\n    role.role.channel.send(Kind.LOG, b'')",
    "ready": "for number in range(200_000):\n    role.role.channel.send(Kind.READY)",
    "objects for all": (
        "piece = bytes((Kind.OBJECT, 0, 0, 0)) + bytes(50_000)\n"
        "for number in range(20_000):\n    role.role.post._channel.send_message(piece)"
    ),
    "descriptors": (
        "try:\n    while True:\n        KEPT.append(os.dup(0))\nexcept OSError as error:\n    return error.errno"
    ),
    "threads": (
        "done = threading.Event()\ntry:\n    for _ in range(300):\n"
        "        threading.Thread(target=done.wait, args=(20,), daemon=True).start()\nfinally:\n    done.set()"
    ),
    "forks": (
        "for _ in range(10_000):\n    try:\n        os.fork()\n    except OSError as error:\n"
        "        wrong = error.errno\nreturn wrong"
    ),
    "memory files": "KEPT += [os.memfd_create('x') for _ in range(500)]",
    "pipes": "try:\n    while True:\n        KEPT.append(os.pipe())\nexcept OSError as error:\n    return error.errno",
}


@pytest.mark.parametrize("what", FLOODS)
def test_floods_hurt_nobody_else(victim, what):
    """While and after it the other worker answers, and the parent takes a signal."""
    body = FLOODS[what].encode()
    before = children(victim.program.pid)
    with socket.create_connection(victim.address, timeout=SECONDS) as sock:
        sock.sendall(b"POST /attack HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)

        def answers() -> bool:
            """A connection that the busy one took may end unheard, and one that it was woken for in vain (EMFILE) waits
            for the next to wake the other one: so it is asked again.
            """
            with contextlib.suppress(TimeoutError):
                return b" 200 " in http_get(victim.address, "/pid", 1.0)
            return False

        wait_until(answers, "the other one answers")
        answer = sock.recv(65536)
        assert b" 200 " in answer, answer
    assert children(victim.program.pid) == before
    for pid in before:
        if fds(pid) > 200:  # it cannot accept any more
            os.kill(pid, signal.SIGKILL)
            victim.program.wait_for("serves again")


def test_a_board_of_nonsense_is_a_route_that_is_not_known(victim):
    """The page that a worker shares with the parent, for the report of its death, holds what the worker likes."""
    code = """
board = role.role.server.board
for index in range(len(board)):
    board[index] = 0xFFFFFFFF
os._exit(9)
"""
    assert victim.attack(code) == ""
    victim.program.wait_for(r"exited with code 9, while serving route 4294967294 or idle after it")
    victim.program.wait_for("serves again")


def test_the_most_threads_and_the_parent_still_forks(victim):
    """Even while a worker has as many threads as it gets, a successor for the other one starts."""
    code = """
done = threading.Event()
KEPT.append(done)
for _ in range(500):
    try:
        threading.Thread(target=done.wait, args=(60,), daemon=True).start()
    except RuntimeError:
        break
return os.getpid()
"""
    attacker = int(victim.attack(code).removeprefix("returned "))
    (other,) = others(victim, attacker)
    os.kill(other, signal.SIGKILL)
    victim.program.wait_for("serves again")
    assert alive(attacker)


def test_what_is_said_on_the_spawners_socket_stays_there(victim):
    """Garbage ends the spawner of this worker; the worker serves on, and the other one's spawner lives."""
    code = """
client = spawning._spawner
client._sock.settimeout(0)
socket.send_fds(client._sock, [os.urandom(100)], [0, 0, 0, 0])
return os.getpid(), client.pid
"""
    worker, spawner = eval(victim.attack(code).removeprefix("returned "))
    wait_until(lambda: not alive(spawner), "the spawner ends")
    (other,) = others(victim, worker)
    assert alive(worker)
    assert len(children(other)) == 1, "the spawner of the other"
    assert Path(f"/proc/{victim.program.pid}").exists()
