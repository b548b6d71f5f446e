"""ACME in the sandbox, as root with users switched and roots changed; and what a captured ACME process cannot do."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import signal
import socket
import subprocess
from pathlib import Path

import pytest

from kore.tls import certificates
from tests.acme_harness import HOST, pebble
from tests.privileges_harness import CAPABILITY_SETS, a_user, needs_root, status
from tests.support import Starter, free_port, skip_unless, starter, wait_until
from tests.test_process_acme import NAMES, Server, has_certificate, loaded

ENGINES = ("uring", "epoll")


def users() -> tuple[pwd.struct_passwd, pwd.struct_passwd, pwd.struct_passwd]:
    """Three that are not root."""
    found = [a_user()]
    found += [each for each in pwd.getpwall() if each.pw_uid not in (0, found[0].pw_uid)]
    if len(found) < 3:
        pytest.skip("no three users here")
    return found[0], found[1], found[2]


@pytest.fixture
def start(tmp_path: Path):
    with starter(tmp_path) as made:
        yield made


@needs_root
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("roots", ["chroot", "host name"])
def test_users_are_switched_and_roots_changed(
    tmp_path: Path, start: Starter, engine: str, roots: str
) -> None:
    """Issue and a renewal under load, each process as another user, in a root of its own or asked to find a host."""
    skip_unless(engine)
    pytest.importorskip("pyseccomp")
    worker, keeper, talker = users()
    tmp_path.chmod(0o755)
    home, keys, acme = (tmp_path / name for name in ("home", "keys", "acme"))
    for directory, owner in ((home, worker), (keys, keeper), (acme, talker)):
        directory.mkdir()
        os.chown(directory, owner.pw_uid, owner.pw_gid)
    keys.chmod(0o700)
    lines = [
        f"kore.config.runas = {worker.pw_name!r}", f"kore.config.keymgr_runas = {keeper.pw_name!r}",
        f"kore.config.acme_runas = {talker.pw_name!r}", f"kore.config.root = {str(home)!r}",
        f"kore.config.keymgr_root = {str(keys)!r}", f"kore.config.acme_root = {str(acme)!r}",
    ]
    arguments = []
    port = free_port()
    with pebble(tmp_path, port, seconds=12) as authority:
        (acme / "ca.pem").write_bytes(authority.ca.read_bytes())
        authority.ca = Path("ca.pem")  # counts from the root of the ACME process
        server = Server(start, tmp_path, authority, port)
        provider = authority.address
        if roots == "host name":
            arguments = ["-n"]
            provider = provider.replace("127.0.0.1", "localhost")
        environment = {"KORE_IO": engine, "KORE_SANDBOX": "yes"}
        program = server.run(*arguments, provider=provider, options="\n".join(lines), environment=environment)
        with loaded(port, NAMES[0]) as load:
            has_certificate(program, count=2)
            wait_until(lambda: len(set(load.shown)) >= 3, "the renewal is shown")
        assert load.failures == []
        for label, user in (("keymgr", keeper), ("acme", talker)):
            pid = server.service(label)
            found = status(pid)
            assert found["Uid"].split() == [str(user.pw_uid)] * 4
            assert all(int(found[name], 16) == 0 for name in CAPABILITY_SETS)
            assert found["NoNewPrivs"] == "1"
            assert found["Seccomp"] == "2"
            if roots == "chroot":
                assert os.readlink(f"/proc/{pid}/root") == str({"keymgr": keys, "acme": acme}[label])
        assert f"engine {engine}" in program.out
        program.signal(signal.SIGTERM)
        assert program.wait() == 0
        assert "is killed" not in program.out
        key = keys / "certificates" / NAMES[0] / "key.pem"
        assert (key.stat().st_uid, key.stat().st_mode & 0o777) == (keeper.pw_uid, 0o600)


@needs_root
@pytest.mark.parametrize("engine", ENGINES)
def test_the_provider_is_found_by_dns(tmp_path: Path, start: Starter, engine: str, monkeypatch) -> None:
    """By the resolver's own questions, over UDP, from within the sandbox: no file here has the name."""
    skip_unless(engine)
    pytest.importorskip("pyseccomp")
    nameserver = f"127.53.{os.getpid() % 250 + 1}.53"  # each process of tests has one for itself
    resolver = tmp_path / "resolv.conf"
    resolver.write_text(f"nameserver {nameserver}\noptions timeout:2 attempts:3\n")
    # In a mount namespace of its own that is the resolver's file.
    script = 'mount --bind "$0" /etc/resolv.conf && exec "$@"'
    alone = ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, str(resolver)]
    if shutil.which("unshare") is None or subprocess.run([*alone, "true"], capture_output=True, timeout=20).returncode:
        pytest.skip("mount(2) is not allowed here, in a namespace of its own either")
    begin = start._start
    monkeypatch.setattr(
        start, "_start", lambda command, cwd, environment: begin([*alone, *command], cwd, environment))
    port = free_port()
    home = tmp_path / "home"
    home.mkdir()
    with pebble(tmp_path, port, further_dns=(f"{nameserver}:53",)) as authority:
        server = Server(start, home, authority, port)
        environment = {"KORE_IO": engine, "KORE_SANDBOX": "yes"}
        program = server.run(provider=authority.address.replace("127.0.0.1", HOST), environment=environment)
        has_certificate(program)
        assert json.loads(authority.tell_dns("dns-request-history", host=HOST)), "it was asked"
        assert status(server.service("acme"))["Seccomp"] == "2"
        program.signal(signal.SIGTERM)
        assert program.wait() == 0
        assert "is killed" not in program.out


