"""What the tests of the HTTP server share: a client that checks the framing of all it reads, and servers to talk to."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Self

import pytest

from tests.engines import ENGINES as ENGINES
from tests.support import SECONDS, Program, pids_of, skip_unless, starter, wait_until

GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


class Response(NamedTuple):
    """One response, as it must be framed."""

    status: int
    head: str
    fields: dict[str, str]
    body: bytes


def request(path: str = "/", *fields: str, method: str = "GET", body: bytes = b"", version: str = "1.1") -> bytes:
    """The bytes of a request; a body gets its length."""
    lines = [f"{method} {path} HTTP/{version}", "Host: x", *fields]
    if body:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def chunked(path: str, *chunks: bytes, method: str = "POST") -> bytes:
    """The bytes of a request whose body comes in these chunks."""
    coded = b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n\r\n"
    return request(path, "Transfer-Encoding: chunked", method=method) + coded


class Client:
    """A connection to a server under test. `read` refuses every response that is framed wrongly."""

    def __init__(self, address: tuple[str, int] | str, receive_bytes: int = 0) -> None:
        self.sock = socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET)
        if receive_bytes:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        self.sock.settimeout(SECONDS)
        self.sock.connect(address)
        if not isinstance(address, str):  # pieces are to leave as they are cut
            self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.data = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def send(self, data: bytes) -> Client:
        self.sock.sendall(data)
        return self

    def half_close(self) -> Client:
        self.sock.shutdown(socket.SHUT_WR)
        return self

    def reset(self) -> None:
        """Close with RST."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self.sock.close()

    def _more(self) -> bytes:
        piece = self.sock.recv(1 << 16)
        self.data += piece
        return piece

    def _line(self) -> bytes:
        while b"\r\n" not in self.data:
            assert self._more(), f"the connection ended within {self.data!r}"
        line, _, self.data = self.data.partition(b"\r\n")
        return line

    def _exactly(self, size: int) -> bytes:
        pieces = [self.data[:size]]
        self.data = self.data[size:]
        left = size - len(pieces[0])
        while left:
            piece = self.sock.recv(min(left, 1 << 20))
            assert piece, f"the connection ended {left} bytes before the end of a body of {size}"
            pieces.append(piece)
            left -= len(piece)
        return b"".join(pieces)

    def read(self, method: str = "GET") -> Response:
        """The next response, interim ones too."""
        while b"\r\n\r\n" not in self.data:
            assert self._more(), f"the connection ended within {self.data!r}"
        block, _, self.data = self.data.partition(b"\r\n\r\n")
        head = block.decode("utf-8", "surrogateescape")
        line, *lines = head.split("\r\n")
        version, status, _ = line.split(" ", 2)
        assert version in ("HTTP/1.1", "HTTP/1.0")
        assert len(status) == 3
        fields: dict[str, str] = {}
        for field in lines:
            name, _, value = field.partition(": ")
            assert name.lower() not in fields or name.lower() == "set-cookie", field
            fields[name.lower()] = value
        return Response(int(status), head, fields, self._body(int(status), method, fields))

    def _body(self, status: int, method: str, fields: dict[str, str]) -> bytes:
        length, coding = fields.get("content-length"), fields.get("transfer-encoding")
        assert length is None or coding is None, "both framings at once"
        if status < 200 or status == 204:
            assert length is None
            assert coding is None
            return b""
        assert "date" in fields
        assert fields["server"]
        assert fields["connection"] in ("close", "keep-alive")
        if method == "HEAD" or status == 304:
            return b""
        if length is not None:
            return self._exactly(int(length))
        if coding is not None:
            assert coding == "chunked"
            body = b""
            while size := int(self._line(), 16):
                body += self._exactly(size)
                assert self._exactly(2) == b"\r\n"
            assert self._exactly(2) == b"\r\n"
            return body
        assert fields["connection"] == "close"
        return self.rest()

    def rest(self) -> bytes:
        """Everything up to the end, which is no reset."""
        while self._more():
            pass
        data, self.data = self.data, b""
        return data

    def ask(self, data: bytes, method: str = "GET") -> Response:
        return self.send(data).read(method)

    def ended(self) -> None:
        """The server closes, and sends nothing before."""
        assert self.rest() == b""

    def alive(self) -> None:
        """The connection still serves."""
        assert self.ask(GET).body == b"hello"


class Server(NamedTuple):
    """A program that serves, with one worker."""

    program: Program
    address: tuple[str, int]
    pid: int

    def client(self, receive_bytes: int = 0) -> Client:
        return Client(self.address, receive_bytes)

    def ask(self, data: bytes, method: str = "GET") -> Response:
        """The first response on a connection of its own, which the server has closed when this returns."""
        with self.client() as client:
            found = client.ask(data, method)
            with contextlib.suppress(OSError):
                client.half_close().rest()
            return found

    def fds(self) -> int:
        try:
            return len(os.listdir(f"/proc/{self.pid}/fd"))
        except PermissionError:
            pytest.skip("not root: nobody else sees the descriptors of a process in the sandbox (PR_SET_DUMPABLE)")

    def rss_kib(self) -> int:
        text = Path(f"/proc/{self.pid}/status").read_text()
        return int(text.partition("VmRSS:")[2].split()[0])

    def cpu_s(self) -> float:
        """CPU time of the worker so far, in seconds."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def settle(self, fds: int) -> None:
        """Wait until the worker holds no more than `fds` descriptors again."""
        wait_until(lambda: self.fds() <= fds, f"{fds} fds again, not {self.fds()}")

    def unharmed(self) -> None:
        """The worker is the one it was, and serves."""
        assert pids_of(self.program) == [self.pid]
        assert "died" not in self.program.out
        assert self.ask(GET).body == b"hello"


@contextlib.contextmanager
def serving(directory: Path, engine: str, text: str = "", options: str = "") -> Iterator[Server]:
    """A server with one worker on `engine`; skips where there is no such engine."""
    skip_unless(engine)
    with starter(directory) as programs:
        program = programs.serve(text, workers=1, options=options, io=engine)
        yield Server(program, program.address, pids_of(program)[0])


def since(begin: float) -> float:
    return time.monotonic() - begin
