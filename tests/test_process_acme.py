"""Whole servers that get their certificates from a real pebble: issue, renewal, faults, restarts, in the sandbox."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509

from kore.process.acme import AcmeOrders, AcmeProcess
from kore.process.channel import channel_pair
from kore.process.services import Place
from kore.sandbox.confinement import Confinement
from tests.acme_harness import EAB_KEY, EAB_KID, Pebble, files_below, pebble
from tests.acme_proxy import hang_up, problem, proxy, status
from tests.support import READY, Program, Starter, children, free_port, starter, wait_until

NAMES = ("one.example.org", "two.example.org")

APP = """
import kore

kore.config.workers = {workers}
kore.config.acme_provider = {provider!r}
kore.config.acme_ca_bundle = {ca!r}
kore.config.acme_email = "admin@example.org"
{options}

kore.server("tls", ip="127.0.0.1", port="{port}")
for name in {names!r}:
    domain = kore.domain(name, attach="tls", acme=True{more})
    domain.route("/", lambda req: req.response(200, b"hello"), methods=["get"])
"""


class Server:
    """An application on one port whose domains have acme=True."""

    def __init__(self, start: Starter, directory: Path, authority: Pebble, port: int) -> None:
        self.start, self.directory, self.authority, self.port = start, directory, authority, port
        self.program: Program | None = None

    def run(
        self, *arguments: str, names: tuple[str, ...] = NAMES[:1], workers: int = 2, options: str = "",
        environment: dict[str, str] | None = None, wait: bool = True, provider: str | None = None,
        ca: Path | None = None, more: str = "",
    ) -> Program:
        text = APP.format(
            workers=workers, provider=provider or self.authority.address, ca=str(ca or self.authority.ca),
            options=options, port=self.port, names=names, more=more)
        (self.directory / "app.py").write_text(text)
        if environment is None and os.environ.get("KORE_IO"):
            environment = {"KORE_IO": os.environ["KORE_IO"]}
        self.program = self.start.kore(*arguments, "app.py", cwd=self.directory, environment=environment)
        if wait:
            self.program.wait_for(READY)
        return self.program

    def certificate(self, name: str) -> x509.Certificate:
        """What a client is shown."""
        return x509.load_der_x509_certificate(shown(self.port, name))

    def issuer(self, name: str) -> str:
        return self.certificate(name).issuer.rfc4514_string()

    def get(self, name: str, roots: str) -> bytes:
        """A request of a client that trusts the authority, and it alone."""
        context = ssl.create_default_context(cadata=roots)
        context.verify_flags &= ~getattr(ssl, "VERIFY_X509_STRICT", 0)
        with socket.create_connection(("127.0.0.1", self.port), 10) as raw:
            with context.wrap_socket(raw, server_hostname=name) as sock:
                sock.sendall(f"GET / HTTP/1.1\r\nHost: {name}\r\nConnection: close\r\n\r\n".encode())
                answer = b""
                while piece := sock.recv(65536):
                    answer += piece
        return answer

    def service(self, label: str) -> int:
        """The pid of the key manager or the ACME process."""
        assert self.program is not None
        for pid in children(self.program.pid):
            if f"[{label}]".encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                return pid
        raise AssertionError(f"no {label}")


def shown(port: int, name: str, alpn: list[str] | None = None) -> bytes:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    if alpn:
        context.set_alpn_protocols(alpn)
    with socket.create_connection(("127.0.0.1", port), 10) as raw:
        with context.wrap_socket(raw, server_hostname=name) as sock:
            return sock.getpeercert(True)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Starter]:
    with starter(tmp_path) as made:
        yield made


@contextlib.contextmanager
def served(tmp_path: Path, start: Starter, **settings) -> Iterator[Server]:
    """A pebble, and a server that is not started yet."""
    port = free_port()
    home = tmp_path / "home"
    home.mkdir()
    with pebble(tmp_path, port, **settings) as authority:
        yield Server(start, home, authority, port)


def has_certificate(program: Program, name: str = NAMES[0], count: int = 1) -> None:
    program.wait_for(f"{name} has a certificate until", count=count)


def test_a_certificate_is_got_and_served(tmp_path: Path, start: Starter) -> None:
    """First a self-signed one serves, then the authority's, for each of several domains; a restart finds them again."""
    with served(tmp_path, start) as server:
        program = server.run(names=NAMES)
        for name in NAMES:
            has_certificate(program, name)
            assert b"hello" in server.get(name, server.authority.roots())
        before = {name: server.certificate(name).serial_number for name in NAMES}
        program.signal(signal.SIGTERM)
        assert program.wait() == 0
        assert "killed" not in program.out
        orders = server.authority.log.count("Issued certificate")
        assert orders == 2
        again = server.run(names=NAMES)
        assert {name: server.certificate(name).serial_number for name in NAMES} == before
        assert "is asked for" not in again.out
        rights = files_below(server.directory)
        assert rights["account-key.pem"] == rights[f"certificates/{NAMES[0]}/key.pem"] == 0o600
        assert rights["certificates"] == 0o700


