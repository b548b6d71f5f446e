"""Whether a block is what a TLS handshake has signed: the check that keeps a private operation from being an oracle.

With a private key of RSA whoever may choose the block can decrypt, and sign anything. So only what the library makes of
a hash on its way to a signature is let through: the DigestInfo of PKCS #1 v1.5, or a whole EMSA-PSS encoding; for EC a
digest. None of them is a ciphertext: of those that are well-formed by chance there is one in 2^500.
"""

from __future__ import annotations

import hashlib
from typing import Final

from kore.tls.messages import MalformedError

PKCS1: Final = 1
RAW: Final = 3
"""OpenSSL's RSA_PKCS1_PADDING and RSA_NO_PADDING: what TLS 1.2 signs with, and what PSS has left to do."""

NONE: Final = 0
"""The padding of kinds of key that have none."""

DIGEST_INFOS: Final = {
    bytes.fromhex("3031300d060960864801650304020105000420"): 32,  # SHA-256
    bytes.fromhex("3041300d060960864801650304020205000430"): 48,  # SHA-384
    bytes.fromhex("3051300d060960864801650304020305000440"): 64,  # SHA-512
}
"""What stands before the hash (RFC 8017 9.2, note 1), and how long that is. No SHA-1: no signature of ours has it."""

INFO_BYTES: Final = 19

PSS_HASHES: Final = {"sha256": 32, "sha384": 48, "sha512": 64}
"""Hashes of PSS in TLS: each is that of the mask as well, and as long as the salt (RFC 8446 4.2.3)."""

DIGEST_BYTES: Final = frozenset(PSS_HASHES.values())


def check(kind: str, padding: int, block: bytes, bits: int) -> None:
    """Whether a key of `kind` ("rsa" or "ec") with `bits` signs `block`. Raises MalformedError, which says why not."""
    match kind, padding:
        case "ec", 0:
            if len(block) not in DIGEST_BYTES:
                raise MalformedError(f"a digest of {len(block)} bytes")
        case "rsa", 1:
            if DIGEST_INFOS.get(block[:INFO_BYTES]) != len(block) - INFO_BYTES:
                raise MalformedError("a block for PKCS #1 that is no DigestInfo of SHA-256, SHA-384 or SHA-512")
        case "rsa", 3:
            if not any(is_pss(block, bits, name) for name in PSS_HASHES):
                raise MalformedError("a block for RSA without padding that is no EMSA-PSS encoding")
        case _:
            raise MalformedError(f"padding {padding} with a key of kind {kind}")


def is_pss(block: bytes, bits: int, hash_name: str) -> bool:
    """Whether `block` is an EMSA-PSS encoding for a modulus of `bits` bits (RFC 8017 9.1.2, steps 4 to 11).

    The hash that it encodes can't be told from it; everything else is looked at.
    """
    size = PSS_HASHES[hash_name]
    encoded_bits = bits - 1
    length = (encoded_bits + 7) // 8
    if len(block) != (bits + 7) // 8 or any(block[: len(block) - length]):
        return False
    block = block[len(block) - length :]
    if length < 2 * size + 2 or block[-1] != 0xBC:
        return False
    masked, seed = block[: length - size - 1], block[length - size - 1 : -1]
    unused = 8 * length - encoded_bits
    if masked[0] >> (8 - unused):
        return False
    mask = mgf1(seed, len(masked), hash_name)
    found = int.from_bytes(masked, "big") ^ int.from_bytes(mask, "big")
    found &= (1 << (8 * len(masked) - unused)) - 1
    # Zeros, a one, and a salt of `size` bytes: as a number, what stands before the salt is 1.
    return found >> (8 * size) == 1


def mgf1(seed: bytes, length: int, hash_name: str) -> bytes:
    """A mask of `length` bytes (RFC 8017 B.2.1)."""
    blocks = -(-length // PSS_HASHES[hash_name])
    return b"".join(hashlib.new(hash_name, seed + i.to_bytes(4, "big")).digest() for i in range(blocks))[:length]
