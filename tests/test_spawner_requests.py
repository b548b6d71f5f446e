"""Requests to a spawner as bytes: what is packed comes out again, and what is not a request is told as such."""

from __future__ import annotations

import errno
import io
import os
import struct
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kore.sandbox import requests
from kore.sandbox.programs import Allowed, elf_interpreter, needed_by
from kore.sandbox.requests import (
    HEAD_BYTES,
    Outcome,
    SpawnerProtocolError,
    body_bytes,
    pack_reply,
    pack_request,
    parse_reply,
    parse_request,
)

words = st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)), max_size=30)
names = words.filter(lambda word: word and "=" not in word)


@given(
    st.integers(0, 2**32 - 1), words, names, st.lists(words, min_size=1, max_size=5), st.dictionaries(names, words),
    st.booleans())
def test_a_request_comes_out_as_it_went_in(serial, directory, program, arguments, environment, new_session) -> None:
    """Empty words, bytes that are no UTF-8, and all."""
    message = pack_request(serial, directory, program, arguments, environment, new_session=new_session)
    assert body_bytes(message[:HEAD_BYTES]) == len(message) - HEAD_BYTES
    request = parse_request(message)
    assert (request.serial, request.directory, request.program) == (serial, directory, program)
    assert list(request.arguments) == [os.fsencode(word) for word in arguments]
    assert request.environment == {os.fsencode(k): os.fsencode(v) for k, v in environment.items()}
    assert request.new_session is new_session


WHOLE = pack_request(7, "/", "ls", ["ls", "-l"], {"A": "b", "C": "d=e"}, new_session=False)


@given(st.integers(0, len(WHOLE) - 1), st.integers(0, 255), st.integers(0, len(WHOLE)))
def test_a_spoilt_request_is_refused_or_is_one(at, byte, length) -> None:
    """Whatever is changed or cut: a request within the bounds, or SpawnerProtocolError."""
    spoilt = bytearray(WHOLE)
    spoilt[at] = byte
    for message in (bytes(spoilt), bytes(spoilt[:length])):
        try:
            if body_bytes(message) == len(message) - HEAD_BYTES:
                parse_request(message)
        except SpawnerProtocolError:
            pass


def head(magic=b"kspw", length=0, arguments=1, variables=0) -> bytes:
    return struct.pack("<4sIIII?", magic, 1, length, arguments, variables, False)


@pytest.mark.parametrize("message", [
    b"", b"kspw", head(magic=b"xxxx"), head(length=requests.BODY_BYTES_MAX + 1), head(length=2**32 - 1),
])
def test_heads_that_are_none(message) -> None:
    with pytest.raises(SpawnerProtocolError):
        body_bytes(message)


@pytest.mark.parametrize(("body", "arguments", "variables"), [
    (b"/\0ls\0ls", 0, 0), (b"/\0ls\0ls", 0, 1), (b"/\0ls\0ls", 2, 0), (b"/\0ls\0ls", 2**32 - 1, 2**32 - 1),
    (b"/\0ls\0ls\0A", 1, 1), (b"/\0ls\0ls\0=b", 1, 1), (b"/\0ls\0ls\0A=b", 1, 0), (b"/\0\0ls", 1, 0), (b"", 1, 0),
])
def test_bodies_that_do_not_come_out_even(body, arguments, variables) -> None:
    with pytest.raises(SpawnerProtocolError):
        parse_request(head(length=len(body), arguments=arguments, variables=variables) + body)
    with pytest.raises(SpawnerProtocolError):
        parse_request(WHOLE[:-1])


def test_what_cannot_be_asked_for() -> None:
    """NULs, names of variables that are none, and more than execve(2) takes."""
    for arguments, environment in ((["a\0b"], {}), (["a"], {"A": "\0"}), (["a"], {"": "b"}), (["a"], {"A=": "b"})):
        with pytest.raises(ValueError, match="program|variable"):
            pack_request(1, "/", "a", arguments, environment, new_session=False)
    with pytest.raises(OSError) as caught:
        pack_request(1, "/", "a", ["x" * requests.BODY_BYTES_MAX], {}, new_session=False)
    assert caught.value.errno == errno.E2BIG


