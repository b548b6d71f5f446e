"""A request's arguments: what the query string and forms hold, as far as the rules of the route let it through.

An application declares which arguments it takes and what their values must look like; everything else is dropped
without a word. Rules are patterns, functions, or coroutine functions. The latter are awaited before the handler runs
(`await_rules`), because taking the arguments, which is a plain call of the handler, cannot wait: it finds their
verdicts. Whatever a rule does, a value it did not clearly accept is not accepted.
"""

from __future__ import annotations

import re
from asyncio import CancelledError
from collections.abc import Callable, Iterable, Mapping
from inspect import iscoroutinefunction
from types import CoroutineType
from typing import TYPE_CHECKING, Any, Final, Protocol
from urllib.parse import unquote_to_bytes

from kore.errors import BodyError
from kore.http import multipart
from kore.http.multipart import FORM_BYTES_MAX, Part
from kore.http.upload import UploadedFile, body_length, body_piece
from kore.reactor.trace import LOG_ERR, LOG_NOTICE, log, report_exception

if TYPE_CHECKING:
    from kore.http.request import Request
    from kore.http.routes import Route

PIECES_MAX: Final = 1000
"""Arguments of one query or form, unknown and empty ones too: no page has more inputs, and each is compared."""

VALUES_MAX: Final = 20
"""Values of one name that are tried: a rule may be a query to a database, and one request not a thousand of them."""

URLENCODED: Final = "application/x-www-form-urlencoded"

_control = re.compile(rb"[\x00-\x1f\x7f]").search
_control_in_text = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]").search  # TAB, CR and LF are in any text area

Forbidden = Callable[[bytes], object]


class Rule(Protocol):
    """What the value of one argument must be: found by `pattern`, or accepted by `check(request, value)`."""

    @property
    def name(self) -> str:
        """The argument's name, compared exactly."""

    @property
    def pattern(self) -> re.Pattern[str] | None:
        """Searched in the value."""

    @property
    def check(self) -> Callable[..., Any] | None:
        """Called with the value when there is no pattern; exactly True accepts."""


Rules = Mapping[str, Rule]
Candidate = tuple[Rule, str]

# --- which rules ---------------------------------------------------------------------------------------------


def query_rules(request: Request) -> Rules:
    """The rules for the query string: those of "qs", and for GET and HEAD their methods' own before them."""
    names = {"GET": ("get",), "HEAD": ("head", "get")}.get(request._prepared.head.method_name, ())
    return _rules(request, *names, "qs")


def body_rules(request: Request) -> Rules:
    """The rules for fields of the body: those of the request's method, but GET's and HEAD's are for the query."""
    name = request._prepared.head.method_name.lower()
    return {} if name in ("get", "head") else _rules(request, name)


def _rules(request: Request, *names: str) -> Rules:
    route = request._prepared.route
    declared = route.parameters if route is not None else None
    found: dict[str, Rule] = {}
    for name in names:
        for rule in (declared or {}).get(name, ()):
            found.setdefault(rule.name, rule)
    return found


# --- which values --------------------------------------------------------------------------------------------


def query_candidates(request: Request, rules: Rules) -> list[Candidate]:
    """The values in the query string that there is a rule for."""
    query = request._prepared.head.query
    if not query or not rules:
        return []
    return _split(request, query.encode("utf-8", "surrogateescape"), rules, _control)


def form_candidates(request: Request, rules: Rules) -> list[Candidate]:
    """The values in an urlencoded body that there is a rule for.

    A body whose Content-Type names another format is not one; a client that says nothing is taken at its handler's
    word (RFC 9110 8.3).
    """
    body = request._body
    length = body_length(body)
    if not length or not rules:
        return []
    content_type = request.request_header("content-type")
    if content_type is not None and content_type.partition(";")[0].strip(" \t").lower() != URLENCODED:
        return []
    if length > FORM_BYTES_MAX:
        log(LOG_NOTICE, f"{request!r}: a form of {length} bytes, more than {FORM_BYTES_MAX}; nothing of it is taken")
        return []
    return _split(request, body_piece(body, 0, length), rules, _control_in_text)


def field_candidates(request: Request, parts: Iterable[Part], rules: Rules) -> list[Candidate]:
    """The values of a multipart form's fields that there is a rule for."""
    found = []
    for part in parts:
        rule = rules.get(part.name)
        if rule is not None and part.filename is None:
            value = _text(body_piece(request._body, part.start, part.length), _control_in_text)
            if value is not None:
                found.append((rule, value))
    return _few_each(found)


def _split(request: Request, data: bytes, rules: Rules, forbidden: Forbidden) -> list[Candidate]:
    """``name=value&...`` (WHATWG URL, "application/x-www-form-urlencoded parsing").

    Only "&" separates; a value begins after the first "=" and may be empty.
    """
    if data.count(b"&") >= PIECES_MAX:
        # Not the first thousand: a part of the arguments could mean the opposite of all of them.
        log(LOG_NOTICE, f"{request!r}: more than {PIECES_MAX} arguments; none of them is taken")
        return []
    found = []
    for piece in data.split(b"&"):
        name, _, value = piece.partition(b"=")
        rule = rules.get(_decode(name).decode("utf-8", "replace"))
        if rule is not None:
            text = _text(_decode(value), forbidden)
            if text is not None:
                found.append((rule, text))
    return _few_each(found)


def _decode(data: bytes) -> bytes:
    """"+" is a space, %hh a byte, and what only looks like an escape stays as it is."""
    return unquote_to_bytes(data.replace(b"+", b" "))


def _text(value: bytes, forbidden: Forbidden) -> str | None:
    """A value as text; None for one with control characters or invalid UTF-8, which is dropped."""
    if forbidden(value) is not None:
        return None
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        return None


