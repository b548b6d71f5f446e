"""What the tests of user, root and capabilities share: a server for another user, and what the kernel says of it.

Changing user and root takes root; elsewhere these tests are skipped, and say so.
"""

from __future__ import annotations

import contextlib
import os
import pwd
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.http_server_harness import Server
from tests.support import Program, pids_of, skip_unless, starter

CAPABILITY_SETS = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="not root: there are no rights to give up")


def a_user() -> pwd.struct_passwd:
    """Some user of this machine that is not root: nobody, or the first there is."""
    try:
        return pwd.getpwnam("nobody")
    except KeyError:
        return next(entry for entry in pwd.getpwall() if entry.pw_uid != 0)


def status(pid: int) -> dict[str, str]:
    """What /proc/PID/status says, by name."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def limits(pid: int) -> dict[str, tuple[str, str]]:
    """Soft and hard limit by the name that /proc/PID/limits gives them."""
    found = {}
    for line in Path(f"/proc/{pid}/limits").read_text().splitlines()[1:]:
        name = line[:26].strip()
        soft, hard = line[26:].split()[:2]
        found[name] = (soft, hard)
    return found


def root_directory(directory: Path) -> Path:
    """A directory for a user who may enter nothing above it."""
    root = directory / "root"
    root.mkdir()
    root.chmod(0o755)
    return root


def options(root: Path | None = None, *lines: str, user: bool = True) -> str:
    """Options for SERVER_APP: live in `root`, as another user, and more."""
    found = [] if root is None else [f"kore.config.root = {str(root)!r}"]
    if user:
        found.append(f"kore.config.runas = {a_user().pw_name!r}")
    return "\n".join([*found, *lines])


@contextlib.contextmanager
def confined(
    directory: Path, engine: str, text: str = "", *lines: str, arguments: tuple[str, ...] = (),
    deployment: str = "docker", workers: int = 1,
) -> Iterator[Server]:
    """A server whose worker lives in ``directory/root`` as another user."""
    skip_unless(engine)
    root = directory / "root"
    if not root.exists():
        root_directory(directory)
    with starter(directory) as programs:
        program = programs.serve(
            text, *arguments, options=options(root, *lines), deployment=deployment, workers=workers, io=engine
        )
        yield Server(program, program.address, pids_of(program)[0])


def refusal(program: Program) -> str:
    """Why a server does not start: exit code 1, and one line on standard error, which is returned."""
    assert program.wait() == 1, program.out + program.err
    assert program.err.startswith("kore: ")
    assert program.err.count("\n") == 1, program.err
    assert "ready" not in program.out
    return program.err
