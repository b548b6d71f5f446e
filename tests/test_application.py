"""Declarations and the Plan they become: domains, files, privileges, deployments, and when each is refused."""

from __future__ import annotations

import os
import sys

import pytest

from kore.application import privileges
from kore.application.declared import app, application, prerequest
from kore.application.domains import PyDomain, PyRoute, domain, route
from kore.application.kinds import shown
from kore.application.loading import load
from kore.application.plan import freeze
from kore.application.privileges import Deployment, Privileges, privsep
from kore.application.servers import server
from kore.errors import ConfigurationError
from kore.reactor.tasks import discard_pending, task_create
from tests.application_harness import GOOD_AUTH, ask, declare_domain, handler, other, serve


@pytest.fixture(autouse=True)
def clean():
    """Every test starts with nothing declared and leaves no listener open."""
    application.reset()
    yield
    application.reset()
    discard_pending()


# Domains.


def test_a_domain_attaches_to_the_server_it_names():
    serve("one", "two")
    assert domain("a.example", attach="two").listener.name == "two"
    assert domain("b.example", attach="one").listener.name == "one"


@pytest.mark.parametrize("keywords", [{}, {"attach": None}, {"attach": "default"}, {"attach": 5}])
def test_without_a_usable_attach_the_only_server_is_taken(keywords):
    serve("notls")
    assert domain("*", **keywords).listener.name == "notls"


@pytest.mark.parametrize("keywords", [{}, {"attach": "default"}])
def test_with_several_servers_the_default_must_exist(keywords):
    serve("one", "two")
    with pytest.raises(RuntimeError, match=r"there is no server 'default'; declared are: 'one', 'two'"):
        domain("*", **keywords)
    serve("default")
    assert domain("*", **keywords).listener.name == "default"


def test_a_server_that_does_not_exist_is_an_error():
    with pytest.raises(RuntimeError, match=r"no server to attach it to; call kore\.server\(\) first"):
        domain("*")
    serve("one")
    with pytest.raises(RuntimeError, match="domain 'a': there is no server 'two'; declared are: 'one'"):
        domain("a", attach="two")
    assert application.domains == []


def test_only_identical_names_are_refused():
    serve("one", "two")
    domain("*", attach="one")
    domain("*.example.com", attach="one")
    domain("www.example.com", attach="one")
    domain("*", attach="two")
    for name in ("*", "WWW.Example.com", "www.example.com."):
        with pytest.raises(RuntimeError, match="server 'one' has it already"):
            domain(name, attach="one")
    assert len(application.domains) == 4


@pytest.mark.parametrize("name", ["", "a\0b", "a b", "x" * 254, "a\n", "\x7f"])
def test_a_name_that_is_none_is_refused(name):
    serve()
    with pytest.raises(ValueError, match="domain"):
        domain(name)


@pytest.mark.parametrize("arguments", [(5,), (None,), (b"x",), (), ("a", "b")])
def test_arguments_of_the_wrong_type_or_number(arguments):
    serve()
    with pytest.raises(TypeError):
        domain(*arguments)
    with pytest.raises(TypeError, match="unexpected keyword"):
        domain("a", attached="x")


def test_the_types_show_as_the_reference_shows_them_and_cannot_be_made():
    made = declare_domain("*")
    assert f"{type(made).__module__}.{type(made).__name__}" == "kore.domain"
    assert f"{PyRoute.__module__}.{PyRoute.__name__}" == "kore.route"
    for kind in (PyDomain, PyRoute):
        with pytest.raises(TypeError, match="cannot create"):
            kind()
    with pytest.raises(AttributeError):
        made.unknown = 5
    assert repr(made).startswith("<kore.domain '*' on http://127.0.0.1:")
    assert isinstance(route("/").__self__, PyRoute)


# File maps, redirects, access logs.


def test_filemaps_are_checked_and_kept(tmp_path, monkeypatch):
    (tmp_path / "webroot").mkdir()
    monkeypatch.chdir(tmp_path)
    made = declare_domain("*")
    assert made.filemaps({"/": "webroot", "/private/": ("webroot", GOOD_AUTH)}) is None
    plain, private = freeze().domains[0].filemaps
    assert (plain.url, plain.directory, plain.auth) == ("/", "webroot", None)
    assert private.auth.name == "session"


def test_filemaps_are_looked_for_below_the_root_of_the_workers(tmp_path):
    (tmp_path / "webroot").mkdir()
    made = declare_domain("*")
    with pytest.raises(RuntimeError, match="does not exist"):
        made.filemaps({"/": "webroot"})
    application.config.root = tmp_path
    made.filemaps({"/": "webroot"})
    application.config.root = "/nonexistent"
    privsep("worker", root=str(tmp_path))
    made.filemaps({"/b/": "webroot"})


