"""Pairs of certificate and key: what is served, what is refused and in which words, and what is made anew.

Files come from the openssl command, another program than the one that reads them here; what is made here is judged by
OpenSSL in a handshake.
"""

from __future__ import annotations

import datetime
import hashlib
import shutil
import ssl
import subprocess
from pathlib import Path

import pytest
from cryptography import x509
from hypothesis import given
from hypothesis import strategies as st

from kore.tls import certificates
from kore.tls.certificates import CertificateError, load_authorities, load_chain, load_key, load_pair, load_revocations

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="the openssl command is missing")

DAY = datetime.timedelta(days=1)

KINDS = {
    "rsa2048": (["-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:2048"], "rsa"),
    "rsa3072": (["-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:3072"], "rsa"),
    "p256": (["-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256"], "ec"),
    "p384": (["-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-384"], "ec"),
}

REFUSED = {
    "rsa1024": (["-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:1024"], "RSA of 1024 bits; allowed are RSA of 2048"),
    "pss": (["-algorithm", "RSA-PSS", "-pkeyopt", "rsa_keygen_bits:2048"], "restricted to RSA-PSS"),
    "p521": (["-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-521"], "the curve secp521r1; allowed are"),
    "k256": (["-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:secp256k1"], "the curve secp256k1; allowed are"),
    "ed25519": (["-algorithm", "ED25519"], "Ed25519, which signs whole messages.*allowed are RSA"),
    "ed448": (["-algorithm", "ED448"], "Ed448, which signs whole messages.*allowed are RSA"),
}


