"""A certificate's public key becomes a key that OpenSSL signs with, while the private half is in another process.

OpenSSL lets an RSA or EC key bring its own method. Ours does everything as usual but for the one private operation of a
handshake, which is handed to `Keys.sign` and answered by the process that holds the keys. There is no decryption: the
key exchanges that would need it (RSA key transport) are not on offer, and the method refuses it.

The callbacks are made once, at start: afterwards, in the sandbox, no executable memory can be had any more.
"""

from __future__ import annotations

import ctypes
import hashlib
import ssl
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, Final, NamedTuple, Protocol

from kore.tls.libssl import (
    ECDSA_SIGN,
    EVP_PKEY_EC,
    EVP_PKEY_RSA,
    PRIVATE_OPERATION,
    SSL_CTRL_CHAIN_CERT,
    Library,
    library,
)

RSA_BYTES: Final = range(256, 1025)
"""Sizes of RSA moduli that are served: 2048 to 8192 bits."""

BLOCK_BYTES_MAX: Final = RSA_BYTES[-1]
"""No block to sign is longer than the longest modulus."""

DIGEST_BYTES_MAX: Final = 64  # SHA-512

NO_PADDING: Final = 0
"""The padding told for EC keys."""

KEY_ID_BYTES: Final = 8
"""Of the SHA-256 of a public key (SubjectPublicKeyInfo), to tell it from others of the domain."""


class Keys(Protocol):
    """Who signs."""

    available: bool
    """Whether a signature may be had at the moment."""
    on_available: list[Callable[[], None]]
    """Called when that becomes true."""

    def sign(self, domain: int, kind: str, padding: int, block: bytes, key: bytes, /) -> bytes:
        """The signature of `block` by the key of `domain` that is of `kind` "rsa" or "ec"; raises when there is none.

        `key` says which, as a new certificate may have come since: `KEY_ID_BYTES` of the SHA-256 of its public half.
        RSA: as RSA_private_encrypt(3) does with `padding` (1: PKCS #1 type 1; 3: none, it is padded already). EC: an
        ECDSA signature in DER of the digest `block`.
        """


class _Held(NamedTuple):
    """A key somebody else holds."""

    keys: Keys
    domain: int
    key: bytes
    size: int
    """Of its longest signature, in bytes."""


