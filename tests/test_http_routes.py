"""Routing: domains, paths, methods, captures, and what is told when nothing fits."""

from __future__ import annotations

import pytest

from kore.errors import ConfigurationError
from kore.http.head import METHODS, HeadParser
from kore.http.routes import ALL_METHODS, Domain, Resolution, Route, Router, method_mask, method_names


def handler(req: object) -> None:
    """Stands for any handler."""


def route(path: str, *methods: str, name: str = "") -> Route:
    return Route(path, handler, method_mask(methods or None), name=name or path)


def resolve(router: Router, path: str = "/", method: str = "GET", host: str = "a") -> Resolution:
    head = HeadParser().parse(f"{method} {path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode("utf-8", "surrogateescape"))
    return router.resolve(head)


def found(router: Router, path: str = "/", method: str = "GET", host: str = "a") -> str | int:
    """The name of the route, or the status."""
    resolution = resolve(router, path, method, host)
    assert (resolution.route is not None) == (resolution.status == 200)
    return resolution.route.name if resolution.route else resolution.status


def one(*routes: Route) -> Router:
    return Router([Domain("*", routes)])


# Methods -------------------------------------------------------------------------------------------------------------


def test_methods_default_to_all_and_get_allows_head() -> None:
    assert method_mask(None) == ALL_METHODS == 1 + 2 + 4 + 16 + 32 + 64 + 128
    assert method_mask(["get"]) == METHODS["GET"] | METHODS["HEAD"]
    assert method_mask(["Post", "POST"]) == METHODS["POST"]
    assert method_mask(["head"]) == METHODS["HEAD"]
    assert method_mask([]) == 0


@pytest.mark.parametrize("name", ["trace", "", "ge t", "connect"])
def test_an_unknown_method_is_refused_with_what_is_allowed(name: str) -> None:
    with pytest.raises(ConfigurationError, match="allowed are get, post, put, delete, head, options, patch"):
        method_mask(["get", name])


def test_names_of_methods_are_sorted() -> None:
    assert method_names(ALL_METHODS) == "DELETE, GET, HEAD, OPTIONS, PATCH, POST, PUT"
    assert method_names(0) == ""


# Paths ---------------------------------------------------------------------------------------------------------------


def test_a_static_path_is_compared_exactly() -> None:
    router = one(route("/a/b"))
    assert found(router, "/a/b") == found(router, "/a/b?x=y") == "/a/b"
    for path in ("/a", "/a/b/", "/A/b", "/a%2fb", "//a/b", "/a/./b"):
        assert found(router, path) == 404


def test_a_pattern_is_searched_and_its_groups_are_captures() -> None:
    router = one(route("^/u/([0-9]+)/(.*)$"), route("tail$"))
    resolution = resolve(router, "/u/42/x/y?z")
    assert resolution.captures == ("42", "x/y")
    assert resolve(router, "/some/tail").captures == ()
    assert found(router, "/u/x/") == 404


def test_captures_stop_at_fifteen_and_at_the_first_group_without_part() -> None:
    router = one(route("^/" + "(.)" * 16), route("^/a(b)?(c)?(d)?$"))
    assert resolve(router, "/0123456789abcdef").captures == tuple("0123456789abcde")
    assert resolve(router, "/abd").captures == ("b",)
    assert resolve(router, "/acd").captures == ()
    assert resolve(router, "/abc").captures == ("b", "c")


def test_captures_are_raw_and_keep_bytes_that_are_no_utf_8() -> None:
    router = one(route("^/(.*)$"))
    assert resolve(router, "/a%20b").captures == ("a%20b",)
    assert resolve(router, "/\udcff").captures == ("\udcff",)
    assert resolve(router, "/ü").captures == ("ü",)


def test_the_first_installed_route_wins_whatever_its_kind() -> None:
    assert found(one(route("^/a"), route("/a")), "/a") == "^/a"
    assert found(one(route("/a"), route("^/a")), "/a") == "/a"
    assert found(one(route("^/a$"), route("/b"), route("^/")), "/b") == "/b"
    assert found(one(route("^/x"), route("^/a"), route("^/.*")), "/a") == "^/a"


def test_a_route_that_fits_the_path_and_not_the_method_lets_the_next_try() -> None:
    router = one(route("^/a", "post"), route("/a", "put"), route("/a", "get"), route("^/", "delete"))
    assert found(router, "/a", "POST") == "^/a"
    assert found(router, "/a", "PUT") == found(router, "/a", "GET") == found(router, "/a", "HEAD") == "/a"
    assert found(router, "/a", "DELETE") == "^/"
    refused = resolve(router, "/a", "PATCH")
    assert (refused.status, refused.allow, refused.route) == (405, "DELETE, GET, HEAD, POST, PUT", None)


def test_405_lists_what_all_routes_of_the_path_allow() -> None:
    router = one(route("/a", "get"), route("^/a", "put"), route("/b", "post"))
    assert resolve(router, "/a", "POST").allow == "GET, HEAD, PUT"
    assert resolve(router, "/b", "GET").allow == "POST"
    assert found(router, "/c", "POST") == 404


def test_an_empty_list_of_methods_refuses_every_method() -> None:
    router = one(Route("/a", handler, method_mask([])))
    for method in METHODS:
        assert (resolve(router, "/a", method).status, resolve(router, "/a", method).allow) == (405, "")


def test_the_asterisk_is_about_the_server_and_no_route_sees_it() -> None:
    router = one(route(".*", "get"), route("/a", "put"))
    resolution = resolve(router, "*", "OPTIONS")
    assert (resolution.status, resolution.route, resolution.allow) == (200, None, "GET, HEAD, PUT")


def test_routes_of_one_text_may_not_share_a_method() -> None:
    Domain("a", [route("/a", "post"), route("/a", "put"), route("^/a", "put")])
    with pytest.raises(ConfigurationError, match=r"domain 'a': route '/a' twice for HEAD$"):
        Domain("a", [route("/a", "get"), route("/b"), route("/a", "head")])
    with pytest.raises(ConfigurationError, match="twice for PUT"):
        Domain("a", [route("^/a", "put"), route("^/a")])


@pytest.mark.parametrize("path", ["(", "*", "", "a{", "[[:x:]]"])
def test_a_malformed_pattern_is_refused_by_name(path: str) -> None:
    if not path:
        assert found(one(route(path)), "/anything") == ""
        return
    with pytest.raises(ConfigurationError, match="is no POSIX extended regular expression"):
        Domain("a", [route(path)])


# Domains -------------------------------------------------------------------------------------------------------------


def named(*patterns: str) -> Router:
    return Router([Domain(pattern, [route("/", name=pattern)]) for pattern in patterns])


def test_an_exact_name_comes_before_the_longest_pattern_before_the_catch_all() -> None:
    router = named("*", "*.org", "*.example.org", "www.example.org")
    assert found(router, host="WWW.Example.ORG:8080") == "www.example.org"
    assert found(router, host="a.b.example.org.") == "*.example.org"
    assert found(router, host="example.org") == "*.org"
    assert found(router, host="x") == found(router, host="[::1]:80") == "*"


def test_patterns_are_the_shells_and_ignore_case() -> None:
    router = named("A?.x", "[bc].x", "[^d].y", "[!d].z")
    assert found(router, host="ab.X") == "A?.x"
    assert found(router, host="C.x") == "[bc].x"
    assert [found(router, host=host) for host in ("e.y", "d.y", "e.z", "d.z", "d.x")] == ["[^d].y", 404, "[!d].z", 404,
    404]


def test_no_domain_is_404_without_one() -> None:
    resolution = resolve(named("a", "b"), host="c")
    assert (resolution.status, resolution.domain) == (404, None)
    assert resolve(Router(), host="c").status == 404


def test_names_of_ipv6_match_in_any_notation() -> None:
    router = named("[::1]", "FE80:0:0:0:0:0:0:1")
    assert found(router, host="[0:0::1]:8888") == "[::1]"
    assert found(router, host="[fe80::1]") == "FE80:0:0:0:0:0:0:1"


def test_a_client_without_a_host_gets_the_only_domain_or_the_catch_all() -> None:
    head = HeadParser().parse(b"GET / HTTP/1.0\r\n\r\n")
    assert named("a").resolve(head).status == 200
    assert named("a", "b").resolve(head).status == 404
    assert named("a", "*").resolve(head).domain is not None


def test_two_domains_of_one_name_are_refused() -> None:
    for names in (("a", "A."), ("::1", "[0::1]"), ("*", "*")):
        with pytest.raises(ConfigurationError, match="there is one of that name already"):
            named(*names)
    named("a", "*")


@pytest.mark.parametrize("name", ["", ".", "x" * 254])
def test_a_name_has_1_to_253_bytes(name: str) -> None:
    with pytest.raises(ConfigurationError, match="1 to 253"):
        Domain(name)
