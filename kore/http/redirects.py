"""Redirects: rules of a domain that answer a request by its path, before any route is looked at.

Where a request goes is found once for each head and kept with it, as routes are: a rule costs nothing for the same
target again. What a client wrote ends up in a location, so that is made of characters that a URI has and no others.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from kore.http.head import Head

GROUPS_MAX: Final = 15
"""Groups that a target may name, $1 to $15: as many as a handler is given."""

_token = re.compile(r"\$(qs|1[0-5]|[1-9])").sub
_not_in_a_uri = re.compile(rb"[^!#$%&'()*+,\-./0-9:;=?@A-Z\[\]_a-z~]").sub
_slashes = re.compile(r"/[/\\]+").match


@dataclass(frozen=True, slots=True)
class Redirect:
    """Requests whose path is found by `pattern` are answered with `status` and a location made from `target`."""

    pattern: re.Pattern[str]
    status: int
    target: str


def redirected(rules: Iterable[Redirect], head: Head) -> tuple[int, str | None] | None:
    """What the first rule that finds the path of `head` answers: a status, and a location unless that is an error.

    None when no rule does. Source: kore-api.md 8.10; the location is a URI reference (RFC 9110 10.2.2).
    """
    for rule in rules:
        match = rule.pattern.search(head.path)
        if match is not None:
            return rule.status, None if rule.status >= 400 else location(rule.target, match, head.query)
    return None


def location(target: str, match: re.Match[str], query: str | None) -> str:
    """`target` with $qs and $1 to $15 replaced, in one pass: what they become is not looked at again.

    Without a query $qs is empty, and so is a group that took no part. $12 is the twelfth group where there are that
    many, else the first and a 2. A number that no group has stays as it is.
    """

    def replacement(token: re.Match[str]) -> str:
        name = token[1]
        if name == "qs":
            return query or ""
        groups = match.re.groups
        if int(name) <= groups:
            return match[int(name)] or ""
        return (match[1] or "") + name[1] if len(name) == 2 and groups else token[0]

    made = _token(replacement, target)
    if _slashes(made) and not _slashes(target):
        # "/$1" and a path that goes on with a slash: "//name" would send the client to another host (RFC 3986 4.2).
        made = "/" + made.lstrip("/\\")
    return escaped(made)


def escaped(reference: str) -> str:
    """`reference` with what no URI may have in it written as %XX of its bytes in UTF-8 (RFC 3986 2)."""
    octets = reference.encode("utf-8", "surrogateescape")
    return _not_in_a_uri(lambda octet: b"%%%02X" % octet[0][0], octets).decode("ascii")
