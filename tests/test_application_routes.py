"""Routes: what they may be declared with, which domain they belong to, and how they stand in the Plan's routers."""

from __future__ import annotations

import os

import pytest

from kore.application.declared import application
from kore.application.domains import domain, route
from kore.application.plan import freeze
from kore.errors import ConfigurationError
from tests.application_harness import GOOD_AUTH, ask, declare_domain, handler, other, serve


@pytest.fixture(autouse=True)
def clean():
    """Every test starts with nothing declared and leaves no listener open."""
    application.reset()
    yield
    application.reset()


def test_a_route_answers_in_its_domain():
    made = declare_domain("*")
    assert made.route("/", handler, methods=["get"]) is None
    made.route("^/([0-9]+)/(x)?$", other)
    plan = freeze()
    found = ask(plan, "GET", "/")
    assert (found.status, found.route.handler, found.captures) == (200, handler, ())
    assert ask(plan, "HEAD", "/").status == 200
    assert ask(plan, "POST", "/").status == 405
    found = ask(plan, "POST", "/12/x")
    assert (found.route.handler, found.captures) == (other, ("12", "x"))
    assert ask(plan, "GET", "/12/").captures == ("12",)
    assert ask(plan, "GET", "/none").status == 404


def test_routes_of_both_styles_keep_the_order_of_their_declaration():
    @route("^/a", methods=["get"])
    def first(req):
        pass

    made = declare_domain("*")
    made.route("^/ab", handler, methods=["get"])
    route("^/b", methods=["get"])(other)
    made.route("/b", handler, methods=["get"])
    plan = freeze()
    assert ask(plan, "GET", "/ab").route.handler is first
    assert ask(plan, "GET", "/b").route.handler is other


def test_the_decorator_returns_the_handler_and_may_come_before_the_domain():
    decorate = route("/x")
    assert decorate(handler) is handler
    declare_domain("*")
    assert ask(freeze(), "GET", "/x").route.handler is handler


def test_the_decorator_finds_a_named_domain_on_every_server():
    serve("one", "two", "three")
    domain("a.example", attach="one")
    domain("b.example", attach="two")
    domain("B.example.", attach="three")
    route("/b", domain="b.example")(handler)
    plan = freeze()
    assert ask(plan, "GET", "/b", host="b.example", on="two").route.handler is handler
    assert ask(plan, "GET", "/b", host="b.example", on="three").route.handler is handler
    assert ask(plan, "GET", "/b", on="one").status == 404


def test_the_decorator_takes_a_domain_itself():
    serve()
    domain("b.example")
    route("/b", domain=domain("a.example"))(handler)
    plan = freeze()
    assert ask(plan, "GET", "/b").route.handler is handler
    assert ask(plan, "GET", "/b", host="b.example").status == 404


def test_a_route_whose_domain_is_not_clear_ends_the_start():
    route("/x")(handler)
    with pytest.raises(ConfigurationError, match=r"route '/x': .* there are 0; call kore\.domain\(\)"):
        freeze()
    serve()
    domain("a.example")
    domain("b.example")
    with pytest.raises(ConfigurationError, match=r"there are 2; say which by .* 'a.example', 'b.example'"):
        freeze()
    application.routes.clear()
    route("/x", domain="c.example")(handler)
    with pytest.raises(ConfigurationError, match=r"there is no domain 'c.example'; declared are: 'a.example'"):
        freeze()
    assert not application.frozen


def test_routes_that_collide_end_the_start():
    made = declare_domain("*")
    made.route("/x", handler, methods=["get"])
    made.route("/x", other, methods=["post"])
    made.route("/x", other, methods=["head"])
    with pytest.raises(ConfigurationError, match="/x"):
        freeze()


@pytest.mark.parametrize("methods", [["GET", "Post"], ("get", "post"), {"get", "post"}, ["get", "GET", "post"]])
def test_methods_are_names_in_any_case(methods):
    declare_domain("*").route("/x", handler, methods=methods)
    plan = freeze()
    statuses = {name: ask(plan, name, "/x").status for name in ("GET", "HEAD", "POST", "PUT")}
    assert statuses == {"GET": 200, "HEAD": 200, "POST": 200, "PUT": 405}


