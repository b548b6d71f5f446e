"""The way to an authority: HTTPS to one origin, with nothing taken on trust but what its certificate proves.

The acme package sends by requests, which follows redirects, takes proxies and CA files from the environment, reads
answers of any length and gives each byte its own time limit. An authority may be hostile, or somebody else by now, so
here each of these has an end: the addresses it names must be of its own origin, no redirect is followed, the
environment is not asked, an answer is at most ANSWER_BYTES_MAX long, and a request takes REQUEST_SECONDS_MAX in all.
"""

from __future__ import annotations

import contextlib
import email.utils
import os
import signal
import ssl
import time
from collections.abc import Callable, Iterator
from typing import Any, Final
from urllib.parse import urlsplit

import requests
from acme import client, messages
from josepy.jwa import ES256
from josepy.jwk import JWK
from requests.adapters import HTTPAdapter

ANSWER_BYTES_MAX: Final = 256 * 1024
"""A directory, an order and a chain of certificates each take a few KiB."""

REQUEST_SECONDS_MAX: Final = 30.0
"""For a whole request, however slowly its answer drips in."""

SILENCE_SECONDS_MAX: Final = 15.0
"""For the connection, and between two pieces of an answer."""

NONCE_TRIES_MAX: Final = 12
"""Requests made again because the authority did not like the nonce. RFC 8555, 6.5: it is meant to be retried."""

PIECE_BYTES: Final = 16384

SYSTEM_BUNDLES: Final = (
    "/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
)  # fmt: skip
"""Debian and its kind; Fedora and its kind; openSUSE; Alpine and OpenBSD."""


class AuthorityError(Exception):
    """The authority cannot be reached, or answers what none should; `retry_after`: the seconds it asked for."""

    def __init__(self, text: str, retry_after: float | None = None) -> None:
        super().__init__(text)
        self.retry_after = retry_after


def origin(url: str) -> tuple[str, str, int]:
    """Scheme, host and port of an address. Raises ValueError: it is not an https address."""
    parts = urlsplit(url)
    if parts.scheme != "https" or not parts.hostname or parts.username is not None:
        raise ValueError(f"{url!r} is not an https address")
    return parts.scheme, parts.hostname, parts.port or 443


def trust(bundle: str | None) -> ssl.SSLContext:
    """What the authority's own certificate is checked with: the CAs in the file `bundle`, or the system's.

    The files are read here and never again: later the process may not open them. Raises OSError (ssl.SSLError is one).
    """
    found = bundle or next((path for path in SYSTEM_BUNDLES if os.path.exists(path)), None)
    if found is None:
        import certifi  # comes with requests

        found = certifi.where()
    context = ssl.create_default_context(cafile=found)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


class _Adapter(HTTPAdapter):
    """Connections that are checked with one context, made beforehand."""

    def __init__(self, context: ssl.SSLContext) -> None:
        self._context = context
        super().__init__(max_retries=0)

    def init_poolmanager(self, *arguments: Any, **keywords: Any) -> None:
        super().init_poolmanager(*arguments, ssl_context=self._context, **keywords)

    def cert_verify(self, conn: Any, *_files: Any) -> None:
        """What requests does with files, for each connection; the context has it all."""
        conn.cert_reqs = "CERT_REQUIRED"


class Network(client.ClientNetwork):
    """The acme package's network, with an end to everything. `deadline` is for all of an order, monotonic seconds."""

    def __init__(self, directory: str, context: ssl.SSLContext, key: JWK, agent: str) -> None:
        super().__init__(key, alg=ES256, user_agent=agent)
        self._origin = origin(directory)
        self.session.trust_env = False
        self.session.mount("https://", _Adapter(context))
        self.session.adapters.pop("http://")
        self.deadline = time.monotonic() + REQUEST_SECONDS_MAX
        self.retry_after: float | None = None
        """What the last answer asked for, in seconds."""
        self.answered = ""
        """Its status and address, for errors."""

    def close(self) -> None:
        """Close the connections."""
        self.session.close()

    def _send_request(self, method: str, url: str, *_args: Any, **kwargs: Any) -> requests.Response:
        """Send it within the limits of this module. Raises AuthorityError, and what requests raises."""
        try:
            same = origin(url) == self._origin
        except (ValueError, TypeError, AttributeError):
            same = False
        if not same:
            raise AuthorityError(f"it names {str(url)[:200]!r}, which is not on {self._origin[1]}")
        seconds = min(REQUEST_SECONDS_MAX, self.deadline - time.monotonic())
        if seconds <= 0:
            raise AuthorityError("there was no answer in time")
        headers = {**kwargs.get("headers", {}), "User-Agent": self.user_agent, "Accept-Encoding": "identity"}
        with _within(seconds):
            response = self.session.request(
                method, url, data=kwargs.get("data"), headers=headers,
                timeout=SILENCE_SECONDS_MAX, allow_redirects=False, stream=True,
            )
            # Where requests keeps what it has read; its own way of reading has no limit.
            response._content = _read(response)
        response.encoding = "utf-8"
        self.retry_after = seconds_of(response.headers.get("Retry-After"))
        self.answered = f"status {response.status_code} from {url}"
        if response.is_redirect:
            raise AuthorityError(f"{url} answers with a redirect, which no authority needs")
        return response

    def post(self, *args: Any, **kwargs: Any) -> requests.Response:
        """Send a signed request; one whose nonce is refused is sent again with another. RFC 8555, 6.5."""
        for _ in range(NONCE_TRIES_MAX):
            try:
                return self._post_once(*args, **kwargs)
            except messages.Error as error:
                if error.code != "badNonce":
                    raise
                self._nonces.clear()  # the others are as old or older
        raise AuthorityError(f"it refused {NONCE_TRIES_MAX} nonces in a row, its own")


def _read(response: requests.Response) -> bytes:
    """The body. Raises AuthorityError when it is too long."""
    body = b""
    try:
        for piece in response.iter_content(PIECE_BYTES):
            body += piece
            if len(body) > ANSWER_BYTES_MAX:
                raise AuthorityError(f"an answer of more than {ANSWER_BYTES_MAX} bytes")
    finally:
        if len(body) > ANSWER_BYTES_MAX:
            response.close()
    return body


@contextlib.contextmanager
def _within(seconds: float) -> Iterator[None]:
    """Raise AuthorityError in here when `seconds` have passed.

    By the timer's signal: the time limits of sockets begin anew with each byte. It comes again each second, because an
    exception may be swallowed where it strikes, in a finalizer. The process has one thread.
    """

    def late(_number: int, _frame: object) -> None:
        raise AuthorityError(f"no whole answer within {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


def seconds_of(retry_after: str | None, clock: Callable[[], float] = time.time) -> float | None:
    """What a Retry-After field asks for, in seconds from now; None when there is none or it means nothing. RFC 9110."""
    if retry_after is None:
        return None
    text = retry_after.strip()
    if text.isascii() and text.isdigit():
        return float(text[:12])
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - clock())
    except (ValueError, TypeError, OverflowError):
        return None
