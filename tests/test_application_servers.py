"""kore.server: sockets are bound and listening when the call returns, or the error says what to do."""

from __future__ import annotations

import os
import socket
import stat

import pytest

from kore.application.declared import application
from kore.application.servers import ListenError, SocketFile, server
from kore.errors import StartError
from tests.support import free_port


@pytest.fixture(autouse=True)
def clean():
    """Every test starts with nothing declared and leaves no listener open."""
    application.reset()
    yield
    application.reset()


def only():
    (listener,) = application.listeners.values()
    return listener


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as sock:
            sock.bind(("::1", 0))
    except OSError:
        return False
    return True


needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="no IPv6 address ::1 on this machine")


@pytest.mark.parametrize(
    ("arguments", "name"), [(("notls",), "notls"), ((), "default")], ids=["positional", "default"]
)
def test_the_name_is_positional_or_by_keyword(arguments, name):
    assert server(*arguments, ip="127.0.0.1", port="0", tls=False) is None
    assert list(application.listeners) == [name]
    server(name="other", ip="127.0.0.1", port=0, tls=False)
    assert list(application.listeners) == [name, "other"]


def test_it_listens_at_once_with_the_options_of_a_server():
    server(ip="127.0.0.1", port=0, tls=False)
    sock = only().sock
    assert only().url == f"http://127.0.0.1:{sock.getsockname()[1]}"
    assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) == 1
    assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR) == 1
    assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
    assert not sock.get_inheritable()
    assert not sock.getblocking()
    with socket.create_connection(sock.getsockname(), timeout=5):
        accepted, _ = sock.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1


@pytest.mark.parametrize("make", [int, str])
def test_the_port_is_a_number_or_its_text(make):
    port = free_port()
    server(ip="127.0.0.1", port=make(port), tls=False)
    assert only().sock.getsockname() == ("127.0.0.1", port)


@needs_ipv6
def test_ipv6():
    server(ip="::1", port=0, tls=False)
    assert only().sock.family == socket.AF_INET6
    assert only().url == f"http://[::1]:{only().sock.getsockname()[1]}"
    with socket.create_connection(only().sock.getsockname()[:2], timeout=5):
        pass


def test_a_host_name_is_resolved():
    server(ip="localhost", port=0, tls=False)
    assert only().sock.getsockname()[0] in ("127.0.0.1", "::1")


@pytest.mark.parametrize("given", [True, 1, "yes", "True"])
def test_tls_is_on_by_every_word_for_it(given):
    server(ip="127.0.0.1", port=0, tls=given)
    assert only().tls is True
    assert only().url.startswith("https://")


@pytest.mark.parametrize("given", [False, 0, "no", "False", "0"])
def test_tls_is_off_by_every_word_for_it(given):
    server(ip="127.0.0.1", port=0, tls=given)
    assert only().tls is False


def test_tls_is_on_by_default():
    server(ip="127.0.0.1", port=0)
    assert only().tls is True


def test_a_unix_socket_replaces_a_socket_file_and_removes_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "web.sock"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    server("u", path="web.sock", tls=False)
    assert only().url == f"unix:{path}"
    assert stat.S_ISSOCK(os.lstat(path).st_mode)
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(5)
        client.connect(str(path))
    monkeypatch.chdir("/")
    application.reset()
    assert not path.exists()


def test_a_socket_file_that_another_server_made_since_is_left_alone(tmp_path):
    path = tmp_path / "web.sock"
    server("old", path=path, tls=False)
    old = only()
    application.listeners.clear()
    server("new", path=path, tls=False)
    old.close()
    assert path.exists()
    SocketFile(str(tmp_path / "gone"), 1, 1).unlink()


def test_a_file_that_is_no_socket_is_never_removed(tmp_path):
    for name, make in (("file", lambda p: p.write_text("precious")), ("dir", lambda p: p.mkdir())):
        path = tmp_path / name
        make(path)
        with pytest.raises(RuntimeError, match="the file exists; it is no socket"):
            server(path=str(path), tls=False)
        assert path.exists()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "file")
    with pytest.raises(RuntimeError, match="no socket"):
        server(path=link, tls=False)
    assert (tmp_path / "file").read_text() == "precious"


