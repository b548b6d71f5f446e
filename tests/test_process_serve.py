"""Whole servers with real workers: what operators do to them, and what must still hold afterwards."""

from __future__ import annotations

import functools
import os
import re
import signal
import socket
import time
from pathlib import Path

import pytest

from tests.support import (
    READY,
    SECONDS,
    SERVER_APP,
    alive,
    children,
    free_port,
    http_get,
    open_files,
    pids_of,
    starter,
    wait_until,
)


@pytest.fixture
def start(tmp_path, engine):
    with starter(tmp_path) as programs:
        yield functools.partial(programs.serve, io=engine)


def stop(program) -> str:
    program.signal(signal.SIGTERM)
    assert program.wait() == 0, program.out + program.err
    return program.out


def test_it_serves_and_stops_and_leaves_nothing(start, engine):
    program = start()
    assert http_get(program.address).endswith(b"\r\n\r\nhello")
    assert (program.directory / "kore.pid").read_text() == f"{program.pid}\n"
    pids = pids_of(program)
    assert len(pids) == 2
    out = stop(program)
    assert f"engine {engine}" in out
    assert f"serving http on http://127.0.0.1:{program.address[1]}" in out
    assert out.rstrip().endswith("log=[goodbye]")
    assert not any(map(alive, pids))
    assert not (program.directory / "kore.pid").exists()
    assert program.err == ""


def test_every_line_of_the_log_has_the_documented_format(start):
    program = start("def kore_worker_configure():\n    kore.log(kore.LOG_ERR, 'two\\nlines')\n")
    for line in stop(program).splitlines():
        assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} UTC proc=\[(parent|wrk \d)\] log=\[.*\]", line)
    assert r"proc=[wrk 1] log=[two\nlines]" in program.out


def test_processes_bear_their_role_in_title_and_short_name(start):
    program = start("kore.setname('shop')")
    first, second = pids_of(program)
    for pid, role in ((program.pid, "[parent]"), (first, "[wrk 1]"), (second, "[wrk 2]")):
        assert Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").decode() == f"shop {role}"
        assert Path(f"/proc/{pid}/comm").read_text() == f"shop {role}\n"
        assert b"KORE_IO=" in Path(f"/proc/{pid}/environ").read_bytes(), "the environment is intact"


def test_workers_are_pinned_within_the_allowed_mask(start):
    program = start(workers=3)
    allowed = sorted(os.sched_getaffinity(0))
    found = [os.sched_getaffinity(pid) for pid in pids_of(program)]
    assert found == [{allowed[k % len(allowed)]} for k in range(3)]


def test_affinity_can_be_turned_off(start):
    program = start(options="kore.config.worker_set_affinity = 0", workers=1)
    assert os.sched_getaffinity(pids_of(program)[0]) == os.sched_getaffinity(0)


def test_a_killed_worker_is_replaced_and_the_queue_is_kept(start):
    program = start(workers=1)
    (first,) = pids_of(program)
    os.kill(first, signal.SIGSTOP)
    # Before it has really stopped it could still accept, and what it accepted dies with it.
    wait_until(lambda: Path(f"/proc/{first}/stat").read_text().rpartition(")")[2].split()[0] == "T", "the stop")
    with socket.create_connection(program.address, timeout=SECONDS) as waiting:
        waiting.sendall(b"GET /pid HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        os.kill(first, signal.SIGKILL)
        answer = b""
        while piece := waiting.recv(4096):
            answer += piece
    again = int(program.wait_for(r"worker 1 serves again, pid (\d+)")[1])
    assert answer.endswith(b"\r\n\r\n%d" % again), "the successor served what was waiting"
    program.wait_for(rf"worker 1 \(pid {first}\) was killed by SIGKILL")


def test_the_report_names_the_route(start):
    program = start(workers=1)
    (pid,) = pids_of(program)
    with socket.create_connection(program.address, timeout=SECONDS) as client:
        client.sendall(b"GET /spin HTTP/1.1\r\nHost: x\r\n\r\n")
        before = cpu_time(pid)
        wait_until(lambda: cpu_time(pid) > before + 10, "the handler spins")
        os.kill(pid, signal.SIGKILL)
        program.wait_for(r"was killed by SIGKILL.*while serving .*/spin")


def cpu_time(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11])


