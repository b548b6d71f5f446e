"""What a hostile authority may answer, and that each of it has an end: a small TLS server plays the authority."""

from __future__ import annotations

import contextlib
import gzip
import json
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from kore.tls import acme_network, certificates
from kore.tls.acme_client import Authority, Window, certificate_id
from kore.tls.acme_network import ANSWER_BYTES_MAX, AuthorityError, origin, seconds_of, trust
from tests.acme_harness import DAY, make_authority

Answer = Callable[["Handler"], None]


class Handler(BaseHTTPRequestHandler):
    """Answers each path as the test says."""

    protocol_version = "HTTP/1.1"
    server: Hostile

    def do_GET(self) -> None:
        self.server.seen.append(f"{self.command} {self.path}")
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        with contextlib.suppress(OSError):
            self.server.answers.get(self.path.split("?")[0], not_found)(self)

    do_POST = do_HEAD = do_GET  # noqa: N815 (the names that http.server calls)

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, body: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Replay-Nonce": "bm9uY2U"}.items() | headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


class Hostile(ThreadingHTTPServer):
    """The server."""

    daemon_threads = True

    def __init__(self, certificate: Path, key: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(str(certificate), str(key))
        self.socket = context.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)
        self.answers: dict[str, Answer] = {}
        self.seen: list[str] = []
        self.base = f"https://127.0.0.1:{self.server_port}"
        names = ("newNonce", "newAccount", "newOrder", "revokeCert", "keyChange")
        self.directory = {name: f"{self.base}/{name}" for name in names} | {"renewalInfo": f"{self.base}/ari"}
        self.answers["/dir"] = lambda handler: handler.answer(json.dumps(self.directory).encode())
        self.answers["/newNonce"] = lambda handler: handler.answer(b"")
        self.answers["/newAccount"] = lambda handler: handler.answer(b"{}", 201, Location=f"{self.base}/account/1")

    def handle_error(self, *_: object) -> None:
        pass  # clients leave when they have had enough


def not_found(handler: Handler) -> None:
    handler.answer(b"{}", 404)


def says(body: object, status: int = 200, **headers: str) -> Answer:
    text = body if isinstance(body, bytes) else json.dumps(body).encode()
    return lambda handler: handler.answer(text, status, **headers)


class Holder:
    """Keys, of a test."""

    def __init__(self) -> None:
        self.key = certificates.new_key()
        self.address = ""
        self.installed: list[bytes] = []
        self.cleared = 0

    def account(self):
        numbers = self.key.public_key().public_numbers()
        return numbers.x, numbers.y, self.address

    def sign(self, data: bytes) -> bytes:
        from cryptography.hazmat.primitives import hashes
        from cryptography.hazmat.primitives.asymmetric import ec

        return self.key.sign(data, ec.ECDSA(hashes.SHA256()))

    def registered(self, address: str) -> None:
        self.address = address

    def binding(self, address: str) -> None:
        return None

    def request(self, name: str) -> bytes:
        return certificates.request([name], self.key)

    def challenge(self, name: str, digest: bytes) -> None:
        assert len(digest) == 32

    def clear(self, name: str) -> None:
        self.cleared += 1

    def install(self, name: str, chain: bytes) -> None:
        self.installed.append(chain)


@pytest.fixture
def hostile(tmp_path: Path) -> Iterator[Hostile]:
    ca, certificate, key = make_authority(tmp_path, "127.0.0.1")
    server = Hostile(certificate, key)
    server.ca = ca
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


NAME = "a.example.org"


def ask(server: Hostile) -> Holder:
    holder = Holder()
    rests: list[float] = []
    authority = Authority(server.base + "/dir", holder, context=trust(str(server.ca)), wait=rests.append)
    holder.rests = rests
    authority.issue(NAME)
    return holder


def order(server: Hostile, **fields: object) -> dict[str, object]:
    return {
        "status": "pending", "identifiers": [{"type": "dns", "value": NAME}],
        "authorizations": [f"{server.base}/authz"], "finalize": f"{server.base}/finalize",
    } | fields


def authorization(server: Hostile, **fields: object) -> dict[str, object]:
    challenge = {"type": "tls-alpn-01", "url": f"{server.base}/chall", "token": "A" * 43, "status": "pending"}
    return {"status": "pending", "identifier": {"type": "dns", "value": NAME}, "challenges": [challenge]} | fields


def well_behaved(server: Hostile) -> None:
    """As far as the certificate, which is a text here."""
    place = {"Location": f"{server.base}/order"}
    server.answers |= {
        "/newOrder": says(order(server), 201, **place),
        "/authz": says(authorization(server, status="valid")),
        "/order": says(order(server, status="valid", certificate=f"{server.base}/cert")),
        "/finalize": says(order(server, status="processing"), **place),
        "/cert": says(b"a chain"),
    }


def test_the_server_can_behave(hostile: Hostile) -> None:
    well_behaved(hostile)
    holder = ask(hostile)
    assert holder.installed == [b"a chain"]
    assert holder.cleared == 1


