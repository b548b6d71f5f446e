"""Loading an application: ``app.py`` or a package is imported and configured, and its hooks are looked up.

The file is loaded from its own path and not searched for, so that ``test.py`` is the application and not the standard
library's package of that name. What the application's own code raises comes out as it was raised; only what is wrong
with the path itself is a StartError. Kore-api.md 2.3 to 2.7.
"""

from __future__ import annotations

import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec, SourceFileLoader
from types import CodeType, ModuleType, TracebackType
from typing import Any

from kore.application.declared import Application
from kore.application.declared import application as the_application
from kore.errors import ConfigurationError, StartError

Hook = Callable[..., Any]

PROGRAM = "kore"
"""The first of the arguments that `configure` gets: the program, as in the reference, not the script."""

NEEDED_LATER = frozenset({
    "acme", "asyncpg", "certifi", "cryptography", "idna", "josepy", "prctl", "pycurl", "pyseccomp", "python_multipart",
    "requests", "urllib3",
})
"""Packages that kore imports when it needs them: what an application of such a name must not stand in for."""

_OWN_FOLDER = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep


@dataclass(frozen=True, slots=True)
class Loaded:
    """An application that was imported and configured."""

    module: ModuleType
    path: str
    """Absolute path of the file or the package."""


@dataclass(frozen=True, slots=True)
class Hooks:
    """The functions of an application that the processes call; None where it has none. Kore-api.md 2.5."""

    workerstart: Hook | None = None
    workerstop: Hook | None = None
    signal: Hook | None = None
    onmsg: Hook | None = None
    cleanup: Hook | None = None
    daemonized: Hook | None = None
    seccomp: Hook | None = None
    """Called with the kore.seccomp object."""
    kore_seccomp_hook: Hook | None = None
    """The function of the module: called as well, without an argument."""


_MODULE_FUNCTIONS = {
    "configure": "kore_parent_configure",
    "workerstart": "kore_worker_configure",
    "workerstop": "kore_worker_teardown",
    "signal": "kore_worker_signal",
    "onmsg": None,
    "cleanup": "kore_parent_teardown",
    "daemonized": "kore_parent_daemonized",
    "seccomp": None,
}
"""Hook to the function of the module that stands in for it when `koreapp` has none."""


def load(path: str, arguments: Sequence[str] = (), *, application: Application = the_application) -> Loaded:
    """Import the application at `path`, a .py file or a package, and call its configure hook with the arguments.

    Raises StartError when there is nothing to load at `path`, ConfigurationError for a configure hook that can't be
    used, and whatever the application raises. The directory of a package becomes the current one, as in the
    reference.
    """
    spec = _spec(path)
    absolute = os.path.abspath(path)
    folders = [os.path.dirname(absolute)]
    if spec.submodule_search_locations is not None:
        folders.append(absolute)
    # At the end, as the reference does: what stands beside an application hides no installed package.
    sys.path.extend(folder for folder in folders if folder not in sys.path)
    sys.argv = [path, *arguments]
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        assert spec.loader is not None
        spec.loader.exec_module(module)
    except BaseException:
        sys.modules.pop(spec.name, None)
        raise
    if spec.submodule_search_locations is not None:
        os.chdir(absolute)
    _configure(module, [PROGRAM, *arguments])
    application.loaded = Loaded(module, absolute)
    return application.loaded


def _spec(path: str) -> ModuleSpec:
    """Where the module is and what it is called. Raises StartError."""
    absolute = os.path.abspath(path)
    file, folders = absolute, None
    name, extension = os.path.splitext(os.path.basename(absolute))
    if os.path.isdir(absolute):
        file, folders = os.path.join(absolute, "__init__.py"), [absolute]
        name = os.path.basename(absolute)
        if not os.path.isfile(file):
            raise StartError(f"{path}: a directory without __init__.py is no package; give a .py file or a package")
    elif not os.path.lexists(absolute):
        raise StartError(f"{path}: no such file or directory")
    elif not os.path.isfile(absolute):
        raise StartError(f"{path}: neither a file nor a directory; give a .py file or a package")
    elif extension.lower() != ".py" or not name:
        raise StartError(f"{path}: not a Python file; the name must end in .py")
    loader = _Script(_module_name(name), file)
    spec = importlib.util.spec_from_file_location(
        loader.name, file, loader=loader, submodule_search_locations=folders
    )
    if spec is None:
        raise StartError(f"{path}: cannot be imported")
    return spec


class _Script(SourceFileLoader):
    """Compiles the file at each start, as Python does with the one it is started with.

    A server started as root leaves no ``__pycache__`` in the developer's directory, and a change of the same length
    within a second is not overlooked, as by a cache that goes by time and length (PEP 552).
    """

    def get_code(self, fullname: str) -> CodeType:  # noqa: ARG002 (the import system's signature)
        return self.source_to_code(self.get_data(self.path), self.path)


def _module_name(name: str) -> str:
    """The name to import under: that of the file, unless another module has it or it means something in a name."""
    name = name.replace(".", "_")
    if name in sys.modules or name in sys.stdlib_module_names or name in NEEDED_LATER:
        return f"{name}_application"
    return name


def _configure(module: ModuleType, arguments: list[str]) -> None:
    """Call the configure hook, if there is one. Raises what it raises, and ConfigurationError for a coroutine."""
    configure = _hook(module, "configure")
    if configure is None:
        return
    result = configure(arguments)
    if inspect.iscoroutine(result):
        result.close()
        raise ConfigurationError("configure: must not be async; it runs before there is an event loop")


def hooks_of(module: ModuleType) -> Hooks:
    """The hooks as they stand now: called after configure, which may set some of them."""
    found = {name: _hook(module, name) for name in _MODULE_FUNCTIONS if name != "configure"}
    return Hooks(**found, kore_seccomp_hook=_function(module, "kore_seccomp_hook"))


def _hook(module: ModuleType, name: str) -> Hook | None:
    hook = _function(getattr(module, "koreapp", None), name)
    fallback = _MODULE_FUNCTIONS[name]
    if hook is None and fallback is not None:
        return _function(module, fallback)
    return hook


def _function(owner: Any, name: str) -> Hook | None:
    found = getattr(owner, name, None)
    return found if callable(found) else None


def location_of(problem: BaseException) -> str | None:
    """Where in the application's own code `problem` came from, as "app.py:14"; None when it came from nowhere there.

    For the one line that a refused declaration gets: the innermost frame that is not kore's.
    """
    found: str | None = None
    for frame, line in traceback.walk_tb(problem.__traceback__):
        if not _internal(frame.f_code.co_filename):
            found = f"{os.path.basename(frame.f_code.co_filename)}:{line}"
    if isinstance(problem, SyntaxError) and problem.filename:
        return f"{os.path.basename(problem.filename)}:{problem.lineno}"
    return found


def formatted(problem: BaseException) -> str:
    """The traceback of `problem` from the application's first frame on: how it was loaded is of no interest."""
    frames: TracebackType | None = problem.__traceback__
    inner = frames
    while inner is not None:
        if inner.tb_frame.f_code.co_filename == __file__:
            frames = inner
        inner = inner.tb_next
    while frames is not None and _internal(frames.tb_frame.f_code.co_filename):
        frames = frames.tb_next
    return "".join(traceback.format_exception(type(problem), problem, frames))


def _internal(filename: str) -> bool:
    return filename.startswith((_OWN_FOLDER, "<frozen "))
