"""The local authority: made once, kept for its user alone, trusted by who was told of its file; never by accident."""

from __future__ import annotations

import datetime
import os
import ssl
import stat
from pathlib import Path

import pytest

from kore.tls import authority, certificates
from kore.tls.certificates import CertificateError
from tests.test_tls_certificates import shake


@pytest.fixture
def place(tmp_path) -> Path:
    return tmp_path / "data" / "kore" / "authority"


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_it_is_made_once_and_for_its_user_alone(place):
    before = os.umask(0)  # even where everybody may read everything
    try:
        first = authority.opened(str(place))
    finally:
        os.umask(before)
    assert authority.opened(str(place)).certificate == first.certificate
    assert first.path == str(place / "authority.pem")
    assert (mode(place), mode(place / "key.pem"), mode(place / "authority.pem")) == (0o700, 0o600, 0o644)
    assert sorted(os.listdir(place.parent)) == ["authority"], "nothing is left of making it"
    assert b"PRIVATE" not in (place / "authority.pem").read_bytes()


def test_what_it_issues_is_trusted_by_who_knows_its_file_and_by_nobody_else(place, tmp_path):
    made = authority.opened(str(place))
    pair = made.issue(authority.names_for("www.example.org", "https://127.0.0.2:8443"))
    assert pair.names == ("www.example.org", "localhost", "127.0.0.1", "::1", "127.0.0.2")
    trusted = ssl.PEM_cert_to_DER_cert((place / "authority.pem").read_text())
    for name in ("www.example.org", "localhost", "127.0.0.2", "::1"):
        assert shake(pair, trusted, name, tmp_path)
    other = ssl.PEM_cert_to_DER_cert(authority.unkept().certificate.public_bytes(certificates.Encoding.PEM).decode())
    with pytest.raises(ssl.SSLCertVerificationError):
        shake(pair, other, "localhost", tmp_path)
    again = made.issue(["localhost"])
    assert again.key.private_numbers() != pair.key.private_numbers(), "each start has a key of its own"


def test_nothing_that_it_issues_outlives_it(place, monkeypatch):
    monkeypatch.setattr(authority, "LIFETIME", datetime.timedelta(days=10))
    made = authority.opened(str(place))
    assert made.issue(["localhost"]).not_after <= made.certificate.not_valid_after_utc


@pytest.mark.parametrize(
    ("domain", "url", "names"),
    [
        ("*", "https://[::1]:8443", ["localhost", "127.0.0.1", "::1"]),
        ("*.example.org", "unix:/run/app.sock", ["*.example.org", "localhost", "127.0.0.1", "::1"]),
        ("[ab].example", "https://10.1.2.3:443", ["localhost", "127.0.0.1", "::1", "10.1.2.3"]),
        ("a.example", "https://0.0.0.0:443", ["a.example", "localhost", "127.0.0.1", "::1", "box.lan"]),
        ("a.example", "https://[::]:443", ["a.example", "localhost", "127.0.0.1", "::1", "box.lan"]),
    ],
)
def test_its_certificates_are_for_every_name_of_the_server(monkeypatch, domain, url, names):
    monkeypatch.setattr(authority.socket, "gethostname", lambda: "box.lan")
    assert authority.names_for(domain, url) == names


def test_a_key_that_others_may_read_is_not_used(place):
    authority.opened(str(place))
    (place / "key.pem").chmod(0o640)
    with pytest.raises(CertificateError, match=rf"key\.pem is not this user's alone: remove {place}, and a new"):
        authority.opened(str(place))


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a file to another user")
def test_a_key_of_another_user_is_not_used(place):
    authority.opened(str(place))
    os.chown(place / "key.pem", 12345, 12345)
    with pytest.raises(CertificateError, match="not this user's alone"):
        authority.opened(str(place))


def test_what_is_damaged_is_told_of_and_replaced_by_nobody(place):
    """A new one in its place would be trusted by no client, for a reason that nobody is told."""
    authority.opened(str(place))
    other = certificates.key_pem(certificates.new_key())
    for damage, reason in ((b"garbage", "holds no private key"), (other, "does not belong to the certificate")):
        (place / "key.pem").write_bytes(damage)
        with pytest.raises(CertificateError, match=rf"the local authority can't be used: .*{reason}.*: remove {place}"):
            authority.opened(str(place))
        assert (place / "key.pem").read_bytes() == damage


@pytest.mark.parametrize("name", ["key.pem", "authority.pem"])
def test_half_of_one_is_told_of_and_replaced_by_nobody(place, name):
    authority.opened(str(place))
    (place / name).unlink()
    with pytest.raises(CertificateError, match=rf"the local authority lacks {place}/{name}: remove {place}, and a new"):
        authority.opened(str(place))
    assert len(os.listdir(place)) == 1


def test_one_that_expired_is_told_of(place, monkeypatch):
    monkeypatch.setattr(authority, "LIFETIME", datetime.timedelta(seconds=-1))
    with pytest.raises(CertificateError, match=r"authority\.pem expired: remove .*, which clients must be told of"):
        authority.opened(str(place))


def test_of_servers_that_start_together_the_first_to_finish_wins(place):
    """The other has found nothing there and made one too: it takes what is there now."""
    first = authority.opened(str(place))
    authority._keep(authority.unkept(), str(place))
    assert authority.opened(str(place)).certificate == first.certificate
    assert os.listdir(place.parent) == ["authority"]


def test_its_place_is_that_of_the_user_who_runs_it(tmp_path):
    assert authority.folder({"XDG_DATA_HOME": "/x", "HOME": "/y"}) == "/x/kore/authority"
    mine = {"HOME": str(tmp_path)}
    for data in ("", "relative"):
        assert authority.folder({**mine, "XDG_DATA_HOME": data}) == f"{tmp_path}/.local/share/kore/authority"
    own = authority.folder({})
    assert own == os.path.expanduser(f"~{authority._user()}/.local/share/kore/authority")
    for home in ("/nothing/there", "relative", "/proc" if os.geteuid() else "/var/empty"):
        assert authority.folder({"HOME": home}) == own


def test_where_nothing_can_be_kept_it_ends_with_the_process(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        authority.opened(str(tmp_path / "file" / "kore" / "authority"))
    made = authority.unkept()
    assert made.path is None
    assert made.issue(["localhost"]).names == ("localhost",)
    assert "curl --insecure" in made.advice()