def slowly(handler: Handler) -> None:
    """One byte every tenth of a second, for ever."""
    handler.send_response(200)
    handler.send_header("Content-Length", "100000")
    handler.end_headers()
    while True:
        handler.wfile.write(b" ")
        time.sleep(0.1)


def slow_head(handler: Handler) -> None:
    """A head that never ends, byte by byte."""
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
    while True:
        handler.wfile.write(b"x")
        time.sleep(0.1)


def endless(handler: Handler) -> None:
    handler.send_response(200)
    handler.end_headers()
    while True:
        handler.wfile.write(b"x" * 65536)


def bomb(handler: Handler) -> None:
    """64 MiB in 64 KiB."""
    handler.answer(gzip.compress(bytes(64 << 20), 1), Content_Encoding="gzip")


def hang_up(handler: Handler) -> None:
    handler.close_connection = True
    handler.connection.close()


NONSENSE: dict[str, tuple[str, Callable[[Hostile], Answer], str]] = {
    "not JSON": ("/dir", lambda _: says(b"<html>"), "."),
    "deep JSON": ("/dir", lambda _: says(b"[" * 100_000), "makes no sense"),
    "a list": ("/dir", lambda _: says([]), "makes no sense"),
    "an empty directory": ("/dir", lambda _: says({}), "makes no sense"),
    "numbers for addresses": ("/dir", lambda _: says({"newNonce": 1, "newAccount": 2, "newOrder": 3}), "not on"),
    "another host": ("/dir", lambda s: says(s.directory | {"newOrder": "https://127.0.0.2:1/x"}), "which is not on"),
    "no encryption": ("/dir", lambda s: says(s.directory | {"newAccount": s.base.replace("s:", ":")}), "not on"),
    "a file": ("/dir", lambda s: says(s.directory | {"newNonce": "file:///etc/passwd"}), "which is not on"),
    "a redirect": ("/dir", lambda s: says(b"", 302, Location=s.base + "/elsewhere"), "redirect"),
    "a long answer": ("/dir", lambda _: says(b" " * (ANSWER_BYTES_MAX + 1)), "more than"),
    "an endless answer": ("/newOrder", lambda _: endless, "more than"),
    "a bomb": ("/dir", lambda _: bomb, "more than"),
    "a slow body": ("/newOrder", lambda _: slowly, "no whole answer"),
    "a slow head": ("/dir", lambda _: slow_head, "no whole answer"),
    "no answer": ("/newOrder", lambda _: hang_up, "cannot be reached"),
    "no nonce": ("/newNonce", lambda _: lambda h: (h.send_response(204), h.end_headers()), "nonce"),
    "an order without anything": ("/newOrder", lambda _: says({}, 201), "makes no sense"),
    "an order without proof": ("/newOrder", lambda s: says(order(s, authorizations=[]), 201), "not for"),
    "an order of many parts": (
        "/newOrder", lambda s: says(order(s, authorizations=[f"{s.base}/authz"] * 3), 201), "not for"),
    "an order for another name": (
        "/authz", lambda s: says(authorization(s, identifier={"type": "dns", "value": "b.example.org"})), "not for"),
    "no challenge of ours": ("/authz", lambda s: says(authorization(s, challenges=[])), "does not offer"),
    "a challenge elsewhere": ("/authz", lambda s: says(authorization(s, challenges=[
        {"type": "tls-alpn-01", "url": "https://evil.example/", "token": "A" * 43}])), "which is not on"),
    "a short token": ("/authz", lambda s: says(authorization(s, challenges=[
        {"type": "tls-alpn-01", "url": f"{s.base}/chall", "token": "A"}])), "makes no sense"),
    "an unknown state": ("/authz", lambda s: says(authorization(s, status="merry")), "makes no sense"),
    "a failed order": ("/order", lambda s: says(order(s, status="invalid")), "the order failed"),
    "a certificate elsewhere": (
        "/order", lambda s: says(order(s, status="valid", certificate="https://evil.example/")), "which is not on"),
    "a long chain": ("/cert", lambda _: says(b"x" * 60_000), "a chain of 60000 bytes"),
    "control characters": (
        "/newOrder", lambda _: says({"type": "x", "detail": "a\n\x1b[31mb"}, 400), r"a \?\[31mb .*status 400"),
}


