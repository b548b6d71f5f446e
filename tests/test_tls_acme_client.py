"""Orders from a real pebble: the client's half and the key manager's half, joined without any process."""

from __future__ import annotations

import os
import ssl
import time
from pathlib import Path

import pytest
from cryptography import x509

from kore.tls import certificates
from kore.tls.acme_client import Authority
from kore.tls.acme_link import Asker, Question, RefusedError
from kore.tls.acme_network import AuthorityError, trust
from kore.tls.acme_store import AcmeSettings, AcmeStore
from tests.acme_harness import EAB_KEY, EAB_KID, Pebble, Responder, files_below, pebble

NAMES = ("one.example.org", "two.example.org")


class Joined:
    """Both halves in one process, with a responder where the workers are."""

    def __init__(self, directory: Path, provider: str, ca: Path, responder: Responder, **settings) -> None:
        self.log: list[str] = []
        self.published: list[str] = []
        self.asked: list[Question] = []
        self.rests: list[float] = []
        self.directory, self.responder = directory, responder
        before = os.getcwd()
        os.chdir(directory)
        try:
            self.store = AcmeStore(
                AcmeSettings(provider, **settings), NAMES, log=self.log.append, publish=self.published.append,
                challenge=self.challenge)
            self.store.load()
        finally:
            os.chdir(before)
        self.answers: list[bytes] = []
        self.keys = Asker(self.send, lambda _seconds: self.answers.pop(0))
        self.authority = Authority(
            provider, self.keys, context=trust(str(ca)), email="admin@example.org", wait=self.rest)

    def rest(self, seconds: float) -> None:
        self.rests.append(seconds)
        time.sleep(0.05)

    def send(self, message: bytes) -> None:
        before = os.getcwd()
        os.chdir(self.directory)
        try:
            self.store.handle(message, self.answers.append)
        finally:
            os.chdir(before)

    def challenge(self, name, pair, done) -> None:
        self.responder.serve(name, pair, self.directory)
        done([])


@pytest.fixture
def responder():
    made = Responder()
    yield made
    made.close()


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


def joined(home: Path, authority: Pebble, responder: Responder, **settings) -> Joined:
    return Joined(home, authority.address, authority.ca, responder, **settings)


def test_issues_and_installs(tmp_path: Path, home: Path, responder: Responder) -> None:
    """An order ends with a certificate of the authority's, for the key made here, on disk for its owner alone."""
    with pebble(tmp_path, responder.port) as authority:
        both = joined(home, authority, responder)
        for name in NAMES:
            assert both.store.pair(name).names == (name,)  # the self-signed one
            both.authority.issue(name)
        assert both.published == list(NAMES)
        assert not responder.contexts
        for name in NAMES:
            pair = both.store.pair(name)
            leaf = x509.load_der_x509_certificate(pair.chain[0])
            assert len(pair.chain) == 2
            assert pair.names == (name,)
            assert "Pebble" in leaf.issuer.rfc4514_string()
        # A start later finds all of it.
        again = joined(home, authority, responder)
        assert [again.store.pair(name).chain for name in NAMES] == [both.store.pair(name).chain for name in NAMES]
        assert again.keys.account() == both.keys.account()
        assert again.keys.account()[2].startswith(f"https://127.0.0.1:{authority.port}/")
        assert again.log == []
        again.authority.issue(NAMES[0])  # a renewal, with the account there is, and the same key
        assert again.store.pair(NAMES[0]).chain != both.store.pair(NAMES[0]).chain
        assert again.store.pair(NAMES[0]).key.public_key() == both.store.pair(NAMES[0]).key.public_key()
    rights = files_below(home)
    assert rights == {
        "account-key.pem": 0o600, "account.json": 0o600, "certificates": 0o700,
        "challenge.pem": 0o644, "challenge-key.pem": 0o644,
        **{f"certificates/{name}": 0o700 for name in NAMES},
        **{f"certificates/{name}/{file}": 0o600 for name in NAMES for file in ("key.pem", "fullchain.pem")},
    }


def test_an_authority_that_forgot_the_account(tmp_path: Path, home: Path, responder: Responder) -> None:
    """The account is made again when the authority does not know it any more, within the same order."""
    with pebble(tmp_path, responder.port) as authority:
        both = joined(home, authority, responder)
        both.authority.issue(NAMES[0])
        account = both.keys.account()
        authority.stop()
        authority.start()
        both.authority.issue(NAMES[0])
        assert both.keys.account()[:2] == account[:2]
        assert len(both.published) == 2


def test_refused_nonces_are_retried(tmp_path: Path, home: Path, responder: Responder) -> None:
    """An authority that refuses a third of its own nonces makes an order longer and no more."""
    with pebble(tmp_path, responder.port, environment={"PEBBLE_WFE_NONCEREJECT": "30"}) as authority:
        both = joined(home, authority, responder)
        both.authority.issue(NAMES[0])
        assert both.published == [NAMES[0]]


