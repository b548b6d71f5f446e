"""The local authority: what gives certificates to servers in development, made on the fly and kept for its user.

Who develops trusts one file once, instead of clicking warnings away for every server. Whoever has the key of an
authority that a browser trusts can be any site to that browser: it is readable by its user alone, it is looked at
only by the key manager, and no worker ever holds it.
"""

from __future__ import annotations

import datetime
import errno
import os
import pwd
import shutil
import socket
import stat
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from kore.tls import certificates
from kore.tls.certificates import CertificateError, Pair, PrivateKey

CERTIFICATE: Final = "authority.pem"
KEY: Final = "key.pem"

LIFETIME: Final = datetime.timedelta(days=3650)
"""Of the authority: to trust a new one is work."""

CERTIFICATE_LIFETIME: Final = datetime.timedelta(days=365)
"""Of what it issues at each start; browsers take up to 398 days."""

EVERYWHERE: Final = ("0.0.0.0", "::")
"""Addresses that stand for all of the machine, and that nobody connects to."""


@dataclass(frozen=True, slots=True)
class Authority:
    """An authority with its key."""

    certificate: x509.Certificate
    key: PrivateKey
    path: str | None
    """The file of its certificate, for clients; None: it could not be kept, and ends with this process."""

    def issue(self, names: list[str]) -> Pair:
        """A new certificate for `names`, with a new key."""
        now = datetime.datetime.now(datetime.UTC)
        lifetime = min(CERTIFICATE_LIFETIME, self.certificate.not_valid_after_utc - now)
        return certificates.issue(names, certificates.new_key(), self.certificate, self.key, lifetime=lifetime)

    def advice(self) -> str:
        """How clients are made to trust it."""
        if self.path is None:
            return "no client can be made to trust it; curl --insecure asks none"
        return f"to trust it: curl --cacert {self.path}, or import that file as an authority in the browser"


def folder(environment: Mapping[str, str] | None = None) -> str:
    """The directory of this user's authority. Source: XDG base directory specification.

    The home is that of the user that this process is, whatever the environment of another one (su, sudo) says.
    """
    environment = os.environ if environment is None else environment
    base = environment.get("XDG_DATA_HOME", "")
    if not os.path.isabs(base):
        home = environment.get("HOME", "")
        if not os.path.isabs(home) or not _is_mine(home):
            home = _home()
        base = os.path.join(home, ".local", "share")
    return os.path.join(base, "kore", "authority")


def opened(path: str) -> Authority:
    """The authority in the directory `path`, made if there is none. Raises CertificateError and OSError."""
    try:
        return _load(path)
    except FileNotFoundError:
        pass
    made = _made()
    _keep(made, path)
    try:
        return _load(path)
    except FileNotFoundError as error:  # what is there is not a whole one, and took no new one's place
        raise CertificateError(f"the local authority lacks {error.filename}: {_advice(path)}") from None


def unkept() -> Authority:
    """An authority for this process alone, where none can be kept."""
    return _made()


def names_for(domain: str, url: str) -> list[str]:
    """What a certificate of the domain on the server at `url` is for: all names that this machine is reached by."""
    host = urlsplit(url).hostname if "://" in url else None
    own = socket.gethostname() if host in EVERYWHERE else host
    found = [domain, "localhost", "127.0.0.1", "::1", *([own] if own else [])]
    return certificates.usable_names(found)


def _is_mine(path: str) -> bool:
    try:
        return os.stat(path).st_uid == os.geteuid()
    except OSError:
        return False


def _home() -> str:
    try:
        return pwd.getpwuid(os.geteuid()).pw_dir
    except KeyError:
        return "/nonexistent"  # what users without a home have on Debian


def _made() -> Authority:
    key = certificates.new_key()
    # People see it in the list of their browser, and want to know whose it is.
    title = f"kore development authority ({_user()}@{socket.gethostname()})"
    return Authority(certificates.new_authority(title, key, lifetime=LIFETIME), key, None)


def _user() -> str:
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())


def _keep(made: Authority, path: str) -> None:
    """Write `made` at once or not at all: of two servers that start together, the first to rename wins."""
    parent = os.path.dirname(path)
    os.makedirs(parent, mode=0o700, exist_ok=True)
    new = tempfile.mkdtemp(prefix="authority.", dir=parent)  # 0700
    try:
        _write(os.path.join(new, KEY), certificates.key_pem(made.key), 0o600)
        _write(os.path.join(new, CERTIFICATE), made.certificate.public_bytes(Encoding.PEM), 0o644)
        try:
            os.rename(new, path)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _write(path: str, content: bytes, mode: int) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, mode)
    with open(fd, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(fd)


def _advice(path: str) -> str:
    return f"remove {path}, and a new authority is made"


def _load(path: str) -> Authority:
    """Raises FileNotFoundError when there is none, CertificateError for one that must not or can't be used."""
    advice = _advice(path)
    place = os.path.join(path, CERTIFICATE)
    with open(os.path.join(path, KEY), "rb") as file:
        found = os.fstat(file.fileno())
        if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077:
            raise CertificateError(f"the local authority's key {file.name} is not this user's alone: {advice}")
        key_text = file.read(certificates.PEM_BYTES_MAX + 1)
    with open(place, "rb") as file:
        text = file.read(certificates.PEM_BYTES_MAX + 1)
    try:
        pair = certificates.load_pair(text, key_text, cert_name=place, key_name=os.path.join(path, KEY))
        certificates.load_authorities(text, place)
    except CertificateError as error:
        raise CertificateError(f"the local authority can't be used: {error}: {advice}") from None
    if pair.not_after < datetime.datetime.now(datetime.UTC):
        raise CertificateError(f"the local authority {place} expired: {advice}, which clients must be told of")
    return Authority(x509.load_der_x509_certificate(pair.chain[0]), pair.key, place)
