"""HTTP over TLS as clients see it: requests of every kind, names, versions, ends, on both engines."""

from __future__ import annotations

import subprocess

import pytest

from tests.engines import ENGINES
from tests.http_server_harness import request
from tests.tls_harness import authority, client_context, server_pair, tls_server

pytestmark = pytest.mark.parametrize("engine", ENGINES)


@pytest.mark.parametrize("version", ["1.2", "1.3"])
@pytest.mark.parametrize("kind", ["rsa2048", "p256"])
def test_requests_are_answered(tmp_path, engine, version, kind):
    pairs = [server_pair("a.test", kind).save(tmp_path / "a.pem")]
    with tls_server(tmp_path, engine, ("a.test", {"pairs": pairs})) as server:
        with server.connect(context=client_context(version)) as client:
            for _ in range(3):
                answer = client.ask(request().replace(b"Host: x", b"Host: a.test"))
                assert answer.body == b"hello world"
                assert answer.fields["strict-transport-security"] == "max-age=31536000; includeSubDomains"


def test_curl(tmp_path, engine):
    with tls_server(tmp_path, engine) as server:
        (tmp_path / "ca.pem").write_bytes(authority().pem)
        done = subprocess.run(
            ["curl", "-sS", "--cacert", str(tmp_path / "ca.pem"), "--resolve", f"a.test:{server.port}:127.0.0.1",
             f"https://a.test:{server.port}/", f"https://a.test:{server.port}/slow"], capture_output=True, timeout=20)
        assert done.stdout == b"hello worldslow", done.stderr
