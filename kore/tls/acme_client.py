"""The talk with an authority: account, order, authorization, the tls-alpn-01 challenge, finalization, download.

The acme package writes and reads the messages; when to ask is kore.tls.acme_schedule's. No key is here: whatever takes
one, a signature, a certificate request, the certificate that answers a challenge, is asked of Keys: in a server, the
key manager's process. So what an authority sends, parsed here, never comes near one.

Everything waits in line: a process of its own has nothing else to do, and each step has an end (kore.tls.acme_network).
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Protocol

import requests
from acme import challenges, client, errors, messages
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from josepy.jwk import JWK, JWKEC

from kore.tls.acme_link import KeysGoneError, RefusedError
from kore.tls.acme_network import AuthorityError, Network
from kore.version import __version__

ORDER_SECONDS_MAX: Final = 300.0
"""For a whole order. Authorities look from several places, and answer within a minute."""

POLL_SECONDS: Final = 0.25
POLL_SECONDS_MAX: Final = 30.0
"""Between two looks at what the authority does: at first, and after having doubled, unless it asks for more."""

CHAIN_BYTES_MAX: Final = 48 * 1024
"""A chain has three certificates of 2 KiB; it must fit one message to the key manager."""

TEXT_CHARACTERS_MAX: Final = 600
"""Of what an authority says, in an error."""


class Keys(Protocol):
    """Who holds the keys. Each method may raise KeysGoneError, or RefusedError with the reason."""

    def account(self) -> tuple[int, int, str]:
        """The account's public key, x and y on P-256, and the address of the account, "" before there is one."""

    def sign(self, data: bytes) -> bytes:
        """The signature of a JWS signing input by the account's key: ECDSA with SHA-256, in DER."""

    def registered(self, address: str) -> None:
        """The address of the account, to be kept; "": the authority knows of none."""

    def binding(self, address: str) -> dict[str, Any] | None:
        """The external account binding for the newAccount address (RFC 8555, 7.3.4), where one is configured."""

    def request(self, name: str) -> bytes:
        """A certificate request for `name`, in DER."""

    def challenge(self, name: str, digest: bytes) -> None:
        """Have the certificate that answers the challenge of `name` served; returns when it is."""

    def clear(self, name: str) -> None:
        """The challenge is over."""

    def install(self, name: str, chain: bytes) -> None:
        """Put a chain, in PEM, in place for `name`, once it has been found to be right."""


class AccountGoneError(Exception):
    """The authority does not know the account any more."""


@dataclass(frozen=True, slots=True)
class Window:
    """When the authority suggests to renew (RFC 9773), seconds since 1970; and in how many to ask again."""

    window: tuple[float, float] | None
    ask_again: float | None


@challenges.ChallengeResponse.register
class TlsAlpnResponse(challenges.KeyAuthorizationChallengeResponse):
    """The answer to TlsAlpn: an empty object, for what is proved stands in a certificate."""

    typ = "tls-alpn-01"


@challenges.Challenge.register
class TlsAlpn(challenges.KeyAuthorizationChallenge):
    """RFC 8737: a certificate with the digest of the key authorization, for who asks with ALPN acme-tls/1."""

    typ = "tls-alpn-01"
    response_cls = TlsAlpnResponse

    def validation(self, account_key: JWK, **_kwargs: Any) -> bytes:
        """The digest that the certificate carries."""
        return hashlib.sha256(self.key_authorization(account_key).encode()).digest()


class _AccountKey:
    """What josepy takes for a private key of P-256, whose signatures somebody else makes."""

    curve = ec.SECP256R1()

    def __init__(self, keys: Keys, x: int, y: int) -> None:
        self._keys = keys
        self._public = ec.EllipticCurvePublicNumbers(x, y, self.curve).public_key()

    def public_key(self) -> ec.EllipticCurvePublicKey:
        return self._public

    def sign(self, data: bytes, _algorithm: object) -> bytes:
        return self._keys.sign(data)


class Authority:
    """One authority. The order of things is RFC 8555's, section 7."""

    def __init__(
        self,
        directory: str,
        keys: Keys,
        *,
        context: Any,
        email: str | None = None,
        wait: Callable[[float], None] = time.sleep,
    ) -> None:
        """`directory` is its address, `context` what its certificate is checked with (kore.tls.acme_network.trust).

        `wait` waits; whoever has to stop meanwhile raises something in there.
        """
        self._address = directory
        self._keys = keys
        self._context = context
        self._email = email
        self._wait = wait

    def issue(self, name: str, *, dry: bool = False) -> None:
        """Get a certificate for `name` and have it installed; `dry`: go as far as the authority's consent.

        Raises AuthorityError, KeysGoneError, RefusedError, and what `wait` raises.
        """
        talk = self._talk()
        try:
            try:
                account = talk.enter()
                talk.order(name, account, dry=dry)
            except AccountGoneError:
                # It was there when we last looked: an authority that lost its memory, as one for tests does.
                self._keys.registered("")
                talk.order(name, talk.enter(), dry=dry)
        except (AuthorityError, KeysGoneError, RefusedError):
            raise
        except Exception as error:  # what comes of an answer that is nonsense may be anything
            raise _as_authority_error(error, talk.network) from error
        finally:
            talk.network.close()

    def window(self, leaf: bytes) -> Window:
        """What it suggests for a certificate, in DER, when it does that at all. Raises as issue()."""
        talk = self._talk()
        try:
            return talk.window(leaf)
        except (AuthorityError, KeysGoneError, RefusedError):
            raise
        except Exception as error:  # as above
            raise _as_authority_error(error, talk.network) from error
        finally:
            talk.network.close()

    def _talk(self) -> _Talk:
        return _Talk(self._address, self._keys, self._context, self._email, self._wait)