def test_replies() -> None:
    """What became of it; and nothing else."""
    assert parse_reply(pack_reply(9, Outcome.STARTED, 0, 1234)) == (9, Outcome.STARTED, 0, 1234)
    reply = pack_reply(9, Outcome.NOT_FOUND, errno.ENOENT)
    assert parse_reply(reply) == (9, Outcome.NOT_FOUND, errno.ENOENT, 0)
    for wrong in (b"", reply[:-1], reply + b"x", reply[:4] + b"\xff" + reply[5:]):
        with pytest.raises(SpawnerProtocolError):
            parse_reply(wrong)


def test_what_a_program_needs(tmp_path) -> None:
    """The loader of an ELF program, the interpreters of scripts, of `env` what it finds; for others nothing."""
    with open("/bin/sh", "rb") as file:
        loader = elf_interpreter(file)
    assert loader is not None
    assert os.path.exists(loader)
    script, second, by_env, loop = (tmp_path / name for name in ("script", "second", "env", "loop"))
    script.write_text("#! /bin/sh -e\n")
    second.write_text(f"#!{script}\n")
    by_env.write_text("#!/usr/bin/env sh\n")
    loop.write_text(f"#!{loop}\n")
    assert needed_by("/bin/sh") == [loader]
    assert needed_by(str(script)) == ["/bin/sh", loader]
    assert needed_by(str(second)) == [str(script), "/bin/sh", loader]
    assert set(needed_by(str(by_env))) >= {"/usr/bin/env", loader}
    assert any(os.path.basename(path) == "sh" for path in needed_by(str(by_env)))
    assert set(needed_by(str(loop))) == {str(loop)}
    for text in ("", "#!", "#!\n", "plain"):
        script.write_text(text)
        assert needed_by(str(script)) == []
    assert needed_by(str(tmp_path / "gone")) == []


with open(sys.executable, "rb") as _file:
    _ELF = _file.read(2048)


@given(st.integers(0, 600), st.binary(min_size=1, max_size=8), st.integers(0, len(_ELF)))
def test_a_spoilt_elf_file_names_a_loader_or_none(at, change, length) -> None:
    """No error, whatever a file of that kind holds."""
    spoilt = _ELF[:at] + change + _ELF[at + len(change) :]
    for text in (spoilt, spoilt[:length]):
        found = elf_interpreter(io.BytesIO(text))
        assert found is None or isinstance(found, str)


def test_which_programs_are_allowed(tmp_path) -> None:
    """By what they are, not by their names: links to them count, and what is in a listed directory."""
    tool, other = tmp_path / "tool", tmp_path / "other"
    for file in (tool, other):
        file.write_text("#!/bin/sh\n")
        file.chmod(0o755)
    (tmp_path / "link").symlink_to(tool)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "inner").write_text("#!/bin/sh\n")
    (tmp_path / "folder" / "out").symlink_to(other)
    allowed = Allowed([str(tool), str(tmp_path / "gone")])
    assert allowed.includes(str(tool))
    assert allowed.includes(str(tmp_path / "link"))
    assert allowed.includes(str(tmp_path / "folder" / ".." / "tool"))
    assert not allowed.includes(str(other))
    assert allowed.missing == [f"{tmp_path / 'gone'}: No such file or directory"]
    assert set(allowed.executables()) >= {str(tool), "/bin/sh"}
    assert str(other) not in allowed.executables()
    folder = Allowed([str(tmp_path / "folder")])
    assert folder.includes(str(tmp_path / "folder" / "inner"))
    assert not folder.includes(str(tmp_path / "folder" / "out"))
    assert not folder.includes(str(tool))
    assert {str(tmp_path / "folder"), "/bin/sh"} <= set(folder.executables())
    with pytest.raises(FileNotFoundError):
        folder.includes(str(tmp_path / "gone"))
    everything = Allowed([])
    assert everything.includes("/bin/anything")
    assert everything.executables() == ("/",)
