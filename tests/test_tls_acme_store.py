"""The key manager's half of ACME against an asker that lies, a disk that fails, and files that somebody changed."""

from __future__ import annotations

import datetime
import json
import os
import socket
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from kore.process.acme_desk import QUESTIONS_PER_SECOND_MAX, AcmeDesk
from kore.tls import acme_files, certificates
from kore.tls.acme_link import (
    MESSAGE_BYTES_MAX,
    Ask,
    Asker,
    KeysGoneError,
    Question,
    RefusedError,
    Tell,
    WireError,
    answer,
    question,
    read_answer,
)
from kore.tls.acme_store import AcmeSettings, AcmeStore
from kore.tls.keys import DomainFiles, KeyStore
from tests.acme_harness import DAY, EAB_KEY

NAME = "a.example.org"
PROVIDER = "https://ca.example.org/directory"
WEEK = datetime.timedelta(days=7)


class Made:
    """A store in the current directory, asked as the ACME process asks."""

    def __init__(self, **settings) -> None:
        self.log: list[str] = []
        self.published: list[str] = []
        self.challenges: list[tuple[str, certificates.Pair | None]] = []
        self.waiting: list = []
        self.answers: list[bytes] = []
        self.store = AcmeStore(
            AcmeSettings(PROVIDER, **settings), [NAME, NAME], log=self.log.append, publish=self.published.append,
            challenge=self.challenge)
        self.store.load()
        self.keys = Asker(lambda message: self.store.handle(message, self.answers.append), self.receive)

    def challenge(self, name, pair, done) -> None:
        self.challenges.append((name, pair))
        self.waiting.append(done)

    def receive(self, _seconds: float) -> bytes | None:
        return self.answers.pop(0) if self.answers else None


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Made:
    monkeypatch.chdir(tmp_path)
    return Made()


def key_of(made: Made) -> certificates.PrivateKey:
    return made.store.pair(NAME).key


def chain(key, *names: str, begin=-DAY, end=WEEK) -> bytes:
    """What an authority would give for `key`, in PEM."""
    authority_key = certificates.new_key()
    root = certificates.new_authority("CA", authority_key, lifetime=WEEK)
    now = datetime.datetime.now(datetime.UTC)
    leaf = (
        x509.CertificateBuilder().subject_name(x509.Name([])).issuer_name(root.subject)
        .public_key(key.public_key()).serial_number(x509.random_serial_number())
        .not_valid_before(now + begin).not_valid_after(now + end)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name) for name in names]), critical=True)
        .sign(authority_key, hashes.SHA256())
    )
    return leaf.public_bytes(Encoding.PEM) + root.public_bytes(Encoding.PEM)


def test_what_an_authority_gives_is_looked_at_first(made: Made) -> None:
    """A chain for another key, another name, another time, or none at all is refused, and the old one served on."""
    before = made.store.pair(NAME)
    for text, reason in (
        (b"", "holds no certificate"), (b"\0" * 100, "holds no certificate"),
        (chain(certificates.new_key(), NAME), "does not belong"),
        (chain(key_of(made), "b.example.org"), "not for a.example.org"),
        (chain(key_of(made), NAME, begin=-WEEK, end=-DAY), "it expired"),
        (chain(key_of(made), NAME, begin=DAY), "is the clock right"),
        (chain(key_of(made), NAME)[:300], "cut off"),
        (chain(key_of(made), NAME) + chain(key_of(made), NAME), "did not issue"),
    ):
        with pytest.raises(RefusedError, match=reason):
            made.keys.install(NAME, text)
        assert made.store.pair(NAME) is before
    assert made.published == []
    assert not Path("certificates", NAME, "fullchain.pem").exists()
    assert made.keys.standing(NAME) == (0.0, 0.0, b"")
    with pytest.raises(RefusedError, match="there is no certificate"):
        made.keys.leaf(NAME)
    made.keys.install(NAME, chain(key_of(made), NAME))
    assert made.published == [NAME]
    assert made.keys.leaf(NAME) == made.store.pair(NAME).chain[0]
    assert made.keys.standing(NAME)[1] == made.store.pair(NAME).not_after.timestamp()


