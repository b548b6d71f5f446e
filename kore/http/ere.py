"""POSIX extended regular expressions, translated to Python's.

Applications of the platform are written against regcomp(3): what is undefined there or means something else in
Python is translated, not passed on. Brackets know classes and no escapes, ``$`` is the very end, ``.`` matches every
character, a second quantifier repeats the first, and ``{`` that is no interval is an error.

One difference stays: of several alternatives POSIX takes the one that makes the longest match, Python the first that
leads to one. Whether a text is found is the same; how much a group takes may differ where one alternative begins
with another, as in ``(a|ab)``. Anchored at both ends, as routes usually are, it rarely shows.

A pattern that takes exponential time is the application's business, as it always was.
"""

from __future__ import annotations

import re
from typing import Final

REPEAT_MAX: Final = 255  # RE_DUP_MAX of POSIX; glibc takes 32767, and compiles copies of the atom

_CLASSES: Final = {
    "alpha": "a-zA-Z",
    "digit": "0-9",
    "alnum": "a-zA-Z0-9",
    "upper": "A-Z",
    "lower": "a-z",
    "space": r" \t\n\r\f\v",
    "blank": r" \t",
    "punct": r"!-/:-@\[-`{-~",
    "print": " -~",
    "graph": "!-~",
    "cntrl": r"\x00-\x1f\x7f",
    "xdigit": "0-9A-Fa-f",
}

# What glibc's regcomp gives a meaning to, and \d and \D, which it takes for letters and everyone else for digits.
_ESCAPES: Final = {"<": r"\b(?=\w)", ">": r"\b(?<=\w)", "`": r"\A", "'": r"\Z"} | {c: "\\" + c for c in "wWsSbBdD"}

_interval = re.compile(r"\{([0-9]*)(?:(,)([0-9]*))?\}").match
_named = re.compile(r"\[([:=.])(.*?)\1\]").match


def compile_pattern(text: str) -> re.Pattern[str]:
    """`text`, a POSIX extended regular expression, as a pattern to search with. Raises ValueError, saying why."""
    try:
        return re.compile(_Translation(text).result, re.ASCII | re.DOTALL)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(str(error) or type(error).__name__) from None


class _Translation:
    """One pass over an expression. Each atom is an element of `_out`, so that it can be wrapped when repeated again."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._out: list[str] = []
        self._open: list[int] = []  # where in _out the groups not closed yet begin
        self._quantified = False
        self._atom = False  # whether the last element can be repeated
        while self._at < len(text):
            self._step(text[self._at])
        if self._open:
            raise ValueError("missing )")
        self.result = "".join(self._out)

    def _step(self, character: str) -> None:
        if character in "*+?{":
            self._quantifier(character)
        elif character == "(":
            self._open.append(len(self._out))
            self._put("(", 1, atom=False)
        elif character == ")" and self._open:
            begin = self._open.pop()
            self._out[begin:] = ["".join(self._out[begin:]) + ")"]
            self._at += 1
            self._atom, self._quantified = True, False
        elif character == "[":
            self._bracket()
        elif character == "\\":
            self._escape()
        elif character in "^$|":
            self._put({"^": r"\A", "$": r"\Z", "|": "|"}[character], 1, atom=False)
        else:
            # A ")" that closes nothing stands for itself.
            self._put("." if character == "." else re.escape(character), 1)

    def _put(self, translated: str, length: int, *, atom: bool = True) -> None:
        self._out.append(translated)
        self._at += length
        self._atom, self._quantified = atom, False

    def _quantifier(self, character: str) -> None:
        sign = character
        length = 1
        if character == "{":
            match = _interval(self._text, self._at)
            if match is None or not (match[1] or match[3]):
                raise ValueError("{ without an interval; a brace itself is written \\{")
            low, high = int(match[1] or 0), int(match[3] or (REPEAT_MAX if match[2] else match[1]))
            if not low <= high <= REPEAT_MAX:
                raise ValueError(f"interval {match[0]} is not within 0 to {REPEAT_MAX}")
            length = len(match[0])
            # "{2,}" has no upper bound.
            sign = f"{{{low},{match[3]}}}" if match[2] else f"{{{low}}}"
        if not self._atom:
            raise ValueError(f"{character} repeats nothing")
        last = self._out[-1]
        # "a+?" is an optional "a+" here, and no lazy one.
        self._out[-1] = f"(?:{last}){sign}" if self._quantified else last + sign
        self._quantified = True
        self._at += length

    def _escape(self) -> None:
        escaped = self._text[self._at + 1 : self._at + 2]
        if not escaped:
            raise ValueError("a backslash escapes nothing")
        if escaped in "123456789":
            self._put(f"(?:\\{escaped})", 2)  # in a group: a digit may follow
        else:
            self._put(_ESCAPES.get(escaped) or re.escape(escaped), 2, atom=escaped not in "<>`'bB")

    def _bracket(self) -> None:
        """A bracket expression: a backslash stands for itself, the first "]" and the outer "-" too."""
        text = self._text
        at = self._at + 1
        negated = text.startswith("^", at)
        at += negated
        first = at
        parts: list[str] = []
        while at < len(text) and (text[at] != "]" or at == first):
            low, at = self._element(at)
            if text.startswith("-", at) and at + 1 < len(text) and text[at + 1] != "]":
                high, at = self._element(at + 1)
                if len(low) > 1 or len(high) > 1 or low > high:
                    raise ValueError(f"invalid range {low}-{high}")
                parts.append(f"{re.escape(low)}-{re.escape(high)}")
            else:
                parts.append(_CLASSES[low] if len(low) > 1 else _literal(low))
        if at >= len(text):
            raise ValueError("missing ]")
        self._put(f"[{'^' if negated else ''}{''.join(parts)}]", at + 1 - self._at)

    def _element(self, at: int) -> tuple[str, int]:
        """A character, or the name of a class, and where it ends."""
        match = _named(self._text, at)
        if match is None:
            return self._text[at], at + 1
        kind, name = match[1], match[2]
        if (kind == ":" and name not in _CLASSES) or (kind != ":" and len(name) != 1):
            raise ValueError(f"unknown {match[0]}; classes are {', '.join(f'[:{word}:]' for word in _CLASSES)}")
        return name, match.end()


def _literal(character: str) -> str:
    # re.escape leaves "&" "|" "~" as they are in newer versions only; doubled they may become set operators.
    return "\\" + character if character in r"\]^-[&|~" else character
