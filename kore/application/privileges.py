"""Who the processes run as and where, as declared: kore.privsep, the root and runas options, and deployments.

Two ways lead here, because the reference has one and the C platform the other (kore-api.md section 20, row 5). Both
are honoured; where they say different things the server does not start, since guessing a user is how it goes wrong.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kore.application import arguments
from kore.application.declared import application
from kore.application.settings import Settings
from kore.errors import ConfigurationError

PROCESSES = ("worker", "keymgr", "acme")

STEPS = ("chroot", "runas")
"""What `privsep` can leave out."""

_OPTIONS = {"worker": ("root", "runas"), "keymgr": ("keymgr_root", "keymgr_runas"), "acme": ("acme_root", "acme_runas")}


@dataclass(frozen=True, slots=True)
class Privileges:
    """Of one kind of process: its root directory and its user (None: not set), and which steps it goes without."""

    root: str | None = None
    runas: str | None = None
    skip_chroot: bool = False
    skip_runas: bool = False


@dataclass(frozen=True, slots=True)
class Deployment:
    """What a deployment asks of the processes. The command line may take any of it back."""

    name: str
    """"dev", "docker", "production", or "" for an unset deployment that was started as root."""
    foreground: bool
    switch_user: bool
    chroot: bool


def privsep(process: str, /, *, root: Any = None, runas: Any = None, skip: Any = None) -> None:
    """Say where and as whom the processes of a kind run: `process` is "worker", "keymgr" or "acme".

    `root` is a directory, `runas` a user name, `skip` a list of the steps to leave out, "chroot" (the process changes
    to its root instead) and "runas". Further calls add to it. Raises RuntimeError for an unknown process or step and
    after the start, TypeError and ValueError for a root or runas that is none. Source: kore-api.md 7.14.
    """
    application.check_open("privsep")
    if process not in PROCESSES:
        raise RuntimeError(f"privsep: unknown process {process!r}; allowed are {', '.join(PROCESSES)}")
    steps = [] if skip is None else skip
    if not isinstance(steps, (list, tuple)) or any(step not in STEPS for step in steps):
        raise RuntimeError(f"privsep: skip = {skip!r} is not allowed; allowed is a list of 'chroot' and 'runas'")
    before = application.privileges.get(process, Privileges())
    application.privileges[process] = Privileges(
        root=before.root if root is None else arguments.path("privsep: root", root),
        runas=before.runas if runas is None else arguments.text("privsep: runas", runas),
        skip_chroot=before.skip_chroot or "chroot" in steps,
        skip_runas=before.skip_runas or "runas" in steps,
    )


def worker_root() -> str:
    """The directory that relative paths of files count from: the root of the workers as far as it is known now."""
    declared = application.privileges.get("worker", Privileges()).root
    return declared or application.config.root or os.curdir


def resolve(declared: Mapping[str, Privileges], settings: Settings) -> dict[str, Privileges]:
    """Both ways together; what keymgr and acme do not say they inherit from the worker. Raises ConfigurationError."""
    resolved: dict[str, Privileges] = {}
    for process in PROCESSES:
        own = declared.get(process, Privileges())
        root, runas = (
            _one_of(process, keyword, getattr(own, keyword), option, getattr(settings, option))
            for keyword, option in zip(("root", "runas"), _OPTIONS[process], strict=True)
        )
        inherited = resolved.get("worker", Privileges())
        resolved[process] = dataclasses.replace(own, root=root or inherited.root, runas=runas or inherited.runas)
    return resolved


def _one_of(process: str, keyword: str, ours: str | None, option: str, theirs: str | None) -> str | None:
    if ours is not None and theirs is not None and ours != theirs:
        both = f"kore.privsep({process!r}, {keyword}={ours!r}) and kore.config.{option} = {theirs!r}"
        raise ConfigurationError(f"{both} say different things; give one of them")
    return theirs if ours is None else ours


def deployment(settings: Settings, worker: Privileges, euid: int) -> Deployment:
    """What `settings.deployment` means for a parent with the effective user id `euid`. Source: kore-api.md 2.8.

    Not set, it means dev for everybody but root. Root gets the user switch and the chroot that it asked for, in the
    foreground: there is no user to switch to unless one is named, and a chroot nobody asked for breaks imports.
    """
    name = settings.deployment
    if name == "dev" or (name is None and euid != 0):
        return Deployment("dev", foreground=True, switch_user=False, chroot=False)
    if name is None:
        chroot = worker.root is not None and not worker.skip_chroot
        switch = worker.runas is not None and not worker.skip_runas
        return Deployment("", foreground=True, switch_user=switch, chroot=chroot)
    return Deployment(
        name, foreground=name != "production", switch_user=not worker.skip_runas, chroot=not worker.skip_chroot
    )