class Load:
    """Clients that shake hands all the time; what they were shown, and what failed."""

    def __init__(self, port: int, name: str, threads: int = 3) -> None:
        self.port, self.name = port, name
        self.failures: list[str] = []
        self.shown: list[bytes] = []
        self.ended = threading.Event()
        self.threads = [threading.Thread(target=self._run, args=(version,)) for version in (2, 3, 3)[:threads]]
        for thread in self.threads:
            thread.start()

    def _run(self, version: int) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.maximum_version = {2: ssl.TLSVersion.TLSv1_2, 3: ssl.TLSVersion.TLSv1_3}[version]
        while not self.ended.is_set():
            try:
                with socket.create_connection(("127.0.0.1", self.port), 10) as raw:
                    with context.wrap_socket(raw, server_hostname=self.name) as sock:
                        self.shown.append(sock.getpeercert(True))
                        request = f"GET / HTTP/1.1\r\nHost: {self.name}\r\n\r\n".encode()
                        sock.sendall(request)
                        answer = sock.recv(4096)
                        if b"hello" not in answer:
                            self.failures.append(repr(answer))
            except OSError as error:
                self.failures.append(repr(error))

    def stop(self) -> None:
        self.ended.set()
        for thread in self.threads:
            thread.join(20)


@contextlib.contextmanager
def loaded(port: int, name: str) -> Iterator[Load]:
    load = Load(port, name)
    try:
        yield load
    finally:
        load.stop()


def test_issue_and_renewals_under_load_fail_no_handshake(tmp_path: Path, start: Starter) -> None:
    """From the self-signed certificate over the first to its renewals, no client notices."""
    with served(tmp_path, start, seconds=9) as server:
        program = server.run()
        with loaded(server.port, NAMES[0]) as load:
            has_certificate(program, count=3)
            wait_until(lambda: len(set(load.shown)) >= 4, "the last is shown")
        assert load.failures == []
        assert len(load.shown) > 100
        issuers = [x509.load_der_x509_certificate(der).issuer.rfc4514_string() for der in dict.fromkeys(load.shown)]
        assert "Pebble" not in issuers[0]
        assert all("Pebble" in issuer for issuer in issuers[1:])
        keys = [x509.load_der_x509_certificate(der).public_key().public_numbers() for der in set(load.shown)]
        assert len(set(keys)) == 1


def test_a_dead_authority(tmp_path: Path, start: Starter) -> None:
    """The self-signed one serves, the log says what and when again; SIGUSR1 has it tried as soon as it is back."""
    with served(tmp_path, start) as server:
        server.authority.stop()
        program = server.run()
        found = program.wait_for(
            r"no certificate for one\.example\.org: it cannot be reached: .*; a self-signed one is served; "
            r"tried again at (.* UTC)\]")
        again = time.mktime(time.strptime(found[1], "%Y-%m-%d %H:%M:%S UTC")) - time.timezone
        assert 60 < again - time.time() <= 120
        assert server.certificate(NAMES[0]).subject == server.certificate(NAMES[0]).issuer
        server.authority.start()
        program.signal(signal.SIGUSR1)
        has_certificate(program)
        assert b"hello" in server.get(NAMES[0], server.authority.roots())


