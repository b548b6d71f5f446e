"""Every kind of key with every signature that TLS knows for it, by the real key manager, checked by a real client."""

from __future__ import annotations

import re
import subprocess

import pytest

from tests.engines import ENGINES
from tests.support import READY, free_port, skip_unless, starter
from tests.tls_harness import authority, server_pair

APP = """
import kore

kore.config.workers = 1
kore.config.deployment = "dev"
kore.server("tls", ip="127.0.0.1", port="{port}")
for kind in {kinds}:
    domain = kore.domain(kind + ".test", attach="tls", cert=kind + ".pem", key=kind + ".key")
    domain.route("/", lambda req: req.response(200, b"hello"))
"""

RSA = ("rsa2048", "rsa3072", "rsa4096")
HASHES = ("SHA256", "SHA384", "SHA512")
SIGNATURES = [
    *((kind, "-tls1_3", "RSA-PSS", digest) for kind in RSA for digest in HASHES),
    *((kind, "-tls1_2", how, digest) for kind in RSA for how in ("RSA", "RSA-PSS") for digest in HASHES),
    ("p256", "-tls1_3", "ECDSA", "SHA256"), ("p384", "-tls1_3", "ECDSA", "SHA384"),
    *((kind, "-tls1_2", "ECDSA", digest) for kind in ("p256", "p384") for digest in HASHES),
]


@pytest.fixture(scope="module", params=ENGINES)
def port(request, tmp_path_factory):
    """Of a server with a domain for each kind of key."""
    skip_unless(request.param)
    folder = tmp_path_factory.mktemp("kinds")
    kinds = (*RSA, "p256", "p384")
    for kind in kinds:
        server_pair(f"{kind}.test", kind).save(folder / f"{kind}.pem")
    (folder / "ca.pem").write_bytes(authority().pem)
    port = free_port()
    with starter(folder) as start:
        (folder / "app.py").write_text(APP.format(port=port, kinds=kinds))
        program = start.kore("app.py", environment={"KORE_IO": request.param})
        program.wait_for(READY)
        yield port, folder / "ca.pem"


@pytest.mark.parametrize(("kind", "version", "how", "digest"), SIGNATURES, ids="-".join)
def test_the_signature_that_the_client_asks_for(port, kind, version, how, digest):
    """openssl(1) takes no other, verifies it and the chain, and says what it was."""
    number, authorities = port
    command = [
        "openssl", "s_client", "-connect", f"127.0.0.1:{number}", "-servername", f"{kind}.test", version, "-sigalgs",
        f"{how}+{digest}", "-CAfile", str(authorities), "-verify_return_error", "-verify_hostname", f"{kind}.test",
        "-ign_eof"]
    request = f"GET / HTTP/1.1\r\nHost: {kind}.test\r\nConnection: close\r\n\r\n"
    done = subprocess.run(command, input=request, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    facts = "Peer signing digest|Peer signature type|Verification"
    said = dict(re.findall(rf"^({facts}): (.*)$", done.stdout, re.MULTILINE))
    assert said == {"Peer signing digest": digest, "Peer signature type": how, "Verification": "OK"}
    assert "\nhello" in done.stdout
