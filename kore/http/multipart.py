"""Bodies of type multipart/form-data (RFC 7578): which fields and files are in them, and where.

The python-multipart package finds the delimiters and the header lines; here is what it leaves open: what the lines
mean, how much of everything there may be, and at which positions of the body the parts lie. Positions are all that is
kept, so the body may be a file of gigabytes: it is read once, piece by piece, and never copied.

What is malformed raises `BodyError`: half of a form must not pass for the form that was sent.
"""

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING, Final, NamedTuple
from urllib.parse import unquote_to_bytes

from kore.errors import BodyError
from kore.http.upload import body_length, body_piece

if TYPE_CHECKING:
    from kore.http.upload import Body

PARTS_MAX: Final = 1000
"""Parts of one form, as many as arguments of a query: no page has more inputs, each costs some 10 us."""

DELIMITERS_MAX: Final = 2 * PARTS_MAX
"""Lines that look like a delimiter, with those after the last one: each costs the library some microseconds."""

FORM_BYTES_MAX: Final = 8 << 20
"""Bytes of a form's fields that are not files: they are held in memory and taken apart in one go."""

PART_HEADERS_MAX: Final = 8
"""Header lines of a part; browsers send two, and RFC 7578 4.8 allows three to mean something."""

PART_HEADER_BYTES_MAX: Final = 4096
"""Bytes of a part's header lines: file systems have names of 255 bytes, escaped they are three times as long."""

PREAMBLE_BYTES_MAX: Final = 4096
"""Where the first delimiter must begin: no browser writes anything before it, mail programs a sentence."""

BOUNDARY_BYTES_MAX: Final = 77
"""RFC 2046 5.1.1 says 70; the platform's own parser always took 77."""

PIECE_BYTES: Final = 1 << 18
"""The body is read in pieces of this size: large enough that reading costs next to nothing."""

_boundary = re.compile(r"[!-~](?:[ -~]*[!-~])?").fullmatch
_value = re.compile(r"[^;\"]*").match
_parameter = re.compile(r";[ \t]*([!#$%&'*+\-.^_`|~0-9A-Za-z]+)[ \t]*=[ \t]*").match
_nothing = re.compile(r";[ \t]*(?=;|\Z)").match
_quoted = re.compile(r'"((?:[^"\\]|\\.)*)"[ \t]*(?=;|\Z)').match
_literal = re.compile(r'"([^"]*)"[ \t]*(?=;|\Z)').match
_bare = re.compile(r'([^;"]+)(?=;|\Z)').match
_escape = re.compile(r'\\(["\\])').sub
_extended = re.compile(r"([A-Za-z0-9\-]*)'[^']*'([!#$&+\-.^_`|~0-9A-Za-z%]*)").fullmatch
_control = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]").search


class Part(NamedTuple):
    """One field or file: its name, and where in the body its content lies."""

    name: str
    filename: str | None
    """None for a field; "" for a file input in which nothing was chosen."""
    content_type: str | None
    start: int
    length: int


def is_multipart(content_type: str | None) -> bool:
    """Whether a Content-Type is that of a multipart form."""
    return content_type is not None and content_type.partition(";")[0].strip(" \t").lower() == "multipart/form-data"


def value_and_parameters(text: str) -> tuple[str, dict[str, str]]:
    """A field value like ``form-data; name="a"``: the value and its parameters, both names in lower case.

    Values may be tokens or quoted strings. Browsers do not escape backslashes in quoted strings (WHATWG HTML,
    "multipart form data"), so one is an escape only before a quotation mark or a backslash, and not even there if the
    text makes no sense then. Raises `BodyError` when it is malformed or names a parameter twice: what two programs may
    understand differently is refused.
    """
    match = _value(text)
    assert match is not None
    value, at = match[0].strip(" \t").lower(), match.end()
    found: dict[str, str] = {}
    while at < len(text):
        match = _nothing(text, at)
        if match is not None:
            at = match.end()
            continue
        match = _parameter(text, at)
        if match is None:
            raise BodyError(f"malformed parameter in {text[:80]!r}")
        name, at = match[1].lower(), match.end()
        match = _quoted(text, at)
        if match is not None:
            content = _escape(r"\1", match[1])
        else:
            match = _literal(text, at) or _bare(text, at)
            if match is None:
                raise BodyError(f"malformed value of {name} in {text[:80]!r}")
            content = match[1].rstrip(" \t")
        if name in found:
            raise BodyError(f"{name} twice in {text[:80]!r}")
        found[name] = content
        at = match.end()
    return value, found