@pytest.mark.parametrize("keywords", [{}, {"methods": None}])
def test_without_methods_all_seven_are_allowed(keywords):
    declare_domain("*").route("/x", handler, **keywords)
    plan = freeze()
    for name in ("GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH"):
        assert ask(plan, name, "/x").status == 200


def test_an_empty_list_of_methods_allows_none():
    declare_domain("*").route("/x", handler, methods=[])
    assert ask(freeze(), "GET", "/x").status == 405


def test_parameters_auth_and_hooks_are_kept_with_the_route():
    def verify(req, value):
        return True

    declare_domain("*").route(
        "/update", handler, methods=["post"], POST={"number": "^[0-9]{4}$", "any": verify}, qs={"id": "^[0-9]+$"},
        get=None, auth={"type": "header", "value": "x-header", "redirect": "/", "verify": verify},
        hooks={"on_free": verify, "on_headers": None},
    )  # fmt: skip
    (declared,) = application.routes
    number, anything = declared.parameters["post"]
    assert number.pattern.search("1234")
    assert not number.pattern.search("12345")
    assert anything.check is verify
    assert list(declared.parameters) == ["post", "qs"]
    assert (declared.auth.kind, declared.auth.name, declared.auth.redirect) == ("header", "x-header", "/")
    assert declared.hooks.on_free is verify
    assert declared.hooks.on_headers is None
    kept = ask(freeze(), "POST", "/update").route
    assert kept.parameters is declared.parameters
    assert kept.auth is declared.auth
    assert kept.hooks is declared.hooks


def test_what_a_domain_has_besides_routes_reaches_its_router():
    made = declare_domain("*")
    made.route("/x", handler, auth=GOOD_AUTH, hooks={"on_headers": handler})
    made.route("/plain", handler)
    made.filemaps({"/files/": ".", "/secret/": (".", GOOD_AUTH)})
    made.redirect("^/old$", 301, "/new")
    made.accesslog = os.devnull
    made.accesslog_format = "json"
    plan = freeze()
    assert plan.notices == ()
    assert ask(plan, "GET", "/x").route.gate is not None
    assert ask(plan, "GET", "/plain").route.gate is None
    assert ask(plan, "GET", "/files/a").route.gate is None
    assert ask(plan, "GET", "/secret/a").route.gate is not None
    assert ask(plan, "POST", "/files/a").allow == "GET, HEAD"
    moved = ask(plan, "POST", "/old")
    assert (moved.status, moved.location) == (301, "/new")
    (known,) = plan.routers["default"].domains
    assert known.log.format == "json"
    assert known.log.file.fileno() == plan.domains[0].accesslog.fileno()
    indices = [route.index for route in (*known.routes, *known.file_routes.values())]
    assert sorted(indices) == list(range(4)), "the board of a worker tells them apart"


@pytest.mark.parametrize(("value", "kind"), [("common", ValueError), ("", ValueError), (None, TypeError)])
def test_a_bad_format_of_the_access_log_is_refused(value, kind):
    made = declare_domain("*")
    with pytest.raises(kind, match="accesslog_format"):
        made.accesslog_format = value
    assert made.accesslog_format == "kore"


def test_the_key_that_the_reference_lists_for_routes_means_nothing():
    """kore-api.md 20, row 11."""
    declare_domain("*").route("/x", handler, key="key.pem")
    (declared,) = application.routes
    assert (declared.path, declared.auth, declared.parameters) == ("/x", None, {})


