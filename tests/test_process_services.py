"""The parent's table of services: their order at the start and at the end, their pairs, and their successors.

Each test is a real parent with real forks; the services do nothing but what the test is about.
"""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest

from tests.support import alive, children, starter, wait_until
from tests.test_process_parent import HARNESS

SERVICES = HARNESS + """
import socket
from kore.process.channel import Channel
from kore.process.services import Row

def attend(place, *, ready=True, on_join=None, end=lambda: 0):
    # The shortest service there is: ready, then messages until the parent closes its side.
    role.role.log(6, f"begins, {place.restarts} before")
    if ready:
        place.channel.send(Kind.READY)
    poller = select.poll()
    poller.register(place.channel.fileno(), select.POLLIN)
    while True:
        poller.poll()
        try:
            while (message := place.channel.receive_fd()) is not None:
                kind, body, fd = message
                role.role.log(6, f"told {kind.name} {body.split()[0] if body else b''!r}")
                if fd is not None and on_join:
                    on_join(kind, body, fd)
        except EOFError:
            role.role.log(6, "ends")
            return end()

def row(name, run=attend, **more):
    return Row(name=name, what=f"the {name}", run=run, **more)
"""


@pytest.fixture
def start(tmp_path):
    with starter(tmp_path) as programs:
        yield lambda text: programs.python(SERVICES + text)


def named(program) -> dict[str, int]:
    """The services by name."""
    names = {pid: Path(f"/proc/{pid}/comm").read_text() for pid in children(program.pid)}
    return {name.partition("[")[2].strip("]\n"): pid for pid, name in names.items()}


def order(program, *patterns: str) -> None:
    """All of them are in the output, one after the other."""
    places = [re.search(pattern, program.out).start() for pattern in patterns]
    assert places == sorted(places), program.out


def test_each_waits_for_the_one_before_and_the_workers_for_all(start):
    """And at the end the other way round."""
    program = start("serve(loop, services=lambda parent: [row('one'), row('two')])")
    program.wait_for("ready: ")
    assert len(children(program.pid)) == 4
    program.signal(signal.SIGTERM)
    assert program.wait() == 0
    order(
        program, r"\[one\] log=\[begins", r"\[two\] log=\[begins", "ready: ", r"\[wrk 2\] log=\[told STOP",
        r"\[two\] log=\[ends", r"\[one\] log=\[ends", "over")
    assert "killed" not in program.out


def test_no_worker_is_forked_before_a_service_is_ready(start):
    program = start(
        "def slow(place):\n    role.role.log(6, f'alone: {len(os.listdir(\"/proc/self/task\"))}')\n"
        "    open('asked', 'w').close()\n    while not os.path.exists('go'):\n        time.sleep(0.01)\n"
        "    return attend(place)\n"
        "serve(loop, services=lambda parent: [row('slow', slow)])"
    )
    wait_until((program.directory / "asked").exists, "the service runs")
    assert len(children(program.pid)) == 1
    (program.directory / "go").touch()
    program.wait_for("ready: ")
    assert len(children(program.pid)) == 3


def test_a_start_fails_whose_service_dies(start):
    program = start("serve(loop, services=lambda parent: [row('one', lambda place: 3), row('two')])")
    assert program.wait() == 255
    program.wait_for(r"the one \(pid \d+\) exited with code 3 before it was ready")
    assert "[two]" not in program.out
    assert "another takes its place" not in program.out


def test_a_service_may_end_the_server(start):
    program = start(
        "def fatal(place):\n    place.channel.send_last(Kind.FATALX)\n    return 1\n"
        "serve(loop, services=lambda parent: [row('one', fatal)])"
    )
    assert program.wait() == 1
    program.wait_for("the one stops the server: fatalx")


def test_it_has_a_successor_and_workers_live_on(start):
    program = start("serve(loop, services=lambda parent: [row('one', without=', and something waits')])")
    program.wait_for("ready: ")
    service = named(program)["one"]
    workers = set(children(program.pid)) - {service}
    os.kill(service, signal.SIGKILL)
    program.wait_for(r"the one \(pid \d+\) was killed by SIGKILL.*; another takes its place, and something waits")
    program.wait_for("the one is there again, pid ")
    assert workers < set(children(program.pid))


def test_successors_come_later_and_later(start):
    program = start(
        """
def once(place):
    return 3 if place.restarts else attend(place)
serve(loop, services=lambda parent: [row('one', once)])
"""
    )
    program.wait_for("ready: ")
    service = named(program)["one"]
    os.kill(service, signal.SIGKILL)
    for delay in ("0.1", "0.2", "0.4"):
        program.wait_for(rf"before it was ready; another takes its place in {re.escape(delay)} s")
    program.signal(signal.SIGTERM)
    assert program.wait() == 0


