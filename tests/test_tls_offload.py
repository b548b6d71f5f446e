"""Handshakes whose private operation another process does: TLS 1.2 and 1.3, RSA and ECDSA, and what it must refuse."""

from __future__ import annotations

import gc
import ssl

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519

from kore.tls.libssl import TlsError, library
from kore.tls.offload import offload
from tests.tls_harness import authority, issue, key_process, server_pair

VERSIONS = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}


def client_context(version: str = "1.3") -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=authority().pem.decode())
    context.minimum_version = context.maximum_version = VERSIONS[version]
    return context


def shake_hands(server: ssl.SSLContext, client: ssl.SSLContext, name: str = "a.test") -> ssl.SSLObject:
    """Both ends in memory; the client's, once the handshake is done and a word has gone each way."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ours = server.wrap_bio(to_server, to_client, server_side=True)
    theirs = client.wrap_bio(to_client, to_server, server_hostname=name)
    done: set[ssl.SSLObject] = set()
    for _ in range(6):
        for end in (theirs, ours):
            try:
                end.do_handshake()
                done.add(end)
            except ssl.SSLWantReadError:
                pass
    assert len(done) == 2
    theirs.write(b"ping")
    assert ours.read(8) == b"ping"
    ours.write(b"pong")
    assert theirs.read(8) == b"pong"
    return theirs


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("kind", ["rsa2048", "rsa3072", "rsa4096", "p256", "p384"])
def test_another_process_signs(version, kind):
    pair = server_pair("a.test", kind)
    with key_process({(3, "rsa" if kind[0] == "r" else "ec"): pair}) as keys:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        assert offload().install(context, pair.chain, keys, 3) == ("rsa" if kind[0] == "r" else "ec")
        end = shake_hands(context, client_context(version))
        assert end.getpeercert(True) == pair.chain[0]
        assert end.version() == f"TLSv{version}"
        assert keys.asked == 1


def test_one_domain_has_both_kinds_of_keys():
    pairs = {(0, "rsa"): server_pair("a.test", "rsa2048"), (0, "ec"): server_pair("a.test", "p256")}
    with key_process(pairs) as keys:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        for pair in pairs.values():
            offload().install(context, pair.chain, keys, 0)
        for kind, ciphers in (("rsa", "ECDHE-RSA-AES128-GCM-SHA256"), ("ec", "ECDHE-ECDSA-AES128-GCM-SHA256")):
            client = client_context("1.2")
            client.set_ciphers(ciphers)
            assert shake_hands(context, client).getpeercert(True) == pairs[0, kind].chain[0]


def test_intermediate_certificates_are_sent():
    middle = issue("Middle", issuer=authority(), authority=True)
    pair = issue("a.test", issuer=middle)
    assert len(pair.chain) == 2
    with key_process({(0, "ec"): pair}) as keys:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        offload().install(context, pair.chain, keys, 0)
        shake_hands(context, client_context())  # verifies up to the root, which is all it has


def test_a_signature_that_cannot_be_had_fails_the_handshake_and_is_told():
    pair = server_pair("a.test", "p256")
    with key_process({}) as keys:  # it ends at the first question
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        offload().install(context, pair.chain, keys, 0)
        offload().failure = None
        with pytest.raises(ssl.SSLError):
            shake_hands(context, client_context())
        assert isinstance(offload().failure, RuntimeError)
        assert not keys.available


@pytest.mark.parametrize("kind", ["rsa2048", "p256"])
def test_an_answer_of_the_wrong_size_is_no_signature(kind):
    class Wrong:
        available = True

        def sign(self, *_: object) -> bytes:
            return b"x" * 300

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    offload().install(context, server_pair("a.test", kind).chain, Wrong(), 0)
    offload().failure = None
    with pytest.raises(ssl.SSLError):
        shake_hands(context, client_context())
    assert "of 300 bytes" in str(offload().failure)


def test_keys_that_cannot_be_kept_elsewhere_are_refused():
    class Never:
        available = True

        def sign(self, *_: object) -> bytes:
            raise AssertionError

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with pytest.raises(ValueError, match="neither RSA nor EC"):
        offload().install(context, issue_with(ed25519.Ed25519PrivateKey.generate()), Never(), 0)
    with pytest.raises(ValueError, match="1024 bits, not 2048 to 8192"):
        offload().install(context, issue("a.test", kind="rsa1024").chain, Never(), 0)
    for wrong in (b"", b"\0" * 40, server_pair("a.test", "p256").chain[0] + b"\0"):
        with pytest.raises(ValueError, match="no certificate in DER"):
            offload().install(context, [wrong], Never(), 0)


def issue_with(key):
    """A certificate whose key is `key`."""
    from datetime import UTC, datetime, timedelta

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes

    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder().subject_name(x509.Name([])).issuer_name(authority().certificate.subject)
        .public_key(key.public_key()).serial_number(1).not_valid_before(now).not_valid_after(now + timedelta(1))
        .sign(authority().key, hashes.SHA256())
    )
    return [made.public_bytes(serialization.Encoding.DER)]


def test_keys_go_with_their_context():
    pair = server_pair("a.test", "p256")
    before = len(offload()._held)
    with key_process({(0, "ec"): pair}) as keys:
        for _ in range(20):
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            offload().install(context, pair.chain, keys, 0)
            shake_hands(context, client_context())
    del context
    gc.collect()
    assert len(offload()._held) == before


def test_a_library_that_is_not_as_expected_is_refused(monkeypatch):
    monkeypatch.setattr(library().handle, "SSL_CTX_get_options", lambda _: 1)
    with pytest.raises(TlsError, match="not laid out as expected"):
        library()._check_layout()