@pytest.mark.parametrize(
    "maps",
    [
        None, [], "x", {5: "."}, {"/a": "."}, {"a/": "."}, {"": "."}, {"/": 5}, {"/": ""}, {"/": "a\0"},
        {"/": "no-such-directory"}, {"/": (".",)}, {"/": (".", 5)}, {"/": (".", {})}, {"/": (".", GOOD_AUTH, 3)},
        {"/": ".", "/b": "."}, {"/": None}, {"/": ()},
    ],
)  # fmt: skip
def test_a_bad_filemap_is_a_runtime_error_and_adds_nothing(maps):
    made = declare_domain("*")
    with pytest.raises(RuntimeError, match="filemaps"):
        made.filemaps(maps)
    assert made.filemap_list == []


def test_redirects_are_checked_and_kept():
    made = declare_domain("*")
    assert made.redirect("^/old/([0-9]+)$", 301, "/new/$1?$qs") is None
    (kept,) = freeze().domains[0].redirects
    assert kept.pattern.search("/old/1")
    assert (kept.status, kept.target) == (301, "/new/$1?$qs")


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [
        (("(", 301, "/"), ValueError),
        (("", 301, "/"), ValueError),
        ((5, 301, "/"), TypeError),
        (("^/", "x", "/"), TypeError),
        (("^/", 200, "/"), ValueError),
        (("^/", 600, "/"), ValueError),
        (("^/", 301, None), TypeError),
        (("^/", 301, "/\r\nx: y"), ValueError),
        (("^/", 301), TypeError),
    ],
)
def test_a_bad_redirect_is_refused(arguments, kind):
    made = declare_domain("*")
    with pytest.raises(kind):
        made.redirect(*arguments)
    assert made.redirect_list == []


def test_an_access_log_is_opened_at_once_and_only_once(tmp_path):
    made = declare_domain("*")
    path = tmp_path / "access.log"
    path.write_text("before\n")
    made.accesslog = str(path)
    with pytest.raises(AttributeError, match="not read"):
        _ = made.accesslog
    with pytest.raises(RuntimeError, match=r"is .* already"):
        made.accesslog = str(tmp_path / "second")
    plan = freeze()
    log = plan.domains[0].accesslog
    log.write(b"line\n")
    assert path.read_text() == "before\nline\n"
    assert not os.get_inheritable(log.fileno())
    plan.close()
    assert log.closed


def test_an_access_log_that_cannot_be_opened(tmp_path):
    made = declare_domain("*")
    with pytest.raises(RuntimeError, match=r"cannot open accesslog .* Is a directory \(errno 21\)"):
        made.accesslog = tmp_path
    for bad in (5, None, b"x"):
        with pytest.raises(TypeError, match="accesslog is a str"):
            made.accesslog = bad
    made.accesslog = tmp_path / "log"
    assert (tmp_path / "log").exists()


# Privileges and deployments.


def test_privsep_and_options_say_the_same_thing_two_ways():
    privsep("worker", root="/srv/app", skip=["chroot"])
    application.config.runas = "www"
    application.config.keymgr_root = "/srv/keys"
    privsep("acme", runas="acme")
    plan = freeze()
    assert plan.privileges["worker"] == Privileges("/srv/app", "www", True)
    assert plan.privileges["keymgr"] == Privileges("/srv/keys", "www", False)
    assert plan.privileges["acme"] == Privileges("/srv/app", "acme", False)


def test_privsep_adds_up_and_without_keywords_does_nothing():
    privsep("worker")
    assert application.privileges["worker"] == Privileges()
    privsep("worker", root="/a")
    privsep("worker", runas="www")
    privsep("worker", skip=[])
    assert application.privileges["worker"] == Privileges("/a", "www", False)


def test_two_ways_that_disagree_end_the_start():
    privsep("keymgr", runas="one")
    application.config.keymgr_runas = "one"
    assert privileges.resolve(application.privileges, freeze().settings)["keymgr"].runas == "one"
    application.reset()
    privsep("keymgr", runas="one")
    application.config.keymgr_runas = "two"
    with pytest.raises(ConfigurationError) as caught:
        freeze()
    assert str(caught.value).startswith("kore.privsep('keymgr', runas='one') and kore.config.keymgr_runas = 'two' say")


