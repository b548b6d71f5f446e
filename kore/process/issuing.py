"""From what was declared to what ACME may: the key manager's place for what lasts, the ACME process's way out.

Decided in the parent before the first fork: storage that does not last, a user that does not exist or a provider that
makes no sense is one line and no server.
"""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Iterator
from urllib.parse import urlsplit

from kore.application.plan import Plan
from kore.application.privileges import Deployment
from kore.errors import StartError
from kore.process import confining
from kore.process.acme import AcmeOrders
from kore.sandbox.confinement import Confinement
from kore.sandbox.privileges import Rights
from kore.tls import acme_files
from kore.tls.acme_store import AcmeSettings

DNS_PORT = 53

RESOLVER_FILES = (
    "/etc/resolv.conf", "/etc/hosts", "/etc/host.conf", "/etc/nsswitch.conf", "/etc/gai.conf", "/etc/services",
    "/etc/protocols", "/etc/localtime",
)  # fmt: skip


def names(plan: Plan) -> tuple[str, ...]:
    """The domains that get their certificates from the provider; one of several servers counts once."""
    return tuple(dict.fromkeys(
        domain.name for domain in plan.domains if domain.tls is not None and domain.tls.acme
    ))


def keepers(plan: Plan, given: Rights) -> tuple[AcmeSettings, str] | None:
    """What the key manager must know of the provider, and the directory that it writes to, as it sees it; or nothing.

    `given` is where it lives. Raises StartError.
    """
    if not names(plan):
        return None
    settings = plan.settings
    outside = given.root or os.getcwd()
    try:
        kind = acme_files.volatile(outside)
    except OSError as error:
        raise StartError(f"{outside}, where certificates are to be kept: {error.strerror}") from error
    if kind is not None and not settings.acme_volatile:
        raise StartError(
            f"{outside}, where ACME's account and certificates are to be kept, is on {kind}, which is empty after a "
            "restart, and providers limit how many they give: set kore.config.keymgr_root to a directory on a disk, "
            "or acme_volatile = True if it is to be so"
        )
    if (settings.acme_eab_kid is None) != (settings.acme_eab_key is None):
        raise StartError("kore.config.acme_eab_kid and acme_eab_key: one is of no use without the other")
    key = None
    if settings.acme_eab_key is not None:
        key = confining.inside("acme_eab_key", settings.acme_eab_key, given)[0]
    # Its current directory, whose path its user may have no right to walk.
    return AcmeSettings(settings.acme_provider, settings.acme_eab_kid, key), os.curdir


def orders_of(plan: Plan, deployment: Deployment, workers: Confinement) -> AcmeOrders | None:
    """What the ACME process of `plan` is told; None without a domain for it. Raises StartError."""
    found = names(plan)
    if not found:
        return None
    settings = plan.settings
    given = confining.rights(plan, "acme", deployment, confined=workers.on)
    bundle = None
    if settings.acme_ca_bundle is not None:
        bundle = confining.inside("acme_ca_bundle", settings.acme_ca_bundle, given)[1]
    parts = urlsplit(settings.acme_provider)
    named = not confining.is_address(parts.hostname or "")
    mine = Confinement(
        process="acme",
        on=workers.on,
        rights=given,
        read=tuple(_readable(given)),
        connect_ports=(parts.port or 443, *((DNS_PORT,) if named else ())),
        names=named,
    )
    return AcmeOrders(settings.acme_provider, found, mine, settings.acme_email, bundle)


def _readable(given: Rights) -> Iterator[str]:
    """The resolver's files, and what Python may still import; behind a chroot all that is there."""
    if given.chroot:
        yield "/"
        return
    yield from RESOLVER_FILES
    paths = sysconfig.get_paths()
    yield os.path.dirname(confining.own_folder())
    for key in ("stdlib", "platstdlib", "purelib", "platlib"):
        yield os.path.abspath(paths[key])


def notices(orders: AcmeOrders) -> Iterator[str]:
    """What whoever starts the server should know of it."""
    given = orders.confinement.rights
    if given.chroot and orders.confinement.names and not os.path.exists(f"{given.root}/etc/resolv.conf"):
        yield (
            f"the root {given.root} of the ACME process has no etc/resolv.conf, so {orders.provider} may not be found: "
            "copy it there, or kore.privsep('acme', skip=['chroot'])"
        )
