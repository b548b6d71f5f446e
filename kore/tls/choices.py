"""What the application chose of TLS, tried with the OpenSSL that will serve: ciphers and Diffie-Hellman parameters.

A list that OpenSSL makes nothing of is found when the server starts, in words, and not by the first client.
"""

from __future__ import annotations

import ssl

from kore.errors import ConfigurationError

DEFAULT_CIPHERS = "ECDHE+AESGCM+AES128:ECDHE+AESGCM:ECDHE+CHACHA20:DHE+AESGCM"
"""Forward secrecy and authenticated encryption; with DHE only where there are parameters for it."""

NEVER = ":!aNULL:!eNULL:!kRSA:!PSK:!SRP"
"""What is taken out of every list: without a certificate, without encryption, and key exchange by decryption, which is
what the key manager never does, and by secrets that there are none of.
"""


def cipher_list(wanted: str | None) -> str:
    """What to give to set_ciphers() for the option `wanted`. Raises ConfigurationError when nothing is left of it."""
    if wanted is None:
        return DEFAULT_CIPHERS + NEVER
    where = f"kore.config.tls_cipher = {wanted!r}"
    complete = wanted + NEVER
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.set_ciphers(complete)
    except ssl.SSLError:
        if wanted.startswith("TLS_"):
            raise ConfigurationError(
                f"{where}: those of TLS 1.3 are always on and cannot be chosen; allowed is a list for 1.2") from None
        raise ConfigurationError(
            f"{where}: nothing is left of it that {ssl.OPENSSL_VERSION} knows and that has a certificate, encryption "
            "and ephemeral keys; allowed is what `openssl ciphers` understands, as in 'ECDHE+AESGCM'") from None
    if all(cipher["protocol"] == "TLSv1.3" for cipher in context.get_ciphers()):
        raise ConfigurationError(f"{where}: no cipher of TLS 1.2 is left of it; allowed are ECDHE and DHE with AEAD")
    return complete


def check_dh_parameters(path: str, name: str) -> None:
    """Raises ConfigurationError when there are no Diffie-Hellman parameters in the file at `path`, called `name`, that
    can be used.
    """
    where = f"kore.config.tls_dhparam = {name!r}"
    advice = "make some with: openssl genpkey -genparam -algorithm DH -pkeyopt group:ffdhe2048 -out FILE"
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_dh_params(path)
    except ssl.SSLError as problem:
        if problem.reason == "DH_KEY_TOO_SMALL":
            raise ConfigurationError(f"{where}: the parameters have too few bits; {advice}") from None
        raise ConfigurationError(f"{where}: holds no Diffie-Hellman parameters in PEM; {advice}") from None
    except OSError as problem:
        raise ConfigurationError(f"{where}: cannot be read: {problem.strerror}") from None
