"""The chunked coding: tables of bytes and bodies, each cut at every byte."""

from __future__ import annotations

import pytest
from http_harness import body, chunked

CHUNKS = [
    (b"0\r\n\r\n", b""), (b"5\r\nhello\r\n0\r\n\r\n", b"hello"), (b"1\r\na\r\n002\r\nbc\r\n00\r\n\r\n", b"abc"),
    (b"A\r\n" + b"x" * 10 + b"\r\n0\r\n\r\n", b"x" * 10),
    (b"a;n=v;m=\"q\\\"\xff;\"\r\n" + b"x" * 10 + b"\r\n0;z\r\n\r\n", b"x" * 10),
    (b"2 ; a = b\r\n\r\n\r\n0\r\n\r\n", b"\r\n"), (b"0\r\nX: y\r\nZ:\r\n\r\n", b""),
    (b"0\r\nContent-Length: 5\r\n\r\n", b""),
    (b"0000000000000001\r\na\r\n0\r\n\r\n", b"a"), (b"3E8\r\n" + b"x" * 1000 + b"\r\n0\r\n\r\n", b"x" * 1000),
    (b"5\nhello\r\n0\r\n\r\n", 400), (b"5\r\nhello\n0\r\n\r\n", 400), (b"5\r\nhello!\r\n0\r\n\r\n", 400),
    (b"5 \r\nhello\r\n", 400),
    (b" 5\r\nhello\r\n", 400), (b"\r\n", 400), (b"+5\r\nhello\r\n", 400), (b"-5\r\n", 400), (b"0x5\r\nhello\r\n", 400),
    (b"g\r\n", 400),
    (b"5\rhello", 400), (b"5;\r\nhello\r\n", 400), (b"5;=b\r\nhello", 400), (b"5;a=\r\nhello", 400),
    (b"5;a=\"b\r\nhello", 400),
    (b"5;a\x00\r\nhello", 400), (b"5;a\nb\r\nhello", 400), (b"5 a\r\nhello", 400), (b"00000000000000001\r\na\r\n", 400),
    (b"5;" + b"a" * 300 + b"\r\nhello", 400), (b"5;a=\"\n\"\r\nhello", 400), (b"1_0\r\n", 400),
    (b"3E9\r\n", 413), (b"FFFFFFFFFFFFFFFF\r\n", 413), (b"3E7\r\n" + b"x" * 999 + b"\r\n2\r\n", 413),
    (b"0\r\nX\r\n\r\n", 400), (b"0\r\n: x\r\n\r\n", 400), (b"0\r\nX : y\r\n\r\n", 400), (b"0\r\nX: y\n\r\n", 400),
    (b"0\r\n\n", 400),
    (b"0\r\nX: \x00", 400), (b"0\r\n X: y\r\n\r\n", 400), (b"0\r\nX: y\r\n z\r\n\r\n", 400), (b"0\r\n\rX", 400),
    (b"0\r\nX: " + b"y" * 5000, 431), (b"0\r\nX: " + b"y" * 5000 + b"\r\n\r\n", 431),
    (b"0\r\n" + b"X:\r\n" * 101 + b"\r\n", 431),
]  # fmt: skip


@pytest.mark.parametrize(("data", "expected"), CHUNKS)
def test_chunked_bodies(data: bytes, expected: bytes | int) -> None:
    assert body(chunked(data)) == expected


def test_extensions_are_bounded_together() -> None:
    chunk = b"1;" + b"e" * 200 + b"\r\nx\r\n"
    assert body(chunked(chunk * 20 + b"0\r\n\r\n")) == b"x" * 20
    assert body(chunked(chunk * 21 + b"0\r\n\r\n")) == 400
