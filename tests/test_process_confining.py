"""What a worker may is derived from what the application declares, and nothing else is added."""

from __future__ import annotations

import os
import sys
from dataclasses import replace

import pytest

import kore
from kore.application.declared import application
from kore.application.plan import freeze
from kore.application.privileges import Deployment
from kore.errors import StartError
from kore.process import confining
from kore.process.filtering import features_of
from kore.sandbox.confinement import Confinement
from tests.application_harness import declare_domain


@pytest.fixture(autouse=True)
def _clean(monkeypatch):
    monkeypatch.delenv("KORE_SANDBOX", raising=False)
    application.reset()
    yield
    application.reset()
    queries = sys.modules.get("kore.clients.postgresql.queries")
    if queries is not None:
        queries.databases.clear()


def confinement(*, chroot: bool = False):
    """What is derived with the sandbox on, for a worker who stays who it is."""
    plan = freeze(euid=1000)
    return confining.confine(plan, replace(plan.deployment, chroot=chroot))


def test_without_a_sandbox_nothing_is_derived():
    declare_domain("*")
    application.config.sandbox_read = "/srv"
    found = confinement()
    assert not found.on
    assert found.read == found.write == found.connect_ports == ()


def test_reading_is_for_the_application_python_and_what_is_served(tmp_path, monkeypatch):
    (tmp_path / "www").mkdir()
    monkeypatch.chdir(tmp_path)
    application.config.sandbox = True
    application.config.sandbox_read = ["data", "/srv/more"]
    declare_domain("*").filemaps({"/": "www"})
    found = confinement()
    assert found.on
    assert {str(tmp_path), f"{tmp_path}/www", f"{tmp_path}/data", "/srv/more"} <= set(found.read)
    assert {sys.prefix, sys.base_prefix, "/etc/ssl", "/etc/resolv.conf", "/dev/urandom"} <= set(found.read)
    assert os.path.dirname(os.__file__) in found.read
    assert all(map(os.path.isabs, found.read))
    assert not {"/", "/etc", "/root", "/home", "/proc", "/tmp"} & set(found.read)
    assert found.filemaps == (f"{tmp_path}/www",)


def test_writing_is_for_bodies_and_what_the_option_says(tmp_path):
    application.config.sandbox = True
    application.config.root = tmp_path
    declare_domain("*")
    assert confinement().write == ()
    application.reset()
    application.config.sandbox = True
    application.config.root = tmp_path
    application.config.http_body_disk_offload = 1
    application.config.sandbox_write = "state"
    declare_domain("*")
    found = confinement()
    assert found.write == (f"{tmp_path}/state", f"{tmp_path}/tmp_files")
    assert found.offload == f"{tmp_path}/tmp_files"


def test_connecting_is_for_the_declared_databases_and_what_the_option_says():
    pytest.importorskip("asyncpg")
    application.config.sandbox = True
    declare_domain("*")
    assert confinement().connect_ports == ()
    application.reset()
    application.config.sandbox = True
    declare_domain("*")
    kore.dbsetup("one", "host=127.0.0.1,::1 port=5433,5434")
    kore.dbsetup("two", "host=/run/pg dbname=x")
    found = confinement()
    assert found.connect_ports == (5433, 5434)
    assert found.sockets == ("/run/pg/.s.PGSQL.5432",)
    assert not found.names
    application.reset()
    application.config.sandbox = True
    application.config.sandbox_connect = [443, 5433]
    declare_domain("*")
    kore.dbsetup("three", "host=db.example.org")
    found = confinement()
    assert found.connect_ports == (443, 5432, 5433, 5434)
    assert found.names
    application.reset()
    application.config.sandbox = True
    application.config.sandbox_connect = "any"
    declare_domain("*")
    assert confinement().connect_ports is None


@pytest.mark.parametrize(("connect", "database", "paths"), [
    ([443], "host=127.0.0.1", False), ([443], "host=/run/pg", True), ("any", "host=127.0.0.1", True),
])  # fmt: skip
def test_sockets_with_a_path_are_for_databases_that_have_one(connect, database, paths):
    """And for who may connect anywhere: nothing bounds which of them it is."""
    pytest.importorskip("asyncpg")
    application.config.sandbox = True
    application.config.sandbox_connect = connect
    declare_domain("*")
    kore.dbsetup("one", database)
    plan = freeze(euid=1000)
    found = features_of(confining.confine(plan, plan.deployment), plan, "epoll")
    assert found.connect
    assert found.paths is paths


def test_tracing_derives_it_all_though_the_sandbox_is_off():
    application.config.seccomp_tracing = "yes"
    declare_domain("*")
    found = confinement()
    assert found.tracing
    assert not found.on
    assert "/etc/ssl" in found.read


@pytest.mark.skipif(os.geteuid() != 0, reason="not root: chroot is refused before")
@pytest.mark.parametrize("option", ["sandbox_read", "sandbox_write"])
def test_paths_of_options_must_be_inside_the_root(tmp_path, option):
    root = tmp_path / "root"
    (root / "in").mkdir(parents=True)
    (tmp_path / "out").mkdir()
    for path, wanted in (("in", "/in"), (f"{root}/in", "/in"), ("/in", "/in"), (f"{tmp_path}/out", None), ("no", None)):
        application.reset()
        application.config.sandbox = True
        application.config.root = root
        setattr(application.config, option, path)
        declare_domain("*")
        if wanted is None:
            with pytest.raises(StartError, match=f"{option}: .* is not inside the root"):
                confinement(chroot=True)
            continue
        found = confinement(chroot=True)
        assert found.read == (("/", wanted) if option == "sandbox_read" else ("/",))
        assert found.write == (() if option == "sandbox_read" else (wanted,))


def test_mounted_applications_without_a_place_for_temporary_files_are_told_of(monkeypatch):
    for name in ("TMPDIR", "TEMP", "TMP"):
        monkeypatch.delenv(name, raising=False)
    for write, told in (((), True), (("/srv/state",), True), (("/tmp",), False), ((os.getcwd(),), False)):
        mine = Confinement(process="worker", on=True, mounts=("site",), write=write)
        lines = confining.notices(mine, Deployment("dev", True, False, False))
        found = [line for line in lines if "temporary" in line]
        assert bool(found) is told
        assert not told or "kore.config.sandbox_write = '/tmp'" in found[0]
    monkeypatch.setenv("TMPDIR", "/srv/state/own")
    mine = Confinement(process="worker", on=True, mounts=("site",), write=("/srv/state",))
    assert "temporary" not in "".join(confining.notices(mine, Deployment("dev", True, False, False)))