def test_a_full_disk_is_an_answer(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing half is left, what was served is served on, and the asker is told."""
    made.keys.install(NAME, chain(key_of(made), NAME))
    before, text = made.store.pair(NAME), Path("certificates", NAME, "fullchain.pem").read_bytes()

    def full(_fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RefusedError, match="cannot be kept on disk: .*No space left"):
        made.keys.install(NAME, chain(key_of(made), NAME))
    with pytest.raises(RefusedError, match="No space left"):
        made.keys.note(NAME, b"{}")
    assert made.store.pair(NAME) is before
    assert Path("certificates", NAME, "fullchain.pem").read_bytes() == text
    assert sorted(os.listdir(f"certificates/{NAME}")) == ["fullchain.pem", "key.pem"]


def test_a_request_is_signed_for_its_order_only(made: Made) -> None:
    """RFC 2986: by the domain's key, for its name. What a stranger composes is not signed, and is told of."""
    request = x509.load_der_x509_csr(made.keys.request(NAME))
    assert request.is_signature_valid
    assert request.public_key() == key_of(made).public_key()
    with pytest.raises(RefusedError, match="no JWS"):
        made.keys.sign(b"give me a signature")
    assert "asked for a signature that a renewal does not take" in made.log[0]


def test_signatures_are_those_of_the_account(made: Made) -> None:
    from kore.tls.acme_policy import encoded

    x, y, address = made.keys.account()
    assert address == ""
    jwk = {"kty": "EC", "crv": "P-256", "x": encoded(x.to_bytes(32, "big")), "y": encoded(y.to_bytes(32, "big"))}
    head = {"alg": "ES256", "nonce": "bm9uY2U", "url": "https://ca.example.org/new", "jwk": jwk}
    data = f"{encoded(json.dumps(head).encode())}.{encoded(b'{}')}".encode()
    public = ec.EllipticCurvePublicNumbers(x, y, ec.SECP256R1()).public_key()
    public.verify(made.keys.sign(data), data, ec.ECDSA(hashes.SHA256()))


def test_the_account_is_at_the_provider(made: Made) -> None:
    """An address elsewhere is not kept; another provider is asked anew; garbage on disk as well."""
    for address in ("https://evil.example/1", "https://ca.example.org/\n", "http://ca.example.org/1", "x", "\xff"):
        with pytest.raises(RefusedError):
            made.keys.registered(address)
    made.keys.registered("https://ca.example.org/account/1")
    assert Made().keys.account()[2] == "https://ca.example.org/account/1"
    kept = json.loads(Path("account.json").read_text())
    for other in ({"provider": "https://other.example/"}, {"key": "x"}, {"address": "https://evil.example/"}):
        Path("account.json").write_text(json.dumps(kept | other))
        assert Made().keys.account()[2] == ""
    for text in ("", "[]", "{", "null", "[" * 100_000):
        Path("account.json").write_text(text)
        assert Made().keys.account()[2] == ""


def test_the_external_account_is_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """RFC 8555, 7.3.4; only for the provider. A key that is none is told of at the load."""
    monkeypatch.chdir(tmp_path)
    Path("eab").write_text(EAB_KEY)
    made = Made(eab_kid="kid", eab_key="eab")
    bound = made.keys.binding("https://ca.example.org/new-account")
    assert bound is not None
    assert set(bound) == {"protected", "payload", "signature"}
    with pytest.raises(RefusedError, match="not at the provider"):
        made.keys.binding("https://evil.example/new-account")
    for text in ("", "?", "c2hvcnQ"):
        Path("eab").write_text(text)
        poor = Made(eab_kid="kid", eab_key="eab")
        assert "eab: no key for the external account" in poor.log[0]
        with pytest.raises(RefusedError, match="could not be read"):
            poor.keys.binding("https://ca.example.org/new-account")


def test_the_challenge_is_answered_when_workers_have_it(made: Made) -> None:
    """Nothing is said before; who is late is named, and waited for no longer; the end of the order clears it."""
    message = Question(Ask.CHALLENGE, 7, NAME, b"d" * 32).dump()
    made.store.handle(message, made.answers.append)
    assert made.answers == []
    name, pair = made.challenges[0]
    assert (name, pair.key) == (NAME, key_of(made))
    extension = x509.load_der_x509_certificate(pair.chain[0]).extensions.get_extension_for_oid(
        certificates.ACME_IDENTIFIER)
    assert extension.critical
    assert extension.value.value == b"\x04\x20" + b"d" * 32
    made.waiting[0](["worker 2 (pid 5)"])
    assert read_answer(made.answers.pop()) == (Tell.DONE, 7, b"")
    assert "worker 2 (pid 5) did not confirm it" in made.log[0]
    made.keys.clear(NAME)
    assert made.challenges[1] == (NAME, None)
    made.store.forget()
    assert len(made.challenges) == 2  # there is none any more


LIES = {
    "nothing": b"", "short": b"\x01\0\0", "unknown": b"\xff\0\0\0\0\0", "long": b"\x01" * (MESSAGE_BYTES_MAX + 1),
    "cut name": b"\x05\0\0\0\1\x20abc", "no ascii": b"\x05\0\0\0\1\1\xff",
    "another domain": Question(Ask.REQUEST, 1, "b.example.org", b"").dump(),
    "a path": Question(Ask.NOTE, 1, "../../etc", b"x").dump(),
    "no domain": Question(Ask.REQUEST, 1, "", b"").dump(),
    "a domain for the account": Question(Ask.SIGN, 1, NAME, b"").dump(),
    "a digest that is none": Question(Ask.CHALLENGE, 1, NAME, b"short").dump(),
}


@pytest.mark.parametrize("message", LIES.values(), ids=LIES.keys())
def test_what_no_asker_of_ours_says(made: Made, message: bytes) -> None:
    with pytest.raises(WireError):
        made.store.handle(message, made.answers.append)
    assert made.answers == []


def test_a_long_note_is_refused(made: Made) -> None:
    with pytest.raises(RefusedError, match="a note of 9000 bytes"):
        made.keys.note(NAME, b"x" * 9000)
    made.keys.note(NAME, b"x")
    assert made.keys.standing(NAME)[2] == b"x"


def test_late_answers_are_nobodys(made: Made) -> None:
    """The answer to a question that was given up does not answer the next."""
    asker = Asker(lambda _: None, made.receive)
    made.answers = [answer(1, Tell.DONE, b"late"), answer(2, Tell.REFUSED, b"no")]
    asker._number = 1
    with pytest.raises(RefusedError, match="^no$"):
        asker.ask(Ask.CLEAR, NAME)
    with pytest.raises(KeysGoneError, match="did not answer within 10 s"):
        asker.ask(Ask.CLEAR, NAME)


def test_the_wire_is_read_as_it_is_written() -> None:
    asked = Question(Ask.INSTALL, 0xFFFFFFFF, NAME, bytes(range(256)))
    assert question(asked.dump()) == asked
    for nonsense in (b"", b"\x01", b"\x09\0\0\0\1"):
        with pytest.raises(WireError):
            read_answer(nonsense)


def test_names_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("../up", "*.example.org", "", "a/b", ".", ".hidden"):
        store = AcmeStore(
            AcmeSettings(PROVIDER), [name], log=print, publish=print, challenge=lambda *_: None)
        with pytest.raises(ValueError, match="no name that a certificate can be had for"):
            store.load()


def test_links_are_not_followed_where_files_are_written(made: Made) -> None:
    """Whoever may write into the directory cannot have the key manager write elsewhere."""
    Path("elsewhere").write_text("mine")
    os.symlink(Path("elsewhere").resolve(), f"certificates/{NAME}/acme.json.tmp")
    os.symlink(Path("elsewhere").resolve(), f"certificates/{NAME}/acme.json")
    made.keys.note(NAME, b"{}")
    assert Path("elsewhere").read_text() == "mine"
    assert not Path("certificates", NAME, "acme.json").is_symlink()


def test_files_that_are_none(made: Made) -> None:
    os.mkfifo("pipe")
    with pytest.raises(ValueError, match="not a regular file"):
        acme_files.read("pipe")
    Path("long").write_bytes(b"x" * (acme_files.FILE_BYTES_MAX + 1))
    with pytest.raises(ValueError, match="allowed are"):
        acme_files.read("long")


def test_the_desk_forgets_a_flood_of_questions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More questions in a second than an honest asker has are a sign of another; answers go to who asked."""
    monkeypatch.chdir(tmp_path)
    files = (DomainFiles(0, NAME, acme=True), DomainFiles(3, NAME, acme=True))
    told: list = []
    keys = KeyStore(files, lambda *_: None, told.append)
    waiting: list = []
    desk = AcmeDesk(
        AcmeSettings(PROVIDER), files, keys, lambda *_: None,
        lambda number, chain, done: waiting.append((number, done)))
    desk.load()
    assert sorted({each.domain for each in told}) == [0, 3]  # both servers have it
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        desk.join(ours)
        theirs.send(Question(Ask.CHALLENGE, 5, NAME, b"d" * 32).dump())
        assert desk.hear()
        assert [number for number, _ in waiting] == [0, 3]
        waiting[0][1]([])
        theirs.setblocking(False)
        with pytest.raises(BlockingIOError):
            theirs.recv(100)
        waiting[1][1]([])
        assert read_answer(theirs.recv(100)) == (Tell.DONE, 5, b"")
        with pytest.raises(WireError, match="questions in a second"):
            for number in range(QUESTIONS_PER_SECOND_MAX + 2):
                theirs.send(Question(Ask.STANDING, number, NAME, b"").dump())
                assert desk.hear()
                theirs.recv(100)
        desk.leave()
        assert not desk.hear()
