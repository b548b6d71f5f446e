"""What the tests of WebSockets share: a client's frames as bytes, and a client that takes nothing for granted."""

from __future__ import annotations

import base64
import os
import socket
import zlib
from collections.abc import Iterable
from typing import NamedTuple, Self

from tests.support import SECONDS

TEXT, BINARY, CLOSE, PING, PONG = 1, 2, 8, 9, 10
KEY = "dGhlIHNhbXBsZSBub25jZQ=="  # RFC 6455 1.3
DEFLATE = "permessage-deflate; client_max_window_bits"


def xor(payload: bytes, mask: bytes) -> bytes:
    """The mask as RFC 6455 5.3 writes it down."""
    return bytes(byte ^ mask[number % 4] for number, byte in enumerate(payload))


def frame(
    op: int, payload: bytes = b"", *, fin: bool = True, rsv: int = 0, mask: bytes | None = b"\x11\xfe\x80\x00",
    size: int | None = None, form: int | None = None,
) -> bytes:
    """A client's frame. `size` is the length it states if not the payload's, `form` 7, 16 or 64 bits to state it in."""
    stated = len(payload) if size is None else size
    form = form or (7 if stated < 126 else 16 if stated < 65536 else 64)
    second = 0x80 if mask is not None else 0
    head = bytes(((0x80 if fin else 0) | rsv << 4 | op,))
    if form == 7:
        head += bytes((second | stated,))
    else:
        head += bytes((second | (126 if form == 16 else 127),)) + stated.to_bytes(form // 8, "big")
    if mask is None:
        return head + payload
    if len(payload) < 4096:
        return head + mask + xor(payload, mask)
    repeated = (mask * (len(payload) // 4 + 1))[: len(payload)]
    number = int.from_bytes(payload, "big") ^ int.from_bytes(repeated, "big")
    return head + mask + number.to_bytes(len(payload), "big")


def close(code: int | None = None, reason: bytes = b"") -> bytes:
    return frame(CLOSE, b"" if code is None else code.to_bytes(2, "big") + reason)


def deflated(data: bytes, level: int = 6) -> bytes:
    """The payload of a compressed message (RFC 7692 7.2.1)."""
    packer = zlib.compressobj(level, zlib.DEFLATED, -15)
    return (packer.compress(data) + packer.flush(zlib.Z_SYNC_FLUSH))[:-4]


def inflated(data: bytes) -> bytes:
    return zlib.decompressobj(-15).decompress(data + b"\0\0\xff\xff")


def fragments(op: int, payload: bytes, sizes: Iterable[int], rsv: int = 0) -> bytes:
    """A message in fragments of these sizes; what is left is the last."""
    out, first = b"", True
    for size in sizes:
        out += frame(op if first else 0, payload[:size], fin=False, rsv=rsv if first else 0, mask=os.urandom(4))
        payload, first = payload[size:], False
    return out + frame(op if first else 0, payload, rsv=rsv if first else 0)


class Frame(NamedTuple):
    """A server's frame."""

    op: int
    payload: bytes
    rsv1: bool = False

    @property
    def code(self) -> int | None:
        """The code of a Close."""
        assert self.op == CLOSE
        return int.from_bytes(self.payload[:2], "big") if self.payload else None


def opening(path: str = "/ws", *fields: str, without: str = "", method: str = "GET", version: str = "1.1") -> bytes:
    """The bytes of an opening handshake, without the field named `without`."""
    lines = [
        "Host: x", "Upgrade: websocket", "Connection: keep-alive, Upgrade", f"Sec-WebSocket-Key: {KEY}",
        "Sec-WebSocket-Version: 13",
    ]  # fmt: skip
    kept = [line for line in lines if not without or not line.lower().startswith(without.lower() + ":")]
    return "\r\n".join([f"{method} {path} HTTP/{version}", *kept, *fields]).encode() + b"\r\n\r\n"


class WsClient:
    """A connection whose server's frames are read with all that RFC 6455 says of them checked."""

    def __init__(
        self, address: tuple[str, int] | str, path: str = "/ws", *fields: str, behind: bytes = b"",
        open_it: bool = True, receive_bytes: int = 0,
    ) -> None:
        self.sock = socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET)
        if receive_bytes:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        self.sock.settimeout(SECONDS)
        self.sock.connect(address)
        if not isinstance(address, str):
            self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.data = b""
        self.fields: dict[str, str] = {}
        if open_it:
            self.send(opening(path, *fields) + behind)
            assert self.head() == 101, self.fields
            assert self.fields["upgrade"] == "websocket"
            assert self.fields["connection"].lower() == "upgrade"
            assert self.fields["sec-websocket-accept"] == "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="
            assert "content-length" not in self.fields
            assert "transfer-encoding" not in self.fields

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def head(self) -> int:
        """Read a response head; the status. A body of known length is read and dropped."""
        while b"\r\n\r\n" not in self.data:
            assert self._more(), f"the connection ended within {self.data!r}"
        block, _, self.data = self.data.partition(b"\r\n\r\n")
        line, *lines = block.decode().split("\r\n")
        self.fields = {name.lower(): value for name, _, value in (field.partition(": ") for field in lines)}
        self.exactly(int(self.fields.get("content-length", "0")))
        return int(line.split()[1])

    def send(self, data: bytes) -> WsClient:
        self.sock.sendall(data)
        return self

    def message(self, data: str | bytes) -> WsClient:
        """Send a message in one frame."""
        return self.send(frame(TEXT, data.encode()) if isinstance(data, str) else frame(BINARY, data))

    def half_close(self) -> WsClient:
        self.sock.shutdown(socket.SHUT_WR)
        return self

    def reset(self) -> None:
        """Close with RST."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self.sock.close()

    def _more(self) -> bytes:
        piece = self.sock.recv(1 << 18)
        self.data += piece
        return piece

    def exactly(self, size: int) -> bytes:
        pieces = [self.data[:size]]
        self.data = self.data[size:]
        left = size - len(pieces[0])
        while left:
            piece = self.sock.recv(min(left, 1 << 20))
            assert piece, "the connection ended within a frame"
            pieces.append(piece)
            left -= len(piece)
        return b"".join(pieces)

    def read(self) -> Frame:
        """The next frame."""
        first, second = self.exactly(2)
        assert first & 0x80, "a server sends no fragments"
        assert not first & 0x30
        assert not second & 0x80, "a server must not mask (RFC 6455 5.1)"
        size = second
        if size == 126:
            size = int.from_bytes(self.exactly(2), "big")
            assert size > 125
        elif size == 127:
            size = int.from_bytes(self.exactly(8), "big")
            assert size > 65535
        op = first & 15
        payload = self.exactly(size)
        if op >= CLOSE:
            assert size <= 125
            assert not first & 0x40
        if op == CLOSE:
            assert size != 1
            payload[2:].decode()
        return Frame(op, payload, bool(first & 0x40))

    def text(self) -> str:
        """The next frame, which is a text."""
        found = self.read()
        assert found.op == TEXT, found
        return (inflated(found.payload) if found.rsv1 else found.payload).decode()

    def rest(self) -> bytes:
        """Everything up to the server's FIN."""
        while self._more():
            pass
        data, self.data = self.data, b""
        return data

    def closed(self, code: int | None) -> None:
        """The server closes with `code`, waits for our answer, and sends nothing more."""
        found = self.read()
        assert found.op == CLOSE, found
        assert found.code == code, found
        self.send(close(code))
        assert self.rest() == b""


def key() -> str:
    """A random Sec-WebSocket-Key."""
    return base64.b64encode(os.urandom(16)).decode()
