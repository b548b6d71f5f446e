"""The parent with workers of a few lines: starting, restarting, stopping, and what it does when they misbehave.

Each test is a real parent process with real forks; the workers do nothing but what the test is about.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support import alive, children, starter, wait_until

HARNESS = """
import os, select, signal, sys, time
from kore.process import role
from kore.process.channel import Kind
from kore.process.log import Log, standard_output
from kore.process.orders import Orders
from kore.process.parent import Parent

def loop(place, *, deaf=False, on_signal=None):
    # The shortest worker there is: ready, then messages until it is told to end or the parent is gone.
    place.channel.send(Kind.READY)
    poller = select.poll()
    poller.register(place.channel.fileno(), select.POLLIN)
    while True:
        for number in list(place.early_signals):
            place.early_signals.remove(number)
            role.role.log(6, f"signal {number}")
            if number == signal.SIGTERM:
                return 0
        if not poller.poll(20):
            continue
        try:
            while (message := place.channel.receive()) is not None:
                role.role.log(6, f"told {message[0].name} {message[1]!r}")
                if not deaf:
                    return 0
        except EOFError:
            return 0

def serve(run_worker, **orders):
    log = Log(standard_output())
    orders.setdefault("workers", 2)
    orders.setdefault("on_ready", lambda pids: log.parent(6, f"ready: {pids}"))
    code = Parent(Orders(run_worker=run_worker, **orders), log).run()
    log.parent(6, "over")
    log.close()
    sys.exit(code)
"""


@pytest.fixture
def start(tmp_path):
    with starter(tmp_path) as programs:
        yield lambda text: programs.python(HARNESS + text)


def pids_of(program) -> list[int]:
    return [int(pid) for pid in re.findall(r"\d+", program.wait_for(r"ready: \[(.*?)\]")[1])]


def test_it_starts_the_workers_and_stops_them_with_exit_code_0(start):
    program = start("serve(loop)")
    pids = pids_of(program)
    assert sorted(pids) == sorted(children(program.pid))
    program.signal(signal.SIGTERM)
    assert program.wait() == 0
    assert program.out.count("told STOP b'\\x0f'") == 2
    assert not any(map(alive, pids))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGQUIT])
def test_interrupt_and_quit_stop_like_terminate(start, number):
    program = start("serve(loop)")
    pids_of(program)
    program.signal(number)
    assert program.wait() == 0


def test_a_killed_worker_is_replaced_at_once_and_reported(start):
    program = start("serve(loop)")
    first, second = pids_of(program)
    os.kill(first, signal.SIGKILL)
    report = program.wait_for(r"worker 1 \(pid (\d+)\) was killed by SIGKILL.*serving nothing, after .*before: 0")
    assert int(report[1]) == first
    again = int(program.wait_for(r"worker 1 serves again, pid (\d+)")[1])
    assert sorted(children(program.pid)) == sorted([again, second])


def test_the_report_names_the_route_that_was_being_served(start):
    program = start(
        """
def work(place):
    place.board[0] = 3
    return loop(place)
serve(work, workers=1, route_name=lambda index: {2: "/slow"}[index])
"""
    )
    (pid,) = pids_of(program)
    os.kill(pid, signal.SIGSEGV)
    program.wait_for(r"was killed by SIGSEGV.*while serving /slow")


def test_a_worker_that_ends_by_itself_with_code_0_is_replaced_too(start):
    program = start("serve(loop, restart=False)")
    first, _ = pids_of(program)
    os.kill(first, signal.SIGTERM)
    program.wait_for(r"worker 1 \(pid \d+\) exited with code 0")
    program.wait_for(r"worker 1 serves again")


def test_a_crash_loop_is_slowed_down_and_the_parent_still_listens(start):
    program = start(
        """
import os.path
def work(place):
    if os.path.exists("seen"):
        return 3
    open("seen", "w").close()
    return loop(place)
