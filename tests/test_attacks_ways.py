"""An attacker inside a worker looks for ways around: its ring, the programs it may start, what is open already."""

from __future__ import annotations

import os
import select
import shutil
import socket
import tempfile
from pathlib import Path

import pytest

from kore.uring.restrictions import SERVING
from tests.attacks_harness import AS_ROOT, target
from tests.privileges_harness import needs_root, root_directory
from tests.support import children, open_files, pids_of, skip_unless


@pytest.fixture(params=["uring", "epoll"])
def engine(request):
    skip_unless(request.param)
    return request.param


@pytest.fixture
def victim(tmp_path, engine):
    """A server that is attacked, and serves afterwards."""
    with target(tmp_path, engine) as server:
        yield server
        server.serves()


def returned(answer: str):
    """What the attack found out."""
    assert answer.startswith("returned "), answer
    return eval(answer.removeprefix("returned "))


@pytest.fixture
def place():
    """A directory that every user may enter, so that programs of another user can be started in it."""
    with tempfile.TemporaryDirectory(prefix="kore-attacked-") as path:
        Path(path).chmod(0o755)
        yield Path(path)


# The ring.

OPCODES = """
found = {}
for number in range(256):
    if number not in ALLOWED:
        try:
            found[number] = await ring(number, 0, addr=bytes(200), length=1)
        except OSError as error:
            found[number] = errno.errorcode[error.errno]
return found
"""
FLAGS = """
found = {}
for number in range(8):
    if not ALLOWED & 1 << number:
        try:
            found[number] = await ring(14, -1, flags=1 << number)
        except OSError as error:
            found[number] = errno.errorcode[error.errno]
return found
"""
REGISTERS = """
found = set()
for number in range(64):
    for of_all in (0, 1 << 31):  # IORING_REGISTER_USE_REGISTERED_RING
        try:
            found.add(sys_call("io_uring_register", tasks.process_loop.driver.ring.fd, number | of_all, bytes(4096), 1))
        except OSError as error:
            found.add(errno.errorcode[error.errno])
return found
"""
LATER = """
sock = socket.socketpair()[0]
found = {}
for name, attempt in {
    "a registered file to accept into": lambda: ring(13, LISTENER, file_index=1),
    "a registered file to close": lambda: ring(19, 0, file_index=1),
    "a registered file to splice from": lambda: ring(30, sock.fileno(), length=1, op_flags=1 << 31, file_index=1),
}.items():
    try:
        found[name] = await attempt()
    except OSError as error:
        found[name] = errno.errorcode[error.errno]
return found
"""


def test_every_operation_that_is_not_listed_is_refused_to_the_workers_own_ring(tmp_path):
    """EACCES of the list, or EINVAL for what the kernel does not know; openat, socket, uring_cmd among them."""
    skip_unless("uring")
    with target(tmp_path, "uring") as victim:
        found = returned(victim.attack(OPCODES, ALLOWED=sorted(SERVING.operations)))
        assert len(found) == 256 - len(SERVING.operations)
        assert set(found.values()) <= {"EACCES", "EINVAL", "ENOTSUP"}  # the last of what a kernel was built without
        # nop, openat, connect, openat2, renameat, unlinkat, mkdirat, symlinkat, linkat, setxattr, socket, uring_cmd
        assert {found[number] for number in (0, 18, 16, 28, 35, 36, 37, 38, 39, 42, 45, 46)} == {"EACCES"}
        found = returned(victim.attack(FLAGS, ALLOWED=SERVING.flags))
        assert len(found) == 6
        assert set(found.values()) <= {"EACCES", "EINVAL", "ENOTSUP"}  # the last for IOSQE_IO_DRAIN on a ring like ours
        assert returned(victim.attack(REGISTERS)) == {"EPERM"}, "the filter does not even let it ask"
        found = returned(victim.attack(LATER, LISTENER=-1))
        assert set(found.values()) <= {"EBADF", "ENXIO", "EINVAL", "EACCES"}, found
        victim.serves()


# What is open already.

OPEN = """
found = []
for fd in range(1000):
    try:
        found.append((fd, os.fstat(fd).st_mode & 0o170000))
    except OSError:
        pass
return found
"""


def test_no_directory_is_open(victim):
    """One that was opened outside of the root would lead out of it (fchdir(2))."""
    found = returned(victim.attack(OPEN))
    assert 0o040000 not in [kind for _, kind in found], found
    assert [fd for fd, kind in found if kind == 0o100000] == [], "nor is a file"