FAULTS = {
    "directory": status(500), "nonce": status(503, Retry_After="3000"), "account": problem("unauthorized"),
    "order": problem("rateLimited", 429, Retry_After="4000"), "authz": status(200, b"{"),
    "challenge": hang_up, "finalize": problem("badCSR"), "poll": status(200, b"{}"),
    "certificate": status(200, b"-----BEGIN CERTIFICATE-----\n"),
}


PAST = status(200, b'{"suggestedWindow": {"start": "2020-01-01T00:00:00Z", "end": "2020-01-02T00:00:00Z"}}')
"""The authority suggests to renew at once."""


FAILED = r"no certificate for one\.example\.org: .*; that of before is served, until .*; tried again"


def test_each_step_may_fail(tmp_path: Path, start: Starter) -> None:
    """One step after the other fails, in a renewal: the last good certificate is served, the log says when again."""
    with served(tmp_path, start) as server, proxy(tmp_path, server.authority) as way:
        way.window = True
        way.faults = {"account": FAULTS["account"], "window": PAST}
        program = server.run(provider=way.address, ca=way.ca)
        program.wait_for(r"unauthorized, says the test .*; a self-signed one is served; tried again at")
        way.faults = {"window": PAST}
        program.signal(signal.SIGUSR1)
        has_certificate(program)
        good = server.certificate(NAMES[0])
        # There is an account by now; the directory comes when a renewal is due.
        steps = [step for step in FAULTS if step not in ("account", "directory")]
        issued, ended = 1, 1
        for step in steps:
            while True:
                way.seen.clear()
                way.faults = {step: FAULTS[step], "window": PAST}
                program.signal(signal.SIGUSR1)
                ended += 1
                found = program.wait_for(rf"{FAILED}|one\.example\.org (has) a certificate until", count=ended)
                if found[1] is None or step in way.seen:
                    break
                # One order in a hundred has no challenge: told to use no authorization again the authority still may.
                issued += 1
                good = server.certificate(NAMES[0])
            assert found[1] is None
            assert step in way.seen
            assert server.certificate(NAMES[0]) == good
        way.faults = {"directory": FAULTS["directory"], "window": PAST}
        program.signal(signal.SIGUSR1)
        program.wait_for(r"makes no sense: no problem document \(status 500 from \S+\); that of before")
        assert server.certificate(NAMES[0]) == good
        waits = dict.fromkeys(FAULTS, 60.0) | {"order": 4000.0, "nonce": 3000.0}
        for text, seconds in (("rateLimited", waits["order"]), ("status 503", waits["nonce"])):
            found = program.wait_for(
                rf"([-0-9]+ [:0-9]+)\.\d+ UTC proc=\[acme\] log=\[.*{text}.*tried again at (.*) UTC\]")
            begun, again = (time.mktime(time.strptime(part, "%Y-%m-%d %H:%M:%S")) for part in found.groups())
            assert again - begun >= seconds - 1
        way.faults = {"window": PAST}
        program.signal(signal.SIGUSR1)
        has_certificate(program, count=issued + 1)
        wait_until(lambda: server.certificate(NAMES[0]) != good, "the renewal is served")
        assert "is killed" not in program.out


def test_the_key_manager_is_killed_during_an_order(tmp_path: Path, start: Starter) -> None:
    """The order is begun again with its successor, counts as nobody's failure, and no handshake fails meanwhile."""
    with served(tmp_path, start) as server, proxy(tmp_path, server.authority) as way:
        way.hold("authz")
        program = server.run(provider=way.address, ca=way.ca)
        assert way.reached.wait(20)
        with loaded(server.port, NAMES[0]) as load:
            os.kill(server.service("keymgr"), signal.SIGKILL)
            program.wait_for("the key manager is there again")
            way.release()
            has_certificate(program)
            wait_until(lambda: len(set(load.shown)) >= 2, "the new one is shown")
        assert load.failures == []
        program.wait_for("the key manager (went away|is not there).*; what was begun is begun again")
        assert "no certificate for" not in program.out


