"""What a process may do, in one frozen record, and the order in which everything else is given up.

The record is made by the parent from what the application declared, before the first fork; a worker that is started
again years later is given the same one. The order is that of the sandbox as a whole: each layer is closed as soon as
nothing above it needs what it takes away, and none can be opened again.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from kore.sandbox import privileges
from kore.sandbox.privileges import Rights

Engine = TypeVar("Engine")

@dataclass(frozen=True, slots=True, kw_only=True)
class Confinement:
    """What one kind of process may. All paths are as the process sees them when it has entered its root."""

    process: str
    """"worker", "keymgr" or "acme"."""
    on: bool
    """Whether there is a sandbox at all. Without one only the root directory and the user change."""
    tracing: bool = False
    """Whether the system calls that the filter would refuse are told of and then made; then there is a filter in every
    deployment."""
    rights: Rights = field(default_factory=Rights)
    read: tuple[str, ...] = ()
    """Files and directories that may be read."""
    write: tuple[str, ...] = ()
    """Directories and files that may be written to, and read: the one for request bodies, and what the options add."""
    connect_ports: tuple[int, ...] | None = ()
    """TCP ports that may be connected to; None: any."""
    names: bool = False
    """Whether host names are looked up over the network."""
    sockets: tuple[str, ...] = ()
    """UNIX sockets of the databases."""
    filemaps: tuple[str, ...] = ()
    """The directories that files are served from."""
    offload: str | None = None
    """The directory for bodies of requests; None: they stay in memory."""
    mounts: tuple[str, ...] = ()
    """The ASGI applications that are mounted, by name."""

    @property
    def connects(self) -> bool:
        """Whether it may open connections at all."""
        return self.connect_ports is None or bool(self.connect_ports) or bool(self.sockets)

    @property
    def paths(self) -> bool:
        """Whether it may connect to sockets that have a path: to all of them, as nothing in the kernel tells which."""
        return self.connect_ports is None or bool(self.sockets)


def prepare(confinement: Confinement) -> None:
    """In the parent: load what `enter` needs. Raises SandboxError."""
    if confinement.on:
        privileges.prepare()
    if confinement.on or confinement.tracing:
        from kore.sandbox import landlock as _landlock  # noqa: F401 (a worker may live where they cannot be loaded)
        from kore.sandbox import program_policy as _program_policy  # noqa: F401
        from kore.sandbox import seccomp
        from kore.sandbox import spawner as _spawner  # noqa: F401

        seccomp.preload()


def enter(
    confinement: Confinement,
    *,
    spawner: Callable[[], object],
    engine: Callable[[], Engine],
    close_filter: Callable[[], object],
) -> Engine:
    """Give up all that `confinement` does not have, in this process and for good; what `engine` made.

    `spawner` forks the process that starts programs: it has the user, and none of what follows. `engine` makes the
    ring, which the filter then forbids. `close_filter` asks the application and installs the filter. Raises
    SandboxError, which names the step; whatever `engine` raises.
    """
    privileges.give_up(confinement.rights)
    if confinement.on or confinement.tracing:
        spawner()
    made = engine()
    if confinement.on and not confinement.tracing:
        _close_files(confinement)  # it cannot be told to look on
    if confinement.on or confinement.tracing:
        close_filter()
    return made


def _close_files(confinement: Confinement) -> None:
    """Landlock. What the kernel does not know is told of by whoever starts the workers, once."""
    from kore.sandbox import landlock

    landlock.restrict_self(
        landlock.Rules(
            read=_there(confinement.read),
            execute=(),
            write=_there(confinement.write),
            connect_ports=confinement.connect_ports,
            bind_ports=(),
            scoped=True,
        )
    )


def _there(paths: tuple[str, ...]) -> tuple[str, ...]:
    """Those that exist: a rule is about a file, and what is not there cannot be opened anyway."""
    return tuple(path for path in paths if os.path.exists(path))
