"""From what was declared to what the key manager may: its files, as it sees them, its user, and who else reads them.

Decided in the parent, which looks at names and rights of files and never into one that holds a key.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from kore.application.domains import DomainTls
from kore.application.plan import Plan, PlannedDomain
from kore.application.privileges import Deployment
from kore.process import confining, issuing
from kore.process.keymgr import KeyOrders
from kore.sandbox.confinement import Confinement
from kore.sandbox.privileges import Rights
from kore.tls import authority
from kore.tls.keys import DomainFiles


def orders_of(plan: Plan, deployment: Deployment, workers: Confinement) -> KeyOrders:
    """What the key manager of `plan` is told. Raises StartError for what cannot be had, or not from within its root."""
    given = confining.rights(plan, "keymgr", deployment, confined=workers.on)
    urls = {listener.name: listener.url for listener in plan.listeners}
    files = tuple(
        _files(index, domain, domain.tls, given, urls[domain.server])
        for index, domain in enumerate(plan.domains) if domain.tls is not None
    )
    rand_file = None
    write: tuple[str, ...] = ()
    if plan.settings.rand_file is not None:
        rand_file, _ = confining.inside("rand_file", plan.settings.rand_file, given, exists=False)
        write = (os.path.dirname(rand_file),)
    acme, place = issuing.keepers(plan, given) or (None, None)
    if place is not None:
        write = (*write, place)
    mine = Confinement(process="keymgr", on=workers.on, rights=given, write=write)
    return KeyOrders(files, mine, rand_file, acme)


def _files(index: int, domain: PlannedDomain, tls: DomainTls, given: Rights, url: str) -> DomainFiles:
    where = f"domain {domain.name!r}"

    def seen(what: str, path: str) -> str:
        return confining.inside(f"{where}: {what}", path, given, exists=False)[0]

    pairs: tuple[tuple[str, str], ...] = ()
    if not (tls.acme or tls.local):
        pairs = tuple((seen("cert", cert), seen("key", key)) for cert, key in zip(tls.cert, tls.key, strict=True))
    crl = None if tls.crl is None or tls.client_verify is None else seen("crl", tls.crl)
    local = tuple(authority.names_for(domain.name, url)) if tls.local else ()
    return DomainFiles(index, domain.name, pairs, crl, acme=tls.acme, local=local)


def notices(orders: KeyOrders, workers: Confinement) -> Iterator[str]:
    """What whoever starts the server should know of it."""
    if not workers.on:
        return
    given = orders.confinement.rights
    if given.identity == workers.rights.identity:
        who = "user" if given.identity is None else f"user {given.identity.name}"
        yield f"the key manager and the workers are the same {who}: name another with kore.config.keymgr_runas"
    for files in orders.files:
        for _, key in files.pairs:
            outside = f"{given.root}{key}" if given.chroot else key
            if _reached(outside, workers) and _readable(outside, workers.rights):
                yield f"{outside}: workers may read this key; move it out of what they read, or give it to another user"


def _reached(path: str, workers: Confinement) -> bool:
    """Whether Landlock lets workers open it."""
    root = workers.rights.root if workers.rights.chroot else ""
    path = os.path.realpath(path)
    folders = (os.path.join(os.path.realpath(f"{root}{folder}"), "") for folder in workers.read)
    return any(path.startswith(folder) for folder in folders)


def _readable(path: str, rights: Rights) -> bool:
    """Whether the mode of the file lets them."""
    try:
        found = os.stat(path)
    except OSError:
        return False
    uid, gid = (os.geteuid(), os.getegid()) if rights.identity is None else (rights.identity.uid, rights.identity.gid)
    shift = 6 if found.st_uid == uid else 3 if found.st_gid == gid else 0
    return bool(found.st_mode >> shift & os.R_OK)
