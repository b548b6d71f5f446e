"""Multipart forms: parts found wherever the body is cut, nothing read twice, and what is malformed refused."""

from __future__ import annotations

import os
import subprocess
import sys
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kore.errors import BodyError
from kore.http import multipart
from kore.http.multipart import (
    BOUNDARY_BYTES_MAX,
    FORM_BYTES_MAX,
    PART_HEADER_BYTES_MAX,
    PART_HEADERS_MAX,
    PARTS_MAX,
    PREAMBLE_BYTES_MAX,
    FormReader,
    boundary_of,
    is_multipart,
    parse,
    value_and_parameters,
)
from tests.http_harness import bounded
from tests.request_harness import FileBody, TakenBody, request

TYPE = "multipart/form-data; boundary=B"
ANY = ""
CRLF = b"\r\n"


def part(disposition: str | bytes, content: bytes = b"", *lines: bytes) -> bytes:
    """One part after its delimiter."""
    if isinstance(disposition, str):
        disposition = disposition.encode()
    return b"\r\n".join([b"", b"Content-Disposition: " + disposition, *lines, b"", content, b""])


def body(*parts: bytes, boundary: bytes = b"B", before: bytes = b"", after: bytes = b"\r\n") -> bytes:
    """A whole body."""
    return before + b"".join(b"--" + boundary + each for each in parts) + b"--" + boundary + b"--" + after


def contents(data: bytes, content_type: str = TYPE, **how):
    """Name, file name, media type and content of each part."""
    return [
        (found.name, found.filename, found.content_type, data[found.start : found.start + found.length])
        for found in parse(data, content_type, **how)
    ]


def outcome(data: bytes, content_type: str = TYPE, **how):
    """The contents, or the status the body is refused with."""
    try:
        return contents(data, content_type, **how)
    except BodyError as error:
        return error.status


def only(data: bytes, content_type: str = TYPE):
    """The one part of `data`, after checking that it is the same in pieces of every small size."""
    found = contents(data, content_type)
    for size in (*range(1, 12), 100):
        assert contents(data, content_type, piece_bytes=size) == found, size
    assert len(found) == 1
    return found[0]


def refused(data: bytes, content_type: str = TYPE) -> int:
    """The status `data` is refused with, however it is cut."""
    statuses = set()
    for size in (1, 2, 3, 7, 100, 1 << 18):
        with pytest.raises(BodyError) as caught:
            parse(data, content_type, piece_bytes=size)
        statuses.add(caught.value.status)
    assert len(statuses) == 1
    return statuses.pop()


def posted(*parts: bytes, method: str = "POST", content_type: str = TYPE, **rules):
    """A request with this form, populated; its rules are its method's."""
    req = request("/", f"Content-Type: {content_type}", method=method, body=body(*parts), **{method.lower(): rules})
    assert req.populate_multi() is True
    return req


# --- the format ----------------------------------------------------------------------------------------------


def test_what_a_browser_sends():
    data = body(
        part('form-data; name="text"', "größe".encode()),
        part('form-data; name="empty"'),
        part('form-data; name="upload"; filename="a b.png"', b"\x89PNG\r\n\x1a\n\0", b"Content-Type: image/png"),
        part('form-data; name="none"; filename=""', b"", b"Content-Type: application/octet-stream"),
        boundary=b"----WebKitFormBoundary7MA4YWxkTrZu0gW",
    )
    assert contents(data, "multipart/form-data; boundary=----WebKitFormBoundary7MA4YWxkTrZu0gW") == [
        ("text", None, None, "größe".encode()),
        ("empty", None, None, b""),
        ("upload", "a b.png", "image/png", b"\x89PNG\r\n\x1a\n\0"),
        ("none", "", "application/octet-stream", b""),
    ]


def test_an_empty_form():
    assert contents(body()) == []
    assert contents(b"--B--") == []


@pytest.mark.parametrize(("content_type", "boundary"), [
    ("multipart/form-data; boundary=B", b"B"),
    ("Multipart/Form-Data;BOUNDARY=B", b"B"),
    ('multipart/form-data; boundary="B"', b"B"),  # of old not supported
    ('multipart/form-data; boundary="a b;c=\'()+_,-./:=?"', b"a b;c='()+_,-./:=?"),
    ("multipart/form-data; charset=utf-8; boundary=B", b"B"),  # of old the second parameter was it
    ("multipart/form-data; boundary=B; charset=utf-8", b"B"),
    ("multipart/form-data; boundary=B;", b"B"),
    ("multipart/form-data ; boundary = B ", b"B"),
    ("multipart/form-data; boundary=a=b:c", b"a=b:c"),
    ("multipart/form-data; boundary=" + "x" * BOUNDARY_BYTES_MAX, b"x" * BOUNDARY_BYTES_MAX),
])
def test_boundaries(content_type, boundary):
    assert is_multipart(content_type)
    assert boundary_of(content_type) == boundary
    assert only(body(part('form-data; name="a"', b"1"), boundary=boundary), content_type)[3] == b"1"