def test_nonces_that_are_never_right_end(tmp_path: Path, home: Path, responder: Responder) -> None:
    with pebble(tmp_path, responder.port, environment={"PEBBLE_WFE_NONCEREJECT": "100"}) as authority:
        both = joined(home, authority, responder)
        with pytest.raises(AuthorityError, match="refused 12 nonces in a row"):
            both.authority.issue(NAMES[0])


def test_external_account_binding(tmp_path: Path, home: Path, responder: Responder) -> None:
    """The account is bound with the key that the key manager reads; without it, the reason names the options."""
    (home / "eab.key").write_text(EAB_KEY + "\n")
    with pebble(tmp_path, responder.port, eab=True) as authority:
        without = joined(home, authority, responder)
        with pytest.raises(AuthorityError, match="acme_eab_kid and acme_eab_key"):
            without.authority.issue(NAMES[0])
        wrong = joined(home, authority, responder, eab_kid="kid-9", eab_key="eab.key")
        with pytest.raises(AuthorityError, match="references a key that is not known"):
            wrong.authority.issue(NAMES[0])
        missing = joined(home, authority, responder, eab_kid=EAB_KID, eab_key="nothing.key")
        with pytest.raises(RefusedError, match=r"nothing\.key, could not be read"):
            missing.authority.issue(NAMES[0])
        right = joined(home, authority, responder, eab_kid=EAB_KID, eab_key="eab.key")
        right.authority.issue(NAMES[0])
        assert right.published == [NAMES[0]]


def test_a_name_that_cannot_be_validated(tmp_path: Path, home: Path, responder: Responder) -> None:
    """The error says what the authority found; the challenge is over; the next name is not concerned."""
    with pebble(tmp_path, responder.port) as authority:
        authority.tell_dns("set-servfail", host=NAMES[0])
        both = joined(home, authority, responder)
        with pytest.raises(AuthorityError, match=f"could not validate {NAMES[0]}: .*urn:ietf:params:acme:error"):
            both.authority.issue(NAMES[0])
        assert not responder.contexts
        assert both.published == []
        both.authority.issue(NAMES[1])
        authority.tell_dns("clear-servfail", host=NAMES[0])
        both.authority.issue(NAMES[0])
        assert both.published == [NAMES[1], NAMES[0]]


def test_a_name_that_is_blocked(tmp_path: Path, home: Path, responder: Responder) -> None:
    with pebble(tmp_path, responder.port, blocked=(NAMES[0],)) as authority:
        both = joined(home, authority, responder)
        with pytest.raises(AuthorityError, match="rejectedIdentifier"):
            both.authority.issue(NAMES[0])


def test_a_dry_run_installs_nothing(tmp_path: Path, home: Path, responder: Responder) -> None:
    """It goes through the challenge, and no certificate is asked for."""
    with pebble(tmp_path, responder.port) as authority:
        both = joined(home, authority, responder)
        both.authority.issue(NAMES[0], dry=True)
        assert both.published == []
        assert "certificates/one.example.org/fullchain.pem" not in files_below(home)
        assert "authz" in authority.log
        assert "Issued certificate" not in authority.log


def test_an_authority_of_another_ca_is_not_believed(tmp_path: Path, home: Path, responder: Responder) -> None:
    (tmp_path / "other").mkdir()
    with pebble(tmp_path, responder.port) as authority, pebble(tmp_path / "other", responder.port) as other:
        both = Joined(home, authority.address, other.ca, responder)
        with pytest.raises(AuthorityError, match="certificate verify failed"):
            both.authority.issue(NAMES[0])


def test_a_dead_authority(home: Path, tmp_path: Path, responder: Responder) -> None:
    authority = Pebble(tmp_path / "pebble", responder.port)
    both = joined(home, authority, responder)
    with pytest.raises(AuthorityError, match="cannot be reached: .*refused"):
        both.authority.issue(NAMES[0])


def test_the_system_has_authorities() -> None:
    """Without a bundle of our own there is that of the system, and it has something in it."""
    assert trust(None).cert_store_stats()["x509_ca"] > 10
    assert trust(None).verify_mode is ssl.CERT_REQUIRED


def test_the_challenge_is_what_is_served(tmp_path: Path, home: Path, responder: Responder) -> None:
    """pebble looks at the certificate: one with another digest fails the order."""
    with pebble(tmp_path, responder.port) as authority:
        both = joined(home, authority, responder)

        def wrong(name, pair, done) -> None:
            if pair is not None:
                made = certificates.challenge(name, pair.key, b"x" * 32)
                pair = certificates.pair_of(x509.load_der_x509_certificate(made), (), pair.key)
            responder.serve(name, pair, home)
            done([])

        both.store._challenge = wrong
        with pytest.raises(AuthorityError, match="could not validate"):
            both.authority.issue(NAMES[0])
