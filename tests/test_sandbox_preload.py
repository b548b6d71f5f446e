"""Behind a chroot a worker still does all that Python and kore do late; in development, late imports are told of."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import time

import pytest

from kore.sandbox import preload
from tests.http_server_harness import ENGINES, chunked, request
from tests.privileges_harness import a_user, confined, needs_root, options, refusal, root_directory
from tests.support import ROOT, http_get, starter, wait_until

LATE = r"""
def answer(name, text):
    exec("def handler(req):\n" + "\n".join("    " + line for line in text.split("; ")), globals())
    kore.route("/" + name, domain=home, methods=["get"])(globals().pop("handler"))

answer("json", "import json; req.response(200, json.dumps({'a': 1}).encode())")
answer("codec", "req.response(200, 'я€'.encode('koi8-r', 'replace') + 'あ'.encode('shift_jis') + 'ß'.encode('cp273'))")
answer("punycode", "req.response(200, 'bücher'.encode('punycode'))")
answer("idna", "req.response(200, 'bücher.example'.encode('idna'))")
answer("zone", "from datetime import datetime; from zoneinfo import ZoneInfo; "
       "req.response(200, datetime(2024, 7, 1, tzinfo=ZoneInfo('Europe/Amsterdam')).isoformat().encode())")
answer("local", "import time; req.response(200, repr((time.mktime((2024, 7, 1, 12, 0, 0, 0, 0, -1)), "
       "time.localtime(1719828000).tm_hour)).encode())")
answer("strptime", "import time; req.response(200, time.strftime('%Y', time.strptime('2024', '%Y')).encode())")
answer("hash", "import hashlib; req.response(200, hashlib.new('sha3_256', b'x').hexdigest().encode())")
answer("mail", "from email.message import EmailMessage; m = EmailMessage(); m['Subject'] = 'ü'; m.set_content('x'); "
       "req.response(200, bytes(m))")
answer("xml", "import xml.etree.ElementTree as t; req.response(200, t.tostring(t.fromstring('<a/>')))")
answer("sqlite", "import sqlite3; db = sqlite3.connect(':memory:'); "
       "req.response(200, str(db.execute('select 7').fetchone()).encode())")
answer("decimal", "from decimal import Decimal; req.response(200, str(Decimal('1.10') + 1).encode())")
answer("here", "import os; req.response(200, ','.join(sorted(os.listdir('/'))).encode())")

@kore.route("/trace", domain=home, methods=["get"])
def trace(req):
    import traceback
    try:
        {}["missing"]  # the line to be shown
    except KeyError:
        req.response(200, traceback.format_exc().encode())

@kore.route("/resolve", domain=home, methods=["get"])
async def resolve(req):
    import asyncio
    found = await asyncio.get_running_loop().getaddrinfo("127.0.0.1", 80)
    req.response(200, str(found[0][4]).encode())

@kore.route("/thread", domain=home, methods=["get"])
async def thread(req):
    import asyncio
    req.response(200, str(await asyncio.to_thread(len, "four")).encode())

@kore.route("/form", domain=home, methods=["post"])
def form(req):
    req.populate_multi()
    req.response(200, req.file_lookup("f").read(1000)[1])

@kore.route("/body", domain=home, methods=["post"])
def body(req):
    found = os.stat(req.body_path)
    req.response(200, f"{found.st_size} {found.st_uid} {found.st_mode & 0o777:o}".encode())
"""
"""Handlers that each do something for which Python loads a file where it is done."""

WATCHED = """
from kore.sandbox import preload

def kore_worker_configure():
    preload.watch_imports(lambda text: kore.log(kore.LOG_INFO, "late: " + text), own="/nowhere")
