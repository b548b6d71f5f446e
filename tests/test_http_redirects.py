"""Redirects: which request they answer, where they send it, and that the connection goes on after them."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kore.http.head import HeadParser
from kore.http.redirects import Redirect, location, redirected
from tests.http_server_harness import ENGINES, GET, request, serving


def go(target: str, path: str, pattern: str = "^(.*)$", query: str | None = None) -> str:
    match = re.compile(pattern).search(path)
    assert match is not None
    return location(target, match, query)


@pytest.mark.parametrize(("target", "query", "wanted"), [
    ("/new?$qs", "a=1&b=2", "/new?a=1&b=2"),
    ("/new?$qs", None, "/new?"),
    ("/new?$qs", "", "/new?"),
    ("/$qs/$qs", "x", "/x/x"),
    ("/$QS", "x", "/$QS"),
    ("/new", "a=1", "/new"),
    ("/?$qs", "$1", "/?$1"),  # what was put in is not looked at again
    ("/\u00e9 \"<>\\^`{|}", None, "/%C3%A9%20%22%3C%3E%5C%5E%60%7B%7C%7D"),
    ("https://[::1]:8080/a%20b#c", None, "https://[::1]:8080/a%20b#c"),
])
def test_the_query_string_is_put_in_and_is_empty_without_one(target, query, wanted):
    assert go(target, "/x", query=query) == wanted


def test_groups_are_put_in_and_the_longest_number_is_meant():
    pattern = "^/" + "(.)" * 12
    assert go("/$1-$12-$10", "/abcdefghijkl", pattern) == "/a-l-j"
    assert go("/$12", "/ab", "^/(.)(.)") == "/a2", "without a twelfth group"
    assert go("/$1$16", "/ab", "^/(.)(.)") == "/aa6", "there are no more than fifteen"
    assert go("/$3$0$", "/ab", "^/(.)(.)") == "/$3$0$"
    assert go("/<$1>$2", "/b", "^/(a)?(b)") == "/%3C%3Eb", "a group that took no part is empty"
    assert go("/$1", "/$2", "^/(.*)()") == "/$2"


@pytest.mark.parametrize("path", ["//evil.example/", "/\\/evil.example", "//", "///evil.example"])
def test_a_path_cannot_send_the_client_to_another_host(path):
    """RFC 3986 4.2: a reference that begins with two slashes names a host."""
    for target in ("/$1", "$1"):
        made = go(target, path, "^/?(.*)$")
        assert not re.match(r"[/\\]{2}", made)
    assert go("//other.example/$1", "/x", "^/(.*)$") == "//other.example/x", "unless it was meant to"


@given(st.text(), st.text(), st.text())
def test_a_location_is_made_of_characters_of_a_uri_whatever_is_put_in(target, path, query):
    made = go(target + "$1$qs", path, "(?s)(.*)", query)
    assert re.fullmatch(r"[!#$%&'()*+,\-./0-9:;=?@A-Z\[\]_a-z~]*", made)


def test_the_first_rule_that_finds_the_path_counts():
    rules = [Redirect(re.compile("^/a/"), 301, "/1"), Redirect(re.compile("/a"), 403, "/2")]
    for path, wanted in (("/a/", (301, "/1")), ("/b/a", (403, None)), ("/b?/a", None)):
        head = HeadParser().parse(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        assert redirected(rules, head) == wanted


TEXT = """
home.redirect("^/old/([a-z]+)$", 301, "/new/$1?$qs")
home.redirect("^/(.*)/gone$", 410, "/ignored")
home.redirect("^/away/(.*)$", 307, "https://x.example/$1")

@kore.route("/old/page", domain=home)
def never(req):
    req.response(200, b"the route")

@kore.route("^/new/(.*)$", domain=home)
def new(req, what):
    req.response(200, f"{req.method} {what} {len(req.body)}".encode())

@kore.prerequest
def note(req):
    kore.log(kore.LOG_INFO, f"asked {req.path}")
"""


@pytest.fixture(scope="module", params=ENGINES)
def server(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("redirects")
    with serving(directory, request.param, TEXT, "kore.config.http_body_max = 1000000") as made:
        yield made


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH"])
def test_every_method_is_redirected_before_any_route(server, method):
    with server.client() as client:
        for query, wanted in (("?a=b", "/new/page?a=b"), ("", "/new/page?")):
            found = client.ask(request(f"/old/page{query}", method=method), method)
            assert (found.status, found.fields["location"], found.body) == (301, wanted, b"")
            assert found.fields["content-length"] == "0"
            assert found.fields["connection"] == "keep-alive"
        client.alive()
    assert "asked /old" not in server.program.out


def test_the_same_target_again_and_in_a_pipeline(server):
    with server.client() as client:
        client.send(request("/old/page") * 3 + GET + request("/old/b"))
        assert [client.read().fields.get("location") for _ in range(5)] == [
            "/new/page?", "/new/page?", "/new/page?", None, "/new/b?",
        ]


def test_the_body_of_a_redirected_request_is_not_the_next_request(server):
    """http.md 19.1 row 13: a short body is read and dropped, for a long one the connection is closed."""
    smuggled = request("/new/smuggled")
    with server.client() as client:
        found = client.ask(request("/old/page", method="POST", body=smuggled))
        assert (found.status, found.fields["connection"]) == (301, "keep-alive")
        for _ in range(2):  # cut anywhere
            client.send(request("/old/page", "Content-Length: 5", method="POST") + b"ab")
            assert client.ask(b"cde").status == 301
        client.alive()
    for data in (
        request("/old/page", method="POST", body=bytes(500000)),
        request("/old/page", "Content-Length: 10", "Expect: 100-continue", method="POST"),
        request("/old/page", "Transfer-Encoding: chunked", method="POST") + b"5\r\nabcde\r\n0\r\n\r\n" + smuggled,
    ):
        with server.client() as client:
            found = client.ask(data)
            assert (found.status, found.fields["connection"]) == (301, "close")
            client.ended()
    server.unharmed()


def test_an_error_instead_of_a_redirect_has_no_location(server):
    with server.client() as client:
        found = client.ask(request("/x/gone"))
        assert found.status == 410
        assert "location" not in found.fields
        client.alive()


def test_what_the_client_wrote_cannot_break_the_head(server):
    with server.client() as client:
        found = client.ask(b"GET /away/%0d%0aset-cookie:a\"<>\xff HTTP/1.1\r\nHost: x\r\n\r\n")
        assert found.fields["location"] == "https://x.example/%0d%0aset-cookie:a%22%3C%3E%FF"
        assert "set-cookie" not in found.fields
        assert client.ask(request("/away/" + "a" * 1900)).fields["location"].endswith("a" * 1900)


def test_connection_close_is_honoured(server):
    with server.client() as client:
        found = client.ask(request("/old/page", "Connection: close"))
        assert (found.status, found.fields["connection"]) == (301, "close")
        client.ended()
