"""What is read of a ClientHello: names, protocols and tickets of real ones, the same at every cut, and hostile ones."""

from __future__ import annotations

import ssl
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kore.tls.hello import HELLO_BYTES_MAX, MALFORMED, Hello, HelloReader, TooLongError


def real_hello(name: str | None = "www.Example.test", alpn: tuple[str, ...] = (), version: str = "1.3") -> bytes:
    """The first bytes that OpenSSL sends as a client."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.maximum_version = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}[version]
    if alpn:
        context.set_alpn_protocols(list(alpn))
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = context.wrap_bio(incoming, outgoing, server_hostname=name)
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    return outgoing.read()


def extension(kind: int, data: bytes) -> bytes:
    return struct.pack("!HH", kind, len(data)) + data


def hello(extensions: bytes, *, tail: bytes = b"", session: bytes = b"") -> bytes:
    """A ClientHello of this make, as a handshake message."""
    body = b"\3\3" + b"r" * 32 + bytes([len(session)]) + session + b"\0\2\x13\1" + b"\1\0"
    body += struct.pack("!H", len(extensions)) + extensions + tail
    return b"\1" + len(body).to_bytes(3, "big") + body


def records(message: bytes, size: int = 16384) -> bytes:
    return b"".join(
        b"\x16\3\1" + struct.pack("!H", len(piece)) + piece
        for piece in (message[at : at + size] for at in range(0, len(message), size))
    )


def sni(*names: bytes, kind: int = 0) -> bytes:
    listed = b"".join(bytes([kind]) + struct.pack("!H", len(name)) + name for name in names)
    return extension(0, struct.pack("!H", len(listed)) + listed)


def protocols(*names: bytes) -> bytes:
    listed = b"".join(bytes([len(name)]) + name for name in names)
    return extension(16, struct.pack("!H", len(listed)) + listed)


def read(*pieces: bytes) -> Hello | None:
    """What is found in the first pieces that are enough."""
    reader = HelloReader()
    for piece in pieces:
        found = reader.feed(piece)
        if found is not None:
            return found
    return None


@pytest.mark.parametrize("version", ["1.2", "1.3"])
def test_real_ones(version):
    found = read(real_hello(version=version, alpn=("h2", "http/1.1")))
    assert found == Hello("www.example.test", (b"h2", b"http/1.1"))
    assert read(real_hello(None, version=version)) == Hello()


def test_any_cut_gives_the_same():
    whole = real_hello(alpn=("http/1.1",))
    expected = Hello("www.example.test", (b"http/1.1",))
    for at in range(1, len(whole)):
        assert read(whole[:at]) is None
        assert read(whole[:at], whole[at:]) == expected
    assert read(*(whole[at : at + 1] for at in range(len(whole)))) == expected


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 37, 200])
def test_a_message_in_many_records_is_one(size):
    whole = records(hello(sni(b"a.test") + protocols(b"x")), size)
    assert read(whole) == Hello("a.test", (b"x",))
    for at in range(1, len(whole)):
        assert read(whole[:at]) is None


def test_what_comes_behind_it_stays_with_the_raw_bytes():
    reader = HelloReader()
    whole = records(hello(sni(b"a.test")))
    assert reader.feed(whole + b"more") == Hello("a.test")
    assert reader.raw == whole + b"more"


def test_names_are_normal():
    assert read(records(hello(sni(b"WWW.A.test.")))) == Hello("www.a.test")


def test_tickets():
    ticket = bytes(range(100))
    assert read(records(hello(extension(35, ticket)))).ticket == ticket[:16]
    assert read(records(hello(extension(35, b"")))).ticket == b""
    identity = struct.pack("!H", len(ticket)) + ticket + b"\0\0\0\0"
    psk = struct.pack("!H", len(identity)) + identity + b"\0\x21\x20" + b"b" * 32
    assert read(records(hello(extension(35, b"x" * 20) + extension(41, psk)))).ticket == ticket[:16]


@pytest.mark.parametrize("extensions", [
    sni(), sni(b""), sni(b"a", b"b"), sni(b"a", kind=1), sni(b"a\0b"), sni(b"a b"), sni("é".encode()), sni(b"x" * 256),
    sni(b"a") + sni(b"a"), protocols(), protocols(b""), protocols(b"a") + protocols(b"a"),
    extension(0, b""), extension(0, b"\0\5\0\0\1a"), extension(16, b"\0\1"), extension(16, b"\0\3\5ab"),
    extension(41, b""), extension(41, b"\0\0"), b"\0", b"\0\0\0", b"\0\0\0\5abc",
])  # fmt: skip
def test_malformed_extensions_name_nobody(extensions):
    assert read(records(hello(extensions))) is MALFORMED


@pytest.mark.parametrize("data", [
    b"\x15\3\1\0\2\1\0", b"\x17\3\3\0\1x", b"\x80\x2e\1\0\2", b"\x16\2\0\0\1\1", b"\x16\3\1\0\0", b"\x16\3\1\x40\1",
    records(b"\2\0\0\1x"), records(hello(b"", tail=b"x")), records(b"\1\0\0\1x"), b"\0", b"\xff",
    records(b"\1\0") + b"\x17",
])  # fmt: skip
def test_what_is_no_client_hello(data):
    assert read(data) is MALFORMED
    assert read(*(data[at : at + 1] for at in range(len(data)))) is MALFORMED


def test_clear_text_is_told_by_its_first_letter():
    reader = HelloReader()
    reader.feed(b"G")
    assert reader.clear_text
    reader = HelloReader()
    reader.feed(real_hello()[:1])
    assert not reader.clear_text


def test_it_ends_somewhere():
    with pytest.raises(TooLongError):
        read(records(b"\1" + (HELLO_BYTES_MAX + 1).to_bytes(3, "big")))
    with pytest.raises(TooLongError):  # so small in records that these are too long
        read(records(hello(extension(21, b"x" * 8000)), 1))
    almost = hello(extension(21, b"x" * 20000))
    assert read(records(almost)) == Hello()


def outcome(pieces: list[bytes]) -> object:
    try:
        return read(*pieces)
    except TooLongError:
        return TooLongError


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_nothing_breaks_it_and_no_cut_changes_it(data):
    whole = bytearray(real_hello(alpn=("http/1.1",)) if data.draw(st.booleans()) else records(hello(sni(b"a.test")), 9))
    for _ in range(data.draw(st.integers(0, 6))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    whole = bytes(whole[: data.draw(st.integers(0, len(whole)))])
    expected = outcome([whole])
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=8)))
    pieces = [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    assert outcome(pieces) == expected