"""


@pytest.fixture(params=ENGINES)
def engine(request):
    return request.param


@needs_root
def test_what_python_does_late_works_behind_a_chroot(tmp_path, engine):
    offload = "kore.config.http_body_disk_offload = 10"
    with confined(tmp_path, engine, LATE + WATCHED, offload) as server:

        def ask(name: str) -> bytes:
            found = server.ask(request("/" + name))
            assert found.status == 200, (name, server.program.out)
            return found.body

        assert ask("json") == b'{"a": 1}'
        assert ask("codec") == "я?".encode("koi8-r") + "あ".encode("shift_jis") + "ß".encode("cp273")
        assert ask("punycode") == b"bcher-kva"
        assert ask("idna") == b"xn--bcher-kva.example"
        assert ask("zone") == b"2024-07-01T00:00:00+02:00"
        moment = (time.mktime((2024, 7, 1, 12, 0, 0, 0, 0, -1)), time.localtime(1719828000).tm_hour)
        assert ask("local").decode() == repr(moment)
        assert ask("strptime") == b"2024"
        assert len(ask("hash")) == 64
        assert b"Subject: =?utf-8?" in ask("mail")
        assert ask("xml") == b"<a />"
        assert ask("sqlite") == b"(7,)"
        assert ask("decimal") == b"2.10"
        assert ask("here") == b"tmp_files"
        trace = ask("trace").decode()
        assert f'File "{tmp_path}/app.py", line ' in trace
        assert '{}["missing"]  # the line to be shown' in trace
        assert ask("resolve") == b"('127.0.0.1', 80)"
        assert ask("thread") == b"4"
        form = b'--x\r\nContent-Disposition: form-data; name="f"; filename="n"\r\n\r\nhello\r\n--x--\r\n'
        posted = request("/form", "Content-Type: multipart/form-data; boundary=x", method="POST", body=form)
        assert server.ask(posted).body == b"hello"
        assert server.ask(chunked("/body", b"x" * 5000, b"y" * 5000)).body.decode() == f"10000 {a_user().pw_uid} 600"
        assert "late: " not in server.program.out, "something was not loaded before"


@needs_root
def test_websockets_mounts_messages_and_json_logs_need_no_file(tmp_path, engine):
    """What kore itself loads when it is first used."""
    text = """
async def app(scope, receive, send):
    if scope["type"] != "http":
        return
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"mounted"})

kore.asgi(app, path="/app", domain=home)

@kore.route("/ws", domain=home, methods=["get"])
def ws(req):
    req.websocket_handshake(None, lambda c, op, data: c.websocket_send(op, data), None)

def kore_worker_signal(number):
    pass
home.accesslog = "access.log"
home.accesslog_format = "json"
"""
    with confined(tmp_path, engine, text + WATCHED) as server:
        assert server.ask(request("/app/")).body == b"mounted"
        with server.client() as client:
            key = "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="
            client.send(request("/ws", "Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Version: 13", key))
            assert client.sock.recv(1000).startswith(b"HTTP/1.1 101 ")
            client.send(b"\x81\x82\x00\x00\x00\x00hi")
            assert client.sock.recv(4) == b"\x81\x02hi"
        wait_until(lambda: (tmp_path / "access.log").stat().st_size, "a line of the access log")
        assert json.loads((tmp_path / "access.log").read_text().splitlines()[0])["path"] == "/app/"
        assert "late: " not in server.program.out, "something was not loaded before"


@needs_root
def test_a_transfer_behind_a_chroot(tmp_path, engine):
    pytest.importorskip("pycurl")
    text = """
@kore.route("/fetch", domain=home, methods=["get"])
async def fetch(req):
    client = kore.httpclient(f"http://127.0.0.1:{port}/")
    status, body = await client.get()
    req.response(status, body)
"""
    text += "port = next(iter(home.listener.url.rsplit(':', 1)[1:]))\n"
    lines = "kore.config.sandbox_connect = 'any'"
    with confined(tmp_path, engine, text + WATCHED, lines) as server:
        assert server.ask(request("/fetch")).body == b"hello"
        assert "late: " not in server.program.out


@needs_root
def test_files_are_the_same_before_and_after_the_chroot(tmp_path, engine):
    root = root_directory(tmp_path)
    for release in ("one", "two"):
        (root / release).mkdir()
        (root / release / "f.txt").write_text(release)
    (root / "current").symlink_to("one")
    (root / "deep").mkdir()
    (root / "deep" / "f.txt").write_text("deep")
    large = os.urandom(300_000)
    (root / "deep" / "large.bin").write_bytes(large)
    text = f"""
