"""Cookies: all fields, exact names, whole values, and no more of them than browsers send."""

from __future__ import annotations

import pytest

from kore.http.cookies import COOKIES_MAX, find_cookie, parse
from kore.reactor import trace
from tests.request_harness import request


@pytest.fixture
def lines():
    """What is logged."""
    found: list[str] = []
    trace.set_log(lambda _priority, text: found.append(text))
    yield found
    trace.set_log(None)


@pytest.mark.parametrize(("field", "found"), [
    ("a=1", {"a": "1"}),
    ("a=1; b=2", {"a": "1", "b": "2"}),
    ("a=1;b=2;", {"a": "1", "b": "2"}),
    (" \ta = 1 ;\tb=2 ", {"a": "1", "b": "2"}),
    ("c=x=y", {"c": "x=y"}),  # the value does not end at the second "="
    ("c==", {"c": "="}),
    ("a=", {"a": ""}),  # empty values are values
    ('q="a b"', {"q": '"a b"'}),  # quotes are the value's
    ("a=1; a=2", {"a": "1"}),
    ("a=1; A=2", {"a": "1", "A": "2"}),
    ("sessX=0; ses=1; sess=2", {"sessX": "0", "ses": "1", "sess": "2"}),
    ("=1; nothing; ; b=2", {"b": "2"}),
    ("a=%20+", {"a": "%20+"}),  # nothing is decoded
    ("a=1,2", {"a": "1,2"}),
    ("", {}),
])
def test_one_field(field, found):
    """Defects of old: values cut at the second "=", empty values lost, names compared without their case."""
    assert parse([field]) == found


def test_all_cookie_fields_count_and_the_first_of_a_name_wins():
    req = request("/", "Cookie: a=1", "X: y", "cookie: b=2; a=3", "COOKIE: c=4")
    assert req.populate_cookies() is True
    assert [req.cookie(name) for name in "abcd"] == ["1", "2", "4", None]


def test_before_they_are_populated_there_are_none():
    req = request("/", "Cookie: a=1")
    assert req.cookie("a") is None
    req.populate_cookies()
    assert req.cookie("a") == "1"
    assert req.cookie("A") is None


def test_find_cookie_compares_whole_names():
    """Defect of old: "sess" was satisfied by "sessX=..." and spoilt by "ses=..."."""
    req = request("/", "Cookie: sessX=no; ses=no; SESS=no", "Cookie: sess=yes")
    assert find_cookie(req, "sess") == "yes"
    assert find_cookie(req, "sess=") is None
    assert find_cookie(request("/", "Cookie: sessX=no"), "sess") is None
    assert find_cookie(request(), "sess") is None


def test_bytes_beyond_ascii_come_through():
    assert find_cookie(request("/", "Cookie: a=\u00e9"), "a") == "\u00e9"
    broken = b"\xff".decode("utf-8", "surrogateescape")
    assert find_cookie(request("/", f"Cookie: a={broken}"), "a") == broken


def test_as_many_as_a_browser_keeps_and_of_more_none(lines):
    """Nine were the most, the rest was lost; now too many is nothing, so that auth fails closed."""
    most = "; ".join(f"c{i}={i}" for i in range(COOKIES_MAX))
    assert len(parse([most]) or ()) == COOKIES_MAX
    assert parse([most, "one=more"]) is None
    assert parse([";" * 5000]) is None
    fields = ["Cookie: " + "; ".join(f"c{i}=" for i in range(60 * n, 60 * n + 61)) for n in range(3)]
    req = request("/", *fields)
    req.populate_cookies()
    assert req.cookie("c0") is None
    assert lines == [f"{req!r}: more than {COOKIES_MAX} cookies; none of them is taken"]


def test_arguments_of_wrong_types_are_type_errors():
    req = request()
    req.populate_cookies()
    for wrong in (None, 1, b"a"):
        with pytest.raises(TypeError):
            req.cookie(wrong)
    with pytest.raises(TypeError):
        req.cookie(name="a")
