"""Landlock on a real kernel: each right, in forked children, by Python, by raw system calls and through a ring."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path

import pytest
from driver_harness import fds
from landlock_harness import (
    ATTEMPTS,
    CASES,
    open_python,
    open_ring,
    place,
    skip_unless_possible,
    tried,
)

from kore.errors import SandboxError
from kore.sandbox import landlock
from kore.sandbox.landlock import Rules, abi, restrict_self

REFUSED = {"REFER": {errno.EACCES, errno.EXDEV}, "ABSTRACT": {errno.EPERM}, "SIGNAL": {errno.EPERM}}
"""The errno of a refusal where it is not EACCES."""

NEEDS = {"REFER": 2, "TRUNCATE": 3, "CONNECT_TCP": 4, "BIND_TCP": 4, "IOCTL_DEV": 5, "ABSTRACT": 6, "SIGNAL": 6}
"""The ABI of each right that the first did not have."""

NOT_FILES = ("IOCTL_DEV", "CONNECT_TCP", "BIND_TCP", "ABSTRACT", "SIGNAL")

pytestmark = pytest.mark.skipif(abi() < 1, reason="this kernel has no Landlock")


@pytest.fixture
def where(tmp_path):
    """Somewhere to try things."""
    with place(tmp_path) as made:
        yield made


def needs(version: int) -> None:
    """Skip where the kernel is older."""
    if abi() < version:
        pytest.skip(f"this kernel has Landlock ABI {abi()}, the test needs {version}")


@pytest.mark.parametrize(("right", "way"), CASES)
def test_a_right_that_is_not_given_is_refused(where, right: str, way: str) -> None:
    """The same attempt is done where nothing is restricted, so that the refusal is Landlock's."""
    skip_unless_possible(right, way)
    needs(NEEDS.get(right, 1))
    attempt = ATTEMPTS[right][way]
    rules = Rules(read=(str(where.inside), "/dev/null"))
    assert tried(attempt, where, rules) in REFUSED.get(right, {errno.EACCES})
    assert tried(attempt, where, None) == 0


@pytest.mark.parametrize(("right", "way"), [
    case for case in CASES if case[0] not in ("EXECUTE", "MAKE_CHAR", "MAKE_BLOCK", *NOT_FILES)
])
def test_a_directory_that_may_be_written(where, right: str, way: str) -> None:
    """Everything but devices may be made, changed and removed in it; beside it nothing may."""
    skip_unless_possible(right, way)
    needs(3)
    rules = Rules(write=(str(where.inside),))
    assert tried(ATTEMPTS[right][way], where, rules) != 0
    where.at = where.inside
    assert tried(ATTEMPTS[right][way], where, rules) == 0


@pytest.mark.parametrize("right", ["MAKE_CHAR", "MAKE_BLOCK"])
def test_devices_are_made_nowhere(where, right: str) -> None:
    """Not in the directory either that may be written, not even by root."""
    skip_unless_possible(right, "python")
    where.at = where.inside
    assert tried(ATTEMPTS[right]["python"], where, Rules(write=(str(where.inside),))) == errno.EACCES


@pytest.mark.parametrize("way", ["python", "raw", "ring"])
def test_a_directory_that_may_be_read(where, way: str) -> None:
    """Read and listed, and nothing else."""
    skip_unless_possible("READ_FILE", way)
    where.at = where.inside
    rules = Rules(read=(str(where.inside),))
    for right in ("READ_FILE", "READ_DIR"):
        assert tried(ATTEMPTS[right][way], where, rules) == 0
    for right in ("WRITE_FILE", "MAKE_REG", "MAKE_DIR", "REMOVE_FILE", "REMOVE_DIR", "MAKE_SYM"):
        assert tried(ATTEMPTS[right][way], where, rules) == errno.EACCES