def test_the_report_of_a_worker_that_served_nothing_names_no_route(start):
    program = start(workers=1)
    os.kill(pids_of(program)[0], signal.SIGKILL)
    program.wait_for(r"was killed by SIGKILL.*while serving nothing")


def test_policy_terminate(start):
    program = start(options="kore.config.worker_death_policy = 'terminate'")
    os.kill(pids_of(program)[0], signal.SIGKILL)
    assert program.wait() == 1
    assert not (program.directory / "kore.pid").exists()


def test_requests_that_run_are_finished_and_new_connections_refused(start):
    program = start(workers=1)
    with socket.create_connection(program.address, timeout=SECONDS) as client:
        client.sendall(b"GET /slow HTTP/1.1\r\nHost: x\r\n\r\n")
        program.wait_for("slow begins")
        program.signal(signal.SIGTERM)
        answer = b""
        while piece := client.recv(4096):
            answer += piece
    assert answer.endswith(b"slow")
    assert program.wait() == 0
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(program.address, timeout=1)


def test_a_write_that_nobody_reads_ends_no_worker(start):
    """EPIPE, also where the application had the signal end the process (as programs for a terminal do)."""
    text = """
import signal
signal.signal(signal.SIGPIPE, signal.SIG_DFL)

@kore.route("/broken", domain=home, methods=["get"])
def broken(req):
    reading, writing = os.pipe()
    os.close(reading)
    try:
        os.write(writing, b"x")
    except BrokenPipeError:
        req.response(200, b"an error")
    finally:
        os.close(writing)
"""
    program = start(text=text)
    assert http_get(program.address, "/broken").endswith(b"an error")
    stop(program)


def test_an_idle_connection_does_not_delay_the_end(start):
    program = start("", "-rn", deployment="docker")  # ten seconds to drain
    with socket.create_connection(program.address, timeout=SECONDS) as idle:
        idle.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert idle.recv(4096).endswith(b"hello")
        begin = time.monotonic()
        stop(program)
        assert idle.recv(4096) == b""
    assert time.monotonic() - begin < 5


def test_a_request_that_does_not_end_is_closed_at_the_deadline(start):
    """And its worker ends by itself: it is killed a second later, which a busy machine can take for that."""
    program = start("import kore.process.parent\nkore.process.parent.KILL_GRACE_SECONDS = 20.0", workers=1)
    with socket.create_connection(program.address, timeout=SECONDS) as client:
        client.sendall(b"GET /never HTTP/1.1\r\nHost: x\r\n\r\n")
        program.wait_for("never begins")
        begin = time.monotonic()
        stop(program)
    assert 0.9 < time.monotonic() - begin < 10
    assert "never ends" in program.out, "its finally block ran"
    assert "is killed" not in program.out


def test_a_second_signal_ends_at_once(start):
    program = start("", "-rn", workers=1, deployment="docker")
    with socket.create_connection(program.address, timeout=SECONDS) as client:
        client.sendall(b"GET /never HTTP/1.1\r\nHost: x\r\n\r\n")
        program.wait_for("never begins")
        begin = time.monotonic()
        program.signal(signal.SIGTERM)
        program.wait_for("stopping, at most 10 s")
        program.signal(signal.SIGTERM)
        assert program.wait() == 0
    assert time.monotonic() - begin < 5


def test_a_worker_that_is_stuck_is_killed(start):
    program = start(workers=1)
    with socket.create_connection(program.address, timeout=SECONDS) as client:
        client.sendall(b"GET /spin HTTP/1.1\r\nHost: x\r\n\r\n")
        pid = pids_of(program)[0]
        before = cpu_time(pid)
        wait_until(lambda: cpu_time(pid) > before + 10, "the handler spins")
        stop(program)
    assert "did not end in time and is killed" in program.out


