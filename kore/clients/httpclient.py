"""``kore.httpclient``: HTTP requests by libcurl, each a coroutine that gives the status and the body.

A client is where to and how: the url, certificates, options. Each request is an easy handle of its own, made in about
4 us, so that a client serves any number of requests at once and no cookie or option of one reaches another. What they
share are connections, which belong to the worker.
"""

from __future__ import annotations

import re
from collections.abc import Coroutine, Mapping
from typing import Any

from kore.clients import transfers
from kore.clients.curl import checked_body, checked_url
from kore.clients.curl_options import (
    CURLOPT_ABSTRACT_UNIX_SOCKET,
    CURLOPT_CAINFO,
    CURLOPT_POSTFIELDSIZE,
    CURLOPT_SSLCERT,
    CURLOPT_SSLKEY,
    CURLOPT_UNIX_SOCKET_PATH,
    CURLOPT_URL,
)
from kore.clients.easy import HTTP_AND_HTTPS, new_easy, pycurl, set_option
from kore.reactor.names import made, public

_TOKEN = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")  # RFC 9110 5.6.2: what a field's name is made of
_VALUE = re.compile(r"[^\0\r\n]*")

Options = Mapping[int, object]


class _Headers:
    """The header fields of a response; those of the last one, where redirects or interim responses come before."""

    __slots__ = ("fields", "last", "open")

    def __init__(self) -> None:
        self.fields: dict[str, str] = {}
        self.last = ""
        self.open = True

    def line(self, data: bytes) -> None:
        """Called by libcurl with every line of every head, and with those of trailers, which are left out.

        libcurl bounds them: 100 KiB a line, 300 KiB together.
        """
        line = data.decode("utf-8", "surrogateescape").rstrip("\r\n")
        if line.startswith("HTTP/"):
            self.fields = {}
            self.open = True
        elif not line:
            self.open = False
        elif self.open and line[0] in " \t" and self.last:  # RFC 9112 5.2: a folded line goes on
            self.fields[self.last] += " " + line.strip()
        elif self.open:
            name, _, value = line.partition(":")
            self.last = name.strip().lower()
            self.fields[self.last] = value.strip()


@public("httpclient")
class HttpClient:
    """What ``kore.httpclient`` gives (reference: asynchronous HTTP client).

    Every method takes `headers` (a dict of str to str; an empty value leaves out a header that would be sent
    otherwise), `return_headers`, and `curlopt` (a dict of kore.CURLOPT_ numbers to values, set last). Awaited, it gives
    ``(status, body)``, or ``(status, headers, body)`` where headers, with names in lower case, were asked for. The
    call raises TypeError and ValueError for wrong arguments; RuntimeError for options that libcurl refuses. The wait
    raises RuntimeError with the url and libcurl's reason when there is no whole response, or one larger than
    kore.config.curl_recv_max, within kore.config.curl_timeout. No status raises.
    """

    __slots__ = ("_curlopt", "_options", "_tlsverify", "_url")
    _url: str
    _options: tuple[tuple[int, str], ...]
    _curlopt: Options
    _tlsverify: bool

    def get(
        self, *, headers: Mapping[str, str] | None = None, body: bytes | None = None,  # noqa: ARG002
        return_headers: bool = False, curlopt: Options | None = None,
    ) -> Coroutine[Any, Any, Any]:
        """Send a GET request. A `body` is ignored."""
        return self._request("GET", headers, None, return_headers, curlopt)

    def head(
        self, *, headers: Mapping[str, str] | None = None, body: bytes | None = None,  # noqa: ARG002
        return_headers: bool = False, curlopt: Options | None = None,
    ) -> Coroutine[Any, Any, Any]:
        """Send a HEAD request; the body of its response is b"". A `body` is ignored."""
        return self._request("HEAD", headers, None, return_headers, curlopt)

    def options(
        self, *, headers: Mapping[str, str] | None = None, body: bytes | None = None,  # noqa: ARG002
        return_headers: bool = False, curlopt: Options | None = None,
    ) -> Coroutine[Any, Any, Any]:
        """Send an OPTIONS request. A `body` is ignored."""
        return self._request("OPTIONS", headers, None, return_headers, curlopt)

    def put(
        self, *, headers: Mapping[str, str] | None = None, body: bytes = b"", return_headers: bool = False,
        curlopt: Options | None = None,
    ) -> Coroutine[Any, Any, Any]:
        """Send a PUT request with `body`."""
        return self._request("PUT", headers, body, return_headers, curlopt)

    def post(
        self, *, headers: Mapping[str, str] | None = None, body: bytes = b"", return_headers: bool = False,
        curlopt: Options | None = None,
    ) -> Coroutine[Any, Any, Any]:
        """Send a POST request with `body`, as application/x-www-form-urlencoded unless `headers` say otherwise."""
        return self._request("POST", headers, body, return_headers, curlopt)

    def patch(
        self, *, headers: Mapping[str, str] | None = None, body: bytes = b"", return_headers: bool = False,
        curlopt: Options | None = None,
    ) -> Coroutine[Any, Any, Any]:
        """Send a PATCH request with `body`, as application/x-www-form-urlencoded unless `headers` say otherwise."""
        return self._request("PATCH", headers, body, return_headers, curlopt)

    def delete(
        self, *, headers: Mapping[str, str] | None = None, body: bytes | None = None, return_headers: bool = False,
        curlopt: Options | None = None,
    ) -> Coroutine[Any, Any, Any]:
        """Send a DELETE request, with `body` if there is one."""
        return self._request("DELETE", headers, body, return_headers, curlopt)

    def _request(
        self, method: str, headers: Mapping[str, str] | None, body: bytes | None, return_headers: bool,
        curlopt: Options | None,
    ) -> Coroutine[Any, Any, Any]:
        what = f"{method.lower()}()"
        content = None if body is None else checked_body(what, body)
        lines = _header_lines(what, headers, bare=method == "PUT")
        received = _Headers() if _checked_bool(what, "return_headers", return_headers) else None
        easy = new_easy(self._url)
        curl = pycurl()
        easy.setopt(curl.TIMEOUT, transfers.limits.curl_timeout)
        easy.setopt(curl.PROTOCOLS, HTTP_AND_HTTPS)
        easy.setopt(curl.REDIR_PROTOCOLS, HTTP_AND_HTTPS)
        easy.setopt(curl.HTTPHEADER, lines)
        if not self._tlsverify:
            easy.setopt(curl.SSL_VERIFYPEER, 0)
            easy.setopt(curl.SSL_VERIFYHOST, 0)
        if method == "HEAD":
            easy.setopt(curl.NOBODY, 1)
        elif content is not None:
            easy.setopt(curl.POSTFIELDS, content)
        if method not in ("GET", "HEAD", "POST"):
            easy.setopt(curl.CUSTOMREQUEST, method)
        if received is not None:
            easy.setopt(curl.HEADERFUNCTION, received.line)
        url = self._url
        asked = _checked_options(what, curlopt)
        try:
            for number, value in (*self._options, *self._curlopt.items(), *asked.items()):
                if number == CURLOPT_POSTFIELDSIZE and isinstance(value, int) and value > len(content or b""):
                    # libcurl would read on behind the body, and send what is there.
                    raise RuntimeError(f"POSTFIELDSIZE is {value}, but the body has {len(content or b'')} bytes")
                set_option(easy, number, value)
                if number == CURLOPT_URL:
                    url = str(value)
        except RuntimeError as exc:
            raise RuntimeError(f"{url}: {exc}") from None
        return self._perform(easy, url, received)

    async def _perform(self, easy: Any, url: str, received: _Headers | None) -> Any:
        body = await transfers.perform(easy, url)
        status = easy.getinfo(pycurl().RESPONSE_CODE)
        return (status, body) if received is None else (status, received.fields, body)


