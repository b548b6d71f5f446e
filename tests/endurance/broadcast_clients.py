"""The clients of the proof on broadcasts: WebSockets on plain asyncio protocols, which note what reaches them.

A thousand of them live in one process, so each is one small object, and a frame costs a few microseconds.
"""

from __future__ import annotations

import asyncio
import random
import socket
import struct
from dataclasses import dataclass, field

from tests.websocket_harness import BINARY, DEFLATE, PING, PONG, TEXT, frame, inflated, opening

PADDING_MAX = 3000
"""Bytes behind the number in the longest messages: some are compressed for who wants that, some need a long header."""


@dataclass(slots=True)
class Sent:
    """One broadcast; `seat` is the pid of the worker it went to, `scope` "G" or "L"."""

    number: int
    source: int
    pid: int
    scope: str
    op: int
    payload: bytes


@dataclass
class Journal:
    """All broadcasts, in the order they were sent, and what went wrong at any client."""

    rng: random.Random
    sent: list[Sent] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    arrived: int = 0
    """Messages at all clients together."""

    def next(self, source: Client, scope: str) -> Sent:
        """A message that `source` is to send now."""
        number = len(self.sent)
        padding = self.rng.choice((0, 0, 0, 100, 600, PADDING_MAX)) * b"."
        op = self.rng.choice((TEXT, BINARY))
        message = Sent(number, source.number, source.pid, scope, op, b"%b%d %b" % (scope.encode(), number, padding))
        self.sent.append(message)
        return message


class Client(asyncio.Protocol):
    """One client, from its handshake to its end."""

    def __init__(self, journal: Journal, number: int, mask: bytes) -> None:
        self.journal = journal
        self.number = number
        self.mask = mask
        self.pid = 0
        self.lost = False
        """The server ended it."""
        self.leaving = False
        self.first = -1
        """The number of the first message sent after it was welcomed: from then on it gets everything."""
        self.got: list[int] = []
        """The numbers of the messages that came, as they came."""
        self.mark = 0
        """How many had come when the last barriers were sent."""
        self.welcomed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.data = b""
        self.head_read = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Ask for a WebSocket; every fourth client with compression."""
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        fields = () if self.number % 4 else (f"Sec-WebSocket-Extensions: {DEFLATE}",)
        transport.write(opening("/", *fields))

    def connection_lost(self, error: Exception | None) -> None:
        """The end, whatever it was: whether it had to come is judged by who knows who was killed."""
        self.lost = not self.leaving
        if not self.welcomed.done():
            self.welcomed.set_exception(error or ConnectionResetError("closed before the welcome"))

    def data_received(self, data: bytes) -> None:
        """Take every whole frame."""
        data = self.data + data
        at = 0
        if not self.head_read:
            end = data.find(b"\r\n\r\n")
            if end < 0:
                self.data = data
                return
            if not data.startswith(b"HTTP/1.1 101 "):
                self.wrong(f"no handshake: {data[:200]!r}")
            self.head_read = True
            at = end + 4
        size = len(data)
        while size - at >= 2:
            first, length = data[at], data[at + 1]
            begin = at + 2
            if length == 126 and size - at >= 4:
                length, begin = int.from_bytes(data[at + 2 : at + 4], "big"), at + 4
            elif length >= 126:
                if length > 126:
                    self.wrong(f"a frame with the length byte {length}")
                break
            if size - begin < length:
                break
            at = begin + length
            self.take(first, data[begin:at])
        self.data = data[at:]

    def take(self, first: int, payload: bytes) -> None:
        """One frame of the server: the welcome, then broadcasts."""
        if first & 0x40:
            payload = inflated(payload)
        op = first & 15
        if op == PING:
            self.transport.write(frame(PONG, payload, mask=self.mask))
            return
        if not self.pid:
            self.pid = int(payload)
            self.first = len(self.journal.sent)
            self.welcomed.set_result(None)
            return
        digits = payload[1:].partition(b" ")[0]
        number = int(digits) if digits.isdigit() else -1
        if not 0 <= number < len(self.journal.sent):
            self.wrong(f"a frame {first:#x} with {payload[:40]!r}")
            return
        sent = self.journal.sent[number]
        if (op, payload) != (sent.op, sent.payload) or not first & 0x80:
            self.wrong(f"message {number} came as frame {first:#x}, {payload[:40]!r} ({len(payload)} bytes)")
        self.got.append(number)
        self.journal.arrived += 1

    def wrong(self, text: str) -> None:
        """Note what no server may send."""
        self.journal.wrong.append(f"client {self.number} of process {self.pid}: {text}")

    def broadcast(self, scope: str) -> Sent:
        """Have a message sent to all others."""
        sent = self.journal.next(self, scope)
        self.transport.write(frame(sent.op, sent.payload, mask=self.mask))
        return sent

    def reset(self) -> None:
        """Leave with RST: a thousand in TIME_WAIT are of no use to anybody."""
        self.leaving = not self.lost
        if not self.transport.is_closing():
            sock = self.transport.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()


async def join(address: tuple[str, int], journal: Journal, number: int) -> Client:
    """A client that has been welcomed. Raises OSError when it is not."""
    loop = asyncio.get_running_loop()
    mask = journal.rng.randbytes(4)
    _, client = await loop.create_connection(lambda: Client(journal, number, mask), *address)
    await client.welcomed
    return client