def test_the_workers_die_with_a_killed_parent_even_when_stuck(start):
    program = start()
    pids = pids_of(program)
    os.kill(pids[0], signal.SIGSTOP)
    program.signal(signal.SIGKILL)
    program.wait()
    wait_until(lambda: not any(map(alive, pids)), "the workers are gone")


def test_a_signal_to_the_whole_group_is_one_stop(start):
    program = start("def kore_worker_signal(number):\n    kore.log(kore.LOG_INFO, f'hook {number}')\n", workers=1)
    (pid,) = pids_of(program)
    with socket.create_connection(program.address, timeout=SECONDS) as client:
        client.sendall(b"GET /slow HTTP/1.1\r\nHost: x\r\n\r\n")
        program.wait_for("slow begins")
        for target in (pid, program.pid):
            os.kill(target, signal.SIGINT)
        answer = client.recv(4096)
    assert answer.endswith(b"slow")
    assert program.wait() == 0
    assert program.out.count("hook 2]") == 1


def test_a_worker_stopped_by_hand_drains_and_is_replaced(start):
    program = start(workers=1)
    (pid,) = pids_of(program)
    os.kill(pid, signal.SIGTERM)
    program.wait_for(rf"worker 1 \(pid {pid}\) exited with code 0")
    program.wait_for(r"worker 1 serves again")
    assert http_get(program.address).endswith(b"hello")


HOOKS = """
class App:
    def configure(self, args):
        kore.sigtrap(12)
        kore.log(kore.LOG_INFO, f"configure {kore.worker()}")
    def workerstart(self):
        kore.sigtrap(28)
        kore.log(kore.LOG_INFO, f"workerstart {kore.worker()}")
    def workerstop(self):
        kore.log(kore.LOG_INFO, "workerstop")
    def signal(self, number):
        kore.log(kore.LOG_INFO, f"signal {number}")
    def cleanup(self):
        kore.log(kore.LOG_INFO, f"cleanup {kore.worker()}")
        1 / 0

async def task():
    kore.log(kore.LOG_INFO, "task")

koreapp = App()
kore.task_create(task())
"""


def test_hooks_are_called_in_their_processes_in_order(start):
    program = start(HOOKS)
    pids = pids_of(program)
    program.signal(signal.SIGUSR1)
    program.wait_for("signal 10", count=2)
    program.signal(signal.SIGUSR2)
    program.wait_for("signal 12", count=2)
    program.signal(signal.SIGHUP)
    program.wait_for("signal 1]", count=2)
    os.kill(pids[0], 28)
    program.wait_for("signal 28")
    out = stop(program)
    story = [line.partition("proc=")[2] for line in out.splitlines()]
    one = [line for line in story if line.startswith("[wrk 1]")]
    assert one[:2] == ["[wrk 1] log=[workerstart 1]", "[wrk 1] log=[task]"]
    assert one[-2:] == ["[wrk 1] log=[signal 15]", "[wrk 1] log=[workerstop]"]
    assert "[parent] log=[configure None]" in story
    assert story.index("[parent] log=[cleanup None]") > max(story.index(line) for line in one)
    (failed,) = [line for line in story if "ZeroDivisionError" in line]
    assert re.fullmatch(
        r"\[parent\] log=\[python_runtime_execute: uncaught exception: ZeroDivisionError\('division by zero'\), "
        r"at app\.py:\d+ cleanup\]", failed)


def test_a_failing_workerstart_is_a_failed_start(start):
    program = start("def kore_worker_configure():\n    1 / 0\n", wait=False)
    assert program.wait() == 255
    assert "python_runtime_execute: uncaught exception: ZeroDivisionError" in program.out
    assert "log=[ready" not in program.out
    assert not (program.directory / "kore.pid").exists()


def test_fatalx_at_start(start):
    program = start("def kore_worker_configure():\n    kore.fatalx('no database')\n", wait=False)
    assert program.wait() == 1
    assert "log=[no database]" in program.out


