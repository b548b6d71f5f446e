"""Servers that fall silent where libcurl itself waits, FTP's above all: the worker goes on, transfers end in time."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
from collections.abc import Iterator

import pytest
from transfer_harness import ENGINES, SECONDS, open_transfers, peer, run, wait_until

import kore
from kore.clients import lanes
from kore.clients.lanes import libcurl_waits

REPLIES = {
    "USER": "331 password", "PASS": "230 in", "PWD": '257 "/" here', "TYPE": "200 binary", "SIZE": "213 5",
    "EPRT": "200 there", "STOR": "150 send", "QUIT": "221 bye",
}  # fmt: skip

TURNS = 3
"""More than these does the loop make while libcurl waits: sixty if it is alone, a few where the machine is busy; one
where libcurl waits on the loop's thread."""


@pytest.fixture(params=ENGINES)
def loop(request) -> Iterator:
    yield from open_transfers(request.param)


class Ftp:
    """An FTP server, a thread for each connection, that says nothing any more from the command `silent` on.

    GREETING, DATA (in the middle of the data), CONNECT (the data connection is never taken), END (no 226), or a name.
    """

    def __init__(self, silent: str = "") -> None:
        self.silent = silent
        self.commands: list[str] = []
        self.connections = 0
        self.left = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._sockets: list[socket.socket] = [self._listener]
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    @property
    def url(self) -> str:
        return f"ftp://127.0.0.1:{self._listener.getsockname()[1]}/x"

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self._listener.accept()
                self.connections += 1
                self._sockets.append(sock)
                thread = threading.Thread(target=self._serve, args=(sock,), daemon=True)
                self._threads.append(thread)
                thread.start()

    def _serve(self, sock: socket.socket) -> None:
        with contextlib.suppress(OSError), sock, sock.makefile("rwb", buffering=0) as wire:
            self._talk(wire)
            while wire.read(4096):  # silent, until the client leaves
                pass
        self.left += 1

    def _talk(self, wire) -> None:
        if self.silent == "GREETING":
            return
        wire.write(b"220 hello\r\n")
        data = None
        for line in wire:
            command = line.split()[0].decode()
            self.commands.append(command)
            if command == self.silent:
                return
            if command == "EPSV":
                data = socket.create_server(("127.0.0.1", 0), backlog=0)
                self._sockets.append(data)
                if self.silent == "CONNECT":  # a full queue takes no more connections
                    for _ in range(3):
                        other = socket.socket()
                        other.setblocking(False)
                        other.connect_ex(data.getsockname())
                        self._sockets.append(other)
                wire.write(b"229 there (|||%d|)\r\n" % data.getsockname()[1])
            elif command in ("RETR", "STOR"):
                wire.write(b"150 now\r\n")
                if data is None:
                    return  # active: we never connect
                if not self._transfer(wire, data, command):
                    return
            else:
                wire.write(f"{REPLIES.get(command, '500 what')}\r\n".encode())

    def _transfer(self, wire, listener: socket.socket, command: str) -> bool:
        sock, _ = listener.accept()
        listener.close()
        with sock:
            if command == "STOR":
                while sock.recv(4096):
                    pass
            elif self.silent == "DATA":
                sock.sendall(b"he")
                with contextlib.suppress(ConnectionError):
                    while sock.recv(4096):  # until the client leaves, which may reset it
                        pass
            else:
                sock.sendall(b"hello")
        if self.silent == "END":
            return False
        wire.write(b"226 done\r\n")
        return True

    def close(self) -> None:
        for sock in self._sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()
        for thread in self._threads:
            thread.join(SECONDS)
            assert not thread.is_alive()


@contextlib.contextmanager
def ftp(silent: str = "") -> Iterator[Ftp]:
    server = Ftp(silent)
    try:
        yield server
    finally:
        server.close()


def handle(url: str, milliseconds: int, *options):
    made = kore.curl(url)
    made.setopt(kore.CURLOPT_TIMEOUT_MS, milliseconds)
    for option, value in options:
        made.setopt(option, value)
    return made


async def beside(coroutine) -> tuple[object, int]:
    """The result of `coroutine`, or what it raised, and how often the loop could wake another task meanwhile."""
    turns = 0

    async def turning() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0.01)
            turns += 1

    other = asyncio.ensure_future(turning())
    try:
        (result,) = await asyncio.gather(coroutine, return_exceptions=True)
        return result, turns
    finally:
        other.cancel()


SILENCES = ["GREETING", "USER", "PASS", "PWD", "EPSV", "CONNECT", "TYPE", "SIZE", "RETR", "DATA", "END"]


@pytest.mark.parametrize("silent", SILENCES)
def test_an_ftp_server_that_falls_silent_is_left_in_time_and_stops_nobody(loop, silent):
    with ftp(silent) as server:
        result, turns = run(loop, beside(handle(server.url, 600).run()))
        assert isinstance(result, RuntimeError)
        assert f"{server.url}: " in str(result)
        assert "libcurl error 28" in str(result)
        assert turns > TURNS
        wait_until(lambda: server.left == server.connections == 1, "the connection is closed")


@pytest.mark.parametrize("silent", SILENCES)
def test_who_is_cancelled_meanwhile_leaves_at_once_and_the_connection_is_closed(loop, silent):
    async def leave(server) -> None:
        transfer = asyncio.ensure_future(handle(server.url, 60_000).run())
        reached = {"GREETING": lambda: server.connections, "CONNECT": lambda: "EPSV" in server.commands,
                   "DATA": lambda: "RETR" in server.commands, "END": lambda: "RETR" in server.commands}
        while not reached.get(silent, lambda: silent in server.commands)():
            await asyncio.sleep(0.01)
        transfer.cancel()
        with pytest.raises(asyncio.CancelledError):
            await transfer

    with ftp(silent) as server:
        _, turns = run(loop, beside(leave(server)))
        assert turns < 500
        wait_until(lambda: server.left == server.connections == 1, "the connection is closed")


