"""Child processes of asyncio: ``subprocess_exec`` and ``subprocess_shell``, and what is built on them.

The child is made by `subprocess.Popen`, which closes every fd it is not meant to have; in the sandbox by the spawner,
as those of kore.proc are. Its end is awaited by `Signals.watch`, so no child watcher of asyncio's, no SIGCHLD and no
thread is needed.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
from asyncio import base_subprocess
from collections.abc import Mapping
from typing import Any

from kore.reactor import spawning
from kore.reactor.children import STATUS_LOST
from kore.reactor.pipes import ReadPipeTransport, WritePipeTransport
from kore.reactor.signals import Signals

logger = logging.getLogger("asyncio")

_WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "close_fds": (True, None), "restore_signals": (True, None), "pass_fds": ((), [], None), "umask": (-1, None),
    "universal_newlines": (False, None), "creationflags": (0, None), "process_group": (None,), "pipesize": (-1, None),
    "text": (False, None),
}
"""Options of Popen, and the values of them that a spawner fulfils anyway."""

_UNKNOWN_STATUS = 255  # asyncio's word for a child whose status somebody else took


class SpawnedProcess:
    """A child of the spawner that looks like a `subprocess.Popen`, as far as asyncio does.

    Raises OSError as Popen does; ValueError for options that a spawner does not have.
    """

    def __init__(
        self, args: Any, shell: bool, stdin: Any, stdout: Any, stderr: Any, bufsize: int, *, cwd: Any = None,
        env: Mapping[Any, Any] | None = None, executable: Any = None, start_new_session: bool = False, **others: Any,
    ) -> None:
        wanted = sorted(name for name, value in others.items() if value not in _WITHOUT_EFFECT.get(name, (None,)))
        if wanted:
            raise ValueError(
                f"{', '.join(wanted)}: not in the sandbox, where another process starts programs; without it, or with "
                "kore.proc, it can be started")
        words = ["/bin/sh", "-c", os.fsdecode(args)] if shell else [os.fsdecode(word) for word in args]
        given = os.environ if env is None else {os.fsdecode(name): os.fsdecode(text) for name, text in env.items()}
        self.returncode: int | None = None
        self._ours: list[Any] = [None, None, None]
        theirs: list[int] = []
        opened: list[int] = []
        try:
            for number, wish in enumerate((stdin, stdout, stderr)):
                theirs.append(self._stream(number, wish, theirs, opened, bufsize))
            self.child = spawning.start(
                words[0] if executable is None else os.fsdecode(executable), words, given,
                (theirs[0], theirs[1], theirs[2]), directory=None if cwd is None else os.fsdecode(cwd),
                new_session=start_new_session)
        except BaseException:
            for file in self._ours:
                if file is not None:
                    file.close()
            raise
        finally:
            for fd in opened:
                os.close(fd)
        self.pid = self.child.pid
        self.stdin, self.stdout, self.stderr = self._ours

    def _stream(self, number: int, wish: Any, theirs: list[int], opened: list[int], bufsize: int) -> int:
        """The child's descriptor `number`; what was opened for it alone is in `opened`."""
        if wish is None:
            return number
        if wish == subprocess.STDOUT:
            return theirs[1]
        if wish == subprocess.DEVNULL:
            opened.append(os.open(os.devnull, os.O_RDWR))
        elif wish == subprocess.PIPE:
            reader, writer = os.pipe()
            child, own = (reader, writer) if number == 0 else (writer, reader)
            opened.append(child)
            self._ours[number] = open(own, "wb" if number == 0 else "rb", bufsize)  # noqa: SIM115 (the transport's)
        else:
            return wish if isinstance(wish, int) else int(wish.fileno())
        return opened[-1]

    def poll(self) -> int | None:
        """The exit code, if it has ended."""
        if self.returncode is None:
            status = self.child.look()
            if status is not None and status != STATUS_LOST:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send it a signal; nothing happens when it has ended."""
        self.child.send_signal(int(number))

    def terminate(self) -> None:
        """SIGTERM."""
        self.child.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL."""
        self.child.kill()


class SubprocessTransport(base_subprocess.BaseSubprocessTransport):
    """A child process and the pipes to it; closing it kills the child."""

    _proc: Any
    _pid: int
    _pipes: dict[int, Any]

    def _start(self, args: Any, shell: bool, stdin: Any, stdout: Any, stderr: Any, bufsize: int, **kwargs: Any) -> None:
        if spawning.in_sandbox():
            self._proc = SpawnedProcess(args, shell, stdin, stdout, stderr, bufsize, **kwargs)
            return
        self._proc = subprocess.Popen(
            args, shell=shell, stdin=stdin, stdout=stdout, stderr=stderr, universal_newlines=False, bufsize=bufsize,
            **kwargs,
        )

    async def _connect_pipes(self, waiter: asyncio.Future[Any] | None) -> None:
        await super()._connect_pipes(waiter)
        if self._closed:
            # Closed meanwhile, when there were no pipes to close: a grandchild may hold their other ends for ever.
            for pipe in self._pipes.values():
                if pipe is not None:
                    pipe.pipe.close()

    def ended(self, _pid: int, status: int) -> None:
        """The child has ended with `status`, that of waitpid(2) or -1."""
        if status != -1:
            code = os.waitstatus_to_exitcode(status)
        elif self._proc.returncode is not None:  # close() looked just before
            code = self._proc.returncode
        else:
            code = _UNKNOWN_STATUS
            logger.warning("child process pid %d exit status already read: will report returncode 255", self._pid)
        self._process_exited(code)

    def kill_unwatched(self) -> None:
        """End the child here and now: nothing would tell of its end, and who asked for it will not know of it."""
        self._proc.kill()
        self.close()
        self._process_exited(self._proc.wait())


class Subprocesses(Signals):
    """The part of `Loop` that makes pipes and child processes."""

    def _make_read_pipe_transport(
        self, pipe: Any, protocol: asyncio.BaseProtocol, waiter: asyncio.Future[Any] | None = None, extra: Any = None
    ) -> ReadPipeTransport:
        return ReadPipeTransport(self, pipe, protocol, waiter, extra)  # type: ignore[arg-type]

    def _make_write_pipe_transport(
        self, pipe: Any, protocol: asyncio.BaseProtocol, waiter: asyncio.Future[Any] | None = None, extra: Any = None
    ) -> WritePipeTransport:
        return WritePipeTransport(self, pipe, protocol, waiter, extra)  # type: ignore[arg-type]

    async def _make_subprocess_transport(
        self,
        protocol: asyncio.SubprocessProtocol,
        args: Any,
        shell: bool,
        stdin: Any,
        stdout: Any,
        stderr: Any,
        bufsize: int,
        extra: Any = None,
        **kwargs: Any,
    ) -> SubprocessTransport:
        waiter = self.create_future()
        transport = SubprocessTransport(
            self, protocol, args, shell, stdin, stdout, stderr, bufsize, waiter=waiter, extra=extra, **kwargs
        )
        if isinstance(transport._proc, SpawnedProcess):
            self.watch(transport._proc.child, transport.ended)
        else:
            try:
                self.watch_child(transport._pid, transport.ended)
            except OSError:
                transport.kill_unwatched()
                raise
        try:
            await waiter
        except (SystemExit, KeyboardInterrupt, GeneratorExit):
            # Killed: there is no waiting any more. The child is reaped all the same, by whom watches it.
            transport.close()
            raise
        except BaseException:
            transport.close()
            await transport._wait()
            raise
        return transport