def test_fatal_in_the_parent(start):
    program = start("kore.fatal('not like this')", wait=False)
    assert program.wait() == 1
    assert "proc=[parent] log=[not like this]" in program.out


FATAL = """
@kore.route("/fatal", domain=home, methods=["get"])
def fatal(req):
    kore.fatal("fatal said")

@kore.route("/fatalx", domain=home, methods=["get"])
async def fatalx(req):
    kore.fatalx("fatalx said")

@kore.route("/shutdown", domain=home, methods=["get"])
def shutdown(req):
    req.response(200, repr(kore.shutdown()).encode())
"""


def poke(program, path):
    with socket.create_connection(program.address, timeout=SECONDS) as client:
        client.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        return client.recv(4096)


def test_fatal_in_a_handler_costs_that_worker(start):
    program = start(FATAL, workers=1)
    poke(program, "/fatal")
    program.wait_for(r"proc=\[wrk 1\] log=\[fatal said\]")
    program.wait_for(r"exited with code 1, while serving .*/fatal")
    program.wait_for(r"worker 1 serves again")
    assert http_get(program.address).endswith(b"hello")


def test_fatalx_in_a_handler_stops_the_server(start):
    program = start(FATAL)
    poke(program, "/fatalx")
    assert program.wait() == 1
    assert "log=[fatalx said]" in program.out


def test_shutdown_in_a_handler_stops_the_server_and_answers(start):
    program = start(FATAL)
    assert poke(program, "/shutdown").endswith(b"True")
    assert program.wait() == 0


def test_a_production_server_goes_into_the_background_and_logs_to_its_file(start):
    options = "kore.config.logfile = 'kore.log'\nkore.config.pidfile = 'run.pid'"
    program = start("", "-rn", deployment="production", options=options, wait=False)
    pidfile = program.directory / "run.pid"
    wait_until(lambda: pidfile.exists() and pidfile.read_text(), "the daemon has written its pid")
    pid = int(pidfile.read_text())
    try:
        assert program.wait() == 0, program.err
        assert http_get(program.address).endswith(b"hello"), "the command returned when it served"
        assert os.readlink(f"/proc/{pid}/cwd") == str(program.directory)
        assert os.getsid(pid) != os.getsid(0)
        workers = children(pid)
        os.kill(pid, signal.SIGINT)
        os.kill(pid, signal.SIGHUP)
        log = program.directory / "kore.log"
        wait_until(lambda: "SIGHUP" in log.read_text(), "the hangup is heard, the interrupt is not")
        assert "SIGINT" not in log.read_text()
        log.rename(program.directory / "kore.log.1")
        os.kill(pid, signal.SIGHUP)
        wait_until(log.exists, "the logfile is opened again")
    finally:
        os.kill(pid, signal.SIGTERM)
    wait_until(lambda: not alive(pid), "the daemon ends")
    assert not any(map(alive, workers))
    assert "goodbye" in log.read_text()
    assert not (program.directory / "run.pid").exists()


def test_a_production_server_that_cannot_start_says_so_in_front(start):
    program = start(
        "def kore_worker_configure():\n    1 / 0\n",
        "-rn",
        deployment="production",
        options="kore.config.logfile = 'kore.log'",
        wait=False,
    )
    assert program.wait() == 255
    assert "did not start" in program.err
    assert "ZeroDivisionError" in (program.directory / "kore.log").read_text()


def test_the_command_line_overrules_the_deployment(start):
    program = start("", "-rnf", deployment="production")
    assert http_get(program.address).endswith(b"hello")
    stop(program)


def test_development_lives_in_its_root_directory(start, tmp_path):
    (tmp_path / "inner").mkdir()
    program = start(options="kore.config.root = 'inner'", workers=1)
    assert os.readlink(f"/proc/{pids_of(program)[0]}/cwd") == str(tmp_path / "inner")