def test_an_abstract_unix_socket_has_no_file():
    name = f"@kore-test-{os.getpid()}"
    server(path=name, tls=False)
    assert only().url == f"unix:{name}"
    assert only().socket_file is None
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(5)
        client.connect("\0" + name[1:])


@pytest.mark.parametrize(
    ("keywords", "words"),
    [
        ({}, "either ip and port, or path"),
        ({"port": "8888"}, "either ip and port, or path"),
        ({"ip": "127.0.0.1", "port": 1, "path": "/x"}, "either ip and port, or path"),
        ({"ip": "127.0.0.1"}, "port is an integer from 0 to 65535, not None"),
        ({"ip": "127.0.0.1", "port": "http"}, "port is an integer"),
        ({"ip": "127.0.0.1", "port": ""}, "port is an integer"),
        ({"ip": "127.0.0.1", "port": -1}, "port is an integer"),
        ({"ip": "127.0.0.1", "port": 65536}, "port is an integer"),
        ({"ip": "127.0.0.1", "port": "65536"}, "port is an integer"),
        ({"ip": "127.0.0.1", "port": True}, "port is an integer"),
        ({"ip": "127.0.0.1", "port": 80.0}, "port is an integer"),
        ({"ip": "", "port": 80}, "empty"),
        ({"ip": "no.such.host.invalid", "port": 80}, "cannot resolve ip 'no.such.host.invalid'"),
        ({"ip": "a" * 300, "port": 80}, "cannot resolve"),
        ({"ip": "192.0.2.1", "port": 0}, r"192\.0\.2\.1:0: Cannot assign requested address \(errno 99\); no interface"),
        ({"path": "/nonexistent-directory/x.sock"}, "No such file or directory .* create it"),
        ({"path": "/tmp/" + "x" * 200}, "too long; at most 107 bytes"),
    ],
)
def test_what_cannot_be_listened_on_is_a_runtime_error_that_says_why(keywords, words):
    with pytest.raises(RuntimeError, match=rf"^server 'default': .*{words}") as caught:
        server(tls=False, **keywords)
    assert isinstance(caught.value, StartError), "what starts the server prints it as one line"
    assert "\n" not in str(caught.value)
    assert application.listeners == {}


@pytest.mark.parametrize(
    "keywords",
    [
        {"name": 5, "ip": "127.0.0.1", "port": 0},
        {"ip": 5, "port": 0},
        {"path": 5},
        {"ip": "127.0.0.1", "port": 0, "tls": "perhaps"},
        {"ip": "127.0.0.1", "port": 0, "tls": None},
        {"ip": "127.0.0.1", "port": 0, "backlog": 5},
    ],
)
def test_arguments_of_the_wrong_type_are_type_errors(keywords):
    with pytest.raises(TypeError):
        server(**keywords)
    assert application.listeners == {}


def test_a_port_in_use_names_address_and_advice_and_leaves_the_name_free():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ListenError) as caught:
            server("web", ip="127.0.0.1", port=port, tls=False)
    assert str(caught.value) == (
        f"server 'web': cannot listen on 127.0.0.1:{port}: Address already in use (errno 98); "
        "another program listens there: stop it or choose another address"
    )
    server("web", ip="127.0.0.1", port=0, tls=False)


def test_a_name_is_given_once():
    server("web", ip="127.0.0.1", port=0, tls=False)
    with pytest.raises(RuntimeError, match="server 'web': there is one of that name already"):
        server("web", ip="127.0.0.1", port=0, tls=False)
    assert len(application.listeners) == 1


def test_after_the_start_it_is_too_late():
    application.frozen = True
    with pytest.raises(RuntimeError, match="server: must be called before the server starts"):
        server(ip="127.0.0.1", port=0, tls=False)