serve(work, workers=1)
"""
    )
    begin = time.monotonic()
    os.kill(pids_of(program)[0], signal.SIGKILL)
    for delay in ("0.1", "0.2", "0.4"):
        program.wait_for(rf"worker 1 is started again in {re.escape(delay)} s")
    assert program.out.count("exited with code 3") <= 4
    program.wait_for("exited with code 3", count=4)
    assert time.monotonic() - begin >= 0.7
    program.signal(signal.SIGTERM)
    assert program.wait() == 0


def test_policy_terminate_stops_the_server_with_exit_code_1(start):
    program = start("serve(loop, restart=False)")
    first, second = pids_of(program)
    os.kill(first, signal.SIGKILL)
    assert program.wait() == 1
    assert "worker_death_policy is terminate" in program.out
    assert not alive(second)


def test_a_failed_start_stops_everything_with_exit_code_255(start):
    program = start(
        """
def work(place):
    if place.worker == 2:
        raise RuntimeError("no database")
    return loop(place)
serve(work, workers=3)
"""
    )
    assert program.wait() == 255
    assert re.search(
        r"proc=\[wrk 2\] log=\[worker ended by RuntimeError\('no database'\), at \S+:\d+ work\]", program.out)
    assert "worker 2 failed to start" in program.out
    assert "ready" not in program.out
    assert children(program.pid) == []


def test_fatalx_at_start_is_exit_code_1(start):
    program = start("serve(lambda place: role.role.fatalx('told so'))")
    assert program.wait() == 1
    assert "log=[told so]" in program.out


def test_fatalx_later_stops_the_server_with_exit_code_1(start):
    program = start(
        """
def work(place):
    if place.worker == 1:
        place.channel.send(Kind.READY)
        signal.sigwait({signal.SIGUSR1})
        role.role.fatalx("enough")
    return loop(place)
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
serve(work)
"""
    )
    first, second = pids_of(program)
    os.kill(first, signal.SIGUSR1)
    assert program.wait() == 1
    assert "log=[enough]" in program.out
    assert not alive(second)


def test_fatal_is_a_death_like_another(start):
    program = start(
        """
def work(place):
    if place.worker == 1 and not os.path.exists("seen"):
        open("seen", "w").close()
        place.channel.send(Kind.READY)
        signal.sigwait({signal.SIGUSR1})
        role.role.fatal("broken")
    return loop(place)
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
serve(work)
"""
    )
    os.kill(pids_of(program)[0], signal.SIGUSR1)
    program.wait_for(r"proc=\[wrk 1\] log=\[broken\]")
    program.wait_for(r"worker 1 \(pid \d+\) exited with code 1")
    program.wait_for(r"worker 1 serves again")


def test_shutdown_stops_with_exit_code_0(start):
    program = start(
        """
def work(place):
    place.channel.send(Kind.READY)
    assert place.worker != 1 or role.role.shutdown() is True
    return loop(place)
serve(work)
"""
    )
    assert program.wait() == 0
    assert "worker 1 asks to stop the server" in program.out


def test_a_second_signal_ends_at_once_and_a_third_kills(start):
    program = start("serve(lambda place: loop(place, deaf=True), drain_seconds=60)")
    pids = pids_of(program)
    program.signal(signal.SIGTERM)
    program.wait_for(r"told STOP", count=2)
    program.signal(signal.SIGTERM)
    program.wait_for(r"told ABORT", count=2)
    program.signal(signal.SIGTERM)
    assert program.wait() == 0
    assert not any(map(alive, pids))


def test_workers_that_do_not_end_are_killed_at_the_deadline(start):
    program = start("serve(lambda place: loop(place, deaf=True), drain_seconds=0.1)")
    pids = pids_of(program)
    program.signal(signal.SIGTERM)
    assert program.wait() == 0
    assert "did not end in time and is killed" in program.out
    assert not any(map(alive, pids))


def test_the_death_of_the_parent_is_seen_at_the_channel(start):
    program = start("serve(loop)")
    pids = pids_of(program)
    program.signal(signal.SIGKILL)
    program.wait()
    wait_until(lambda: not any(map(alive, pids)), "the workers end")


def test_user_signals_are_passed_on_and_hangup_does_not_kill(start):
    program = start("serve(loop, trapped=frozenset({signal.SIGWINCH}))")
    pids_of(program)
    for number in (signal.SIGUSR1, signal.SIGHUP, signal.SIGWINCH):
        program.signal(number)
        program.wait_for(rf"log=\[signal {int(number)}\]", count=2)
    program.signal(signal.SIGTERM)
    assert program.wait() == 0


def test_a_worker_that_talks_nonsense_is_killed_and_replaced(start):
    program = start(
        """
