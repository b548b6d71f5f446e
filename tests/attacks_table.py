"""The attacks: what each does, what becomes of it in the whole sandbox, and which layers stop it when they are alone.

An attack that succeeds returns; it is written so that success does no harm to the machine it is tried on, since it is
tried with no layer at all as well, to know that it is one. Where the outcome in a root of its own differs, because
there is no such file there, `jailed` says so.
"""

from __future__ import annotations

from typing import NamedTuple

LAYERS = ("filter", "Landlock", "ring", "user", "chroot")


class Attack(NamedTuple):
    """One attack. `layers` are those that stop it alone; None: it cannot succeed anywhere, so that says nothing."""

    code: str
    outcome: str
    layers: str | None
    jailed: str = ""


_CONNECT_RAW = """
fd = sys_call("socket", socket.AF_INET, socket.SOCK_STREAM, 0)
return sys_call("connect", fd, inet(TCP), 16)
"""
_CONNECT_RING = """
fd = await ring(45, socket.AF_INET, off=socket.SOCK_STREAM)
return await ring(16, fd, addr=inet(TCP), off=16)
"""
_UDP_RING = """
fd = await ring(45, socket.AF_INET, off=socket.SOCK_DGRAM)
name = at(inet(UDP))
piece = struct.pack("=QQ", at(b"x"), 1)
return await ring(9, fd, addr=struct.pack("=QIxxxxQQQQIxxxx", name, 16, at(piece), 1, 0, 0, 0), length=1)
"""
_VM_READ = """
pieces = struct.pack("=QQ", ctypes.addressof(ctypes.create_string_buffer(8)), 8)
wanted = struct.pack("=QQ", ctypes.addressof(PROBE), 8)
return sys_call("process_vm_readv", PARENT, pieces, 1, wanted, 1, 0)
"""
_MEMFD_EXEC = """
fd = os.memfd_create("program")
head = b"\\x7fELF\\x02\\x01\\x01" + bytes(9)
head += struct.pack("=HHIQQQIHHHHHH", 2, 62, 1, 0x400078, 64, 0, 0, 64, 56, 1, 0, 0, 0)
load = struct.pack("=IIQQQQQQ", 1, 5, 0, 0x400000, 0x400000, 0x1000, 0x1000, 0x1000)
code = b"\\xbf" + struct.pack("=I", EXITS) + b"\\xb8\\x3c\\0\\0\\0\\x0f\\x05"  # exit(EXITS), of x86-64
os.write(fd, (head + load + code).ljust(0x1000, b"\\0"))
return apart(lambda: sys_call("execveat", fd, b"\\0", struct.pack("=QQ", at(b"x"), 0), struct.pack("=Q", 0), 0x1000))
"""
_FORK = """
pid = {call}
if pid == 0:
    os._exit(0)
return os.waitpid(pid, 0)[1]
"""
_SHM = """
number = sys_call("shmget", 0, 4096, 0o1777)
try:
    return sys_call("shmat", number, 0, 0o100000)
finally:
    sys_call("shmctl", number, 0, 0)
"""
_PAIR = """
here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
return here.sendto(b"x", DATAGRAMS)
"""
_FAST_OPEN = """
sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
return sock.sendto(b"x", socket.MSG_FASTOPEN, ("127.0.0.1", TCP))
"""
_PIDFD = """
fd = os.pidfd_open(PARENT)
return signal.pidfd_send_signal(fd, 0)
"""
_MOUNT = """
def mounted():
    sys_call("mount", b"none", b".", b"tmpfs", 0, 0)
    sys_call("umount2", b".", 2)
return apart(mounted)
"""
_LIMIT = """
more = struct.pack("=QQ", 0, resource.getrlimit(resource.RLIMIT_CORE)[1] + 1)
return apart(lambda: sys_call("prlimit64", 0, resource.RLIMIT_CORE, more, 0))
"""
_MAPPED = 'return mmap.mmap(os.open("data", os.O_RDONLY), 4096, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_EXEC)'
_MEMFD_MAPPED = """
fd = os.memfd_create("code")
os.write(fd, bytes(4096))
return mmap.mmap(fd, 4096, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_EXEC)
"""
_RIGHTS = 'return mmap.mmap(-1, 4096, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, {})'
_PROTECT = """
page = mmap.mmap(-1, 4096)
KEPT.append(page)
return sys_call("{}", ctypes.addressof(ctypes.c_char.from_buffer(page)), 4096, 5, -1)
"""

