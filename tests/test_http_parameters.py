"""Arguments of queries and forms: what is taken, what is dropped, and what rules may do without ending anything."""

from __future__ import annotations

import asyncio
import functools
from urllib.parse import quote_from_bytes

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kore.http.parameters import FORM_BYTES_MAX, PIECES_MAX, VALUES_MAX, await_rules, has_async_rules, is_async
from kore.reactor import trace
from tests.http_harness import bounded
from tests.request_harness import FileBody, TakenBody, form, request, route

ANY = ""  # the rule that takes everything


@pytest.fixture
def lines():
    """What is logged."""
    found: list[str] = []
    trace.set_log(lambda _priority, text: found.append(text))
    yield found
    trace.set_log(None)


def query(text, method="GET", **rules):
    req = request(f"/?{text}" if text is not None else "/", method=method, **(rules or {"get": {"a": ANY, "b": ANY}}))
    assert req.populate_get() is True
    return req


def posted(text, *fields, method="POST", **rules):
    req = form(text, *fields, method=method, **(rules or {"a": ANY, "b": ANY}))
    assert req.populate_post() is True
    return req


# --- taking apart --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "a", "b"), [
    ("a=1&b=2", "1", "2"),
    ("a=1;b=2", "1;b=2", None),  # ";" is data
    ("a=1=2", "1=2", None),  # the value does not end at a second "="
    ("a==&b=%3D", "=", "="),
    ("a=&b", "", ""),  # empty values are values, with or without "="
    ("&&a=1&&", "1", None),
    ("=1&a=2", "2", None),
    ("a=x+y%20z%2B", "x y z+", None),
    ("%61=1&%62=2", "1", "2"),
    ("A=1", None, None),  # names are compared with their case
    ("aa=1&a%00=2&a+=3", None, None),
    ("a=%&b=%4", "%", "%4"),  # what only looks like an escape stays
    ("a=%zz%4g&b=%%41", "%zz%4g", "%A"),
    ("a=%C3%A9&b=%E2%82%AC", "é", "€"),
    ("a=é", "é", None),
    ("a=1&a=2", "1", None),
    ("c=1", None, None),  # no rule, no argument
])
def test_the_same_pieces_in_queries_and_forms(text, a, b):
    """Defects of old: values cut at the second "=", empty ones and those with a cut-off escape lost."""
    for req in (query(text), posted(text)):
        assert (req.argument("a"), req.argument("b")) == (a, b)
        assert req.argument("c") is None


@pytest.mark.parametrize("bad", ["%00", "%01x", "x%1f", "%7F", "%ff", "%C3", "%ed%a0%80", "%c0%af"])
def test_control_characters_and_broken_utf8_drop_that_argument_only(bad):
    for req in (query(f"a={bad}&b=2"), posted(f"a={bad}&b=2")):
        assert req.argument("a") is None
        assert req.argument("b") == "2"


def test_a_dropped_value_makes_way_for_the_next_of_its_name():
    assert query("a=%ff&a=2").argument("a") == "2"
    assert query("a=x&a=2", get={"a": "^[0-9]$"}).argument("a") == "2"


def test_line_ends_and_tabs_are_for_forms():
    assert posted("a=1%0D%0A2%09").argument("a") == "1\r\n2\t"
    assert query("a=1%0D%0A2%09").argument("a") is None
    assert query("a=%09").argument("a") is None
    assert posted(b"a=raw\x01&b=2\n").argument("a") is None


def test_raw_bytes_in_a_query_are_utf8_or_nothing():
    raw = b"a=\xc3\xa9&b=\xff".decode("utf-8", "surrogateescape")
    assert query(raw).argument("a") == "é"
    assert query(raw).argument("b") is None


def test_without_a_query_or_a_body_nothing_happens():
    for text in (None, ""):
        req = query(text)
        assert req.argument("a") is None
    assert posted("").argument("a") is None


