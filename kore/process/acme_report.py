"""``kore acme status`` and ``kore acme test``: what there is of each certificate, and whether the next can be had.

Both read the application and what lasts of ACME on disk, beside a server that may be running, and change nothing: no port
is listened on, no account made, nothing ordered. The server's own log tells the same as it happens.
"""

from __future__ import annotations

import datetime
import json
import os
import socket
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import NameOID

from kore.application.plan import Plan
from kore.process.issuing import names
from kore.tls import acme_files, certificates
from kore.tls.acme_network import trust
from kore.tls.acme_schedule import load
from kore.version import __version__

EXIT_GOOD, EXIT_BAD = 0, 1

SECONDS_MAX = 10.0
"""For each answer from the network."""

DIRECTORY_BYTES_MAX = 64 * 1024

NEEDED = ("newNonce", "newAccount", "newOrder")
"""What a directory must name, RFC 8555 7.1.1."""

TLS_PORT = 443
"""Where a provider looks for the answer to tls-alpn-01: RFC 8737 3 leaves no choice."""


@dataclass(frozen=True, slots=True)
class Line:
    """A line of the report, and whether it is as it should be."""

    text: str
    good: bool = True


def report(plan: Plan, command: str, out: Callable[[str], object] = print) -> int:
    """Print the report `command`, "status" or "test"; the exit code."""
    wanted = names(plan)
    root = os.path.abspath(plan.privileges["keymgr"].root or os.curdir)
    good = True
    for line in (status if command == "status" else test)(plan, root, wanted):
        out("".join(character if character.isprintable() else "?" for character in line.text))
        good = good and line.good
    return EXIT_GOOD if good else EXIT_BAD


def status(plan: Plan, root: str, wanted: tuple[str, ...]) -> Iterator[Line]:
    """What there is on disk."""
    yield Line(f"provider: {plan.settings.acme_provider}")
    yield Line(f"account: {_account(root, plan.settings.acme_provider)}")
    for name in wanted:
        yield Line(f"{name}:")
        for line in _standing(root, name):
            yield Line(f"  {line.text}", line.good)


def _account(root: str, provider: str) -> str:
    try:
        text = acme_files.read(os.path.join(root, acme_files.ACCOUNT))
        found = json.loads(text or b"{}")
    except (OSError, ValueError) as error:
        return f"cannot be read: {error}"
    if not isinstance(found, dict) or found.get("provider") != provider or not found.get("address"):
        return "none yet; it is made with the first order"
    return str(found["address"])


def _standing(root: str, name: str) -> Iterator[Line]:
    folder = os.path.join(root, acme_files.folder(name))
    now = time.time()
    try:
        chain = acme_files.read(os.path.join(folder, acme_files.CHAIN))
        noted = load(acme_files.read(os.path.join(folder, acme_files.STANDING)) or b"")
        leaf = None if chain is None else certificates.load_chain(chain, acme_files.CHAIN)[0]
    except PermissionError as error:
        yield Line(f"cannot be read by this user: {error.filename}", good=False)
        return
    except (OSError, ValueError) as error:
        yield Line(str(error), good=False)
        return
    if leaf is None:
        yield Line("certificate: none yet; a self-signed one is served", good=False)
    else:
        end = leaf.not_valid_after_utc
        left = (end.timestamp() - now) / 86400
        issuer = leaf.issuer.get_attributes_for_oid(NameOID.COMMON_NAME)
        by = str(issuer[0].value) if issuer else leaf.issuer.rfc4514_string()
        how = f"{left:.0f} days left" if left >= 0 else "expired"
        yield Line(f"certificate: by {by}, until {_shown(end.timestamp())} ({how})", good=left >= 0)
        if noted.renewal():
            why = "as the provider wishes" if noted.window else "by its age"
            yield Line(f"renewal: {_shown(noted.renewal())}, {why}")
    if noted.failures:
        yield Line(f"failed: {noted.failures} in a row, last at {_shown(noted.error_at)}: {noted.error}", good=False)
        yield Line(f"tried again: {'now' if noted.due(now) <= now else _shown(noted.due(now))}, or on SIGUSR1")


