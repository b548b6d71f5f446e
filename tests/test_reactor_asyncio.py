"""Datagrams, pipes, subprocesses and files on the loop's asyncio face: what CPython's own tests of asyncio do not ask.

Most of it are things that a loop on another engine than a selector can do wrong and the suite does not see.
"""

from __future__ import annotations

import asyncio
import errno
import gc
import os
import signal
import socket
import sys
import warnings
from pathlib import Path

import pytest
from driver_harness import fds
from reactor_harness import SECONDS_MAX, run


class Datagrams(asyncio.DatagramProtocol):
    """Remembers what it heard, and tells who waits."""

    def __init__(self):
        self.heard = []
        self.changed = asyncio.Event()

    def add(self, *what):
        self.heard.append(what)
        self.changed.set()

    def datagram_received(self, data, addr):
        self.add(data, addr)

    def error_received(self, exc):
        self.add(exc)

    def pause_writing(self):
        self.add("pause")

    def resume_writing(self):
        self.add("resume")

    def connection_lost(self, exc):
        self.add("lost", exc)

    async def until(self, holds):
        async def wait():
            while not holds(self.heard):
                self.changed.clear()
                await self.changed.wait()

        await asyncio.wait_for(wait(), SECONDS_MAX)


def test_empty_datagrams_and_bursts_arrive_in_order(loop):
    async def main():
        here, heard = await loop.create_datagram_endpoint(Datagrams, ("127.0.0.1", 0))
        there, _ = await loop.create_datagram_endpoint(Datagrams, remote_addr=here.get_extra_info("sockname"))
        sent = [b"", *(b"%d" % n for n in range(100)), bytes(60_000), b""]
        for data in sent:
            there.sendto(data)
        await heard.until(lambda found: len(found) == len(sent))
        assert [data for data, _ in heard.heard] == sent
        assert {addr for _, addr in heard.heard} == {there.get_extra_info("sockname")}
        here.close()
        there.close()
        await heard.until(lambda found: found[-1] == ("lost", None))

    run(loop, main())


def test_a_port_that_nobody_has_is_an_error_received_and_no_end(loop):
    async def main():
        with socket.socket(type=socket.SOCK_DGRAM) as taken:
            taken.bind(("127.0.0.1", 0))
            address = taken.getsockname()
        transport, heard = await loop.create_datagram_endpoint(Datagrams, remote_addr=address)
        transport.sendto(b"x")
        await heard.until(lambda found: found)
        assert isinstance(heard.heard[0][0], ConnectionRefusedError)
        with socket.socket(type=socket.SOCK_DGRAM) as peer:
            peer.bind(address)
            transport.sendto(b"y")
            peer.settimeout(SECONDS_MAX)
            data, client = peer.recvfrom(10)
            assert data == b"y"
            peer.sendto(b"z", client)
            await heard.until(lambda found: (b"z", address) in found)
        with pytest.raises(ValueError, match="Invalid address"):
            transport.sendto(b"x", ("127.0.0.1", 1))
        with pytest.raises(TypeError, match="bytes-like"):
            transport.sendto("x")
        transport.abort()

    run(loop, main())


def test_unix_datagrams_wait_for_their_reader(loop, tmp_path):
    """The queue of a UNIX datagram socket is short: what it does not take is kept in order, the protocol paused."""

    async def main():
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as peer:
            path = str(tmp_path / "peer")
            peer.bind(path)
            transport, heard = await loop.create_datagram_endpoint(Datagrams, remote_addr=path, family=socket.AF_UNIX)
            sent = [b"%04d" % n + bytes(100_000) for n in range(100)]
            for data in sent:
                transport.sendto(data)
            assert heard.heard == [("pause",)]
            assert transport.get_write_buffer_size() > 64 * 1024
            transport.close()
            got = []
            while len(got) < len(sent):
                got.append(await loop.run_in_executor(None, peer.recv, 200_000))
            assert got == sent
            await heard.until(lambda found: found[-1] == ("lost", None))

    run(loop, main())


def test_both_ends_of_a_socketpair_are_connected(loop):
    """A datagram to nobody in particular goes to the other end, which has no name."""

    async def main():
        near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        transport, heard = await loop.create_datagram_endpoint(Datagrams, sock=near)
        transport.sendto(b"one")
        far.setblocking(False)
        assert await loop.sock_recv(far, 100) == b"one"
        far.send(b"two")
        await heard.until(lambda found: found == [(b"two", None)])
        far.close()
        transport.sendto(b"three")
        await heard.until(lambda found: len(found) == 2)
        assert isinstance(heard.heard[1][0], ConnectionError)
        transport.close()
        await heard.until(lambda found: found[-1] == ("lost", None))

    run(loop, main())