def test_one_with_a_bound_is_given_up(start):
    program = start(
        """
def dies(place):
    return 3
serve(loop, services=lambda parent: [row(
    'one', dies, says_ready=False, deaths_max=3, given_up=lambda text: parent.log.parent(6, f'given up: {text}'))])
"""
    )
    program.wait_for(r"given up: the one \(pid \d+\) exited with code 3")
    program.wait_for("ready: ")
    assert program.out.count("[one]") == 0
    program.signal(signal.SIGTERM)
    assert program.wait() == 0


def test_one_that_does_not_end_is_killed(start):
    program = start(
        "serve(loop, services=lambda parent: [row('one', lambda place: attend(place, end=lambda: time.sleep(600)))])"
    )
    program.wait_for("ready: ")
    program.signal(signal.SIGTERM)
    assert program.wait() == 0
    program.wait_for(r"the one \(pid \d+\) did not end in time and is killed")


PAIRS = """
def heard(fd):
    sock = socket.socket(fileno=fd)
    sock.setblocking(True)
    return sock.recv(100)

def serves(place):
    def joined(kind, body, fd):
        socket.socket(fileno=fd).send(b"hello " + body)
    return attend(place, on_join=joined)

def work(place):
    place.channel.send(Kind.READY)
    while True:
        select.select([place.channel], [], [])
        message = place.channel.receive_fd()
        if message is None:
            continue
        kind, body, fd = message
        if kind is not Kind.KEYS:
            return 0
        worker, pid = heard(fd).split()[1:]
        role.role.log(6, f"served as {worker.decode()}, {int(pid) == os.getpid()}")

def asks(place):
    return attend(place, on_join=lambda kind, body, fd: role.role.log(6, f"has {heard(fd)}"))
"""


def test_a_service_has_a_pair_with_each_it_serves(start):
    """With workers and with other services, whoever was there first, and again when either is started again."""
    program = start(PAIRS + """
serve(work, services=lambda parent: [
    row('server', serves, serves=frozenset({'worker', 'asker'})), row('asker', asks), row('other')])
""")
    program.wait_for(r"\[wrk 1\] log=\[served as 1, True\]")
    program.wait_for(r"\[wrk 2\] log=\[served as 2, True\]")
    program.wait_for(r"\[asker\] log=\[has b'hello 0 ")
    program.wait_for("ready: ")
    server = named(program)["server"]
    worker = int(program.wait_for(r"ready: \[(\d+)")[1])
    os.kill(worker, signal.SIGKILL)
    program.wait_for(r"\[wrk 1\] log=\[served as 1, True\]", count=2)
    os.kill(server, signal.SIGKILL)
    program.wait_for(r"\[wrk 2\] log=\[served as 2, True\]", count=2)
    program.wait_for(r"\[wrk 1\] log=\[served as 1, True\]", count=3)
    program.wait_for(r"\[asker\] log=\[has b'hello 0 ", count=2)
    assert "[other] log=[told" not in program.out


FORGED = {
    "a worker's message": ("Kind.SHUTDOWN", "a SHUTDOWN, which the one does not send"),
    "the parent's": ("Kind.STOP", "a STOP, which the one does not send"),
    "ready twice": ("Kind.READY", "a READY, which the one does not send"),
    "abuse that is none of its": ("Kind.ABUSE", "a ABUSE, which the one does not send"),
    "nonsense": ("200", "a message of unknown kind 200"),
}


@pytest.mark.parametrize("what", FORGED)
def test_one_that_talks_nonsense_is_killed(start, what):
    kind, reason = FORGED[what]
    program = start(f"""
def forge(place):
    if not place.restarts:
        place.channel.send(Kind.READY)
        while not os.path.exists('go'):
            time.sleep(0.01)
        place.channel.sock.send(bytes(({kind},)) + b'1 2 3')
    return attend(place)
serve(loop, services=lambda parent: [row('one', forge)])
""")
    program.wait_for("ready: ")
    (program.directory / "go").touch()
    program.wait_for(rf"the one \(pid \d+\) is killed: it sent {reason}")
    program.wait_for("the one is there again")


def test_signals_are_passed_on_to_who_wants_them(start):
    program = start(
        """
def hears(place):
    signal.signal(signal.SIGUSR1, lambda *_: role.role.log(6, "heard"))
    return attend(place)
serve(loop, services=lambda parent: [
    row('one', hears, signals=frozenset({signal.SIGUSR1})), row('two', hears)])
"""
    )
    program.wait_for("ready: ")
    program.signal(signal.SIGUSR1)
    program.wait_for(r"\[one\] log=\[heard\]")
    program.signal(signal.SIGTERM)
    assert program.wait() == 0
    assert "[two] log=[heard]" not in program.out


def test_services_end_with_the_parent(start):
    """The parent-death signal, whatever they do."""
    program = start(
        "def busy(place):\n    place.channel.send(Kind.READY)\n    time.sleep(600)\n"
        "serve(loop, services=lambda parent: [row('one', busy)])"
    )
    program.wait_for("ready: ")
    family = children(program.pid)
    program.signal(signal.SIGKILL)
    wait_until(lambda: not any(map(alive, family)), "nobody is left")
