"""The OpenSSL that Python's own ``ssl`` uses, for what ``ssl`` does not offer: keys held elsewhere, ticket keys, CRLs.

It must be that library and no other: structures are passed between the two. So the symbols are resolved through the
extension module itself, and the one fact about CPython that is relied on (``SSLContext`` begins, behind the object
head, with its ``SSL_CTX *``) is checked before it is used: a wrong guess would be a crash, and is a clear error.
"""

from __future__ import annotations

import _ssl
import ctypes
import ssl
import weakref
from ctypes import POINTER, c_char_p, c_int, c_long, c_uint, c_uint64, c_void_p
from functools import lru_cache
from typing import Any, Final

from kore.errors import ConfigurationError, StartError

EVP_PKEY_RSA: Final = 6  # obj_mac.h: NID_rsaEncryption
EVP_PKEY_EC: Final = 408  # NID_X9_62_id_ecPublicKey

# ssl.h: commands of SSL_CTX_ctrl(3).
SSL_CTRL_MODE: Final = 33
SSL_CTRL_SET_SESS_CACHE_MODE: Final = 44
SSL_CTRL_SET_TLSEXT_TICKET_KEYS: Final = 59
SSL_CTRL_CHAIN_CERT: Final = 89
SSL_CTRL_SET_GROUPS_LIST: Final = 92
SSL_CTRL_SET_SIGALGS_LIST: Final = 98
SSL_CTRL_SET_CLIENT_SIGALGS_LIST: Final = 102

SSL_MODE_RELEASE_BUFFERS: Final = 0x10
SSL_SESS_CACHE_OFF: Final = 0

PRIVATE_OPERATION = ctypes.CFUNCTYPE(c_int, c_int, c_void_p, c_void_p, c_void_p, c_int)
"""RSA_meth_set_priv_enc(3): (flen, from, to, rsa, padding) -> bytes written, or -1."""

ECDSA_SIGN = ctypes.CFUNCTYPE(c_int, c_int, c_void_p, c_int, c_void_p, POINTER(c_uint), c_void_p, c_void_p, c_void_p)
"""EC_KEY_METHOD_set_sign: (type, digest, length, signature, length of it, kinv, r, key) -> 1, or 0."""

VERIFY_CALLBACK = ctypes.CFUNCTYPE(c_int, c_int, c_void_p)
"""X509_STORE_set_verify_cb(3): (ok, X509_STORE_CTX *) -> ok."""

_P: Final = c_void_p
_SIGNATURES: Final[dict[str, tuple[Any, tuple[Any, ...]]]] = {
    "OpenSSL_version": (c_char_p, (c_int,)),
    "ERR_clear_error": (None, ()),
    "SSL_CTX_get_options": (c_uint64, (_P,)),
    "SSL_CTX_ctrl": (c_long, (_P, c_int, c_long, _P)),
    "SSL_CTX_set_ciphersuites": (c_int, (_P, c_char_p)),
    "SSL_CTX_use_certificate": (c_int, (_P, _P)),
    "SSL_CTX_use_PrivateKey": (c_int, (_P, _P)),
    "SSL_CTX_add_client_CA": (c_int, (_P, _P)),
    "SSL_CTX_get_cert_store": (_P, (_P,)),
    "SSL_CTX_get0_param": (_P, (_P,)),
    "X509_VERIFY_PARAM_set_depth": (None, (_P, c_int)),
    "X509_VERIFY_PARAM_set_flags": (c_int, (_P, ctypes.c_ulong)),
    "X509_STORE_add_crl": (c_int, (_P, _P)),
    "X509_STORE_set_verify_cb": (None, (_P, _P)),
    "X509_STORE_CTX_get_error": (c_int, (_P,)),
    "X509_STORE_CTX_set_error": (None, (_P, c_int)),
    "X509_STORE_CTX_get0_store": (_P, (_P,)),
    "BIO_new_mem_buf": (_P, (c_char_p, c_int)),
    "BIO_free": (c_int, (_P,)),
    "PEM_read_bio_Parameters": (_P, (_P, _P)),
    "d2i_X509": (_P, (_P, POINTER(c_void_p), c_long)),
    "X509_free": (None, (_P,)),
    "X509_get_pubkey": (_P, (_P,)),
    "d2i_X509_CRL": (_P, (_P, POINTER(c_void_p), c_long)),
    "X509_CRL_free": (None, (_P,)),
    "X509_CRL_get0_by_cert": (c_int, (_P, POINTER(c_void_p), _P)),
    "i2d_PUBKEY": (c_int, (_P, _P)),
    "EVP_PKEY_new": (_P, ()),
    "EVP_PKEY_free": (None, (_P,)),
    "EVP_PKEY_get_base_id": (c_int, (_P,)),
    "EVP_PKEY_get_size": (c_int, (_P,)),
    "EVP_PKEY_get1_RSA": (_P, (_P,)),
    "EVP_PKEY_set1_RSA": (c_int, (_P, _P)),
    "EVP_PKEY_get1_EC_KEY": (_P, (_P,)),
    "EVP_PKEY_set1_EC_KEY": (c_int, (_P, _P)),
    "RSA_PKCS1_OpenSSL": (_P, ()),
    "RSA_meth_dup": (_P, (_P,)),
    "RSA_meth_set_priv_enc": (c_int, (_P, _P)),
    "RSA_meth_set_priv_dec": (c_int, (_P, _P)),
    "RSA_set_method": (c_int, (_P, _P)),
    "RSA_free": (None, (_P,)),
    "EC_KEY_OpenSSL": (_P, ()),
    "EC_KEY_METHOD_new": (_P, (_P,)),
    "EC_KEY_METHOD_set_sign": (None, (_P, _P, _P, _P)),
    "EC_KEY_set_method": (c_int, (_P, _P)),
    "EC_KEY_free": (None, (_P,)),
    "OBJ_txt2nid": (c_int, (c_char_p,)),
    "OBJ_nid2sn": (c_char_p, (c_int,)),
}