def test_what_a_unix_peer_sent_before_it_closed_is_all_read(loop):
    """A close of a UNIX socket hangs up at once, while the reader is still busy with what it got before."""

    async def main():
        for _ in range(20):
            near, far = socket.socketpair()
            reader, writer = await asyncio.open_connection(sock=near)
            far.sendall(b"a" * 100 + b"b" * 100)
            far.close()
            assert await reader.readexactly(100) == b"a" * 100
            for _ in range(5):
                await asyncio.sleep(0.001)
            assert await reader.read() == b"b" * 100
            assert await reader.read() == b""
            writer.close()
            await writer.wait_closed()

    run(loop, main())


def test_a_writing_pipe_hears_that_its_reader_left(loop):
    class Writing(asyncio.Protocol):
        def __init__(self):
            self.lost = loop.create_future()

        def connection_lost(self, exc):
            self.lost.set_result(exc)

    async def main():
        for full in (False, True):
            read, write = os.pipe()
            transport, protocol = await loop.connect_write_pipe(Writing, os.fdopen(write, "wb", 0))
            if full:
                transport.write(bytes(1_000_000))
                transport.close()  # with output that nobody takes: only the reader's end can end it
            os.close(read)
            lost = await asyncio.wait_for(protocol.lost, SECONDS_MAX)
            assert isinstance(lost, BrokenPipeError) if full else lost is None

    before = fds()
    run(loop, main())
    assert fds() == before


def test_a_forgotten_pipe_says_so_and_is_closed(loop):
    async def main():
        read, write = os.pipe()
        transport, _ = await loop.connect_read_pipe(asyncio.Protocol, os.fdopen(read, "rb", 0))
        transport.pause_reading()
        return write

    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        write = run(loop, main())
        gc.collect()
    assert ["unclosed transport" in str(warning.message) for warning in found].count(True) == 1
    with pytest.raises(BrokenPipeError):
        os.write(write, b"x")
    os.close(write)


def test_the_end_of_a_child_needs_no_watcher_and_no_sigchld(loop):
    """Children end by the dozen, by code and by signal, while SIGCHLD has a handler of the application's."""
    taken = signal.signal(signal.SIGCHLD, lambda *_: None)

    async def child(number):
        code = f"import os, signal; os.kill(os.getpid(), {number}) if {number} in (9, 15) else os._exit({number})"
        process = await asyncio.create_subprocess_exec(sys.executable, "-S", "-c", code)
        return await process.wait()

    async def main():
        numbers = [0, 1, 9, 15, 42, 255]
        codes = await asyncio.gather(*(child(number) for number in numbers))
        assert codes == [0, 1, -9, -15, 42, 255]
        shell = await asyncio.create_subprocess_shell("cat; exit 3", stdin=-1, stdout=-1)
        assert await shell.communicate(bytes(500_000)) == (bytes(500_000), None)
        assert shell.returncode == 3
        with pytest.raises(FileNotFoundError):
            await asyncio.create_subprocess_exec("/no/such/program")

    try:
        run(loop, main())
    finally:
        signal.signal(signal.SIGCHLD, taken)
    assert not loop._children


def test_a_child_whose_end_cannot_be_heard_of_is_no_child(loop, monkeypatch):
    """Where pidfd_open(2) is refused, as some sandboxes do, the error is raised and nothing is left behind."""

    def refuse(_pid):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    async def main():
        with pytest.raises(OSError, match=os.strerror(errno.ENOSYS)):
            await asyncio.create_subprocess_exec("sleep", "3600", stdin=-1, stdout=-1)
        others = asyncio.all_tasks() - {asyncio.current_task()}
        while any("_connect_pipes" in repr(task) and not task.done() for task in others):
            await asyncio.sleep(0)
        for _ in range(5):
            await asyncio.sleep(0)  # the pipes' ends are told, then closed

    if loop._driver.name == "kqueue":
        pytest.skip("kqueue tells of children without pidfd_open(2)")
    mine = Path(f"/proc/self/task/{os.getpid()}/children")  # zombies too
    before, others = fds(), mine.read_text()
    monkeypatch.setattr(os, "pidfd_open", refuse)
    run(loop, main())
    assert mine.read_text() == others
    assert fds() == before


def test_the_file_of_a_unix_server_is_removed_where_asked_and_still_its_own(loop, tmp_path):
    async def main():
        for name, cleanup, replaced in (("a", True, False), ("b", False, False), ("c", True, True)):
            path = tmp_path / name
            server = await loop.create_unix_server(asyncio.Protocol, path, cleanup_socket=cleanup)
            if replaced:
                path.rename(tmp_path / "elsewhere")
                path.write_text("another")
            server.close()
            await server.wait_closed()
            assert path.exists() is (not cleanup or replaced)

    run(loop, main())


