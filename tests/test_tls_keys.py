"""The keys in the key manager: what is signed and what is not, and pairs that are loaded, replaced and found wrong."""

from __future__ import annotations

import datetime
import hashlib
import os
import secrets
import subprocess

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa, utils
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from kore.tls import certificates
from kore.tls import keys as keys_module
from kore.tls.encoding import check, is_pss, mgf1
from kore.tls.entropy import seed_from
from kore.tls.keys import DomainFiles, KeyStore, NoKeyError
from kore.tls.messages import ANY_KEY, KEY_ID_BYTES, Ask, MalformedError, Said
from kore.tls.tickets import MASTERS_MAX, Masters
from tests.tls_harness import issue, server_pair

HASHES = {"sha256": hashes.SHA256(), "sha384": hashes.SHA384(), "sha512": hashes.SHA512()}
KEY = rsa.generate_private_key(65537, 2048)


def prime(bits: int) -> int:
    command = ["openssl", "prime", "-generate", "-bits", str(bits)]
    return int(subprocess.run(command, capture_output=True, check=True).stdout)


def odd_key() -> rsa.RSAPrivateKey:
    """A modulus of 2049 bits, whose encoding is a byte shorter than itself; OpenSSL makes none."""
    while True:
        p, q = prime(1025), prime(1024)
        if (p * q).bit_length() == 2049 and (p - 1) % 65537 and (q - 1) % 65537:
            d = pow(65537, -1, (p - 1) * (q - 1))
            public = rsa.RSAPublicNumbers(65537, p * q)
            return rsa.RSAPrivateNumbers(p, q, d, d % (p - 1), d % (q - 1), pow(q, -1, p), public).private_key()


ODD_KEY = odd_key()
BITS = {KEY: 2048, ODD_KEY: 2049}