@given(st.dictionaries(st.text(min_size=1).filter(lambda t: t.isprintable()), st.text().filter(
    lambda t: not any(c < " " or c == "\x7f" for c in t)), max_size=5))
@bounded
def test_what_is_encoded_comes_back(values):
    """Whatever a browser may send for printable text is what the application gets."""
    text = "&".join(f"{quote_from_bytes(n.encode())}={quote_from_bytes(v.encode())}" for n, v in values.items())
    rules = dict.fromkeys(values, ANY)
    posted = form(text, post=rules)
    posted.populate_post()
    assert {name: posted.argument(name) for name in values} == values
    if len(text) < 1900:  # what fits into a request line
        asked = request(f"/?{text}", get=rules)
        asked.populate_get()
        assert {name: asked.argument(name) for name in values} == values


@given(st.binary(max_size=200))
@bounded
def test_no_bytes_are_too_strange(data):
    """Any body is taken apart without an exception, and what comes out is text without control characters."""
    req = posted(b"a=" + data + b"&b=2&" + data, a=ANY, b=ANY)
    for name in "ab":
        value = req.argument(name)
        if value is not None:
            value.encode()
            assert not any(c < " " and c not in "\t\r\n" for c in value)


# --- which rules ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "rules", "found"), [
    ("GET", {"get": {"a": ANY}}, True),
    ("GET", {"GET": {"a": ANY}}, True),
    ("GET", {"qs": {"a": ANY}}, True),
    ("GET", {"post": {"a": ANY}}, False),
    ("HEAD", {"get": {"a": ANY}}, True),  # of old HEAD had none
    ("HEAD", {"head": {"a": ANY}}, True),
    ("HEAD", {"qs": {"a": ANY}}, True),
    ("POST", {"qs": {"a": ANY}}, True),
    ("POST", {"get": {"a": ANY}}, False),
    ("POST", {"post": {"a": ANY}}, False),  # POST's are for the body
    ("OPTIONS", {"qs": {"a": ANY}}, True),
    ("GET", {}, False),
])
def test_the_rules_of_a_query(method, rules, found):
    req = request("/?a=1", method=method, **rules)
    req.populate_get()
    assert (req.argument("a") == "1") is found


def test_the_methods_own_rule_comes_before_that_of_qs():
    req = request("/?a=x&a=1", qs={"a": "x"}, get={"a": "[0-9]"})
    req.populate_get()
    assert req.argument("a") == "1"


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
def test_forms_of_every_method_with_a_body(method):
    """Defect of old: populate_post() did nothing but for POST."""
    assert posted("a=1", method=method).argument("a") == "1"
    req = form("a=1", method=method, get={"a": ANY}, qs={"a": ANY})
    req.populate_post()
    assert req.argument("a") is None


def test_a_get_with_a_body_takes_nothing_from_it():
    req = form("a=1", method="GET", get={"a": ANY})
    req.populate_post()
    assert req.argument("a") is None


@pytest.mark.parametrize(("field", "found"), [
    ("application/x-www-form-urlencoded", True),
    ("Application/X-WWW-Form-Urlencoded ; charset=UTF-8", True),
    ("", True),  # a client that says nothing
    ("application/json", False),
    ("text/plain", False),
    ("multipart/form-data; boundary=x", False),
    ("application/x-www-form-urlencodedx", False),
])
def test_the_content_type_of_a_form_is_looked_at(field, found):
    """Defect of old: anything was taken apart, whatever it said it was."""
    req = form("a=1", kind=field and f"Content-Type: {field}", a=ANY)
    req.populate_post()
    assert (req.argument("a") is not None) is found


def test_a_form_on_disk(tmp_path):
    path = tmp_path / "body"
    path.write_bytes(b"a=1&b=%20")
    body = FileBody(path)
    req = request("/", "Content-Type: application/x-www-form-urlencoded", method="POST", body=body,
                  post={"a": ANY, "b": ANY})
    req.populate_post()
    assert (req.argument("a"), req.argument("b")) == ("1", " ")
    body.close()


