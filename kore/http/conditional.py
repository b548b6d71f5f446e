"""Conditional requests: what a client has, against what there is (RFC 9110 8.8 and 13).

The validators of a file are its entity tag, made of what changes when the file does, and its time of modification.
Values arrive as text, with repeated fields joined by commas as RFC 9110 5.3 has it; a value that cannot be read
never makes a response smaller than it would be without it.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from datetime import date
from typing import Final

_MONTHS: Final = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
_MONTH: Final = "(?P<month>" + "|".join(_MONTHS) + ")"
_TIME: Final = "(?P<hour>[0-9]{2}):(?P<minute>[0-9]{2}):(?P<second>[0-9]{2})"
_DAY_NAME: Final = "(?:Mon|Tue|Wed|Thu|Fri|Sat|Sun)"
_LONG_DAY_NAME: Final = "(?:Mon|Tues|Wednes|Thurs|Fri|Satur|Sun)day"
_FORMS: Final = tuple(
    re.compile(form).fullmatch
    for form in (
        f"{_DAY_NAME}, (?P<day>[0-9]{{2}}) {_MONTH} (?P<year>[0-9]{{4}}) {_TIME} GMT",  # IMF-fixdate
        f"{_LONG_DAY_NAME}, (?P<day>[0-9]{{2}})-{_MONTH}-(?P<year>[0-9]{{2}}) {_TIME} GMT",  # RFC 850
        f"{_DAY_NAME} {_MONTH} (?P<day>[ 0-9][0-9]) {_TIME} (?P<year>[0-9]{{4}})",  # asctime
    )
)
_tag = re.compile(r'[ \t,]*+(W/)?("[^"\x00-\x20\x7f]*")[ \t]*(?=,|\Z)').match

_EPOCH: Final = date(1970, 1, 1).toordinal()
_DATE_CHARACTERS_MAX: Final = 40  # the longest, "Wednesday, 30-Sep-98 11:22:33 GMT", has 33

SETTLED_S: Final = 1
"""A file changed more recently may change again within the same second: its date is then a weak validator."""


def etag(modified_ns: int, size: int, inode: int) -> str:
    """A strong entity tag: two states of a file that differ in it are different, and replacing a file changes it."""
    return f'"{modified_ns:x}-{size:x}-{inode:x}"'


def http_date(text: str) -> int | None:
    """Seconds since the epoch for a date in one of the three forms of RFC 9110 5.6.7; None for anything else."""
    if len(text) > _DATE_CHARACTERS_MAX:
        return None
    for form in _FORMS:
        match = form(text)
        if match is None:
            continue
        year, day = int(match["year"]), int(match["day"])
        if len(match["year"]) == 2:
            # RFC 9110 5.6.7: more than 50 years in the future means the century before.
            this_year = time.gmtime().tm_year
            year += this_year - this_year % 100
            if year > this_year + 50:
                year -= 100
        hour, minute, second = int(match["hour"]), int(match["minute"]), int(match["second"])
        if hour > 23 or minute > 59 or second > 60:  # 60: a leap second
            return None
        try:
            days = date(year, _MONTHS.index(match["month"]) + 1, day).toordinal() - _EPOCH
        except ValueError:
            return None
        return days * 86400 + hour * 3600 + minute * 60 + second
    return None


def outcome(fields: Mapping[str, str], tag: str, modified: int) -> int:
    """The status that the preconditions of a GET or HEAD lead to: 200, 304 or 412, in the order of RFC 9110 13.2.2."""
    if_match = fields.get("if-match")
    if if_match is not None:
        if not _listed(if_match, tag, weakly=False):
            return 412
    else:
        unmodified_since = http_date(fields.get("if-unmodified-since", ""))
        if unmodified_since is not None and modified > unmodified_since:
            return 412
    if_none_match = fields.get("if-none-match")
    if if_none_match is not None:
        return 304 if _listed(if_none_match, tag, weakly=True) else 200
    modified_since = http_date(fields.get("if-modified-since", ""))
    return 304 if modified_since is not None and modified <= modified_since else 200


def range_applies(fields: Mapping[str, str], tag: str, modified: int) -> bool:
    """Whether If-Range lets the Range field count: both compared strongly (RFC 9110 13.1.5)."""
    value = fields.get("if-range")
    if value is None:
        return True
    if value[:1] == '"' or value.startswith("W/"):
        return value == tag
    return http_date(value) == modified and modified + SETTLED_S < time.time()


def _listed(value: str, tag: str, *, weakly: bool) -> bool:
    """Whether a list of entity tags, or ``*``, has `tag`; weak ones count only for a weak comparison."""
    if value.strip(" \t") == "*":
        return True
    return any(found == tag and (weakly or not weak) for weak, found in _tags(value))


def _tags(value: str) -> Iterator[tuple[bool, str]]:
    """The entity tags of a list, up to the first thing that is none."""
    match = _tag(value)
    while match is not None:
        yield match[1] is not None, match[2]
        match = _tag(value, match.end())
