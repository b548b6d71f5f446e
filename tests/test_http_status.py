"""Reason phrases: each code has the one of RFC 9110, and no other code has one."""

from __future__ import annotations

import re
from http import HTTPStatus

import pytest

from kore.http.status import REASONS, reason

# The codes of http.md 18 and kore-api.md 9.3, and those RFC 9110, 6585, 7538, 7725 and 8470 add.
KNOWN = [*range(100, 104), *range(200, 207), *range(300, 306), 307, 308, *range(400, 419), 421, 422, 425, 426, 428, 429,
         431, 451, *range(500, 506), 511]  # fmt: skip

NEWER = {413: "Content Too Large", 414: "URI Too Long", 416: "Range Not Satisfiable", 422: "Unprocessable Content"}


@pytest.mark.parametrize("status", KNOWN)
def test_each_known_code_has_a_phrase(status: int) -> None:
    assert reason(status)


@pytest.mark.parametrize(("status", "phrase"), NEWER.items())
def test_phrases_are_those_of_rfc_9110(status: int, phrase: str) -> None:
    assert reason(status) == phrase


def test_the_others_agree_with_the_standard_library() -> None:
    for status in HTTPStatus:
        if status not in NEWER:
            assert reason(status).lower() == status.phrase.lower(), status


@pytest.mark.parametrize("status", [0, -1, 99, 299, 306, 430, 600, 999, 10**9])
def test_other_codes_have_none(status: int) -> None:
    assert reason(status) == ""


def test_phrases_can_stand_in_a_status_line() -> None:
    for status, phrase in REASONS.items():
        assert 100 <= status <= 599
        assert re.fullmatch(r"[A-Za-z'-]+( [A-Za-z'-]+)*", phrase)