@pytest.mark.parametrize(
    ("arguments", "keywords", "kind"),
    [
        (("parent",), {}, RuntimeError),
        (("worker",), {"skip": "chroot"}, RuntimeError),
        (("worker",), {"skip": ["seccomp"]}, RuntimeError),
        (("worker",), {"skip": [5]}, RuntimeError),
        (("worker",), {"root": 5}, TypeError),
        (("worker",), {"root": ""}, ValueError),
        (("worker",), {"user": "x"}, TypeError),
        ((), {}, TypeError),
    ],
)
def test_a_bad_privsep_is_refused(arguments, keywords, kind):
    with pytest.raises(kind):
        privsep(*arguments, **keywords)
    assert application.privileges == {}


@pytest.mark.parametrize(
    ("value", "euid", "meaning"),
    [
        (None, 1000, Deployment("dev", foreground=True, switch_user=False, chroot=False)),
        (None, 0, Deployment("", foreground=True, switch_user=False, chroot=False)),
        ("dev", 0, Deployment("dev", foreground=True, switch_user=False, chroot=False)),
        ("development", 0, Deployment("dev", foreground=True, switch_user=False, chroot=False)),
        ("docker", 1000, Deployment("docker", foreground=True, switch_user=True, chroot=True)),
        ("production", 0, Deployment("production", foreground=False, switch_user=True, chroot=True)),
    ],
)
def test_what_a_deployment_means(value, euid, meaning):
    if value is not None:
        application.config.deployment = value
    assert freeze(euid=euid).deployment == meaning


def test_an_unset_deployment_of_root_does_what_root_asked_for():
    application.config.root = "/srv"
    application.config.runas = "www"
    assert freeze(euid=0).deployment == Deployment("", foreground=True, switch_user=True, chroot=True)
    application.reset()
    privsep("worker", root="/srv", skip=["chroot"])
    assert freeze(euid=0).deployment == Deployment("", foreground=True, switch_user=False, chroot=False)
    application.reset()
    privsep("worker", root="/srv", runas="www", skip=["runas"])
    assert freeze(euid=0).deployment == Deployment("", foreground=True, switch_user=False, chroot=True)


def test_each_kind_of_process_skips_its_own_steps():
    application.config.deployment = "docker"
    privsep("worker", skip=["runas"])
    privsep("worker", skip=["chroot"])
    privsep("acme", skip=("runas",))
    plan = freeze(euid=0)
    assert plan.deployment == Deployment("docker", foreground=True, switch_user=False, chroot=False)
    assert plan.privileges["worker"] == Privileges(None, None, True, True)
    assert plan.privileges["keymgr"] == Privileges()
    assert plan.privileges["acme"] == Privileges(None, None, False, True)


# The rest, and the end of declaring.


def test_app_holds_one_object():
    assert app() is None
    assert app(5) is True
    assert app() == 5
    assert app(1, 2) == 5
    assert app(None) is True
    assert app() is None
    with pytest.raises(TypeError):
        app(x=5)


def test_prerequests_keep_their_order_and_are_returned():
    assert prerequest(handler) is handler
    assert prerequest(other) is other
    with pytest.raises(TypeError, match="not callable"):
        prerequest("x")
    assert freeze().prerequests == (handler, other)


def test_name_and_signals_are_in_the_plan():
    application.name("shop")
    application.trap(10)
    application.trap(10)
    plan = freeze()
    assert plan.title == "shop"
    assert plan.signals == (10,)
    for bad, kind in ((5, TypeError), ("", ValueError), ("a\0", ValueError)):
        with pytest.raises(kind):
            application.name(bad)


def test_tasks_made_before_the_start_are_counted():
    async def background():
        pass

    task_create(background())
    assert freeze().tasks == 1


def test_nothing_can_be_declared_after_the_start():
    made = declare_domain("*")
    decorate = route("/late")
    freeze()
    late = [
        lambda: server(ip="127.0.0.1", port=0),
        lambda: domain("a"),
        lambda: made.route("/", handler),
        lambda: made.filemaps({"/": "."}),
        lambda: made.redirect("/", 301, "/"),
        lambda: setattr(made, "accesslog", "x"),
        lambda: route("/"),
        lambda: decorate(handler),
        lambda: prerequest(handler),
        lambda: privsep("worker"),
        lambda: setattr(application.config, "workers", 1),
        freeze,
    ]
    for declare in late:
        with pytest.raises(RuntimeError, match="start"):
            declare()


def test_configuration_files_are_refused_by_name():
    application.config.file = "kore.conf"
    with pytest.raises(ConfigurationError, match=r"kore\.config\.file = 'kore\.conf'"):
        freeze()


def test_the_backlog_counts_wherever_it_is_assigned(monkeypatch):
    asked = []
    monkeypatch.setattr("kore.application.plan.set_backlog", lambda listener, backlog: asked.append(backlog))
    serve()
    application.config.socket_backlog = 7
    freeze()
    assert asked == [7]


