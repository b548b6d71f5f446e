"""What goes wrong with a database, as the one exception that the reference promises: a RuntimeError."""

from __future__ import annotations

from collections.abc import Mapping


class DatabaseError(RuntimeError):
    """A query, or a connection it needed, failed. The message says what the server said, or what happened instead."""

    sqlstate: str | None
    """The server's five-letter code (PostgreSQL's manual, "PostgreSQL Error Codes"); None where it said nothing."""

    def __init__(self, text: str, sqlstate: str | None = None) -> None:
        super().__init__(text)
        self.sqlstate = sqlstate


def from_server(fields: Mapping[str, str]) -> DatabaseError:
    """The exception for an ErrorResponse."""
    text = f"{fields.get('S') or 'ERROR'}: {fields.get('M', 'no message')} (SQLSTATE {fields.get('C', 'unknown')})"
    for field, word in (("P", "at character"), ("D", "detail:"), ("H", "hint:")):
        if fields.get(field):
            text += f"; {word} {fields[field]}"
    return DatabaseError(text, fields.get("C"))


def from_exception(error: BaseException) -> DatabaseError:
    """The exception for one of asyncpg's, or of the operating system's."""
    sqlstate = getattr(error, "sqlstate", None)
    if getattr(error, "message", None):
        # It is the server's, and asyncpg keeps its fields under these names.
        names = {"S": "severity", "M": "message", "C": "sqlstate", "P": "position", "D": "detail", "H": "hint"}
        return from_server({letter: str(getattr(error, name, None) or "") for letter, name in names.items()})
    return DatabaseError(str(error) or type(error).__name__, sqlstate)