def boundary_of(content_type: str) -> bytes:
    """The boundary a Content-Type names, quoted or not. Raises `BodyError` without a usable one."""
    boundary = value_and_parameters(content_type)[1].get("boundary", "")
    if len(boundary) > BOUNDARY_BYTES_MAX or _boundary(boundary) is None:
        limit = f"1 to {BOUNDARY_BYTES_MAX} printable characters"
        raise BodyError(f"a multipart boundary has {limit}, not {boundary[:100]!r}")
    return boundary.encode("ascii")


def extended_value(text: str) -> str | None:
    """What a parameter like ``filename*`` says (RFC 8187 3.2); None when it is malformed or has control characters."""
    match = _extended(text)
    if match is None or match[1].lower() not in ("utf-8", "iso-8859-1"):
        return None
    try:
        value = unquote_to_bytes(match[2]).decode(match[1])
    except UnicodeDecodeError:
        return None
    return None if _control(value) else value


def parse(body: Body, content_type: str, piece_bytes: int = PIECE_BYTES) -> list[Part]:
    """The parts of a body in their order; those that are no form-data, or have no name, are left out.

    Text before the first delimiter and after the last is ignored (RFC 2046 5.1.1). Raises `BodyError`: status 413 for
    too many parts or bytes of fields, 400 for everything else, a missing last delimiter as well.
    """
    boundary = boundary_of(content_type)
    length = body_length(body)
    position = _first_delimiter(body_piece(body, 0, PREAMBLE_BYTES_MAX + len(boundary) + 6), boundary)
    reader = FormReader(boundary, position)
    while position < length:
        piece = body_piece(body, position, piece_bytes)
        if not piece:
            raise RuntimeError(f"the stored body ends at {position} of {length} bytes")
        reader.feed(piece)
        position += len(piece)
    return reader.end()


class ComingForm:
    """A form that is read while it comes: `feed` never raises, `end` does what `parse` would do of the whole body."""

    def __init__(self, content_type: str, start: bytes | bytearray) -> None:
        """`start` is all that has come, at least `PREAMBLE_BYTES_MAX` and a delimiter. Raises `BodyError`."""
        boundary = boundary_of(content_type)
        position = _first_delimiter(bytes(start[: PREAMBLE_BYTES_MAX + len(boundary) + 6]), boundary)
        self._reader = FormReader(boundary, position)
        self._error: BodyError | None = None
        for at in range(position, len(start), PIECE_BYTES):
            self.feed(bytes(start[at : at + PIECE_BYTES]))

    def feed(self, piece: bytes) -> None:
        """The next bytes."""
        if self._error is None:
            try:
                self._reader.feed(piece)
            except BodyError as error:
                self._error = error.with_traceback(None)

    def end(self) -> list[Part]:
        """The parts, once all has come. Raises `BodyError`."""
        if self._error is not None:
            raise BodyError(str(self._error), self._error.status)
        return self._reader.end()


def coming_form(content_type: str | None, start: bytes | bytearray) -> ComingForm | None:
    """A reader for a body that began with `start`; None for what is no form, and for what `parse` shall refuse."""
    if content_type is None or not is_multipart(content_type):
        return None
    try:
        return ComingForm(content_type, start)
    except (BodyError, ImportError):
        return None  # told to who asks for the form


def _first_delimiter(start: bytes, boundary: bytes) -> int:
    """Where the first delimiter is: at the beginning of a line, and nothing else on the line."""
    lines = b"\r\n" + start  # the beginning of the body is the beginning of a line
    delimiter = b"\r\n--" + boundary
    at = lines.find(delimiter)
    while at >= 0:
        end = at + len(delimiter)
        if lines[end : end + 2] in (b"\r\n", b"--"):
            return at
        at = lines.find(delimiter, end)
    raise BodyError("multipart: no delimiter where the first must be")