@needs_root
def test_no_key_is_in_the_memory_of_the_acme_process(tmp_path: Path, start: Starter) -> None:
    """Neither of a domain nor of the account, in no order of bytes, after orders were signed with both."""
    port = free_port()
    (tmp_path / "home").mkdir()
    with pebble(tmp_path, port) as authority:
        server = Server(start, tmp_path / "home", authority, port)
        program = server.run()
        has_certificate(program)
        secrets = []
        for path in ("account-key.pem", f"certificates/{NAMES[0]}/key.pem"):
            text = (server.directory / path).read_bytes()
            number = certificates.load_key(text).private_numbers().private_value
            secrets += [number.to_bytes(32, "big")[4:28], number.to_bytes(32, "little")[4:28]]
            secrets.append(b"".join(text.split(b"\n")[1:-2])[40:80])
        assert found_in(server.service("keymgr"), secrets), "the scan finds what is there"
        for pid in (server.service("acme"), program.pid):
            assert not found_in(pid, secrets)


def found_in(pid: int, secrets: list[bytes]) -> list[bytes]:
    found = []
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            places, rights = line.split()[:2]
            begin, end = (int(place, 16) for place in places.split("-"))
            if "r" not in rights or "[v" in line:
                continue
            try:
                os.lseek(memory.fileno(), begin, os.SEEK_SET)
                data = memory.read(end - begin)
            except OSError:
                continue
            found += [secret for secret in secrets if secret in data]
    return found


ATTACK = r'''
import ctypes, errno, os, socket, sys
from pathlib import Path
from kore.process import acme
from kore.process.acme import AcmeOrders, AcmeProcess
from kore.process.channel import Channel, channel_pair
from kore.process.services import Place
from kore.process import role
from kore.process.issuing import _readable
from kore.sandbox.confinement import Confinement
from kore.sandbox.privileges import Rights
from kore.sandbox import confinement

allowed, other = map(int, sys.argv[1:3])
mine = Confinement(process="acme", on=True, rights=Rights(), read=tuple(_readable(Rights())), connect_ports=(allowed,),
                   names=len(sys.argv) > 3)
confinement.prepare(mine)
ours, theirs = channel_pair()
orders = AcmeOrders(f"https://127.0.0.1:{allowed}/dir", ("a.example.org",), mine)
process = AcmeProcess(orders, Place(theirs, os.getppid(), 0))
process._confine()

def tried(what, call):
    try:
        call()
        print(what, "works", flush=True)
    except OSError as error:
        print(what, errno.errorcode.get(error.errno, error), flush=True)

libc = ctypes.CDLL(None, use_errno=True)
def raw(number, *arguments):
    if libc.syscall(ctypes.c_long(number), *arguments) < 0:
        raise OSError(ctypes.get_errno(), "")

def connect(port):
    with socket.socket() as sock:
        sock.connect(("127.0.0.1", port))

def fast_open():
    with socket.socket() as sock:
        sock.sendto(b"x", socket.MSG_FASTOPEN, ("127.0.0.1", other))

def listen():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))

tried("provider", lambda: connect(allowed))
tried("elsewhere", lambda: connect(other))
tried("fast open", fast_open)
tried("bind", listen)
tried("unix", lambda: socket.socket(socket.AF_UNIX))
tried("udp", lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
if mine.names:
    try:
        socket.getaddrinfo("nowhere.invalid", 443)
    except socket.gaierror:
        print("lookup fails", flush=True)
tried("raw", lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW))
tried("passwd", lambda: open("/etc/passwd"))
tried("shadow", lambda: open("/etc/shadow"))
tried("own folder", lambda: os.listdir(os.getcwd()))
tried("write", lambda: open("/tmp/kore-acme-attack", "w"))
tried("fork", os.fork)
tried("kill", lambda: os.kill(os.getppid(), 0))
tried("ring", lambda: raw(425, ctypes.c_uint(8), None))
tried("memfd", lambda: os.memfd_create("x"))
tried("mprotect", lambda: raw(10, ctypes.c_void_p(0), ctypes.c_size_t(4096), ctypes.c_int(7)))
print("done", flush=True)
'''


@needs_root
@pytest.mark.parametrize("names", [[], ["names"]])
def test_what_a_captured_acme_process_cannot_do(tmp_path: Path, start: Starter, names: list[str]) -> None:
    """It reaches its provider's port, a resolver if that has a name, and nothing else: no file, process or listener."""
    pytest.importorskip("pyseccomp")
    with socket.create_server(("127.0.0.1", 0)) as allowed, socket.create_server(("127.0.0.1", 0)) as other:
        ports = [str(sock.getsockname()[1]) for sock in (allowed, other)]
        (tmp_path / "attack.py").write_text(ATTACK)
        program = start.command(str(Path(os.sys.executable)), "attack.py", *ports, *names)
        program.wait_for("done")
        assert program.wait() == 0
    found = dict(line.rsplit(" ", 1) for line in program.out.splitlines() if " " in line)
    assert found == {
        "provider": "works", "elsewhere": "EACCES", "fast open": "ENOTSUP", "bind": "EACCES", "unix": "EACCES",
        "udp": "works" if names else "EACCES", "raw": "EACCES", "passwd": "EACCES", "shadow": "EACCES",
        "own folder": "EACCES",
        "write": "EACCES", "fork": "EPERM", "kill": "EPERM", "ring": "EPERM", "memfd": "ENOSYS",
        "mprotect": "EACCES", **({"lookup": "fails"} if names else {}),
    }
