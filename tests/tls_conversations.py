"""What clients of TLS may and may not say, as a table: one conversation a row, and the alerts that may answer it.

The choice of rows is that of tlsfuzzer's scripts for servers, those for what this server offers: TLS 1.2 and 1.3, ECDHE
with AEAD, tickets, ALPN, no renegotiation. A row ends with the server's fatal alert, or with a response. It stands in
a table, and not in tests, so that it can be tried on other servers too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from cryptography.exceptions import InvalidTag

from tests import tls_wire as wire
from tests.tls_wire import HELLO12, Alerted, Client, Ended, Hello, hello13

MALFORMED = (wire.DECODE, wire.ILLEGAL)
REFUSED = (wire.HANDSHAKE_FAILURE,)



@dataclass(frozen=True)
class Row:
    """`talk` has the conversation; then the server sends one of `alerts` and closes, None: closes without.

    Where there are none, all has been said when `talk` returns.
    """

    name: str
    talk: Callable[[Client], None]
    alerts: frozenset[int | None]

    def hold(self, port: int) -> str:
        """Have the conversation with the server at a port of 127.0.0.1: what was wrong with it, "" when nothing was."""
        with Client(port) as client:
            try:
                self.talk(client)
                ended = client.end() if self.alerts else None
            except (OSError, AssertionError, Alerted, Ended, InvalidTag) as error:
                return f"{type(error).__name__}: {error}"
        if self.alerts and ended not in self.alerts:
            return f"ended by {ended}, not by one of {sorted(self.alerts, key=str)}"
        return ""


ROWS: list[Row] = []


def row(name: str, *alerts: int | None) -> Callable[[Callable[[Client], None]], Callable[[Client], None]]:
    """Puts a conversation into the table. Without alerts it ends by itself, served."""

    def enter(talk: Callable[[Client], None]) -> Callable[[Client], None]:
        ROWS.append(Row(name, talk, frozenset(alerts)))
        return talk

    return enter


def rows(names: dict[str, tuple[Callable[[Client], None], tuple[int | None, ...]]]) -> None:
    """Puts many into the table."""
    ROWS.extend(Row(name, talk, frozenset(alerts)) for name, (talk, alerts) in names.items())


def served12(hello: Hello) -> Callable[[Client], None]:
    """A conversation in TLS 1.2 that is served."""

    def talk(client: Client) -> None:
        client.shake12(hello)
        client.finish12()
        client.ask()
        client.ask()

    return talk


def served13(make: Callable[[Client], Hello]) -> Callable[[Client], None]:
    """A conversation in TLS 1.3 that is served."""

    def talk(client: Client) -> None:
        client.shake13(make(client))
        client.finish13()
        client.ask()
        client.ask()

    return talk


def established12(client: Client) -> None:
    """A connection of TLS 1.2."""
    client.shake12(HELLO12)
    client.finish12()
    client.ask()


def established13(client: Client) -> None:
    """A connection of TLS 1.3."""
    client.shake13(hello13(client.key))
    client.finish13()
    client.ask()


def established(talk: Callable[[Client], None], begin: Callable[[Client], None]) -> Callable[[Client], None]:
    """`talk` on a connection."""

    def both(client: Client) -> None:
        begin(client)
        talk(client)

    return both


def with12(*extensions: tuple[int, bytes]) -> Callable[[Client], None]:
    """A conversation that is one ClientHello of TLS 1.2, with these extensions."""
    return lambda client: client.hello(HELLO12.but(*extensions))


def with13(*extensions: tuple[int, bytes]) -> Callable[[Client], None]:
    """A conversation that is one ClientHello of TLS 1.3, with these extensions."""
    return lambda client: client.hello(hello13(client.key).but(*extensions))


def but12(**parts: Any) -> Callable[[Client], None]:
    """A conversation that is one ClientHello of TLS 1.2, some of whose parts are others."""
    return lambda client: client.hello(replace(HELLO12, **parts))


def but13(**parts: Any) -> Callable[[Client], None]:
    """A conversation that is one ClientHello of TLS 1.3, some of whose parts are others."""
    return lambda client: client.hello(replace(hello13(client.key), **parts))


def without13(*numbers_: int) -> Callable[[Client], None]:
    """A conversation that is one ClientHello of TLS 1.3, without these extensions."""
    return lambda client: client.hello(hello13(client.key).without(*numbers_))
