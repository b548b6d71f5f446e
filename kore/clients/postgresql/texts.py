"""What the text of a query tells before the server has read it: its first word, and that it may change the session.

Nothing here parses SQL. Where a text only looks as if it changed the session, that costs a reset and nothing else.
"""

from __future__ import annotations

import re

_NOTHING = r"[\s;]+|--[^\n]*|/\*.*?\*/"
_BLANK = re.compile(rf"(?:{_NOTHING})*", re.DOTALL)
_BEFORE_FIRST_WORD = re.compile(rf"(?:{_NOTHING}|\()*", re.DOTALL)
_WORD = re.compile(r"[A-Za-z]*")

# Statements whose command tags are those of harmless ones: CREATE TEMP TABLE AS and SELECT INTO TEMP (both are SELECT),
# functions that SELECT calls, and UPDATE pg_settings, which is SET. Looking for a few words first takes 1 ms for a text
# of 1 MB; the pattern, which tells a temporary table from a column "temp", takes 15 ms.
_WORDS = ("TEMP", "SET_CONFIG", "ADVISORY_LOCK", "PG_SETTINGS")
_CHANGES = re.compile(
    r"\b(?:(?:CREATE|INTO)\s+(?:(?:GLOBAL|LOCAL)\s+)?TEMP(?:ORARY)?\b|PG_TEMP\s*\."
    r"|SET_CONFIG\b|PG_(?:TRY_)?ADVISORY_LOCK(?:_SHARED)?\b|UPDATE\s[^;]*?\bPG_SETTINGS\b)"
)


def is_blank(text: str) -> bool:
    """Whether there is no statement in it."""
    blank = _BLANK.match(text)
    return blank is not None and blank.end() == len(text)


def first_word(text: str) -> str:
    """The word that it begins with after comments and parentheses, in capitals; "" if it is none."""
    before = _BEFORE_FIRST_WORD.match(text)
    word = _WORD.match(text, before.end() if before is not None else 0)
    return word[0].upper() if word is not None else ""


def may_change_session(text: str) -> bool:
    """Whether it names what changes the session without a command tag that tells."""
    capitals = text.upper()
    return any(word in capitals for word in _WORDS) and _CHANGES.search(capitals) is not None
