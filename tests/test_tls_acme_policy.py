"""What the key manager signs for a process that may be captured, and what it does not."""

from __future__ import annotations

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kore.tls.acme_policy import Policy, PolicyError, encoded

PROVIDER = "https://ca.example.org/acme/directory"
JWK = {"crv": "P-256", "kty": "EC", "x": "AA", "y": "BB"}
KID = "https://ca.example.org/acme/acct/1"
POLICY = Policy(PROVIDER, JWK, ("a.example.org", "B.example.org"))
CSR = b"a request"
ORDER = "https://ca.example.org/acme/new-order"


def by_account(payload: object = None, url: str = ORDER, **other: object) -> bytes:
    return signing_input({"alg": "ES256", "nonce": "bm9uY2U", "url": url, "kid": KID} | other, payload)


def by_key(payload: object, **other: object) -> bytes:
    return signing_input({"alg": "ES256", "nonce": "bm9uY2U", "url": ORDER, "jwk": JWK} | other, payload)


def signing_input(head: object, payload: object) -> bytes:
    body = b"" if payload is None else json.dumps(payload).encode()
    return f"{encoded(json.dumps(head).encode())}.{encoded(body)}".encode()


@pytest.mark.parametrize("data", [
    by_account(),
    by_account({}),
    by_account({"identifiers": [{"type": "dns", "value": "a.example.org"}]}),
    by_account({"identifiers": [{"type": "dns", "value": "b.example.org"}]}),
    by_account({"csr": encoded(CSR)}),
    by_account(url="https://ca.example.org:443/acme/authz/1"),
    by_key({"contact": ["mailto:a@example.org"], "termsOfServiceAgreed": True}),
    by_key({"termsOfServiceAgreed": True, "externalAccountBinding": {"protected": "", "payload": "", "signature": ""}}),
], ids=range(8))
def test_what_a_renewal_takes_is_signed(data: bytes) -> None:
    POLICY.check(data, [CSR])


REFUSED = {
    "another authority": by_account(url="https://other.example.org/acme/new-order"),
    "another port": by_account(url="https://ca.example.org:444/acme/new-order"),
    "no encryption": by_account(url="http://ca.example.org/acme/new-order"),
    "a user's name": by_account(url="https://ca.example.org@other.example.org/"),
    "a name in front": by_account(url="https://x@ca.example.org/"),
    "an address that is none": by_account(url="https://[ca.example.org/"),
    "no address": by_account(url=None),  # type: ignore[arg-type]
    "another name": by_account({"identifiers": [{"type": "dns", "value": "c.example.org"}]}),
    "another name as well": by_account({"identifiers": [
        {"type": "dns", "value": "a.example.org"}, {"type": "dns", "value": "c.example.org"}]}),
    "a pattern": by_account({"identifiers": [{"type": "dns", "value": "*.a.example.org"}]}),
    "an address as a name": by_account({"identifiers": [{"type": "ip", "value": "a.example.org"}]}),
    "a name that is a list": by_account({"identifiers": [{"type": "dns", "value": ["a.example.org"]}]}),
    "a certificate request of half a letter": by_account({"csr": "\ud800"}),
    "an account of half a letter": by_account({"x\ud800": 1}),
    "no names": by_account({"identifiers": []}),
    "names that are none": by_account({"identifiers": {"a": 1}}),
    "another certificate request": by_account({"csr": encoded(b"another")}),
    "a certificate request that is none": by_account({"csr": 5}),
    "a certificate request in other letters": by_account({"csr": "YSByZXF1ZXN0="}),
    "closing the account": by_account({"status": "deactivated"}, KID),
    "changing the account": by_account({"contact": ["mailto:thief@example.org"]}, KID),
    "revoking by the account": by_account({"certificate": encoded(b"leaf"), "reason": 1}),
    "revoking by the key": by_key({"certificate": encoded(b"leaf")}),
    "changing the key": by_account({"protected": "", "payload": "", "signature": ""}),
    "changing the key, from inside": by_key({"account": KID, "oldKey": JWK}),
    "both a key and an account": by_account({}, jwk=JWK),
    "neither": signing_input({"alg": "ES256", "nonce": "x", "url": ORDER}, {}),
    "another key": by_key({"contact": []}, jwk=JWK | {"x": "CC"}),
    "nothing by the key": by_key(None),
    "another algorithm": by_account(alg="none"),
    "no nonce": signing_input({"alg": "ES256", "url": ORDER, "kid": KID}, None),
    "more in the head": by_account(b64=False, crit=["b64"]),
    "a token of some other kind": signing_input({"alg": "ES256", "typ": "JWT"}, {"sub": "root"}),
    "a head that is no object": signing_input(["alg"], None),
    "a payload that is no object": by_account(["csr"]),
    "a name twice": b".".join([by_account().split(b".")[0], encoded(b'{"csr":"x","csr":"y"}').encode()]),
    "deep": b".".join([by_account().split(b".")[0], encoded(b"[" * 20000).encode()]),
    "no dot": b"abc",
    "three parts": by_account() + b".x",
    "empty": b"",
    "no letters": b"\xff\xfe.\x00",
    "padded": by_account().split(b".")[0] + b".e30=",
    "trailing bits": by_account().split(b".")[0] + b".e31",
    "too long": by_account({"identifiers": ["x" * 40000]}),
}


@pytest.mark.parametrize("data", REFUSED.values(), ids=REFUSED.keys())
def test_nothing_else_is(data: bytes) -> None:
    with pytest.raises(PolicyError):
        POLICY.check(data, [CSR])


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.sampled_from(
        ["dns", "a.example.org", KID, ORDER, "ES256", "\ud800", encoded(CSR), ""]) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["type", "value", "alg", "nonce", "url", "kid", "jwk", "csr", "identifiers", "status"]), inner),
    max_leaves=8,
)
HEAD = st.fixed_dictionaries({"alg": st.just("ES256"), "nonce": st.just("x"), "url": st.just(ORDER) | JSON}) | JSON


@given(HEAD, st.just(KID) | JSON, JSON)
def test_whatever_is_sent_is_refused_or_signed_and_no_other_error(head: object, kid: object, payload: object) -> None:
    """A captured process cannot end the one that holds the keys by what it wants signed."""
    if isinstance(head, dict):
        head = head | {"kid": kid}
    with contextlib.suppress(PolicyError):
        POLICY.check(signing_input(head, payload), [CSR])


@given(st.binary(max_size=60))
def test_bytes_of_any_kind_are_refused(data: bytes) -> None:
    with pytest.raises(PolicyError):
        POLICY.check(data, [CSR])


def test_a_request_for_a_certificate_is_good_for_its_order_only() -> None:
    with pytest.raises(PolicyError, match="not made here"):
        POLICY.check(by_account({"csr": encoded(CSR)}), [])
