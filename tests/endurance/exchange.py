"""A client for many connections at once: it sends pieces one by one, and h11 reads the answers.

A piece leaves each connection in turn, with TCP_NODELAY, so that the server is given the cuts; where it is slower than
the client it gets several at once, which is one more way of cutting.
"""

from __future__ import annotations

import selectors
import socket
import time
from dataclasses import dataclass, field

import h11

SECONDS_MAX = 20.0
"""For a batch of conversations. The deadlines of the server are shorter, and none of them may be needed."""


@dataclass
class Answer:
    """One final response."""

    status: int
    fields: dict[str, str]
    body: bytes = b""

    @property
    def close(self) -> bool:
        """Whether it says that it is the last."""
        return "close" in self.fields.get("connection", "")


@dataclass
class Peer:
    """One connection: what it is to send, and what came back. `error` is empty when it ended in order."""

    pieces: tuple[bytes, ...]
    methods: list[str]
    finish_early: bool
    answers: list[Answer] = field(default_factory=list)
    error: str = ""
    interim: int = 0
    sent: int = 0
    offset: int = 0
    finished: bool = False
    reader: h11.Connection | None = None
    answer: Answer | None = None

    def feed(self, data: bytes) -> None:
        """Bytes of the server, ``b""`` at its FIN."""
        if not data and self.answer is None and not (self.reader and self.reader.trailing_data[0]):
            return  # between two answers, or after an interim one to a request that never became whole
        try:
            self._reader().receive_data(data)
            while self._next(ended=not data):
                pass
        except h11.RemoteProtocolError as error:
            self.error = f"not HTTP: {error}"

    def _reader(self) -> h11.Connection:
        """The reader of the next answer. What was really sent is not h11's affair: it is told a request like it."""
        if self.reader is None:
            at = len(self.answers)
            self.reader = h11.Connection(h11.CLIENT)
            method = self.methods[at] if at < len(self.methods) else "GET"
            self.reader.send(h11.Request(method=method, target="/", headers=[("Host", "a")]))
            self.reader.send(h11.EndOfMessage())
        return self.reader

    def _next(self, *, ended: bool) -> bool:
        """Take one event; whether there may be more."""
        event = self._reader().next_event()
        if isinstance(event, h11.InformationalResponse):
            self.interim += 1
        elif isinstance(event, h11.Response):
            self.answer = Answer(event.status_code, {name.decode(): value.decode() for name, value in event.headers})
        elif isinstance(event, h11.Data):
            assert self.answer is not None
            self.answer.body += bytes(event.data)
        elif isinstance(event, h11.EndOfMessage):
            assert self.answer is not None
            assert self.reader is not None
            self.answers.append(self.answer)
            rest = self.reader.trailing_data[0]
            self.reader = self.answer = None
            if rest:
                self._reader().receive_data(rest)
            return bool(rest)
        else:
            return False
        return True

    def wants_to_send(self) -> bool:
        """Whether there are pieces left."""
        return self.sent < len(self.pieces)

    def may_finish(self) -> bool:
        """Whether it is time for the FIN: after the last piece, or after all answers too."""
        if self.finished or self.wants_to_send():
            return False
        return self.finish_early or len(self.answers) >= len(self.methods)


def exchange(address: tuple[str, int], peers: list[Peer]) -> list[Peer]:
    """Have all conversations at the same time, to their ends."""
    deadline = time.monotonic() + SECONDS_MAX
    with selectors.DefaultSelector() as selector:
        for peer in peers:
            sock = socket.create_connection(address, timeout=SECONDS_MAX)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setblocking(False)
            selector.register(sock, selectors.EVENT_READ | selectors.EVENT_WRITE, peer)
        try:
            while selector.get_map():
                for key, mask in selector.select(max(0.0, deadline - time.monotonic())):
                    if not _go_on(key.fileobj, key.data, mask, selector):  # type: ignore[arg-type]
                        selector.unregister(key.fileobj)
                        key.fileobj.close()  # type: ignore[union-attr]
                if time.monotonic() > deadline:
                    for key in selector.get_map().values():
                        key.data.error = f"no end within {SECONDS_MAX:.0f} s"
                    break
        finally:
            for key in list(selector.get_map().values()):
                key.fileobj.close()  # type: ignore[union-attr]
    return peers


def _go_on(sock: socket.socket, peer: Peer, mask: int, selector: selectors.BaseSelector) -> bool:
    """Do what can be done; False at the end."""
    try:
        if mask & selectors.EVENT_READ:
            data = sock.recv(65536)
            peer.feed(data)
            if not data or peer.error:
                if not peer.error and peer.answer is not None:
                    peer.error = "the server's FIN in the middle of an answer"
                return False
        if mask & selectors.EVENT_WRITE and peer.wants_to_send():
            piece = peer.pieces[peer.sent]
            peer.offset += sock.send(piece[peer.offset :])
            if peer.offset == len(piece):
                peer.sent += 1
                peer.offset = 0
        if peer.may_finish():
            sock.shutdown(socket.SHUT_WR)
            peer.finished = True
    except BlockingIOError:
        return True
    except OSError as error:
        peer.error = f"{type(error).__name__}: {error}"
        return False
    if not peer.wants_to_send():
        selector.modify(sock, selectors.EVENT_READ, peer)
    return True
