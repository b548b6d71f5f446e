"""``kore.httpclient`` against real servers: what it sends byte for byte, what it gives back, and whom it trusts."""

from __future__ import annotations

import asyncio
import os
import ssl
import threading

import pytest
from transfer_harness import (
    ENGINES,
    answer,
    endless,
    limited,
    nginx,
    open_transfers,
    peer,
    run,
    stall,
)

import kore
from kore.version import __version__

pytest.importorskip("pycurl")
trustme = pytest.importorskip("trustme")

METHODS = ["get", "put", "post", "head", "patch", "delete", "options"]


@pytest.fixture(params=ENGINES)
def loop(request):
    yield from open_transfers(request.param)


@pytest.fixture(scope="module")
def web(tmp_path_factory):
    with nginx(tmp_path_factory.mktemp("nginx")) as server:
        yield server


# The reference's example.


def test_the_example_of_the_reference(loop, web):
    async def example(url):
        client = kore.httpclient(url)

        # Do a normal GET request.
        status, body = await client.get()
        assert (status, body) == (200, b"hello from nginx\n")

        # Do a POST.
        mybody = "Hello world"
        status, body = await client.post(
            body=mybody.encode("utf-8"),
            headers={
                "x-header": "from-client"
            }
        )
        assert status == 405
        assert b"nginx" in body

        # Get the headers from a GET request.
        status, headers, body = await client.get(return_headers=True)
        assert status == 200
        assert headers["content-type"] == "text/plain"
        assert headers["content-length"] == "17"
        assert body == b"hello from nginx\n"

    run(loop, example(f"{web.url}/hello.txt"))


# Requests.


@pytest.mark.parametrize("method", METHODS)
def test_each_method_goes_out_as_itself(loop, method):
    with peer() as server:
        client = kore.httpclient(f"{server.url}/path?q=1")
        status, body = run(loop, getattr(client, method)())
        (request,) = server.requests
        assert status == 200
        assert body == (b"" if method == "head" else f"{method.upper()} /path?q=1".encode())
        assert (request.method, request.target, request.body) == (method.upper(), "/path?q=1", b"")
        length = request.fields.get("content-length")
        assert length == ("0" if method in ("put", "post", "patch") else None)
        assert "transfer-encoding" not in request.fields


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", [0, 5, 2_000_000])
def test_bodies(loop, method, size):
    body = os.urandom(size)
    with peer(lambda request, _wire: answer(b"%d" % len(request.body))) as server:
        status, _ = run(loop, getattr(kore.httpclient(server.url), method)(body=body))
        (request,) = server.requests
        assert status == 200
        assert request.method == method.upper()
        ignored = method in ("get", "head", "options")
        assert request.body == (b"" if ignored else body)
        assert request.fields.get("content-length") == (None if ignored else str(size))
        form = "application/x-www-form-urlencoded" if method in ("post", "patch", "delete") else None
        assert request.fields.get("content-type") == form
        assert "expect" not in request.fields


def test_headers_add_replace_and_remove(loop):
    with peer() as server:
        client = kore.httpclient(server.url)
        run(loop, client.get())
        run(loop, client.post(body=b"{}", headers={
            "X-Header": "from-client", "user-agent": "me", "CONTENT-TYPE": "application/json", "accept": "",
            "x-text": "gr\u00fc\u00df",
        }))
        run(loop, client.put(body=b"{}", headers={"Content-Type": "application/json", "Expect": "nothing"}))
        first, second, third = (request.fields for request in server.requests)
        assert first["user-agent"] == f"kore/{__version__}"
        assert first["accept"] == "*/*"
        assert (second["x-header"], second["user-agent"], second["content-type"], second["x-text"]) == (
            "from-client", "me", "application/json", "gr\u00fc\u00df")
        assert "accept" not in second
        assert third["content-type"] == "application/json"
        assert third["expect"] == "nothing"


# Results.


def test_an_empty_body_is_bytes(loop, web):
    for path in ("empty", "nothing"):
        status, body = run(loop, kore.httpclient(f"{web.url}/{path}").get())
        assert (status, body) == ({"empty": 200, "nothing": 204}[path], b"")
    assert run(loop, kore.httpclient(f"{web.url}/hello.txt").head()) == (200, b"")


@pytest.mark.parametrize("status", [200, 201, 301, 304, 400, 404, 418, 500, 503, 599])
def test_no_status_raises(loop, status):
    with peer(lambda *_: answer(b"" if status == 304 else b"x", f"{status} Word")) as server:
        assert run(loop, kore.httpclient(server.url).get()) == (status, b"" if status == 304 else b"x")