@pytest.mark.skipif(not AS_ROOT, reason="not root: the maps of a process that is not dumpable cannot be read")
def test_nothing_that_can_be_written_can_be_run(victim):
    """Neither by one mapping nor by two of one file: the code in memory stays what it was."""
    for pid in pids_of(victim.program):
        written, run = set(), set()
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            _, rights, _, device, inode, *_ = line.split(maxsplit=5)
            assert not ("w" in rights and "x" in rights), line
            if inode != "0" and rights[3] == "s":
                (written if "w" in rights else set()).add((device, inode))
            if inode != "0" and "x" in rights:
                run.add((device, inode))
        assert not written & run


# Programs.

SPAWN = """
reading, writing = os.pipe()
null = os.open("/dev/null", os.O_RDONLY)
program = spawning._spawner.spawn(ARGV[0], ARGV, {"PATH": "/usr/bin:/bin"}, (null, writing, writing))
os.close(writing)
said = b""
while piece := os.read(reading, 65536):
    said += piece
return said.decode()
"""
TRIES = """
import ctypes, errno, fcntl, os, signal, socket, struct
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
def raw(number, *words):
    if libc.syscall(ctypes.c_long(number), *(ctypes.c_ulong(word) for word in words)) == -1:
        raise OSError(ctypes.get_errno(), "")
def pair():
    socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)[0].sendto(b"x", "/run/nothing")
tries = {
    "userns": lambda: raw(272, 0x10000000),
    "clone": lambda: raw(56, 0x10000011, 0, 0, 0, 0) or os._exit(0),
    "clone3": lambda: raw(435, 0, 0),
    "ring": lambda: raw(425, 8, 0),
    "bpf": lambda: raw(321, 0, 0, 0),
    "ptrace": lambda: raw(101, 0x4206, os.getppid(), 0, 0),
    "mount": lambda: raw(165, 0, 0, 0, 0, 0),
    "userfaultfd": lambda: raw(323, 1),
    "keyctl": lambda: raw(250, 0, 0),
    "udp": lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM),
    "mptcp": lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262),
    "netlink": lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW),
    "unix": lambda: socket.socket(socket.AF_UNIX),
    "pair": pair,
    "tcp": lambda: socket.create_connection(("127.0.0.1", PORT)),
    "fast open": lambda: socket.socket().sendto(b"x", socket.MSG_FASTOPEN, ("127.0.0.1", PORT)),
    "bind": lambda: socket.socket().bind(("127.0.0.1", 0)),
    "listen": lambda: socket.socket().listen(),
    "typing": lambda: fcntl.ioctl(0, 0x5412, b"x"),
    "write": lambda: open("made", "w"),
    "parent": lambda: os.kill(PARENT, 0),
    "worker": lambda: os.kill(WORKER, 0),
    "spawner": lambda: os.kill(os.getppid(), 0),
    "root": lambda: os.setuid(0) if os.getuid() else os.chroot("/"),
}
found = {}
for name, attempt in tries.items():
    try:
        attempt()
        found[name] = "done"
    except OSError as error:
        found[name] = errno.errorcode[error.errno]
print(found)
"""
ENDS = {
    "userns": "EPERM", "clone": "EPERM", "clone3": "ENOSYS", "ring": "EPERM", "bpf": "EPERM", "ptrace": "EPERM",
    "mount": "EPERM", "userfaultfd": "EPERM", "keyctl": "EPERM", "udp": "EACCES", "mptcp": "EACCES",
    "netlink": "EACCES", "unix": "EACCES", "pair": "EACCES", "tcp": "EACCES", "fast open": "EOPNOTSUPP",
    "bind": "EACCES", "listen": "EACCES", "typing": "EPERM", "write": "EACCES", "parent": "EPERM", "worker": "EPERM",
    "root": "EPERM",
}  # fmt: skip


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the calls are numbered as on x86-64")
@pytest.mark.parametrize("user", [False, pytest.param(True, marks=needs_root)], ids=["same user", "other user"])
def test_a_program_of_the_attackers_choice_gets_no_further(place, engine, user):
    """Any program may be started where sandbox_programs names none; it is bound by a filter and Landlock of its own."""
    with target(place, engine, "kore.config.sandbox_read = '/dev/null'", chroot=False, user=user) as victim:
        with socket.create_server(("127.0.0.1", 0)) as server:
            (worker,) = pids_of(victim.program)
            given = f"PORT, PARENT, WORKER = {server.getsockname()[1]}, {victim.program.pid}, {worker}\n"
            said = victim.attack(SPAWN, ARGV=["/usr/bin/python3", "-Ic", given + TRIES])
        found = eval(returned(said))
        found.pop("spawner")
        assert found == {**ENDS, "fast open": found["fast open"]}
        assert found["fast open"] in ("EACCES", "EOPNOTSUPP", "ENOTSUP")
        assert victim.attack(SPAWN, ARGV=["echo", "ordinary programs run"]) == r"returned 'ordinary programs run\n'"
        victim.serves()


