"""A worker in other hands: whatever is sent to a spawner, it starts nothing it must not, waits for nobody, and ends."""

from __future__ import annotations

import array
import os
import select
import signal
import socket
from pathlib import Path

import pytest
from spawner_harness import hiring
from support import SECONDS, alive, wait_until

from kore.sandbox.requests import HEAD_BYTES, REPLY_BYTES, Outcome, pack_request, parse_reply
from kore.sandbox.spawner_process import EXIT_PROTOCOL

pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning", "error::ResourceWarning")


@pytest.fixture
def hire():
    """Makes spawners; each ends with the test."""
    yield from hiring()


class Attacker:
    """What has taken a worker over: it holds the socket of requests, and a child that was started before."""

    def __init__(self, hire) -> None:
        self.spawner = hire()
        self.sock = self.spawner._sock
        self.null = os.open("/dev/null", os.O_RDWR)
        self.victim = self.spawner.spawn("sleep", ["sleep", "1000"], os.environ, (self.null,) * 3)
        self.message = pack_request(1, "/", "true", ["true"], {"PATH": "/bin:/usr/bin"}, new_session=False)

    def send(self, message: bytes, descriptors=()) -> None:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
        self.sock.sendmsg([message], rights)

    def channel(self) -> tuple[socket.socket, socket.socket]:
        return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def exit_code(self) -> int:
        """Of the spawner; the child has ended too."""
        code = os.waitstatus_to_exitcode(os.waitpid(self.spawner.pid, 0)[1])
        wait_until(lambda: not alive(self.victim.pid), "the child is killed")
        self.close()
        return code

    def close(self) -> None:
        self.victim.close()
        os.close(self.null)


@pytest.mark.parametrize("how", [
    "garbage", "no descriptors", "three", "five", "fifty", "later ones", "length", "counts", "longer", "empty program",
    "channel is a file", "channel is a pipe", "channel is an epoll",
])
def test_what_is_no_request_ends_the_conversation(hire, how) -> None:
    """And every program of that worker: whoever speaks so is not the worker's code."""
    attacker = Attacker(hire)
    here, there = attacker.channel()
    null, message = attacker.null, attacker.message
    four = [there.fileno(), null, null, null]
    if how == "garbage":
        attacker.send(os.urandom(100), four)
    elif how == "no descriptors":
        attacker.send(message)
    elif how in ("three", "five", "fifty"):
        attacker.send(message, [there.fileno()] + [null] * {"three": 2, "five": 4, "fifty": 49}[how])
    elif how == "later ones":
        attacker.send(message[:HEAD_BYTES], four)
        attacker.send(message[HEAD_BYTES:], [null])
    elif how == "length":
        attacker.send(message[:8] + (2**32 - 1).to_bytes(4, "little") + message[12:], four)
    elif how == "counts":
        attacker.send(message[:12] + (2**32 - 1).to_bytes(4, "little") + message[16:], four)
    elif how == "longer":
        attacker.send(message + b"more", four)
    elif how == "empty program":
        attacker.send(message.replace(b"\0true\0", b"\0\0true", 1), four)
    elif how == "channel is a file":
        attacker.send(message, [null] * 4)
    elif how == "channel is a pipe":
        ends = os.pipe()
        attacker.send(message, [ends[0], null, null, null])
        for end in ends:
            os.close(end)
    else:
        with select.epoll() as poller:
            attacker.send(message, [poller.fileno(), null, null, null])
    here.close()
    there.close()
    assert attacker.exit_code() == EXIT_PROTOCOL


def test_a_signal_that_is_none(hire) -> None:
    """On a channel: the same end."""
    attacker = Attacker(hire)
    os.write(attacker.victim._channel, b"\0\xff")
    assert attacker.exit_code() == EXIT_PROTOCOL


def test_half_a_request_holds_nobody_up(hire) -> None:
    """While the other half does not come, ends of children are told and signals passed on."""
    attacker = Attacker(hire)
    here, there = attacker.channel()
    attacker.send(attacker.message[:HEAD_BYTES], [there.fileno(), *[attacker.null] * 3])
    attacker.victim.send_signal(signal.SIGTERM)
    wait_until(lambda: attacker.victim.look() is not None, "the end is told")
    assert attacker.victim.look() == signal.SIGTERM
    attacker.send(attacker.message[HEAD_BYTES:])
    assert parse_reply(attacker.sock.recv(REPLY_BYTES))[1] is Outcome.STARTED
    here.close()
    there.close()
    attacker.close()


def test_replies_that_nobody_reads(hire) -> None:
    """The spawner does not wait for room: it ends."""
    attacker = Attacker(hire)
    here, there = attacker.channel()
    bad = pack_request(1, "/nowhere", "true", ["true"], {}, new_session=False)
    attacker.sock.settimeout(SECONDS)
    with pytest.raises((BrokenPipeError, ConnectionResetError)):
        for _ in range(100_000):
            attacker.send(bad, [there.fileno(), *[attacker.null] * 3])
    here.close()
    there.close()
    assert attacker.exit_code() == EXIT_PROTOCOL


def test_a_late_answer_is_nobodys(hire, monkeypatch) -> None:
    """A request that was given up: its answer is not taken for that of the next, and its program is killed."""
    spawner = hire()
    null = os.open("/dev/null", os.O_RDWR)
    os.kill(spawner.pid, signal.SIGSTOP)
    spawner._sock.settimeout(0.05)
    with pytest.raises(TimeoutError, match="has not answered"):
        spawner.spawn("sleep", ["sleep", "1000"], os.environ, (null, null, null))
    spawner._sock.settimeout(SECONDS)
    os.kill(spawner.pid, signal.SIGCONT)
    reader, writer = os.pipe()
    program = spawner.spawn("sh", ["sh", "-c", "echo $$; exit 3"], os.environ, (null, writer, null))
    assert int(os.read(reader, 100)) == program.pid
    os.close(reader)
    os.close(writer)
    wait_until(lambda: program.look() is not None, "the end is told")
    assert os.waitstatus_to_exitcode(program.look()) == 3
    wait_until(
        lambda: not Path(f"/proc/{spawner.pid}/task/{spawner.pid}/children").read_text(), "the other one is killed")
    program.close()
    os.close(null)