def test_populating_leaves_the_body_as_it_is():
    """Defect of old: after populate_post() the body had NULs in place of its separators."""
    req = form("a=1&b=2%20", a=ANY)
    req.body_read(2)
    req.populate_post()
    assert req.body_read(3) == (3, b"1&b")
    assert req.body == b"a=1&b=2%20"
    assert req.body_read(1) == (0, b"")


def test_populating_twice_and_both_keeps_the_first():
    rule = dict.fromkeys("abc", ANY)
    req = request("/?a=query&c=3", "Content-Type: application/x-www-form-urlencoded", method="POST", body=b"a=body&b=2",
                  post=rule, qs=rule)
    req.populate_post()
    req.populate_post()
    req.populate_get()
    assert [req.argument(name) for name in "abc"] == ["body", "2", "3"]


def test_the_query_of_a_post_and_its_form_together():
    req = request("/?a=query&b=query", "Content-Type: application/x-www-form-urlencoded", method="POST",
                  body=b"a=body&c=body", qs={"a": "^query", "b": ANY}, post={"a": "^body", "c": ANY})
    req.populate_get()
    req.populate_post()
    assert [req.argument(name) for name in "abc"] == ["query", "query", "body"]


# --- limits --------------------------------------------------------------------------------------------------


def test_a_thousand_arguments_and_of_more_none(lines):
    """Of old the first 19 were taken, the rest ignored: now too many is nothing, and it is said."""
    pieces = ["x=y"] * (PIECES_MAX - 1) + ["a=1"]
    assert posted("&".join(pieces)).argument("a") == "1"
    assert lines == []
    for text in ("&".join([*pieces, "b=2"]), "a=1" + "&" * PIECES_MAX):
        req = posted(text)
        assert req.argument("a") is None
        assert lines.pop() == f"{req!r}: more than {PIECES_MAX} arguments; none of them is taken"
    assert query("a=1" + "&" * PIECES_MAX).argument("a") is None


def test_a_form_too_large_to_be_one(tmp_path, lines):
    """A body on disk, gigabytes perhaps, is not read into memory because its type says form."""
    path = tmp_path / "body"
    with path.open("wb") as file:
        file.write(b"a=1&b=")
        file.truncate(FORM_BYTES_MAX + 1)
    body = FileBody(path)
    req = request("/", "Content-Type: application/x-www-form-urlencoded", method="POST", body=body, post={"a": ANY})
    req.populate_post()
    assert req.argument("a") is None
    assert body.largest == 0
    assert "nothing of it is taken" in lines[0]
    body.close()


def test_only_so_many_values_of_one_name_are_tried(lines):
    tried: list[str] = []

    def rule(req, value):
        tried.append(value)
        return value == "good"

    bad = [f"a={i}" for i in range(VALUES_MAX)]
    assert query("&".join([*bad, "b=1", "a=good"]), get={"a": rule, "b": ANY}).argument("a") is None
    assert tried == [piece[2:] for piece in bad]
    tried.clear()
    req = query("&".join([*bad[1:], "a=good", "a=good", "b=1"]), get={"a": rule, "b": ANY})
    assert (req.argument("a"), req.argument("b")) == ("good", "1")
    assert tried[-2:] == [str(VALUES_MAX - 1), "good"]


# --- rules ---------------------------------------------------------------------------------------------------


def test_a_pattern_is_searched():
    rules = {"get": {"a": "[0-9]", "b": "^[0-9]{4}$"}}
    req = query("a=x1x&b=12345", **rules)
    assert (req.argument("a"), req.argument("b")) == ("x1x", None)
    assert query("b=1234", **rules).argument("b") == "1234"
    assert query("b=1234%0A", **rules).argument("b") is None


def test_a_function_is_called_with_the_request_and_the_decoded_value():
    seen = []

    def rule(req, value):
        seen.append((req, value))
        return True

    req = query("a=x%20y", get={"a": rule})
    assert req.argument("a") == "x y"
    assert seen == [(req, "x y")]


