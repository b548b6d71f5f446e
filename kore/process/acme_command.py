"""The commands ``kore acme status`` and ``kore acme test``: what certificates there are, and whether they can be had.

Both end where a server would fork. The first reads what the key manager of a server, running or not, keeps on disk. The
second goes through an order, in this process and with keys that are thrown away: at the provider's staging place where
one is known, else up to the point at which a certificate would be issued. It answers the challenge on the application's
own addresses, so the server must not run meanwhile.
"""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Final, Self

from cryptography import x509

from kore.application.plan import Plan
from kore.errors import StartError
from kore.process.acme import AcmeOrders, moment
from kore.tls import acme_files, acme_schedule, certificates
from kore.tls.acme_client import Authority
from kore.tls.acme_link import Asker, KeysGoneError, RefusedError
from kore.tls.acme_network import AuthorityError, trust
from kore.tls.acme_store import AcmeSettings, AcmeStore
from kore.tls.certificates import Pair

STAGING: Final = {
    "https://acme-v02.api.letsencrypt.org/directory": "https://acme-staging-v02.api.letsencrypt.org/directory",
}
"""Where a provider lets everybody try as often as they like, with certificates that nobody trusts."""

HANDSHAKE_SECONDS_MAX: Final = 10.0

DAY_SECONDS: Final = 86400.0

CHALLENGE_PROTOCOL: Final = "acme-tls/1"


def status(orders: AcmeOrders, root: str) -> int:
    """Print what there is below `root`, the key manager's, as seen from here; 0 when all is well, 1 when not."""
    print(f"provider: {orders.provider}")
    print(f"account: {_account(root)}")
    print(f"kept in: {root}")
    well = True
    for name in orders.names:
        lines, good = _standing(root, name, time.time())
        print(f"{name}:", *lines, sep="\n  ")
        well = well and good
    return 0 if well else 1


def _account(root: str) -> str:
    import json

    try:
        text = acme_files.read(os.path.join(root, acme_files.ACCOUNT))
        return str(json.loads(text)["address"] or "none") if text is not None else "none yet"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"not to be read: {error}"


def _standing(root: str, name: str, now: float) -> tuple[list[str], bool]:
    """Lines about a domain, and whether all is well with it."""
    where = os.path.join(root, acme_files.folder(name))
    try:
        chain = acme_files.read(os.path.join(where, acme_files.CHAIN))
        noted = acme_files.read(os.path.join(where, acme_files.STANDING))
    except (OSError, ValueError) as error:
        return [f"not to be read: {error}"], False
    known = acme_schedule.load(noted or b"")
    lines, not_after = [], 0.0
    if chain is None:
        lines.append("certificate: none yet")
    else:
        try:
            leaf = certificates.load_chain(chain, acme_files.CHAIN)[0]
        except certificates.CertificateError as error:
            lines.append(f"certificate: damaged: {error}")
        else:
            not_after = leaf.not_valid_after_utc.timestamp()
            known = acme_schedule.matching(known, leaf.not_valid_before_utc.timestamp(), not_after)
            days = (not_after - now) / DAY_SECONDS
            left = f"{days:.0f} days" if days >= 2 else f"{max(0.0, days * 24):.1f} hours"
            ends = f"expires {moment(not_after)}, {left} left" if not_after > now else f"EXPIRED {moment(not_after)}"
            lines += [f"certificate: from {_title(leaf.issuer)}, {ends}", f"renewal: {_renewal(known)}"]
    if known.failures:
        lines.append(f"failed: {known.failures} times in a row, at {moment(known.error_at)}: {known.error}")
    due = known.due(now)
    if not_after <= now or known.failures:
        lines.append("tried again: now, if the server runs" if due <= now else f"tried again: {moment(due)}")
    return lines, not_after > now and not known.failures


def _renewal(known: acme_schedule.Standing) -> str:
    why = "a third of its life is left then" if known.window is None else "as the provider suggests"
    return f"{moment(known.renewal())}, {why}"


def _title(name: x509.Name) -> str:
    return name.rfc4514_string() or "nobody"


