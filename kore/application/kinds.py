"""What the value of an option may be: one small class a kind, each of which parses, explains and prints its values.

The options themselves are a table (settings.py) that a reader can scan; how an integer or a yes/no is read stands
here once, so that every option of a kind takes the same spellings and refuses the same mistakes. The reference takes
integers and texts for each other everywhere (kore-api.md section 6), and so do these.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

_DECIMAL = re.compile(r"-?[0-9]+", re.ASCII)
_BASED = re.compile(r"0[xX][0-9a-fA-F]+|0[0-7]*", re.ASCII)
_MEDIA_TYPE = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+/[!#$%&'*+.^_`|~0-9A-Za-z-]+", re.ASCII)
_FIELD_VALUE = re.compile(r"[\x21-\x7e](?:[\x20-\x7e]*[\x21-\x7e])?", re.ASCII)
_URL = re.compile(r"https://[^\s/?#@:]+(?::[0-9]{1,5})?(?:[/?][\x21-\x7e]*)?|https://\[[0-9a-fA-F:.]+\](?::[0-9]{1,5})?"
                  r"(?:[/?][\x21-\x7e]*)?", re.ASCII)
_EMAIL = re.compile(r"[A-Za-z0-9!#$'*+/=^_`{|}~.-]+@[A-Za-z0-9.-]+", re.ASCII)

DIGITS_MAX = 40
"""Longest integer text that is parsed: twice what 64 bits need, and far below what costs time."""

EXTENSIONS_MAX = 9
"""Extensions of one ``http_media_type``, as in the reference."""

PORT_MAX = 0xFFFF
ANY_PORT = "any"

URL_MAX = 2048
"""Characters of a URL: more than any client or server takes."""

EMAIL_MAX = 254
"""Characters of an address, RFC 5321 4.5.3.1.3."""

SHOWN_VALUE_MAX = 80
"""Characters of a refused value that an error message repeats; the rest is cut."""

SHOWN_BITS_MAX = 256
"""Bits of an integer that is repeated in digits: Python refuses to print very large ones."""


class Kind(Protocol):
    """One kind of value: `parse` returns it in the form the server uses, or raises ValueError."""

    @property
    def allowed(self) -> str:
        """What may be assigned, in words that complete "allowed is ..."."""

    def parse(self, value: object) -> object:
        """Turn what an application assigned into the value; ValueError when it can't be."""

    def show(self, value: object) -> str:
        """The value as an application would write it; for the documentation."""


def shown(value: object) -> str:
    """`value` for an error message: its repr, cut when it is long."""
    if isinstance(value, int) and value.bit_length() > SHOWN_BITS_MAX:
        return f"an integer of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= SHOWN_VALUE_MAX else text[: SHOWN_VALUE_MAX - 3] + "..."


@dataclass(frozen=True, slots=True)
class Integer:
    """An integer between two bounds, given as an int or as its decimal text."""

    low: int
    high: int
    unit: str = ""
    based: bool = False
    """Texts such as 0x10 and 010 count by the base that strtol(3) sees in them."""

    @property
    def allowed(self) -> str:
        """The bounds and the unit."""
        unit = f" {self.unit}" if self.unit else ""
        return f"an integer from {_power(self.low)} to {_power(self.high)}{unit}"

    def parse(self, value: object) -> int:
        """Accept an int or its text within the bounds; True and False are not numbers here."""
        if isinstance(value, bool):
            raise ValueError("a boolean is not a number")
        if isinstance(value, int):
            number = int(value)
        elif isinstance(value, str) and len(value) <= DIGITS_MAX and _DECIMAL.fullmatch(value):
            number = int(value, 8) if self.based and _BASED.fullmatch(value) else int(value)
        elif isinstance(value, str) and len(value) <= DIGITS_MAX and self.based and _BASED.fullmatch(value):
            number = int(value, 16)
        else:
            raise ValueError("not an integer")
        if not self.low <= number <= self.high:
            raise ValueError("out of range")
        return number

    def show(self, value: object) -> str:
        """The decimal digits."""
        return str(value)


@dataclass(frozen=True, slots=True)
class Switch:
    """Yes or no. The reference spells some of them yes/no and some 1/0; every one takes all spellings and booleans."""

    words: tuple[str, str] = ("no", "yes")

    @property
    def allowed(self) -> str:
        """The documented pair, and the booleans."""
        return f"{self.words[1]} or {self.words[0]} (True and False as well)"

    def parse(self, value: object) -> bool:
        """Accept a boolean, 1 and 0, and the words for them in any case."""
        if isinstance(value, int) and value in (0, 1):
            return bool(value)
        if isinstance(value, str) and value.lower() in ("yes", "1", "true", "on"):
            return True
        if isinstance(value, str) and value.lower() in ("no", "0", "false", "off"):
            return False
        raise ValueError("neither yes nor no")

    def show(self, value: object) -> str:
        """The documented word."""
        return self.words[bool(value)]