home.filemaps({{
    "/relative/": "current", "/absolute/": "{root}/deep", "/dots/": "deep/../one", "/all/": ".",
}})
"""
    with confined(tmp_path, engine, text) as server:
        for url, wanted in (("relative", "one"), ("absolute", "deep"), ("dots", "one"), ("all/two", "two")):
            assert server.ask(request(f"/{url}/f.txt")).body == wanted.encode(), url
        assert server.ask(request("/absolute/large.bin")).body == large
        assert server.ask(request("/relative/none")).status == 404
        (root / "new").symlink_to("two")
        os.rename(root / "new", root / "current")
        wait_until(lambda: server.ask(request("/relative/f.txt")).body == b"two", "the link leads to the other release")


@needs_root
@pytest.mark.parametrize("twin", [False, True])
@pytest.mark.parametrize("target", ["{outside}", "../outside", "link", "sub/../../outside"])
def test_files_outside_the_root_are_refused_at_the_start(tmp_path, target, twin):
    """With a `twin` of the same name inside the root too: another directory is not what was meant."""
    root = root_directory(tmp_path)
    outside = tmp_path / "outside"
    outside.mkdir()
    if twin:
        (root / str(outside).lstrip("/")).mkdir(parents=True)
    (root / "sub").mkdir()
    (root / "link").symlink_to(outside)
    where = target.format(outside=outside)
    with starter(tmp_path) as programs:
        program = programs.serve(
            f"home.filemaps({{'/f/': {where!r}}})", options=options(root), deployment="docker", wait=False
        )
        assert f"filemaps '/f/': {where} is not inside the root {root} of the workers" in refusal(program)


@needs_root
@pytest.mark.parametrize("path", ["bodies/deep", "{root}/bodies/deep", "/bodies/deep"])
def test_the_directory_for_bodies_is_made_for_the_user_below_the_root(tmp_path, engine, path):
    root = root_directory(tmp_path)
    lines = [f"kore.config.http_body_disk_path = {path.format(root=root)!r}", "kore.config.http_body_disk_offload = 10"]
    with confined(tmp_path, engine, LATE, *lines) as server:
        found = (root / "bodies" / "deep").stat()
        assert (found.st_uid, found.st_gid, found.st_mode & 0o777) == (a_user().pw_uid, a_user().pw_gid, 0o700)
        assert server.ask(chunked("/body", b"x" * 5000)).body.startswith(b"5000 ")
        assert not os.path.exists("/bodies")


@needs_root
def test_the_directory_for_bodies_is_not_made_through_a_link(tmp_path):
    """Who may write into the root must not have root make directories elsewhere."""
    root = root_directory(tmp_path)
    outside = tmp_path / "outside"
    outside.mkdir()
    (root / "link").symlink_to(outside)
    lines = "\nkore.config.http_body_disk_path = 'link/inner'\nkore.config.http_body_disk_offload = 10"
    with starter(tmp_path) as programs:
        program = programs.serve(options=options(root) + lines, deployment="docker", wait=False)
        assert program.wait() != 0
        assert list(outside.iterdir()) == []


LATE_IMPORTS = """
@kore.route("/late", domain=home, methods=["get"])
def late(req):
    import beside
    import colorsys
    "x".encode("koi8-r")
    req.response(200, b"done")