@pytest.mark.parametrize("content_type", [
    "multipart/form-data", "multipart/form-data; boundary=", 'multipart/form-data; boundary=""',
    'multipart/form-data; boundary=" "', 'multipart/form-data; boundary="a "', "multipart/form-data; boundary=é",
    "multipart/form-data; boundary=" + "x" * (BOUNDARY_BYTES_MAX + 1), 'multipart/form-data; boundary="B',
    "multipart/form-data; boundary=A; boundary=B", "multipart/form-data; boundary", "multipart/form-data; =B",
])  # fmt: skip
def test_without_a_boundary_there_is_no_form(content_type):
    assert is_multipart(content_type)
    assert refused(body(part('form-data; name="a"', b"1")), content_type) == 400


@pytest.mark.parametrize("content_type", [
    None, "", "text/plain", "multipart/mixed; boundary=B", "multipart/form-datax; boundary=B", "x; multipart/form-data",
])
def test_other_types_are_no_forms(content_type):
    assert not is_multipart(content_type)


@pytest.mark.parametrize(("disposition", "name", "filename"), [
    ("form-data; name=a", "a", None),  # of old an unquoted name of one character was ignored
    ('Form-Data; Name="a"', "a", None),
    ('form-data;name="a";filename="x"', "a", "x"),
    ('form-data; filename="x"; name="a"', "a", "x"),  # of old skipped
    ('form-data; name="a"; filename="C: a;b.txt"', "a", "C: a;b.txt"),  # a colon killed the part
    (r'form-data; name="a"; filename="C:\dir\x.txt"', "a", r"C:\dir\x.txt"),
    (r'form-data; name="a"; filename="say \"hi\" \\o/"', "a", r'say "hi" \o/'),
    ('form-data; name="a"; filename="back\\"', "a", "back\\"),
    ('form-data; name="back\\"; filename="x"', "back\\", "x"),
    ('form-data; name="a%22b"; filename="%0D%0A"', "a%22b", "%0D%0A"),  # nothing is decoded
    ('form-data; name="größe"; filename="ü.txt"', "größe", "ü.txt"),
    ("form-data; name=\"a\"; filename*=UTF-8''%e2%82%ac%20rates", "a", "€ rates"),
    ("form-data; name=\"a\"; filename=\"EUR\"; filename*=utf-8'en'%e2%82%ac", "a", "€"),
    ("form-data; name=\"a\"; filename*=ISO-8859-1''%e4; filename=\"x\"", "a", "ä"),
    ("form-data; name=\"a\"; filename=\"x\"; filename*=UTF-8''%ff", "a", "x"),
    ("form-data; name=\"a\"; filename=\"x\"; filename*=UTF-16''a", "a", "x"),
    ("form-data; name=\"a\"; filename=\"x\"; filename*=UTF-8''a%00b", "a", "x"),
    ("form-data; name=\"a\"; filename*=nonsense", "a", ""),
    ('form-data; name=""', "", None),
    ('form-data; name="a"; extra="x"; size=5;', "a", None),
    ('form-data \t;\tname\t=\t"a"\t', "a", None),
])
def test_names(disposition, name, filename):
    assert only(body(part(disposition, b"content")))[:2] == (name, filename)


def test_bytes_that_are_no_utf8_in_a_name_become_replacements():
    found = only(body(part(b'form-data; name="a"; filename="\xff\xfe.txt"')))
    assert found[1] == "\ufffd\ufffd.txt"


@pytest.mark.parametrize("disposition", [
    'attachment; name="a"', "form-data", 'form-data; filename="x"', 'form-datax; name="a"',
])
def test_what_is_no_form_data_or_has_no_name_is_left_out_with_its_content(disposition):
    """Part injection: of old the content of a skipped part could be taken for the lines of another one."""
    inside = part('form-data; name="injected"', b"evil").removeprefix(b"\r\n")
    data = body(part(disposition, inside), part('form-data; name="b"', b"2"))
    assert only(data) == ("b", None, None, b"2")


