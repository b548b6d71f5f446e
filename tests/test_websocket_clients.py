"""Other people's clients, `websockets` and `wsproto`, with messages from one byte to 64 MiB, fragmented at random."""

from __future__ import annotations

import os
import random
import socket

import pytest

from tests.http_server_harness import ENGINES, serving
from tests.support import SECONDS
from tests.websocket_app import TEXT as APP

websockets = pytest.importorskip("websockets.sync.client", reason="needs the package websockets")
wsproto = pytest.importorskip("wsproto", reason="needs the package wsproto")

LARGEST = 64 << 20
LIMITS = f"kore.config.websocket_maxframe = {LARGEST}\nkore.config.websocket_max_message = {LARGEST}\n"
SIZES = [1, 2, 125, 126, 127, 1000, 4096, 65535, 65536, 200_000, 1 << 20, 5 << 20]


@pytest.fixture(scope="module", params=ENGINES)
def server(request, tmp_path_factory):
    """One server with wide limits, on each engine; it must be the same one at the end."""
    with serving(tmp_path_factory.mktemp("ws"), request.param, APP, LIMITS) as found:
        yield found
        found.unharmed()


def payload(size: int, compressible: bool) -> bytes:
    if compressible:
        return (b"the quick brown fox jumps over the lazy dog, " * (size // 45 + 1))[:size]
    return os.urandom(size)


def cut(data, pieces: int):
    """`data` cut at random into at most `pieces` pieces, some of which are empty."""
    places = sorted(random.choices(range(len(data) + 1), k=pieces - 1))
    return [data[a:b] for a, b in zip([0, *places], [*places, len(data)], strict=True)]


@pytest.mark.parametrize("compression", [None, "deflate"])
def test_the_websockets_package(server, compression) -> None:
    """Text and binary, whole and fragmented; pings; a clean close."""
    host, port = server.address
    with websockets.connect(
        f"ws://{host}:{port}/ws", compression=compression, max_size=None, open_timeout=SECONDS
    ) as client:
        assert bool(client.protocol.extensions) == bool(compression)
        for size in SIZES:
            data = payload(size, compressible=bool(size % 2))
            client.send(data)
            assert client.recv() == data
            client.send(cut(data, random.randint(2, 20)))
            assert client.recv() == data
            text = data.hex()
            client.send(cut(text, 3))
            assert client.recv() == text
        assert client.ping().wait(SECONDS)
    assert client.close_code == 1000
    assert client.protocol.close_rcvd_then_sent is False


@pytest.mark.parametrize("compression", [None, "deflate"])
@pytest.mark.parametrize("fragmented", [False, True])
def test_64_mib(server, compression, fragmented: bool) -> None:
    """The largest message the limits allow, in one frame and in a thousand."""
    host, port = server.address
    with websockets.connect(
        f"ws://{host}:{port}/ws", compression=compression, max_size=None, open_timeout=SECONDS
    ) as client:
        data = payload(LARGEST, compressible=True)
        client.send(cut(data, 1000) if fragmented else data)
        assert client.recv(3 * SECONDS) == data


def test_a_byte_more_is_refused(server) -> None:
    """With 1009, told by the header or by what inflates."""
    from websockets.exceptions import ConnectionClosed

    host, port = server.address
    for data in (bytes(LARGEST + 1), [bytes(LARGEST), b"x"]):
        with websockets.connect(f"ws://{host}:{port}/ws", compression="deflate", max_size=None) as client:
            with pytest.raises(ConnectionClosed):
                client.send(data)
                client.recv(SECONDS)
            assert client.close_code == 1009


class Wsproto:
    """A blocking client around wsproto's machine."""

    def __init__(self, address: tuple[str, int], extensions: list[object]) -> None:
        from wsproto.events import AcceptConnection, Request

        self.machine = wsproto.WSConnection(wsproto.ConnectionType.CLIENT)
        self.sock = socket.create_connection(address, timeout=SECONDS)
        self.sock.sendall(self.machine.send(Request(host="x", target="/ws", extensions=extensions)))
        self.events: list[object] = []
        assert isinstance(self.next(), AcceptConnection)

    def next(self):
        while not self.events:
            self.machine.receive_data(self.sock.recv(65536) or None)
            self.events = list(self.machine.events())
        return self.events.pop(0)

    def send(self, event: object) -> None:
        self.sock.sendall(self.machine.send(event))

    def message(self):
        """The next whole message."""
        pieces = []
        while True:
            event = self.next()
            pieces.append(event.data)
            if event.message_finished:
                return "".join(pieces) if isinstance(pieces[0], str) else b"".join(pieces)


@pytest.mark.parametrize("deflate", [False, True])
def test_the_wsproto_package(server, deflate: bool) -> None:
    """The same with a machine that was written by others again."""
    from wsproto.events import BytesMessage, CloseConnection, Ping, Pong, TextMessage
    from wsproto.extensions import PerMessageDeflate

    client = Wsproto(server.address, [PerMessageDeflate()] if deflate else [])
    for size in SIZES:
        data = payload(size, compressible=bool(size % 2))
        client.send(BytesMessage(data=data))
        assert client.message() == data
        pieces = cut(data.hex(), 7)
        for number, piece in enumerate(pieces):
            client.send(TextMessage(data=piece, message_finished=number == len(pieces) - 1))
        assert client.message() == data.hex()
    data = payload(LARGEST, compressible=deflate)
    pieces = cut(data, 7)
    for number, piece in enumerate(pieces):
        client.send(BytesMessage(data=piece, message_finished=number == len(pieces) - 1))
    assert client.message() == data
    client.send(Ping(payload=b"there?"))
    found = client.next()
    assert isinstance(found, Pong)
    assert found.payload == b"there?"
    client.send(CloseConnection(code=1001, reason="enough"))
    found = client.next()
    assert isinstance(found, CloseConnection)
    assert found.code == 1001
    assert client.sock.recv(1) == b""
    client.sock.close()