def test(plan: Plan, root: str, wanted: tuple[str, ...]) -> Iterator[Line]:
    """What has to be so for the next order, as far as it can be seen from this machine."""
    yield _storage(plan, root)
    yield from _provider(plan)
    for name in wanted:
        yield _reached(name, root)
    yield Line("this was asked from here; the provider asks from elsewhere, where a name or a firewall may differ")


def _storage(plan: Plan, root: str) -> Line:
    try:
        kind = acme_files.volatile(root)
    except OSError as error:
        return Line(f"storage: {root}: {error.strerror}", good=False)
    if kind is None:
        return Line(f"storage: {root}, which lasts")
    if plan.settings.acme_volatile:
        return Line(f"storage: {root} is on {kind} and will be empty after a restart, which acme_volatile accepts")
    return Line(f"storage: {root} is on {kind}, empty after a restart: set keymgr_root, or acme_volatile", good=False)


def _provider(plan: Plan) -> Iterator[Line]:
    settings = plan.settings
    bundle = settings.acme_ca_bundle
    if bundle is not None:
        bundle = os.path.join(plan.privileges["acme"].root or os.curdir, bundle)
    where = f"provider: {settings.acme_provider}"
    try:
        found = _directory(settings.acme_provider, trust(bundle))
    except (OSError, ValueError) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        yield Line(f"{where}: cannot be asked: {reason}", good=False)
        return
    lacking = [key for key in NEEDED if not isinstance(found.get(key), str)]
    if lacking:
        yield Line(f"{where}: is no ACME directory: it does not say {', '.join(lacking)}", good=False)
        return
    yield Line(f"{where}: answers")
    meta = found.get("meta")
    meta = meta if isinstance(meta, dict) else {}
    if isinstance(meta.get("termsOfService"), str):
        yield Line(f"terms, which using it agrees to: {meta['termsOfService'][:200]!r}")
    if meta.get("externalAccountRequired") is True and settings.acme_eab_kid is None:
        yield Line("account: the provider wants one of its own bound: set acme_eab_kid and acme_eab_key", good=False)


def _directory(url: str, context: ssl.SSLContext) -> dict[str, object]:
    """Raises OSError, ValueError."""
    wanted = urllib.request.Request(url, headers={"User-Agent": f"kore/{__version__}"})  # noqa: S310 (https, checked)
    opener = urllib.request.build_opener(urllib.request.HTTPSHandler(context=context), urllib.request.ProxyHandler({}))
    with opener.open(wanted, timeout=SECONDS_MAX) as answer:
        text = answer.read(DIRECTORY_BYTES_MAX + 1)
    if len(text) > DIRECTORY_BYTES_MAX:
        raise ValueError("its answer is too long for a directory")
    found = json.loads(text)
    if not isinstance(found, dict):
        raise ValueError("its answer is no directory")
    return found


def _reached(name: str, root: str) -> Line:
    """Whether port 443 of the name leads to who has the key of the domain."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # it may be self-signed still
    try:
        with socket.create_connection((name, TLS_PORT), SECONDS_MAX) as plain:
            address = plain.getpeername()[0]
            with context.wrap_socket(plain, server_hostname=name) as secure:
                shown = x509.load_der_x509_certificate(secure.getpeercert(binary_form=True) or b"")
    except socket.gaierror as error:
        return Line(f"{name}: leads nowhere: {error.strerror}", good=False)
    except (OSError, ValueError) as error:
        return Line(f"{name}: nobody speaks TLS at port {TLS_PORT}: {error}", good=False)
    try:
        key = acme_files.read(os.path.join(root, acme_files.folder(name), acme_files.KEY))
        mine = None if key is None else _public(certificates.load_key(key).public_key())
    except (OSError, ValueError) as error:
        return Line(f"{name}: leads to {address}; whether to this server cannot be told: {error}")
    if mine is None:
        return Line(f"{name}: leads to {address}, where somebody speaks TLS; start the server to see whether it does")
    if mine != _public(shown.public_key()):
        return Line(f"{name}: leads to {address}, where another certificate is served than this server's", good=False)
    return Line(f"{name}: leads to {address} and to this server")


def _public(key: object) -> bytes:
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)  # type: ignore[attr-defined, no-any-return]


def _shown(moment: float) -> str:
    return f"{datetime.datetime.fromtimestamp(moment, datetime.UTC):%Y-%m-%d %H:%M} UTC"
