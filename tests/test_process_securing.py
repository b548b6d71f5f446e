"""What a start and ``kore check`` say of TLS before anything is served: a mistake is one line that names the file."""

from __future__ import annotations

import datetime
import os
import re
import ssl
from pathlib import Path

import pytest

from kore.application.declared import application
from kore.application.domains import domain
from kore.application.plan import freeze
from kore.application.servers import server
from kore.errors import ConfigurationError, StartError
from kore.process import securing
from kore.sandbox.privileges import Rights
from kore.tls import certificates, choices
from tests.support import free_port, starter
from tests.test_tls_certificates import KINDS, Maker, openssl

APP = """
import kore

class App:
    def configure(self, args):
        kore.config.workers = 1
        kore.config.deployment = "dev"
{options}
        kore.server("tls", ip="127.0.0.1", port="{port}")
        domain = kore.domain("www.example.org", attach="tls", {keywords})
        domain.route("/", self.index)

    def index(self, req):
        req.response(200, b"hello")

koreapp = App()
"""

DAY = datetime.timedelta(days=1)


@pytest.fixture
def start(tmp_path):
    with starter(tmp_path) as programs:
        yield programs


def check(start, keywords: str = "cert='c.pem', key='k.pem'", options: str = ""):
    """``kore check`` of an application with these keywords and options: exit code, standard output and error."""
    text = APP.format(port=free_port(), keywords=keywords, options=f"        {options}")
    (start.directory / "app.py").write_text(text)
    program = start.kore("check", "app.py")
    return program.wait(), program.out, program.err


def served(start, keywords: str = "cert='c.pem', key='k.pem'") -> str:
    """What ``kore check`` prints of an application that could be served."""
    code, out, err = check(start, keywords)
    assert (code, err) == (0, "")
    return out


def refused(start, reason: str, keywords: str = "cert='c.pem', key='k.pem'", options: str = "") -> None:
    """``kore check`` is one line that is matched by `reason`, and exit code 1."""
    code, _, err = check(start, keywords, options)
    assert code == 1
    assert re.fullmatch(rf"kore: {reason}.*\n", err), err


def write_pair(folder: Path, names: tuple[str, ...] = ("www.example.org",), lifetime: datetime.timedelta = 30 * DAY):
    key = certificates.new_key()
    pair = certificates.self_signed(names, key, lifetime=lifetime)
    (folder / "c.pem").write_bytes(certificates.chain_pem(pair.chain))
    (folder / "k.pem").write_bytes(certificates.key_pem(key))
    return pair


def authority() -> bytes:
    made = certificates.new_authority("clients", certificates.new_key(), lifetime=DAY)
    return made.public_bytes(certificates.Encoding.PEM)


def test_check_says_what_is_served_over_tls_and_until_when(start):
    pair = write_pair(start.directory)
    (start.directory / "ca.pem").write_bytes(authority() + authority())
    out = served(start, "cert='c.pem', key='k.pem', client_verify='ca.pem', verify_depth=2, crl='later.pem'")
    assert re.search(r"^server tls: https on https://127\.0\.0\.1:\d+$", out, re.MULTILINE)
    until = f"{pair.not_after:%Y-%m-%d}"
    assert f"    certificate: c.pem, key k.pem: ec, for www.example.org, until {until}\n" in out
    asked = "need a certificate from ca.pem (2 authorities), depth 2, but for those revoked in later.pem"
    assert f"    clients: {asked}\n" in out


def test_check_tells_what_clients_will_object_to(start):
    write_pair(start.directory, ("example.net",), lifetime=3 * DAY)
    out = served(start)
    assert re.search(r"^    certificate: c\.pem expires on 20\d\d-", out, re.MULTILINE)
    assert "    certificate: c.pem is for example.net, not for www.example.org\n" in out