def test_the_acme_process_is_killed_during_an_order(tmp_path: Path, start: Starter) -> None:
    """Its successor knows that an order was cut off, and does not ask at once again: a crash is no storm of orders."""
    with served(tmp_path, start) as server, proxy(tmp_path, server.authority) as way:
        way.hold("authz")
        program = server.run(provider=way.address, ca=way.ca)
        assert way.reached.wait(20)
        os.kill(server.service("acme"), signal.SIGKILL)
        way.release()
        program.wait_for("the ACME process .* SIGKILL.*; another takes its place")
        program.wait_for(r"no certificate for one\.example\.org yet: the last attempt was cut off; tried again at")
        orders = way.seen.count("order")
        assert shown(server.port, NAMES[0])
        program.signal(signal.SIGUSR1)
        has_certificate(program)
        assert way.seen.count("order") == orders + 1
        assert way.seen.count("account") == 1


def test_the_server_is_stopped_and_started_during_an_order(tmp_path: Path, start: Starter) -> None:
    """It ends at once although the authority does not answer; the next start goes on with the same account."""
    with served(tmp_path, start) as server, proxy(tmp_path, server.authority) as way:
        way.hold("finalize")
        program = server.run(provider=way.address, ca=way.ca)
        assert way.reached.wait(20)
        begun = time.monotonic()
        program.signal(signal.SIGTERM)
        assert program.wait() == 0
        assert time.monotonic() - begun < 10
        assert "is killed" not in program.out
        assert "no certificate for" not in program.out
        way.release()
        program = server.run(provider=way.address, ca=way.ca)
        has_certificate(program)
        assert way.seen.count("account") == 1


def test_the_whole_server_is_killed_during_an_order(tmp_path: Path, start: Starter) -> None:
    """What is on disk is whole, and the next start says that the order was cut off."""
    with served(tmp_path, start) as server, proxy(tmp_path, server.authority) as way:
        way.hold("certificate")
        program = server.run(provider=way.address, ca=way.ca)
        assert way.reached.wait(20)
        family = children(program.pid)
        program.signal(signal.SIGKILL)
        program.wait()
        wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in family), "nobody is left")
        way.release()
        program = server.run(provider=way.address, ca=way.ca)
        program.wait_for("the last attempt was cut off; tried again at")
        program.signal(signal.SIGUSR1)
        has_certificate(program)
        ends = (".tmp", ".damaged")
        wait_until(lambda: not any(name.endswith(ends) for name in files_below(server.directory)), "all is in place")


def test_external_account_binding(tmp_path: Path, start: Starter) -> None:
    options = f"kore.config.acme_eab_kid = {EAB_KID!r}; kore.config.acme_eab_key = 'eab.key'"
    with served(tmp_path, start, eab=True) as server:
        (server.directory / "eab.key").write_text(EAB_KEY)
        has_certificate(server.run(options=options))


def test_a_domain_that_demands_certificates_gets_one(tmp_path: Path, start: Starter) -> None:
    """The authority, which has none, is let through to the challenge, and to nothing else. Names have no case."""
    with served(tmp_path, start) as server:
        name = "One.Example.org"
        (server.directory / "clients.pem").write_bytes(server.authority.ca.read_bytes())
        program = server.run(names=(name,), more=", client_verify='clients.pem'")
        has_certificate(program, name)
        with pytest.raises(ssl.SSLError):
            server.get(name.lower(), server.authority.roots())