"""


def test_in_development_late_imports_are_told_of_once(tmp_path, engine):
    (tmp_path / "beside.py").write_text("import wave\n")
    with starter(tmp_path) as programs:
        program = programs.serve(LATE_IMPORTS, workers=1, io=engine)
        address = program.address
        for _ in range(2):
            assert http_get(address, "/late").endswith(b"done")
        source = (tmp_path / "app.py").read_text().splitlines()
        line = source.index("    import beside") + 1
        file = tmp_path / "app.py"
        program.wait_for(rf"log=\[{file}:{line} imports beside after the start\]")
        program.wait_for(rf"log=\[{tmp_path}/beside.py:1 imports wave after the start \(in a chroot it is")
        program.wait_for(rf"log=\[{file}:{line + 1} imports colorsys after the start \(in a chroot")
        program.wait_for(rf"log=\[{file}:{line + 2} imports encodings.koi8_r after the start \(in a chroot")
        assert program.out.count("imports beside") == 1
        assert "/kore/" not in "".join(part for part in program.out.splitlines() if "after the start" in part)


def test_elsewhere_nothing_is_told_of(tmp_path):
    (tmp_path / "beside.py").write_text("")
    with starter(tmp_path) as programs:
        program = programs.serve(LATE_IMPORTS, "-rn", deployment="docker", workers=1)
        assert http_get(program.address, "/late").endswith(b"done")
        program.stop()
        assert "after the start" not in program.out


def test_a_server_in_development_loads_nothing_of_the_sandbox_ahead(tmp_path):
    """It costs nothing where it is off: no codec, no time zone, no preload module in the parent."""
    text = """
import sys
NAMES = {'prctl', 'kore.sandbox.preload', 'encodings.koi8_r', 'zoneinfo', 'sqlite3'}
def kore_worker_configure():
    kore.log(kore.LOG_INFO, f"loaded: {sorted(NAMES.intersection(sys.modules))}")
"""
    with starter(tmp_path) as programs:
        program = programs.serve(text, workers=1)
        program.wait_for(r"log=\[loaded: \[\]\]")


def run(script: str) -> str:
    """What a fresh Python prints."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_every_listed_module_of_the_library_loads_and_says_nothing():
    """A name that no Python has would be a mistake that nobody notices."""
    missing = run("""
        import sys, warnings
        warnings.simplefilter("error")
        from kore.sandbox import preload
        preload.library()
        preload.extensions()
        names = [name for name in preload.LIBRARY.split() if name not in sys.modules]
        print(*[name for name in names if not name.startswith("_")])
    """)
    assert missing == ""


@pytest.mark.skipif(not os.path.exists("/etc/localtime"), reason="no /etc/localtime: there is no zone to lose")
def test_the_local_time_zone_is_pinned_unless_it_is_named():
    """mktime(3) would look for /etc/localtime again, and find none in a chroot; glibc keeps what TZ still says."""
    script = """
        import os
        os.environ.pop("TZ", None)
        if {named!r}:
            os.environ["TZ"] = {named!r}
        from kore.sandbox import preload
        preload.time_zones()
        print(os.environ["TZ"])
    """
    assert run(script.format(named="")) == ":/etc/localtime"
    assert run(script.format(named="Europe/Amsterdam")) == "Europe/Amsterdam"


def test_a_package_is_loaded_whole_but_for_what_is_left_out(tmp_path, monkeypatch):
    folder = tmp_path / "parcel"
    (folder / "inner").mkdir(parents=True)
    for name in ("__init__", "one", "two", "inner/__init__", "inner/three"):
        (folder / f"{name}.py").write_text("")
    (folder / "broken.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    preload.package("parcel", leave_out=["two"])
    found = {name for name in sys.modules if name.startswith("parcel")}
    for name in found:
        monkeypatch.delitem(sys.modules, name)
    assert found == {"parcel", "parcel.one", "parcel.inner", "parcel.inner.three"}
    preload.package("no_such_package")


def test_sources_are_kept_though_the_files_are_gone(tmp_path, monkeypatch):
    import linecache

    (tmp_path / "going.py").write_text("first = 1\nsecond = 2\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    import going  # type: ignore[import-not-found]

    preload.sources([str(tmp_path)])
    assert preload.mentions(str(tmp_path), ["second"])
    assert not preload.mentions(str(tmp_path), ["third"])
    os.unlink(going.__file__)
    linecache.checkcache(going.__file__)
    assert linecache.getline(going.__file__, 2) == "second = 2\n"
    del linecache.cache[going.__file__], sys.modules["going"]