def test_check_looks_at_no_certificate_of_acme_and_development(start):
    assert "    certificate: from the local authority, for development only\n" in served(start, "")


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        ("no cert", r"cert c\.pem: No such file or directory"),
        ("no key", r"key k\.pem: No such file or directory"),
        ("a directory", r"key k\.pem: is no regular file"),
        ("a fifo", r"key k\.pem: is no regular file"),
        ("halves", r"key k\.pem: the key does not belong to the certificate in cert c\.pem"),
        ("garbage", r"cert c\.pem: holds no certificate in PEM"),
        ("large", r"cert c\.pem: has 262145 bytes; allowed are 262144"),
        ("ed25519", r"key k\.pem: Ed25519, which signs whole messages"),
    ],
)
def test_check_of_a_bad_pair_is_one_line_and_exit_code_1(start, broken, reason):
    folder = start.directory
    write_pair(folder)
    key = folder / "k.pem"
    if broken == "no cert":
        (folder / "c.pem").unlink()
    elif broken == "no key":
        key.unlink()
    elif broken == "a directory":
        key.unlink()
        key.mkdir()
    elif broken == "a fifo":
        key.unlink()
        os.mkfifo(key)
    elif broken == "halves":
        key.write_bytes(certificates.key_pem(certificates.new_key()))
    elif broken == "garbage":
        (folder / "c.pem").write_bytes(b"garbage")
    elif broken == "large":
        (folder / "c.pem").write_bytes(b"x" * 300000)
    else:
        key.write_bytes(openssl("genpkey", "-algorithm", "ED25519"))
    refused(start, rf"domain 'www\.example\.org': {reason}")


def test_check_of_two_pairs(start, tmp_path_factory):
    maker = Maker(tmp_path_factory.mktemp("openssl"))
    write_pair(start.directory)
    (start.directory / "r.key").write_bytes(maker.key("rsa2048", KINDS["rsa2048"][0]))
    (start.directory / "r.pem").write_bytes(maker.own("rsa2048", "/CN=a", "subjectAltName=DNS:www.example.org"))
    out = served(start, "cert=('c.pem', 'r.pem'), key=('k.pem', 'r.key')")
    assert "certificate: c.pem, key k.pem: ec," in out
    assert "certificate: r.pem, key r.key: rsa," in out
    reason = r"domain 'www\.example\.org': c\.pem: has two certificates with keys of kind ec; allowed is one of each"
    refused(start, reason, "cert=('c.pem', 'c.pem'), key=('k.pem', 'k.pem')")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_check_without_the_right_to_read_a_key_says_that_it_did_not(start):
    write_pair(start.directory)
    (start.directory / "k.pem").chmod(0)
    assert "certificate: c.pem, key k.pem: not looked at: k.pem cannot be read by this user\n" in served(start)


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ("tls_cipher = 'NONSENSE'", r"tls_cipher = 'NONSENSE': nothing is left of it that OpenSSL"),
        ("tls_cipher = 'AES256-SHA'", r"tls_cipher = 'AES256-SHA': nothing is left of it"),
        ("tls_cipher = 'TLS_AES_128_GCM_SHA256'", r"tls_cipher = .*: those of TLS 1\.3 are always on and cannot be"),
        ("tls_dhparam = 'none.pem'", r"tls_dhparam = 'none\.pem': cannot be read: No such file"),
        ("tls_dhparam = 'app.py'", r"tls_dhparam = 'app\.py': holds no Diffie-Hellman parameters in PEM; make some"),
    ],
)
def test_options_that_openssl_makes_nothing_of_are_one_line(start, option, reason):
    write_pair(start.directory)
    refused(start, rf"kore\.config\.{reason}", options=f"kore.config.{option}")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, r"client_verify: ca\.pem: cannot be read: No such file or directory"),
        (b"", r"client_verify: ca\.pem: holds no certificate in PEM"),
        ("leaf", r"client_verify: ca\.pem: certificate 1 \(www\.example\.org\) is no authority \(CA:FALSE\)"),
    ],
)
def test_authorities_of_clients_are_read_before_anything_is_served(start, content, reason):
    write_pair(start.directory)
    if content is not None:
        text = (start.directory / "c.pem").read_bytes() if content == "leaf" else content
        (start.directory / "ca.pem").write_bytes(text)
    refused(start, rf"domain 'www\.example\.org': {reason}", "cert='c.pem', key='k.pem', client_verify='ca.pem'")