@pytest.mark.parametrize("what", NONSENSE)
def test_nonsense_is_an_error_with_an_end(hostile: Hostile, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever comes, it is one error of one line, in bounded time and memory, and nothing is installed."""
    monkeypatch.setattr(acme_network, "REQUEST_SECONDS_MAX", 1.0)
    path, make, match = NONSENSE[what]
    well_behaved(hostile)
    hostile.answers[path] = make(hostile)
    holder = Holder()
    authority = Authority(hostile.base + "/dir", holder, context=trust(str(hostile.ca)), wait=lambda _: None)
    with pytest.raises(AuthorityError, match=match) as raised:
        authority.issue(NAME)
    text = str(raised.value)
    assert text.isprintable()
    assert len(text) < 1200
    assert holder.installed == []


def test_an_order_that_is_never_done_ends(hostile: Hostile, monkeypatch: pytest.MonkeyPatch) -> None:
    """An authority that is for ever busy is left after the time for an order."""
    monkeypatch.setattr("kore.tls.acme_client.ORDER_SECONDS_MAX", 1.5)
    well_behaved(hostile)
    hostile.answers["/order"] = says(order(hostile, status="processing"))
    with pytest.raises(AuthorityError, match="not done within"):
        ask(hostile)


def test_retry_after_is_told(hostile: Hostile) -> None:
    well_behaved(hostile)
    body = {"type": "urn:ietf:params:acme:error:rateLimited", "detail": "too many"}
    hostile.answers["/newOrder"] = says(body, 429, Retry_After="1234")
    with pytest.raises(AuthorityError, match="rateLimited.*too many") as raised:
        ask(hostile)
    assert raised.value.retry_after == 1234.0


def test_the_authority_is_polled_as_it_wishes(hostile: Hostile) -> None:
    """Retry-After is waited for, up to a bound."""
    well_behaved(hostile)
    states = ["processing", "processing", "valid"]

    def next_state(handler: Handler) -> None:
        state = states.pop(0)
        body = order(hostile, status=state, certificate=f"{hostile.base}/cert")
        says(body, Retry_After="7" if states else "0")(handler)

    hostile.answers["/order"] = next_state
    holder = ask(hostile)
    assert holder.rests == [0.25, 7.0, 7.0]


def test_the_environment_is_not_asked(hostile: Hostile, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither its proxies nor its CA files, nor a .netrc."""
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", "/nonexistent")
    monkeypatch.setenv("SSL_CERT_FILE", "/nonexistent")
    well_behaved(hostile)
    assert ask(hostile).installed


def test_the_window_of_the_authority(hostile: Hostile) -> None:
    """ARI: the certificate is named as RFC 9773 says, and its answer is a window of time."""
    authority_key = certificates.new_key()
    root = certificates.new_authority("ARI", authority_key, lifetime=DAY)
    pair = certificates.issue([NAME], certificates.new_key(), root, authority_key, lifetime=DAY)
    leaf = pair.chain[0]
    window = {"start": "2027-01-02T04:00:00Z", "end": "2027-01-03T04:00:00Z"}
    hostile.answers[f"/ari/{certificate_id(leaf)}"] = says({"suggestedWindow": window}, Retry_After="21600")
    authority = Authority(hostile.base + "/dir", Holder(), context=trust(str(hostile.ca)))
    assert authority.window(leaf) == Window((1798862400.0, 1798948800.0), 21600.0)
    assert hostile.seen == ["GET /dir", f"GET /ari/{certificate_id(leaf)}"]
    del hostile.directory["renewalInfo"]
    assert authority.window(leaf) == Window(None, None)
    hostile.directory["renewalInfo"] = f"{hostile.base}/broken"
    with pytest.raises(AuthorityError, match="404"):
        authority.window(leaf)


def test_the_name_of_a_certificate_is_that_of_the_rfc() -> None:
    """RFC 9773, appendix A: its example certificate."""
    import base64

    leaf = (
        "MIIBQzCB66ADAgECAgUAh2VDITAKBggqhkjOPQQDAjAVMRMwEQYDVQQDEwpFeGFtcGxlIENBMCIYDzAwMDEwMTAxMDAwMDAwWhgPMDAw"
        "MTAxMDEwMDAwMDBaMBYxFDASBgNVBAMTC2V4YW1wbGUuY29tMFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEeBZu7cbpAYNXZLbbh8rN"
        "IzuOoqOOtmxA1v7cRm//AwyMwWxyHz4zfwmBhcSrf47NUAFfqzLQ2PPQxdTXREYEnKMjMCEwHwYDVR0jBBgwFoAUaYhba4dGQEHhs3uE"
        "e6CuLN4ByNQwCgYIKoZIzj0EAwIDRwAwRAIge09+S5TZAlw5tgtiVvuERV6cT4mfutXIlwTb+FYN/8oCIClDsqBklhB9KAelFiYt9+6F"
        "DWpcNdCPPbMs3Pk6zSXr"
    )
    try:
        assert certificate_id(base64.b64decode(leaf + "==")) == "aYhba4dGQEHhs3uEe6CuLN4ByNQ.AIdlQyE"
    except ValueError as error:
        pytest.skip(f"cryptography does not read its dates of the year 1: {error}")


@pytest.mark.parametrize(("text", "seconds"), [
    (None, None), ("", None), ("5", 5.0), (" 120 ", 120.0), ("-1", None), ("1.5", None), ("soon", None),
    ("9" * 40, 999999999999.0), ("Thu, 01 Jan 1970 00:16:50 GMT", 10.0), ("Thu, 01 Jan 1970 00:00:00 GMT", 0.0),
    ("Thu, 32 Jan 1970 00:00:00 GMT", None), ("²", None),
])
def test_retry_after(text: str | None, seconds: float | None) -> None:
    assert seconds_of(text, lambda: 1000.0) == seconds


@pytest.mark.parametrize("url", ["http://a/", "https:///x", "https://u@a/", "https://a:99999/", "a", "https://[a/"])
def test_no_origin(url: str) -> None:
    with pytest.raises(ValueError):
        origin(url)