def work(place):
    if not os.path.exists("seen"):
        open("seen", "w").close()
        place.channel.send(Kind.READY)
        place.channel.sock.send(bytes([250]))
        time.sleep(60)
    return loop(place)
serve(work, workers=1)
"""
    )
    program.wait_for(r"is killed: it sent a message of unknown kind 250")
    program.wait_for(r"worker 1 serves again")


def test_who_speaks_is_known_from_the_channel_and_lines_cannot_be_forged(start):
    program = start(
        r"""
def work(place):
    role.role.log(6, "x]\n2026-01-01 00:00:00.000 UTC proc=[parent] log=[forged")
    return loop(place)
serve(work, workers=1)
"""
    )
    pids_of(program)
    line = next(line for line in program.out.splitlines() if "forged" in line)
    assert re.fullmatch(r"\S+ \S+ UTC proc=\[wrk 1\] log=\[x\]\\n2026.*forged\]", line)


def test_a_worker_holds_neither_the_parents_fds_nor_another_workers_channel(start):
    program = start(
        """
def work(place):
    links = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            links.append(os.readlink(f"/proc/self/fd/{fd}"))
        except OSError:
            pass
    role.role.log(6, "sockets " + str(sum(link.startswith("socket:") for link in links)))
    role.role.log(6, "epolls " + str(sum("eventpoll" in link for link in links)))
    role.role.log(6, "private " + str(any(link == "/dev/zero" for link in links)))
    return loop(place)
zero = os.open("/dev/zero", os.O_RDONLY)
serve(work, workers=3, private_fds=lambda: (zero,))
"""
    )
    pids_of(program)
    program.wait_for(r"proc=\[wrk 3\] log=\[private False\]")
    assert program.out.count("sockets 2]") == 3, "its two channels"
    assert program.out.count("epolls 0]") == 3


def test_a_flood_of_lines_neither_blocks_the_worker_nor_loses_the_count(start):
    program = start(
        """
def work(place):
    for i in range(20000):
        role.role.log(6, f"line {i} " + "x" * 200)
    role.role.last_words()
    return loop(place)
serve(work, workers=1)
"""
    )
    pids_of(program)
    program.signal(signal.SIGTERM)
    program.wait()
    lost = sum(int(count) for count in re.findall(r"(\d+) log lines were dropped", program.out))
    assert len(re.findall(r"log=\[line \d+ x{200}\]\n", program.out)) + lost == 20000


def test_exit_functions_and_buffers_of_a_worker_are_run_and_flushed_once(start):
    program = start(
        """
import atexit
def work(place):
    atexit.register(lambda: print(f"from atexit {place.worker}"))
    return loop(place)
serve(work, workers=1)
"""
    )
    pids_of(program)
    program.signal(signal.SIGTERM)
    assert program.wait() == 0
    assert program.out.count("from atexit 1") == 1
    assert program.out.count("over") == 1


def test_as_process_1_of_a_container_it_buries_orphans(tmp_path):
    probe = subprocess.run(["unshare", "-pf", "true"], capture_output=True, check=False)
    if probe.returncode != 0:
        pytest.skip(f"unshare(2) of the pid namespace: {probe.stderr.decode().strip()}")
    script = HARNESS + """
def work(place):
    if os.fork() == 0:
        if os.fork() == 0:
            os.execvp("sleep", ["sleep", "0.2"])
        os._exit(0)
    os.wait()
    return loop(place)
assert os.getpid() == 1
serve(work, workers=1)
"""
    with starter(tmp_path) as programs:
        program = programs.command("unshare", "-pf", "--kill-child", sys.executable, "-c", script)
        program.wait_for("ready: ")
        (parent,) = children(program.pid)

        def states():
            listed = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
            return sorted(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] for pid in listed)

        wait_until(lambda: len(states()) == 2, "the orphan has come to process 1")
        wait_until(lambda: states() == ["S"], "the orphan is buried and the worker lives")
        os.kill(parent, signal.SIGTERM)
        assert program.wait() == 0
