"""Loading: applications of every shape are found, imported, configured, and their hooks looked up."""

from __future__ import annotations

import os
import sys
from types import ModuleType, SimpleNamespace

import pytest

from kore.application import loading
from kore.application.declared import Application
from kore.application.loading import Hooks, hooks_of, load
from kore.errors import ConfigurationError, StartError


@pytest.fixture(autouse=True)
def surroundings(monkeypatch):
    """What loading changes in the interpreter is put back."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    before = set(sys.modules)
    where = os.getcwd()
    yield
    os.chdir(where)
    for name in set(sys.modules) - before:
        del sys.modules[name]


@pytest.fixture
def app() -> Application:
    return Application()


def write(folder, name, text):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return str(path)


CLASS = """
class App:
    seen = None
    def configure(self, args):
        self.seen = args
    def workerstart(self): return "start"
koreapp = App()
"""


def test_a_file_is_imported_and_configured_with_its_arguments(tmp_path, app):
    path = write(tmp_path, "my_app_1.py", CLASS)
    found = load(path, ["one", "--two"], application=app)
    assert found.module.koreapp.seen == ["kore", "one", "--two"]
    assert found.path == path
    assert found.module.__name__ == "my_app_1"
    assert sys.modules["my_app_1"] is found.module
    assert sys.argv == [path, "one", "--two"]
    assert sys.path[-1] == str(tmp_path)
    assert app.loaded is found


def test_nothing_compiled_is_kept_or_taken_for_the_file(tmp_path, app, monkeypatch):
    """Also where Python keeps what it compiles, and the file changes within a second without changing its length."""
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    for number in "123":
        path = write(tmp_path, "changing.py", f"number = {number}\nimport beside\n")
        os.utime(path, (1, 1))
        write(tmp_path, "beside.py", "")
        assert load(path, application=app).module.number == int(number)
    assert {entry.name.partition(".")[0] for entry in (tmp_path / "__pycache__").iterdir()} == {"beside"}


def test_a_file_is_found_from_another_directory_and_finds_its_neighbours(tmp_path, app, monkeypatch):
    write(tmp_path, "sub/neighbour_1.py", "VALUE = 7\n")
    write(tmp_path, "sub/my_app_2.py", "import neighbour_1\nimport os\nWHERE = os.getcwd()\n")
    monkeypatch.chdir(tmp_path)
    found = load(os.path.join("sub", "my_app_2.py"), application=app)
    assert found.module.neighbour_1.VALUE == 7
    assert str(tmp_path) == found.module.WHERE
    assert found.path == str(tmp_path / "sub" / "my_app_2.py")


def test_a_package_is_imported_whole_and_entered_before_configure(tmp_path, app):
    text = """
import os
from . import part
AT_IMPORT = os.getcwd()
class koreapp:
    @staticmethod
    def configure(args):
        global AT_CONFIGURE
        AT_CONFIGURE = os.getcwd()