class FormReader:
    """Reads the parts out of a body that is fed to it in pieces, from its first delimiter on."""

    def __init__(self, boundary: bytes, position: int) -> None:
        self.parts: list[Part] = []
        self._ended = False  # the last delimiter was there
        self._position = position  # of the piece in the body
        self._piece = b""
        self._delimiter = b"\r\n--" + boundary
        self._tail = b"\r\n"  # of what was fed: a delimiter may begin in it
        self._delimiters = 0
        self._begun = 0
        self._form_bytes = 0
        self._forget()
        MultipartParser, self._error = _library()  # noqa: N806 - it is a class
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._part_begin,
                "on_header_field": self._header_name,
                "on_header_value": self._header_value,
                "on_header_end": self._header_end,
                "on_headers_finished": self._headers_end,
                "on_part_data": self._part_data,
                "on_part_end": self._part_end,
                "on_end": self._end,
            },
        )

    def feed(self, piece: bytes) -> None:
        """The next bytes of the body. Raises `BodyError`."""
        self._check_delimiters(piece)
        self._piece = piece
        try:
            self._parser.write(piece)
        except self._error as error:
            raise BodyError(f"multipart: {error}") from None
        self._position += len(piece)

    def end(self) -> list[Part]:
        """The parts. Raises `BodyError`."""
        if not self._ended:
            raise BodyError("multipart: the last delimiter is missing")
        return self.parts

    def _check_delimiters(self, piece: bytes) -> None:
        """A delimiter ends its line; one that does not is in nobody's content (RFC 2046 5.1.1), but may fill gigabytes.

        The library takes it for content, byte after byte; others end the part there. So it is refused.
        """
        window = self._tail + piece
        size = len(self._delimiter)
        at = window.find(self._delimiter)
        while 0 <= at <= len(window) - size - 2:
            self._delimiters += 1
            if self._delimiters > DELIMITERS_MAX:
                raise BodyError(f"multipart: more than {DELIMITERS_MAX} delimiters", 413)
            if window[at + size : at + size + 2] not in (b"\r\n", b"--"):
                raise BodyError("multipart: a line begins like a delimiter and is none")
            at = window.find(self._delimiter, at + size)
        self._tail = window[-size - 1 :]

    def _forget(self) -> None:
        self._lines: dict[str, str] = {}
        self._line_count = self._line_bytes = 0
        self._line_name = self._line_value = b""
        self._name: str | None = None
        self._filename: str | None = None
        self._start = self._length = 0
        self._beginning = b""  # of the content

    def _part_begin(self) -> None:
        self._begun += 1
        if self._begun > PARTS_MAX:
            raise BodyError(f"multipart: more than {PARTS_MAX} parts", 413)
        self._forget()

    def _header_name(self, data: bytes, start: int, end: int) -> None:
        self._count_line(end - start)
        self._line_name += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._count_line(end - start)
        self._line_value += data[start:end]

    def _count_line(self, count: int) -> None:
        self._line_bytes += count
        if self._line_bytes > PART_HEADER_BYTES_MAX:
            raise BodyError(f"multipart: more than {PART_HEADER_BYTES_MAX} bytes of header lines in a part")

    def _header_end(self) -> None:
        self._line_count += 1
        if self._line_count > PART_HEADERS_MAX:
            raise BodyError(f"multipart: more than {PART_HEADERS_MAX} header lines in a part")
        # Names are shown or compared, never turned back into bytes: what is no UTF-8 becomes U+FFFD, like no rule's.
        name = self._line_name.decode("ascii", "replace").lower()
        value = self._line_value.decode("utf-8", "replace").strip(" \t")
        if _control(value):
            raise BodyError(f"multipart: control character in the {name} of a part")
        if name in self._lines:
            raise BodyError(f"multipart: {name} twice in a part")
        self._lines[name] = value
        self._line_name = self._line_value = b""

    def _headers_end(self) -> None:
        kind, parameters = value_and_parameters(self._lines.get("content-disposition", ""))
        if kind != "form-data":
            return  # its content is skipped like any other, to the next delimiter
        self._name = parameters.get("name")
        if "filename" in parameters or "filename*" in parameters:
            # RFC 7578 4.2 forbids senders the starred form, and RFC 6266 4.3 prefers it: where it is, it was meant.
            extended = extended_value(parameters.get("filename*", ""))
            self._filename = parameters.get("filename", "") if extended is None else extended

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        if not self._length:
            # What looked like a delimiter at the end of the piece before, and was none, comes from the library's own
            # memory: it lies right before this piece.
            self._start = self._position + (start if data is self._piece else start - end)
        if len(self._beginning) < len(self._delimiter) - 2:
            self._beginning += data[start : min(end, start + len(self._delimiter) - 2 - len(self._beginning))]
            if self._beginning == self._delimiter[2:]:
                # After an empty line the library takes it for content; RFC 2046 5.1.1 can be read otherwise.
                raise BodyError("multipart: a content begins with a delimiter")
        self._length += end - start
        if self._name is not None and self._filename is None:
            self._form_bytes += end - start
            if self._form_bytes > FORM_BYTES_MAX:
                raise BodyError(f"multipart: more than {FORM_BYTES_MAX} bytes of fields", 413)

    def _part_end(self) -> None:
        if self._name is not None:
            content_type = self._lines.get("content-type")
            self.parts.append(Part(self._name, self._filename, content_type, self._start, self._length))

    def _end(self) -> None:
        self._ended = True


def _library() -> tuple[type, type[Exception]]:
    """The parser of python-multipart and what it raises."""
    try:
        from python_multipart.exceptions import FormParserError
        from python_multipart.multipart import MultipartParser
    except ImportError:
        raise ImportError("multipart forms need the package python-multipart: pip install python-multipart") from None
    # It warns of every malformed body, which would go to standard error: we answer those, and that is enough.
    logger = logging.getLogger("python_multipart")
    if not logger.handlers:
        logger.addHandler(logging.NullHandler())
    return MultipartParser, FormParserError