class _Talk:
    """One conversation: connections, nonces, what the directory said."""

    def __init__(
        self, directory: str, keys: Keys, context: Any, email: str | None, wait: Callable[[float], None]
    ) -> None:
        x, y, self._account = keys.account()
        signer = _AccountKey(keys, x, y)
        self._public = JWKEC(key=signer.public_key())
        self._keys = keys
        self._email = email
        self._pause = wait
        self._address = directory
        self.network = Network(directory, context, JWKEC(key=signer), f"kore/{__version__}")
        self.network.deadline = self._deadline = time.monotonic() + ORDER_SECONDS_MAX
        self._client: client.ClientV2 | None = None
        self._rest_seconds = POLL_SECONDS

    @property
    def client(self) -> client.ClientV2:
        """The package's client, with what the directory says."""
        if self._client is None:
            directory = client.ClientV2.get_directory(self._address, self.network)
            self._client = client.ClientV2(directory, self.network)
        return self._client

    def enter(self) -> str:
        """Have an account, one that exists or a new one; its address."""
        if not self._account:
            self.network.account = None
            directory = self.client.directory
            binding = self._keys.binding(str(directory["newAccount"]))
            if binding is None and self.client.external_account_required():
                raise AuthorityError(
                    "it wants an account of its own bound: name it with kore.config.acme_eab_kid and acme_eab_key"
                )
            wanted = messages.NewRegistration.from_data(
                email=self._email, terms_of_service_agreed=True, external_account_binding=binding
            )
            try:
                self._account = str(self.client.new_account(wanted).uri or "")
            except errors.ConflictError as there:  # which is how the package calls an account that exists
                self._account = there.location
            self._keys.registered(self._account)
        self.network.account = messages.RegistrationResource(body=messages.Registration(), uri=self._account)
        return self._account

    def order(self, name: str, account: str, *, dry: bool) -> None:
        """From the order to the installed certificate."""
        request = x509.load_der_x509_csr(self._keys.request(name))
        try:
            order = self.client.new_order(request.public_bytes(Encoding.PEM))
        except messages.Error as error:
            if error.code == "accountDoesNotExist" and account:
                self._account = ""
                raise AccountGoneError from error
            raise
        if len(order.authorizations) != 1 or not _is_for(order.authorizations[0], name):
            raise AuthorityError(f"its order is not for {name}")
        try:
            self._authorize(name, order.authorizations[0])
            if not dry:
                self._keys.install(name, self._certificate(order))
        finally:
            try:
                self._keys.clear(name)
            except (KeysGoneError, RefusedError):
                pass  # it forgets challenges by itself

    def _authorize(self, name: str, authorization: messages.AuthorizationResource) -> None:
        """Prove that `name` is ours, unless the authority still knows. RFC 8555, 7.5."""
        if authorization.body.status == messages.STATUS_VALID:
            return
        if authorization.body.status != messages.STATUS_PENDING:
            raise AuthorityError(f"the authorization of {name} is {_status(authorization.body)}")
        challenge = next((each for each in authorization.body.challenges if isinstance(each.chall, TlsAlpn)), None)
        if challenge is None:
            kinds = [text_of(each.chall.to_json().get("type"))[:40] for each in authorization.body.challenges]
            raise AuthorityError(f"it does not offer tls-alpn-01 for {name}, only: {', '.join(kinds[:8])}")
        self._keys.challenge(name, challenge.chall.validation(self._public))
        self.client.answer_challenge(challenge, challenge.chall.response(self._public))
        while authorization.body.status == messages.STATUS_PENDING:
            self._rest()
            authorization, _ = self.client.poll(authorization)
        if authorization.body.status != messages.STATUS_VALID:
            raise AuthorityError(f"it could not validate {name}: {_reasons(authorization.body)}")

    def _certificate(self, order: messages.OrderResource) -> bytes:
        """Finalize and download. RFC 8555, 7.4. The chain, in PEM."""
        asked = False
        while True:
            status = order.body.status
            if status == messages.STATUS_VALID and order.body.certificate:
                chain = self._fetch(order.body.certificate).content
                if len(chain) > CHAIN_BYTES_MAX:
                    raise AuthorityError(f"a chain of {len(chain)} bytes; at most {CHAIN_BYTES_MAX} are taken")
                return chain
            if status == messages.STATUS_INVALID:
                raise AuthorityError(f"the order failed: {text_of(order.body.error or 'without a reason')}")
            if status == messages.STATUS_READY and not asked:
                asked = True
                order = self.client.begin_finalization(order)
                continue
            if status not in (messages.STATUS_PENDING, messages.STATUS_READY, messages.STATUS_PROCESSING):
                raise AuthorityError(f"the order is {_status(order.body)}")
            self._rest()
            order = order.update(body=messages.Order.from_json(self._fetch(order.uri).json()))

    def _fetch(self, address: str) -> requests.Response:
        """POST-as-GET. RFC 8555, 6.3."""
        return self.network.post(address, None, new_nonce_url=self.client.directory["newNonce"])

    def _rest(self) -> None:
        """Wait for the authority, as long as it asks for. Raises AuthorityError when the order's time is over."""
        seconds = min(max(self._rest_seconds, self.network.retry_after or 0.0), POLL_SECONDS_MAX)
        self._rest_seconds *= 2
        if time.monotonic() + seconds > self._deadline:
            raise AuthorityError(f"the order was not done within {ORDER_SECONDS_MAX:g} s")
        self._pause(seconds)

    def window(self, leaf: bytes) -> Window:
        """RFC 9773, 4. Not asked for by a signed request, so it takes no account."""
        try:
            base = self.client.directory["renewalInfo"]
        except KeyError:
            return Window(None, None)
        answer = self.network.get(f"{base}/{certificate_id(leaf)}")
        ask_again = self.network.retry_after
        found = messages.RenewalInfo.from_json(answer.json()).suggested_window
        return Window((_seconds(found.start), _seconds(found.end)), ask_again)