def test_headers_of_the_response(loop):
    fields = ["X-One: 1", "x-TWO:   two  ", "X-Twice: first", "X-Twice: last", "X-Empty:", "X-Text: gr\u00fc\u00df"]
    fields += [f"X-Number-{number}: {number}" for number in range(60)]
    with peer(lambda *_: answer(b"body", "200 OK", *fields)) as server:
        status, headers, body = run(loop, kore.httpclient(server.url).get(return_headers=True))
        assert (status, body) == (200, b"body")
        numbers = {f"x-number-{number}": str(number) for number in range(60)}
        assert headers == {
            "x-one": "1", "x-two": "two", "x-twice": "last", "x-empty": "", "x-text": "gr\u00fc\u00df",
            "content-length": "4", **numbers,
        }
        for method in METHODS:
            assert len(run(loop, getattr(kore.httpclient(server.url), method)(return_headers=True))) == 3
            assert len(run(loop, getattr(kore.httpclient(server.url), method)(return_headers=False))) == 2


def test_headers_are_those_of_the_last_response(loop):
    """Interim responses and redirects come before it, trailers after it."""
    def reply(request, _wire):
        if request.target == "/old":
            return answer(b"", "302 Found", "Location: /new", "X-Old: yes")
        return (b"HTTP/1.1 103 Early Hints\r\nX-Early: yes\r\n\r\nHTTP/1.1 200 OK\r\nX-New: yes\r\n"
                b"Transfer-Encoding: chunked\r\n\r\n4\r\nbody\r\n0\r\nX-New: no\r\nX-Trailer: yes\r\n\r\n")

    with peer(reply) as server:
        client = kore.httpclient(f"{server.url}/old", curlopt={kore.CURLOPT_FOLLOWLOCATION: 1})
        status, headers, body = run(loop, client.get(return_headers=True))
        assert (status, body) == (200, b"body")
        assert headers == {"x-new": "yes", "transfer-encoding": "chunked"}


def test_folded_headers_are_joined(loop):
    data = b"HTTP/1.1 200 OK\r\nX-Folded: one\r\n  two\r\nContent-Length: 0\r\n\r\n"
    with peer(lambda *_: data) as server:
        _, headers, _ = run(loop, kore.httpclient(server.url).get(return_headers=True))
        assert headers["x-folded"].split() == ["one", "two"]


# Clients.


def test_a_client_serves_any_number_of_requests_at_once(loop):
    turn = threading.Barrier(10)

    def reply(request, _wire):
        turn.wait(20)  # goes on when ten requests are here
        return answer(request.target.encode())

    async def together():
        client = kore.httpclient(f"{server.url}/same")
        return await kore.gather(*(client.get() for _ in range(10)))

    with peer(reply) as server:
        assert run(loop, together()) == [(200, b"/same")] * 10


def test_clients_share_connections(loop):
    with peer() as server:
        for number in range(5):
            run(loop, kore.httpclient(f"{server.url}/{number}").post(body=b"x"))
        assert server.connections == 1


def test_it_may_be_made_before_there_is_a_loop():
    with peer() as server:
        client = kore.httpclient(server.url)
        assert isinstance(client, kore.pyhttpclient)
        for io in ENGINES:
            for loop in open_transfers(io):
                assert run(loop, client.get()) == (200, b"GET /")


def test_a_request_that_is_not_awaited_does_nothing(loop):
    with peer() as server:
        kore.httpclient(server.url).get().close()
        assert server.requests == []


# Options.


def test_curlopt_of_the_client_and_of_the_request(loop, web):
    client = kore.httpclient(f"{web.url}/moved", curlopt={kore.CURLOPT_FOLLOWLOCATION: 1})
    assert run(loop, client.get()) == (200, b"hello from nginx\n")
    assert run(loop, client.get(curlopt={kore.CURLOPT_FOLLOWLOCATION: 0}))[0] == 302
    assert run(loop, client.get()) == (200, b"hello from nginx\n")
    asked = {kore.CURLOPT_URL: f"{web.url}/seen", kore.CURLOPT_USERAGENT: "me"}
    assert run(loop, client.get(curlopt=asked)) == (200, b"GET|me||")


def test_wrong_curlopt_appears_with_the_request(loop, web):
    url = f"{web.url}/hello.txt"
    client = kore.httpclient(url, curlopt={5000: 1})
    with pytest.raises(RuntimeError, match=f"{url}: 5000 is no libcurl option"):
        client.get()
    client = kore.httpclient(url)
    for wrong in ({kore.CURLOPT_TIMEOUT: "1"}, {kore.CURLOPT_WRITEDATA: 1}, {kore.CURLOPT_SSLENGINE: "none"}):
        with pytest.raises(RuntimeError, match=url):
            client.get(curlopt=wrong)
    for wrong in ([], "x", 1):
        with pytest.raises(TypeError, match="curlopt"):
            client.get(curlopt=wrong)
        with pytest.raises(TypeError, match="curlopt"):
            kore.httpclient(url, curlopt=wrong)