@dataclass(frozen=True, slots=True)
class Choice:
    """One of a few words; several words may mean the same value."""

    words: Mapping[str, str]

    @property
    def allowed(self) -> str:
        """All the words."""
        return "one of " + ", ".join(self.words)

    def parse(self, value: object) -> str:
        """Accept one of the words exactly; a number counts as its text (``tls_version`` may be 1.2)."""
        text = str(value) if isinstance(value, float) else value
        if not isinstance(text, str) or text not in self.words:
            raise ValueError("none of the choices")
        return self.words[text]

    def show(self, value: object) -> str:
        """The word itself."""
        return str(value)


@dataclass(frozen=True, slots=True)
class Text:
    """A text of one line."""

    length_max: int = 1024
    what: str = "a text"

    @property
    def allowed(self) -> str:
        """What the text is, and its bound."""
        return f"{self.what} of 1 to {self.length_max} printable ASCII characters"

    def parse(self, value: object) -> str:
        """Accept a str, or an int as its text; control characters could split a header or a log line."""
        text = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
        if not isinstance(text, str) or len(text) > self.length_max or not _FIELD_VALUE.fullmatch(text):
            raise ValueError("not such a text")
        return str(text)

    def show(self, value: object) -> str:
        """The text itself."""
        return str(value)


@dataclass(frozen=True, slots=True)
class Url:
    """An HTTPS URL."""

    @property
    def allowed(self) -> str:
        """The scheme, which is what is forgotten."""
        return "an https:// URL of printable ASCII characters"

    def parse(self, value: object) -> str:
        """Accept a str with a host in it; RFC 8555 6.1 forbids plain HTTP."""
        if not isinstance(value, str) or len(value) > URL_MAX or not _URL.fullmatch(value):
            raise ValueError("not such a URL")
        return value

    def show(self, value: object) -> str:
        """The URL itself."""
        return str(value)


@dataclass(frozen=True, slots=True)
class Email:
    """The address of one mailbox."""

    @property
    def allowed(self) -> str:
        """By example."""
        return "an email address, as in name@example.org"

    def parse(self, value: object) -> str:
        """Accept one address without a name or scheme: it becomes the part of a mailto URL, RFC 8555 7.3."""
        if not isinstance(value, str) or len(value) > EMAIL_MAX or not _EMAIL.fullmatch(value):
            raise ValueError("not an email address")
        return value

    def show(self, value: object) -> str:
        """The address itself."""
        return str(value)


@dataclass(frozen=True, slots=True)
class Path:
    """A path of a file or a directory; nothing is looked up here."""

    @property
    def allowed(self) -> str:
        """Said in one word, because nothing else is asked of it."""
        return "a path"

    def parse(self, value: object) -> str:
        """Accept a str or an os.PathLike without NUL bytes; relative paths stay relative."""
        path = os.fspath(value) if isinstance(value, (str, os.PathLike)) else None
        if not isinstance(path, str) or not path or "\0" in path:
            raise ValueError("not a path")
        return path

    def show(self, value: object) -> str:
        """The path itself."""
        return str(value)


@dataclass(frozen=True, slots=True)
class Port:
    """A TCP port, or the word that stands for all of them."""

    @property
    def allowed(self) -> str:
        """The numbers and the word."""
        return f"a port from 1 to {PORT_MAX}, or 'any'"

    def parse(self, value: object) -> int | str:
        """Accept a number, its text, or "any"."""
        return value if value == ANY_PORT and isinstance(value, str) else Integer(1, PORT_MAX).parse(value)

    def show(self, value: object) -> str:
        """As it would be assigned."""
        return str(value)


@dataclass(frozen=True, slots=True)
class MediaType:
    """A media type and the extensions that have it: ``"type/subtype ext [ext ...]"``."""

    @property
    def allowed(self) -> str:
        """The form, since nobody guesses it."""
        return f"a media type and 1 to {EXTENSIONS_MAX} extensions, as in 'text/markdown md markdown'"

    def parse(self, value: object) -> tuple[str, tuple[str, ...]]:
        """Split into the type and its extensions, in lower case and without dots in front."""
        words = value.split() if isinstance(value, str) else []
        extensions = tuple(word.lower().removeprefix(".") for word in words[1:])
        if not 1 <= len(extensions) <= EXTENSIONS_MAX or not all(extensions):
            raise ValueError("not a media type with extensions")
        if not _MEDIA_TYPE.fullmatch(words[0]):
            raise ValueError("not a media type")
        return words[0], extensions

    def show(self, value: object) -> str:
        """As it would be assigned."""
        if isinstance(value, tuple) and len(value) == 2:
            return " ".join([str(value[0]), *value[1]])
        return str(value)


def _power(number: int) -> str:
    """`number` in decimal; the ends of machine integers as powers, which is how they are recognised."""
    for bits in (32, 63):
        if number == (1 << bits) - 1:
            return f"2^{bits}-1"
    return str(number)