def test_an_upload_whose_end_is_never_confirmed(loop):
    with ftp("END") as server:
        upload = handle(server.url, 600)
        upload.setbody(b"body")
        result, turns = run(loop, beside(upload.run()))
        assert "libcurl error 28" in str(result)
        assert turns > TURNS


def test_active_ftp_where_nobody_connects(loop):
    with ftp() as server:
        result, turns = run(loop, beside(handle(server.url, 600, (kore.CURLOPT_FTPPORT, "127.0.0.1")).run()))
        assert "libcurl error 28" in str(result)
        assert turns > TURNS


def test_a_goodbye_that_is_not_answered_stops_nobody(loop):
    """Each second that libcurl waits for the answer to QUIT is one of a thread."""
    with ftp("QUIT") as server:
        result, turns = run(loop, beside(handle(server.url, 20_000, (kore.CURLOPT_FORBID_REUSE, 1)).run()))
        assert result == b"hello"
        assert turns > TURNS
        assert run(loop, handle(server.url, 20_000).run()) == b"hello"  # is kept, until the loop ends
        assert "QUIT" in server.commands


def test_telnet_stops_nobody(loop):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        result, turns = run(loop, beside(handle(f"telnet://127.0.0.1:{port}", 600).run()))
        assert "libcurl error 28" in str(result)
        assert turns > TURNS


def test_a_pipe_that_nobody_writes_to_stops_nobody(loop, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)

    async def limited() -> bytes:
        async with asyncio.timeout(0.5):
            return await kore.curl(f"file://{pipe}").run()

    result, turns = run(loop, beside(limited()))
    assert isinstance(result, TimeoutError)
    assert turns > TURNS
    with open(pipe, "wb"):  # lets the thread go
        pass


def test_a_connection_is_kept_for_the_next_transfer(loop):
    with ftp() as server:
        for _ in range(3):
            assert run(loop, handle(server.url, 20_000).run()) == b"hello"
        assert server.connections == 1


def test_a_handle_whose_transfer_was_left_runs_again(loop):
    """Also at once, when its thread is not done with it yet."""
    async def again(server) -> bytes:
        one = handle(server.url, 60_000)
        transfer = asyncio.ensure_future(one.run())
        while "RETR" not in server.commands:
            await asyncio.sleep(0.01)
        transfer.cancel()
        await asyncio.gather(transfer, return_exceptions=True)
        server.silent = ""
        return await one.run()

    for silent in ("RETR", "END"):
        with ftp(silent) as server:
            assert run(loop, again(server)) == b"hello"


def test_no_more_than_so_many_at_a_time_and_the_others_wait(loop, monkeypatch):
    monkeypatch.setattr(lanes, "LANES_MAX", 2)
    monkeypatch.setattr(lanes, "LANES_IDLE_MAX", 1)

    async def many(url: str) -> list:
        left = asyncio.ensure_future(handle(url, 20_000).run())
        results = asyncio.gather(*(handle(url, 20_000).run() for _ in range(6)))
        last = asyncio.ensure_future(handle(url, 20_000).run())
        await asyncio.sleep(0)
        last.cancel()  # while it waits for a lane
        return [*await results, await left]

    with ftp() as server:
        assert run(loop, many(server.url)) == [b"hello"] * 7
        assert server.commands.count("RETR") == 7
        wait_until(lambda: server.connections - server.left == 1, "one lane is kept")


def test_the_end_of_the_loop_waits_for_no_thread(loop):
    with ftp("END") as server:
        transfer = asyncio.ensure_future(handle(server.url, 60_000).run(), loop=loop)
        while "RETR" not in server.commands:
            loop.run_until_complete(asyncio.sleep(0.01))
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.run_until_complete(asyncio.gather(transfer, return_exceptions=True))
        wait_until(lambda: server.left == 1, "the connection is closed")


@pytest.mark.parametrize("allowed", [False, True])
def test_a_redirect_leads_to_ftp_only_where_that_is_allowed(loop, allowed):
    with ftp("END" if allowed else "") as server:
        answer = f"HTTP/1.1 302 Found\r\nLocation: {server.url}\r\nContent-Length: 0\r\n\r\n".encode()
        options = [(kore.CURLOPT_FOLLOWLOCATION, 1)]
        if allowed:
            options.append((kore.CURLOPT_REDIR_PROTOCOLS, 1 | 2 | 4))
        with peer(lambda *_: answer) as web:
            result, turns = run(loop, beside(handle(web.url, 600, *options).run()))
        assert ("libcurl error 28" if allowed else "libcurl error 1)") in str(result)
        assert server.connections == allowed
        assert turns > TURNS or not allowed


@pytest.mark.parametrize(("url", "waits"), [
    ("http://a/", False), ("HTTPS://a/", False), ("a", False), ("www.a.org/ftp://", False), ("file:///a", True),
    ("file:/a", True),
    ("ftp://a/", True), ("FTPS://a/", True), (" ftp://a/", True), ("ftp:/a/", True), ("ftp.a.org", True),
    ("FTP.a.org/x", True), ("imap.a.org", True), ("telnet://a", True), ("sftp://a/", True), ("smtps://a/", True),
    ("unheard-of://a", True),
])  # fmt: skip
def test_which_urls_are_those_of_lanes(url, waits):
    assert libcurl_waits(url) is waits