def test_dh_parameters_are_taken_and_small_ones_refused(tmp_path):
    for group in ("ffdhe2048", "ffdhe4096"):
        words = ("-pkeyopt", f"group:{group}")
        (tmp_path / "dh.pem").write_bytes(openssl("genpkey", "-genparam", "-algorithm", "DH", *words))
        choices.check_dh_parameters(str(tmp_path / "dh.pem"), "dh.pem")
    (tmp_path / "dh.pem").write_bytes(openssl("dhparam", "512"))
    with pytest.raises(ConfigurationError, match=r"tls_dhparam = 'dh\.pem': the parameters have too few bits; make"):
        choices.check_dh_parameters(str(tmp_path / "dh.pem"), "dh.pem")


PLAIN = """
import sys
import kore

def loaded(process):
    kinds = ("cryptography", "acme", "josepy", "kore.tls", "kore.process.securing")
    print(process, [name for name in kinds if name in sys.modules], flush=True)

class App:
    def configure(self, args):
        kore.config.workers = 1
        kore.config.deployment = "dev"
        kore.server("plain", ip="127.0.0.1", port="0", tls=False)
        kore.domain("*").route("/", self.index)

    def index(self, req):
        pass

    def workerstart(self):
        loaded("worker")
        kore.shutdown()

    def cleanup(self):
        loaded("parent")

koreapp = App()
"""


def test_a_plain_server_loads_nothing_of_tls(start):
    """What asyncio itself loads, which ssl is part of, is all there is of it."""
    (start.directory / "app.py").write_text(PLAIN)
    program = start.kore("app.py")
    assert program.wait() == 0, program.err
    for process in ("worker", "parent"):
        assert f"{process} ['kore.process.securing']\n" in program.out


@pytest.mark.parametrize(("lacking", "extra"), [("cryptography", "tls"), ("acme", "acme")])
def test_a_package_that_is_missing_is_named_with_what_brings_it(monkeypatch, lacking, extra):
    real = securing.importlib.util.find_spec
    monkeypatch.setattr(securing.importlib.util, "find_spec", lambda name: None if name == lacking else real(name))
    application.reset()
    try:
        server("tls", ip="127.0.0.1", port=0)
        domain("a.example", attach="tls", acme=True)
        with pytest.raises(StartError, match=rf"needs the package {lacking}: pip install 'kore\[{extra}\]'"):
            securing.secured(freeze(euid=1000), Rights())
    finally:
        application.reset()


REFERENCE = (
    "AEAD-AES256-GCM-SHA384:AEAD-CHACHA20-POLY1305-SHA256:AEAD-AES128-GCM-SHA256:ECDHE-RSA-AES256-GCM-SHA384:"
    "ECDHE-RSA-AES128-GCM-SHA256:DHE-RSA-AES256-GCM-SHA384:DHE-RSA-AES128-GCM-SHA256")


@pytest.mark.parametrize("wanted", [None, REFERENCE, "HIGH", "ALL:COMPLEMENTOFALL", "DEFAULT:@SECLEVEL=2"])
def test_no_list_has_ciphers_that_decrypt_by_the_key_or_do_without_certificate(wanted):
    """The key manager decrypts nothing, so RSA key exchange would be a handshake that fails."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.set_ciphers(choices.cipher_list(wanted))
    ciphers = context.get_ciphers()
    assert len(ciphers) > 3
    for cipher in ciphers:
        assert cipher["kea"] != "kx-rsa", cipher["name"]
        assert cipher["auth"] != "auth-null", cipher["name"]
        assert "Enc=None" not in cipher["description"]
        if wanted is None:
            assert cipher["aead"], cipher["name"]
            assert cipher["kea"] in ("kx-ecdhe", "kx-dhe", "kx-any")
