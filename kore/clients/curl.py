"""``kore.curl``: a transfer by any protocol that libcurl speaks, with any of its options.

The handle is libcurl's easy handle, so options, cookies and the like stay with it from one run to the next. It may be
made anywhere, before the start too, and is run in coroutines.
"""

from __future__ import annotations

import asyncio
import io
from collections.abc import Coroutine
from typing import Any

from kore.clients import transfers
from kore.clients.curl_options import (
    CURLOPT_DEFAULT_PROTOCOL,
    CURLOPT_REDIR_PROTOCOLS,
    CURLOPT_TIMEOUT,
    CURLOPT_TIMEOUT_MS,
    CURLOPT_URL,
)
from kore.clients.easy import HTTP_AND_HTTPS, new_easy, pycurl, set_option
from kore.clients.lanes import libcurl_waits
from kore.reactor.names import made, public

_PROTOCOLS = frozenset({CURLOPT_DEFAULT_PROTOCOL, CURLOPT_REDIR_PROTOCOLS})
"""With these a transfer may be by another protocol than its url tells."""

_TIMEOUTS = frozenset({CURLOPT_TIMEOUT, CURLOPT_TIMEOUT_MS})


def checked_url(where: str, url: object) -> str:
    """`url` if it is a str without NUL. Raises TypeError, ValueError."""
    if not isinstance(url, str):
        raise TypeError(f"{where}: the url is a str, not {type(url).__name__}")
    if "\0" in url:
        raise ValueError(f"{where}: the url has a NUL in it: {url!r}")
    return url


def checked_body(where: str, body: object) -> bytes:
    """`body` as bytes, if it is bytes-like. Raises TypeError."""
    if not isinstance(body, bytes | bytearray | memoryview):
        raise TypeError(f"{where}: the body is bytes, not {type(body).__name__}")
    return bytes(body)


@public("curl")
class CurlHandle:
    """What ``kore.curl`` gives (reference: asynchronous libcurl client)."""

    __slots__ = ("_body", "_easy", "_lane", "_running", "_timed", "_url")
    _url: str
    _easy: Any
    _body: bytes | None
    _lane: bool
    _timed: bool
    _running: bool

    def setopt(self, option: int, value: object) -> bool:
        """Set one of libcurl's options: `option` is a kore.CURLOPT_ number, `value` a str, an int or a list of str.

        True. Raises RuntimeError for an option that is unknown, takes what Python has no value for, or is refused by
        libcurl, for a value of another kind, and while the transfer runs.
        """
        self._check_idle("setopt()")
        set_option(self._easy, option, value)
        if option == CURLOPT_URL:
            self._url = str(value)
            self._lane = self._lane or libcurl_waits(self._url)
        elif option in _TIMEOUTS:
            self._timed = True
        elif option in _PROTOCOLS:
            self._lane = True
        return True

    def setbody(self, body: bytes) -> bool:
        """Upload `body`, in each run: with HTTP as a PUT. Once for a handle.

        True. Its size is unknown to the protocol unless CURLOPT_INFILESIZE says it. Raises TypeError for what is not
        bytes-like, RuntimeError for a second body and while the transfer runs.
        """
        self._check_idle("setbody()")
        if self._body is not None:
            raise RuntimeError(f"{self._url}: setbody() was called before; make another kore.curl")
        self._body = checked_body("setbody()", body)
        self._easy.setopt(pycurl().UPLOAD, 1)
        return True

    def run(self) -> Coroutine[Any, Any, bytes]:
        """Transfer: await it for what the server sent, b"" if that is nothing. Any number of times, one at a time.

        Raises RuntimeError with the url and libcurl's reason when the transfer fails, takes longer than
        kore.config.curl_timeout, or sends more than kore.config.curl_recv_max. A status of HTTP is no failure.
        """
        return self._run()

    async def _run(self) -> bytes:
        self._check_idle("run()")
        self._running = True
        try:
            if self._lane:
                await transfers.of_loop(asyncio.get_running_loop()).lanes.settled(self._easy)
            if not self._timed:
                self._easy.setopt(pycurl().TIMEOUT, transfers.limits.curl_timeout)
            if self._body is not None:
                body = io.BytesIO(self._body)
                self._easy.setopt(pycurl().READFUNCTION, body.read)
                # Asked for when it has to be sent again: after a redirect, or to authenticate.
                self._easy.setopt(pycurl().SEEKFUNCTION, lambda offset, origin: body.seek(offset, origin) and 0)
            return await transfers.perform(self._easy, self._url, lane=self._lane)
        finally:
            self._running = False

    def _check_idle(self, what: str) -> None:
        if self._running:
            raise RuntimeError(f"{self._url}: {what} while the transfer runs; a handle runs one transfer at a time")


def curl(url: str, /) -> CurlHandle:
    """A handle for transfers from or to `url` (reference: kore.curl).

    Redirects, where they are followed, lead to http and https only, unless CURLOPT_REDIR_PROTOCOLS allows others.
    Raises TypeError for a url that is no str, ValueError for a NUL in it, RuntimeError where pycurl is missing.
    """
    handle = made(CurlHandle)
    handle._url = checked_url("curl()", url)
    handle._easy = new_easy(url)
    handle._easy.setopt(pycurl().REDIR_PROTOCOLS, HTTP_AND_HTTPS)
    handle._lane = libcurl_waits(url)
    handle._body = None
    handle._timed = handle._running = False
    return handle
