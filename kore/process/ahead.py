"""What the parent does for its workers before the first fork, since they will have no right to do it themselves.

It loads what they cannot load, makes the directory they write to, and finds out with their rights, in a process that
ends at once, whether the kernel gives them what it gives the parent.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Final

from kore.errors import StartError
from kore.process.confining import application_folder, own_folder
from kore.sandbox import privileges
from kore.sandbox.confinement import Confinement
from kore.sandbox.privileges import Identity, Rights

DIRECTORY_MODE: Final = 0o700

REASON_BYTES_MAX: Final = 4096
"""Of what a process that tries something says before it ends: a pipe takes it at once."""


def load_ahead(confinement: Confinement) -> None:
    """Load what the workers will not be able to: extensions always, all of it where they cannot get at the files.

    In the parent, before the first fork.
    """
    given = confinement.rights
    if not (confinement.on or confinement.tracing or given.chroot or given.identity is not None):
        return
    elsewhere = given.chroot or not all(_may_enter(path, given) for path in _imported_from())
    from kore.sandbox import preload

    own = own_folder()
    folders = [application_folder(), *([own] if elsewhere else [])]
    preload.sources(folders)
    preload.extensions()
    preload.modules(["python_multipart"])
    if "kore.clients.postgresql.queries" in sys.modules:
        preload.package("asyncpg", leave_out=["_testbase"])
    if preload.mentions(folders[0], ("curl", "httpclient")):
        preload.modules(["pycurl", "kore.clients.curl", "kore.clients.httpclient", "kore.application.transfers"])
    if elsewhere:
        preload.library()
        preload.package("python_multipart")
        preload.package("kore", leave_out=["__main__", "cli", "clients", "application.transfers", "bsd"])
        if "kore.clients.postgresql.queries" in sys.modules:
            preload.package("kore.clients.postgresql")
        preload.sources(folders)  # of what was loaded by now
    if given.chroot:
        preload.time_zones()


def make_offload(confinement: Confinement) -> None:
    """Make the directory for bodies of requests, if it is not there, for the user who will write to it.

    A worker that is confined could not. It is made step by step and follows no link: whoever may write into the root
    must not have root make directories elsewhere. What goes wrong is for the worker to tell, who knows whether it
    can use what is there.
    """
    given = confinement.rights
    if confinement.offload is None or not (confinement.on or given.identity is not None):
        return
    base, path = given.root or os.getcwd(), confinement.offload
    if not given.chroot:
        base, path = "/", os.path.join(base, path)
    if os.path.isdir(os.path.join(base, path.lstrip("/"))):
        return
    if given.identity is None:
        with contextlib.suppress(OSError):
            os.makedirs(os.path.join(base, path.lstrip("/")), DIRECTORY_MODE, exist_ok=True)
        return
    current = os.open(base, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for name in path.split("/"):
            if name not in ("", "."):
                below = _make_below(current, name, given.identity)
                os.close(current)
                current = below
    except OSError:
        pass
    finally:
        os.close(current)


def _make_below(parent: int, name: str, owner: Identity) -> int:
    """An fd of the directory `name` in `parent`, which is made for `owner` when it is not there. Raises OSError."""
    made = True
    try:
        os.mkdir(name, DIRECTORY_MODE, dir_fd=parent)
    except FileExistsError:
        made = False
    fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
    if made:
        os.fchown(fd, owner.uid, owner.gid)
    return fd


def try_as_worker(confinement: Confinement, call: Callable[[], object]) -> str | None:
    """Why `call` fails in a process with the rights of a worker, in one line; None when it does not.

    What root may do says nothing: kernel.io_uring_disabled and limits on locked memory look at who asks. Raises
    StartError when the rights cannot even be given up.
    """
    if not confinement.on and confinement.rights.identity is None:
        return None
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            privileges.give_up(confinement.rights)
            code = 2
            call()
            code = 0
        except BaseException as error:  # noqa: BLE001 (nothing may unwind into the parent's stack; it is told there)
            os.write(writing, str(error).encode("utf-8", "backslashreplace")[:REASON_BYTES_MAX])
        finally:
            os._exit(code)
    os.close(writing)
    with open(reading, "rb") as pipe:
        reason = pipe.read(REASON_BYTES_MAX).decode("utf-8", "replace")
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code == 1:
        raise StartError(reason)
    return None if code == 0 else reason or f"the process that tried it ended with {code}"


def _imported_from() -> Iterator[str]:
    """The folders that Python imports from, as far as they are there."""
    yield application_folder()
    yield os.path.dirname(own_folder())
    for path in sys.path:
        if os.path.isdir(path):
            yield os.path.abspath(path)


def _may_enter(folder: str, given: Rights) -> bool:
    """Whether a worker may list `folder` and enter all above it: root too is but a user without capabilities."""
    if given.identity is None and not given.confined:
        return True
    uid = os.geteuid() if given.identity is None else given.identity.uid
    groups = {os.getegid(), *os.getgroups()} if given.identity is None else {given.identity.gid}
    path, wanted = os.path.realpath(folder), os.R_OK | os.X_OK
    while True:
        found = os.stat(path)
        shift = 6 if found.st_uid == uid else 3 if found.st_gid in groups else 0
        if found.st_mode >> shift & wanted != wanted:
            return False
        if path == "/":
            return True
        path, wanted = os.path.dirname(path), os.X_OK
