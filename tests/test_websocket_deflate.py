"""permessage-deflate: what is agreed on with whom, and messages that fit what was agreed on (RFC 7692)."""

from __future__ import annotations

import os
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kore.http.websocket.deflate import COMPRESS_BYTES_MIN, Inflater, compress, negotiate
from kore.http.websocket.frames import WebSocketError
from tests.websocket_harness import deflated

PLAIN = "permessage-deflate; server_no_context_takeover; client_no_context_takeover"

OFFERS = [
    ("permessage-deflate", PLAIN, 15),
    ("permessage-deflate; client_max_window_bits", PLAIN, 15),
    ("permessage-deflate;client_max_window_bits=8;client_no_context_takeover", PLAIN, 15),
    ("permessage-deflate; server_no_context_takeover", PLAIN, 15),
    ("permessage-deflate; server_max_window_bits=10", PLAIN + "; server_max_window_bits=10", 10),
    ('permessage-deflate; server_max_window_bits="9"', PLAIN + "; server_max_window_bits=9", 9),
    ("permessage-deflate ; server_max_window_bits = 15", PLAIN + "; server_max_window_bits=15", 15),
    ("permessage-deflate; server_max_window_bits=8", None, 0),  # what zlib cannot do
    ("permessage-deflate; server_max_window_bits=8, permessage-deflate", PLAIN, 15),
    ("permessage-deflate; server_max_window_bits", None, 0),
    ("permessage-deflate; server_max_window_bits=7", None, 0),
    ("permessage-deflate; server_max_window_bits=16", None, 0),
    ("permessage-deflate; server_max_window_bits=010", None, 0),
    ("permessage-deflate; client_max_window_bits=", ValueError, 0),
    ("permessage-deflate; client_max_window_bits=16", None, 0),
    ("permessage-deflate; client_no_context_takeover=1", None, 0),
    ("permessage-deflate; server_no_context_takeover; server_no_context_takeover", None, 0),
    ("permessage-deflate; unknown", None, 0),
    ("permessage-deflate; unknown=1, permessage-deflate; server_max_window_bits=12",
     PLAIN + "; server_max_window_bits=12", 12),
    ("x-webkit-deflate-frame", None, 0),
    ("other; a=1; b=\"c\", permessage-deflate", PLAIN, 15),
    ("permessage-deflate, permessage-deflate; server_max_window_bits=9", PLAIN, 15),
    (",, permessage-deflate ,", PLAIN, 15),
    ("", None, 0),
    (" , ", None, 0),
    ("permessage deflate", ValueError, 0),
    ("permessage-deflate; ", ValueError, 0),
    ("permessage-deflate; a=\"b", ValueError, 0),
    ("=", ValueError, 0),
    (";", ValueError, 0),
    ("a" * 4000 + "\x7f", ValueError, 0),
    ("a;b" * 1300 + "?", ValueError, 0),
]  # fmt: skip


@pytest.mark.parametrize(("offer", "field", "bits"), OFFERS, ids=[offer[:60] for offer, _, _ in OFFERS])
def test_negotiation(offer: str, field, bits: int) -> None:
    """The first offer that can be met is met; what is no list of extensions is an error."""
    if field is ValueError:
        with pytest.raises(ValueError):
            negotiate(offer)
        return
    agreed = negotiate(offer)
    if field is None:
        assert agreed is None
    else:
        assert agreed is not None
        assert agreed == (field, bits)


@pytest.mark.parametrize("bits", range(9, 16))
def test_messages_fit_the_window_and_need_no_other_message(bits: int) -> None:
    """Each message inflates alone, in the order sent or not, within the window that was agreed on."""
    texts = [b"the quick brown fox " * count for count in (60, 400, 3000)]
    packed = [compress(text, bits) for text in texts] + [compress(texts[0], bits)]
    for text, found in reversed(list(zip([*texts, texts[0]], packed, strict=True))):
        assert found is not None
        assert len(found) < len(text) / 4
        assert zlib.decompressobj(-bits).decompress(found + b"\0\0\xff\xff") == text
    assert packed[0] == packed[3]


def test_what_does_not_get_shorter_is_not_compressed() -> None:
    """Random bytes are sent as they are."""
    assert compress(os.urandom(5000), 15) is None
    assert COMPRESS_BYTES_MIN >= 126


def inflate(data: bytes, pieces: int, room: int) -> bytes:
    inflater, out = Inflater(), b""
    for begin in range(0, len(data), pieces):
        out += inflater.inflate(data[begin : begin + pieces], room - len(out))
    return out + inflater.end(room - len(out))


@given(st.binary(max_size=3000), st.integers(1, 50), st.integers(0, 9))
def test_any_message_in_any_pieces(data: bytes, pieces: int, level: int) -> None:
    """What a client compresses is inflated, and one byte less of room is not enough."""
    packed = deflated(data, level)
    assert inflate(packed, pieces, len(data)) == data
    if data:
        with pytest.raises(WebSocketError) as caught:
            inflate(packed, pieces, len(data) - 1)
        assert caught.value.code == 1009


@given(st.binary(max_size=300))
def test_garbage_is_refused_or_inflated(data: bytes) -> None:
    """Nothing but a refusal comes of any bytes."""
    try:
        assert len(inflate(data, 7, 5000)) <= 5000
    except WebSocketError as error:
        assert error.code in (1002, 1009)


def test_final_blocks_within_bounds() -> None:
    """Some clients end with a final block; a message of nothing else is refused after a few."""
    packer = zlib.compressobj(6, zlib.DEFLATED, -15)
    final = packer.compress(b"Hello") + packer.flush()
    assert inflate(final + b"\0", 100, 100) == b"Hello"
    assert inflate(final, 1, 100) == b"Hello"
    assert inflate(final + deflated(b" there"), 3, 100) == b"Hello there"
    with pytest.raises(WebSocketError):
        inflate(b"\x03\0" * 100, 100, 100)