@pytest.mark.parametrize(("result", "said"), [
    (True, None), (False, None), (None, "NoneType"), (1, "int"), ("yes", "str"), (0, "int"), ([], "list"),
])
def test_exactly_true_accepts(lines, result, said):
    req = query("a=1&b=2", get={"a": lambda req, value: result, "b": ANY})
    assert (req.argument("a") == "1") is (result is True)
    assert req.argument("b") == "2"
    expected = f"the rule of parameter 'a': it returned {said}, not True or False; the value is dropped"
    assert lines == ([expected] if said else [])


@pytest.mark.parametrize("error", [ValueError("x"), SystemExit(1), KeyboardInterrupt(), GeneratorExit()])
def test_an_exception_in_a_rule_drops_the_value(lines, error):
    """Defect of old: the worker ended."""
    def rule(req, value):
        raise error

    req = query("a=1&b=2", get={"a": rule, "b": ANY})
    assert (req.argument("a"), req.argument("b")) == (None, "2")
    place = f", at test_http_parameters.py:{rule.__code__.co_firstlineno + 1} rule"
    assert lines == [f"python_runtime_validator: uncaught exception: {error!r}{place}"]


def test_a_value_that_is_no_text_never_reaches_a_function():
    """Defect of old: invalid UTF-8 for a function ended the worker."""
    req = query("a=%ff%fe", get={"a": lambda req, value: pytest.fail("called")})
    assert req.argument("a") is None


# --- coroutine functions -------------------------------------------------------------------------------------


async def accept(req, value):
    await asyncio.sleep(0)
    return value.startswith("good")


class Accept:
    async def __call__(self, req, value):
        await asyncio.sleep(0)
        return True

    async def method(self, req, value):
        await asyncio.sleep(0)
        return True


@pytest.mark.parametrize(("rule", "expected"), [
    (accept, True), (functools.partial(accept, None), True), (Accept(), True), (Accept().method, True),
    (lambda req, value: True, False), ("^x$", False), (print, False), (bool, False),
])
def test_which_rules_are_awaited(rule, expected):
    of = route(post={"a": ANY, "b": rule})
    assert has_async_rules(of) is expected
    assert [is_async(declared) for declared in of.parameters["post"]] == [False, expected]


def test_routes_without_rules_are_not_awaited():
    assert not has_async_rules(route())
    assert not has_async_rules(request()._prepared.route)


def awaited(req):
    asyncio.run(await_rules(req))
    return req


def test_a_rule_that_waits_decides():
    """Defect of old: one that waited was taken for accepting, and never finished."""
    req = awaited(request("/?a=bad&b=good&a=good1&a=good2", get={"a": accept, "b": accept}))
    assert req.argument("a") is None
    req.populate_get()
    assert (req.argument("a"), req.argument("b")) == ("good1", "good")
    req = awaited(form("a=bad", a=accept))
    req.populate_post()
    assert req.argument("a") is None


def test_a_rule_that_waits_is_asked_once_for_each_value():
    seen = []

    async def rule(req, value):
        seen.append(value)
        await asyncio.sleep(0)
        return value == "3"

    req = awaited(request("/?a=1&a=1&a=2&a=3&a=4", get={"a": rule}))
    awaited(req).populate_get()
    req.populate_get()
    assert req.argument("a") == "3"
    assert seen == ["1", "2", "3"]


def test_plain_rules_are_not_run_before_they_are_asked_for():
    called = []
    req = awaited(request("/?a=1&b=good", get={"a": lambda req, value: called.append(value) or True, "b": accept}))
    assert called == []
    req.populate_get()
    assert (req.argument("a"), req.argument("b")) == ("1", "good")


@pytest.mark.parametrize("error", [ValueError("x"), SystemExit(1)])
def test_an_exception_in_a_rule_that_waits_drops_the_value(lines, error):
    async def rule(req, value):
        await asyncio.sleep(0)
        raise error

    req = awaited(request("/?a=1&b=good", get={"a": rule, "b": accept}))
    req.populate_get()
    assert (req.argument("a"), req.argument("b")) == (None, "good")
    place = f", at test_http_parameters.py:{rule.__code__.co_firstlineno + 2} rule"
    assert lines == [f"coroutine: uncaught exception: {error!r}{place}"]