def test_a_part_without_any_line_is_left_out():
    assert only(body(b"\r\n\r\ncontent\r\n", part('form-data; name="b"', b"2")))[0] == "b"


@pytest.mark.parametrize("content", [
    b"text --B in the middle of a line\r\n-- B and --B\r\n --B and \r\n--",
    b"\n--B\n", b"\r--B\r", b"\r\n", b"\r\n\r\n", b"\r", b"\r\n--", b"\0",
    b"\r\n--\r\n--\r\n--b-x", b"\r\n-", b"-B--\r\n", b"\r\n\r\n-B", b" --B--", b"\r\r\n\n--B\r\n--",
])
def test_contents_that_look_like_delimiters(content):
    """Defect of old: the boundary was found anywhere in a line."""
    data = body(part('form-data; name="a"; filename="f"', content))
    assert only(data) == ("a", "f", None, content)
    assert only(body(part('form-data; name="a"', content)))[3] == content


@pytest.mark.parametrize("content", [
    b"\r\n--Bx", b"x\r\n--B \r\n", b"\r\n--B-", b"\r\n--B\r", b"\r\n--B\rB", b"\r\n--B-\r\n--B\r\r\n--B-B",
    b"--Bx", b"--B", b"\r\n--BB\r\n",
])
def test_a_line_that_begins_like_a_delimiter_and_is_none_is_refused(content):
    """RFC 2046 5.1.1: no sender's content has one; some end the part there and others do not."""
    assert refused(body(part('form-data; name="a"; filename="f"', content))) == 400
    assert refused(body(part("attachment", content))) == 400
    if not (CRLF + content + CRLF).startswith(b"\r\n--B\r\n"):  # which may stand after the last one
        assert refused(body(part("form-data; name=a", b"1"), after=CRLF + content + CRLF)) == 400

def test_the_fifth_line_of_a_part_is_read_too():
    """Defect of old: four lines were looked at."""
    lines = b"".join(b"\r\nX-%d: y" % n for n in range(6))
    data = body(b"%b\r\nContent-Type:text/plain\r\ncontent-disposition:form-data; name=a\r\n\r\n1\r\n" % lines)
    assert only(data) == ("a", None, "text/plain", b"1")


def test_what_comes_before_and_after_is_ignored():
    for before in (b"\r\n", b"This is a form.\r\n", b"--Bx\r\n--B-\r\n --B\r\nx--B\r\n",
                   b"x" * PREAMBLE_BYTES_MAX + b"\r\n"):
        data = body(part("form-data; name=a", b"1"), before=before[-PREAMBLE_BYTES_MAX:], after=b"\r\nend\r\n--B\r\n")
        assert only(data)[3] == b"1"
    assert contents(body(part('form-data; name="a"', b"1"), after=b"")) == [("a", None, None, b"1")]


def test_the_first_delimiter_is_not_looked_for_for_ever():
    start = b"x" * (PREAMBLE_BYTES_MAX + 100) + b"\r\n"
    assert refused(body(part('form-data; name="a"', b"1"), before=start)) == 400


@pytest.mark.parametrize("data", [
    b"--B", b"--B\r\n", b"--B-", b"nonsense", b"\r\n", b"x--B--", b"--C--\r\n",
    body(part('form-data; name="a"', b"1"))[:-4],  # cut off: the last delimiter has gone
    body(part('form-data; name="a"', b"1"), after=b"").removesuffix(b"-"),
    b"--B\r\nContent-Disposition: form-data; name=a\r\n",
    b"--B\nContent-Disposition: form-data; name=a\n\n1\n--B--\n",  # bare LF
    body(b"\r\nContent-Disposition; form-data\r\n\r\n1\r\n"),
    body(b"\r\n: form-data\r\n\r\n1\r\n"),
    body(b"\r\nContent Disposition: form-data; name=a\r\n\r\n1\r\n"),
    body(b"\r\nContent-Disposition : form-data; name=a\r\n\r\n1\r\n"),
    body(b"\r\nContent-Disposition: form-data;\r\n name=a\r\n\r\n1\r\n"),  # a folded line
    body(part("form-data; name=a", b"1", b"X: a\0b")),
    body(part("form-data; name=a", b"1", b"X: a\nb")),
    body(part("form-data; name=a\rb", b"1")),
    body(part("form-data; name=a; name=b", b"1")),
    body(part("form-data; name=a", b"1", b"content-disposition: form-data; name=b")),
    body(part('form-data; name="a', b"1")),
    body(part('form-data; name="a"b', b"1")),
    body(part("form-data; name", b"1")),
    body(part("form-data; name=a; =b", b"1")),
])
def test_what_is_malformed_is_refused(data):
    assert refused(data) == 400