def test_a_size_beyond_the_body_is_refused(loop):
    """libcurl would send what lies behind it in memory."""
    with peer() as server:
        client = kore.httpclient(server.url)
        for method in (client.post, client.put, client.delete):
            with pytest.raises(RuntimeError, match="POSTFIELDSIZE is 6, but the body has 5 bytes"):
                method(body=b"12345", curlopt={kore.CURLOPT_POSTFIELDSIZE: 6})
        run(loop, client.post(body=b"12345", curlopt={kore.CURLOPT_POSTFIELDSIZE: 3}))
        assert [request.body for request in server.requests] == [b"123"]


def test_no_cookie_passes_from_one_request_to_the_next(loop):
    def reply(request, _wire):
        return answer(request.fields.get("cookie", "none").encode(), "200 OK", "Set-Cookie: a=b")

    with peer(reply) as server:
        client = kore.httpclient(server.url, curlopt={kore.CURLOPT_COOKIEFILE: ""})
        assert [run(loop, client.get())[1] for _ in range(3)] == [b"none"] * 3


# Security.


@pytest.mark.parametrize("url", ["file:///etc/hostname", "ftp://127.0.0.1:1/", "gopher://127.0.0.1:1/", "dict://127.0.0.1:1/"])
def test_it_speaks_http_and_nothing_else(loop, url):
    with pytest.raises(RuntimeError, match="disabled"):
        run(loop, kore.httpclient(url).get())


@pytest.mark.parametrize("path", ["moved-to-file", "moved-to-ftp"])
def test_redirects_lead_to_http_and_nowhere_else(loop, web, path):
    client = kore.httpclient(f"{web.url}/{path}", curlopt={kore.CURLOPT_FOLLOWLOCATION: 1})
    with pytest.raises(RuntimeError, match="disabled"):
        run(loop, client.get())


@pytest.mark.parametrize("headers", [
    {"x": "a\r\nInjected: yes"}, {"x": "a\nb"}, {"x\r\ny": "a"}, {"x: y": "a"}, {"": "a"}, {"x": "a\0"}, {"x y": "a"},
    {"x\n": ""}, {"@/etc/passwd": ""},
])
def test_headers_that_would_break_out_are_refused(headers):
    with pytest.raises(ValueError, match="not a header field"):
        kore.httpclient("http://localhost/").get(headers=headers)


def test_wrong_arguments():
    client = kore.httpclient("http://localhost/")
    for headers in ([("a", "b")], "a: b", {"a": 1}, {1: "a"}, {"a": b"b"}, {"a": None}):
        with pytest.raises(TypeError, match="headers"):
            client.get(headers=headers)
    for body in ("text", 1, [b"x"]):
        with pytest.raises(TypeError, match="body is bytes"):
            client.post(body=body)
    with pytest.raises(TypeError, match="return_headers"):
        client.get(return_headers="yes")
    with pytest.raises(TypeError):
        client.get(header={})
    with pytest.raises(TypeError, match="url is a str"):
        kore.httpclient(1)
    with pytest.raises(ValueError, match="NUL"):
        kore.httpclient("http://localhost/\0")
    for name in ("tlscert", "tlskey"):
        with pytest.raises(RuntimeError, match="together"):
            kore.httpclient("https://localhost/", **{name: "/x"})
    for name in ("cabundle", "unix"):
        with pytest.raises(TypeError, match=name):
            kore.httpclient("https://localhost/", **{name: 1})
        with pytest.raises(ValueError, match=name):
            kore.httpclient("https://localhost/", **{name: ""})
    with pytest.raises(TypeError, match="tlsverify"):
        kore.httpclient("https://localhost/", tlsverify=None)


class Certificates:
    """A CA, a server's certificate for 127.0.0.1, one for another name, and a client's, as contexts and files."""

    def __init__(self, folder) -> None:
        self.ca = trustme.CA()
        self.ca_file = str(folder / "ca.pem")
        self.ca.cert_pem.write_to_path(self.ca_file)
        client = self.ca.issue_cert("client@example.org")
        self.client_cert, self.client_key = str(folder / "client.pem"), str(folder / "client.key")
        client.cert_chain_pems[0].write_to_path(self.client_cert)
        client.private_key_pem.write_to_path(self.client_key)

    def context(self, name: str = "127.0.0.1", client: bool = False) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.ca.issue_cert(name).configure_cert(context)
        if client:
            context.verify_mode = ssl.CERT_REQUIRED
            context.load_verify_locations(self.ca_file)
        return context


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    return Certificates(tmp_path_factory.mktemp("tls"))