"""
    write(tmp_path, "my_package/__init__.py", text)
    write(tmp_path, "my_package/part.py", "import my_package\nNAME = __name__\n")
    before = os.getcwd()
    found = load(str(tmp_path / "my_package") + "/", application=app)
    assert found.module.part.NAME == "my_package.part"
    assert before == found.module.AT_IMPORT
    assert str(tmp_path / "my_package") == found.module.AT_CONFIGURE
    assert sys.path[-2:] == [str(tmp_path), str(tmp_path / "my_package")]


def test_the_current_directory_can_be_the_package(tmp_path, app, monkeypatch):
    write(tmp_path, "dotted_package/__init__.py", "VALUE = 3\n")
    monkeypatch.chdir(tmp_path / "dotted_package")
    assert load(".", application=app).module.VALUE == 3
    assert "dotted_package" in sys.modules


@pytest.mark.parametrize("name", ["test.py", "queue.py", "kore.py", "acme.py", "my.app.py", "my-app.py", "APP.PY"])
def test_the_name_of_a_file_hides_no_module_and_is_hidden_by_none(tmp_path, app, name):
    import queue

    import kore

    path = write(tmp_path, name, "import queue, kore\nMARK = 5\nclass A: pass\nKORE = kore.__version__\n")
    found = load(path, application=app)
    assert found.module.MARK == 5
    assert found.module.queue is queue
    assert kore.__version__ == found.module.KORE
    assert sys.modules["queue"] is queue
    assert sys.modules["kore"] is kore
    assert sys.modules.get("acme") is not found.module, "the ACME process imports the package of that name later"
    assert sys.modules[found.module.A.__module__] is found.module


@pytest.mark.parametrize(
    ("name", "make", "words"),
    [
        ("missing.py", lambda path: None, "no such file or directory"),
        ("app.txt", lambda path: path.write_text(""), "must end in .py"),
        ("app", lambda path: path.write_text(""), "must end in .py"),
        (".py", lambda path: path.write_text(""), "must end in .py"),
        ("folder", lambda path: path.mkdir(), "without __init__.py"),
        ("pipe.py", os.mkfifo, "neither a file nor a directory"),
        ("dangling.py", lambda path: path.symlink_to("nowhere"), "neither a file nor a directory"),
    ],
)
def test_what_is_no_application_is_one_clear_error(tmp_path, app, name, make, words):
    make(tmp_path / name)
    with pytest.raises(StartError, match=words) as caught:
        load(str(tmp_path / name), application=app)
    assert str(caught.value).startswith(str(tmp_path / name))
    assert app.loaded is None


def test_what_the_application_raises_comes_out_and_nothing_stays(tmp_path, app):
    path = write(tmp_path, "broken_1.py", "def inner():\n    raise LookupError('gone')\n\ninner()\n")
    with pytest.raises(LookupError) as caught:
        load(path, application=app)
    assert "broken_1" not in sys.modules
    assert loading.location_of(caught.value) == "broken_1.py:2"
    text = loading.formatted(caught.value)
    assert "broken_1.py" in text
    assert "LookupError: gone" in text
    assert "loading.py" not in text
    assert "importlib" not in text


def test_a_syntax_error_is_located_in_the_file_that_has_it(tmp_path, app):
    write(tmp_path, "helper_1.py", "x = 1\ndef (:\n")
    path = write(tmp_path, "broken_2.py", "import helper_1\n")
    with pytest.raises(SyntaxError) as caught:
        load(path, application=app)
    assert loading.location_of(caught.value) == "helper_1.py:2"
    assert "loading.py" not in loading.formatted(caught.value)


def test_a_refused_declaration_is_located_in_the_application(tmp_path, app):
    text = "from kore.application.config import Config\n\n\nConfig().workers = 0\n"
    with pytest.raises(ConfigurationError) as caught:
        load(write(tmp_path, "broken_3.py", text), application=app)
    assert loading.location_of(caught.value) == "broken_3.py:4"


def test_an_error_from_nowhere_has_no_location():
    assert loading.location_of(ValueError("x")) is None
    assert loading.formatted(ValueError("x")) == "ValueError: x\n"


def test_an_async_configure_is_refused_not_forgotten(tmp_path, app):
    text = "class A:\n    async def configure(self, args): pass\nkoreapp = A()\n"
    with pytest.raises(ConfigurationError, match="must not be async"):
        load(write(tmp_path, "async_1.py", text), application=app)


def test_a_configure_hook_that_takes_no_argument_fails_as_a_call_does(tmp_path, app):
    text = "class A:\n    def configure(self): pass\nkoreapp = A()\n"
    with pytest.raises(TypeError, match="configure"):
        load(write(tmp_path, "noargs_1.py", text), application=app)


def test_the_module_function_stands_in_only_where_the_hook_is_missing(tmp_path, app):
    text = "SEEN = []\ndef kore_parent_configure(args): SEEN.append(args)\n"
    found = load(write(tmp_path, "fallback_1.py", text), ["a"], application=app)
    assert found.module.SEEN == [["kore", "a"]]
    text += "class A:\n    def configure(self, args): SEEN.append('own')\nkoreapp = A()\n"
    found = load(write(tmp_path, "fallback_2.py", text), application=app)
    assert found.module.SEEN == ["own"]


def module_with(koreapp=None, **functions):
    module = ModuleType("m")
    for name, function in functions.items():
        setattr(module, name, function)
    if koreapp is not None:
        module.koreapp = koreapp
    return module


def f():
    pass


def g():
    pass


FALLBACKS = {
    "workerstart": "kore_worker_configure",
    "workerstop": "kore_worker_teardown",
    "signal": "kore_worker_signal",
    "cleanup": "kore_parent_teardown",
    "daemonized": "kore_parent_daemonized",
}


@pytest.mark.parametrize(("hook", "function"), FALLBACKS.items())
def test_hooks_and_their_fallbacks(hook, function):
    assert hooks_of(module_with()) == Hooks()
    assert hooks_of(module_with(**{function: g})) == Hooks(**{hook: g})
    assert hooks_of(module_with(SimpleNamespace(**{hook: f}), **{function: g})) == Hooks(**{hook: f})
    assert hooks_of(module_with(SimpleNamespace(**{hook: 5}), **{function: g})) == Hooks(**{hook: g})
    assert hooks_of(module_with(SimpleNamespace(**{hook: 5}), **{function: "x"})) == Hooks()


def test_hooks_without_a_fallback():
    assert hooks_of(module_with(SimpleNamespace(onmsg=f, seccomp=f))) == Hooks(onmsg=f, seccomp=f)
    both = module_with(SimpleNamespace(seccomp=f), kore_seccomp_hook=g, onmsg=g)
    assert hooks_of(both) == Hooks(seccomp=f, kore_seccomp_hook=g), "the module's function is called additionally"


def test_hooks_may_be_static_methods_of_a_class():
    class Static:
        @staticmethod
        def workerstart() -> int:
            return 5

    start = hooks_of(module_with(Static)).workerstart
    assert start is not None
    assert start() == 5