def _header_lines(where: str, headers: Mapping[Any, Any] | None, *, bare: bool) -> list[bytes]:
    """The lines for libcurl; `bare`: without the Content-Type that it gives to bodies. Raises TypeError, ValueError."""
    if headers is None:
        headers = {}
    if not isinstance(headers, Mapping):
        raise TypeError(f"{where}: headers is a dict of str to str, not {type(headers).__name__}")
    lines = {"expect": b"Expect:"}  # libcurl would ask first, and wait, before it sends a large body
    if bare:
        lines["content-type"] = b"Content-Type:"
    for name, value in headers.items():
        if not isinstance(name, str) or not isinstance(value, str):
            raise TypeError(f"{where}: headers is a dict of str to str; it has {name!r}: {value!r}")
        if not _TOKEN.fullmatch(name) or not _VALUE.fullmatch(value):
            raise ValueError(f"{where}: not a header field: {name!r}: {value!r}")
        lines[name.lower()] = f"{name}: {value}".encode() if value else f"{name}:".encode()
    return list(lines.values())


def _checked_bool(where: str, name: str, value: object) -> bool:
    if not isinstance(value, int):
        raise TypeError(f"{where}: {name} is True or False, not {value!r}")
    return bool(value)


def _checked_options(where: str, curlopt: Options | None) -> Options:
    if curlopt is None:
        return {}
    if not isinstance(curlopt, Mapping):
        raise TypeError(f"{where}: curlopt is a dict of kore.CURLOPT_ numbers to values, not {type(curlopt).__name__}")
    return dict(curlopt)


def _checked_path(name: str, value: str | None) -> str | None:
    if value is not None and not isinstance(value, str):
        raise TypeError(f"httpclient(): {name} is a str, not {type(value).__name__}")
    if value is not None and (not value or "\0" in value):
        raise ValueError(f"httpclient(): {name} is empty or has a NUL in it: {value!r}")
    return value


def httpclient(
    url: str, /, *, tlscert: str | None = None, tlskey: str | None = None, tlsverify: bool = True,
    cabundle: str | None = None, unix: str | None = None, curlopt: Options | None = None,
) -> HttpClient:
    """A client for requests to `url`, which is http or https (reference: kore.httpclient).

    `tlscert` and `tlskey` are the paths of a certificate and its key, to be shown to the server; `cabundle` is that of
    the CAs to trust instead of the system's; `tlsverify` False trusts anybody. `unix` is the path of a socket to
    connect to, an abstract one if it begins with ``@``. `curlopt` sets options for every request, before those of the
    request itself. Raises TypeError and ValueError for wrong arguments, RuntimeError for a certificate without its key
    or the reverse, and where pycurl is missing.
    """
    client = made(HttpClient)
    client._url = checked_url("httpclient()", url)
    client._tlsverify = _checked_bool("httpclient()", "tlsverify", tlsverify)
    client._curlopt = _checked_options("httpclient()", curlopt)
    if (tlscert is None) != (tlskey is None):
        raise RuntimeError(f"httpclient(): {url}: tlscert and tlskey go together")
    path = _checked_path("unix", unix)
    given = [
        (CURLOPT_SSLCERT, _checked_path("tlscert", tlscert)),
        (CURLOPT_SSLKEY, _checked_path("tlskey", tlskey)),
        (CURLOPT_CAINFO, _checked_path("cabundle", cabundle)),
        (CURLOPT_ABSTRACT_UNIX_SOCKET, path[1:]) if path and path[0] == "@" else (CURLOPT_UNIX_SOCKET_PATH, path),
    ]
    client._options = tuple((number, value) for number, value in given if value is not None)
    pycurl()
    return client
