"""PostgreSQL's protocol 3.0 as bytes: the messages a session sends, and what is in those it receives.

Queries are prepared statements whose parameter types the server decides (no type is named in Parse), as those of
libpq's PQexecParams; several statements in one string need the simple query. Nothing here knows a socket.
Source: PostgreSQL's manual, chapter "Frontend/Backend Protocol", sections "Message Flow" and "Message Formats".
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

HEADER = struct.Struct("!BI").unpack_from
"""Type and length of a message; the length counts itself but not the type."""

LENGTH = struct.Struct("!i").unpack_from
"""The length of a value in a row; -1: NULL."""

DATA_ROW = ord("D")
READY_FOR_QUERY = ord("Z")
COMMAND_COMPLETE = ord("C")
BIND_COMPLETE = ord("2")
ROW_DESCRIPTION = ord("T")
NO_DATA = ord("n")
PARSE_COMPLETE = ord("1")
ERROR_RESPONSE = ord("E")
EMPTY_QUERY_RESPONSE = ord("I")
COPY_IN_RESPONSE = ord("G")
COPY_OUT_RESPONSE = ord("H")
PARAMETER_STATUS = ord("S")

SYNC = b"S\0\0\0\4"
TERMINATE = b"X\0\0\0\4"

NO_VALUES = b"\0\0\0\0"
"""The middle of a Bind message without parameters: no formats, no values."""

PARAMETERS_MAX = 65535
"""Their number is an unsigned 16-bit one on the wire."""

_TEXT_RESULTS = b"\0\0"
_BINARY_RESULTS = b"\0\1\0\1"
_EXECUTE = b"E\0\0\0\x09\0\0\0\0\0"  # the unnamed portal, all rows


def _message(kind: bytes, body: bytes) -> bytes:
    return kind + (len(body) + 4).to_bytes(4, "big") + body


def values(params: Sequence[str | bytes | None]) -> bytes:
    """The middle of a Bind message: str as text, bytes as binary, None as NULL. Raises UnicodeEncodeError."""
    if not params:
        return NO_VALUES
    formats: list[bytes] = []
    pieces: list[bytes] = []
    for param in params:
        if param is None:
            formats.append(b"\0\0")
            pieces.append(b"\xff\xff\xff\xff")
        else:
            text = isinstance(param, str)
            data = param.encode() if isinstance(param, str) else param
            formats.append(b"\0\0" if text else b"\0\1")
            pieces.append(len(data).to_bytes(4, "big"))
            pieces.append(data)
    count = len(params).to_bytes(2, "big")
    return b"".join((count, *formats, count, *pieces))


def prepare(name: bytes, text: bytes) -> bytes:
    """Parse and describe `text` as the statement `name`."""
    return _message(b"P", name + b"\0" + text + b"\0\0\0") + _message(b"D", b"S" + name + b"\0")


def execute(name: bytes, block: bytes, *, binary: bool) -> bytes:
    """Run the statement `name` with what `values` made, and ask for an answer."""
    body = b"\0" + name + b"\0" + block + (_BINARY_RESULTS if binary else _TEXT_RESULTS)
    return _message(b"B", body) + _EXECUTE + SYNC


def close_statement(name: bytes) -> bytes:
    """Forget the statement `name`, which need not be there."""
    return _message(b"C", b"S" + name + b"\0")


def simple_query(text: bytes) -> bytes:
    """Run all the statements in `text`, one after the other."""
    return _message(b"Q", text + b"\0")


def copy_fail(reason: bytes) -> bytes:
    """Refuse to send what COPY FROM STDIN waits for."""
    return _message(b"f", reason + b"\0")


def column_names(data: bytes, position: int) -> tuple[str, ...]:
    """The names in the RowDescription whose body begins at `position`."""
    count = int.from_bytes(data[position : position + 2], "big")
    position += 2
    names = []
    for _ in range(count):
        end = data.index(0, position)
        names.append(data[position:end].decode())
        position = end + 19  # the NUL, table, column, type, its size, its modifier, format
    return tuple(names)


def error_fields(data: bytes, position: int, end: int) -> dict[str, str]:
    """The fields of an ErrorResponse by letter: M the message, C the SQLSTATE, D detail, H hint, P position ..."""
    fields = {}
    for field in data[position:end].split(b"\0"):
        if field:
            # Before the session has its encoding, and in databases without one, messages may be in any.
            fields[chr(field[0])] = field[1:].decode("utf-8", "replace")
    return fields