def test_a_second_server_in_the_same_directory_runs_without_a_pidfile(start):
    first = start()
    second = start()
    assert f"pid {first.pid} is running with it; this server runs without a pidfile" in second.out
    stop(second)
    assert (first.directory / "kore.pid").read_text() == f"{first.pid}\n"


def test_a_pidfile_that_was_asked_for_and_is_held_stops_the_start(start):
    start(options="kore.config.pidfile = 'mine.pid'")
    second = start(options="kore.config.pidfile = 'mine.pid'", wait=False)
    assert second.wait() == 1
    assert "is running with it" in second.err


def test_unix_and_abstract_sockets(start, tmp_path):
    name = f"@kore-test-{os.getpid()}-{free_port()}"
    program = start(
        f"kore.server('file', path='app.sock', tls=False)\nkore.server('abstract', path='{name}', tls=False)\n"
        "for attach in ('file', 'abstract'):\n"
        "    kore.domain('*', attach=attach).route('/', index, methods=['get'])\n"
    )
    for _ in range(3):
        assert http_get(str(tmp_path / "app.sock")).endswith(b"hello")
        assert http_get("\0" + name[1:]).endswith(b"hello")
    stop(program)
    assert not (tmp_path / "app.sock").exists()


def test_workers_hold_only_what_is_theirs(start):
    program = start(options="kore.config.logfile = 'kore.log'", wait=False)
    log = program.directory / "kore.log"
    wait_until(lambda: log.exists() and "log=[ready" in log.read_text(), "it serves")
    for pid in children(program.pid):
        assert not [path for path in open_files(pid) if path.endswith((".log", ".pid"))]


def test_a_worker_that_does_not_accept_runs_its_tasks(start):
    program = start(
        "async def task():\n    kore.log(kore.LOG_INFO, 'task')\nkore.task_create(task())\n",
        options="kore.config.worker_no_accept = 1",
    )
    program.wait_for(r"proc=\[wrk 1\] log=\[task\]")
    second = pids_of(program)[1]
    for _ in range(10):
        assert http_get(program.address, "/pid").endswith(b"\r\n\r\n%d" % second)


def test_tasks_alone_are_a_server_too(tmp_path, engine):
    with starter(tmp_path) as programs:
        program = programs.app(
            "import kore\nkore.config.workers = 1\nkore.config.deployment = 'dev'\n"
            "async def task():\n    kore.log(kore.LOG_INFO, 'runs')\nkore.task_create(task())\n",
            environment={"KORE_IO": engine},
        )
        program.wait_for(r"proc=\[wrk 1\] log=\[runs\]")
        stop(program)


def test_a_flood_of_log_lines_from_a_handler_is_counted(start):
    program = start(
        "@kore.route('/flood', methods=['get'])\n"
        "def flood(req):\n"
        "    for i in range(20000):\n"
        "        kore.log(kore.LOG_INFO, f'line {i} ' + 'x' * 200)\n"
        "    req.response(200, b'done')\n",
        workers=1,
        options="kore.config.http_request_ms = 0",  # no line about the handler that takes so long
    )
    assert http_get(program.address, "/flood").endswith(b"done")
    stop(program)
    lost = sum(int(count) for count in re.findall(r"(\d+) log lines were dropped", program.out))
    assert len(re.findall(r"log=\[line \d+ x{200}\]\n", program.out)) + lost == 20000


def test_a_descriptor_limit_that_is_too_low_is_told(tmp_path, engine):
    with starter(tmp_path) as programs:
        (tmp_path / "app.py").write_text(
            SERVER_APP.format(
                text="", workers=1, deployment="dev", port=free_port(),
                options="kore.config.worker_max_connections = 100000",
            )
        )
        limited = "import os, resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (512, 512)); "
        run = "os.execv(sys.executable, [sys.executable, '-m', 'kore', 'app.py'])"
        program = programs.python(limited + run, environment={"KORE_IO": engine})
        program.wait_for(r"RLIMIT_NOFILE is 512, the hard limit")
        program.wait_for(READY)
