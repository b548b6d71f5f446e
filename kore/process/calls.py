"""The functions an application calls to speak to its processes: kore.log, sendobj, fatal, shutdown and their kin.

Arguments are positional as in the reference; what each returns is in the notes on the API, sections 7.2 to 7.12.
"""

from __future__ import annotations

import pickle
import signal as signals
from typing import TYPE_CHECKING, NoReturn

from kore.application.constants import WEBSOCKET_BROADCAST_GLOBAL
from kore.application.declared import application
from kore.process import role
from kore.process.channel import Kind
from kore.process.pieces import TO_ALL, TO_OTHERS

if TYPE_CHECKING:
    from kore.http.peer import Peer

UNTRAPPABLE = frozenset({signals.SIGKILL, signals.SIGSTOP})
"""signal(7): no process may catch them."""


def log(priority: int, text: str, /) -> bool:
    """Write `text` to the server's log and return True; `priority` is LOG_ERR, LOG_NOTICE or LOG_INFO.

    Control characters are escaped. A worker that logs faster than the log is written loses lines, which are counted.
    Raises TypeError when `priority` is no int or `text` no str. Source: reference, "log".
    """
    if not isinstance(priority, int):
        raise TypeError(f"log: priority must be an int, not {type(priority).__name__}")
    if not isinstance(text, str):
        raise TypeError(f"log: text must be a str, not {type(text).__name__}")
    role.role.log(priority, text)
    return True


def worker(*_ignored: object) -> int | None:
    """The id of this worker, 1 and up; None in the parent. Source: reference, "worker"."""
    return role.role.worker


def sendobj(obj: object, /, *, worker: int | None = None) -> None:
    """Send `obj` to the ``koreapp.onmsg(obj)`` hook of worker `worker` (1 and up), or of all workers, this one too.

    The object is pickled at once, so what happens to it later changes nothing; at most 16 MiB, pickled. It arrives
    through the loop, never inside this call, and objects from one worker arrive at another in the order they were sent.
    A worker gets each object once at most, and exactly once if its process lives on and takes what it is sent: what
    a process had not taken when it died is lost with it, its successor gets what is sent from its start on. A worker
    that is stuck loses what goes beyond 20 MiB waiting for it; the log tells how many. Nothing is confirmed.

    Raises what pickling raises; TypeError when `worker` is no int (or a bool); ValueError for an object that is too
    long; RuntimeError when there is no such worker, outside of a worker, and when so much waits for the parent
    that nothing can be added. Source: kore-api.md 16.
    """
    if worker is not None and type(worker) is not int:
        raise TypeError(f"sendobj: worker is the id of one, an int, not {type(worker).__name__}")
    mine = role.role
    if mine.post is None:
        raise RuntimeError("sendobj: workers send to workers, and this is none")
    if worker is not None and not 1 <= worker <= mine.workers:
        raise RuntimeError(f"sendobj: there is no worker {worker}; their ids are 1 to {mine.workers}")
    target = TO_ALL if worker is None else worker
    mine.post.send(Kind.OBJECT, target, pickle.dumps(obj, pickle.HIGHEST_PROTOCOL))


def websocket_broadcast(
    src: Peer | None, op: int, data: str | bytes | bytearray | memoryview, scope: int, /
) -> bool:
    """Send a WebSocket message to all clients of this worker but `src`; with WEBSOCKET_BROADCAST_GLOBAL of all workers.

    `src` is the connection to leave out, or None; `op` is WEBSOCKET_OP_TEXT or WEBSOCKET_OP_BINARY; `data` a str
    (sent as UTF-8) or bytes-like; any other `scope` means this worker. Every client gets the message once. Returns
    True. Raises TypeError for arguments of other types and for another `op`, ValueError for text that is no UTF-8 and
    for more than 16 MiB to all workers, RuntimeError outside of a worker and when so much waits for the parent that
    nothing can be added; then nobody got the message. Source: reference, "websocket_broadcast"; kore-api.md 11.5.
    """
    from kore.http.peer import Peer
    from kore.http.websocket import broadcast
    from kore.http.websocket.frames import checked

    if src is not None and not isinstance(src, Peer):
        raise TypeError(f"websocket_broadcast: src is a connection or None, not {type(src).__name__}")
    payload = checked(op, data)
    if not isinstance(scope, int):
        raise TypeError(f"websocket_broadcast: scope is an int, not {type(scope).__name__}")
    mine = role.role
    if mine.post is None or mine.server is None:
        raise RuntimeError("websocket_broadcast: workers have clients, and this is none")
    if scope == WEBSOCKET_BROADCAST_GLOBAL and mine.workers > 1:
        # First, because it may fail: then nobody has got it.
        mine.post.send(Kind.BROADCAST, TO_OTHERS, bytes((op,)) + payload)
    broadcast.local(mine.server, src, op, payload)
    return True


def fatal(reason: object = "fatal", /, *_ignored: object) -> NoReturn:
    """Log `reason` and end this process with exit code 1; the parent replaces a worker, or stops by its policy.

    Never returns, whatever the argument. Source: reference, "fatal".
    """
    role.role.fatal(_reason(reason, "fatal"))


def fatalx(reason: object = "fatalx", /, *_ignored: object) -> NoReturn:
    """Log `reason` and stop the whole server with exit code 1. Never returns."""
    role.role.fatalx(_reason(reason, "fatalx"))


def shutdown() -> bool:
    """Ask the parent to stop the server as SIGQUIT does, exit code 0; returns True at once. In the parent: fatal."""
    return role.role.shutdown()


def setname(name: str, /) -> None:
    """Set the first word of the process titles; call it before the start. Raises TypeError, ValueError.

    Source: reference, "setname".
    """
    application.name(name)


def sigtrap(signum: int, /) -> None:
    """Trap a signal, so that the application's `signal` hook is called for it in a worker.

    Before the start it holds for all workers, and the parent passes the signal on to them; in a worker it holds
    for that worker. Raises TypeError, ValueError for a number that is no signal or cannot be trapped.
    """
    if not isinstance(signum, int):
        raise TypeError(f"sigtrap: a signal number is an int, not {type(signum).__name__}")
    if signum not in signals.valid_signals() or signum in UNTRAPPABLE:
        raise ValueError(f"sigtrap: signal {signum} cannot be trapped")
    role.role.trap(int(signum))


def _reason(reason: object, name: str) -> str:
    return reason if isinstance(reason, str) else f"{name} called without a reason ({reason!r})"
