"""No part of a private key is in the memory of any other process than the key manager's: all of it is searched."""

from __future__ import annotations

import base64
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from tests.keymgr_harness import key_server, load
from tests.privileges_harness import needs_root
from tests.support import children, wait_until
from tests.tls_harness import Pair, authority, issue, server_pair

PIECE = 16
"""Bytes of a secret that are looked for: nobody finds them by chance."""

EMPTY = bytes(4096)  # most of what is mapped was never touched

DIGIT_BITS = 30  # of a Python int: a digit in each 32 bits


def secrets_of(pair: Pair) -> dict[str, int]:
    """The numbers that nobody may know."""
    numbers = pair.key.private_numbers()
    if not isinstance(pair.key, rsa.RSAPrivateKey):
        return {"scalar": numbers.private_value}
    return {name: getattr(numbers, name) for name in ("d", "p", "q", "dmp1", "dmq1", "iqmp")}


def forms(value: int) -> Iterator[tuple[str, bytes]]:
    """A number as processes keep it: in both byte orders, and as Python does."""
    size = (value.bit_length() + 7) // 8
    yield "big-endian", value.to_bytes(size, "big")
    yield "little-endian", value.to_bytes(size, "little")
    digits = (value >> shift & (1 << DIGIT_BITS) - 1 for shift in range(0, value.bit_length(), DIGIT_BITS))
    yield "an int of Python", b"".join(digit.to_bytes(4, "little") for digit in digits)


def pieces(data: bytes) -> Iterator[bytes]:
    """One at the start, which is what an allocator spoils first of what was freed, and one further on."""
    for start in (0, (len(data) - PIECE) // 3 * 2):
        yield data[start : start + PIECE]


def texts(pair: Pair) -> Iterator[tuple[str, bytes]]:
    """The lines of the PEM file, and base64 at any offset, as far as they are of what is secret."""
    der = pair.key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
    for name, value in secrets_of(pair).items():
        secret = value.to_bytes((value.bit_length() + 7) // 8, "big")
        start = der.index(secret)
        for offset in range(3):
            inner = der[start + offset : start + len(secret)]
            inner = inner[: len(inner) - len(inner) % 3]
            yield f"base64 of {name}", base64.b64encode(inner)
        lines = pair.key_pem.decode().splitlines()[1:-1]
        for number, line in enumerate(lines):
            if start <= number * 48 and number * 48 + 48 <= start + len(secret):
                yield f"a line of PEM with {name}", line.encode()


def needles(pair: Pair) -> dict[bytes, str]:
    """What is looked for, and what it is."""
    found = {}
    for name, value in secrets_of(pair).items():
        for form, data in forms(value):
            found |= dict.fromkeys(pieces(data), f"{name}, {form}")
    for what, text in texts(pair):
        found |= dict.fromkeys((text[:16], text[18:34]), what)  # a line of PEM may end between the two
    return found


def memory(pid: int) -> Iterator[bytes]:
    """All that a process has in its memory, by mapping."""
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as file:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            first, last, rights = re.match(r"([0-9a-f]+)-([0-9a-f]+) (\S+)", line).groups()
            if not rights.startswith("r") or rights[2] == "x" or line.endswith(("[vvar]", "[vvar_vclock]")):
                continue  # code is what is in its file
            place, end = int(first, 16), int(last, 16)
            try:
                file.seek(place)
                data = file.read(end - place)
            except OSError:
                continue  # a mapping of a device, or one that is gone
            yield (data or b"").replace(EMPTY, b"")


def found_in(pid: int, wanted: dict[bytes, str]) -> set[str]:
    """What of it is there."""
    found = set()
    for data in memory(pid):
        found |= {what for needle, what in wanted.items() if needle in data}
    return found


@needs_root
def test_no_part_of_a_key_outside_the_key_manager(tmp_path, engine):
    """During load, after a reload, with the old keys and the new; and the search finds them where they are."""
    kinds = ("rsa2048", "p256")
    old = [server_pair("a.test", kind) for kind in kinds]
    new = [issue("a.test", kind=kind, issuer=authority()) for kind in kinds]
    wanted = {needle: what for pair in (*old, *new) for needle, what in needles(pair).items()}
    with key_server(tmp_path, engine, kinds=kinds) as server:
        with load(server, threads=1, kind="RSA") as one, load(server, threads=1, kind="ECDSA") as other:
            one[0].more_done()
            for kind, pair in zip(kinds, new, strict=True):
                server.put(f"a.test-{kind}", pair)
            server.program.signal(signal.SIGUSR1)
            server.program.wait_for("a new (?:rsa|ec) pair is in use", count=2)
            wait_until(lambda: server.shown(kind="RSA") == new[0].chain[0], "it is shown")
            one[0].more_done()
            other[0].more_done()
            check(server, wanted)
        check(server, wanted)
        there = found_in(server.manager, wanted)
        assert any("little-endian" in what for what in there), "the search finds what is there"
        assert any(what.startswith("scalar") for what in there)
        assert any(what.startswith("iqmp") for what in there)


def check(server, wanted: dict[bytes, str]) -> None:
    """All processes of the server but one."""
    manager = server.manager
    family = [server.program.pid, *children(server.program.pid)]
    family += [child for pid in family[1:] for child in children(pid)]
    assert set(server.workers_pids) <= set(family)
    for pid in family:
        if pid != manager:
            assert not found_in(pid, wanted), f"in {Path(f'/proc/{pid}/cmdline').read_bytes()!r}"


@needs_root
def test_a_search_finds_a_key_in_a_worker_that_has_one(tmp_path):
    """The search of workers is no blind one: here the application reads the key itself."""
    pair = server_pair("a.test", "p256")
    text = f"KEPT.append({pair.key_pem!r})"
    with key_server(tmp_path, os.environ.get("KORE_IO") or "epoll", kinds=("p256",), text=text) as server:
        assert any(found_in(pid, needles(pair)) for pid in server.workers_pids)
