"""The proof by scanners of TLS, in the part that takes seconds: sslyze whole, of testssl.sh the main checks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.endurance import tls
from tests.endurance.report import Result, Unavailable, silent


def prove(io: str, **options: object) -> Result:
    try:
        return tls.prove(io, progress=silent, **options)
    except Unavailable as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize("io", ["uring", "epoll"])
def test_sslyze_finds_mozillas_profiles(io: str) -> None:
    """Intermediate with both kinds of keys, modern with TLS 1.3 only."""
    result = prove(io, scanners="sslyze")
    assert not result.failed, result.text()
    assert (result.figures["intermediate"], result.figures["modern"]) == ("compliant", "compliant")


def test_testssl_finds_nothing_bad() -> None:
    """Nothing above LOW; what it looks at is OpenSSL and its settings, the same on every engine."""
    result = prove("epoll", scanners="testssl", options=tls.QUICK)
    assert not result.failed, result.text()


class Stub:
    """A server for a scanner that does not look at it."""

    address = ("127.0.0.1", 1)


@pytest.mark.parametrize(("findings", "complaint"), [
    ([{"id": "cert", "severity": "MEDIUM", "finding": "bad"}] * 30, "cert: MEDIUM: bad"),
    ([{"id": "scanProblem", "severity": "WARN", "finding": "no connection"}] * 30, "no connection"),
    ([{"id": "overall_grade", "severity": "OK", "finding": "B"}] * 30, "overall_grade: OK: B"),
    ([{"id": "cert", "severity": "OK", "finding": "good"}], "only 1 findings"),
    (None, "found nothing"),
])
def test_what_testssl_says_is_heard(tmp_path: Path, monkeypatch, findings: list | None, complaint: str) -> None:
    """Of each thing that it may not say."""
    program = tmp_path / "testssl"
    text = "" if findings is None else json.dumps(findings)
    program.write_text(f"#!/bin/sh\ncat > testssl.json <<'END'\n{text}\nEND\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    result = Result("tls", "epoll")
    tls.testssl(Stub(), tmp_path, (), result)
    assert result.failed
    assert complaint in result.failures[0]


def test_a_server_that_nobody_hears_is_no_good_one(tmp_path: Path) -> None:
    """sslyze of a port where there is none."""
    if not tls.SSLYZE.exists():
        pytest.skip("sslyze is not installed")
    tls.make_pairs(tmp_path)
    result = Result("tls", "epoll")
    tls.sslyze(Stub(), tmp_path, "intermediate", result)
    assert result.failed


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where a scanner is missing, the proof says which."""
    monkeypatch.setattr(tls.shutil, "which", lambda name: None)
    monkeypatch.setattr(tls, "SSLYZE", tmp_path / "bin" / "python")
    for scan, name in ((tls.testssl, "testssl"), (tls.sslyze, "sslyze")):
        with pytest.raises(Unavailable, match=name):
            scan(Stub(), tmp_path, "", Result("tls", "epoll"))
