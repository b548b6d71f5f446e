"""Byte ranges: which parts of a file a client wants, and several of them as one body (RFC 9110 14).

A field of a few hundred bytes can ask for a thousand ranges, and each would cost a part with a head of its own, or
send the whole file a thousand times. So ranges that overlap or nearly touch become one, which RFC 9110 15.3.7.2 allows,
and a request for more than `RANGES_MAX` is answered as if it had asked for none (RFC 9110 14.2).
"""

from __future__ import annotations

import re
from typing import Final

RANGES_MAX: Final = 64
"""Ranges of one request. Readers of PDF and of maps ask for a few at a time."""

GAP_BYTES: Final = 80
"""Ranges closer together than this are sent as one: what lies between costs less than the head of a part."""

OFFSET_DIGITS_MAX: Final = 19
"""Digits of 2**63 - 1, the largest offset there is; longer numbers lie beyond any file."""

OFFSET_MAX: Final = 2**63 - 1

_bytes_unit = re.compile(r"[bB][yY][tT][eE][sS]=").match
_spec = re.compile(r"([0-9]*+)-([0-9]*+)").fullmatch

Range = tuple[int, int]
"""Where it starts, and where the byte behind it is."""


def wanted(value: str, length: int) -> list[Range] | None:
    """The ranges of a file of `length` bytes that a Range field asks for.

    None: the field does not count (another unit, malformed, too many); an empty list: none of them lies in the
    file, which is answered with 416.
    """
    unit = _bytes_unit(value)
    if unit is None:
        return None
    specs = [spec for spec in (text.strip(" \t") for text in value[unit.end() :].split(",")) if spec]
    if not specs or len(specs) > RANGES_MAX:
        return None
    found: list[Range] = []
    for spec in specs:
        match = _spec(spec)
        if match is None or match[0] == "-":
            return None
        if not match[1]:
            suffix = min(_offset(match[2]), length)
            if suffix:
                found.append((length - suffix, length))
            elif not length:
                return None  # the last so many bytes of nothing: that is all there is, and content-range cannot say it
            continue
        first, last = _offset(match[1]), _offset(match[2]) if match[2] else OFFSET_MAX
        if last < first:
            return None
        if first < length:
            found.append((first, min(last + 1, length)))
    return _coalesced(found)


def content_range(part: Range, length: int) -> str:
    """The value of content-range for a part."""
    return f"bytes {part[0]}-{part[1] - 1}/{length}"


def part_heads(parts: list[Range], length: int, media_type: str | None, boundary: str) -> list[bytes]:
    """What comes before each part of a multipart/byteranges body, and, as the last of the list, what ends it."""
    kind = "" if media_type is None else f"content-type: {media_type}\r\n"
    heads = [f"\r\n--{boundary}\r\n{kind}content-range: {content_range(part, length)}\r\n\r\n" for part in parts]
    heads[0] = heads[0].removeprefix("\r\n")
    heads.append(f"\r\n--{boundary}--\r\n")
    return [head.encode() for head in heads]


def _coalesced(parts: list[Range]) -> list[Range]:
    """The same bytes in no more ranges than needed; in the order they were asked for when none has to be joined."""
    ordered = sorted(parts)
    joined: list[Range] = []
    for first, end in ordered:
        if joined and first <= joined[-1][1] + GAP_BYTES:
            joined[-1] = (joined[-1][0], max(joined[-1][1], end))
        else:
            joined.append((first, end))
    return joined if len(joined) < len(parts) else parts


def _offset(digits: str) -> int:
    digits = digits.lstrip("0")
    return min(int(digits or "0"), OFFSET_MAX) if len(digits) <= OFFSET_DIGITS_MAX else OFFSET_MAX
