"""``import kore`` shows the names of the reference with their values, quickly, and brings in nothing optional."""

from __future__ import annotations

import ast
import inspect
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import kore
from kore.clients import curl_options

ROOT = Path(__file__).resolve().parents[1]

# Kore-api.md 5.1: part of the interface, compared with plain numbers by applications.
CONSTANTS = {
    "LOG_ERR": 3, "LOG_NOTICE": 5, "LOG_INFO": 6, "RESULT_ERROR": 0, "RESULT_OK": 1, "RESULT_RETRY": 2,
    "MODULE_LOAD": 1, "MODULE_UNLOAD": 2, "TIMER_ONESHOT": 1, "CONN_PROTO_UNKNOWN": 0, "CONN_PROTO_HTTP": 1,
    "CONN_PROTO_WEBSOCKET": 2, "CONN_STATE_ESTABLISHED": 2, "HTTP_METHOD_GET": 1, "HTTP_METHOD_POST": 2,
    "HTTP_METHOD_PUT": 4, "HTTP_METHOD_DELETE": 16, "HTTP_METHOD_HEAD": 32, "HTTP_METHOD_OPTIONS": 64,
    "HTTP_METHOD_PATCH": 128, "WEBSOCKET_OP_TEXT": 1, "WEBSOCKET_OP_BINARY": 2, "WEBSOCKET_BROADCAST_LOCAL": 1,
    "WEBSOCKET_BROADCAST_GLOBAL": 2,
}  # fmt: skip

# Kore-api.md 5.3.
FUNCTIONS = {
    "app", "coroname", "corotrace", "curl", "dbquery", "dbsetup", "domain", "fatal", "fatalx", "gather", "httpclient",
    "lock", "log", "prerequest", "privsep",
    "proc", "queue", "route", "sendobj", "server", "setname", "shutdown", "sigtrap", "socket_wrap", "suspend",
    "task_create", "task_id", "task_kill", "time", "timer", "tracer", "websocket_broadcast", "worker",
}  # fmt: skip

# What the reference does not have.
ADDED = {"asgi", "dblisten", "dbtransaction"}

# Kore-api.md 5.2: the exported type objects and the names they show.
TYPES = {
    "pycurlhandle": "kore.curl", "pydomain": "kore.domain", "pyhttp_file": "kore.http_file",
    "pyhttp_request": "kore.http_request", "pyhttpclient": "kore.httpclient",
    "pylock": "kore.lock", "pyproc": "kore.proc", "pyseccomp": "kore.seccomp", "pysocket": "kore.socket",
    "pyqueue": "kore.queue", "pyroute": "kore.route", "pytimer": "kore.timer",
}  # fmt: skip


def run(code: str, *options: str) -> str:
    done = subprocess.run(
        [sys.executable, *options, "-c", code], cwd="/", env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    return done.stdout


def test_the_public_names_are_these():
    assert set(kore.__all__) == {*CONSTANTS, *FUNCTIONS, *ADDED, *TYPES, *curl_options.__all__, "config", "__version__"}
    assert set(kore.__all__) <= set(dir(kore))


def test_the_constants_have_their_values():
    assert {name: getattr(kore, name) for name in CONSTANTS} == CONSTANTS


def test_the_floors_below_mean_the_same_numbers():
    from kore.http.head import METHODS
    from kore.reactor import timers

    assert {f"HTTP_METHOD_{name}": number for name, number in METHODS.items()} == {
        name: value for name, value in CONSTANTS.items() if name.startswith("HTTP_METHOD_")
    }
    assert timers.TIMER_ONESHOT == kore.TIMER_ONESHOT


@pytest.mark.parametrize("name", sorted(FUNCTIONS | ADDED))
def test_every_function_is_there_and_documented(name):
    function = getattr(kore, name)
    assert callable(function)
    assert inspect.getdoc(function), f"kore.{name} has no docstring"


@pytest.mark.parametrize("name", sorted(FUNCTIONS | ADDED | set(TYPES) | {"config"}))
def test_no_submodule_bears_the_name_of_a_public_name(name):
    assert not isinstance(getattr(kore, name), ModuleType)
    assert not (ROOT / "kore" / name).exists()
    assert not (ROOT / "kore" / f"{name}.py").exists()


@pytest.mark.parametrize(("name", "shown"), TYPES.items())
def test_types_show_the_names_of_the_reference_and_cannot_be_made(name, shown):
    kind = getattr(kore, name)
    assert isinstance(kind, type)
    assert f"{kind.__module__}.{kind.__qualname__}" == shown
    with pytest.raises(TypeError):
        kind()


def test_config_is_one_object():
    from kore.application.declared import application

    assert kore.config is application.config
    assert kore.config is kore.config


def test_a_name_that_does_not_exist_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'kore' has no attribute 'CURLOPT_CURL'"):
        _ = kore.CURLOPT_CURL
    with pytest.raises(ImportError):
        exec("from kore import nonsense")


def test_everything_can_be_imported_by_star():
    namespace: dict[str, object] = {}
    exec("from kore import *", namespace)
    assert set(kore.__all__) <= set(namespace)


def test_type_checkers_see_the_same_map():
    tree = ast.parse((ROOT / "kore" / "__init__.py").read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {
        (alias.asname or alias.name): (node.module, alias.name)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == kore._MAP


def test_the_version_comes_from_one_place():
    from kore.version import __version__

    assert kore.__version__ == __version__


def test_importing_kore_is_quick_and_loads_nothing_it_may_not_need():
    loaded = run("import sys, kore; print(*sys.modules)").split()
    unwanted = {"asyncio", "ctypes", "asyncpg", "pycurl", "ssl", "socket", "kore.reactor", "kore.uring", "kore.http"}
    assert unwanted.isdisjoint(loaded)
    # In modules, not in milliseconds: those depend on the machine.
    bare = run("import sys; print(*sys.modules)").split()
    assert len(set(loaded) - set(bare)) < 60


def test_using_every_name_loads_no_client_library_and_no_ring():
    loaded = run("import sys; from kore import *; print(*sys.modules)").split()
    assert {"asyncpg", "pycurl", "kore.uring", "kore.uring.driver"}.isdisjoint(loaded)


def test_importing_kore_warns_of_nothing():
    run("import kore; from kore import *", "-W", "error")