class TlsError(StartError):
    """This Python's OpenSSL cannot be used as TLS needs it; the message says why and what to do."""


class Library:
    """The functions of libssl and libcrypto, typed. Raises TlsError where they are not as expected."""

    def __init__(self) -> None:
        path = getattr(_ssl, "__file__", None)  # None: built into the interpreter
        try:
            handle = ctypes.CDLL(path)
            for name, (result, arguments) in _SIGNATURES.items():
                function = getattr(handle, name)
                function.restype = result
                function.argtypes = arguments
        except (OSError, AttributeError) as error:
            where = path or "the interpreter"
            raise _unavailable(f"the library behind {where} does not give what is needed: {error}") from None
        self.handle: Any = handle
        used = (handle.OpenSSL_version(0) or b"").decode()
        if used != ssl.OPENSSL_VERSION:
            raise _unavailable(f"its ssl module uses {ssl.OPENSSL_VERSION}, and {used} is what was found")
        self._check_layout()

    def _check_layout(self) -> None:
        """See that an SSLContext is what it is taken for, by options that nothing else has by chance."""
        for options in (ssl.OP_ALL, ssl.OP_ALL | ssl.OP_NO_TICKET | ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION):
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.options = options
            at = ctypes.cast(id(context) + object.__basicsize__, POINTER(c_void_p)).contents.value
            if not at or at % 8 or self.handle.SSL_CTX_get_options(at) != int(context.options) & 0xFFFFFFFFFFFFFFFF:
                raise _unavailable("its SSLContext is not laid out as expected")

    def context_of(self, context: ssl.SSLContext) -> int:
        """The SSL_CTX * of `context`, valid as long as that lives."""
        return int(c_void_p.from_address(id(context) + object.__basicsize__).value or 0)

    def control(self, context: ssl.SSLContext, command: int, number: int = 0, data: bytes | None = None) -> int:
        """SSL_CTX_ctrl(3)."""
        return int(self.handle.SSL_CTX_ctrl(self.context_of(context), command, number, data))

    def with_context(self, context: ssl.SSLContext, table: dict[int, Any], key: int, value: Any) -> None:
        """Keep `value` in `table` as long as `context` lives, whose sockets keep it: before then no other has `key`.

        `key` is the address of something that belongs to the context.
        """
        table[key] = value
        weakref.finalize(context, table.pop, key, None).atexit = False

    def certificate(self, der: bytes) -> int:
        """An X509 * of a certificate in DER, to be freed with X509_free. Raises ValueError for what is none."""
        return self._parsed("d2i_X509", "X509_free", der, "certificate")

    def crl(self, der: bytes) -> int:
        """An X509_CRL * of a list of revoked certificates in DER. Raises ValueError for what is none."""
        return self._parsed("d2i_X509_CRL", "X509_CRL_free", der, "list of revoked certificates")

    def _parsed(self, parse: str, free: str, der: bytes, what: str) -> int:
        buffer = ctypes.create_string_buffer(der, len(der))
        at = c_void_p(ctypes.addressof(buffer))
        found = getattr(self.handle, parse)(None, ctypes.byref(at), len(der))
        if not found or at.value != ctypes.addressof(buffer) + len(der):
            if found:
                getattr(self.handle, free)(found)
            self.handle.ERR_clear_error()
            raise ValueError(f"{len(der)} bytes that are no {what} in DER")
        return int(found)

    def short_name(self, name: str) -> str:
        """The short name of an attribute, "CN" for "commonName"; what has none stays as it is."""
        number = self.handle.OBJ_txt2nid(name.encode())
        short = self.handle.OBJ_nid2sn(number) if number else None
        return short.decode() if short else name

    def use_dh_parameters(self, context: ssl.SSLContext, pem: bytes) -> None:
        """Give `context` parameters for DHE. Raises ConfigurationError for what is none, or too short for OpenSSL."""
        bio = self.handle.BIO_new_mem_buf(pem, len(pem))
        parameters = self.handle.PEM_read_bio_Parameters(bio, None)
        self.handle.BIO_free(bio)
        if not parameters or self.handle.SSL_CTX_set0_tmp_dh_pkey(self.context_of(context), parameters) != 1:
            if parameters:
                self.handle.EVP_PKEY_free(parameters)
            self.handle.ERR_clear_error()
            raise ConfigurationError("tls_dhparam: the file has no Diffie-Hellman parameters (PEM) that OpenSSL takes")


def _unavailable(why: str) -> TlsError:
    advice = "use Debian's python3, or any whose ssl module is linked with a shared OpenSSL from 3.0 on"
    return TlsError(f"TLS cannot be spoken by this Python: {why}; {advice}")


@lru_cache(maxsize=1)
def library() -> Library:
    """The library, loaded and checked once. Raises TlsError."""
    return Library()
