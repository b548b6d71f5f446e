"""A request's cookies: every Cookie field taken apart into exact names and whole values.

Names are compared as they are, case and all, and a value is everything after the first "=": what matches less exactly
can be made to match by whoever may set another cookie of the site, and cookies are what people are logged in by.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

from kore.reactor.trace import LOG_NOTICE, log

if TYPE_CHECKING:
    from kore.http.request import Request

COOKIES_MAX: Final = 180
"""Cookies of one request: browsers keep no more than that for a site."""


def parse(values: Iterable[str]) -> dict[str, str] | None:
    """The cookies in the values of the Cookie fields, of one name the first; None for more than `COOKIES_MAX`.

    A browser sends the cookie of the longest path first (RFC 6265 5.4), so the first is the most particular. White
    space around names and values is dropped, pieces without a name or without "=" are left out, quotes belong to the
    value (RFC 6265 4.1.1) and nothing is decoded. Bytes from 0x80 are UTF-8 with surrogateescape, as in all fields.
    """
    found: dict[str, str] = {}
    room = COOKIES_MAX
    for field in values:
        room -= field.count(";") + 1
        if room < 0:
            return None
        for piece in field.split(";"):
            name, equals, value = piece.partition("=")
            name = name.strip(" \t")
            if equals and name:
                found.setdefault(name, value.strip(" \t"))
    return found


def cookies_of(request: Request) -> dict[str, str]:
    """The cookies of `request`. Of too many none counts, and that is logged: a part could mean the opposite of all."""
    found = parse(value for name, value in request._all_fields() if name == "cookie")
    if found is None:
        log(LOG_NOTICE, f"{request!r}: more than {COOKIES_MAX} cookies; none of them is taken")
        return {}
    return found


def find_cookie(request: Request, name: str) -> str | None:
    """The value of the cookie of exactly that name, None without one; needs no populate_cookies()."""
    return cookies_of(request).get(name)
