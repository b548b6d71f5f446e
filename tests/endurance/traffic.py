"""Plain traffic: connections that ask, read the whole answer, check it and ask again.

The client of the other proofs. Each connection knows which process serves it, from the answers' ``x-pid``.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Mapping


class Refused(Exception):
    """The kernel refused the connection: nobody listens, or the queue is full."""


class Lost(Exception):
    """The connection ended before the answer did."""


class Bad(Exception):
    """The answer is not the right one."""


class Client:
    """One connection, opened by `open` and closed by `close` or `abort`."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.port: int = writer.get_extra_info("sockname")[1]
        self.pid = 0
        """The process that serves it; 0 as long as it has not answered."""
        self.closing = False
        """The server said ``connection: close``."""

    @classmethod
    async def open(cls, address: tuple[str, int], *, receive_bytes: int = 0) -> Client:
        """Connect; `receive_bytes` makes the receive buffer small, for clients that are slow to read."""
        sock = socket.socket()
        sock.setblocking(False)
        if receive_bytes:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        try:
            await asyncio.get_running_loop().sock_connect(sock, address)
            limit = max(1 << 16, receive_bytes)
            return cls(*await asyncio.open_connection(sock=sock, limit=limit))
        except ConnectionRefusedError as error:
            sock.close()
            raise Refused(str(error)) from error
        except BaseException:
            sock.close()
            raise

    def send(self, data: bytes) -> None:
        """Queue bytes; they leave at once unless the server does not read."""
        self.writer.write(data)

    def finish(self) -> None:
        """Send a FIN: nothing more is to come from here."""
        self.writer.write_eof()

    def get(self, path: str) -> None:
        """Send a GET."""
        self.send(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())

    async def answer(self, wanted: int = 200) -> bytes:
        """The body of the next answer. Raises Lost and Bad."""
        try:
            status, fields = await self._head()
            while 100 <= status < 200:
                status, fields = await self._head()
            if status != wanted:
                raise Bad(f"status {status}, not {wanted}")
            self.pid = int(fields.get("x-pid", self.pid))
            self.closing = fields.get("connection") == "close"
            if "content-length" in fields:
                return await self.reader.readexactly(int(fields["content-length"]))
            return await self._chunks()
        except (ConnectionError, asyncio.IncompleteReadError) as error:
            raise Lost(repr(error)) from error

    async def _head(self) -> tuple[int, Mapping[str, str]]:
        block = await self.reader.readuntil(b"\r\n\r\n")
        line, *lines = block.decode("latin-1").split("\r\n")[:-2]
        if not line.startswith("HTTP/1.1 "):
            raise Bad(f"{line!r} is no status line")
        return int(line[9:12]), {name.lower(): value for name, _, value in (each.partition(": ") for each in lines)}

    async def _chunks(self) -> bytes:
        body = b""
        while True:
            size = int(await self.reader.readuntil(b"\r\n"), 16)
            body += (await self.reader.readexactly(size + 2))[:-2]
            if not size:
                return body

    async def end(self) -> None:
        """Wait for the server's FIN; Bad when something else comes."""
        try:
            data = await self.reader.read(1)
        except ConnectionError as error:
            raise Lost(repr(error)) from error
        if data:
            raise Bad(f"{data!r} after the last answer")

    @property
    def over(self) -> bool:
        """Whether no further request may be sent: the server said so, or its FIN is there."""
        return self.closing or self.reader.at_eof()

    async def close(self) -> None:
        """Close in order."""
        self.writer.close()
        try:
            await self.writer.wait_closed()
        except ConnectionError:
            pass  # the server was quicker, and meant it

    def abort(self) -> None:
        """Close with an RST, if it is not closed yet."""
        if not self.writer.transport.is_closing():
            sock = self.writer.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()


async def load(address: tuple[str, int], requests: int, connections: int) -> None:
    """Make `requests` GETs of / on so many connections at the same time, and check each answer."""
    async def one(number: int) -> None:
        client = await Client.open(address)
        try:
            for _ in range(number):
                client.get("/")
                if await client.answer() != b"hello":
                    raise Bad("not the body of /")
            await client.close()
        finally:
            client.abort()

    share, rest = divmod(requests, connections)
    async with asyncio.TaskGroup() as group:
        for at in range(connections):
            group.create_task(one(share + (at < rest)))