def test_a_rule_that_waits_must_return_exactly_true(lines):
    async def rule(req, value):
        return 1

    req = awaited(request("/?a=1", get={"a": rule}))
    req.populate_get()
    assert req.argument("a") is None
    assert len(lines) == 1


def test_the_end_of_the_request_ends_a_rule_that_waits():
    ended = []

    async def rule(req, value):
        try:
            await asyncio.sleep(3600)
        finally:
            ended.append(value)

    async def leave():
        task = asyncio.ensure_future(await_rules(request("/?a=1&b=2", get={"a": rule, "b": rule})))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(leave())
    assert ended == ["1"]
    coroutine = await_rules(request("/?a=1&b=2", get={"a": Forever(), "b": Forever()}))
    coroutine.send(None)
    coroutine.close()


class Forever:
    async def __call__(self, req, value):
        await Wait()


class Wait:
    def __await__(self):
        yield


def test_a_function_that_returns_a_coroutine_gets_one_step(lines):
    """One that needs no more counts; one that would wait is closed and accepts nothing."""
    async def at_once(req, value):
        return True

    closed = []

    async def waits(req, value):
        try:
            await Wait()
        finally:
            closed.append(value)
        return True

    def plain(function):
        def rule(req, value):
            return function(req, value)
        return rule

    req = query("a=1&b=2", get={"a": plain(at_once), "b": plain(waits)})
    assert (req.argument("a"), req.argument("b")) == ("1", None)
    assert closed == ["2"]
    assert len(lines) == 1
    assert lines[0].startswith("the rule of parameter 'b': it waits")


def test_a_coroutine_that_refuses_to_close_drops_the_value(lines):
    async def stubborn(req, value):
        while True:
            try:
                await Wait()
            except GeneratorExit:
                continue

    made = []

    def rule(req, value):
        made.append(stubborn(req, value))
        return made[-1]

    assert query("a=1", get={"a": rule}).argument("a") is None
    assert "RuntimeError" in lines[-1]
    with pytest.raises((RuntimeError, ValueError)):  # let it go, or it complains when it is collected
        made[0].throw(ValueError())


def test_a_body_that_is_not_there_does_not_end_the_request_before_its_handler():
    req = request("/", "Content-Type: application/x-www-form-urlencoded", method="POST", body=TakenBody(),
                  post={"a": accept})
    awaited(req)
    with pytest.raises(RuntimeError):
        req.populate_post()
    broken = request("/", "Content-Type: multipart/form-data; boundary=b", method="POST", body=b"nonsense",
                     post={"a": accept})
    awaited(broken)
    with pytest.raises(ValueError):
        broken.populate_multi()


def test_verdicts_belong_to_one_rule():
    """The same name and value in query and form may be judged by different rules."""
    async def never(req, value):
        return False

    req = request("/?a=good", "Content-Type: application/x-www-form-urlencoded", method="POST", body=b"a=good",
                  qs={"a": never}, post={"a": accept})
    awaited(req).populate_get()
    assert req.argument("a") is None
    req.populate_post()
    assert req.argument("a") == "good"


# --- looking up ----------------------------------------------------------------------------------------------


def test_lookups_are_positional_and_want_a_str():
    req = query("a=1")
    for wrong in (None, 1, b"a", ["a"]):
        with pytest.raises(TypeError):
            req.argument(wrong)
    with pytest.raises(TypeError):
        req.argument(name="a")
    with pytest.raises(TypeError):
        req.populate_get(1)


def test_a_request_without_a_route_takes_nothing():
    req = request("/?a=1")
    req._prepared.route = None
    req.populate_get()
    req.populate_post()
    req.populate_multi()
    assert req.argument("a") is None
