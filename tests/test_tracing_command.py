"""The command trace: the application of the documentation is traced, learns its hook, and works with it untraced."""

from __future__ import annotations

import re
import signal
import socket
import textwrap

import pytest

from kore import cli
from tests.support import READY as SERVES
from tests.support import ROOT, free_port, http_get, skip_unless, starter, wait_until

PAGE = (ROOT / "docs" / "tracing.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", PAGE, re.S | re.M)
APPLICATION, PASTED = (text for language, text in BLOCKS if language == "python")
SESSION = next(text for _, text in BLOCKS if text.startswith("$ kore trace"))
OPTION = re.search(r"`(kore\.config\.sandbox_write = .*?)`", PAGE)[1]
ERROR = re.search(r"uncaught exception: (OSError\(.*\), at .*)\]", PAGE)[1]
NOTHING = "# The application made no call that the sandbox forbids: it needs no seccomp hook.\n"

pytest.importorskip("pyseccomp")


@pytest.fixture(params=["uring", "epoll"])
def engine(request):
    skip_unless(request.param)
    return request.param


class Traced:
    """The application of the documentation on a free port, and how it is run."""

    def __init__(self, programs, engine):
        self.programs = programs
        self.directory = programs.directory
        self.environment = {"KORE_IO": engine}
        self.port = free_port()
        (self.directory / "data").mkdir()

    def run(self, *words, hook="", option="", deployment="dev", **environment):
        text = APPLICATION.replace("workers = 1\n", f"workers = 1; {option}\n")
        text = text.replace("8080", str(self.port)).replace('"dev"', f'"{deployment}"')
        (self.directory / "app.py").write_text(text.replace("\n\n\nkoreapp", f"\n{hook}\n\nkoreapp"))
        program = self.programs.kore(*words, environment=self.environment | environment)
        program.wait_for(SERVES)
        return program

    def put(self, name):
        request = f"PUT /albums/{name} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
        with socket.create_connection(("127.0.0.1", self.port), timeout=20) as sock:
            sock.sendall(request.encode())
            answer = b""
            while piece := sock.recv(65536):
                answer += piece
        return int(answer.split()[1])

    def learn(self, *words, **options):
        """Trace it, make an album, and end it by Ctrl-C; what it printed."""
        program = self.run(*words, **options)
        assert self.put("summer") == 201
        assert self.put("winter") == 201
        return ended(program)


def ended(program, number=signal.SIGINT):
    program.signal(number)
    assert program.wait() == 0, program.out + program.err
    return program.out


@pytest.fixture
def traced(tmp_path, engine):
    with starter(tmp_path) as programs:
        yield Traced(programs, engine)


def learned(out):
    """What follows the log."""
    return out.rpartition("goodbye]\n\n")[2]


def plain(line):
    """A line of a log without what differs from run to run."""
    return re.sub(r"\d[\d.]*", "N", line.partition("proc=")[2]).replace("epoll", "uring")


def test_the_session_of_the_documentation_is_what_is_printed(traced):
    out = traced.learn("trace", "app.py", "--learn")
    shown = {plain(line) for line in out.splitlines()}
    for line in SESSION.splitlines():
        if "proc=" in line:
            assert plain(line) in shown, line
    assert learned(out) == SESSION.rpartition("goodbye]\n\n")[2]
    assert (traced.directory / "data" / "summer").is_dir()


def test_with_the_hook_it_works_in_the_sandbox_and_without_it_fails_as_documented(traced):
    hook = textwrap.indent("".join(learned(traced.learn("trace", "app.py", "--learn")).splitlines(True)[1:]), "    ")
    assert hook == PASTED
    program = traced.run("app.py", hook=f"\n{hook}", option=OPTION, KORE_SANDBOX="yes")
    assert traced.put("autumn") == 201
    ended(program)
    program = traced.run("app.py", KORE_SANDBOX="yes")
    assert traced.put("spring") == 500
    program.wait_for(re.escape(ERROR))
    assert "tracer" not in ended(program)
    assert sorted(path.name for path in (traced.directory / "data").iterdir()) == ["autumn", "summer", "winter"]


def test_with_the_hook_there_is_nothing_to_learn(traced):
    assert learned(traced.learn("trace", "app.py", "--learn", hook=f"\n{PASTED}")) == NOTHING


@pytest.mark.parametrize("words", [("--learn", "app.py"), ("-q", "--output", "hook.py", "app.py")])
def test_learning_is_asked_for_before_the_application_too(traced, words):
    out = traced.learn("trace", *words) if "-q" not in words else quiet(traced, *words)
    assert 's.allow("mkdir")  # app.py:15 make\n' in out
    if "--output" in words:
        written = (traced.directory / "hook.py").read_text()
        assert out.endswith(f"\n{written}")
        names = {}
        exec(written, names)
        assert callable(names["seccomp"])


def quiet(traced, *words):
    """The same where the log does not say when it is ready."""
    text = APPLICATION.replace("8080", str(traced.port))
    (traced.directory / "app.py").write_text(text)
    program = traced.programs.kore("trace", *words, environment=traced.environment)
    def answers():
        try:
            return http_get(("127.0.0.1", traced.port))
        except OSError:
            return b""

    wait_until(answers, "it serves")
    assert traced.put("summer") == 201
    return ended(program)


def test_without_learn_no_hook_is_written(traced):
    out = traced.learn("trace", "app.py")
    assert 's.allow("mkdir")]' in out
    assert "def seccomp" not in out


def test_production_is_traced_in_the_foreground_and_ends_by_sigterm(traced):
    program = traced.run("trace", "-rn", "app.py", "--learn", deployment="production")
    assert traced.put("summer") == 201
    assert learned(ended(program, signal.SIGTERM)).endswith('    s.allow("mkdir")  # app.py:15 make\n')


def test_further_arguments_are_the_applications(traced):
    configure = "    def seccomp(self, s):\n        pass\n"
    out = traced.learn("trace", "app.py", "--learn", "--learn", "x", hook=f"\n{configure}")
    assert "def seccomp" in learned(out)


def test_a_file_that_cannot_be_written_is_told_before_the_start(tmp_path):
    with starter(tmp_path) as programs:
        (tmp_path / "app.py").write_text(APPLICATION)
        program = programs.kore("trace", "--output", "nowhere/hook.py", "app.py")
        assert program.wait() == 1
        assert program.err == "kore: --output nowhere/hook.py: No such file or directory\n"


MISUSES = [
    (("trace",), "no application given"),
    (("trace", "-d", "app.py"), "-d: trace runs in the foreground"),
    (("trace", "--nonsense", "app.py"), "option --nonsense not recognized"),
    (("--learn", "app.py"), "option --learn not recognized"),
    (("--output", "x", "app.py"), "option --output not recognized"),
]


@pytest.mark.parametrize(("words", "reason"), MISUSES)
def test_misuse_is_one_line(capsys, words, reason):
    assert cli.main(words) == 1
    assert capsys.readouterr().err == f"kore: {reason}; kore -h lists what there is\n"


def test_a_package_of_that_name_is_given_by_its_path(tmp_path):
    with starter(tmp_path) as programs:
        (tmp_path / "trace").mkdir()
        (tmp_path / "trace" / "__init__.py").write_text("import kore\nprint('the package', flush=True)\n")
        program = programs.kore("./trace")
        program.wait_for("the package")
        assert program.wait() == 1
        assert "nothing to do" in program.err


def test_the_usage_names_it(capsys):
    cli.main(["-h"])
    assert "kore trace [options] [--learn] [--output FILE] app.py [arguments]" in capsys.readouterr().out
