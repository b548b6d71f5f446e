"""What the key manager has given up: as the kernel tells it, and as an attacker finds it who has taken it over."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.attacks_harness import AS_ROOT
from tests.keymgr_harness import another_user, ask, cmdline, key_server
from tests.privileges_harness import CAPABILITY_SETS, limits, needs_root, status
from tests.support import free_port, open_files

PARENT = "PARENT = os.getppid()\n"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """One server for all; it serves after each of them. A key manager has no engine."""
    directory = tmp_path_factory.mktemp("keymgr")
    directory.chmod(0o755)
    with key_server(directory, os.environ.get("KORE_IO") or "epoll") as found:
        yield found
        with found.connect() as client:
            assert ask(client) == b"hello"


@needs_root
def test_what_the_kernel_says_of_it(server):
    found = status(server.manager)
    user = another_user()
    assert found["Uid"].split() == [str(user.pw_uid)] * 4
    assert found["Gid"].split() == [str(user.pw_gid)] * 4
    assert found["Groups"].split() in ([], [str(user.pw_gid)])
    assert {int(found[name], 16) for name in CAPABILITY_SETS} == {0}
    assert found["NoNewPrivs"] == "1"
    assert found["Seccomp"] == "2"
    assert int(found["VmLck"].split()[0]) > 10_000, "its memory is locked"
    assert limits(server.manager)["Max core file size"] == ("0", "0")
    assert os.stat(f"/proc/{server.manager}/mem").st_uid == 0, "not dumpable: proc(5) gives it to root"
    assert os.readlink(f"/proc/{server.manager}/root") == str(server.keys)


def test_it_has_its_name(server):
    assert cmdline(server.manager).rstrip(b"\0").endswith(b"kore [keymgr]")
    assert status(server.manager)["Name"] == "kore [keymgr]"


@needs_root  # who may look there
def test_it_has_no_descriptor_that_is_not_its_own(server):
    """No listener, no ring, no log: channels, and the standard streams."""
    for name in open_files(server.manager):
        assert name.startswith(("socket:", "pipe:", "/dev/null", "anon_inode:[pidfd]")), name
    sockets = {name for name in open_files(server.manager) if name.startswith("socket:")}
    inodes = {name.partition("[")[2].rstrip("]") for name in sockets}
    tables = [Path(f"/proc/{server.manager}/net/{kind}") for kind in ("tcp", "tcp6", "udp", "udp6")]
    inet = "".join(table.read_text() for table in tables if table.exists())
    assert not any(f" {inode} " in inet for inode in inodes)


def test_it_reads_its_keys_and_signs(server):
    """What is left to it, so that the refusals mean something."""
    assert server.within("return open('a.test-p256.key').read(10)") == "returned '-----BEGIN'"


ATTACKS = {
    # Network: none at all.
    "connect": ("return socket.create_connection(('127.0.0.1', TCP))", "EACCES"),
    "a socket": ("return sys_call('socket', 2, 1, 0)", "EACCES"),
    "UDP": ("return socket.socket(socket.AF_INET, socket.SOCK_DGRAM)", "EACCES"),
    "a socket with a path": ("return socket.socket(socket.AF_UNIX)", "EACCES"),
    "netlink": ("return socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)", "EACCES"),
    "a pair": ("return socket.socketpair()", "EACCES"),
    "a datagram pair": ("return socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)", "EACCES"),
    "connect what is there": ("return sys_call('connect', 0, inet(TCP), 16)", "EACCES"),
    "listen": ("return sys_call('listen', 0, 1)", "EACCES"),
    # Programs and processes.
    "execve": ("return os.execv('/bin/true', ['true'])", "killed: execve"),
    "execveat": ("return sys_call('execveat', -100, b'/bin/true', 0, 0, 0)", "killed: execveat"),
    "a program in memory": ("return os.memfd_create('x')", "ENOSYS"),
    "fork": ("return os.fork()", "EPERM"),
    "vfork": ("return sys_call('vfork')", "EPERM"),
    "clone": ("return sys_call('clone', 17, 0, 0, 0, 0)", "EPERM"),
    "clone3": ("return sys_call('clone3', struct.pack('=QQQQQQQQ', 0, 0, 0, 0, 17, 0, 0, 0), 64)", "ENOSYS"),
    "a namespace": ("return sys_call('unshare', 0x10000000)", "killed: unshare"),
    "a namespace, clone": ("return sys_call('clone', 0x10000000 | 17, 0, 0, 0, 0)", "EPERM"),
    "trace": ("return sys_call('ptrace', 0x4206, PARENT, 0, 0)", "killed: ptrace"),
    "the parent's memory": ("return sys_call('process_vm_readv', PARENT, 0, 0, 0, 0, 0)", "killed: process_vm_readv"),
    "write the parent's memory": ("return sys_call('process_vm_writev', PARENT, 0, 0, 0, 0, 0)",
                                  "killed: process_vm_writev"),
    "signal the parent": ("return os.kill(PARENT, 0)", "EPERM"),
    "signal all": ("return os.kill(-1, 0)", "EPERM"),
    "signal a thread": ("return sys_call('tgkill', PARENT, PARENT, 0)", "EPERM"),
    "signal by pidfd": ("return os.pidfd_open(PARENT)", "ENOSYS"),
    # Files: to read its own, and that is all.
    "read another file": ("return open('/etc/passwd').read()", "EACCES", "ENOENT"),
    "read above": ("return open('../app.py').read()", "EACCES", "ENOENT"),
    "read memory": ("return open('/proc/self/mem', 'rb')", "EACCES", "ENOENT"),
    "make a file": ("return open('made', 'w')", "EACCES"),
    "write a key": ("return open('a.test-p256.key', 'r+b')", "EACCES"),
    "write a key, raw": ("return sys_call('openat', -100, b'a.test-p256.key', 0o2)", "EACCES"),
    "a temporary file": ("return sys_call('openat', -100, b'.', 0o20200002, 0o600)", "EACCES"),
    "write by openat2": ("return sys_call('openat2', -100, b'made', bytes(24), 24)", "ENOSYS"),
    "remove a key": ("return os.unlink('a.test-p256.key')", "ENOSYS"),
    "rename a key": ("return os.rename('a.test-p256.key', 'x')", "ENOSYS"),
    "link a key": ("return os.link('a.test-p256.key', 'x')", "ENOSYS"),
    "change a mode": ("return os.chmod('a.test-p256.key', 0o666)", "ENOSYS"),
    "make a directory": ("return os.mkdir('x')", "ENOSYS"),
    "cut a file": ("return os.truncate('a.test-p256.key', 0)", "ENOSYS"),
    "list": ("return os.listdir('.')", "ENOSYS"),
    "another root": ("return os.chroot('.')", "killed: chroot"),
    "mount": ("return sys_call('mount', b'none', b'.', b'tmpfs', 0, 0)", "killed: mount"),
    # The ring, memory, rights.
    "a ring": ("return sys_call('io_uring_setup', 8, bytes(120))", "EPERM"),
    "enter a ring": ("return sys_call('io_uring_enter', 0, 0, 0, 0, 0, 0)", "EPERM"),
    "epoll": ("return select.epoll()", "ENOSYS"),
    "memory to run": ("return mmap.mmap(-1, 4096, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, 7)", "EACCES"),
    "make memory executable": ("return sys_call('mprotect', ctypes.addressof(PROBE) & ~4095, 4096, 7)", "EACCES"),
    "be root": ("return os.setresuid(0, 0, 0)", "killed: setresuid"),
    "capabilities": ("return sys_call('capset', bytes(8), bytes(24))", "killed: capset"),
    "be dumpable": ("return sys_call('prctl', 4, 1, 0, 0, 0)", "EINVAL"),
    "unlock memory": ("return sys_call('munlockall')", "ENOSYS"),
    "another filter": ("return sys_call('seccomp', 1, 0, 0)", "ENOSYS"),
    "the kernel": ("return sys_call('bpf', 0, bytes(64), 64)", "killed: bpf"),
    "keys of the kernel": ("return sys_call('keyctl', 0, -3, 0)", "killed: keyctl"),
    "input of the terminal": ("return sys_call('ioctl', 0, 0x5412, b'x')", "ENOTTY"),
}


@pytest.mark.parametrize("what", ATTACKS)
def test_attacks_from_within(server, what):
    code, *outcomes = ATTACKS[what]
    outcome = outcomes[-1] if AS_ROOT else outcomes[0]
    assert server.within(PARENT + code, TCP=free_port()) == outcome


FROM_A_WORKER = {
    "signal it": ("return os.kill(MANAGER, 0)", ("EPERM",)),
    "stop it": ("return os.kill(MANAGER, 19)", ("EPERM",)),
    "its memory": ("return open(f'/proc/{MANAGER}/mem', 'rb')", ("ENOENT", "EACCES")),
    "its descriptors": ("return os.listdir(f'/proc/{MANAGER}/fd')", ("ENOENT", "EACCES")),
    "read its memory": ("return sys_call('process_vm_readv', MANAGER, 0, 0, 0, 0, 0)", ("killed: process_vm_readv",)),
    "trace it": ("return sys_call('ptrace', 0x4206, MANAGER, 0, 0)", ("killed: ptrace",)),
    "a key": ("return open(KEY).read()", ("ENOENT", "EACCES")),
    "a key, another way": ("return open('../keys/a.test-p256.key').read()", ("ENOENT", "EACCES")),
}


@pytest.mark.parametrize("what", FROM_A_WORKER)
def test_attacks_of_a_worker_on_it(server, what):
    if not AS_ROOT and "a key" in what:
        pytest.skip("one user for all: the key lies beside the application, as the server says when it starts")
    code, outcomes = FROM_A_WORKER[what]
    key = str(server.keys / "a.test-p256.key")
    assert server.result(code, MANAGER=server.manager, KEY=key) in outcomes


@needs_root  # who may look there
def test_a_worker_cannot_send_it_descriptors_that_stay(server):
    """What comes along with a request is closed by the kernel: it asks for none."""
    before = len(open_files(server.manager))
    code = (
        "import array\nsock = role.role.tls.link._socket\nfor _ in range(50):\n"
        "    sock.sendmsg([b'x'], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array('i', [0]))])\n"
        "await asyncio.sleep(30)"
    )
    assert server.result(code) in ("killed: SIGKILL", "BrokenPipeError", "EPIPE", "EPERM")
    with server.connect() as client:
        assert ask(client) == b"hello"
    assert len(open_files(server.manager)) <= before + 1


@needs_root
def test_the_parent_keeps_no_more_rights_than_it_needs(server):
    kept = int(status(server.program.pid)["CapEff"], 16)
    assert kept & 1 << 21 == 0, "CAP_SYS_ADMIN"
    assert not kept & 1 << 12, "CAP_NET_ADMIN"


def test_random_bytes_are_read_and_replaced(tmp_path):
    """In the sandbox the directory of rand_file, and no other place, may be written to."""
    text = "kore.config.rand_file = 'random/seed'"
    early = (
        "import pathlib\nplace = pathlib.Path(KEYS) / 'random'\nplace.mkdir()\n"
        "(place / 'seed').write_bytes(bytes(2048))\n"
        "if os.geteuid() == 0:\n    os.chown(place, USER, 0)\n    os.chown(place / 'seed', USER, 0)\n"
    )
    early = f"KEYS, USER = {str(tmp_path / 'keys')!r}, {another_user().pw_uid}\n" + early
    with key_server(tmp_path, os.environ.get("KORE_IO") or "epoll", text, early=early, kinds=("p256",)) as server:
        seed = tmp_path / "keys" / "random" / "seed"
        first = seed.read_bytes()
        assert len(first) == 2048
        assert first != bytes(2048)
        assert "rand_file" not in server.program.out
        assert server.within("return open('made', 'w')") == "EACCES"
        assert server.within("return open('random/made', 'w').close()") == "returned None"
        manager = server.manager
        os.kill(manager, signal.SIGKILL)
        server.program.wait_for("the key manager is there again", count=1)
        assert seed.read_bytes() != first
        with server.connect() as client:
            assert ask(client) == b"hello"