BAD_ROUTES = [
    ({"method": ["get"]}, TypeError, "unknown keyword 'method'; allowed are methods, auth, hooks, qs, get"),
    ({"Methods": ["get"]}, TypeError, "unknown keyword 'Methods'"),
    ({"keys": "x"}, TypeError, "unknown keyword"),
    ({"methods": "get"}, TypeError, "methods is a list of names, not 'get'"),
    ({"methods": ["gett"]}, ConfigurationError, "unknown method 'gett'; allowed are get, post"),
    ({"methods": [5]}, TypeError, "methods holds 5"),
    ({"get": ["a"]}, TypeError, "get is a dict, not list"),
    ({"get": {5: "a"}}, TypeError, "name of a parameter"),
    ({"get": {"": "a"}}, TypeError, "name of a parameter"),
    ({"get": {"a": 5}}, TypeError, "parameter 'a' has the rule 5; allowed are a regex or a function"),
    ({"get": {"a": "("}}, ConfigurationError, r"parameter 'a': '\(' is no regular expression"),
    ({"get": {"a": "b"}, "GET": {"a": "b"}}, ConfigurationError, "get is given twice"),
    ({"auth": "x"}, TypeError, "auth is a dict, not str"),
    ({"auth": {**GOOD_AUTH, "type": "request"}}, ConfigurationError, "type = 'request'; allowed are cookie and header"),
    ({"auth": {**GOOD_AUTH, "typ": "x"}}, ConfigurationError, "unknown key 'typ'; allowed are type, value, verify"),
    ({"auth": {**GOOD_AUTH, "verify": "x"}}, TypeError, "verify is a function"),
    ({"auth": {"type": "cookie", "value": "x"}}, TypeError, "verify is a function"),
    ({"auth": {"type": "cookie", "verify": handler}}, TypeError, "value is a str"),
    ({"auth": {**GOOD_AUTH, "value": ""}}, ConfigurationError, "value is empty"),
    ({"auth": {**GOOD_AUTH, "redirect": "/a\r\nx: y"}}, ConfigurationError, "control characters"),
    ({"auth": {**GOOD_AUTH, "redirect": 5}}, TypeError, "redirect is a str"),
    ({"hooks": []}, TypeError, "hooks is a dict"),
    ({"hooks": {"on_header": handler}}, ConfigurationError, "unknown key 'on_header'; allowed are on_headers"),
    ({"hooks": {"on_free": 5}}, TypeError, "on_free is a function"),
]


@pytest.mark.parametrize(("keywords", "kind", "words"), BAD_ROUTES)
def test_a_bad_route_is_refused_where_it_is_declared(keywords, kind, words):
    made = declare_domain("*")
    for declare in (lambda: made.route("/x", handler, **keywords), lambda: route("/x", **keywords)(handler)):
        with pytest.raises(kind, match=words) as caught:
            declare()
        assert "route '/x'" in str(caught.value)
    assert application.routes == []


@pytest.mark.parametrize("bad", [None, 5, "name"])
def test_a_handler_that_is_no_function_is_a_type_error(bad):
    with pytest.raises(TypeError, match="the handler is a function"):
        declare_domain("*").route("/x", bad)
    with pytest.raises(TypeError, match="the handler is a function"):
        route("/x")(bad)


@pytest.mark.parametrize("path", ["", "/a\0", 5, None])
def test_a_path_that_is_none_is_refused(path):
    with pytest.raises((TypeError, ValueError), match="route: the path"):
        declare_domain("*").route(path, handler)
    with pytest.raises((TypeError, ValueError), match="route: the path"):
        route(path)
    with pytest.raises(TypeError, match="domain is the name"):
        route("/x", domain=5)


def test_a_bad_regular_expression_is_refused_where_it_is_declared():
    made = declare_domain("*")
    with pytest.raises(ConfigurationError, match=r"route: '\^\(' is no regular expression"):
        made.route("^(", handler)


def test_an_exact_name_wins_whatever_was_declared_first():
    serve()
    for name in ("*", "*.example", "*.b.example", "a.b.example"):
        domain(name).route("/", handler)
    plan = freeze()
    found = {host: ask(plan, "GET", "/", host=host).domain.pattern for host in
             ("a.b.example", "A.B.EXAMPLE:80", "x.b.example", "x.example", "else")}  # fmt: skip
    assert found == {
        "a.b.example": "a.b.example", "A.B.EXAMPLE:80": "a.b.example", "x.b.example": "*.b.example",
        "x.example": "*.example", "else": "*",
    }  # fmt: skip
