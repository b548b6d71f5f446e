"""What a worker and its spawner say to each other, as bytes: requests to run a program, and what became of them.

The spawner has rights that the worker has not, and believes nothing it hears: a request is one head and as many bytes
as the head says, within a bound, and whatever does not come out even is a SpawnerProtocolError, which ends the
conversation. The four descriptors of a request come with its head: the child's channel, and its standard input, output
and error.
"""

from __future__ import annotations

import enum
import errno
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

BODY_BYTES_MAX = 6 * 1024 * 1024
"""Arguments and environment together: what execve(2) takes at most, three quarters of an 8 MiB stack."""

PIECE_BYTES = 32 * 1024
"""A packet: the kernel wants the memory of each in one go, so that a large one may fail where several do not."""

DESCRIPTORS = 4
"""Of a request: its channel, standard input, output and error."""

_HEAD = struct.Struct("<4sIIII?")
_MAGIC = b"kspw"
HEAD_BYTES = _HEAD.size

_REPLY = struct.Struct("<IBii")
REPLY_BYTES = _REPLY.size

STATUS = struct.Struct("<i")
"""What the spawner sends on the channel of a child that has ended: waitpid(2)'s status. Towards it: signal numbers."""

TOLD_BYTES_MAX = 16 * 1024
"""The spawner's first message: how it went, and what could not be done."""


class SpawnerProtocolError(Exception):
    """The other side does not keep to the rules."""


@dataclass(frozen=True, slots=True)
class Request:
    """A program to run."""

    serial: int
    directory: str
    program: str
    arguments: tuple[bytes, ...]
    environment: Mapping[bytes, bytes]
    new_session: bool


class Outcome(enum.IntEnum):
    """What became of a request."""

    STARTED = 0
    FAILED = 1
    """As execve(2) or fork(2) failed, with that errno."""
    NOT_FOUND = 2
    """It is in no directory of PATH, or not executable there (errno)."""
    NOT_ALLOWED = 3
    """It is not among the programs that may be started."""
    TOO_MANY = 4
    """As many run already as may at a time."""
    NO_DIRECTORY = 5
    """The directory to start it in cannot be entered (errno)."""


def pack_request(
    serial: int, directory: str, program: str, arguments: Sequence[str], environment: Mapping[str, str], *,
    new_session: bool,
) -> bytes:
    """A request, head and body. Raises ValueError for a NUL, or "=" in a name; OSError (E2BIG) when it is too large."""
    words = [os.fsencode(word) for word in (directory, program, *arguments)]
    for name, value in environment.items():
        key = os.fsencode(name)
        if not key or b"=" in key:
            raise ValueError(f"not the name of an environment variable: {name!r}")
        words.append(key + b"=" + os.fsencode(value))
    body = b"\0".join(words)
    if body.count(b"\0") != len(words) - 1:
        raise ValueError("a NUL in the arguments or the environment of a program")
    if len(body) > BODY_BYTES_MAX:
        raise OSError(errno.E2BIG, os.strerror(errno.E2BIG))
    return _HEAD.pack(_MAGIC, serial, len(body), len(arguments), len(environment), new_session) + body


def body_bytes(packet: bytes | bytearray) -> int:
    """How long the body is whose head `packet` begins with. Raises SpawnerProtocolError."""
    if len(packet) < HEAD_BYTES:
        raise SpawnerProtocolError("no head")
    magic, _, length, _, _, _ = _HEAD.unpack_from(packet)
    if magic != _MAGIC or length > BODY_BYTES_MAX:
        raise SpawnerProtocolError("a head that none of ours is")
    return int(length)


def parse_request(message: bytes) -> Request:
    """A whole request. Raises SpawnerProtocolError."""
    _, serial, length, arguments, variables, new_session = _HEAD.unpack_from(message)
    if len(message) != HEAD_BYTES + length:
        raise SpawnerProtocolError("the body is not as long as its head says")
    words = message[HEAD_BYTES:].split(b"\0")
    if arguments < 1 or len(words) != 2 + arguments + variables:
        raise SpawnerProtocolError("the words are not as many as the head says")
    environment = {}
    for word in words[2 + arguments :]:
        name, equals, value = word.partition(b"=")
        if not name or not equals:
            raise SpawnerProtocolError("an environment that is none")
        environment[name] = value
    if not words[1]:
        raise SpawnerProtocolError("no program")
    return Request(
        serial, os.fsdecode(words[0]), os.fsdecode(words[1]), tuple(words[2 : 2 + arguments]), environment,
        new_session)


def pack_reply(serial: int, outcome: Outcome, number: int = 0, pid: int = 0) -> bytes:
    """What became of the request of that serial number: the errno, or the pid."""
    return _REPLY.pack(serial, outcome, number, pid)


def parse_reply(packet: bytes) -> tuple[int, Outcome, int, int]:
    """Serial number, outcome, errno and pid. Raises SpawnerProtocolError."""
    if len(packet) != REPLY_BYTES:
        raise SpawnerProtocolError("a reply of the wrong length" if packet else "no reply")
    serial, outcome, number, pid = _REPLY.unpack(packet)
    try:
        return serial, Outcome(outcome), number, pid
    except ValueError:
        raise SpawnerProtocolError("an outcome there is not") from None
