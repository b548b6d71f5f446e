"""The command line: what each option does, and that everything wrong is one clear line and exit code 1."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys

import pytest

from kore import cli
from kore.version import __version__
from tests.support import ROOT, free_port, http_get, starter

APP = """
import kore

class App:
    def configure(self, args):
        print("configured", args, flush=True)
        kore.config.workers = 1
        kore.config.deployment = "dev"
        kore.server("plain", ip="127.0.0.1", port="{port}", tls=False)
        domain = kore.domain("*", attach="plain")
        domain.route("/", self.index, methods=["get"])

    def index(self, req):
        req.response(200, b"hello")

koreapp = App()
"""


@pytest.fixture
def start(tmp_path):
    with starter(tmp_path) as programs:
        yield programs


def refused(program) -> str:
    """What a program that must not start says on standard error."""
    assert program.wait() == 1, program.out + program.err
    return program.err


def test_help_prints_the_usage_and_is_no_error(capsys):
    assert cli.main(["-h"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("usage: kore ")
    assert err == ""
    assert cli.main(["--help"]) == 0


def test_version_is_one_line(capsys):
    assert cli.main(["-v"]) == 0
    out, _ = capsys.readouterr()
    assert out.startswith(f"kore {__version__} ")
    assert out.count("\n") == 1
    assert out.endswith(" tls acme\n")


@pytest.mark.parametrize(("lacking", "features"), [("acme", "tls"), ("cryptography", "notls"), ("_ssl", "notls")])
def test_version_tells_what_is_missing(monkeypatch, capsys, lacking, features):
    real = cli.importlib.util.find_spec
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None if name == lacking else real(name))
    assert cli.main(["-v"]) == 0
    assert capsys.readouterr().out.split()[-1] == features


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ([], "no application given"),
        (["-r"], "no application given"),
        (["-z", "app.py"], "option -z not recognized"),
        (["--nonsense"], "option --nonsense not recognized"),
        (["-c"], "option -c requires argument"),
        (["-c", "kore.conf", "app.py"], "configuration files are not read by this version"),
        (["-d", "-f", "app.py"], "-d and -f contradict each other"),
    ],
)
def test_a_wrong_command_is_one_line_and_exit_code_1(capsys, words, reason):
    assert cli.main(words) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert reason in err


def test_help_and_version_load_nothing_that_serves():
    script = "import sys; from kore import cli; cli.main(['-v']); print(sorted(m for m in sys.modules if 'uring' in m))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_options_end_at_the_application_and_the_rest_is_its_own(start):
    (start.directory / "app.py").write_text(APP.format(port=free_port()))
    program = start.kore("-rn", "app.py", "one", "-z", "--two")
    program.wait_for(r"configured \['kore', 'one', '-z', '--two'\]")
    program.wait_for(r"log=\[ready: ")


def test_the_application_may_be_elsewhere(start, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    port = free_port()
    (start.directory / "app.py").write_text(APP.format(port=port))
    program = start.kore(str(start.directory / "app.py"), cwd=elsewhere)
    program.wait_for(r"log=\[ready: ")
    assert http_get(("127.0.0.1", port)).endswith(b"\r\n\r\nhello")


@pytest.mark.parametrize("path", ["package", "package/", "./package"])
def test_the_application_may_be_a_package(start, path):
    package = start.directory / "package"
    package.mkdir()
    port = free_port()
    (package / "__init__.py").write_text("from package.inner import App\nkoreapp = App()\n")
    (package / "inner.py").write_text(APP.format(port=port).replace("koreapp = App()", ""))
    program = start.kore(path)
    program.wait_for(r"log=\[ready: ")
    assert http_get(("127.0.0.1", port)).endswith(b"hello")


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("missing.py", "missing.py: no such file or directory"),
        ("notes.txt", "not a Python file"),
        ("empty", "is no package"),
        ("/dev/null", "neither a file nor a directory"),
    ],
)
def test_no_application_there_is_one_line(start, path, reason):
    (start.directory / "notes.txt").write_text("")
    (start.directory / "empty").mkdir()
    err = refused(start.kore(path))
    assert reason in err
    assert err.count("\n") == 1
    assert err.startswith("kore: ")


@pytest.mark.parametrize(
    ("text", "last", "traceback"),
    [
        ("import nothing_like_this\n", "app.py:1: the application cannot be loaded: ModuleNotFoundError", True),
        ("def broken(:\n", "app.py:1: the application cannot be loaded: SyntaxError", False),
        ("class A:\n  def configure(self, args):\n    1 / 0\nkoreapp = A()\n", "app.py:3: .*ZeroDivisionError", True),
        ("import kore\nkore.config.wrokers = 1\n", "app.py:2: kore.config.wrokers: there is no such option", False),
        ("import kore\nkore.config.workers = 0\n", "app.py:2: kore.config.workers = 0", False),
        ("import kore\nkore.server('s', ip='127.0.0.1', port='x', tls=False)\n", "app.py:2: .*port", False),
        ("pass\n", "nothing to do: the application declares no server", False),
    ],
)
def test_a_broken_application_is_one_last_line_with_its_place(start, text, last, traceback):
    (start.directory / "app.py").write_text(text)
    err = refused(start.kore("app.py"))
    assert re.search(f"^kore: {last}", err.splitlines()[-1]), err
    assert ("Traceback" in err) is traceback
    assert "kore/process" not in err, "frames of kore's own are of no use to anybody"


def test_a_port_in_use_is_one_line_that_says_what_to_do(start):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        (start.directory / "app.py").write_text(APP.format(port=port))
        program = start.kore("app.py")
        err = refused(program)
    assert err.count("\n") == 1
    assert str(port) in err
    assert "in use" in err


def test_a_wrong_engine_is_one_line(start):
    (start.directory / "app.py").write_text(APP.format(port=free_port()))
    err = refused(start.kore("app.py", environment={"KORE_IO": "steam"}))
    assert err.count("\n") == 1
    assert "steam" in err


def test_check_shows_what_would_be_served_and_serves_nothing(start):
    port = free_port()
    (start.directory / "app.py").write_text(APP.format(port=port))
    program = start.kore("--check", "app.py")
    assert program.wait() == 0
    assert f"server plain: http on http://127.0.0.1:{port}" in program.out
    assert "domain *" in program.out
    assert "ready" not in program.out
    assert not (start.directory / "kore.pid").exists()


def test_quiet_logs_nothing_of_its_own(start):
    (start.directory / "app.py").write_text(
        APP.format(port=free_port()) + "\nkoreapp.workerstart = lambda: kore.log(kore.LOG_INFO, 'mine')\n"
    )
    program = start.kore("-q", "app.py")
    program.wait_for(r"log=\[mine\]")
    program.signal(signal.SIGTERM)
    program.wait()
    assert "serving" not in program.out
    assert "ready" not in program.out


def test_an_application_that_exits_is_obeyed(start):
    (start.directory / "app.py").write_text("import sys\nsys.exit(7)\n")
    assert start.kore("app.py").wait() == 7