def test(orders: AcmeOrders, settings: AcmeSettings, plan: Plan, root: str, provider: str | None) -> int:
    """Go through an order for each domain, without installing anything; 0 when all could be had, 1 when not.

    Raises StartError.
    """
    place = provider or STAGING.get(orders.provider, orders.provider)
    trial = place != orders.provider
    if settings.eab_kid is not None and not trial:
        raise StartError(
            "a key for an external account may be good for one account only, which a trial would be: start the server, "
            "and see kore acme status"
        )
    try:
        context = trust(orders.ca_bundle)
    except OSError as error:
        raise StartError(f"{orders.ca_bundle or 'the authorities of the system'}: {error}") from error
    how = "certificates nobody trusts" if trial else "up to the provider's consent; no certificate is issued"
    print(f"provider: {place} ({how})", flush=True)
    listening = [one.sock for one in plan.listeners if one.tls]
    well = True
    with _Trial(place, orders.names, listening) as trying:
        authority = Authority(place, trying.keys, context=context, email=orders.email)
        for name in orders.names:
            try:
                authority.issue(name, dry=not trial)
            except (AuthorityError, RefusedError, KeysGoneError) as error:
                well = False
                print(f"{name}: failed: {error}", flush=True)
            else:
                what = "a certificate was issued" if trial else "validated"
                print(f"{name}: {what}, nothing is installed", flush=True)
    if not well:
        print(f"nothing below {root} was changed")
    return 0 if well else 1


class _Trial:
    """Both halves of ACME in one process, in a directory that is thrown away, and who answers challenges."""

    def __init__(self, provider: str, names: Iterable[str], listening: list[socket.socket]) -> None:
        self._contexts: dict[str, ssl.SSLContext] = {}
        self._answers: list[bytes] = []
        self._listening = listening
        self._stack = contextlib.ExitStack()
        self._store = AcmeStore(
            AcmeSettings(provider), names, log=lambda text: print(f"  {text}"), publish=lambda _: None,
            challenge=self._challenge)
        self.keys = Asker(
            lambda message: self._store.handle(message, self._answers.append), lambda _seconds: self._answers.pop(0))

    def __enter__(self) -> Self:
        self._place = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="kore-acme-")))
        self._stack.enter_context(contextlib.chdir(self._place))
        self._store.load()
        for sock in self._listening:
            sock.settimeout(None)
            thread = threading.Thread(target=self._answer, args=(sock,), daemon=True)
            thread.start()
            self._stack.callback(thread.join, HANDSHAKE_SECONDS_MAX)
        self._stack.callback(self._stop)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _stop(self) -> None:
        for sock in self._listening:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def _challenge(self, name: str, pair: Pair | None, done: Callable[[list[str]], None]) -> None:
        if pair is None:
            self._contexts.pop(name, None)
        else:
            self._contexts[name] = self._context(pair)
        done([])

    def _context(self, pair: Pair) -> ssl.SSLContext:
        """The library takes certificates from files only."""
        paths = self._place / "challenge.pem", self._place / "challenge-key.pem"
        acme_files.write(str(paths[0]), certificates.chain_pem(pair.chain))
        acme_files.write(str(paths[1]), certificates.key_pem(pair.key))
        context = _plain_context()
        context.load_cert_chain(*paths)
        return context

    def _answer(self, sock: socket.socket) -> None:
        """A thread for each address: shake hands, and hang up (RFC 8737, 3)."""
        context = _plain_context()
        context.sni_callback = self._choose
        for taken in _accepted(sock):
            taken.settimeout(HANDSHAKE_SECONDS_MAX)
            with contextlib.suppress(OSError), taken:
                context.wrap_socket(taken, server_side=True).close()

    def _choose(self, connection: ssl.SSLSocket | ssl.SSLObject, name: str | None, _context: ssl.SSLContext) -> None:
        found = self._contexts.get((name or "").lower())
        if found is not None:
            connection.context = found


def _plain_context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.set_alpn_protocols([CHALLENGE_PROTOCOL])
    return context


def _accepted(sock: socket.socket) -> Iterator[socket.socket]:
    while True:
        try:
            yield sock.accept()[0]
        except OSError:
            return
