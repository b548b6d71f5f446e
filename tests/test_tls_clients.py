"""Clients that must have certificates: who is let in, how far from the authority, who was revoked, who may ask what."""

from __future__ import annotations

import ast
import os
import ssl
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.x509.oid import NameOID

from tests.engines import ENGINES
from tests.http_server_harness import Client
from tests.tls_harness import Pair, authority, client_context, get, issue, server_pair, tls_server

pytestmark = pytest.mark.parametrize("engine", ENGINES)

SUBJECT = x509.Name([
    x509.NameAttribute(NameOID.COUNTRY_NAME, "CH"), x509.NameAttribute(NameOID.ORGANIZATION_NAME, "First"),
    x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Second"), x509.NameAttribute(NameOID.COMMON_NAME, "a user"),
    x509.NameAttribute(NameOID.EMAIL_ADDRESS, "user@a.test"),
])  # fmt: skip


def crl(issuer: Pair, *revoked: Pair, days: tuple[int, int] = (-1, 7)) -> bytes:
    """A list of revoked certificates, DER."""
    now = datetime.now(UTC)
    builder = (
        x509.CertificateRevocationListBuilder().issuer_name(issuer.certificate.subject)
        .last_update(now + timedelta(days[0])).next_update(now + timedelta(days[1]))
    )
    for pair in revoked:
        entry = x509.RevokedCertificateBuilder().serial_number(pair.certificate.serial_number).revocation_date(now)
        builder = builder.add_revoked_certificate(entry.build())
    return builder.sign(issuer.key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)


class Setting:
    """A server whose first domain demands certificates of `root`, and whose second and third do not, or of another."""

    def __init__(self, tmp_path, engine, **demands) -> None:
        self.path = tmp_path
        self.root = issue("Client authority", authority=True)
        self.other = issue("Other authority", authority=True)
        demands = {"authorities": [self.root.chain[0]], **demands}
        domains = [
            (name, {"pairs": [server_pair(name, "p256").save(tmp_path / f"{name}.pem")], **more})
            for name, more in (
                ("a.test", demands), ("open.test", {}), ("c.test", {"authorities": [self.other.chain[0]]}))
        ]
        self.running = tls_server(tmp_path, engine, *domains, tickets=[os.urandom(32)])

    def __enter__(self):
        self.server = self.running.__enter__()
        return self

    def __exit__(self, *arguments) -> None:
        self.running.__exit__(*arguments)

    def user(self, issuer: Pair | None = None, **more) -> Pair:
        return issue("user", issuer=issuer or self.root, client=True, **{"subject": SUBJECT, **more})

    def context(self, pair: Pair | None, version: str = "1.3") -> ssl.SSLContext:
        return client_context(version, pair, self.path)

    def ask(self, pair: Pair | None, version: str = "1.3", path: str = "/who", name: str = "a.test") -> bytes:
        with self.server.connect(name, self.context(pair, version)) as client:
            return client.ask(get(path, host=name)).body

    def refused(self, pair: Pair | None, reason: str, name: str = "a.test") -> None:
        for version in ("1.2", "1.3"):
            # In TLS 1.3 the client is done before the server has seen its certificate.
            with pytest.raises(ssl.SSLError, match=f"(?i){reason}"):
                self.ask(pair, version, name=name)


@pytest.mark.parametrize("version", ["1.2", "1.3"])
def test_the_application_sees_who_it_is(tmp_path, engine, version):
    with Setting(tmp_path, engine) as setting:
        user = setting.user()
        protocol, size, names = ast.literal_eval(setting.ask(user, version).decode())
        assert (protocol, size) == ("https", len(user.chain[0]))
        assert names == {
            "subject": {"C": "CH", "O": "Second", "CN": "a user", "emailAddress": "user@a.test"},
            "issuer": {"CN": "Client authority"},
        }
        assert setting.ask(None, version, name="open.test") == b"('https', None, None)"


def test_who_has_none_or_a_wrong_one_stays_outside(tmp_path, engine):
    with Setting(tmp_path, engine) as setting:
        setting.refused(None, "certificate.required|handshake.failure")
        setting.refused(setting.user(setting.other), "unknown ca")
        setting.refused(setting.user(days=(-9, -1)), "certificate expired")
        setting.refused(issue("user", client=True), "unknown ca|certificate unknown|bad certificate")
        setting.refused(issue("user", issuer=setting.root), "unsupported certificate|bad certificate")  # a server's
        assert b"https" in setting.ask(setting.user())


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_depth(tmp_path, engine, depth):
    with Setting(tmp_path, engine, verify_depth=depth) as setting:
        chain = [setting.root]
        for number in range(2):
            chain.append(issue(f"Middle {number}", issuer=chain[-1], authority=True))
        for between, issuer in enumerate(chain):
            user = setting.user(issuer)
            assert len(user.chain) == between + 1
            if between <= depth:
                assert b"https" in setting.ask(user)
            else:
                setting.refused(user, "unknown ca")