def test_rules_on_files(where) -> None:
    """A rule may name one file, or a link to it: the rights of directories, which would be EINVAL, are left out."""
    where.at = where.outside
    link = where.inside / "link"
    link.symlink_to(where.outside / "file")
    for rules in (Rules(read=(str(where.outside / "file"),)), Rules(read=(str(link),))):
        assert tried(open_python(os.O_RDONLY), where, rules) == 0
        assert tried(open_python(os.O_WRONLY), where, rules) == errno.EACCES
        assert tried(open_python(os.O_RDONLY | os.O_DIRECTORY, "sub"), where, rules) == errno.EACCES
    rules = Rules(write=(str(where.outside / "file"), "/dev/null"))
    assert tried(open_python(os.O_RDWR), where, rules) == 0
    assert tried(lambda _: os.open("/dev/null", os.O_RDWR), where, rules) == 0
    assert tried(open_python(os.O_WRONLY | os.O_CREAT, "new"), where, rules) == errno.EACCES


def test_programs(where) -> None:
    """What is listed runs; what may be read or written does not, so that nobody runs what he wrote."""
    libraries = ("/lib", "/usr", "/lib64")
    assert tried(ATTEMPTS["EXECUTE"]["python"], where, Rules(execute=("/bin", *libraries))) == 0
    assert tried(ATTEMPTS["EXECUTE"]["python"], where, Rules(read=("/bin", *libraries))) == errno.EACCES

    def own(place_):
        program = place_.inside / "program"
        program.write_bytes(Path("/bin/true").read_bytes())
        program.chmod(0o700)
        os.posix_spawn(str(program), ["true"], {})

    assert tried(own, where, Rules(execute=("/bin", *libraries), write=(str(where.inside),))) == errno.EACCES


def test_ports(where) -> None:
    """Those listed, to connect and to bind; None is any."""
    needs(4)
    connect, bind = ATTEMPTS["CONNECT_TCP"], ATTEMPTS["BIND_TCP"]
    for way in ("python", "ring"):
        skip_unless_possible("CONNECT_TCP", way)
        assert tried(connect[way], where, Rules(connect_ports=(1, where.port))) == 0
        assert tried(connect[way], where, Rules(connect_ports=(1, where.free_port))) == errno.EACCES
        assert tried(connect[way], where, Rules(connect_ports=None)) == 0
        assert tried(bind[way], where, Rules(bind_ports=(where.free_port,), connect_ports=None)) == 0
        assert tried(bind[way], where, Rules(bind_ports=(where.port,), connect_ports=None)) == errno.EACCES
        assert tried(bind[way], where, Rules(bind_ports=None)) == 0
    with pytest.raises(SandboxError, match="port 70000"):
        in_child(lambda: restrict_self(Rules(connect_ports=(70000,))))


def test_without_scopes(where) -> None:
    """Signals and abstract sockets of others are within reach; the rest is as it was."""
    needs(6)
    rules = Rules(scoped=False)
    assert tried(ATTEMPTS["ABSTRACT"]["python"], where, rules) == 0
    assert tried(ATTEMPTS["SIGNAL"]["python"], where, rules) == 0
    assert tried(ATTEMPTS["READ_FILE"]["python"], where, rules) == errno.EACCES


def test_what_was_open_before_stays_open(where) -> None:
    """The worker's log, its listeners and its channel are opened before."""
    with open(where.outside / "file") as file:
        assert tried(lambda _: os.pread(file.fileno(), 10, 0) == b"secret" or 1 / 0, where, Rules()) == 0
    own = socket.socketpair()
    assert tried(lambda _: own[0].sendall(b"x"), where, Rules()) == 0
    assert tried(lambda _: where.listener.listen(10), where, Rules()) == 0
    assert tried(lambda _: os.kill(os.getpid(), 0), where, Rules()) == 0
    for sock in own:
        sock.close()


def test_it_cannot_be_taken_back(where) -> None:
    """A second, wider call gives nothing back, nor has a child more; sixteen calls are the most."""
    wide = Rules(write=("/",), execute=("/",), connect_ports=None, bind_ports=None, scoped=False)

    def again(place_):
        restrict_self(wide)
        open_python(os.O_RDONLY)(place_)

    assert tried(again, where, Rules(read=(str(where.inside),))) == errno.EACCES

    def by_child(place_):
        raise OSError(tried(open_python(os.O_RDONLY), place_, None), "in a child")

    assert tried(by_child, where, Rules(read=(str(where.inside),))) == errno.EACCES
    with pytest.raises(SandboxError, match="sixteen"):
        in_child(lambda: [restrict_self(wide) for _ in range(17)])


