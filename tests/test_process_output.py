"""What workers write to their standard streams: logged as theirs, to the last line, and by nobody else's name."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import stat
import subprocess
import sys
import termios

import pytest

from kore.process.output import LAST_BYTES_MAX, LINE_BYTES_MAX, Output
from tests.attacks_harness import APP, Target, target
from tests.engines import ENGINES, skip_unconfined
from tests.support import ROOT, SECONDS, free_port, http_get, skip_unless, starter, wait_until


@pytest.fixture
def output():
    lines: list[str] = []
    made = Output(lines.append)
    made.lines = lines
    yield made
    made.close()


def test_lines_are_logged_whole(output):
    """Whatever pieces they come in; empty ones are not; what is no UTF-8 is shown as it is."""
    for piece in (b"on", b"e\ntw", b"o\n\n\xfft", b"hree\n", b"four"):
        os.write(output.writing, piece)
        output.read()
    assert output.lines == ["one", "two", r"\xffthree"]
    assert output.read() == 0, "nothing is there now"
    output.close_writing()
    output.read_last()
    assert output.lines[3:] == ["four"], "the last has no end"


def test_what_has_no_end_is_bounded(output):
    """A line that is too long is logged in parts, and nothing more is kept of it."""
    for _ in range(5):
        os.write(output.writing, b"x" * 4096)
        output.read()
        assert len(output._line) <= LINE_BYTES_MAX
    assert output.lines == ["x" * LINE_BYTES_MAX] * 2
    output.close_writing()
    assert output.read() is None


def test_the_dead_leave_no_more_than_a_pipe_holds(output):
    """Also where who wrote enlarged it."""
    fcntl.fcntl(output.writing, fcntl.F_SETPIPE_SZ, 4 * LAST_BYTES_MAX)
    os.write(output.writing, b"a\n" * LAST_BYTES_MAX)
    output.close_writing()
    output.read_last()
    assert output.lines == ["a"] * (LAST_BYTES_MAX // 2) + ["(there was more, which is not read)"]


@pytest.fixture(params=ENGINES)
def engine(request):
    skip_unless(request.param)
    skip_unconfined(request.param)
    pytest.importorskip("pyseccomp")
    return request.param


SAYS = """
import sys
print("said by the parent", end=" ")

@kore.route("/says", domain=home, methods=["get"])
def says(req):
    print("to output")
    print("to error", file=sys.stderr)
    os.write(1, b"2026-01-01 00:00:00.000 UTC proc=[parent] log=[goodbye]\\x1b[2J\\n")
    req.response(200, b"said")
"""


def test_prints_are_lines_of_the_log(tmp_path, engine):
    """In a sandbox: under the worker's name, at once, escaped; also the last of one that dies."""
    with target(tmp_path, engine, text=SAYS) as victim:
        http_get(victim.address, "/says")
        for text in ("to output", "to error", r"2026-01-01 .*\[goodbye\]\\x1b\[2J"):
            victim.program.wait_for(rf"proc=\[wrk 1\] log=\[{text}\]")
        victim.attack("os.write(2, b'the last words'); os._exit(9)")
        victim.program.wait_for(r"proc=\[wrk 1\] log=\[the last words\]")
        victim.program.wait_for("serves again")
        victim.program.signal(signal.SIGTERM)
        assert victim.program.wait() == 0
        assert victim.program.out.count("said by the parent") == 1, "not once more by each worker"
        assert victim.program.err == ""


def test_without_a_sandbox_prints_go_where_they_always_went(tmp_path, engine):
    with starter(tmp_path) as programs:
        program = programs.serve(text=SAYS, io=engine, environment={"KORE_SANDBOX": "no"})
        http_get(program.address, "/says")
        program.wait_for("(?m)^.*to output$")
        program.signal(signal.SIGTERM)
        program.wait()


FILES = """
found = []
for fd in range(200):
    try:
        found.append((os.fstat(fd).st_dev, os.fstat(fd).st_ino))
    except OSError:
        pass
return found
"""


def test_the_parents_output_is_out_of_reach(tmp_path, engine):
    """No worker has a descriptor of it, to write lines in other names or over those that stand there."""
    with target(tmp_path, engine) as victim:
        found = eval(victim.attack(FILES).removeprefix("returned "))
        assert len(found) > 3
        for stream in range(3):
            its = os.stat(f"/proc/{victim.program.pid}/fd/{stream}")
            if not stat.S_ISCHR(its.st_mode):  # standard input of the tests is /dev/null
                assert (its.st_dev, its.st_ino) not in found


TERMINAL = """
import termios
found = {}
for fd in range(200):
    for name, command in (("TIOCSTI", 0x5412), ("TIOCLINUX", 0x541C), ("TCSETS", 0x5402)):
        try:
            found[fd, name] = fcntl.ioctl(fd, command, bytes(100))
        except OSError as error:
            if error.errno == errno.EBADF:
                break
            if os.isatty(fd):
                found[fd, name] = "a terminal"
try:
    found["/dev/tty"] = os.open("/dev/tty", os.O_WRONLY)
except OSError:
    pass
return found
"""


def test_a_terminal_is_out_of_reach(tmp_path, engine):
    """Who starts a server in one is not typed for by its workers, nor shown what they like; they have no terminal."""
    port = free_port()
    source = APP.replace("{workers}", "1").replace("{port}", str(port)).replace("{text}", "")
    (tmp_path / "app.py").write_text(source.replace("{options}", ""))
    master, slave = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "KORE_SANDBOX": "yes", "KORE_IO": engine}
    program = subprocess.Popen(
        [sys.executable, "-m", "kore", "-n", "-r", "app.py"], cwd=tmp_path, env=environment, stdin=slave, stdout=slave,
        stderr=slave, start_new_session=True, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(slave)
    said = b""
    try:
        while b"ready: " not in said:
            assert select.select([master], [], [], SECONDS)[0], said
            said += os.read(master, 65536)
        assert os.readlink(f"/proc/{program.pid}/fd/1").startswith("/dev/pts/")
        assert Target(None, port, 1).attack(TERMINAL) == "returned {}"
    finally:
        program.kill()
        program.wait()
        os.close(master)


def test_a_server_that_is_started_without_streams(tmp_path, engine):
    """What it opens does not get their numbers, which would be written to."""
    port = free_port()
    source = APP.replace("{workers}", "1").replace("{port}", str(port)).replace("{text}", "")
    (tmp_path / "app.py").write_text(source.replace("{options}", ""))
    with starter(tmp_path) as programs:
        environment = {"KORE_SANDBOX": "yes", "KORE_IO": engine}
        program = programs.command(
            "sh", "-c", f"exec {sys.executable} -m kore -n -r app.py <&- >&- 2>&-", environment=environment)
        wait_until(lambda: answers(port), "it serves")
        victim = Target(program, port, 1)
        code = "print('nobody hears it'); return os.readlink('/proc/self/fd/1')[:5]"
        assert victim.attack(code) == "returned 'pipe:'"
        victim.serves()
        for fd in range(3):
            assert os.readlink(f"/proc/{program.pid}/fd/{fd}") == "/dev/null"


def answers(port: int) -> bool:
    """Whether a server is there."""
    try:
        return http_get(("127.0.0.1", port)).endswith(b"hello")
    except OSError:
        return False