def _few_each(candidates: list[Candidate]) -> list[Candidate]:
    """The first values of each name: see `VALUES_MAX`."""
    if len(candidates) <= VALUES_MAX:
        return candidates
    counts: dict[str, int] = {}
    found = []
    for candidate in candidates:
        name = candidate[0].name
        counts[name] = counts.get(name, 0) + 1
        if counts[name] <= VALUES_MAX:
            found.append(candidate)
    return found


# --- whether they pass ---------------------------------------------------------------------------------------


def take(request: Request, candidates: Iterable[Candidate]) -> None:
    """Keep the first value of each name that passes its rule, unless an earlier call kept one."""
    arguments = request._arguments
    if arguments is None:
        arguments = request._arguments = {}
    for rule, value in candidates:
        if rule.name not in arguments and _passes(request, rule, value):
            arguments[rule.name] = value


def _passes(request: Request, rule: Rule, value: str) -> bool:
    if rule.pattern is not None:
        return rule.pattern.search(value) is not None
    verdicts = request._verdicts
    if verdicts is not None and (id(rule), value) in verdicts:
        return verdicts[id(rule), value]
    assert rule.check is not None
    try:
        result = rule.check(request, value)
        if isinstance(result, CoroutineType):
            result = _one_step(rule, result)
    except BaseException as error:  # noqa: BLE001 - a rule that fails accepts nothing, and ends nothing else
        report_exception("python_runtime_validator", error)
        return False
    return _verdict(rule, result)


def _one_step(rule: Rule, coroutine: Any) -> Any:
    """The result of a coroutine that does not have to wait. One that would is closed: nobody can wait here."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        return stop.value
    coroutine.close()
    text = "it waits, and is no coroutine function, which would be awaited before the handler; the value is dropped"
    log(LOG_ERR, f"the rule of parameter {rule.name!r}: {text}")
    return False


def _verdict(rule: Rule, result: Any) -> bool:
    if result is not True and result is not False:
        text = f"it returned {type(result).__name__}, not True or False; the value is dropped"
        log(LOG_ERR, f"the rule of parameter {rule.name!r}: {text}")
    return result is True


# --- rules that wait -----------------------------------------------------------------------------------------


def is_async(rule: Rule) -> bool:
    """Whether a rule is a coroutine function, or an object whose call is one."""
    return rule.check is not None and (
        iscoroutinefunction(rule.check) or iscoroutinefunction(type(rule.check).__call__)
    )


def has_async_rules(route: Route) -> bool:
    """Whether requests of `route` need `await_rules` before their handler."""
    return any(is_async(rule) for rules in (route.parameters or {}).values() for rule in rules)


async def await_rules(request: Request) -> None:
    """Run the coroutine functions among the rules on what the request carries, and keep their verdicts on it.

    One after the other, in the order of the values, until one of a name passes. What the handler then takes finds its
    verdict here; a handler that takes nothing has waited in vain, which is why plain rules are not run.
    """
    if request._verdicts is None:
        request._verdicts = {}
    rules = _waiting(query_rules(request))
    if rules:
        await _judge(request, query_candidates(request, rules))
    rules = _waiting(body_rules(request))
    if rules:
        try:
            if multipart.is_multipart(request.request_header("content-type")):
                candidates = field_candidates(request, form_of(request), rules)
            else:
                candidates = form_candidates(request, rules)
        except (BodyError, RuntimeError):
            return  # the handler hears of it when it asks for the form; it may not want it at all
        await _judge(request, candidates)


def _waiting(rules: Rules) -> Rules:
    return {name: rule for name, rule in rules.items() if is_async(rule)}


async def _judge(request: Request, candidates: Iterable[Candidate]) -> None:
    assert request._verdicts is not None
    passed = set()
    for rule, value in candidates:
        if rule.name in passed:
            continue
        verdict = request._verdicts.get((id(rule), value))
        if verdict is None:
            verdict = request._verdicts[id(rule), value] = await _waited(request, rule, value)
        if verdict:
            passed.add(rule.name)


async def _waited(request: Request, rule: Rule, value: str) -> bool:
    assert rule.check is not None
    try:
        return _verdict(rule, await rule.check(request, value))
    except (CancelledError, GeneratorExit):
        raise  # it is the request that ends
    except BaseException as error:  # noqa: BLE001 - as in `_passes`
        report_exception("coroutine", error)
        return False


# --- forms ---------------------------------------------------------------------------------------------------


def form_of(request: Request) -> list[Part]:
    """The parts of a multipart body, found once. Raises `BodyError`, and RuntimeError for a body that is not kept."""
    parts = request._parts
    if parts is None:
        parts = []
        if request._form is not None:
            parts = request._form.end()
        elif body_length(request._body):
            parts = multipart.parse(request._body, request.request_header("content-type") or "")
        request._parts = parts
    return parts


def populate_get(request: Request) -> None:
    """Take the arguments of the query string."""
    take(request, query_candidates(request, query_rules(request)))


def populate_post(request: Request) -> None:
    """Take the arguments of an urlencoded body, of any method that has one."""
    take(request, form_candidates(request, body_rules(request)))


def populate_multi(request: Request) -> None:
    """Take the fields and files of a multipart body."""
    if not multipart.is_multipart(request.request_header("content-type")):
        return
    parts = form_of(request)
    take(request, field_candidates(request, parts, body_rules(request)))
    files = request._files
    if files is None:
        files = request._files = {}
    for part in parts:
        # An input in which nothing was chosen comes as an empty file without a name (WHATWG HTML, "constructing
        # the entry list").
        if part.filename is not None and (part.filename or part.length) and part.name not in files:
            files[part.name] = UploadedFile(
                request._body, part.start, part.length,
                name=part.name, filename=part.filename, content_type=part.content_type,
            )  # fmt: skip
