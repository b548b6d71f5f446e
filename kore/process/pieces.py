"""Objects of any length cut into messages of a channel, and put together again: pure functions of bytes.

A piece is one message: its kind, for whom the object is, whether more follows, and a part of the data. The pieces of
one object follow each other on a channel with nothing between them, since who sends is the channel, and the
parent passes on whole objects only: so a sender that dies in the middle of one leaves nobody with half of it.
"""

from __future__ import annotations

import struct

from kore.process.channel import ChannelError, Kind, kind_of

OBJECT_BYTES_MAX = 16 << 20
"""The longest object: every process on its way holds all of it, and it is the least bound of all queues."""

PIECE_COST = 128
"""Bytes that count for a piece besides its own: the object that holds it and its place in a queue."""

TO_ALL = 0
"""For every worker, the sender too; other numbers are ids of workers, from 1."""

TO_OTHERS = 0xFFFF
"""For every worker but the sender."""

WORKERS_MAX = TO_OTHERS - 1

HEADER = struct.Struct("!BHB")
"""Kind, for whom, whether more follows (0 or 1)."""

CARRIED = frozenset({Kind.OBJECT, Kind.BROADCAST})
"""What workers send to workers."""


def cut(kind: Kind, target: int, data: bytes, piece_bytes: int) -> list[bytes]:
    """The messages for `data`, each at most `piece_bytes` long; at least one, however short the data."""
    room = piece_bytes - HEADER.size
    last = max(0, len(data) - 1) // room * room
    more = HEADER.pack(kind, target, 1)
    pieces = [more + data[at : at + room] for at in range(0, last, room)]
    pieces.append(HEADER.pack(kind, target, 0) + data[last:])
    return pieces


def cost(piece: bytes) -> int:
    """What a piece counts for in a bounded queue, in bytes."""
    return len(piece) + PIECE_COST


def is_last(piece: bytes) -> bool:
    """Whether an object ends with this piece."""
    return not piece[HEADER.size - 1]


class Whole:
    """An object whose last piece has come."""

    __slots__ = ("kind", "pieces", "target")

    def __init__(self, kind: Kind, target: int, pieces: list[bytes]) -> None:
        self.kind = kind
        self.target = target
        self.pieces = pieces
        """As they came, headers and all: what is passed on is not put together in between."""

    def data(self) -> bytes:
        """The object's bytes, put together."""
        return b"".join(memoryview(piece)[HEADER.size :] for piece in self.pieces)


class Assembly:
    """The object that is coming in on one channel."""

    __slots__ = ("_bytes", "_head", "_pieces")

    def __init__(self) -> None:
        self._head: tuple[int, int] | None = None
        self._pieces: list[bytes] = []
        self._bytes = 0

    def add(self, message: bytes) -> Whole | None:
        """Take a message; the object that is whole with it, if one is.

        Raises ChannelError for what no worker of ours sends: another kind, pieces of different objects mixed, an object
        beyond the bound.
        """
        kind = kind_of(message)
        if kind not in CARRIED or len(message) < HEADER.size:
            raise ChannelError(f"a {kind.name} of {len(message)} bytes among the messages for workers")
        _, target, more = HEADER.unpack_from(message)
        if self._head not in (None, (kind, target)):
            raise ChannelError("pieces of different objects in one")
        self._bytes += cost(message)
        if self._bytes > 2 * OBJECT_BYTES_MAX:  # with the cost of its pieces, even where they are small
            raise ChannelError(f"an object of more than {OBJECT_BYTES_MAX} bytes")
        self._pieces.append(message)
        if more:
            self._head = (kind, target)
            return None
        whole = Whole(kind, target, self._pieces)
        self._head, self._pieces, self._bytes = None, [], 0
        return whole