def in_child(function):
    """The value of a function in a child, as text, or its SandboxError."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            try:
                text = f"+{function()}"
            except SandboxError as error:
                text = f"-{error}"
            os.write(writer, text.encode())
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader) as file:
        text = file.read()
    os.waitpid(child, 0)
    if text.startswith("-"):
        raise SandboxError("Landlock", text[1:])
    assert text
    return text[1:]


def test_paths_that_are_not_there(where, tmp_path) -> None:
    """Told, with the path and the reason; with `strict` an error; and what is there counts."""
    gone = str(tmp_path / "gone")
    rules = Rules(read=(gone, str(where.inside)))
    told = in_child(lambda: restrict_self(rules, version=6) if abi() >= 6 else restrict_self(rules))
    assert f"{gone}: No such file or directory" in told
    where.at = where.inside
    assert tried(open_python(os.O_RDONLY), where, rules) == 0
    with pytest.raises(SandboxError, match=f"{gone}: No such file"):
        in_child(lambda: restrict_self(rules, strict=True))


def test_it_leaves_nothing_open_and_no_new_privileges() -> None:
    """Neither the paths nor the ruleset; NoNewPrivs is set, as the kernel asks for."""

    def look():
        before = fds()
        restrict_self(Rules(read=("/proc", "/usr", "/gone"), connect_ports=(80,)))
        status = Path("/proc/self/status").read_text()
        return fds() == before, "NoNewPrivs:\t1" in status

    assert in_child(look) == "(True, True)"


HANDLED = {
    0: (0, 0, 0), 1: (0x1FFF, 0, 0), 2: (0x3FFF, 0, 0), 3: (0x7FFF, 0, 0), 4: (0x7FFF, 3, 0), 5: (0xFFFF, 3, 0),
    6: (0xFFFF, 3, 3), 7: (0xFFFF, 3, 3), 99: (0xFFFF, 3, 3),
}


@pytest.mark.parametrize("version", HANDLED)
def test_masks_of_each_abi(version: int) -> None:
    """What a kernel of that ABI knows, and no bit more, which would be EINVAL; what it lacks is told."""
    assert landlock.handled(Rules(), version) == HANDLED[version]
    files, network, _ = HANDLED[version]
    assert landlock.handled(Rules(connect_ports=None, scoped=False), version) == (files, network & 1, 0)
    assert landlock.handled(Rules(bind_ports=None), version) == (files, network & 2, HANDLED[version][2])
    lines = landlock.missing(version)
    assert len(lines) == {0: 1, 1: 4, 2: 4, 3: 3, 4: 2, 5: 1}.get(version, 0)


@pytest.mark.parametrize("version", range(7))
def test_on_an_older_kernel(where, version: int) -> None:
    """Each right is refused from its ABI on, and below it all goes on, with a line that says so."""
    needs(version)
    rules = Rules(read=(str(where.inside), "/dev/null"))
    for right, ways in ATTEMPTS.items():
        if right in ("MAKE_CHAR", "MAKE_BLOCK"):
            continue
        refused = version >= NEEDS.get(right, 1)
        if right == "REFER":
            refused = version >= 1  # ABI 1 forbids all moving between directories
        if refused or right in ("TRUNCATE", *NOT_FILES):
            assert (tried(ways["python"], where, rules, version) != 0) == refused, right
    told = in_child(lambda: len(restrict_self(rules, version=version)))
    assert int(told) == len(landlock.missing(version))


def test_a_kernel_without_landlock(monkeypatch) -> None:
    """ABI 0: one line, and nothing restricted."""

    def fail(*_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(landlock, "_call", fail)
    assert abi() == 0
    (line,) = restrict_self(Rules())
    assert "no Landlock" in line
    monkeypatch.setattr(landlock, "abi", lambda: 7)
    with pytest.raises(SandboxError, match=r"landlock_create_ruleset: .*errno 38"):
        restrict_self(Rules())


def test_a_ring_made_before(where) -> None:
    """The ring is older than the rules in every attempt here; its entries are judged by who submits them."""
    skip_unless_possible("READ_FILE", "ring")
    assert tried(open_ring(os.O_RDONLY), where, Rules(read=(str(where.inside),))) == errno.EACCES
    where.at = where.inside
    assert tried(open_ring(os.O_RDONLY), where, Rules(read=(str(where.inside),))) == 0