def encoded(key, pad, name: str) -> bytes:
    """What a real signature signs: the block that the private operation was given."""
    signature = int.from_bytes(key.sign(b"a handshake", pad, HASHES[name]))
    numbers = key.public_key().public_numbers()
    return pow(signature, numbers.e, numbers.n).to_bytes((key.key_size + 7) // 8)


def pss(key, name: str, salt: int | None = None) -> bytes:
    size = HASHES[name].digest_size if salt is None else salt
    return encoded(key, padding.PSS(padding.MGF1(HASHES[name]), size), name)


def digest_info(name: str) -> bytes:
    return encoded(KEY, padding.PKCS1v15(), name).partition(b"\0\1")[2].partition(b"\0")[2]


@pytest.mark.parametrize("name", HASHES)
def test_what_a_handshake_signs_is_let_through(name):
    check("rsa", 1, digest_info(name), 2048)
    check("ec", 0, bytes(HASHES[name].digest_size), 256)
    for key, bits in BITS.items():
        check("rsa", 3, pss(key, name), bits)


def flipped(block: bytes, place: int, bit: int = 1) -> bytes:
    changed = bytearray(block)
    changed[place] ^= bit
    return bytes(changed)


MALFORMED = {
    "nothing": ("rsa", 1, b""),
    "a bare hash": ("rsa", 1, bytes(32)),
    "sha-1": ("rsa", 1, bytes.fromhex("3021300906052b0e03021a05000414") + bytes(20)),
    "md5 and sha-1, as TLS 1.1 did": ("rsa", 1, bytes(36)),
    "a byte too few": ("rsa", 1, digest_info("sha256")[:-1]),
    "a byte too many": ("rsa", 1, digest_info("sha256") + b"\0"),
    "another hash's length": ("rsa", 1, digest_info("sha256")[:19] + bytes(48)),
    "another object identifier": ("rsa", 1, flipped(digest_info("sha256"), 14)),
    "text": ("rsa", 1, b"whatever I would like to have signed by this server"),
    "a PSS block to be padded": ("rsa", 1, pss(KEY, "sha256")),
    "PKCS #1, padded already": ("rsa", 3, encoded(KEY, padding.PKCS1v15(), "sha256")),
    "a ciphertext": ("rsa", 3, KEY.public_key().encrypt(b"premaster", padding.PKCS1v15())),
    "noise": ("rsa", 3, secrets.token_bytes(256)),
    "zeros": ("rsa", 3, bytes(256)),
    "one": ("rsa", 3, bytes(255) + b"\1"),
    "a PSS block without its end": ("rsa", 3, pss(KEY, "sha256")[:-1]),
    "a longer one": ("rsa", 3, b"\0" + pss(KEY, "sha256")),
    "the wrong trailer": ("rsa", 3, flipped(pss(KEY, "sha256"), 255)),
    "the topmost bit": ("rsa", 3, flipped(pss(KEY, "sha256"), 0, 0x80)),
    "a changed hash": ("rsa", 3, flipped(pss(KEY, "sha256"), 254)),
    "a changed pad": ("rsa", 3, flipped(pss(KEY, "sha256"), 5)),
    "no salt": ("rsa", 3, pss(KEY, "sha256", 0)),
    "a shorter salt": ("rsa", 3, pss(KEY, "sha256", 20)),
    "the longest salt": ("rsa", 3, pss(KEY, "sha256", 222)),
    "two hashes": ("rsa", 3, encoded(KEY, padding.PSS(padding.MGF1(hashes.SHA384()), 32), "sha256")),
    "another key's size": ("rsa", 3, pss(ODD_KEY, "sha256")),
    "no padding is named": ("rsa", 0, digest_info("sha256")),
    "OAEP": ("rsa", 4, bytes(256)),
    "an unknown padding": ("rsa", 255, bytes(256)),
    "a digest of 20 bytes": ("ec", 0, bytes(20)),
    "of 31": ("ec", 0, bytes(31)),
    "of 65": ("ec", 0, bytes(65)),
    "a digest with padding": ("ec", 1, bytes(32)),
    "an unknown kind": ("dsa", 0, bytes(32)),
}


@pytest.mark.parametrize("what", MALFORMED)
def test_everything_else_is_refused(what):
    kind, pad, block = MALFORMED[what]
    with pytest.raises(MalformedError):
        check(kind, pad, block, 2048)


def test_the_first_byte_of_an_odd_modulus_is_zero():
    block = pss(ODD_KEY, "sha256")
    assert is_pss(block, 2049, "sha256")
    assert not is_pss(flipped(block, 0), 2049, "sha256")


def test_the_mask_is_that_of_the_standard():
    """By a vector computed from the definition: blocks of Hash(seed || counter)."""
    expected = hashlib.sha256(b"seed\0\0\0\0").digest() + hashlib.sha256(b"seed\0\0\0\1").digest()
    assert mgf1(b"seed", 40, "sha256") == expected[:40]


class Kept:
    """A store on files, what it said, and what it had workers told."""

    def __init__(self, directory, *files: DomainFiles) -> None:
        self.directory = directory
        self.lines: list[str] = []
        self.told: list = []
        self.store = KeyStore(files, lambda _, text: self.lines.append(text), self.told.append)

    def settle(self) -> None:
        """Two looks: a change that stays is taken at the second."""
        self.store.look()
        self.store.look()

    def said(self) -> str:
        lines, self.lines[:] = list(self.lines), []
        return "\n".join(lines)


def put(directory, stem: str, pair, part: str = "both") -> tuple[str, str]:
    cert, key = directory / f"{stem}.pem", directory / f"{stem}.key"
    if part in ("both", "cert"):
        cert.write_bytes(pair.pem)
    if part in ("both", "key"):
        key.write_bytes(pair.key_pem)
    return str(cert), str(key)


def id_of(pair) -> bytes:
    public = pair.key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(public).digest()[:KEY_ID_BYTES]


def one(directory, kind: str = "p256", **more) -> tuple[Kept, object]:
    pair = issue("a.test", kind=kind)
    kept = Kept(directory, DomainFiles(0, "a.test", (put(directory, "a", pair),), **more))
    assert kept.store.load() == 1
    return kept, pair


def ask(kind: str = "ec", pad: int = 0, block: bytes = bytes(32), key: bytes = ANY_KEY, domain: int = 0) -> Ask:
    return Ask(1, domain, kind, pad, key, block)


@pytest.mark.parametrize("kind", ["p256", "p384"])
@pytest.mark.parametrize("name", HASHES)
def test_signatures_of_ec_are_right(tmp_path, kind, name):
    kept, pair = one(tmp_path, kind)
    digest = hashlib.new(name, b"x").digest()
    signature = kept.store.sign(ask(block=digest))
    pair.key.public_key().verify(signature, digest, ec.ECDSA(utils.Prehashed(HASHES[name])))


@pytest.mark.parametrize("kind", ["rsa2048", "rsa3072", "rsa4096", "rsa2056"])
def test_signatures_of_rsa_are_right(tmp_path, kind):
    """Both paddings, checked by who did not make them."""
    kept, pair = one(tmp_path, kind)
    public = pair.key.public_key()
    for name, chosen in HASHES.items():
        signature = kept.store.sign(ask("rsa", 1, digest_info(name)))
        public.verify(signature, b"a handshake", padding.PKCS1v15(), chosen)
        pad = padding.PSS(padding.MGF1(chosen), chosen.digest_size)
        signature = kept.store.sign(ask("rsa", 3, encoded(pair.key, pad, name)))
        public.verify(signature, b"a handshake", pad, chosen)


@pytest.mark.parametrize("what", MALFORMED)
def test_the_store_signs_nothing_malformed(tmp_path, what):
    kind, pad, block = MALFORMED[what]
    kept, _ = one(tmp_path, "p256" if kind == "ec" else "rsa2048")
    with pytest.raises(MalformedError):
        kept.store.sign(ask(kind, pad, block))


def test_who_asks_for_another_domain_or_kind_is_found_out(tmp_path):
    kept, pair = one(tmp_path)
    with pytest.raises(MalformedError, match="domain 7"):
        kept.store.sign(ask(domain=7))
    with pytest.raises(MalformedError, match="a key of kind ec as rsa"):
        kept.store.sign(ask("rsa", 1, digest_info("sha256"), key=id_of(pair)))


def test_an_unknown_key_is_no_reason_to_kill(tmp_path):
    """A worker may ask for what was there a moment ago."""
    kept, _ = one(tmp_path)
    with pytest.raises(NoKeyError):
        kept.store.sign(ask(key=b"8 bytes!"))
    with pytest.raises(NoKeyError):
        kept.store.sign(ask("rsa", 1, digest_info("sha256")))


def test_two_kinds_of_one_domain(tmp_path):
    first, second = issue("a.test", kind="rsa2048"), issue("a.test", kind="p256")
    files = (put(tmp_path, "r", first), put(tmp_path, "e", second))
    kept = Kept(tmp_path, DomainFiles(0, "a.test", files))
    kept.store.load()
    (told,) = kept.store.told()
    assert told.said is Said.CERTIFICATES
    assert told.chains == (first.chain, second.chain)
    kept.store.sign(ask())
    kept.store.sign(ask("rsa", 1, digest_info("sha256")))


def test_two_of_one_kind_are_one_too_many(tmp_path):
    files = (put(tmp_path, "1", issue("a.test")), put(tmp_path, "2", issue("a.test")))
    kept = Kept(tmp_path, DomainFiles(0, "a.test", files))
    assert kept.store.load() == 1
    assert "2.pem: this domain has a pair of kind ec already" in kept.said()


def test_a_new_pair_is_swapped_in_and_the_old_key_signs_for_a_while(tmp_path, monkeypatch):
    kept, old = one(tmp_path)
    new = issue("a.test")
    put(tmp_path, "a", new)
    kept.store.look()
    assert kept.store.told()[0].chains == (old.chain,), "it may be half of a change"
    kept.store.look()
    assert kept.told[-1].chains == (new.chain,)
    for pair in (old, new):
        signature = kept.store.sign(ask(key=id_of(pair)))
        pair.key.public_key().verify(signature, bytes(32), ec.ECDSA(utils.Prehashed(hashes.SHA256())))
    now = keys_module.time.monotonic()
    monkeypatch.setattr(keys_module.time, "monotonic", lambda: now + keys_module.RETIRED_SECONDS + 1)
    with pytest.raises(NoKeyError):
        kept.store.sign(ask(key=id_of(old)))
    kept.store.sign(ask(key=id_of(new)))


def test_only_a_change_that_stays_is_taken(tmp_path):
    kept, _ = one(tmp_path)
    for _ in range(3):
        put(tmp_path, "a", issue("a.test"), "cert")
        kept.store.look()
        put(tmp_path, "a", issue("a.test"), "key")
        kept.store.look()
    assert not kept.said()


GARBAGE = {
    "noise": lambda cert, key: cert.write_bytes(os.urandom(5000)),
    "nothing": lambda cert, key: cert.write_bytes(b""),
    "no key": lambda cert, key: key.write_bytes(cert.read_bytes()),
    "cut short": lambda cert, key: cert.write_bytes(cert.read_bytes()[:-200]),
    "half of a pair, the certificate": lambda cert, key: cert.write_bytes(issue("a.test").pem),
    "half of a pair, the key": lambda cert, key: key.write_bytes(issue("a.test").key_pem),
    "a missing certificate": lambda cert, key: cert.unlink(),
    "a missing key": lambda cert, key: key.unlink(),
    "a directory": lambda cert, key: (key.unlink(), key.mkdir()),
    "a pipe": lambda cert, key: (key.unlink(), os.mkfifo(key)),
    "a flood": lambda cert, key: cert.write_bytes(cert.read_bytes() * 2000),
    "a weak key": lambda cert, key: put(cert.parent, "a", issue("a.test", kind="rsa1024")),
    "an expired certificate": lambda cert, key: put(cert.parent, "a", issue("a.test", days=(-30, -1))),
    "one of tomorrow": lambda cert, key: put(cert.parent, "a", issue("a.test", days=(1, 30))),
}


@pytest.mark.parametrize("what", GARBAGE)
def test_the_last_good_pair_stays(tmp_path, what):
    """Whatever is put in its place; the log says what is wrong, what stays, and when it is looked at again."""
    kept, pair = one(tmp_path)
    GARBAGE[what](tmp_path / "a.pem", tmp_path / "a.key")
    kept.settle()
    said = kept.said()
    assert "domain a.test: " in said
    assert str(tmp_path / "a.") in said
    assert "the pair before stays (until " in said
    assert "looked at again when a file of it changes, and on SIGUSR1" in said
    assert kept.store.told()[0].chains == (pair.chain,)
    kept.store.sign(ask(key=id_of(pair)))
    assert not kept.told[1:], "no worker was told of anything"
    kept.settle()
    assert not kept.said(), "told once"
    mended = issue("a.test")
    for path in (tmp_path / "a.pem", tmp_path / "a.key"):
        if path.is_dir():
            path.rmdir()
        elif path.is_fifo():
            path.unlink()
    put(tmp_path, "a", mended)
    kept.settle()
    assert "a new ec pair is in use" in kept.said()
    assert kept.told[-1].chains == (mended.chain,)


def test_a_bad_pair_leaves_the_others_alone(tmp_path):
    files = [DomainFiles(i, f"{i}.test", (put(tmp_path, str(i), issue(f"{i}.test")),)) for i in range(3)]
    (tmp_path / "1.key").write_text("nonsense")
    kept = Kept(tmp_path, *files)
    assert kept.store.load() == 2
    assert "domain 1.test: " in kept.said()
    assert [told.domain for told in kept.store.told()] == [0, 2]
    with pytest.raises(NoKeyError):
        kept.store.sign(ask(domain=1))


def test_an_expired_pair_is_served_where_there_is_none(tmp_path):
    """Refusing it would take the domain down; clients may be told to go on, and the log says it."""
    pair = issue("a.test", days=(-30, -1))
    kept = Kept(tmp_path, DomainFiles(0, "a.test", (put(tmp_path, "a", pair),)))
    assert kept.store.load() == 1
    assert "its certificate expired on" in kept.said()
    newer = issue("a.test", days=(-30, -1))
    put(tmp_path, "a", newer)
    kept.settle()
    assert kept.told[-1].chains == (newer.chain,), "neither is better"


def test_the_clock_moves_past_expiry(tmp_path, monkeypatch):
    """The pair stays, and the log says so, once."""
    kept, pair = one(tmp_path)
    kept.said()
    kept.store.remark()
    assert not kept.said()

    class Later(keys_module.datetime.datetime):
        @classmethod
        def now(cls, tz=None):  # noqa: ANN206
            return super().now(tz) + keys_module.datetime.timedelta(days=60)

    monkeypatch.setattr("kore.tls.certificates.datetime.datetime", Later)
    kept.store.remark()
    assert "its certificate expired on" in kept.said()
    kept.store.remark()
    assert not kept.said()
    kept.store.sign(ask(key=id_of(pair)))


def test_rights_that_change_are_a_change(tmp_path):
    """chmod(1) mends what could not be read: the content is what it was."""
    kept, _ = one(tmp_path)
    before = keys_module.stamp(str(tmp_path / "a.key"))
    (tmp_path / "a.key").chmod(0o400)
    assert keys_module.stamp(str(tmp_path / "a.key")) != before
    kept.settle()
    assert not kept.said(), "and is no news when it is the same pair"


def test_a_list_of_revoked_certificates_is_kept_like_a_pair(tmp_path):
    from cryptography import x509

    def crl(serial: int) -> bytes:
        authority = server_pair("authority.test", "p256")
        now = keys_module.datetime.datetime.now(keys_module.datetime.UTC)
        revoked = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(now).build()
        builder = x509.CertificateRevocationListBuilder().issuer_name(authority.certificate.subject)
        builder = builder.last_update(now).next_update(now + keys_module.datetime.timedelta(days=1))
        made = builder.add_revoked_certificate(revoked).sign(authority.key, hashes.SHA256())
        return made.public_bytes(Encoding.PEM)

    path = tmp_path / "crl.pem"
    kept, _ = one(tmp_path, crl=str(path))
    assert f"{path}: No such file or directory; none is used; it is looked at again" in kept.said()
    path.write_bytes(crl(1))
    kept.settle()
    assert kept.told[-1].said is Said.REVOKED
    first = kept.told[-1]
    path.write_text("nonsense")
    kept.settle()
    assert "the list before stays" in kept.said()
    assert first in kept.store.told()
    path.write_bytes(crl(2))
    kept.settle()
    assert kept.told[-1].chains != first.chains


def test_a_domain_without_files_serves_what_it_is_given_in_development(tmp_path):
    kept = Kept(tmp_path, DomainFiles(0, "localhost", local=("localhost",)))
    key = certificates.new_key()
    kept.store.use(0, certificates.self_signed(["localhost"], key, lifetime=datetime.timedelta(days=1)))
    assert kept.store.load() == 1
    kept.store.sign(ask())
    before = kept.store.told()
    kept.store.load()
    assert kept.store.told() == before, "a reload keeps it"


def test_nothing_can_be_decrypted(tmp_path):
    """What a client encrypted for the key comes back neither as text nor as anything else."""
    kept, pair = one(tmp_path, "rsa2048")
    for pad in (padding.PKCS1v15(), padding.OAEP(padding.MGF1(hashes.SHA256()), hashes.SHA256(), None)):
        secret = pair.key.public_key().encrypt(b"a secret", pad)
        for number in range(256):
            with pytest.raises(MalformedError):
                kept.store.sign(ask("rsa", number, secret))


# Tickets and random bytes.


def test_masters_are_replaced_and_the_last_one_is_understood():
    masters = Masters()
    seen = [masters.keys[0]]
    for _ in range(4):
        masters.rotate()
        assert masters.keys[1] == seen[-1]
        assert masters.keys[0] not in seen
        assert len(masters.keys) == MASTERS_MAX
        seen.append(masters.keys[0])
    assert masters.told().chains == (tuple(masters.keys),)


@pytest.mark.parametrize("size", [2048, 1024])
def test_random_bytes_are_used_once(tmp_path, size):
    path = tmp_path / "random"
    path.write_bytes(bytes(size))
    (tmp_path / "random.tmp").write_bytes(b"left over")
    lines: list[str] = []
    assert seed_from(str(path), lambda _, text: lines.append(text))
    assert not lines
    after = path.read_bytes()
    assert len(after) == size
    assert after != bytes(size)
    assert path.stat().st_mode & 0o777 == 0o400
    assert os.listdir(tmp_path) == ["random"]


@pytest.mark.parametrize("size", [0, 1, 1023, 1025, 2047, 2049, 100_000])
def test_other_sizes_are_told_of_and_left_alone(tmp_path, size):
    path = tmp_path / "random"
    path.write_bytes(bytes(size))
    lines: list[str] = []
    assert not seed_from(str(path), lambda _, text: lines.append(text))
    assert path.read_bytes() == bytes(size)
    (line,) = lines
    assert str(path) in line
    assert "it is not used" in line


def test_a_missing_file_and_a_pipe_stop_nothing(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name in ("missing", "pipe"):
        lines: list[str] = []
        assert not seed_from(str(tmp_path / name), lambda _, text, lines=lines: lines.append(text))
        assert len(lines) == 1
