"""A real ACME authority on loopback: Debian's pebble with a CA of its own, and names that all lead to 127.0.0.1.

pebble validates tls-alpn-01 at the port that it is told of, and its DNS is pebble-challtestsrv. Both end with the test.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import shutil
import socket
import ssl
import threading
import urllib.request
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import Encoding

from kore.tls import certificates
from tests.support import Program, free_port, wait_until

DAY = datetime.timedelta(days=1)

HOST = "provider.test"
"""A name of pebble's, for who asks its DNS."""

EAB_KID = "kid-1"
EAB_KEY = "zWNDZM6eQGHWpSRTPal5eIUYFTu7EajVIoguysqZ9wG44nMEtx3MUAsUDkMTQ12W"


def make_authority(directory: Path, *names: str) -> tuple[Path, Path, Path]:
    """A CA and a certificate from it for `names`: the files of the CA, the certificate and its key."""
    key = certificates.new_key()
    root = certificates.new_authority("test CA", key, lifetime=DAY)
    pair = certificates.issue(names, certificates.new_key(), root, key, lifetime=DAY)
    paths = [directory / name for name in ("ca.pem", "cert.pem", "key.pem")]
    chain = [*pair.chain, root.public_bytes(Encoding.DER)]
    contents = (root.public_bytes(Encoding.PEM), certificates.chain_pem(chain), certificates.key_pem(pair.key))
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
        path.chmod(0o644)
    return paths[0], paths[1], paths[2]


def listens(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


class Pebble:
    """One pebble and its DNS. stop() ends both; start() starts it anew, which has forgotten everything."""

    def __init__(
        self, directory: Path, tls_port: int, *, seconds: int = 0, eab: bool = False,
        blocked: tuple[str, ...] = (), environment: dict[str, str] | None = None, further_dns: tuple[str, ...] = (),
    ) -> None:
        self.further_dns = further_dns
        for program in ("pebble", "pebble-challtestsrv"):
            if shutil.which(program) is None:
                pytest.skip(f"{program} is missing: scripts/setup.sh services installs it")
        self.directory = directory
        directory.mkdir(exist_ok=True)
        self.port, self.management, self.dns, self.dns_management = (free_port() for _ in range(4))
        self.ca, certificate, key = make_authority(directory, "127.0.0.1", "localhost", HOST)
        settings = {
            "listenAddress": f"127.0.0.1:{self.port}", "managementListenAddress": f"127.0.0.1:{self.management}",
            "certificate": str(certificate), "privateKey": str(key), "httpPort": free_port(), "tlsPort": tls_port,
            "ocspResponderURL": "", "externalAccountBindingRequired": eab,
            "externalAccountMACKeys": {EAB_KID: EAB_KEY}, "domainBlocklist": list(blocked),
        }
        if seconds:
            settings["certificateValidityPeriod"] = seconds
        (directory / "pebble.json").write_text(json.dumps({"pebble": settings}))
        self.environment = {"PEBBLE_VA_NOSLEEP": "1", "PEBBLE_WFE_NONCEREJECT": "0", "PEBBLE_AUTHZREUSE": "0"}
        self.environment |= environment or {}
        self.programs: list[Program] = []

    @property
    def address(self) -> str:
        """Of the directory."""
        return f"https://127.0.0.1:{self.port}/dir"

    def start(self) -> None:
        addresses = ",".join((f"127.0.0.1:{self.dns}", *self.further_dns))
        dns = [
            "pebble-challtestsrv", "-dns01", addresses, "-http01", "", "-https01", "", "-tlsalpn01", "",
            "-management", f"127.0.0.1:{self.dns_management}", "-defaultIPv6", "",
        ]
        command = ["pebble", "-config", str(self.directory / "pebble.json"), "-dnsserver", f"127.0.0.1:{self.dns}"]
        self.programs = [Program(dns, self.directory), Program(command, self.directory, self.environment)]
        self.programs[0].wait_for("Starting management server")
        self.programs[1].wait_for("ACME directory available at")
        for port in (self.port, self.management):  # it says so before it listens
            wait_until(partial(listens, port), f"pebble listens at {port}")

    def stop(self) -> None:
        for program in self.programs:
            program.stop()
        self.programs = []

    def get(self, path: str) -> bytes:
        """Ask its management."""
        context = ssl.create_default_context(cafile=str(self.ca))
        with urllib.request.urlopen(f"https://127.0.0.1:{self.management}/{path}", context=context) as answer:
            return answer.read()

    def roots(self) -> str:
        """The CA that it issues by, which it makes anew at each start: PEM."""
        return self.get("roots/0").decode()

    def tell_dns(self, what: str, **values: object) -> bytes:
        """Change what its DNS answers: "set-default-ipv4" ip=..., "set-servfail" host=..., "clear-servfail".

        "dns-request-history" host=... answers with what it was asked for: JSON.
        """
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.dns_management}/{what}", json.dumps(values).encode(), method="POST")
        with urllib.request.urlopen(request) as answer:
            return answer.read()

    @property
    def log(self) -> str:
        return self.programs[1].out


@contextlib.contextmanager
def pebble(directory: Path, tls_port: int, **settings) -> Iterator[Pebble]:
    """A pebble that runs."""
    authority = Pebble(directory / "pebble", tls_port, **settings)
    try:
        authority.start()
        yield authority
    finally:
        authority.stop()


class Responder:
    """A server for challenges alone: what the workers are in a server. It serves the chains that it is given."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.contexts: dict[str, ssl.SSLContext] = {}
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def serve(self, name: str, pair: certificates.Pair | None, directory: Path) -> None:
        if pair is None:
            self.contexts.pop(name, None)
            return
        files = directory / "challenge.pem", directory / "challenge-key.pem"
        files[0].write_bytes(certificates.chain_pem(pair.chain))
        files[1].write_bytes(certificates.key_pem(pair.key))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*map(str, files))
        context.set_alpn_protocols(["acme-tls/1"])
        self.contexts[name] = context

    def _run(self) -> None:
        while True:
            try:
                sock, _ = self.listener.accept()
            except OSError:
                return
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)

            def choose(connection, name, _context) -> None:
                if name in self.contexts:
                    connection.context = self.contexts[name]

            context.sni_callback = choose
            context.set_alpn_protocols(["acme-tls/1"])
            with contextlib.suppress(OSError), sock:
                context.wrap_socket(sock, server_side=True).close()

    def close(self) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.thread.join(5)


def files_below(directory: Path) -> dict[str, int]:
    """What ACME left on disk, and the rights to it."""
    found = {}
    for path in sorted(directory.rglob("*")):
        with contextlib.suppress(FileNotFoundError):  # a file that was being written has its name by now
            found[str(path.relative_to(directory))] = os.stat(path).st_mode & 0o777
    return found