def test_writes_are_refused_while_a_file_goes_out_and_its_place_is_kept(loop, tmp_path):
    path = tmp_path / "file"
    data = os.urandom(5_000_000)
    path.write_bytes(data)

    async def serve(reader, writer):
        transport = writer.transport
        # Or a generous kernel takes all of the file at once, and nothing is in progress.
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
        writer.write(b"head")
        with path.open("rb") as file:
            sending = asyncio.ensure_future(loop.sendfile(transport, file, 1000, 4_000_000))
            await asyncio.sleep(0)
            with pytest.raises(RuntimeError, match="sendfile is in progress"):
                transport.write(b"x")
            assert await sending == 4_000_000
            assert file.tell() == 4_001_000
        writer.write(b"tail")
        writer.close()
        done.set_result(None)

    async def main():
        nonlocal done
        done = loop.create_future()
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        got = await reader.read()
        assert got == b"head" + data[1000:4_001_000] + b"tail"
        await done
        writer.close()
        server.close()

    done = None
    run(loop, main())


def test_a_file_being_sent_ends_with_its_connection(loop, tmp_path):
    """The peer takes nothing; abort() ends the wait at once, and nothing keeps the socket open."""
    path = tmp_path / "file"
    path.write_bytes(b"")
    os.truncate(path, 1 << 30)

    async def main():
        near, far = socket.socketpair()
        far.settimeout(SECONDS_MAX)
        _, writer = await asyncio.open_connection(sock=near)
        with path.open("rb") as file:
            sending = asyncio.ensure_future(loop.sendfile(writer.transport, file))
            await asyncio.sleep(0.01)
            assert not sending.done()
            writer.transport.abort()
            with pytest.raises(ConnectionError):
                await asyncio.wait_for(sending, SECONDS_MAX)
        while await loop.run_in_executor(None, far.recv, 1 << 20):
            pass
        far.close()

    run(loop, main())


def test_watching_what_cannot_be_watched_is_refused(loop, tmp_path):
    async def main():
        near, far = socket.socketpair()
        _, writer = await asyncio.open_connection(sock=near)
        fd = writer.get_extra_info("socket").fileno()
        for method in (loop.add_reader, loop.add_writer):
            with pytest.raises(RuntimeError, match="is used by transport"):
                method(fd, print)
            with pytest.raises(ValueError, match="Invalid file object"):
                method(object(), print)
            with pytest.raises(OSError, match="Bad file descriptor"):
                method(999_999, print)
        writer.transport.abort()
        far.close()

    run(loop, main())


@pytest.mark.parametrize("ask", ["sock_sendall", "sock_recv", "sock_accept", "sock_connect"])
def test_debug_mode_refuses_a_blocking_socket(loop, ask):
    """Nothing to send is no reason to let it pass."""
    loop.set_debug(True)
    arguments = {"sock_sendall": (b"",), "sock_recv": (1,), "sock_connect": (("127.0.0.1", 1),)}.get(ask, ())
    with socket.socket() as sock, pytest.raises(ValueError, match="the socket must be non-blocking"):
        run(loop, getattr(loop, ask)(sock, *arguments))


def test_a_signal_that_cannot_be_caught_is_refused_in_the_words_of_asyncio(loop):
    for number in (signal.SIGKILL, signal.SIGSTOP):
        with pytest.raises(RuntimeError, match=f"^sig {int(number)} cannot be caught"):
            loop.add_signal_handler(number, print)
        assert not loop.remove_signal_handler(number)


def test_debug_mode_says_where_a_callback_came_from_and_what_is_slow(loop, caplog):
    contexts = []
    loop.set_debug(True)
    loop.set_exception_handler(lambda _loop, context: contexts.append(context))
    loop.slow_callback_duration = 0.0

    def broken():
        raise ZeroDivisionError

    async def main():
        loop.call_soon(broken)
        loop.call_later(0, broken)
        while len(contexts) < 2:
            await asyncio.sleep(0)

    with caplog.at_level("WARNING", "asyncio"):
        loop.run_until_complete(main())
    for context in contexts:
        assert context["source_traceback"][-1].name == "main"
    assert any("Executing" in text and "broken" in text for text in caplog.messages)
    for ask in (loop.call_soon, loop.call_soon_threadsafe):
        with pytest.raises(TypeError, match="coroutines cannot be used"):
            ask(main)
    loop.set_debug(False)
