"""What the key manager signs with the account's key: requests to the configured authority that a renewal takes.

The ACME process composes the requests and is told by strangers what to put in, so the key manager reads each one before
it signs. A captured process can have made what an ordinary renewal makes; it cannot revoke a certificate, close or
change the account, change its key, have a request signed that some other authority would take, or get a certificate
for a name that is not this server's or a key that is not the key manager's.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlsplit

SIGNED_BYTES_MAX: Final = 32 * 1024
"""Of a signing input; a request for a certificate has some hundred bytes."""

JWS_ALGORITHM: Final = "ES256"

_REGISTRATION: Final = frozenset({"contact", "termsOfServiceAgreed", "externalAccountBinding", "onlyReturnExisting"})


class PolicyError(ValueError):
    """What is to be signed is none of the requests that a renewal takes."""


@dataclass(frozen=True, slots=True)
class Policy:
    """What is compared with."""

    provider: str
    """The directory's address."""
    jwk: dict[str, str]
    """The account's public key (RFC 7517)."""
    names: Collection[str]
    """The domains."""

    def check(self, data: bytes, requests: Collection[bytes]) -> None:
        """Raise PolicyError unless `data` may be signed; `requests`: the certificate requests (DER) that were made."""
        if len(data) > SIGNED_BYTES_MAX:
            raise PolicyError(f"{len(data)} bytes to sign; allowed are {SIGNED_BYTES_MAX}")
        head, dot, body = data.partition(b".")
        if not dot or b"." in body:
            raise PolicyError("it is no JWS signing input (RFC 7515, 5.1)")
        protected = _object(_decoded(head), "the protected header")
        address = self._check_header(protected)
        self._check_payload(_decoded(body), protected, address, requests)

    def _check_header(self, protected: dict[str, Any]) -> str:
        """RFC 8555, 6.2: alg, nonce, url, and either jwk or kid."""
        who = set(protected) - {"alg", "nonce", "url"}
        if protected.get("alg") != JWS_ALGORITHM or not isinstance(protected.get("nonce"), str):
            raise PolicyError("the protected header is not that of an ACME request")
        address = protected.get("url")
        if not isinstance(address, str) or not same_origin(address, self.provider):
            raise PolicyError(f"it is for {str(address)[:200]!r}, which is not at the provider {self.provider}")
        if who == {"jwk"}:
            if protected["jwk"] != self.jwk:
                raise PolicyError("the key in it is another")
        elif who != {"kid"} or not isinstance(protected["kid"], str):
            raise PolicyError("the protected header is not that of an ACME request")
        return address

    def _check_payload(
        self, payload: bytes, protected: dict[str, Any], address: str, requests: Collection[bytes]
    ) -> None:
        registering = "jwk" in protected
        if not payload and not registering:
            return  # POST-as-GET, RFC 8555, 6.3
        found = _object(payload, "the payload")
        fields = set(found)
        if registering:
            # Only newAccount and revokeCert are signed with the key itself (RFC 8555, 6.2).
            if fields <= _REGISTRATION:
                return
        elif not fields:
            return  # a challenge is answered
        elif fields == {"identifiers"}:
            self._check_identifiers(found["identifiers"])
            return
        elif fields == {"csr"}:
            request = found["csr"]
            if not isinstance(request, str) or not request.isascii() or _decoded(request.encode()) not in requests:
                raise PolicyError("it asks for a certificate by a request that was not made here")
            return
        raise PolicyError(f"a request with {', '.join(sorted(map(repr, fields)))[:200]} to {address[:200]}")

    def _check_identifiers(self, found: Any) -> None:
        allowed = {name.lower() for name in self.names}
        if not isinstance(found, list) or not found:
            raise PolicyError("an order for nothing")
        for each in found:
            name = each.get("value") if isinstance(each, dict) and each.get("type") == "dns" else None
            if not isinstance(name, str) or name not in allowed:
                raise PolicyError(f"an order for {str(each)[:200]}, which is no domain of this server with acme=True")


def same_origin(address: str, other: str) -> bool:
    """Whether two https addresses are at one host and port."""
    try:
        ours, theirs = urlsplit(address), urlsplit(other)
        places = [(parts.hostname, parts.port or 443) for parts in (ours, theirs)]
    except ValueError:
        return False
    plain = ours.username is None and ours.password is None
    return plain and ours.scheme == theirs.scheme == "https" and bool(ours.hostname) and places[0] == places[1]


def encoded(data: bytes) -> str:
    """base64url without padding. RFC 7515, 2."""
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _decoded(text: bytes) -> bytes:
    try:
        found = base64.b64decode(text + b"=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        raise PolicyError("it is not base64url") from None
    if encoded(found).encode() != text:
        raise PolicyError("it is not base64url as it is written")
    return found


def _object(text: bytes, what: str) -> dict[str, Any]:
    """A JSON object in which each name stands once: two readers must not see two things."""
    try:
        found = json.loads(text.decode("utf-8"), object_pairs_hook=_once)
    except (ValueError, RecursionError):
        raise PolicyError(f"{what} is no JSON") from None
    if not isinstance(found, dict):
        raise PolicyError(f"{what} is no JSON object")
    return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice")
    return found