ATTACKS = {
    # Files.
    "read a file": Attack("return open('/etc/passwd').read(4)", "EACCES", "Landlock chroot", "ENOENT"),
    "read a secret": Attack("return open('/etc/shadow').read(0)", "EACCES", "Landlock chroot user", "ENOENT"),
    "read a file, openat": Attack(
        "return sys_call('openat', -100, b'/etc/passwd', 0)", "EACCES", "Landlock chroot", "ENOENT"),
    "read a file, open": Attack("return sys_call('open', b'/etc/passwd', 0)", "EACCES", "Landlock chroot", "ENOENT"),
    "read a file, openat2": Attack(
        "return sys_call('openat2', -100, b'/etc/passwd', bytes(24), 24)", "ENOSYS", "filter Landlock chroot"),
    "read a file, ring": Attack(
        "return await ring(18, -100, addr=b'/etc/passwd')", "EACCES", "ring Landlock chroot"),
    "read a file, openat2, ring": Attack(
        "return await ring(28, -100, addr=b'/etc/passwd', off=bytes(24), length=24)", "EACCES", "ring Landlock chroot"),
    "list a directory": Attack("return os.listdir('/etc')", "EACCES", "Landlock chroot", "ENOENT"),
    "make a file": Attack("return open(PLACE + '/made', 'w').close()", "EACCES", "filter Landlock chroot user"),
    "make a directory": Attack("return os.mkdir(PLACE + '/new')", "ENOSYS", "filter Landlock chroot user"),
    "make a directory, ring": Attack(
        "return await ring(37, -100, addr=PLACE.encode() + b'/newer', length=0o700)", "EACCES",
        "ring Landlock chroot user"),
    "remove a file": Attack("return os.unlink(PLACE + '/file')", "ENOSYS", "filter Landlock chroot user"),
    "remove a file, ring": Attack(
        "return await ring(36, -100, addr=PLACE.encode() + b'/other')", "EACCES", "ring Landlock chroot user"),
    "change a mode": Attack("return os.chmod(PLACE, 0o755)", "ENOSYS", "filter chroot user"),
    "write to its own memory": Attack(
        "return open('/proc/self/mem', 'r+b')", "EACCES", "filter Landlock chroot user"),
    "open by handle": Attack(
        "return sys_call('open_by_handle_at', 0, bytes(64), 0)", "killed: open_by_handle_at", None),
    "mount": Attack(_MOUNT, "killed: mount", "filter Landlock user"),
    "another root": Attack("return apart(lambda: os.chroot('.'))", "killed: chroot", "filter user"),
    # Connections.
    "connect": Attack("return socket.create_connection(('127.0.0.1', TCP))", "EACCES", "filter Landlock"),
    "connect, raw": Attack(_CONNECT_RAW, "EACCES", "filter Landlock"),
    "connect, ring": Attack(_CONNECT_RING, "EACCES", "ring Landlock"),
    "fast open": Attack(_FAST_OPEN, "EACCES", "filter"),
    "MPTCP": Attack(
        "return socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262).connect(('127.0.0.1', TCP))", "EACCES",
        "filter"),
    "SCTP": Attack("return socket.socket(socket.AF_INET, socket.SOCK_STREAM, 132)", "EACCES", None),
    "UDP": Attack(
        "return socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', UDP))", "EACCES", "filter"),
    "UDP, ring": Attack(_UDP_RING, "EACCES", "ring"),
    "netlink": Attack("return socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)", "EAFNOSUPPORT", "filter"),
    "packets": Attack("return socket.socket(socket.AF_PACKET, socket.SOCK_RAW)", "EACCES", "filter user"),
    "a socket with a path": Attack(
        "return socket.socket(socket.AF_UNIX).connect(STREAMS)", "EACCES", "filter chroot"),
    "a socket with a path, from a pair": Attack(_PAIR, "EACCES", "filter chroot"),
    "an abstract socket": Attack("return socket.socket(socket.AF_UNIX).connect(ABSTRACT)", "EACCES", "filter Landlock"),
    "bind": Attack("return socket.socket().bind(('127.0.0.1', 0))", "EACCES", "filter Landlock"),
    "listen": Attack("return socket.socket().listen()", "EACCES", "filter"),
    # Programs and processes.
    "execve": Attack(
        "return apart(lambda: os.execv('/bin/sh', ['sh', '-c', f'exit {EXITS}']))", "killed: execve",
        "filter Landlock chroot"),
    "execveat": Attack(
        "return apart(lambda: sys_call('execveat', -100, b'/bin/true', struct.pack('=QQ', at(b'true'), 0), 0, 0))",
        "killed: execveat", "filter Landlock chroot"),
    "a program in memory": Attack(_MEMFD_EXEC, "killed: execveat", "filter"),
    "fork": Attack(_FORK.format(call="os.fork()"), "EPERM", "filter"),
    "clone": Attack(_FORK.format(call="sys_call('clone', 17, 0, 0, 0, 0)"), "EPERM", "filter"),
    "clone3": Attack(_FORK.format(call="sys_call('clone3', struct.pack('=QQQQQQQQ', 0, 0, 0, 0, 17, 0, 0, 0), 64)"),
                     "ENOSYS", "filter"),
    "a user namespace": Attack(
        "return apart(lambda: sys_call('unshare', 0x10000000))", "killed: unshare", "filter chroot"),
    "a user namespace, clone": Attack(
        _FORK.format(call="sys_call('clone', 0x10000000 | 17, 0, 0, 0, 0)"), "EPERM", "filter chroot"),
    "another namespace": Attack("return sys_call('setns', -1, 0)", "killed: setns", None),
    "trace the parent": Attack(
        "return apart(lambda: sys_call('ptrace', 0x4206, PARENT, 0, 0))", "killed: ptrace", "filter Landlock user"),
    "read the parent's memory": Attack(_VM_READ, "killed: process_vm_readv", "filter Landlock user"),
    "the parent's memory": Attack(
        "return open(f'/proc/{PARENT}/mem', 'rb')", "EACCES", "Landlock chroot user", "ENOENT"),
    "the parent's environment": Attack(
        "return open(f'/proc/{PARENT}/environ').read()", "EACCES", "Landlock chroot user", "ENOENT"),
    "the parent's maps": Attack(
        "return open(f'/proc/{PARENT}/maps').read()", "EACCES", "Landlock chroot user", "ENOENT"),
    "the parent's descriptors": Attack(
        "return os.listdir(f'/proc/{PARENT}/fd')", "EACCES", "Landlock chroot user", "ENOENT"),
    "signal the parent": Attack("return os.kill(PARENT, 0)", "EPERM", "filter Landlock user"),
    "signal the parent, tgkill": Attack(
        "return sys_call('tgkill', PARENT, PARENT, 0)", "EPERM", "filter Landlock user"),
    "signal the parent, tkill": Attack("return sys_call('tkill', PARENT, 0)", "ENOSYS", "filter Landlock user"),
    "signal the parent, pidfd": Attack(_PIDFD, "ENOSYS", "filter Landlock user"),
    "signal the other worker": Attack("return os.kill(OTHER, 0)", "EPERM", "filter Landlock"),
    "signal the spawner": Attack("return os.kill(spawning._spawner.pid, 0)", "EPERM", "filter Landlock"),
    "signal all": Attack("return os.kill(0, 0)", "EPERM", "filter"),
    "have the kernel signal the parent": Attack(
        "return fcntl.fcntl(socket.socketpair()[0], fcntl.F_SETOWN, PARENT)", "EPERM", "filter"),
    "take the parent's descriptors": Attack("return sys_call('pidfd_getfd', 0, 0, 0)", "killed: pidfd_getfd", None),
    # The ring.
    "a ring": Attack("return os.close(sys_call('io_uring_setup', 8, bytes(120)))", "EPERM", "filter"),
    "register on the ring": Attack("return register(8)", "EPERM", "filter ring"),
    "unrestrict the ring": Attack("return register(11)", "EPERM", None),
    "a command by the ring": Attack("return await ring(46, 0)", "EACCES", None),
    # Memory.
    "memory to write and run": Attack(_RIGHTS.format("7"), "EACCES", "filter"),
    "memory to run": Attack(_RIGHTS.format("5"), "EACCES", "filter"),
    "make memory executable": Attack(_PROTECT.format("mprotect"), "EACCES", "filter"),
    "make memory executable, keys": Attack(_PROTECT.format("pkey_mprotect"), "ENOSYS", "filter"),
    "run a file in memory": Attack(_MEMFD_MAPPED, "EACCES", "filter"),
    "run a file that was written": Attack(_MAPPED, "EACCES", "filter"),
    "shared memory to run": Attack(_SHM, "ENOSYS", "filter"),
    "pages in another order": Attack("return sys_call('remap_file_pages', 0, 0, 0, 0, 0)", "ENOSYS", None),
    "executable by personality": Attack(
        "return apart(lambda: sys_call('personality', 0x400000))", "killed: personality", "filter"),
    # Root and limits.
    "be root": Attack("return apart(lambda: os.setresuid(0, 0, 0))", "killed: setresuid", "filter user"),
    "have root's groups": Attack("return apart(lambda: os.setgroups([0, 1]))", "killed: setgroups", "filter user"),
    "capabilities": Attack(
        "return sys_call('capset', struct.pack('=Ii', 0x20080522, 0), struct.pack('=6I', 1, 1, 0, 0, 0, 0))",
        "killed: capset", "filter user"),
    "raise a limit": Attack(_LIMIT, "EPERM", "filter user"),
    "the parent's limits": Attack(
        "return sys_call('prlimit64', PARENT, 7, 0, bytes(16))", "EPERM", "filter user"),
    "be dumpable": Attack("return sys_call('prctl', 4, 1, 0, 0, 0)", "EINVAL", "filter"),
    "load code into the kernel": Attack("return sys_call('bpf', 0, bytes(64), 64)", "killed: bpf", None),
    "faults in user space": Attack("return sys_call('userfaultfd', 1)", "killed: userfaultfd", "filter"),
    "keys": Attack("return sys_call('keyctl', 0, -3, 0)", "killed: keyctl", "filter"),
    "another filter": Attack("return sys_call('seccomp', 2, 0, bytes(4))", "ENOSYS", "filter"),
}  # fmt: skip
