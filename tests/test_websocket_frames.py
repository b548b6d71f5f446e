"""The WebSocket codec: what RFC 6455 allows and forbids, as tables; the same events wherever the bytes are cut."""

from __future__ import annotations

import itertools
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kore.http.websocket import frames
from kore.http.websocket.deflate import Inflater
from kore.http.websocket.frames import MessageParser, WebSocketError, unmask, valid_close_code
from tests.websocket_harness import BINARY, CLOSE, PING, PONG, TEXT, close, deflated, fragments, frame, xor

FRAME_MAX = 70000
MESSAGE_MAX = 100000


def events(data: bytes, cuts=(), *, inflate: bool = True, frame_max: int = FRAME_MAX, message_max: int = MESSAGE_MAX):
    """All events of `data` fed in pieces cut at `cuts`; at an error the list ends with its code."""
    parser = MessageParser(frame_max, message_max, Inflater if inflate else None)
    found: list[object] = []
    places = [0, *sorted(cuts), len(data)]
    try:
        for begin, end in itertools.pairwise(places):
            parser.feed(data[begin:end])
            while (event := parser.next()) is not None:
                found.append(event)
    except WebSocketError as error:
        return [*found, error.code]
    return found


def long(size: int) -> bytes:
    return bytes(range(256)) * (size // 256) + bytes(size % 256)


KAPPA = "κόσμε"
HELLO = frame(TEXT, b"Hello")
GOOD = {
    "text": (HELLO, [(TEXT, "Hello")]),
    "the RFC's masked hello": (bytes.fromhex("818537fa213d7f9f4d5158"), [(TEXT, "Hello")]),
    "empty text": (frame(TEXT), [(TEXT, "")]),
    "empty binary": (frame(BINARY), [(BINARY, b"")]),
    "binary": (frame(BINARY, b"\0\xff\xfe"), [(BINARY, b"\0\xff\xfe")]),
    "utf-8": (frame(TEXT, KAPPA.encode()), [(TEXT, KAPPA)]),
    "two": (HELLO + frame(BINARY, b"x"), [(TEXT, "Hello"), (BINARY, b"x")]),
    "125": (frame(BINARY, long(125)), [(BINARY, long(125))]),
    "126": (frame(BINARY, long(126)), [(BINARY, long(126))]),
    "127": (frame(BINARY, long(127)), [(BINARY, long(127))]),
    "257": (frame(BINARY, long(257)), [(BINARY, long(257))]),
    "fragments": (
        frame(TEXT, b"Hel", fin=False) + frame(0, b"lo", mask=b"abcd"), [(TEXT, "Hello")],
    ),
    "fragments within a character": (
        frame(TEXT, b"\xce", fin=False) + frame(0, b"\xba", fin=False) + frame(0), [(TEXT, "κ")],
    ),
    "empty fragments": (
        frame(TEXT, fin=False) + frame(0, fin=False) + frame(0, b"a", fin=False) + frame(0), [(TEXT, "a")],
    ),
    "all fragments empty": (frame(TEXT, fin=False) + frame(0, fin=False) + frame(0), [(TEXT, "")]),
    "a ping between fragments": (
        frame(BINARY, b"a", fin=False) + frame(PING, b"p") + frame(0, b"b"), [(PING, b"p"), (BINARY, b"ab")],
    ),
    "pings and a pong": (
        frame(PING) + frame(PING, b"x" * 125) + frame(PONG, b"y"), [(PING, b""), (PING, b"x" * 125), (PONG, b"y")],
    ),
    "close": (close(), [(CLOSE, b"")]),
    "close with code": (close(1000), [(CLOSE, b"\x03\xe8")]),
    "close with reason": (close(4999, KAPPA.encode()), [(CLOSE, b"\x13\x87" + KAPPA.encode())]),
    "close with the longest reason": (close(1001, b"r" * 123), [(CLOSE, b"\x03\xe9" + b"r" * 123)]),
    "a close between fragments": (frame(TEXT, b"a", fin=False) + close(1000), [(CLOSE, b"\x03\xe8")]),
    "compressed": (frame(TEXT, deflated(b"Hello"), rsv=4), [(TEXT, "Hello")]),
    "the RFC's compressed hello": (frame(TEXT, bytes.fromhex("f248cdc9c90700"), rsv=4), [(TEXT, "Hello")]),
    "the RFC's stored hello": (frame(TEXT, bytes.fromhex("000500faff48656c6c6f00"), rsv=4), [(TEXT, "Hello")]),
    "the RFC's final block": (frame(TEXT, bytes.fromhex("f348cdc9c9070000"), rsv=4), [(TEXT, "Hello")]),
    "the RFC's two blocks": (
        frame(TEXT, bytes.fromhex("f248050000 00ffffcac9c90700".replace(" ", "")), rsv=4), [(TEXT, "Hello")],
    ),
    "compressed and empty": (frame(TEXT, b"\0", rsv=4), [(TEXT, "")]),
    "compressed in fragments": (
        fragments(TEXT, deflated(KAPPA.encode() * 9), (0, 1, 3, 5), rsv=4), [(TEXT, KAPPA * 9)],
    ),
    "compressed after plain": (HELLO + frame(BINARY, deflated(b"b"), rsv=4) + HELLO, [
        (TEXT, "Hello"), (BINARY, b"b"), (TEXT, "Hello")]),
}

BAD = {
    "not masked": (frame(TEXT, b"a", mask=None), 1002, []),
    "rsv2": (frame(TEXT, b"a", rsv=2), 1002, []),
    "rsv3": (frame(TEXT, b"a", rsv=1), 1002, []),
    "rsv1 on a control frame": (frame(PING, b"a", rsv=4), 1002, []),
    "rsv1 on a continuation": (frame(TEXT, b"\0", fin=False, rsv=4) + frame(0, b"", rsv=4), 1002, []),
    **{f"opcode {op}": (frame(op, b"a"), 1002, []) for op in (3, 4, 5, 6, 7, 11, 12, 13, 14, 15)},
    "fragmented ping": (frame(PING, b"a", fin=False), 1002, []),
    "fragmented close": (frame(CLOSE, fin=False), 1002, []),
    "ping of 126": (frame(PING, b"a" * 126), 1002, []),
    "close of 126": (frame(CLOSE, b"\x03\xe8" + b"a" * 124), 1002, []),
    "continuation of nothing": (frame(0, b"a"), 1002, []),
    "continuation after a whole message": (HELLO + frame(0, b"a"), 1002, [(TEXT, "Hello")]),
    "text within a message": (frame(TEXT, b"a", fin=False) + HELLO, 1002, []),
    "binary within a message": (frame(TEXT, b"a", fin=False) + frame(BINARY, b"b", fin=False), 1002, []),
    "125 in 16 bits": (frame(BINARY, b"a" * 125, form=16), 1002, []),
    "0 in 16 bits": (frame(BINARY, form=16), 1002, []),
    "126 in 64 bits": (frame(BINARY, b"a" * 126, form=64), 1002, []),
    "65535 in 64 bits": (frame(BINARY, size=65535, form=64), 1002, []),
    "the highest bit of the length": (frame(BINARY, size=1 << 63, form=64), 1002, []),
    "the largest length": (frame(BINARY, size=(1 << 63) - 1), 1009, []),
    "a frame too large": (frame(BINARY, size=FRAME_MAX + 1), 1009, []),
    "a message too large": (
        frame(BINARY, bytes(60000), fin=False) + frame(0, size=MESSAGE_MAX - 60000 + 1), 1009, [],
    ),
    "invalid utf-8": (frame(TEXT, b"a\xff"), 1007, []),
    "invalid utf-8 after a message": (HELLO + frame(TEXT, b"\xc0\xaf"), 1007, [(TEXT, "Hello")]),
    "a surrogate": (frame(TEXT, b"\xed\xa0\x80"), 1007, []),
    "beyond unicode": (frame(TEXT, b"\xf4\x90\x80\x80"), 1007, []),
    "a cut character": (frame(TEXT, KAPPA.encode()[:-1]), 1007, []),
    "a cut character in fragments": (frame(TEXT, b"\xce", fin=False) + frame(0), 1007, []),
    "close of one byte": (frame(CLOSE, b"\x03"), 1002, []),
    "close with invalid utf-8": (close(1000, b"\xff"), 1007, []),
    **{f"close with {code}": (close(code), 1002, []) for code in (
        0, 999, 1004, 1005, 1006, 1015, 1016, 1100, 2000, 2999, 5000, 65535)},
    "no deflate": (frame(TEXT, b"\xff" * 9, rsv=4), 1002, []),
    "compressed invalid utf-8": (frame(TEXT, deflated(b"a\xff"), rsv=4), 1007, []),
    "a bomb": (frame(BINARY, deflated(bytes(MESSAGE_MAX + 1)), rsv=4), 1009, []),
    "a bomb in fragments": (fragments(BINARY, deflated(bytes(MESSAGE_MAX + 1)), (9, 9), rsv=4), 1009, []),
    "many final blocks": (frame(BINARY, b"\x03\x00" * 40, rsv=4), 1002, []),
}


@pytest.mark.parametrize("name", GOOD)
def test_what_is_allowed_gives_its_events_at_any_cut(name: str) -> None:
    """In one piece, cut once at every byte, and byte by byte."""
    data, expected = GOOD[name]
    assert events(data) == expected
    for cut in range(len(data)):
        assert events(data, (cut,)) == expected, cut
    assert events(data, range(1, len(data))) == expected


@pytest.mark.parametrize("name", BAD)
def test_what_is_forbidden_gives_its_code_at_any_cut(name: str) -> None:
    """The same, for what ends the connection; what was whole before is still given."""
    data, code, before = BAD[name]
    expected = [*before, code]
    assert events(data) == expected
    step = max(1, len(data) // 300)
    for cut in range(0, len(data), step):
        assert events(data, (cut,)) == expected, cut
    assert events(data, range(1, len(data), step)) == expected


def test_compression_that_was_not_agreed_on_is_refused() -> None:
    """RSV1 means nothing without the extension."""
    assert events(GOOD["compressed"][0], inflate=False) == [1002]


def test_invalid_text_is_found_in_the_piece_it_comes_in() -> None:
    """The byte that cannot be UTF-8 closes at once, not at the end of its frame or message."""
    whole = frame(TEXT, b"a" * 1000 + b"\xf5" + b"b" * 1000, fin=False)
    head = len(whole) - 2001
    assert events(whole[: head + 1000]) == []
    assert events(whole[: head + 1001]) == [1007]
    assert events(frame(TEXT, b"\xce\xba\xf4\x90", fin=False)) == [1007]
    assert events(frame(TEXT, b"\xed\xa0", fin=False)) == [1007]


def test_sizes_are_refused_by_the_header_alone() -> None:
    """Nothing is stored, nor even the mask waited for, of what is too large."""
    assert events(frame(BINARY, size=FRAME_MAX + 1)[:10]) == [1009]
    assert events(frame(BINARY, size=200, mask=None, form=16)[:2]) == [1002]
    assert events(bytes((0x82, 0xFE, 0, 200)), frame_max=199) == [1009]
    assert events(bytes((0x82, 0xFE, 0, 200)), message_max=199) == [1009]
    assert events(bytes((0x82, 0xFE, 0, 200)), frame_max=200, message_max=200) == []


def test_the_limits_themselves_are_allowed() -> None:
    """A frame and a message of exactly the limit pass, compressed too."""
    assert events(frame(BINARY, bytes(FRAME_MAX))) == [(BINARY, bytes(FRAME_MAX))]
    whole = bytes(MESSAGE_MAX)
    assert events(fragments(BINARY, whole, (50000,))) == [(BINARY, whole)]
    assert events(frame(BINARY, deflated(whole), rsv=4)) == [(BINARY, whole)]
    noise = os.urandom(60000)
    assert events(frame(BINARY, deflated(noise), rsv=4), message_max=60000) == [(BINARY, noise)]


def test_a_bomb_is_not_inflated() -> None:
    """Of 64 MiB no more than the limit is ever made."""
    made = []

    class Counting(Inflater):
        def inflate(self, data: bytes, room: int) -> bytes:
            out = super().inflate(data, room)
            made.append(len(out))
            return out

    parser = MessageParser(1 << 20, 1000, Counting)
    parser.feed(frame(BINARY, deflated(bytes(1 << 26), 9), rsv=4))
    with pytest.raises(WebSocketError) as caught:
        parser.next()
    assert caught.value.code == 1009
    assert sum(made) <= 1000


@pytest.mark.parametrize("size", [*range(20), 124, 125, 126, 255, 256, 257, 258, 259, 260, 65535, 65536, 65537, 200001])
def test_masks(size: int) -> None:
    """Every size is unmasked as the RFC says."""
    payload, mask = os.urandom(size), os.urandom(4)
    assert unmask(payload, mask) == xor(payload, mask)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_random_messages_in_random_fragments_at_random_cuts(data) -> None:
    """Whatever is sent arrives, with control frames in between where they came."""
    stream, expected = b"", []
    for _ in range(data.draw(st.integers(1, 4))):
        op = data.draw(st.sampled_from([TEXT, BINARY]))
        text = data.draw(st.text(max_size=300)) if op == TEXT else data.draw(st.binary(max_size=600))
        payload = text.encode() if isinstance(text, str) else text
        packed = data.draw(st.booleans())
        if packed:
            payload = deflated(payload)
        sizes = data.draw(st.lists(st.integers(0, 200), max_size=4))
        ping = data.draw(st.binary(max_size=125))
        if sizes:
            stream += fragments(op, payload, sizes, rsv=4 if packed else 0)
        else:
            stream += frame(op, payload, rsv=4 if packed else 0, mask=data.draw(st.binary(min_size=4, max_size=4)))
        stream += frame(PING, ping)
        expected += [(op, text), (PING, ping)]
    cuts = data.draw(st.lists(st.integers(0, len(stream)), max_size=8))
    assert events(stream, cuts) == expected


@settings(max_examples=500, deadline=None)
@given(st.binary(max_size=200), st.lists(st.integers(0, 200), max_size=5))
def test_any_bytes_at_any_cut_give_the_same(data: bytes, cuts: list[int]) -> None:
    """No bytes make the parser do anything but give events or refuse, and cuts change nothing."""
    whole = events(data)
    assert events(data, [cut for cut in cuts if cut < len(data)]) == whole
    assert events(data, range(len(data))) == whole


def test_codes() -> None:
    """RFC 6455 7.4: which codes may be sent."""
    allowed = [code for code in range(65536) if valid_close_code(code)]
    assert allowed == [1000, 1001, 1002, 1003, *range(1007, 1015), *range(3000, 5000)]


@pytest.mark.parametrize(("size", "head"), [
    (0, "8100"), (125, "817d"), (126, "817e007e"), (65535, "817effff"), (65536, "817f0000000000010000"),
])  # fmt: skip
def test_headers_are_minimal(size: int, head: str) -> None:
    """RFC 6455 5.2."""
    assert frames.header(TEXT, size).hex() == head
    assert b"".join(frames.pieces(TEXT, bytes(size))) == bytes.fromhex(head) + bytes(size)


def test_close_frames() -> None:
    """With and without a code; a reason that is too long is cut between characters."""
    assert frames.close_frame(None) == b"\x88\0"
    assert frames.close_frame(1000) == b"\x88\x02\x03\xe8"
    assert frames.close_frame(1001, "é" * 100) == b"\x88\x7c\x03\xe9" + "é".encode() * 61


@pytest.mark.parametrize(("op", "data", "error"), [
    (0, b"", TypeError), (8, b"", TypeError), ("1", b"", TypeError), (None, b"", TypeError), (1, 5, TypeError),
    (2, None, TypeError), (2, [1], TypeError), (1, b"\xff", ValueError), (1, "\ud800", ValueError),
])  # fmt: skip
def test_what_cannot_be_sent(op, data, error) -> None:
    """Only text and binary, only str and bytes-like, and text that is UTF-8."""
    with pytest.raises(error):
        frames.checked(op, data)


def test_what_can_be_sent() -> None:
    """Any bytes-like object, and str."""
    for data in (b"ab", bytearray(b"ab"), memoryview(b"xabx")[1:-1], "ab"):
        assert frames.checked(BINARY, data) == b"ab"
        assert frames.checked(TEXT, data) == b"ab"
    assert frames.checked(TEXT, KAPPA) == frames.checked(TEXT, KAPPA.encode()) == KAPPA.encode()