def test_the_plan_has_a_router_for_every_server_even_without_domains():
    serve("one", "two")
    plan = freeze()
    assert [listener.name for listener in plan.listeners] == ["one", "two"]
    assert ask(plan, "GET", "/", on="one").status == 404
    plan.close()
    assert plan.listeners[0].sock.fileno() == -1


def test_an_error_message_stays_short():
    assert len(shown("x" * 10000)) <= 80
    assert shown(10**10000) == "an integer of 33220 bits"


# The examples of the reference, as they stand there.

FIRST = """
import kore

class MyApp:
    def configure(self, args):
        kore.config.workers = 1
        kore.config.deployment = "dev"

        kore.server("notls", ip="127.0.0.1", port="0", tls=False)

        domain = kore.domain("*", attach="notls")
        domain.route("/", self.index, methods=["get"])
        domain.route("^/(0-9)$", self.index_with_args, methods=["get"])

    def index(self, req):
        req.response(200, b'hello')

    def index_with_args(self, req, specified_id):
        req.response(200, specified_id)

koreapp = MyApp()
"""

CONFIGURATION = """
import os
import sys
import kore

class MyApp:
    def configure(self, args):
        kore.config.workers = 1
        kore.config.http_header_max = 1024
        kore.config.http_header_timeout = 60
        kore.config.seccomp_tracing = "yes"
        kore.config.deployment = os.getenv("DEPLOYMENT", default="dev")

koreapp = MyApp()
"""

ROUTES = """
import kore

class RouteExample:
    def configure(self, args):
        kore.config.workers = 1
        kore.config.deployment = "dev"
        kore.server("default", ip="127.0.0.1", port="0", tls=False)
        dom = kore.domain("*", attach="default")

        dom.route("/", self.index, methods=["get"])
        dom.route("/update", self.update, methods=["post"],
            post={
                "number" : "^[0-9]{4}$",
                "user" : "^[a-z]{4,12}$"
            }
        )
        dom.route("/secret", self.secret, methods=["get"],
            auth={
                "type" : "header",
                "value" : "x-header",
                "redirect" : "/",
                "verify" : self.verify
            }
        )

    def verify(self, req, data):
        return True

    def index(self, req):
        req.response(200, b'this is the index')

    def secret(self, req):
        req.response(200, b'this is the secret')

    def update(self, req):
        req.response(200, b'')

koreapp = RouteExample()
"""

MODULE_LEVEL = """
import kore

kore.server(ip="127.0.0.1", port="0", tls=False)

@kore.route("/", methods=["get"])
async def index(req):
    req.response(200, b"ok")

async def background():
    pass

kore.domain("*")
kore.task_create(background())
SEEN = []

def kore_parent_configure(args):
    SEEN.append(args)
"""


@pytest.fixture
def loaded(tmp_path, monkeypatch):
    """Load the text of an application and freeze it."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", list(sys.argv))

    def make(name: str, text: str):
        path = tmp_path / f"{name}.py"
        path.write_text(text)
        module = load(str(path), ["a"]).module
        monkeypatch.delitem(sys.modules, module.__name__)
        return module, freeze()

    return make


def test_the_first_example_of_the_reference(loaded):
    module, plan = loaded("reference_first", FIRST)
    assert (plan.settings.workers, plan.deployment.name) == (1, "dev")
    assert [listener.name for listener in plan.listeners] == ["notls"]
    assert ask(plan, "GET", "/", on="notls").route.handler == module.koreapp.index
    assert ask(plan, "GET", "/0-9", on="notls").captures == ("0-9",)
    assert ask(plan, "POST", "/", on="notls").status == 405


def test_the_configuration_example_of_the_reference(loaded, monkeypatch):
    monkeypatch.delenv("DEPLOYMENT", raising=False)
    _, plan = loaded("reference_configuration", CONFIGURATION)
    assert (plan.settings.http_header_max, plan.settings.http_header_timeout) == (1024, 60)
    assert plan.settings.seccomp_tracing is True
    assert plan.listeners == ()


def test_the_route_example_of_the_reference(loaded):
    module, plan = loaded("reference_routes", ROUTES)
    assert ask(plan, "GET", "/").route.handler == module.koreapp.index
    assert ask(plan, "POST", "/update").route.handler == module.koreapp.update
    assert ask(plan, "GET", "/secret").route.auth.verify == module.koreapp.verify


def test_an_application_without_a_class(loaded):
    module, plan = loaded("module_level", MODULE_LEVEL)
    assert ask(plan, "GET", "/").route.handler is module.index
    assert plan.tasks == 1
    assert module.SEEN == [["kore", "a"]]
