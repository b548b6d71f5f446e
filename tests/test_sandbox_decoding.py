"""System calls as people read them, and nothing a process put into its memory gets further than its quotes."""

from __future__ import annotations

import signal
import socket

import pytest

from kore.sandbox.decoding import SIGNS, call_text, path_text
from kore.sandbox.machine import AARCH64, X86_64, known_anywhere, name_of, number_of

pytest.importorskip("pyseccomp")


def text(name, *arguments, memory=None):
    filled = (*arguments, 0, 0, 0, 0, 0, 0)[:6]
    read = None if memory is None else lambda address, most: memory.get(address, b"")[:most] or None
    return call_text(number_of(name, X86_64), filled, X86_64, read)


CASES = [
    ("execve", (4096, 8192, 0), 'execve("/bin/sh", 0x2000, 0)'),
    ("openat", (0xFFFFFF9C, 4096, 0o2000102, 0o600), 'openat(AT_FDCWD, "/bin/sh", O_RDWR|O_CREAT|O_CLOEXEC, 0600)'),
    ("openat", (5, 0, 0), "openat(5, NULL, O_RDONLY, 0)"),
    ("socket", (17, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 3), "socket(AF_PACKET, SOCK_RAW|SOCK_CLOEXEC, 3)"),
    ("socket", (999, 15, 0), "socket(999, 15, 0)"),
    ("mmap", (0, 4096, 7, 0x22, 0xFFFFFFFF, 0), "mmap(0, 4096, PROT_READ|PROT_WRITE|PROT_EXEC, 0x22, -1, 0)"),
    ("mprotect", (4096, 1, 0), "mprotect(0x1000, 1, PROT_NONE)"),
    ("clone", (0x4111,), "clone(SIGCHLD|CLONE_VM|CLONE_VFORK, 0, 0, 0, 0)"),
    ("kill", (0xFFFFFFFF, signal.SIGKILL), "kill(-1, SIGKILL)"),
    ("kill", (1, 0), "kill(1, 0)"),
    ("unshare", (0x10020000,), "unshare(CLONE_NEWNS|CLONE_NEWUSER)"),
    ("ptrace", (16, 77, 0, 0), "ptrace(16, 77, 0, 0)"),
    ("fork", (1, 2, 3), "fork()"),
    ("getpid", (1, 0, 3), "getpid(0x1, 0, 0x3, 0, 0, 0)"),
]


@pytest.mark.parametrize(("name", "arguments", "expected"), CASES)
def test_calls(name, arguments, expected):
    assert text(name, *arguments, memory={4096: b"/bin/sh\0rest"}) == expected


def test_a_path_that_cannot_be_read_is_its_address():
    assert text("rmdir", 0x1234) == "rmdir(0x1234)"
    assert text("rmdir", 0x1234, memory={}) == "rmdir(0x1234)"


def test_a_path_is_shown_to_a_bound_and_what_is_not_printable_escaped():
    assert text("rmdir", 1, memory={1: b"x" * 1000}) == f'rmdir("{"x" * 256}"...)'
    hostile = b'a"b\\c\n\x1b[2J\xff\0'
    assert text("rmdir", 1, memory={1: hostile}) == r'rmdir("a\x22b\x5cc\x0a\x1b[2J\xff")'


def test_numbers_that_nobody_knows():
    assert name_of(9999, X86_64) == "system call 9999"
    assert call_text(9999, (1, 2, 0, 0, 0, 0), X86_64) == "system call 9999(0x1, 0x2, 0, 0, 0, 0)"
    assert name_of(221, AARCH64) == "execve"


def test_every_row_of_the_table_is_a_call_of_at_most_six_arguments():
    assert not {name for name in SIGNS if not known_anywhere(name)}
    assert all(len(signs) <= 6 and set(signs) <= set("duxsoFTPOCGAXN") for signs in SIGNS.values())


ADDRESSES = [
    (b"\2\0\x15\x38\x7f\0\0\1" + bytes(8), 16, "{127.0.0.1:5432}"),
    (b"\x0a\0\x01\xbb\0\0\0\0" + bytes(15) + b"\1" + bytes(4), 28, "{[::1]:443}"),
    (b"\1\0/run/db.sock\0rest", 18, "{/run/db.sock}"),
    (b"\1\0\0name}\n", 9, r"{@name}\x0a}"),
    (b"\x10\0" + bytes(10), 12, "{AF_NETLINK}"),
    (b"\2\0\x15", 3, "{AF_INET}"),
    (b"\2", 1, "0x7"),
    (b"", 0, "0x7"),
]


@pytest.mark.parametrize(("memory", "length", "shown"), ADDRESSES)
def test_addresses_of_sockets(memory, length, shown):
    assert text("connect", 3, 7, length, memory={7: memory}) == f"connect(3, {shown}, {length})"


def test_addresses_that_cannot_be_read_are_where_they_are():
    assert text("connect", 3, 7, 16) == "connect(3, 0x7, 16)"
    assert text("bind", 3, 0, 16, memory={}) == "bind(3, NULL, 16)"
    assert text("sendto", 3, 9, 5, 0x20000000, 7, 16, memory={7: ADDRESSES[0][0]}).endswith("{127.0.0.1:5432}, 16)")


PATHS = [(b"data/x\0y", "data/x"), (b"no end", None), (b"b\xc3\xa4r\0", None), (b"a\nb\0", None), (b"", None)]


@pytest.mark.parametrize(("memory", "path"), PATHS)
def test_a_path_is_text_or_nothing(memory, path):
    assert path_text(7, lambda address, most: memory[:most] if address == 7 and memory else None) == path
