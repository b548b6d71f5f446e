"""Domains of TLS servers as they are declared: certificates, clients, ACME, development, and when each is refused."""

from __future__ import annotations

import pytest

from kore.application.declared import application
from kore.application.domains import DomainTls, MissingCertificateError, domain
from kore.application.plan import freeze
from kore.application.servers import server
from kore.errors import ConfigurationError
from tests.application_harness import serve

ROOT, USER = 0, 1000


@pytest.fixture(autouse=True)
def tls():
    """A TLS server called tls, and nothing else declared."""
    application.reset()
    server("tls", ip="127.0.0.1", port=0)
    yield
    application.reset()


def test_a_certificate_and_its_key():
    found = domain("a", attach="tls", cert="c.pem", key="k.pem", client_verify="ca.pem").tls
    assert found == DomainTls(("c.pem",), ("k.pem",), False, "ca.pem", 1, None)


def test_two_certificates_for_two_kinds_of_keys(tmp_path):
    for one in ((("r.pem", "e.pem"), ("r.key", "e.key")), (["r.pem", "e.pem"], ["r.key", "e.key"])):
        found = domain(f"a{type(one[0]).__name__}", attach="tls", cert=one[0], key=one[1]).tls
        assert (found.cert, found.key) == (("r.pem", "e.pem"), ("r.key", "e.key"))
    found = domain("b", attach="tls", cert=(tmp_path / "c.pem",), key=(tmp_path / "k.pem",)).tls
    assert (found.cert, found.key) == ((str(tmp_path / "c.pem"),), (str(tmp_path / "k.pem"),))


@pytest.mark.parametrize(
    ("keywords", "kind", "reason"),
    [
        ({"cert": ("a", "b"), "key": "c"}, ValueError, "2 cert and 1 key; allowed is one key for each cert"),
        ({"cert": (), "key": ()}, ValueError, "cert is a path, or a tuple of up to 2, not of 0"),
        ({"cert": ("a", "b", "c"), "key": ("a", "b", "c")}, ValueError, "tuple of up to 2, not of 3"),
        ({"cert": b"a", "key": "c"}, TypeError, "cert is a str, not bytes"),
        ({"cert": ("a", 5), "key": ("b", "c")}, TypeError, "cert is a str, not int"),
        ({"cert": "a", "key": ""}, ValueError, "key is empty"),
        ({"cert": "a\0", "key": "c"}, ValueError, "has a NUL"),
        ({"cert": "a", "key": "b", "verify_depth": -1}, ValueError, "verify_depth is an integer from 0"),
        ({"cert": "a", "key": "b", "client_verify": 5}, TypeError, "client_verify is a str, not int"),
        ({"cert": "a", "key": "b", "crl": 5}, TypeError, "crl is a str, not int"),
        ({"acme": "perhaps"}, TypeError, "acme is True or False"),
    ],
)
def test_what_cannot_be_used_is_refused_at_the_call(keywords, kind, reason):
    with pytest.raises(kind, match=rf"^domain 'a': .*{reason}"):
        domain("a", attach="tls", **keywords)
    assert application.domains == []


@pytest.mark.parametrize("keywords", [{"cert": "c"}, {"key": "k"}, {"cert": "c", "acme": False}])
def test_half_of_a_pair_is_refused(keywords):
    with pytest.raises(RuntimeError, match=r"^domain 'a': its server speaks TLS; give cert and key, or acme=True"):
        domain("a", attach="tls", **keywords)


@pytest.mark.parametrize("deployment", ["production", "docker"])
@pytest.mark.parametrize("first", [True, False])
def test_no_certificate_is_refused_where_it_is_not_development(deployment, first):
    """At the call when that is known by then, else when all is declared; both are a RuntimeError."""
    if first:
        application.config.deployment = deployment
        with pytest.raises(MissingCertificateError, match="^domain 'a': its server speaks TLS"):
            domain("a", attach="tls")
        return
    domain("a", attach="tls")
    application.config.deployment = deployment
    with pytest.raises(RuntimeError, match="^domain 'a': its server speaks TLS"):
        freeze(euid=USER)


def test_no_certificate_is_development(tmp_path):
    """For everybody but root, and for root that says so."""
    found = domain("a", attach="tls", client_verify="ca.pem", verify_depth="3").tls
    assert found == DomainTls((), (), False, "ca.pem", 3, None, local=True)
    with pytest.raises(RuntimeError, match="^domain 'a': its server speaks TLS"):
        freeze(euid=ROOT)
    application.config.deployment = "dev"
    assert freeze(euid=ROOT).domains[0].tls == found


def test_acme_keeps_its_certificates_below_the_name():
    """Certificates that are given as well are not used, as in the reference."""
    found = domain("b.example", attach="tls", acme=True, cert="mine", verify_depth="3", crl="crl.pem").tls
    kept = "certificates/b.example/"
    assert found == DomainTls((f"{kept}fullchain.pem",), (f"{kept}key.pem",), True, None, 3, "crl.pem")


@pytest.mark.parametrize(
    "name", ["*.example", "a?", "[ab]", "*", "../../etc", "a/b", "..", ".", "a..b", "127.0.0.1", "::1", "-a", "ä"],
)
def test_acme_is_for_host_names_only(name):
    """No pattern, no address, and nothing that leads out of the directory for certificates."""
    with pytest.raises(RuntimeError, match="names only"):
        domain(name, attach="tls", acme=True)
    assert application.domains == []


def test_plain_servers_have_no_certificates():
    serve("plain")
    assert domain("a", attach="plain", cert="c", verify_depth=-1, acme="perhaps").tls is None


def test_what_has_no_effect_is_told():
    server("idle", ip="127.0.0.1", port=0)
    domain("a", attach="tls", cert="c", key="k", crl="crl.pem")
    domain("b", attach="tls", cert="c", key="k", crl="crl.pem", client_verify="ca.pem")
    assert freeze(euid=USER).notices == (
        "server idle: speaks TLS and has no domain, so no certificate: nobody can connect to it",
        "domain a: crl is of no use without client_verify: no certificate is asked for",
    )


def test_the_domains_of_a_plan_stand_in_the_order_of_their_declaration():
    """Their index is what processes call them by."""
    serve("plain")
    domain("a", attach="tls", cert="a.pem", key="a.key")
    domain("b", attach="plain")
    domain("c", attach="tls", acme=True)
    assert [(one.name, one.server, one.tls is not None) for one in freeze(euid=USER).domains] == [
        ("a", "tls", True), ("b", "plain", False), ("c", "tls", True)]


def test_a_wrong_domain_leaves_no_trace():
    with pytest.raises(ConfigurationError):
        domain("a", attach="tls", cert=("a", "b"), key="c")
    domain("a", attach="tls", cert=("a", "b"), key=("c", "d"))
    assert len(freeze(euid=USER).domains) == 1
