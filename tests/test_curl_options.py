"""The names of kore.CURLOPT_*: libcurl's own numbers, the kinds of values, and that libcurl itself decides on each."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest

import kore
from kore.clients import curl_options, easy
from kore.clients.curl_options import LISTS, NAMES, NUMBERS, TEXTS

pycurl = pytest.importorskip("pycurl")

REFUSED = set(NAMES) - TEXTS - NUMBERS - LISTS

# What a libcurl may have been built without, or have given up since 7.71; it has to say so itself.
OPTIONAL = {
    "CURLOPT_KRBLEVEL", "CURLOPT_RANDOM_FILE", "CURLOPT_EGDSOCKET", "CURLOPT_SSLENGINE", "CURLOPT_SSLENGINE_DEFAULT",
    "CURLOPT_DNS_SERVERS", "CURLOPT_DNS_INTERFACE", "CURLOPT_DNS_LOCAL_IP4", "CURLOPT_DNS_LOCAL_IP6",
    "CURLOPT_TLSAUTH_USERNAME", "CURLOPT_TLSAUTH_PASSWORD", "CURLOPT_TLSAUTH_TYPE", "CURLOPT_PROXY_TLSAUTH_USERNAME",
    "CURLOPT_PROXY_TLSAUTH_PASSWORD", "CURLOPT_PROXY_TLSAUTH_TYPE", "CURLOPT_OBSOLETE72", "CURLOPT_SSL_FALSESTART",
    "CURLOPT_DNS_USE_GLOBAL_CACHE", "CURLOPT_SSL_ENABLE_NPN", "CURLOPT_DOH_URL", "CURLOPT_ALTSVC",
    "CURLOPT_ALTSVC_CTRL", "CURLOPT_SSL_VERIFYSTATUS", "CURLOPT_PROXY_ISSUERCERT", "CURLOPT_SSH_COMPRESSION",
}  # fmt: skip


def test_there_are_as_many_as_the_reference_has():
    """Kore-api.md 22 counts them by kind."""
    assert (len(NAMES), len(TEXTS), len(NUMBERS), len(LISTS), len(REFUSED)) == (279, 83, 122, 10, 64)


def test_what_type_checkers_read_are_all_the_names():
    defined = {name: number for name, number in vars(curl_options).items() if name.startswith("CURLOPT_")}
    assert sorted(defined) == sorted(curl_options.__all__)
    assert {name: getattr(kore, name) for name in defined} == defined
    assert kore.CURLOPT_URL == 2
    assert kore.CURLOPT_MAIL_RCPT_ALLLOWFAILS == 290


def test_the_numbers_and_kinds_are_those_of_libcurl():
    """pycurl has most of them with the offset that says the kind; curl.h has 20000 for functions, 30000 for 64 bits."""
    known = {name: getattr(pycurl, name[8:]) for name in curl_options.__all__ if hasattr(pycurl, name[8:])}
    # Under these names pycurl has the options of 64 bits.
    large = ("INFILESIZE", "RESUME_FROM", "MAXFILESIZE", "POSTFIELDSIZE")
    known |= {f"CURLOPT_{name}_LARGE": known.pop(f"CURLOPT_{name}") for name in large}
    assert len(known) > 200
    for name, number in known.items():
        assert number % 10000 == getattr(curl_options, name), name
        assert (number < 10000) == (number in NUMBERS), name
    assert all(10000 <= known[NAMES[number]] < 20000 for number in TEXTS | LISTS if NAMES[number] in known)


def outcome(number: int, value: object) -> str:
    try:
        kore.curl("http://127.0.0.1/").setopt(number, value)
    except RuntimeError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", [NAMES[number] for number in sorted(TEXTS)])
def test_texts(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # some name files, which libcurl writes when the handle goes
    said = outcome(getattr(kore, name), "1")
    assert not said or (name in OPTIONAL and "libcurl error" in said), said
    assert "is a str, not int" in outcome(getattr(kore, name), 1)


@pytest.mark.parametrize("name", [NAMES[number] for number in sorted(NUMBERS)])
def test_numbers(name):
    said = outcome(getattr(kore, name), 1)
    assert not said or (name in OPTIONAL and "libcurl error" in said), said
    assert "is an int, not str" in outcome(getattr(kore, name), "1")


@pytest.mark.parametrize("name", [NAMES[number] for number in sorted(LISTS)])
def test_lists(name):
    assert not outcome(getattr(kore, name), ["a:b:c"])
    assert not outcome(getattr(kore, name), [])
    assert "takes a list" in outcome(getattr(kore, name), "a:b:c")
    assert "is a str, not bytes" in outcome(getattr(kore, name), [b"a"])


@pytest.mark.parametrize("name", [NAMES[number] for number in sorted(REFUSED)])
@pytest.mark.parametrize("value", ["1", 1, ["1"], None, len])
def test_what_takes_pointers_is_refused(name, value):
    assert "takes a C function, a pointer or a structure" in outcome(getattr(kore, name), value)


@pytest.mark.parametrize("number", [0, -1, 5000, 10002, 298, 2**70])
def test_unknown_numbers(number):
    assert "is no libcurl option" in outcome(number, "1")


def test_wrong_arguments():
    handle = kore.curl("http://127.0.0.1/")
    with pytest.raises(TypeError, match="not str"):
        handle.setopt("URL", "x")
    with pytest.raises(ValueError, match="NUL"):
        handle.setopt(kore.CURLOPT_USERAGENT, "a\0b")
    with pytest.raises(RuntimeError, match="C long"):
        handle.setopt(kore.CURLOPT_TIMEOUT, 2**64)
    with pytest.raises(RuntimeError, match="libcurl error 43"):
        handle.setopt(kore.CURLOPT_TIMEOUT, -5)
    assert handle.setopt(kore.CURLOPT_FOLLOWLOCATION, True) is True
    assert handle.setopt(kore.CURLOPT_USERAGENT, "gr\u00fc\u00df dich") is True


def test_a_refusal_does_not_repeat_the_value():
    """It may be a password."""
    handle = kore.curl("http://127.0.0.1/")
    with pytest.raises(RuntimeError) as caught:
        handle.setopt(kore.CURLOPT_SSLENGINE, "secret")
    assert "secret" not in str(caught.value)


def test_without_libcurls_own_setopt_pycurl_decides(monkeypatch):
    """A pycurl that was linked statically: what it does not know is refused by name."""
    monkeypatch.setattr(easy, "_libcurl", lambda: None)
    assert not outcome(kore.CURLOPT_USERAGENT, "x")
    assert "CURLOPT_ABSTRACT_UNIX_SOCKET" in outcome(kore.CURLOPT_ABSTRACT_UNIX_SOCKET, "x")


def test_the_handle_inside_is_found_by_its_magic_number():
    """What `curl_easy_setopt` is given is the handle that pycurl uses, and nothing else is taken for one."""
    assert easy._libcurl() is not None
    handles = [pycurl.Curl() for _ in range(3)]
    assert len({easy._handle(handle) for handle in handles} - {None}) == 3
    assert easy._handle(pycurl.CurlMulti()) is None


def test_where_pycurl_is_missing_the_first_use_says_what_to_install():
    code = """
import sys
sys.modules["pycurl"] = None  # how Python marks a module that can't be imported
import kore
from kore import *
for make in (kore.curl, kore.httpclient):
    try:
        make("http://localhost/")
    except RuntimeError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.count("pip install 'kore[transfers]'") == 2


def test_a_libcurl_that_would_block_is_refused(monkeypatch):
    """One that resolves names in the calling thread: no such build is at hand, so this stands in for it."""
    built = SimpleNamespace(version="PycURL/1", version_info=lambda: (1, "1", 0, "", 0), VERSION_ASYNCHDNS=1 << 7)
    monkeypatch.setitem(sys.modules, "pycurl", built)
    easy.pycurl.cache_clear()
    try:
        with pytest.raises(RuntimeError, match="AsynchDNS"):
            kore.curl("http://localhost/")
    finally:
        easy.pycurl.cache_clear()
