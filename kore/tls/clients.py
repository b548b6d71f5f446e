"""What a domain demands of its clients: certificates of its authorities, not too far from them, and not revoked.

OpenSSL judges all of it. It is lenient in one thing only: a list of revoked certificates that is missing or out of date
is told, and locks nobody out, as the authority that did not publish in time is not the clients' fault. What stands on a
list is refused, however old that is.
"""

from __future__ import annotations

import ctypes
import ssl
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Final

from kore.tls.libssl import VERIFY_CALLBACK, Library, library

# x509_vfy.h
CRL_CHECK: Final = 0x4 | 0x8  # X509_V_FLAG_CRL_CHECK, CRL_CHECK_ALL: the whole chain
TOLERATED: Final = {
    3: "there is no list of revoked certificates for an authority",
    11: "a list of revoked certificates is not valid yet",
    12: "a list of revoked certificates has expired",
}
"""X509_V_ERR_UNABLE_TO_GET_CRL, CRL_NOT_YET_VALID, CRL_HAS_EXPIRED."""


class Clients:
    """The one callback for all contexts of a process, made at start: in the sandbox it could not be made any more."""

    def __init__(self, lib: Library) -> None:
        self.lib = lib
        self._tell: dict[int, Callable[[str], object]] = {}  # by the store that is verified with
        self._callback = VERIFY_CALLBACK(self._verified)

    def demand(
        self, context: ssl.SSLContext, authorities: Sequence[bytes], depth: int, crls: Sequence[bytes] | None,
        tell: Callable[[str], object],
    ) -> None:  # fmt: skip
        """Let only clients in that have a certificate of one of `authorities` (DER), at most `depth` others between.

        `crls` are lists of revoked certificates (DER); None: revocation is not looked at. `tell` is called with what is
        tolerated of them, perhaps more than once. Raises ValueError and ssl.SSLError for what cannot be used.
        """
        lib = self.lib
        at = lib.context_of(context)
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(cadata=b"".join(authorities))
        for der in authorities:
            authority = lib.certificate(der)
            lib.handle.SSL_CTX_add_client_CA(at, authority)  # so that a browser knows which of its own to offer
            lib.handle.X509_free(authority)
        parameters = lib.handle.SSL_CTX_get0_param(at)
        lib.handle.X509_VERIFY_PARAM_set_depth(parameters, depth)
        if crls is None:
            return
        store = lib.handle.SSL_CTX_get_cert_store(at)
        for der in crls:
            crl = lib.crl(der)
            taken = lib.handle.X509_STORE_add_crl(store, crl)
            lib.handle.X509_CRL_free(crl)
            if taken != 1:
                lib.handle.ERR_clear_error()
                raise ValueError("OpenSSL does not take a list of revoked certificates")
        lib.handle.X509_VERIFY_PARAM_set_flags(parameters, CRL_CHECK)
        lib.handle.X509_STORE_set_verify_cb(store, self._callback)
        lib.with_context(context, self._tell, store, tell)

    def listed(self, crls: Sequence[bytes], certificates: Iterable[bytes]) -> set[bytes]:
        """Those of the certificates that stand on one of the lists; all in DER."""
        lib = self.lib
        lists = [lib.crl(der) for der in crls]
        found: set[bytes] = set()
        entry = ctypes.c_void_p()
        for der in certificates:
            at = lib.certificate(der)
            if any(lib.handle.X509_CRL_get0_by_cert(crl, ctypes.byref(entry), at) == 1 for crl in lists):
                found.add(der)
            lib.handle.X509_free(at)
        for crl in lists:
            lib.handle.X509_CRL_free(crl)
        return found

    def _verified(self, ok: int, verifying: int) -> int:
        """X509_STORE_set_verify_cb(3): what OpenSSL found about a certificate of the chain, and what becomes of it."""
        try:
            handle = self.lib.handle
            error = handle.X509_STORE_CTX_get_error(verifying)
            if ok or error not in TOLERATED:
                return ok
            handle.X509_STORE_CTX_set_error(verifying, 0)
            self._tell[handle.X509_STORE_CTX_get0_store(verifying)](TOLERATED[error])
        except BaseException:  # noqa: BLE001 - there is only C above us, and doubt means no
            return 0
        return 1


@lru_cache(maxsize=1)
def clients() -> Clients:
    """This process's, made when first asked for. Raises TlsError."""
    return Clients(library())