class Offload:
    """The methods, and which key is whose. One for each process; never closed, as contexts may still use it."""

    def __init__(self, lib: Library) -> None:
        self.lib = lib
        self.failure: BaseException | None = None
        """What the last signature failed with; whoever begins a handshake sets it to None before."""
        self._held: dict[int, _Held] = {}
        handle = lib.handle
        # Kept: the library calls them as long as there are keys.
        self._rsa_sign = PRIVATE_OPERATION(self._sign_rsa)
        self._rsa_refuse = PRIVATE_OPERATION(lambda *_: -1)
        self._ec_sign = ECDSA_SIGN(self._sign_ec)
        self._rsa_method = handle.RSA_meth_dup(handle.RSA_PKCS1_OpenSSL())
        handle.RSA_meth_set_priv_enc(self._rsa_method, self._rsa_sign)
        handle.RSA_meth_set_priv_dec(self._rsa_method, self._rsa_refuse)
        self._ec_method = handle.EC_KEY_METHOD_new(handle.EC_KEY_OpenSSL())
        handle.EC_KEY_METHOD_set_sign(self._ec_method, self._ec_sign, None, None)

    def install(self, context: ssl.SSLContext, chain: Sequence[bytes], keys: Keys, domain: int) -> str:
        """Have `context` serve `chain` (DER, leaf first), signing with the key of `domain`; the kind of key.

        Raises ValueError for certificates that cannot be read and for keys that cannot be used like this.
        """
        handle = self.lib.handle
        at = self.lib.context_of(context)
        leaf = self.lib.certificate(chain[0])
        try:
            kind, key = self._key_of(leaf, context, keys, domain)
            try:
                if handle.SSL_CTX_use_certificate(at, leaf) != 1 or handle.SSL_CTX_use_PrivateKey(at, key) != 1:
                    handle.ERR_clear_error()
                    raise ValueError(f"OpenSSL does not take the certificate ({kind})")
            finally:
                handle.EVP_PKEY_free(key)
        finally:
            handle.X509_free(leaf)
        for der in chain[1:]:
            issuer = self.lib.certificate(der)
            try:
                handle.SSL_CTX_ctrl(at, SSL_CTRL_CHAIN_CERT, 1, issuer)  # 1: it counts its own reference
            finally:
                handle.X509_free(issuer)
        return kind

    def _key_of(self, leaf: int, context: ssl.SSLContext, keys: Keys, domain: int) -> tuple[str, Any]:
        """The kind and an EVP_PKEY * of the key of a certificate; the caller frees it."""
        handle = self.lib.handle
        public = handle.X509_get_pubkey(leaf)
        if not public:
            handle.ERR_clear_error()
            raise ValueError("the certificate has a key that OpenSSL does not know")
        try:
            key = hashlib.sha256(self._encoded(public)).digest()[:KEY_ID_BYTES]
            held = _Held(keys, domain, key, handle.EVP_PKEY_get_size(public))
            number = handle.EVP_PKEY_get_base_id(public)
            if number == EVP_PKEY_RSA:
                return "rsa", self._with_method("RSA", public, context, held)
            if number == EVP_PKEY_EC:
                return "ec", self._with_method("EC_KEY", public, context, held)
        finally:
            handle.EVP_PKEY_free(public)
        raise ValueError("the certificate's key is neither RSA nor EC: such keys cannot be kept out of the workers")

    def _encoded(self, public: int) -> bytes:
        """A SubjectPublicKeyInfo in DER."""
        handle = self.lib.handle
        size = handle.i2d_PUBKEY(public, None)
        if size <= 0:
            raise ValueError("the certificate's key cannot be written down")
        buffer = ctypes.create_string_buffer(size)
        handle.i2d_PUBKEY(public, ctypes.byref(ctypes.c_void_p(ctypes.addressof(buffer))))
        return buffer.raw

    def _with_method(self, name: str, public: int, context: ssl.SSLContext, held: _Held) -> Any:
        """A key of OpenSSL's type `name` with the public half of `public`, and our method."""
        handle = self.lib.handle
        method = self._rsa_method if name == "RSA" else self._ec_method
        # It may be shared with the parsed certificate, which is this context's alone and uses the public half.
        key = getattr(handle, f"EVP_PKEY_get1_{name}")(public)
        made = handle.EVP_PKEY_new()
        try:
            if name == "RSA" and held.size not in RSA_BYTES:
                raise ValueError(f"the certificate's RSA key has {held.size * 8} bits, not 2048 to 8192")
            if not getattr(handle, f"{name}_set_method")(key, method):
                raise ValueError(f"OpenSSL does not let a key of type {name} have a method")
            if not getattr(handle, f"EVP_PKEY_set1_{name}")(made, key):
                raise ValueError(f"OpenSSL does not take a key of type {name}")
        except ValueError:
            handle.EVP_PKEY_free(made)
            raise
        finally:
            getattr(handle, f"{name}_free")(key)
        self.lib.with_context(context, self._held, key, held)
        return made

    # --- called by the library, in the middle of a handshake: nothing may be raised ------------------------

    def _sign_rsa(self, size: int, block: int, to: int, rsa: int, padding: int) -> int:
        try:
            held = self._held[rsa]
            length = held.size
            if not 0 < size <= min(length, BLOCK_BYTES_MAX):
                raise ValueError(f"a block of {size} bytes for a key of {length}")
            signature = held.keys.sign(held.domain, "rsa", padding, ctypes.string_at(block, size), held.key)
            if len(signature) != length:
                raise ValueError(f"a signature of {len(signature)} bytes by an RSA key of {length}")
            ctypes.memmove(to, signature, length)
        except BaseException as error:  # noqa: BLE001 - there is only C above us; the handshake looks at `failure`
            self.failure = error
            return -1
        return length

    def _sign_ec(self, _type: int, digest: int, size: int, to: int, length: Any, _kinv: int, _r: int, key: int) -> int:
        try:
            held = self._held[key]
            if not 0 < size <= DIGEST_BYTES_MAX:
                raise ValueError(f"a digest of {size} bytes")
            signature = held.keys.sign(held.domain, "ec", NO_PADDING, ctypes.string_at(digest, size), held.key)
            if not 0 < len(signature) <= held.size:
                raise ValueError(f"an ECDSA signature of {len(signature)} bytes")
            ctypes.memmove(to, signature, len(signature))
            length[0] = len(signature)
        except BaseException as error:  # noqa: BLE001 - as above
            self.failure = error
            return 0
        return 1


@lru_cache(maxsize=1)
def offload() -> Offload:
    """This process's, made when first asked for. Raises TlsError."""
    return Offload(library())