def openssl(*words: str | Path, stdin: bytes = b"") -> bytes:
    done = subprocess.run(["openssl", *map(str, words)], input=stdin, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


class Maker:
    """Keys, authorities and certificates by the openssl command, below one directory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.keys: dict[str, bytes] = {}
        self.root_key = self.key("root", KINDS["p256"][0])
        self.root = self.own("root", "/CN=root", "basicConstraints=critical,CA:TRUE")
        self.middle_key = self.key("middle", KINDS["p256"][0])
        self.middle = self.issued("middle", "root", "/CN=middle", "basicConstraints=critical,CA:TRUE")

    def path(self, name: str) -> Path:
        return self.folder / name

    def key(self, name: str, words: list[str]) -> bytes:
        if not self.path(f"{name}.key").exists():
            openssl("genpkey", *words, "-out", self.path(f"{name}.key"))
        return self.path(f"{name}.key").read_bytes()

    def own(self, name: str, subject: str, *extensions: str, days: int = 30) -> bytes:
        more = [word for one in extensions for word in ("-addext", one)]
        return openssl(
            "req", "-x509", "-new", "-key", self.path(f"{name}.key"), "-subj", subject, "-days", str(days),
            "-config", self._empty(), *more)

    def issued(self, name: str, issuer: str, subject: str, *extensions: str, words: tuple[str, ...] = ()) -> bytes:
        self.path(f"{name}.ext").write_text("\n".join(extensions) + "\n")
        wanted = openssl(
            "req", "-new", "-key", self.path(f"{name}.key"), "-subj", subject, "-config", self._empty())
        self.path(f"{issuer}.pem").write_bytes(getattr(self, issuer))
        return openssl(
            "x509", "-req", "-CA", self.path(f"{issuer}.pem"), "-CAkey", self.path(f"{issuer}.key"),
            "-CAcreateserial", "-days", "30", "-extfile", self.path(f"{name}.ext"), *words, stdin=wanted)

    def _empty(self) -> Path:
        self.path("empty.cnf").write_text("[req]\ndistinguished_name = subject\n[subject]\n")
        return self.path("empty.cnf")


@pytest.fixture(scope="module")
def maker(tmp_path_factory) -> Maker:
    return Maker(tmp_path_factory.mktemp("openssl"))


@pytest.fixture(scope="module")
def served(maker) -> tuple[bytes, bytes]:
    """A certificate for www.example.org, issued by "middle", and its key."""
    key = maker.key("served", KINDS["p256"][0])
    names = "subjectAltName=DNS:www.example.org,DNS:*.example.net,IP:127.0.0.1"
    return maker.issued("served", "middle", "/CN=www.example.org", names), key


@pytest.mark.parametrize("kind", KINDS)
def test_pairs_of_every_kind_that_is_signed_with(maker, kind):
    words, expected = KINDS[kind]
    key = maker.key(kind, words)
    certificate = maker.own(kind, "/CN=a", "subjectAltName=DNS:a.example")
    pair = load_pair(certificate, key)
    assert (pair.kind, pair.names) == (expected, ("a.example",))
    assert pair.chain == (ssl.PEM_cert_to_DER_cert(certificate.decode()),)


@pytest.mark.parametrize("kind", REFUSED)
def test_kinds_that_nobody_signs_with_are_refused_in_clear_words(maker, kind):
    """By the key, and by the certificate when it comes with another key."""
    words, reason = REFUSED[kind]
    key = maker.key(kind, words)
    certificate = maker.own(kind, "/CN=a")
    with pytest.raises(CertificateError, match=rf"^here\.pem: .*{reason}"):
        load_pair(certificate, maker.key("p256", KINDS["p256"][0]), cert_name="here.pem")
    if kind != "pss":
        with pytest.raises(CertificateError, match=rf"^there\.pem: .*{reason}"):
            load_pair(maker.root, key, key_name="there.pem")


def test_a_chain_has_every_certificate_in_order(maker, served):
    certificate, key = served
    pair = load_pair(certificate + maker.middle, key)
    assert [x509.load_der_x509_certificate(der).subject.rfc4514_string() for der in pair.chain] == [
        "CN=www.example.org", "CN=middle"]
    assert pair.names == ("www.example.org", "*.example.net", "127.0.0.1")
    assert len(load_pair(certificate + maker.middle + maker.root, key).chain) == 3


def test_one_file_may_hold_both_and_words_between(maker, served):
    """As a proxy wants it: certificate, key and chain in one file, with text for people and CR LF."""
    certificate, key = served
    both = b"Bag Attributes - for people\r\n" + certificate + key + maker.middle
    pair = load_pair(both.replace(b"\n", b"\r\n"), both)
    assert (len(pair.chain), pair.kind) == (2, "ec")


@pytest.mark.parametrize("form", ["sec1", "parameters", "pkcs1"])
def test_older_forms_of_keys(maker, form):
    if form == "pkcs1":
        maker.key("rsa2048", KINDS["rsa2048"][0])
        key = openssl("rsa", "-in", maker.path("rsa2048.key"), "-traditional")
        assert b"BEGIN RSA PRIVATE KEY" in key
        certificate = maker.own("rsa2048", "/CN=a")
    else:
        maker.key("p256", KINDS["p256"][0])
        key = openssl("ec", "-in", maker.path("p256.key"))
        assert b"BEGIN EC PRIVATE KEY" in key
        if form == "parameters":
            key = openssl("ecparam", "-name", "prime256v1") + key
        certificate = maker.own("p256", "/CN=a")
    assert load_pair(certificate, key).key.private_numbers() == load_key(key).private_numbers()


def test_a_chain_out_of_order_is_refused(maker, served):
    certificate, key = served
    with pytest.raises(CertificateError, match=r"^c\.pem: certificate 2 \(CN=root\) did not issue certificate 1 "
                                               r"\(www\.example\.org, issued by CN=middle\); put the server's own"):
        load_pair(certificate + maker.root + maker.middle, key, cert_name="c.pem")
    with pytest.raises(CertificateError, match=r"certificate 2 \(www\.example\.org\) did not issue certificate 1"):
        load_pair(maker.middle + certificate, key)
    with pytest.raises(CertificateError, match="certificate 2 is the one that key belongs to; it must be the first"):
        load_pair(certificate + maker.middle, maker.middle_key)


def test_a_namesake_of_the_issuer_is_not_the_issuer(maker, served):
    """The names alone prove nothing."""
    maker.key("namesake", KINDS["p256"][0])
    namesake = maker.own("namesake", "/CN=middle", "basicConstraints=critical,CA:TRUE")
    with pytest.raises(CertificateError, match="did not issue certificate 1"):
        load_pair(served[0] + namesake, served[1])


def test_halves_of_different_pairs_are_refused(maker, served):
    for key in (maker.root_key, maker.key("rsa2048", KINDS["rsa2048"][0])):
        with pytest.raises(CertificateError, match=r"^k\.pem: the key does not belong to the certificate in c\.pem$"):
            load_pair(served[0], key, cert_name="c.pem", key_name="k.pem")


@pytest.mark.parametrize("form", [["-aes256"], ["-aes256", "-traditional"]], ids=["pkcs8", "traditional"])
def test_encrypted_keys_are_refused_before_anybody_is_asked_for_a_password(maker, form):
    maker.key("rsa2048", KINDS["rsa2048"][0])
    program = "rsa" if "-traditional" in form else "pkey"
    key = openssl(program, "-in", maker.path("rsa2048.key"), *form, "-passout", "pass:secret")
    with pytest.raises(CertificateError, match=r"^k\.pem: the key is encrypted.*openssl pkey -in FILE -out FILE"):
        load_key(key, "k.pem")


def test_garbage_is_refused_without_repeating_a_key(maker, served):
    certificate, key = served
    middle = len(key) // 2
    damaged = key[:middle] + b"AAAA" + key[middle + 4:]
    for bad, reason in (
        (b"", "holds no private key"), (b"\0" * 100, "holds no private key"), (certificate, "holds no private key"),
        (key[:middle], "holds no private key"), (key + key, "holds 2 private keys; allowed is one"),
        (damaged, "can't be read"), (b"x" * (certificates.PEM_BYTES_MAX + 1), "has 262145 bytes; allowed are 262144"),
    ):
        with pytest.raises(CertificateError, match=rf"^k\.pem: .*{reason}") as raised:
            load_key(bad, "k.pem")
        assert key.split(b"\n")[1][:16].decode() not in str(raised.value)
        assert raised.value.__suppress_context__ or raised.value.__context__ is None
    for bad, reason in (
        (b"", "holds no certificate"), (key, "holds no certificate"), (certificate[:200], "certificate in it is cut"),
        (certificate + maker.middle[:200], "certificate in it is cut off"),
        (certificate * (certificates.CHAIN_MAX + 1), "holds 11 certificates; allowed are 10"),
        (certificate.replace(b"MII", b"MIJ", 1), "certificate 1 can't be read"),
    ):
        with pytest.raises(CertificateError, match=rf"^c\.pem: .*{reason}"):
            load_chain(bad, "c.pem")


@given(st.binary(max_size=2000), st.integers(0, 2000), st.booleans())
def test_whatever_is_in_a_file_is_a_pair_or_a_clear_error(junk, place, replace):
    """A file that is being written, or is none at all, raises CertificateError and nothing else.

    What is not proven by a signature may differ: the certificate's own is for its issuer's clients to check.
    """
    key = certificates.new_key()
    pair = certificates.self_signed(["a.example"], key, lifetime=DAY)
    pem = certificates.chain_pem(pair.chain) + certificates.key_pem(key)
    changed = pem[:place] + junk + pem[place + (len(junk) if replace else 0):]
    try:
        found = load_pair(changed, changed)
    except CertificateError:
        return
    public = x509.load_der_x509_certificate(found.chain[0]).public_key()
    assert public == found.key.public_key() == key.public_key()


def test_certificates_that_openssl_would_not_serve_are_refused(maker):
    maker.key("sha1", KINDS["p256"][0])
    old = maker.issued("sha1", "root", "/CN=old", words=("-sha1",))
    with pytest.raises(CertificateError, match=r"^c\.pem: certificate 1 \(CN=old\) is signed with sha1, which nobody"):
        load_chain(old, "c.pem")


def test_what_clients_will_object_to_is_told(maker, served):
    pair = load_pair(*served)
    now = datetime.datetime.now(datetime.UTC)
    for name in ("www.example.org", "WWW.example.org", "a.example.net", "*", "*.example.net"):
        assert pair.remarks(name, now) == []
    assert pair.remarks("example.org", now) == [
        "is for www.example.org, *.example.net, 127.0.0.1, not for example.org"]
    assert pair.remarks("a.b.example.net", now)[0].endswith("not for a.b.example.net")
    (late,) = pair.remarks("www.example.org", now + 31 * DAY)
    assert late == f"expired on {pair.not_after:%Y-%m-%d %H:%M} UTC: clients refuse it"
    (soon,) = pair.remarks("www.example.org", now + 26 * DAY)
    assert soon.startswith("expires on ")
    (early,) = pair.remarks("www.example.org", now - 2 * DAY)
    assert early.startswith("is not valid before ")


def test_authorities_of_clients(maker, served):
    assert len(load_authorities(maker.root + maker.middle)) == 2
    leaf = maker.issued("served", "middle", "/CN=leaf", "basicConstraints=CA:FALSE")
    with pytest.raises(CertificateError, match=r"^ca\.pem: certificate 2 \(CN=leaf\) is no authority \(CA:FALSE\)"):
        load_authorities(maker.root + leaf, "ca.pem")
    with pytest.raises(CertificateError, match=r"^ca\.pem: holds no certificate"):
        load_authorities(maker.root_key, "ca.pem")


def test_revocation_lists(maker, tmp_path):
    (tmp_path / "index").write_text("")
    (tmp_path / "root.pem").write_bytes(maker.root)
    (tmp_path / "ca.cnf").write_text(
        f"[ca]\ndefault_ca = own\n[own]\ndatabase = {tmp_path}/index\ndefault_md = sha256\ndefault_crl_days = 30\n")
    crl = openssl(
        "ca", "-gencrl", "-config", tmp_path / "ca.cnf", "-cert", tmp_path / "root.pem", "-keyfile",
        maker.path("root.key"))
    (first, second) = load_revocations(crl + crl)
    assert x509.load_der_x509_crl(first).issuer.rfc4514_string() == "CN=root"
    assert first == second
    for bad, reason in ((b"", "holds no revocation list"), (crl[:200], "cut off"), (maker.root, "holds no")):
        with pytest.raises(CertificateError, match=rf"^crl\.pem: .*{reason}"):
            load_revocations(bad, "crl.pem")


def shake(pair: certificates.Pair, trusted: bytes, name: str, folder: Path, server=None) -> dict:
    """A handshake with `pair` by a client that trusts `trusted` (DER) and wants `name`: what the client saw."""
    if server is None:
        server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    (folder / "served.pem").write_bytes(certificates.chain_pem(pair.chain) + certificates.key_pem(pair.key))
    server.load_cert_chain(folder / "served.pem")
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.load_verify_locations(cadata=trusted)
    client.verify_flags |= ssl.VERIFY_X509_STRICT
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    ours = server.wrap_bio(there, back, server_side=True)
    theirs = client.wrap_bio(back, there, server_hostname=name)
    for _ in range(4):
        for one in (theirs, ours):
            try:
                one.do_handshake()
            except ssl.SSLWantReadError:
                pass
    return theirs.getpeercert()


def test_an_own_authority_is_trusted_by_strict_clients(tmp_path):
    """Names, patterns and addresses, by OpenSSL with VERIFY_X509_STRICT; and by no client that does not know it."""
    authority_key, key = certificates.new_key(), certificates.new_key()
    authority = certificates.new_authority("kore of a new user", authority_key, lifetime=30 * DAY)
    (trusted,) = load_authorities(authority.public_bytes(certificates.Encoding.PEM))
    names = ["localhost", "*.example.org", "127.0.0.1", "::1", "*", "[a]x", "a b"]
    pair = certificates.issue(names, key, authority, authority_key, lifetime=DAY)
    assert pair.names == ("localhost", "*.example.org", "127.0.0.1", "::1")
    for name in ("localhost", "a.example.org", "127.0.0.1", "::1"):
        assert shake(pair, trusted, name, tmp_path)["subject"] == ((("commonName", "localhost"),),)
    with pytest.raises(ssl.SSLCertVerificationError, match="mismatch"):
        shake(pair, trusted, "example.org", tmp_path)
    stranger = certificates.new_authority("kore of a new user", certificates.new_key(), lifetime=DAY)
    with pytest.raises(ssl.SSLCertVerificationError):
        shake(pair, stranger.public_bytes(certificates.Encoding.DER), "localhost", tmp_path)


def test_a_self_signed_certificate_is_loaded_as_any_other(tmp_path):
    key = certificates.new_key()
    pair = certificates.self_signed(["a.example"], key, lifetime=DAY)
    assert load_pair(certificates.chain_pem(pair.chain), certificates.key_pem(key)).chain == pair.chain
    assert shake(pair, pair.chain[0], "a.example", tmp_path) != {}
    assert certificates.self_signed(["*", "x" * 300], key, lifetime=DAY).names == ()


def test_a_challenge_certificate_is_what_rfc_8737_asks_for():
    key = certificates.new_key()
    digest = hashlib.sha256(b"token.thumbprint").digest()
    shown = openssl("x509", "-inform", "DER", "-noout", "-text", stdin=certificates.challenge("a.example", key, digest))
    text = shown.decode()
    assert "1.3.6.1.5.5.7.1.31: critical" in text
    assert "DNS:a.example\n" in text
    extension = x509.load_der_x509_certificate(certificates.challenge("a.example", key, digest)).extensions
    value = extension.get_extension_for_oid(certificates.ACME_IDENTIFIER)
    assert (value.critical, value.value.value) == (True, b"\x04\x20" + digest)
    with pytest.raises(CertificateError, match="a digest has 32 bytes, not 31"):
        certificates.challenge("a.example", key, digest[:31])


def test_a_request_names_every_name_and_is_signed():
    long = ".".join(["a" * 60] * 3)
    key = certificates.new_key()
    text = openssl(
        "req", "-inform", "DER", "-noout", "-text", "-verify", stdin=certificates.request(["a.example", long], key))
    assert f"DNS:a.example, DNS:{long}".encode() in text


def test_keys_show_nothing_of_themselves():
    """What a log or a traceback prints of a pair has no number of its key."""
    key = certificates.new_key()
    pair = certificates.self_signed(["a.example"], key, lifetime=DAY)
    assert str(key.private_numbers().private_value) not in repr(pair)
