"""Every status the server makes itself, over real sockets: what is said, how it is framed, and what follows."""

from __future__ import annotations

import subprocess
import time

import pytest

from tests.http_server_harness import ENGINES, GET, chunked, request, serving, since

BODY_MAX = 100_000
TEXT = """
@kore.route("/body", domain=home, methods=["post", "put", "patch", "delete", "get"])
def body(req):
    req.response(200, req.body)

@kore.route("/only", domain=home, methods=["post", "delete"])
def only(req):
    req.response(200, b"only")

@kore.route("^/who/([a-z]+)/?([0-9]+)?$", domain=home, methods=["get"])
def who(req, *captures):
    req.response(200, repr((req.host, req.path, req.query, captures)).encode())

@kore.route("/status", domain=home, methods=["get"])
def status(req):
    number, _, body = (req.query or "").partition(",")
    req.response(int(number), body.encode() if body else None)

@kore.route("/early", domain=home, methods=["get"])
def early(req):
    req.response_header("link", "</style.css>")
    req.response(103, None)
    req.response(200, b"late")

named = kore.domain("named.example", attach="plain")
named.route("/", index, methods=["get"])
"""


@pytest.fixture(scope="module", params=ENGINES)
def server(request, tmp_path_factory):
    options = f"kore.config.http_body_max = {BODY_MAX}\nkore.config.http_server_version = 'test/1'"
    with serving(tmp_path_factory.mktemp("status"), request.param, TEXT, options) as made:
        yield made