def test_tls_trusts_the_systems_authorities_and_no_others(loop, certificates):
    with peer(context=certificates.context()) as server:
        with pytest.raises(RuntimeError, match=f"{server.url}.*(certificate|SSL).*libcurl error 60"):
            run(loop, kore.httpclient(server.url).get())
        with pytest.raises(RuntimeError, match="libcurl error 60"):
            run(loop, kore.curl(server.url).run())
        assert server.requests == []
        client = kore.httpclient(server.url, cabundle=certificates.ca_file)
        assert run(loop, client.get()) == (200, b"GET /")
        # A connection that somebody else verified, or did not, is not taken over.
        with pytest.raises(RuntimeError, match="libcurl error 60"):
            run(loop, kore.httpclient(server.url).get())
        assert run(loop, kore.httpclient(server.url, tlsverify=False).get()) == (200, b"GET /")
        with pytest.raises(RuntimeError, match="libcurl error 60"):
            run(loop, kore.httpclient(server.url).get())


def test_the_systems_authorities_are_found(loop, certificates, monkeypatch):
    """$SSL_CERT_FILE, else where the system keeps them; and they are what is trusted by default."""
    from kore.clients import easy

    def found():
        easy.ca_files.cache_clear()
        return dict(easy.ca_files())

    try:
        monkeypatch.delenv("SSL_CERT_FILE", raising=False)
        system = found()
        assert not system or os.path.isfile(system[kore.CURLOPT_CAINFO])
        assert system or not any(os.path.isfile(path) for path in easy.CA_BUNDLES)
        monkeypatch.setenv("SSL_CERT_FILE", certificates.ca_file)
        assert found()[kore.CURLOPT_CAINFO] == certificates.ca_file
        with peer(context=certificates.context()) as server:
            assert run(loop, kore.httpclient(server.url).get()) == (200, b"GET /")
            assert run(loop, kore.curl(server.url).run()) == b"GET /"
    finally:
        easy.ca_files.cache_clear()


def test_tls_checks_the_name(loop, certificates):
    with peer(context=certificates.context("another.example.org")) as server:
        with pytest.raises(RuntimeError, match="libcurl error 60"):
            run(loop, kore.httpclient(server.url, cabundle=certificates.ca_file).get())
        assert run(loop, kore.httpclient(server.url, tlsverify=False).get()) == (200, b"GET /")


def test_the_clients_certificate(loop, certificates):
    with peer(context=certificates.context(client=True)) as server:
        with pytest.raises(RuntimeError, match=server.url):
            run(loop, kore.httpclient(server.url, cabundle=certificates.ca_file).get())
        client = kore.httpclient(
            server.url, cabundle=certificates.ca_file, tlscert=certificates.client_cert,
            tlskey=certificates.client_key)
        assert run(loop, client.get()) == (200, b"GET /")
        assert ("email", "client@example.org") in [
            pair for shown in server.certificates if shown for pair in shown["subjectAltName"]]
        missing = kore.httpclient(server.url, tlscert="/none.pem", tlskey="/none.key", tlsverify=False)
        with pytest.raises(RuntimeError, match="none.pem"):
            run(loop, missing.get())


# Sockets.


def test_unix_sockets(loop, web):
    client = kore.httpclient("http://localhost/hello.txt", unix=web.socket)
    assert run(loop, client.get()) == (200, b"hello from nginx\n")
    with pytest.raises(RuntimeError, match="http://localhost/x"):
        run(loop, kore.httpclient("http://localhost/x", unix="/none.sock").get())


def test_abstract_unix_sockets(loop):
    name = f"kore-test-{os.getpid()}"
    with peer(address=f"\0{name}") as server:
        client = kore.httpclient("http://localhost/abstract", unix=f"@{name}")
        assert run(loop, client.get()) == (200, b"GET /abstract")
        assert run(loop, client.get()) == (200, b"GET /abstract")
        assert server.connections == 1
        with pytest.raises(RuntimeError, match="http://localhost/abstract"):
            run(loop, kore.httpclient("http://localhost/abstract", unix="@nobody-has-this").get())


# Limits.


def test_limits(loop):
    with peer(endless) as server:
        with pytest.raises(RuntimeError, match=f"{server.url}.*curl_recv_max"):
            run(loop, kore.httpclient(server.url).get())
    with peer(stall) as server, limited(curl_timeout=1):
        with pytest.raises(RuntimeError, match=f"{server.url}.*libcurl error 28"):
            run(loop, kore.httpclient(server.url).get())
        with pytest.raises(RuntimeError, match="libcurl error 28"):
            run(loop, kore.httpclient(server.url).get(curlopt={kore.CURLOPT_TIMEOUT_MS: 50}))


def test_asyncios_own_timeouts_and_tasks(loop):
    """In a task of asyncio's, too, and cancelled by its timeout."""
    async def both():
        client = kore.httpclient(server.url)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await client.get()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(client.get(), 0.05)

    with peer(stall) as server:
        loop.run_until_complete(both())
