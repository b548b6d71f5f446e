"""The ring of receive buffers the kernel chooses from: one area for all connections, none for an idle one.

An idle connection holds no buffer; the kernel takes one when bytes arrive (IOSQE_BUFFER_SELECT). Bytes are copied
out of it while its completion is handled, so a buffer is back before the next one is needed. The kernel takes
buffers in ring order and they come back in about the same order: then the entries at the tail already
name the buffers that are returned, and returning them costs one comparison instead of a store of 16 bytes each.

Few buffers are kept in the ring as long as few are needed, because every one of them is touched in turn and a small
area stays in the processor's cache; running out (ENOBUFS) doubles them.
"""

from __future__ import annotations

import ctypes
import mmap

from kore.uring.ring import Ring, view
from kore.uring.structures import BUF, BUF_REG

GROUP = 0
"""The buffer group id that receiving entries name."""


class Buffers:
    """`most` buffers of `size` bytes, `first` of them in use until more are needed. `most` is a power of two."""

    def __init__(self, ring: Ring, size: int = 4096, first: int = 128, most: int = 2048) -> None:
        self.size = size
        self.most = most
        self.mask = most - 1
        self.area = mmap.mmap(-1, size * most)
        self._ring_memory = mmap.mmap(-1, max(BUF.size * most, mmap.PAGESIZE))
        self._anchors = [(ctypes.c_char * len(m)).from_buffer(m) for m in (self.area, self._ring_memory)]
        self.address, ring_address = (ctypes.addressof(anchor) for anchor in self._anchors)
        self._entries = view(ring_address, BUF.size * most)
        self._kernel_tail = view(ring_address + 14, 2, "H")  # struct io_uring_buf_ring: tail, in entry 0's resv
        registration = ctypes.create_string_buffer(BUF_REG.pack(ring_address, most, GROUP, 0, 0, 0, 0), BUF_REG.size)
        ring.register_buf_ring(ctypes.addressof(registration))
        self.tail = 0
        self.bids = [-1] * most  # which buffer the entry at each position names
        self.count = 0
        self.grow(first)

    def grow(self, more: int) -> None:
        """Add up to `more` buffers that were not in use yet."""
        until = min(self.count + more, self.most)
        self.give_back(list(range(self.count, until)))
        self.count = until

    def give_back(self, used: list[int]) -> None:
        """Put the buffers `used` at the tail and show the kernel."""
        position = self.tail & self.mask
        if self.bids[position : position + len(used)] != used:
            for number, bid in enumerate(used, position):
                self._write(number & self.mask, bid)
        self.tail += len(used)
        self._kernel_tail[0] = self.tail & 0xFFFF

    def _write(self, position: int, bid: int) -> None:
        """Write the entry at `position`. Its last two bytes are left alone: in entry 0 they are the tail."""
        self.bids[position] = bid
        self._entries[position << 4 : (position << 4) + 14] = BUF.pack(
            self.address + bid * self.size, self.size, bid, 0)[:14]

    def close(self) -> None:
        """Release the memory; only after the ring is closed."""
        self._entries.release()
        self._kernel_tail.release()
        self._anchors.clear()
        # An exported buffer would forbid unmapping; the mappings go with their last reference.
