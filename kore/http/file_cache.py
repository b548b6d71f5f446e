"""What is known of the files that were asked for: validators and header fields, and of small files the bytes.

Everything here is true for the second it was looked up in and looked up again in the next, so a change shows within a
second and a busy file costs two system calls a second. The bytes of a small file stand in one piece with
their response head (`Variant.whole`, or `memory` of the larger ones), which makes the most common response of a file
one dictionary look-up and one write.

Bounded by entries and by bytes; what was looked up longest ago goes first. Missing files are not kept at all: a flood
of made-up names finds nothing to fill.
"""

from __future__ import annotations

import os
import time
from collections import OrderedDict
from typing import Any, Final

from kore.http.conditional import SETTLED_S, etag
from kore.http.response import imf_fixdate
from kore.http.send_memory import MemoryFile, memory_file

SMALL_BYTES_MAX: Final = 131072
"""Files up to this size are kept in memory and sent from there: above it the transfer costs more than the system calls
that splicing takes."""

ENTRIES_MAX: Final = 1024
"""Files kept: with their fields about 1.5 MB. A site's hot files are fewer."""

BYTES_MAX: Final = 1 << 26
"""Bytes of files kept in one worker, both copies counted: 64 MiB, some hundred files of the largest kind."""

FRESH_MAX: Final = 1024
"""Heads of requests that lead straight to a file. A full table is emptied: that heals after a flood of queries."""

MEMORY_FILES_MAX: Final = 64
"""Responses that are kept as files of their own: each has an fd."""


class Variant:
    """One file as it can be sent: itself, or its compressed sibling."""

    __slots__ = (
        "coding", "content", "date", "etag", "fields", "identity", "media_type", "memory", "modified", "path", "size",
        "settled", "whole",
    )  # fmt: skip

    def __init__(
        self, path: bytes, found: os.stat_result, media_type: str | None, coding: str, varies: bool,
    ) -> None:
        self.path = path
        self.identity = identity(found)
        self.size = found.st_size
        self.modified = int(found.st_mtime_ns // 1_000_000_000)
        # A file that changes again within the resolution of its time stamp looks the same: its bytes are believed only
        # once that is impossible.
        self.settled = found.st_mtime + 2 * SETTLED_S < time.time()
        self.media_type = media_type
        self.coding = coding
        self.etag = etag(found.st_mtime_ns, found.st_size, found.st_ino)
        fields = [] if media_type is None else [("content-type", media_type)]
        fields += [("last-modified", imf_fixdate(self.modified)), ("etag", self.etag), ("accept-ranges", "bytes")]
        if coding:
            fields.append(("content-encoding", coding))
        if varies:
            fields.append(("vary", "accept-encoding"))
        self.fields = tuple(fields)
        self.content: bytes | None = None
        self.date = ""  # the second, as response heads have it, in which these may be sent:
        self.memory: MemoryFile | None = None  # the response with its head, or
        self.whole = b""  # the same as bytes


def identity(found: os.stat_result) -> tuple[int, int, int, int]:
    """What tells one state of a file from another."""
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


class Entry:
    """What a path led to: the file, and the compressed siblings that may be sent instead."""

    __slots__ = ("bytes_kept", "date", "encoded", "plain")

    def __init__(self, plain: Variant, encoded: tuple[Variant, ...], date: str) -> None:
        self.plain = plain
        self.encoded = encoded
        self.date = date
        """The second it was looked up in."""
        self.bytes_kept = 0

    def inherit(self, before: Entry) -> None:
        """Take over the bytes of files that have not changed."""
        known = {variant.path: variant for variant in (before.plain, *before.encoded)}
        for variant in (self.plain, *self.encoded):
            old = known.get(variant.path)
            if old is not None and old.settled and old.content is not None and old.identity == variant.identity:
                variant.content = old.content
                self.bytes_kept += 2 * variant.size


class FileCache:
    """Entries by file map and path, and what leads to them without a look-up."""

    def __init__(self, *, entries_max: int = ENTRIES_MAX, bytes_max: int = BYTES_MAX) -> None:
        self.entries_max = entries_max
        self.bytes_max = bytes_max
        self.bytes_kept = 0
        self._entries: OrderedDict[Any, Entry] = OrderedDict()
        self.fresh: dict[Any, Variant] = {}
        """By the `Prepared` of a request: the file whose `whole` answers it, in the second of its `date`."""
        self._memories: dict[Variant, None] = {}  # those with a `memory`, in the order of making

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: object) -> Entry | None:
        """The entry, however old."""
        return self._entries.get(key)

    def put(self, key: object, entry: Entry) -> None:
        """Keep an entry that has just been looked up, in place of the one before."""
        self.drop(key)
        self._entries[key] = entry
        self.bytes_kept += entry.bytes_kept
        self._shrink()

    def fill(self, key: object, entry: Entry, variant: Variant, content: bytes) -> None:
        """Keep the bytes of one of its files."""
        if variant.content is None and self._entries.get(key) is entry:
            variant.content = content
            entry.bytes_kept += 2 * len(content)
            self.bytes_kept += 2 * len(content)
            self._shrink()

    def drop(self, key: object) -> None:
        """Forget an entry: it is not true any more."""
        entry = self._entries.pop(key, None)
        if entry is not None:
            self.bytes_kept -= entry.bytes_kept
            self._retire(entry)

    def make(self, variant: Variant, head: bytes, content: bytes, date: str, *, encrypted: bool = False) -> None:
        """Make the response of this second; one that is to be encrypted is no file, which the kernel sends as it is."""
        variant.memory = None
        self._memories.pop(variant, None)
        oldest = next(iter(self._memories), None)
        if oldest is not None and len(self._memories) >= MEMORY_FILES_MAX and oldest.date is not date:
            self._forget_response(oldest)
        if len(self._memories) < MEMORY_FILES_MAX and not encrypted:
            variant.memory = memory_file(head, content)
        if variant.memory is not None:
            self._memories[variant] = None
            variant.whole = b""
        else:
            variant.whole = head + content
        variant.date = date

    def remember(self, prepared: object, variant: Variant) -> None:
        """Requests of this head are answered by `variant.whole`."""
        if len(self.fresh) >= FRESH_MAX:
            self.fresh.clear()
        self.fresh[prepared] = variant

    def _retire(self, entry: Entry) -> None:
        """Let go of its bytes: `fresh` may know its files a little longer."""
        for variant in (entry.plain, *entry.encoded):
            variant.content = None
            self._forget_response(variant)

    def _forget_response(self, variant: Variant) -> None:
        variant.memory = None
        variant.whole = b""
        variant.date = ""
        self._memories.pop(variant, None)

    def _shrink(self) -> None:
        while len(self._entries) > self.entries_max or self.bytes_kept > self.bytes_max:
            _, entry = self._entries.popitem(last=False)
            self.bytes_kept -= entry.bytes_kept
            self._retire(entry)
            self.fresh.clear()
