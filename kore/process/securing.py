"""What the parent looks at for TLS before the first fork: options and authorities; for ``kore check`` pairs as well.

Private keys are not among it: the key manager alone reads those, after it was forked, so that no memory that a worker
inherits ever held one. ``kore check`` ends where a server would fork; it reads them, and says whether they are good.
"""

from __future__ import annotations

import importlib.util
import os
import stat
from collections.abc import Iterator
from dataclasses import replace

from kore.application.config import assigned
from kore.application.declared import application
from kore.application.domains import DomainTls
from kore.application.plan import Plan, PlannedDomain
from kore.application.privileges import Deployment
from kore.application.settings import Settings
from kore.errors import ConfigurationError, StartError
from kore.process import confining
from kore.sandbox.privileges import Rights

PACKAGES = {
    "cryptography": ("tls", "a TLS server"),
    "acme": ("acme", "a domain with acme=True"),
}
"""What is imported for TLS: the extra that brings it, and what needs it."""


def speaks_tls(plan: Plan) -> bool:
    """Whether any server of the application does."""
    return any(listener.tls for listener in plan.listeners)


def secured(plan: Plan, workers: Rights) -> Plan:
    """`plan`, with the authorities of clients read and its options of TLS tried. Raises StartError.

    `workers` is where the workers will live: the files counted from there.
    """
    if not speaks_tls(plan):
        return plan
    need_packages(plan)
    try:
        parameters = _tried(plan.settings, workers)
    except ConfigurationError as error:
        raise StartError(str(error)) from error
    settings = replace(plan.settings, http_hsts_enable=0) if spares_browsers(plan) else plan.settings
    domains = tuple(_with_authorities(domain, workers) for domain in plan.domains)
    return replace(plan, settings=settings, dh_parameters=parameters, domains=domains)


def need_packages(plan: Plan) -> None:
    """Raises StartError when a package is missing that what is declared needs."""
    wanted = ["cryptography"]
    if any(domain.tls is not None and domain.tls.acme for domain in plan.domains):
        wanted.append("acme")
    for module in wanted:
        if importlib.util.find_spec(module) is None:
            extra, use = PACKAGES[module]
            raise StartError(f"{use} needs the package {module}: pip install 'kore[{extra}]'")


def spares_browsers(plan: Plan) -> bool:
    """Whether no browser is told to insist on TLS: in development it would, for all servers on localhost and a year."""
    local = any(domain.tls is not None and domain.tls.local for domain in plan.domains)
    return local and "http_hsts_enable" not in assigned(application.config)


def _tried(settings: Settings, workers: Rights) -> bytes:
    """The Diffie-Hellman parameters, after all options were tried."""
    from kore.tls import choices

    choices.cipher_list(settings.tls_cipher)
    name = settings.tls_dhparam
    if name is None:
        return b""
    where = f"kore.config.tls_dhparam = {name!r}"
    path = confining.inside(where, name, workers)[1]
    try:
        text = read_file(path, where)
    except OSError as error:
        raise StartError(f"{where}: cannot be read: {error.strerror}") from error
    choices.check_dh_parameters(path, name)
    return text


def _with_authorities(domain: PlannedDomain, workers: Rights) -> PlannedDomain:
    if domain.tls is None or domain.tls.client_verify is None:
        return domain
    from kore.tls import certificates

    name = domain.tls.client_verify
    where = f"domain {domain.name!r}: client_verify"
    path = confining.inside(where, name, workers)[1]
    try:
        found = certificates.load_authorities(read_file(path, name), f"{where}: {name}")
    except OSError as error:
        raise StartError(f"{where}: {name}: cannot be read: {error.strerror}") from error
    except certificates.CertificateError as error:
        raise StartError(str(error)) from error
    return replace(domain, tls=replace(domain.tls, authorities=tuple(found)))


def read_file(path: str, name: str, bytes_max: int = 256 * 1024) -> bytes:
    """A regular file whole; one byte more than `bytes_max` if it has that many, for the reader to refuse.

    Raises OSError as it comes, and StartError for what is no regular file: a fifo would be waited for.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise StartError(f"{name}: is no regular file")
        with open(fd, "rb", closefd=False) as file:
            return file.read(bytes_max + 1)
    finally:
        os.close(fd)


def examine(plan: Plan, deployment: Deployment) -> dict[int, list[str]]:
    """For ``kore check``: what each TLS domain serves, in lines, by its index. Raises StartError for a bad pair."""
    if not speaks_tls(plan):
        return {}
    keeper = confining.rights(plan, "keymgr", deployment, confined=False)
    return {
        index: list(_lines(domain.name, domain.tls, plan, keeper))
        for index, domain in enumerate(plan.domains)
        if domain.tls is not None
    }


def _lines(name: str, tls: DomainTls, plan: Plan, keeper: Rights) -> Iterator[str]:
    if tls.local:
        yield "certificate: from the local authority, for development only"
    elif tls.acme:
        yield f"certificate: from {plan.settings.acme_provider}, kept in {os.path.dirname(tls.cert[0])}"
    else:
        yield from _pairs(name, tls, keeper)
    if tls.client_verify is not None:
        authorities = len(tls.authorities)
        known = "1 authority" if authorities == 1 else f"{authorities} authorities"
        but_for = "" if tls.crl is None else f", but for those revoked in {tls.crl}"
        yield f"clients: need a certificate from {tls.client_verify} ({known}), depth {tls.verify_depth}{but_for}"
        if tls.crl is not None:
            _check_revocations(name, tls.crl, keeper)


def _pairs(name: str, tls: DomainTls, keeper: Rights) -> Iterator[str]:
    """What each pair is, and what clients will object to in it."""
    from kore.tls import certificates

    where = f"domain {name!r}"
    loaded = []
    for cert, key in zip(tls.cert, tls.key, strict=True):
        texts = []
        try:
            for what, path in ((f"{where}: cert", cert), (f"{where}: key", key)):
                texts.append(read_file(confining.inside(what, path, keeper)[1], f"{what} {path}"))
        except PermissionError:
            yield f"certificate: {cert}, key {key}: not looked at: {path} cannot be read by this user"
            continue
        except OSError as error:
            raise StartError(f"{what} {path}: {error.strerror}") from error
        try:
            pair = certificates.load_pair(*texts, cert_name=f"cert {cert}", key_name=f"key {key}")
            loaded.append(pair)
            certificates.check_kinds(loaded, cert)
        except certificates.CertificateError as error:
            raise StartError(f"{where}: {error}") from error
        names = ", ".join(pair.names) or "no name"
        yield f"certificate: {cert}, key {key}: {pair.kind}, for {names}, until {pair.not_after:%Y-%m-%d}"
        yield from (f"certificate: {cert} {remark}" for remark in pair.remarks(name))


def _check_revocations(name: str, crl: str, keeper: Rights) -> None:
    """A list that is not there is none that stops a server: it may come later."""
    from kore.tls import certificates

    where = f"domain {name!r}: crl"
    try:
        text = read_file(
            confining.inside(where, crl, keeper)[1], f"{where} {crl}", certificates.REVOCATIONS_BYTES_MAX)
        certificates.load_revocations(text, f"{where} {crl}")
    except FileNotFoundError:
        return
    except OSError as error:
        raise StartError(f"{where} {crl}: {error.strerror}") from error
    except certificates.CertificateError as error:
        raise StartError(str(error)) from error


