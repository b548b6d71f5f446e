"""What waits for a channel that does not take it now: a bounded queue of whole objects in front of it.

Both ends of the way of a message have one: the worker that sends, in front of the parent, and the parent, in front of
each worker that is to receive. An object goes in whole or not at all, so a bound that is reached costs objects
and never leaves half of one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from kore.process.channel import Channel
from kore.process.pieces import OBJECT_BYTES_MAX, PIECE_COST, cost, is_last

WAITING_BYTES_MAX = OBJECT_BYTES_MAX + OBJECT_BYTES_MAX // 4
"""Bytes that wait for one channel, with PIECE_COST for each piece: the longest object, cut as small as may be."""


class Outbox:
    """The queue in front of one channel. Whoever waits for room on the channel then calls flush()."""

    __slots__ = ("_channel", "_flushing", "_waiting", "bytes", "gone")

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._waiting: deque[bytes] = deque()
        self._flushing = False
        self.bytes = 0
        self.gone = False
        """The peer is gone: what is put here goes to nobody."""

    def put(self, pieces: Sequence[bytes]) -> bool:
        """Send an object, given as its pieces, or keep what cannot be sent now; False when there is no room for it."""
        if self.gone:
            return True
        size = sum(map(cost, pieces))
        if self.bytes + size > WAITING_BYTES_MAX:
            return False
        # All of them at once and then flush: a finalizer that sends something while this runs comes after them.
        self._waiting.extend(pieces)
        self.bytes += size
        self.flush()
        return True

    def flush(self) -> None:
        """Send what waits, as far as the kernel takes it."""
        if self._flushing or self.gone:
            return
        self._flushing = True
        waiting = self._waiting
        try:
            while waiting and self._channel.send_message(waiting[0]):
                self.bytes -= len(waiting.popleft()) + PIECE_COST
        except OSError:
            # The end of the channel is told to whoever reads it; here it only means that nobody takes this any more.
            self.gone = True
        finally:
            self._flushing = False

    @property
    def waiting(self) -> bool:
        """Whether something waits for room."""
        return bool(self._waiting) and not self.gone

    def objects(self) -> int:
        """How many objects wait, with one that was sent in part."""
        return sum(map(is_last, self._waiting))