def test_revoked(tmp_path, engine):
    with Setting(tmp_path, engine, crl=True) as setting:
        good, bad = setting.user(), setting.user()
        assert b"https" in setting.ask(bad)  # no list has come yet
        setting.server.wait_for("there is no list of revoked certificates")
        context = setting.context(bad)
        with (
            setting.server.connect("a.test", context) as known,
            setting.server.connect("a.test", setting.context(good)) as friend,
            setting.server.connect("open.test") as stranger,
        ):
            known.ask(get())
            session = known.sock.session
            friend.ask(get())
            stranger.ask(get(host="open.test"))
            setting.server.order(f"app.contexts.revoked(0, [{crl(setting.root, bad)!r}])")
            with pytest.raises((OSError, AssertionError)):
                known.ask(get())  # its connection is ended
            assert friend.ask(get()).status == 200
            assert stranger.ask(get(host="open.test")).status == 200
        setting.refused(bad, "certificate revoked")
        with pytest.raises(ssl.SSLError), setting.server.connect("a.test", context, session) as client:
            client.ask(get())  # nor may it resume
        assert b"https" in setting.ask(good)
        # A list that is out of date is told and tolerated; who stands on it is refused.
        setting.server.order(f"app.contexts.revoked(0, [{crl(setting.root, bad, days=(-9, -1))!r}])")
        assert b"https" in setting.ask(good)
        setting.server.wait_for("a list of revoked certificates has expired")
        setting.refused(bad, "certificate revoked")
        # What is no list changes nothing.
        setting.server.order("app.contexts.revoked(0, [b'nonsense'])")
        setting.server.wait_for("the last state stays")
        setting.refused(bad, "certificate revoked")
        assert b"https" in setting.ask(good)


def test_a_revoked_authority_between(tmp_path, engine):
    with Setting(tmp_path, engine, crl=True) as setting:
        middle = issue("Middle", issuer=setting.root, authority=True)
        user = setting.user(middle)
        assert b"https" in setting.ask(user)
        setting.server.order(f"app.contexts.revoked(0, [{crl(setting.root, middle)!r}])")
        setting.refused(user, "certificate revoked")


def test_nobody_comes_in_by_another_domain(tmp_path, engine):
    with Setting(tmp_path, engine) as setting:
        user = setting.user()

        def statuses(client: Client, *hosts: str) -> list[int]:
            return [client.ask(get(host=host)).status for host in hosts]

        # Without a name the first domain answers, and demands its certificate: which is none of the third's.
        with setting.server.connect(None, setting.context(user)) as client:
            assert statuses(client, "a.test", "open.test", "c.test", "a.test", "c.test") == [200, 200, 403, 200, 403]
            client.send(get(host="a.test") + get(host="c.test") + get(host="a.test"))
            assert [client.read().status for _ in range(3)] == [200, 403, 200]
        with setting.server.connect("open.test") as client:
            assert statuses(client, "a.test", "open.test", "c.test") == [421, 200, 421]
        setting.refused(user, "unknown ca", name="c.test")
        session = None
        with setting.server.connect("open.test", context := setting.context(None)) as client:
            client.ask(get(host="open.test"))
            session = client.sock.session
        with pytest.raises(ssl.SSLError), setting.server.connect("a.test", context, session) as client:
            client.ask(get())


def test_a_session_keeps_who_it_is(tmp_path, engine):
    with Setting(tmp_path, engine) as setting:
        for version in ("1.2", "1.3"):
            context = setting.context(setting.user(), version)
            with setting.server.connect("a.test", context) as client:
                first = client.ask(get("/who")).body
                session = client.sock.session
            with setting.server.connect("a.test", context, session) as client:
                assert client.sock.session_reused
                assert client.ask(get("/who")).body == first


def test_authorities_are_told(tmp_path, engine):
    assert authority()
    with Setting(tmp_path, engine) as setting:
        import subprocess

        done = subprocess.run(
            ["openssl", "s_client", "-connect", f"127.0.0.1:{setting.server.port}", "-servername", "a.test"],
            stdin=subprocess.DEVNULL, capture_output=True, timeout=20, check=False)
        assert b"Acceptable client certificate CA names\nCN = Client authority" in done.stdout