REFUSED = [
    (400, b"GET / HTTP/1.1\r\nHost: x\r\nA b: c\r\n\r\n"),
    (400, b"GET / HTTP/1.1\r\nHost: x\nA: c\r\n\r\n"),
    (400, b"GET / HTTP/1.1\r\n\r\n"),
    (400, b"GET / HTTP/1.1\r\nHost: x\r\nHost: x\r\n\r\n"),
    (400, b"GET /\r\n\r\n"),
    (400, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"),
    (400, b"POST /body HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n"),
    (400, b"POST /body HTTP/1.1\r\nHost: x\r\nContent-Length: +5\r\n\r\n"),
    (400, b"POST /body HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nx\r\n"),
    (400, b"POST /body HTTP/1.0\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"),
    (413, b"POST /body HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % (BODY_MAX + 1)),
    (413, b"POST /body HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n" % (BODY_MAX + 1)),
    (414, b"GET /%b HTTP/1.1\r\nHost: x\r\n\r\n" % (b"a" * 1998)),
    (417, b"POST /body HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nExpect: a miracle\r\n\r\n"),
    (431, b"GET / HTTP/1.1\r\nHost: x\r\nA: %b\r\n\r\n" % (b"a" * 4096)),
    (431, b"GET / HTTP/1.1\r\nHost: x\r\n" + b"A: b\r\n" * 101 + b"\r\n"),
    (501, b"TRACE / HTTP/1.1\r\nHost: x\r\n\r\n"),
    (501, b"get / HTTP/1.1\r\nHost: x\r\n\r\n"),
    (501, b"POST /body HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip\r\n\r\n"),
    (505, b"GET / HTTP/1.2\r\nHost: x\r\n\r\n"),
    (505, b"GET / HTTP/2.0\r\nHost: x\r\n\r\n"),
]


@pytest.mark.parametrize(("status", "data"), REFUSED, ids=lambda value: str(value)[:60])
def test_what_cannot_be_trusted_gets_a_status_and_a_closed_connection(server, status, data):
    with server.client() as client:
        found = client.ask(data)
        assert (found.status, found.fields["connection"], found.body) == (status, "close", b"")
        assert found.fields["server"] == "test/1"
        client.ended()


def test_a_request_behind_one_that_is_refused_is_never_served(server):
    with server.client() as client:
        client.send(GET + b"GET / HTTP/1.1\r\nHost: \x01\r\n\r\n" + GET)
        assert client.read().status == 200
        assert client.read().status == 400
        client.ended()


def test_a_path_nobody_serves_is_404_and_the_connection_stays(server):
    with server.client() as client:
        found = client.ask(request("/nothing"))
        assert (found.status, found.body) == (404, b"")
        client.alive()


def test_a_host_nobody_serves_is_the_catch_all_and_names_are_found_whatever_their_case(server):
    assert server.ask(b"GET /only HTTP/1.1\r\nHost: named.example\r\n\r\n").status == 404
    assert server.ask(b"GET / HTTP/1.1\r\nHost: NAMED.example.:80\r\n\r\n").body == b"hello"
    assert server.ask(b"GET /only HTTP/1.1\r\nHost: other.example\r\n\r\n").status == 405


def test_a_method_no_route_has_is_405_and_says_which_are_allowed(server):
    with server.client() as client:
        found = client.ask(request("/only"))
        assert (found.status, found.fields["allow"]) == (405, "DELETE, POST")
        found = client.ask(request("/", method="DELETE"))
        assert (found.status, found.fields["allow"]) == (405, "GET, HEAD")
        client.alive()


def test_options_of_the_server_says_what_is_allowed(server):
    with server.client() as client:
        for target in ("*", "http://x"):
            found = client.ask(request(target, method="OPTIONS"))
            assert found.status == 200
            assert found.fields["allow"] == "DELETE, GET, HEAD, PATCH, POST, PUT"
            assert found.body == b""
        client.alive()


def test_a_body_for_a_path_nobody_serves_is_not_waited_for(server):
    with server.client() as client:
        found = client.ask(request("/nothing", "Content-Length: 50000", method="POST"))
        assert (found.status, found.fields["connection"]) == (404, "close")
        client.send(b"x" * 50000)
        client.ended()


def test_head_is_the_get_without_its_body(server):
    with server.client() as client:
        with_body = client.ask(GET)
        without = client.ask(request("/", method="HEAD"), "HEAD")
        assert without.status == 200
        assert {**without.fields, "date": ""} == {**with_body.fields, "date": ""}
        assert without.fields["content-length"] == "5"
        assert client.ask(request("/nothing", method="HEAD"), "HEAD").status == 404
        client.alive()


@pytest.mark.parametrize(("query", "length"), [
    ("204,ignored", None), ("204", None), ("304,ignored", None), ("304", None), ("205", "0"), ("299,x", "1"),
    ("500,own", "3"), ("404", "0"), ("200", "0"), ("999", "0"),
])
def test_statuses_are_framed_as_http_has_them(server, query, length):
    with server.client() as client:
        found = client.ask(request(f"/status?{query}"))
        assert found.status == int(query[:3])
        assert found.fields.get("content-length") == length
        client.alive()


@pytest.mark.parametrize("number", [-1, 0, 99, 1000, 1224, 70000])
def test_what_is_no_status_is_the_handlers_error(server, number):
    with server.client() as client:
        assert client.ask(request("/status?200,abc")).body == b"abc"
        assert client.ask(request(f"/status?{number},ab")).status == 500
        client.alive()


def test_interim_responses_come_before_the_response_and_not_to_http_1_0(server):
    with server.client() as client:
        found = client.ask(request("/early"))
        assert (found.status, found.fields) == (103, {"link": "</style.css>"})
        assert client.read().body == b"late"
        client.alive()
    assert server.ask(request("/early", version="1.0")).body == b"late"


def test_http_1_0_is_answered_in_kind_and_closed(server):
    with server.client() as client:
        found = client.ask(b"GET / HTTP/1.0\r\n\r\n")
        assert found.head.startswith("HTTP/1.0 200 ")
        assert (found.fields["connection"], found.body) == ("close", b"hello")
        client.ended()


def test_http_1_0_is_kept_alive_when_it_asks(server):
    with server.client() as client:
        for _ in range(3):
            found = client.ask(request("/", "Connection: keep-alive", version="1.0"))
            assert (found.fields["connection"], found.fields["keep-alive"]) == ("keep-alive", "timeout=20")
            assert found.body == b"hello"
        assert client.ask(request("/", version="1.0")).fields["connection"] == "close"
        client.ended()


@pytest.mark.parametrize("value", ["close", "Close", "keep-alive, close", "foo,close"])
def test_a_client_that_says_close_gets_it(server, value):
    with server.client() as client:
        found = client.send(request("/", f"Connection: {value}") + GET).read()
        assert (found.fields["connection"], found.body) == ("close", b"hello")
        client.ended()


def test_absolute_form_wins_over_host(server):
    found = server.ask(b"GET http://other.example:81/who/me?a=b?c HTTP/1.1\r\nHost: x\r\n\r\n")
    assert found.body.decode() == repr(("other.example:81", "/who/me", "a=b?c", ("me",)))
    assert server.ask(b"GET /who/me/7 HTTP/1.1\r\nHost: x:80\r\n\r\n").body.decode() == repr(
        ("x:80", "/who/me/7", None, ("me", "7"))
    )


def test_empty_lines_before_a_request_are_passed_over(server):
    with server.client() as client:
        assert client.ask(b"\r\n" + GET).status == 200
        assert client.ask(b"\r\n\r\n" + GET).status == 200


def test_empty_lines_are_counted_however_they_arrive(server):
    with server.client() as client:
        for byte in b"\r\n\r\n":
            client.send(bytes((byte,)))
        assert client.ask(GET).status == 200
        client.alive()
    with server.client() as client:
        for byte in b"\r\n" * 3:
            client.send(bytes((byte,)))
        assert client.read().status == 400
        client.ended()


def test_a_refused_body_of_a_half_closed_client(server):
    """What follows a head that is refused is not looked at, also when the client sent its FIN with it."""
    with server.client() as client:
        client.send(request("/nowhere", method="POST", body=b"x" * 100) + GET).half_close()
        assert client.read().status == 404
        client.ended()
    assert server.ask(GET).status == 200


# --- bodies ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "GET"])
def test_bodies_arrive_whole_whatever_the_method(server, method):
    body = bytes(range(256)) * 20
    with server.client() as client:
        assert client.ask(request("/body", method=method, body=body)).body == body
        assert client.ask(chunked("/body", body[:1], body, body[5:900], method=method)).body == (
            body[:1] + body + body[5:900]
        )
        assert client.ask(request("/body", "Content-Length: 0", method=method)).body == b""
        assert client.ask(chunked("/body", method=method)).body == b""
        assert client.ask(request("/body", method=method)).body == b""
        client.alive()


def test_a_body_may_be_as_long_as_allowed_and_come_in_any_pieces(server):
    body = bytes(i % 251 for i in range(BODY_MAX))
    with server.client() as client:
        data = request("/body", method="POST", body=body)
        for start in range(0, len(data), 9973):
            client.send(data[start : start + 9973])
        assert client.read().body == body
        assert client.ask(chunked("/body", *(body[i : i + 999] for i in range(0, BODY_MAX, 999)))).body == body
        for byte in request("/body", method="POST", body=b"abc") + chunked("/body", b"de", b"f"):
            client.send(bytes([byte]))
        assert (client.read().body, client.read().body) == (b"abc", b"def")
        client.alive()


def test_chunks_that_sum_up_to_too_much_are_refused(server):
    with server.client() as client:
        chunk = b"%x\r\n%b\r\n" % (60000, b"x" * 60000)
        client.send(request("/body", "Transfer-Encoding: chunked", method="POST") + chunk + chunk)
        assert client.read().status == 413
        client.ended()


@pytest.mark.parametrize("head", [
    request("/body", f"Content-Length: {BODY_MAX * 30}", method="POST"),
    request("/nothing", f"Content-Length: {BODY_MAX}", method="POST"),
    request("/body", "Transfer-Encoding: chunked", method="POST") + b"zz\r\n",
])
def test_the_status_is_read_by_a_client_that_goes_on_sending(server, head):
    with server.client() as client:
        client.send(head)
        block = b"x" * 65536
        for _ in range(45):
            client.send(block)
        found = client.read()
        assert found.status in (400, 404, 413)
        client.half_close().ended()


def test_a_client_that_never_stops_sending_is_not_listened_to_for_ever(server):
    with server.client() as client:
        client.send(request("/body", f"Content-Length: {BODY_MAX * 1000}", method="POST"))
        begin = time.monotonic()
        with pytest.raises(OSError):
            while since(begin) < 10:
                client.send(b"x" * 4096)
        assert since(begin) < 4


# --- Expect ----------------------------------------------------------------------------------------------------


def test_a_client_that_waits_for_leave_gets_it_once(server):
    with server.client() as client:
        head = request("/body", "Content-Length: 5", "Expect: 100-Continue", method="POST")
        assert client.ask(head).head == "HTTP/1.1 100 Continue"
        client.send(b"he")
        assert client.ask(b"llo").body == b"hello"
        assert client.ask(request("/body", "Expect: 100-continue", "Transfer-Encoding: chunked", method="POST")
                          ).status == 100
        assert client.ask(b"1\r\na\r\n0\r\n\r\n").body == b"a"
        client.alive()


def test_a_body_that_comes_without_waiting_needs_no_leave(server):
    with server.client() as client:
        found = client.ask(request("/body", "Expect: 100-continue", method="POST", body=b"hello"))
        assert (found.status, found.body) == (200, b"hello")
        client.alive()


def test_leave_is_not_given_to_what_is_refused(server):
    for head, status in (
        (request("/body", f"Content-Length: {BODY_MAX + 1}", "Expect: 100-continue", method="POST"), 413),
        (request("/nothing", "Content-Length: 5", "Expect: 100-continue", method="POST"), 404),
        (request("/", "Content-Length: 5", "Expect: 100-continue", method="PUT"), 405),
    ):
        with server.client() as client:
            found = client.ask(head)
            assert (found.status, found.fields["connection"]) == (status, "close")
            client.ended()


def test_expect_means_nothing_to_http_1_0_and_without_a_body(server):
    with server.client() as client:
        found = client.ask(request("/body", "Expect: 100-continue", method="POST", body=b"x", version="1.0"))
        assert (found.status, found.body) == (200, b"x")
    with server.client() as client:
        assert client.ask(request("/", "Expect: 100-continue")).status == 200


def test_curl_uploads_with_expect(server, tmp_path):
    (tmp_path / "upload").write_bytes(b"0123456789" * 9000)
    url = "http://{}:{}/body".format(*server.address)
    for options in (["-H", "Expect: 100-continue"], ["-H", "Transfer-Encoding: chunked"], ["--http1.0"]):
        done = subprocess.run(
            ["curl", "-sS", "-v", "--max-time", "10", *options, "--data-binary", f"@{tmp_path}/upload", url],
            capture_output=True, timeout=20, check=True,
        )  # fmt: skip
        assert done.stdout == b"0123456789" * 9000
        assert (b"HTTP/1.1 100 Continue" in done.stderr) == (options[1:] == ["Expect: 100-continue"])


def test_the_worker_is_the_one_it_was(server):
    server.unharmed()
