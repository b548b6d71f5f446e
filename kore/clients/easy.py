"""Easy handles, libcurl's word for one transfer and its options: made with kore's defaults, set by the bare numbers.

pycurl takes options by libcurl's full ids and refuses some texts that it has not heard of (ABSTRACT_UNIX_SOCKET,
ALTSVC ...), and it warns of others (RANDOM_FILE). libcurl decides what it takes, so texts are handed to its own
`curl_easy_setopt`, found among what pycurl was linked with.
"""

from __future__ import annotations

import ctypes
import functools
import os
from importlib import import_module
from typing import Any

from kore.clients.curl_options import CURLOPT_CAINFO, CURLOPT_PROXY_CAINFO, LISTS, NAMES, NUMBERS, TEXTS
from kore.version import __version__

USER_AGENT = f"kore/{__version__}"

HTTP_AND_HTTPS = 1 | 2
"""CURLPROTO_HTTP and CURLPROTO_HTTPS: what httpclient may speak, and what a redirect may lead to."""

TEXT_OFFSET = 10000
"""libcurl's ids of options that take text, a list or a pointer begin here; those that take a number begin at 0."""

EASY_MAGIC = 0xC0DEDBAD
"""What an easy handle begins with in every libcurl since 7.10 (lib/urldata.h: CURLEASY_MAGIC_NUMBER)."""

HANDLE_WORD_MAX = 6
"""Words at the beginning of a pycurl.Curl among which the handle is looked for; the object is far larger."""

LONG_MAX = 2 ** (8 * ctypes.sizeof(ctypes.c_long) - 1) - 1
LONG_MIN = -LONG_MAX - 1

CA_BUNDLES = (
    "/etc/ssl/certs/ca-certificates.crt",  # Debian, Ubuntu, Arch, Gentoo
    "/etc/pki/tls/certs/ca-bundle.crt",  # Fedora, RHEL
    "/etc/ssl/ca-bundle.pem",  # openSUSE
    "/etc/ssl/cert.pem",  # Alpine, BSDs
)
"""Where systems keep the CAs they trust. A wheel's libcurl knows only the place of the system it was built on."""


@functools.cache
def pycurl() -> Any:
    """The pycurl module, loaded now. Raises RuntimeError, saying what to do, when it is missing or would block."""
    try:
        module: Any = import_module("pycurl")
    except ImportError as exc:
        raise RuntimeError(f"transfers need pycurl ({exc}); install it: pip install 'kore[transfers]'") from None
    if not module.version_info()[4] & module.VERSION_ASYNCHDNS:
        raise RuntimeError(
            f"{module.version} resolves names without threads, which would block every request meanwhile; "
            "install a pycurl whose libcurl has AsynchDNS: pip install --force-reinstall 'kore[transfers]'"
        )
    return module


@functools.cache
def ca_files() -> tuple[tuple[int, str], ...]:
    """Options that say which CAs are trusted: $SSL_CERT_FILE as for OpenSSL, else the system's; else libcurl's own."""
    for path in (os.environ.get("SSL_CERT_FILE"), *CA_BUNDLES):
        if path and os.path.isfile(path):
            return (CURLOPT_CAINFO, path), (CURLOPT_PROXY_CAINFO, path)
    return ()


def new_easy(url: str) -> Any:
    """An easy handle for `url` with the defaults: no signals, no redirects, nothing read from standard input."""
    curl = pycurl()
    easy = curl.Curl()
    setopt = easy.setopt
    setopt(curl.URL, url.encode())
    setopt(curl.NOSIGNAL, 1)
    setopt(curl.USERAGENT, USER_AGENT)
    setopt(curl.READFUNCTION, nothing)
    for number, path in ca_files():
        setopt(TEXT_OFFSET + number, path)
    return easy


def nothing(_size: int) -> bytes:
    """The body of an upload for which none was given; libcurl's own default reads standard input."""
    return b""


def set_option(easy: Any, number: int, value: object) -> None:
    """Set the option with this bare number. RuntimeError: unknown, unsupported, or not a value for it, saying why.

    TypeError for a `number` that is none, ValueError for a NUL within a text.
    """
    if not isinstance(number, int):
        raise TypeError(f"an option is a kore.CURLOPT_ number, not {type(number).__name__}")
    name = NAMES.get(number)
    if name is None:
        raise RuntimeError(f"{number} is no libcurl option; the kore.CURLOPT_ names are all there are")
    try:
        if number in TEXTS:
            _set_text(easy, number, _text(name, value))
        elif number in NUMBERS:
            easy.setopt(number, _number(name, value))
        elif number in LISTS:
            if not isinstance(value, list):
                raise RuntimeError(f"{name} takes a list of str, not {type(value).__name__}")
            easy.setopt(TEXT_OFFSET + number, [_text(f"an item of {name}", item) for item in value])
        else:
            raise RuntimeError(f"{name} can't be set: it takes a C function, a pointer or a structure")
    except pycurl().error as exc:
        # Without the value, which may be a password.
        raise RuntimeError(f"{name} is refused: {exc.args[-1]} (libcurl error {exc.args[0]})") from None


def _text(what: str, value: object) -> bytes:
    if not isinstance(value, str):
        raise RuntimeError(f"{what} is a str, not {type(value).__name__}")
    if "\0" in value:
        raise ValueError(f"{what} has a NUL in it: {value!r}")
    return value.encode()


def _number(what: str, value: object) -> int:
    if not isinstance(value, int):
        raise RuntimeError(f"{what} is an int, not {type(value).__name__}")
    if not LONG_MIN <= value <= LONG_MAX:
        raise RuntimeError(f"{what} is an int that a C long can hold, not {value}")
    return int(value)


def _set_text(easy: Any, number: int, value: bytes) -> None:
    libcurl = _libcurl()
    handle = None if libcurl is None else _handle(easy)
    if libcurl is None or handle is None:
        try:
            easy.setopt(TEXT_OFFSET + number, value)
        except TypeError:
            raise RuntimeError(f"{NAMES[number]}: {pycurl().version} does not take it") from None
        return
    code = libcurl.curl_easy_setopt(handle, TEXT_OFFSET + number, value)
    if code:
        raise pycurl().error(code, libcurl.curl_easy_strerror(code).decode())


@functools.cache
def _libcurl() -> ctypes.CDLL | None:
    """The libcurl that pycurl was linked with; None where it can't be found (linked in statically)."""
    module = pycurl()
    extension = getattr(module, "_pycurl", module)  # before 7.46 the extension was all there is
    try:
        library = ctypes.CDLL(extension.__file__)
        # Variadic in C: after the two named arguments comes, for these options, a pointer that libcurl copies from.
        library.curl_easy_setopt.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p)
        library.curl_easy_strerror.restype = ctypes.c_char_p
    except (OSError, AttributeError):
        return None
    return library


def _handle(easy: Any) -> int | None:
    """The CURL* inside a pycurl.Curl, known by its magic number; None when the object does not look as expected."""
    words = (ctypes.c_void_p * HANDLE_WORD_MAX).from_address(id(easy))
    for word in words[2:]:  # after the object's head come one or two references, then the handle
        if word and word % 8 == 0 and ctypes.c_uint32.from_address(word).value == EASY_MAGIC:
            return int(word)
    return None