@needs_root
def test_a_program_that_gives_root_gives_nothing(place, engine):
    """Set-user-ID on a copy of id(1): the spawner's no_new_privs holds for what it starts."""
    program = Path(shutil.copy(shutil.which("id"), root_directory(place) / "id"))
    program.chmod(0o4755)
    with target(place, engine, "kore.config.sandbox_read = '/dev/null'", chroot=False) as victim:
        said = returned(victim.attack(SPAWN.replace("ARGV[0]", "'./id'"), ARGV=["id", "-u"]))
        assert said.strip() not in ("0", ""), said


@needs_root
def test_programs_live_in_the_root_too(tmp_path, engine):
    """There is no other file system for the spawner: what is not in the root cannot be started."""
    with target(tmp_path, engine) as victim:
        code = SPAWN.replace('os.open("/dev/null", os.O_RDONLY)', "reading")
        assert victim.attack(code, ARGV=["/bin/true"]) == "ENOENT"
        (worker,) = pids_of(victim.program)
        (spawner,) = children(worker)
        assert os.readlink(f"/proc/{spawner}/root") == str(tmp_path / "root")
        assert f"/proc/{spawner}/task/{spawner}/children" in open_files(spawner), "whom it ends with the worker"
        assert "/proc" not in open_files(worker) + open_files(spawner), "a way out of the root"


# The listening socket, which all workers share.

LISTENER = """
def listener():
    for fd in range(3, 100):
        try:
            sock = socket.socket(fileno=os.dup(fd))
            if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                KEPT.append(sock)
                return sock
        except OSError:
            pass
sock = listener()
"""
SHUT = LISTENER + """
found = []
for how in (socket.SHUT_RD, socket.SHUT_RDWR):
    try:
        found.append(sock.shutdown(how))
    except OSError as error:
        found.append(errno.errorcode[error.errno])
mine, other = socket.socketpair()
mine.shutdown(socket.SHUT_WR)
return found, other.recv(1)
"""


@pytest.mark.parametrize("connects", [False, True], ids=["serving", "connecting"])
def test_no_worker_shuts_a_listener_down(tmp_path, engine, connects):
    """shutdown(2) on it would be for all; a FIN may be sent."""
    lines = ["kore.config.sandbox_connect = 1"] if connects else []
    with target(tmp_path, engine, *lines, workers=2) as victim:
        assert returned(victim.attack(SHUT)) == (["ENOTCONN"] * 2, b"")
        for _ in range(10):
            victim.serves()


NOBODY = "struct.pack('=H14x', socket.AF_UNSPEC)"
STOPPED = {
    "connect": f"sys_call('connect', sock.fileno(), {NOBODY}, 16)",
    "CONNECT": f"await ring(16, sock.fileno(), addr={NOBODY}, off=16)",
    "connected anew": f"sys_call('connect', sock.fileno(), {NOBODY}, 16)\nsock.connect_ex(('127.0.0.1', PORT))",
}
"""What ends the listening: it is a connect(2), whose address nobody sees."""


@pytest.mark.parametrize("how", STOPPED)
def test_a_listener_that_a_worker_stops_listens_again(tmp_path, engine, how):
    """The parent looks, also when it was connected elsewhere meanwhile, and at the second time."""
    if how == "CONNECT" and engine != "uring":
        pytest.skip("there is no ring")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with target(tmp_path, engine, f"kore.config.sandbox_connect = {port}", workers=2) as victim:
            for count in (1, 2):
                code = f"{LISTENER}\n{STOPPED[how]}\nreturn sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)"
                assert victim.attack(code, PORT=port) == "returned 0"
                victim.program.wait_for("server plain: a worker had stopped its socket; it listens again", count=count)
                for _ in range(10):
                    victim.serves()


def test_a_listener_that_a_worker_makes_wait_holds_up_nobody(tmp_path, engine):
    """accept(2) on a socket that blocks would wait for the next connection, in the middle of the loop."""
    with target(tmp_path, engine, workers=2) as victim:
        for _ in range(4):
            assert victim.attack(f"{LISTENER}\nos.set_blocking(sock.fileno(), True)\nreturn 1") == "returned 1"
            for _ in range(10):
                victim.serves()