def certificate_id(leaf: bytes) -> str:
    """How an authority is asked for a certificate: RFC 9773, 4.1. Raises ValueError, x509.ExtensionNotFound."""
    certificate = x509.load_der_x509_certificate(leaf)
    key = certificate.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value.key_identifier
    if key is None:
        raise ValueError("its authority key identifier has no identifier")
    serial = certificate.serial_number
    # As in DER: two's complement, so that a leading bit that is set takes a byte more.
    return ".".join(
        base64.urlsafe_b64encode(part).rstrip(b"=").decode()
        for part in (key, serial.to_bytes(serial.bit_length() // 8 + 1, "big"))
    )


def _as_authority_error(error: Exception, network: Network) -> AuthorityError:
    """Whatever came of an answer, as one line that may be logged."""
    retry_after = network.retry_after
    if isinstance(error, messages.Error):
        return AuthorityError(f"{text_of(error)} ({text_of(network.answered)})", retry_after)
    if isinstance(error, requests.RequestException):
        return AuthorityError(f"it cannot be reached: {_cause(error)}", retry_after)
    what = f"{type(error).__name__}: {text_of(error)}"
    if isinstance(error, errors.ClientError) and error.args and isinstance(error.args[0], requests.Response):
        what = "no problem document"  # RFC 8555, 6.7
    return AuthorityError(f"its answer makes no sense: {what} ({text_of(network.answered)})", retry_after)


def _cause(error: BaseException) -> str:
    """The innermost reason: those around it repeat it."""
    while True:
        inner = error.__cause__ or error.__context__ or getattr(error, "reason", None)
        if inner is None and error.args and isinstance(error.args[0], BaseException):
            inner = error.args[0]
        if not isinstance(inner, BaseException):
            return text_of(error)
        error = inner


def text_of(error: object) -> str:
    """What somebody else wrote, on one line of printable characters, cut."""
    text = " ".join(str(error).split())
    text = "".join(character if character.isprintable() else "?" for character in text)
    return text if len(text) <= TEXT_CHARACTERS_MAX else text[: TEXT_CHARACTERS_MAX - 3] + "..."


def _is_for(authorization: messages.AuthorizationResource, name: str) -> bool:
    identifier = authorization.body.identifier
    return bool(identifier.typ == messages.IDENTIFIER_FQDN and identifier.value == name.lower())


def _status(body: messages.Authorization | messages.Order) -> str:
    return text_of(getattr(body.status, "name", "in no state at all"))


def _reasons(body: messages.Authorization) -> str:
    found = [text_of(each.error) for each in body.challenges if each.error is not None]
    return "; ".join(found[:4]) or f"it is {_status(body)}, without a reason"


def _seconds(moment: datetime.datetime) -> float:
    return moment.timestamp() if moment.tzinfo is not None else moment.replace(tzinfo=datetime.UTC).timestamp()