def test_where_python_multipart_is_missing_it_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "python_multipart.multipart", None)
    with pytest.raises(ImportError, match="pip install python-multipart"):
        parse(body(), TYPE)


def test_a_malformed_body_prints_nothing():
    """The library warns of each through logging, which would write to standard error."""
    code = f"""
from kore.http.multipart import parse
try:
    parse({b"--B" + CRLF + b"(bad): x"!r}, {TYPE!r})
except ValueError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.startswith("multipart: ")
    assert done.stderr == ""


# --- limits --------------------------------------------------------------------------------------------------


def test_the_number_of_parts_is_bounded():
    parts = [part("form-data; name=a")] * PARTS_MAX
    assert len(parse(body(*parts), TYPE)) == PARTS_MAX
    assert outcome(body(*parts, parts[0])) == 413
    assert outcome(body(*[b"\r\n\r\n\r\n"] * (PARTS_MAX + 1))) == 413  # also of those that are left out
    assert outcome(body(*parts, after=b"\r\n--B\r\n" * 2 * PARTS_MAX)) == 413


def test_the_lines_of_a_part_are_bounded():
    lines = [b"X-%d: y" % number for number in range(PART_HEADERS_MAX - 1)]
    assert only(body(part("form-data; name=a", b"1", *lines)))[0] == "a"
    assert refused(body(part("form-data; name=a", b"1", *lines, b"One: more"))) == 400
    long = b"x" * (PART_HEADER_BYTES_MAX // 2)
    assert refused(body(part("form-data; name=a", b"1", b"X: " + long, b"Y: " + long))) == 400
    assert refused(body(part("form-data; name=a", b"1", b"X: " + long * 10))) == 400
    assert refused(body(part("form-data; name=a", b"1", long * 10 + b": x"))) == 400


def test_the_bytes_of_fields_are_bounded_and_those_of_files_are_not():
    half = bytes(FORM_BYTES_MAX // 2)
    field, other = part("form-data; name=a", half), part("form-data; name=b", half)
    assert len(parse(body(field, other), TYPE)) == 2
    assert outcome(body(field, other, part("form-data; name=c", b"1"))) == 413
    upload = part("form-data; name=d; filename=x", half * 3)
    nothing = part("attachment", half * 3)
    assert len(parse(body(field, upload, other, nothing), TYPE)) == 3


def test_hostile_lines_cost_what_they_are_long():
    """Nothing here takes time that grows with the square of the length."""
    for text in ("form-data" + ";" * 8000, 'form-data; name="' + "\\" * 8000, 'form-data; name="' + '\\"' * 4000,
                 "form-data; name=" + " " * 8000 + "x", "form-data; a" + " \t" * 4000,
                 "form-data; " + 'a="' * 2600):
        try:
            value_and_parameters(text)
        except BodyError as error:
            assert len(str(error)) < 300  # and what is logged of it is short


# --- cut anywhere --------------------------------------------------------------------------------------------

BITS = st.sampled_from(
    [b"\r\n--B", b"\r\n", b"--", b"B", b"\r", b"\n", b"-", b"x", b"--B--", b"\r\n--", b"\r\n-", b"\0"]
)
CONTENT = st.lists(BITS, max_size=12).map(b"".join).filter(lambda data: b"\r\n--B" not in b"\r\n" + data)
PARTS = st.lists(st.tuples(st.sampled_from(["a", "größe"]), st.none() | st.just("f"), CONTENT), max_size=4)


def built(parts) -> bytes:
    made = []
    for name, filename, content in parts:
        file = f'; filename="{filename}"' if filename is not None else ""
        made.append(part(f'form-data; name="{name}"{file}', content))
    return body(*made)


@given(PARTS, st.data())
@bounded
def test_the_same_parts_however_the_body_is_cut(parts, data):
    """In pieces of any sizes, the parts are those that were put in, at the right positions."""
    whole = built(parts)
    expected = [(name, filename, None, content) for name, filename, content in parts]
    assert contents(whole) == expected
    assert contents(whole, piece_bytes=data.draw(st.integers(1, 40))) == expected
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=8)))
    reader = FormReader(b"B", 0)
    for begin, end in zip([0, *cuts], [*cuts, len(whole)], strict=True):
        if begin < end:
            reader.feed(whole[begin:end])
    assert reader.end() is reader.parts
    assert [(p.name, p.filename, p.content_type, whole[p.start : p.start + p.length]) for p in reader.parts] == expected


@given(PARTS, st.data())
@bounded
def test_a_damaged_body_is_understood_the_same_way_however_it_is_cut(parts, data):
    """Bytes put in, taken out and changed: the same parts, or the same refusal, from whole bodies and from pieces."""
    whole = bytearray(built(parts))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(whole)))
        whole[at : at + data.draw(st.integers(0, 3))] = data.draw(BITS | st.binary(max_size=3))
    found = outcome(bytes(whole))
    for size in (1, 2, 5, data.draw(st.integers(1, 60))):
        assert outcome(bytes(whole), piece_bytes=size) == found


@given(st.binary(max_size=300), st.integers(1, 50))
@bounded
def test_no_bytes_are_too_strange(data, size):
    """Whatever a body is, it is parts or a refusal."""
    for whole in (data, b"--B\r\n" + data, b"--B\r\n" + data + b"\r\n--B--"):
        assert outcome(whole, piece_bytes=size) == outcome(whole)


# --- through the request -------------------------------------------------------------------------------------


def test_fields_obey_the_rules_of_the_method():
    parts = [part("form-data; name=a", b"x1"), part("form-data; name=b", b"x"), part("form-data; name=c", b"1")]
    req = posted(*parts, a="[0-9]", b=lambda req, value: value == "x")
    assert [req.argument(name) for name in "abc"] == ["x1", "x", None]
    req = posted(*parts, method="PUT", a="^[0-9]$", b=ANY)  # of old POST only
    assert [req.argument(name) for name in "abc"] == [None, "x", None]


@pytest.mark.parametrize(("content", "value"), [
    (b"", ""),  # of old an empty value was dropped
    (b"a\r\nb\tc", "a\r\nb\tc"), (b"%41+b", "%41+b"), ("größe".encode(), "größe"), (b"a\0b", None), (b"\xff", None),
    (b"a\x7fb", None), (b"x" * 100000, "x" * 100000),
])
def test_values_of_fields(content, value):
    assert posted(part("form-data; name=a", content), a=ANY).argument("a") == value


def test_the_first_valid_field_of_a_name_wins():
    parts = [part("form-data; name=a", value) for value in (b"x", b"1", b"2")]
    req = posted(*parts, a="[0-9]")
    req.populate_multipart()
    assert req.argument("a") == "1"


def test_files_are_found_by_the_name_of_their_field():
    req = posted(
        part('form-data; name="f"; filename="one.txt"', b"first", b"Content-Type: text/plain; charset=utf-8"),
        part('form-data; name="f"; filename="two.txt"', b"second"),
        part('form-data; name="a"', b"field"),
        a=ANY, f=ANY,
    )
    file = req.file_lookup("f")
    assert (file.name, file.filename, file.length) == ("f", "one.txt", 5)
    assert file.content_type == "text/plain; charset=utf-8"
    assert req.file_lookup("a") is None
    assert req.file_lookup("one.txt") is None
    assert req.argument("f") is None
    assert req.argument("a") == "field"
    assert repr(file) == "<kore.http_file 'f' 'one.txt' 5 bytes>"


def test_a_field_that_says_it_is_a_file_is_none():
    req = posted(part('form-data; name="a"; filename=""', b"not a field"), part('form-data; name="a"', b"1"), a=ANY)
    assert req.argument("a") == "1"
    assert req.file_lookup("a").read(100) == (11, b"not a field")


def test_nothing_chosen_is_no_file_but_an_empty_file_is_one():
    """Defect of old: empty files were dropped."""
    req = posted(part('form-data; name="none"; filename=""'), part('form-data; name="empty"; filename="e"'))
    assert req.file_lookup("none") is None
    file = req.file_lookup("empty")
    assert (file.filename, file.length, file.content_type) == ("e", 0, None)
    assert file.read(10) == (0, b"")


def test_reading_a_file():
    content = bytes(range(256)) * 10
    file = posted(part('form-data; name="f"; filename="x"', content)).file_lookup("f")
    assert file.read(0) == (0, b"")
    assert file.read(3) == (3, content[:3])
    read = content[:3]
    while (got := file.read(1024))[0]:
        assert got[0] == len(got[1])
        read += got[1]
    assert read == content
    assert file.read(1024) == (0, b"")
    assert file.rewind() is True
    assert file.read(5) == (5, content[:5])
    for wrong, error in ((1025, RuntimeError), (-1, ValueError), ("1", TypeError), (None, TypeError)):
        with pytest.raises(error):
            file.read(wrong)
    assert file.read(1) == (1, content[5:6])


def test_a_file_object_takes_no_attributes():
    file = posted(part('form-data; name="f"; filename="x"')).file_lookup("f")
    for name in ("name", "filename", "length", "content_type", "extra"):
        with pytest.raises(AttributeError):
            setattr(file, name, 1)


def test_the_body_stays_as_it_is():
    req = posted(part("form-data; name=a", b"1"), a=ANY)
    assert req.body == body(part("form-data; name=a", b"1"))
    assert req.argument("a") == "1"


@pytest.mark.parametrize("content_type", ["application/x-www-form-urlencoded", "multipart/mixed; boundary=B", "x"])
def test_a_body_of_another_type_is_left_alone(content_type):
    req = posted(part("form-data; name=a", b"1"), content_type=content_type, a=ANY)
    assert req.argument("a") is None
    assert req.file_lookup("a") is None


def test_populating_before_and_without_a_body():
    req = request("/", f"Content-Type: {TYPE}", method="POST", post={"a": ANY})
    assert req.file_lookup("a") is None
    assert req.populate_multi() is True
    assert req.file_lookup("a") is None


def test_a_malformed_form_raises_and_takes_nothing():
    """A ValueError, so that an application may catch it without knowing more; each time it asks."""
    data = body(part("form-data; name=a", b"1"))[:-6]
    req = request("/", f"Content-Type: {TYPE}", method="POST", body=data, post={"a": ANY})
    for _ in range(2):
        with pytest.raises(ValueError, match="last delimiter is missing") as caught:
            req.populate_multi()
        assert caught.value.status == 400
        assert req.argument("a") is None


def test_a_form_is_taken_apart_once(monkeypatch):
    parts = []
    original = multipart.parse
    monkeypatch.setattr(multipart, "parse", lambda *how: parts.append(how) or original(*how))
    req = posted(part("form-data; name=a", b"1"), a=ANY)
    req.populate_multi()
    assert len(parts) == 1


def test_a_body_that_went_to_a_hook_is_no_form():
    req = request("/", f"Content-Type: {TYPE}", method="POST", body=TakenBody())
    with pytest.raises(RuntimeError):
        req.populate_multi()


# --- on disk -------------------------------------------------------------------------------------------------


def test_200_megabytes_on_disk_in_flat_memory(tmp_path):
    """A form around a large file is read once, in pieces; the file's bytes are where the body has them."""
    size = 200 << 20
    path = tmp_path / "body"
    start = b"--B" + part("form-data; name=a", b"1") + b"--B" + part('form-data; name="f"; filename="big"')[:-2]
    with path.open("wb") as file:
        file.write(start + b"first")
        file.seek(size - 4, 1)
        file.write(b"last\r\n--B" + part("form-data; name=b", b"2") + b"--B--\r\n")
    stored = FileBody(path)
    req = request("/", f"Content-Type: {TYPE}", method="POST", body=stored, post={"a": ANY, "b": ANY})
    req.file_lookup("f")
    tracemalloc.start()
    try:
        req.populate_multi()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 << 20
    assert stored.largest <= 1 << 20
    assert (req.argument("a"), req.argument("b")) == ("1", "2")
    upload = req.file_lookup("f")
    assert upload.length == size + 5
    assert upload.read(7) == (7, b"first\0\0")
    upload._position = upload.length - 4
    assert upload.read(100) == (4, b"last")
    stored.close()
    upload.rewind()
    with pytest.raises(RuntimeError):
        upload.read(1)


def test_a_stored_body_that_became_shorter_is_an_error_and_no_endless_loop(tmp_path):
    path = tmp_path / "body"
    path.write_bytes(body(part("form-data; name=a", b"x" * 10000)))
    stored = FileBody(path)
    os.truncate(path, 5000)
    req = request("/", f"Content-Type: {TYPE}", method="POST", body=stored, post={"a": ANY})
    with pytest.raises(RuntimeError, match="ends at 5000 of"):
        req.populate_multi()
    stored.close()