OPTIONS = LISTENER + """
found = []
for option, value in ((25, b"lo"), (62, 1), (47, 1)):
    try:
        found.append(sock.setsockopt(socket.SOL_SOCKET, option, value))
    except OSError as error:
        found.append(errno.errorcode[error.errno])
return found
"""


def test_a_listener_stays_on_all_interfaces_and_quick(tmp_path, engine):
    """SO_BINDTODEVICE, SO_BINDTOIFINDEX and SO_MAX_PACING_RATE, which connections would inherit."""
    with target(tmp_path, engine) as victim:
        assert returned(victim.attack(OPTIONS)) == ["EPERM"] * 3
        victim.serves()


# Connections that nobody is asked about.

FAST_OPEN = """
def message():
    piece = struct.pack("=QQ", at(b"x"), 1)
    return struct.pack("=QIxxxxQQQQIxxxx", at(inet(TCP)), 16, at(piece), 1, 0, 0, 0)
def tcp(*arguments):
    KEPT.append(socket.socket(socket.AF_INET, socket.SOCK_STREAM, *arguments))
    return KEPT[-1]
def deferred():
    sock = tcp()
    sock.setsockopt(socket.IPPROTO_TCP, 30, 1)  # TCP_FASTOPEN_CONNECT
    sock.connect(("127.0.0.1", TCP))
    return sock.send(b"x")
FLAG = 0x20000000
ways = {
    "sendto": lambda: tcp().sendto(b"x", FLAG, ("127.0.0.1", TCP)),
    "sendmsg": lambda: tcp().sendmsg([b"x"], [], FLAG, ("127.0.0.1", TCP)),
    "sendmmsg": lambda: sys_call("sendmmsg", tcp().fileno(), message() + bytes(8), 1, FLAG),
    "deferred": deferred,
    "connect": lambda: tcp().connect(("127.0.0.1", TCP)),
    "MPTCP": lambda: tcp(262).connect(("127.0.0.1", TCP)),
}
if hasattr(tasks.process_loop.driver, "ring"):
    ways |= {
        "SENDMSG": lambda: ring(9, tcp().fileno(), addr=message(), length=1, op_flags=FLAG),
        "SEND": lambda: ring(26, tcp().fileno(), addr=b"x", off=inet(TCP), length=1, op_flags=FLAG, file_index=16),
        "SEND_ZC": lambda: ring(47, tcp().fileno(), addr=b"x", off=inet(TCP), length=1, op_flags=FLAG, file_index=16),
        "SENDMSG_ZC": lambda: ring(48, tcp().fileno(), addr=message(), length=1, op_flags=FLAG),
        "CONNECT": lambda: ring(16, tcp().fileno(), addr=inet(TCP), off=16),
    }
found = {}
for name, way in ways.items():
    try:
        done = way()
        found[name] = await done if asyncio.iscoroutine(done) else done
    except OSError as error:
        found[name] = errno.errorcode[error.errno]
return found
"""
REFUSED = {"EACCES", "ENOTSUP", "EOPNOTSUPP", "ENOSYS"}


def reached(listener: socket.socket) -> bool:
    """Whether anybody has connected."""
    return bool(select.select([listener], [], [], 0)[0])


def test_no_way_to_a_port_that_is_not_declared(tmp_path, engine):
    """In a worker that may connect to another: neither by a send that connects, nor by a protocol that is not TCP."""
    with target(tmp_path, engine, "kore.config.sandbox_connect = 1") as victim, socket.create_server(
        ("127.0.0.1", 0)
    ) as server:
        found = returned(victim.attack(FAST_OPEN, TCP=server.getsockname()[1]))
        assert len(found) == (11 if engine == "uring" else 6)
        assert not reached(server)
        assert set(found.values()) <= REFUSED, found
        victim.serves()


DATAGRAM = """
return socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("127.0.0.1", UDP))
"""


@pytest.mark.parametrize(("host", "outcome"), [("127.0.0.1", "EACCES"), ("localhost", "returned 1")])
def test_datagrams_leave_only_where_names_are_looked_up(tmp_path, engine, host, outcome):
    """A database by address needs none; who looks up names may send them anywhere, as the documentation says."""
    pytest.importorskip("asyncpg")
    text = f"kore.dbsetup('db', 'host={host} port=1')"
    with target(tmp_path, engine, text=text) as victim, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.1", 0))
        assert victim.attack(DATAGRAM, UDP=server.getsockname()[1]) == outcome
        victim.serves()