def test_damage_on_disk_is_mended_or_survived(tmp_path: Path, start: Starter) -> None:
    """Garbage in the place of a certificate: the one in use is served on; at a start there is a new one in time."""
    with served(tmp_path, start) as server:
        program = server.run()
        has_certificate(program)
        good = server.certificate(NAMES[0])
        chain = server.directory / "certificates" / NAMES[0] / "fullchain.pem"
        chain.write_bytes(b"garbage")
        program.signal(signal.SIGUSR1)
        program.wait_for("fullchain.pem: holds no certificate.*the certificate of before is served on")
        assert server.certificate(NAMES[0]) == good
        program.signal(signal.SIGTERM)
        assert program.wait() == 0
        program = server.run()
        program.wait_for("a self-signed certificate serves one.example.org until there is another")
        has_certificate(program)
        key = chain.with_name("key.pem")
        before = key.read_bytes()
        key.write_bytes(before[:100])  # cut short
        program.signal(signal.SIGTERM)
        assert program.wait() == 0
        program = server.run()
        program.wait_for("kept as .*key.pem.damaged, and a new key is made")
        has_certificate(program)
        assert key.read_bytes() != before
        assert key.with_name("key.pem.damaged").read_bytes() == before[:100]


def test_storage_that_does_not_last_is_refused(tmp_path: Path, start: Starter) -> None:
    """In memory there would be a new account and new certificates at each start, until the provider has enough."""
    memory = Path("/dev/shm")
    if not memory.is_dir():
        pytest.skip("no /dev/shm here")
    with served(tmp_path, start) as server:
        place = memory / f"kore-test-{os.getpid()}"
        place.mkdir()
        try:
            place_option = f"kore.config.keymgr_root = {str(place)!r}"
            program = server.run(options=place_option, wait=False)
            assert program.wait() == 1
            assert "is on tmpfs, which is empty after a restart" in program.err
            assert "acme_volatile" in program.err
            program = server.run(options=f"{place_option}; kore.config.acme_volatile = True")
            has_certificate(program)
            assert (place / "account-key.pem").exists()
            program.signal(signal.SIGTERM)
            program.wait()
        finally:
            for path in sorted(place.rglob("*"), reverse=True):
                path.rmdir() if path.is_dir() else path.unlink()
            place.rmdir()


def test_without_a_key_manager_it_only_waits(tmp_path: Path, start: Starter) -> None:
    """SIGUSR1 while the key manager is stopped has nothing ordered; it is heard when that goes on."""
    with served(tmp_path, start) as server, proxy(tmp_path, server.authority) as way:
        program = server.run(provider=way.address, ca=way.ca)
        has_certificate(program)
        keeper, acme = server.service("keymgr"), server.service("acme")
        seen = len(way.seen)
        os.kill(keeper, signal.SIGSTOP)
        try:
            os.kill(acme, signal.SIGUSR1)
            program.wait_for("the key manager did not answer within 10 s; what was begun is begun again")
        finally:
            os.kill(keeper, signal.SIGCONT)
        program.wait_for("SIGUSR1: certificates that are due are asked for now")
        assert len(way.seen) - seen <= 2  # the directory, for the window
        assert server.authority.log.count("Issued certificate") == 1


@pytest.mark.parametrize("reason", ["_hurry", "_fresh"])
def test_without_a_key_manager_nothing_is_a_hurry(monkeypatch: pytest.MonkeyPatch, reason: str) -> None:
    """A signal, or a key manager that went again at once, makes no loop that never waits."""
    ours, theirs = channel_pair()
    orders = AcmeOrders("https://127.0.0.1:1/dir", NAMES, Confinement(process="acme", on=False))
    process = AcmeProcess(orders, Place(theirs, os.getpid(), 0))
    waits: list[float] = []
    monkeypatch.setattr(process, "_poll", lambda seconds, _keys: waits.append(seconds))
    setattr(process, reason, True)
    process._turn(None)
    assert waits == [3600.0]
    for channel in (ours, theirs):
        channel.close()
    for sock in (process._wake_in, process._wake_out):
        sock.close()
