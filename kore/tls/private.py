"""A private key and its one operation, by the libcrypto that Python's own ssl module has loaded.

OpenSSL does the arithmetic: blinded and in constant time, and without Python's lock, so that several threads sign at
once. There is no way here to decrypt.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any, Final

from kore.tls import libssl
from kore.tls.encoding import PKCS1, RAW

_CTRL_RSA_PADDING: Final = 0x1001  # EVP_PKEY_CTRL_RSA_PADDING
_PADDINGS: Final = (PKCS1, RAW)


class OperationError(Exception):
    """OpenSSL refuses; the message is its own."""


_POINTER, _SIZE, _INT = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
_SIGNATURES: Final[dict[str, tuple[Any, tuple[Any, ...]]]] = {
    "d2i_AutoPrivateKey": (_POINTER, (_POINTER, _POINTER, ctypes.c_long)),
    "EVP_PKEY_CTX_new": (_POINTER, (_POINTER, _POINTER)),
    "EVP_PKEY_CTX_free": (None, (_POINTER,)),
    "EVP_PKEY_sign_init": (_INT, (_POINTER,)),
    "EVP_PKEY_CTX_ctrl": (_INT, (_POINTER, _INT, _INT, _INT, _INT, _POINTER)),
    "EVP_PKEY_sign": (_INT, (_POINTER, _POINTER, _POINTER, ctypes.c_char_p, _SIZE)),
    "ERR_get_error": (ctypes.c_ulong, ()),
    "ERR_error_string_n": (None, (ctypes.c_ulong, ctypes.c_char_p, _SIZE)),
    "RAND_add": (None, (_POINTER, _INT, ctypes.c_double)),
}


@functools.cache
def library() -> Any:
    """The libcrypto in this process. Raises TlsError where it cannot be reached."""
    handle = libssl.library().handle
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(handle, name)
        function.restype, function.argtypes = result, arguments
    return handle


def _error(what: str) -> OperationError:
    lib = library()
    text = ctypes.create_string_buffer(256)
    number = lib.ERR_get_error()
    while number:  # the last one is the outermost; the queue must be empty for whoever comes next
        lib.ERR_error_string_n(number, text, len(text))
        number = lib.ERR_get_error()
    return OperationError(f"{what}: {text.value.decode('ascii', 'replace')}")


_Context = tuple[int, Any, Any]
"""An EVP_PKEY_CTX *, and room for a signature and for its length."""


class PrivateKey:
    """A key of RSA or EC. It lives as long as somebody holds it."""

    __slots__ = ("_bytes_max", "_contexts", "_key", "kind")

    def __init__(self, kind: str, der: bytes, bits: int) -> None:
        """`der` is PKCS #8, unencrypted; `bits` those of the modulus or the curve. Raises OperationError."""
        self.kind = kind
        # An ECDSA signature is a sequence of two numbers of that size.
        self._bytes_max = max((bits + 7) // 8, 2 * ((bits + 7) // 8) + 16)
        self._contexts: dict[int, list[_Context]] = {}  # by padding: what no thread uses now
        self._key: int | None = None
        buffer = ctypes.create_string_buffer(der, len(der))
        start = ctypes.c_void_p(ctypes.addressof(buffer))
        self._key = library().d2i_AutoPrivateKey(None, ctypes.byref(start), len(der))
        ctypes.memset(buffer, 0, len(der))
        if not self._key:
            raise _error("the key cannot be read")

    def __del__(self) -> None:
        for free in self._contexts.values():
            for context, _, _ in free:
                library().EVP_PKEY_CTX_free(context)
        if self._key:
            library().EVP_PKEY_free(self._key)

    def sign(self, padding: int, block: bytes) -> bytes:
        """The signature of `block`: for EC an ECDSA-Sig-Value in DER. What may be signed is the caller's to check.

        Raises OperationError.
        """
        free = self._contexts.setdefault(padding, [])
        try:
            one = free.pop()
        except IndexError:
            one = self._context(padding)
        context, out, length = one
        length.value = self._bytes_max
        if library().EVP_PKEY_sign(context, out, ctypes.byref(length), block, len(block)) <= 0:
            library().EVP_PKEY_CTX_free(context)
            raise _error("sign")
        signature: bytes = out.raw[: length.value]
        free.append(one)  # making it costs a fifth of a signature
        return signature

    def _context(self, padding: int) -> _Context:
        """What signs, as often as one likes (EVP_PKEY_sign(3))."""
        lib = library()
        context = lib.EVP_PKEY_CTX_new(self._key, None)
        if not context:
            raise _error("no context")
        if lib.EVP_PKEY_sign_init(context) <= 0:
            what = "sign_init"
        elif padding in _PADDINGS and lib.EVP_PKEY_CTX_ctrl(context, -1, -1, _CTRL_RSA_PADDING, padding, None) <= 0:
            what = "padding"
        else:
            return context, ctypes.create_string_buffer(self._bytes_max), ctypes.c_size_t()
        lib.EVP_PKEY_CTX_free(context)
        raise _error(what)
