"""POSIX extended regular expressions: what they find, with regcomp(3) of the C library as a second opinion."""

from __future__ import annotations

import ctypes
import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kore.http.ere import compile_pattern

EXAMPLES = int(os.environ.get("KORE_EXAMPLES", "300"))

FOUND = [
    ("^/a$", "/a", ()), ("a.c", "xa\ncx", ()), ("^/([0-9]+)$", "/42", ("42",)), ("^/([[:alpha:]]+)", "/abC1", ("abC",)),
    ("[[:digit:][:space:]x]+$", "1 \tx", ()), ("^[^/]+$", "abc", ()), ("^[]a]+$", "]a]", ()), ("^[^]a]$", "b", ()),
    ("^[a-]+$", "-a-", ()), (r"^[\d]+$", "\\d\\", ()), (r"^[\]$", "\\", ()), ("^[[.-.]]$", "-", ()),
    ("^[[=a=]b]$", "a", ()),
    ("^[&&|~[]+$", "&|~[", ()), ("a{2}", "aa", ()), ("^a{2,}$", "aaa", ()), ("^a{,2}$", "aa", ()),
    ("^a{1,2}$", "a", ()),
    ("^(a+?)$", "aaa", ("aaa",)), ("^a*+$", "", ()), ("^(ab){2}{2}$", "abababab", ("ab",)),
    (r"^\.\*\{\\$", ".*{\\", ()),
    (r"^\<a\>$", "a", ()), (r"^\w\W\s\S\b$", "a. b", ()), (r"^(a)\10$", "aa0", ("a",)), ("a)", "a)", ()),
    ("^a|b$", "xb", ()),
    ("^(a|)$", "", ("",)), ("^()$", "", ("",)), ("^(a)|(b)$", "b", (None, "b")), ("^x#y z$", "x#y z", ()),
    ("é", "é", ()),
    ("", "anything", ()), ("(0-9)", "0-9", ("0-9",)), (r"^\d+$", "42", ()),
    ("^[[:punct:]]+$", "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~", ()),
]  # fmt: skip

NOT_FOUND = [("^a$", "a\n"), ("^[[:alpha:]]$", "é"), (r"^\w$", "é"), ("^[^a]$", "a"), ("A", "a"),
    ("^[[:upper:]]$", "a"), (r"\<b", "ab")]

REFUSED = ["*a", "a|*b", "(*a)", "(?:a)", "(?P<n>a)", "(?i)a", "(a", "((a)", "[a", "[", "[]", "[^]", "[[:nope:]]",
    "[[:alpha:]-z]",
           "[b-a]", "a{", "a{x}", "^/{id}$", "a{2,1}", "a{256}", "a{,}", "a\\", "+", "{1}", r"\1", r"(a\1)", "^*",
           "[a-[:alpha:]]"]  # fmt: skip


@pytest.mark.parametrize(("pattern", "text", "groups"), FOUND)
def test_found(pattern: str, text: str, groups: tuple[str | None, ...]) -> None:
    match = compile_pattern(pattern).search(text)
    assert match is not None
    assert match.groups() == groups


@pytest.mark.parametrize(("pattern", "text"), NOT_FOUND)
def test_not_found(pattern: str, text: str) -> None:
    assert compile_pattern(pattern).search(text) is None


@pytest.mark.parametrize("pattern", REFUSED)
def test_refused(pattern: str) -> None:
    with pytest.raises(ValueError) as error:
        compile_pattern(pattern)
    assert str(error.value)


class Regex:
    """regcomp(3) and regexec(3) of the C library: whether a text is found, None for a malformed expression."""

    def __init__(self) -> None:
        self.libc = ctypes.CDLL(None)

    def found(self, pattern: str, text: str) -> bool | None:
        compiled = ctypes.create_string_buffer(256)  # regex_t has 64 bytes with glibc, 32 with musl
        if self.libc.regcomp(compiled, pattern.encode(), 1 | 8):  # REG_EXTENDED | REG_NOSUB
            return None
        try:
            return bool(self.libc.regexec(compiled, text.encode(), 0, None, 0) == 0)
        finally:
            self.libc.regfree(compiled)


REGEX = Regex()


# No escapes: what they mean is glibc's own. No group within a repeated group with "|": both take time there.
atoms = st.sampled_from(["a", "b", "-", "]", ".", "[ab]", "[^a]", "[]-]", "[[:alpha:]]", "[^[:digit:]x]", "[a-b-]",
    "(a|b)", "(ab)", "()"])
repeats = st.sampled_from(["", "", "", "*", "+", "?", "{2}", "{1,2}", "{0,1}"])
expressions = st.lists(st.tuples(atoms, repeats).map("".join) | st.just("|"), max_size=6).map("".join)


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(expressions, st.booleans(), st.booleans(), st.text("ab-]1\n", max_size=6))
def test_the_c_library_finds_the_same(expression: str, begin: bool, end: bool, text: str) -> None:
    pattern = ("^" if begin else "") + expression + ("$" if end else "")
    expected = REGEX.found(pattern, text)
    if expected is not None:
        assert (compile_pattern(pattern).search(text) is not None) == expected
