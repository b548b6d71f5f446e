"""Child processes of asyncio: ``subprocess_exec`` and ``subprocess_shell``, and what is built on them.

The child is made by `subprocess.Popen`, which closes every fd it is not meant to have. Its end is awaited by
`Signals.watch_child`, so no child watcher of asyncio's, no SIGCHLD and no thread is needed.
"""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
from asyncio import base_subprocess
from typing import Any

from kore.reactor.pipes import ReadPipeTransport, WritePipeTransport
from kore.reactor.signals import Signals

logger = logging.getLogger("asyncio")

_UNKNOWN_STATUS = 255  # asyncio's word for a child whose status somebody else took


class SubprocessTransport(base_subprocess.BaseSubprocessTransport):
    """A child process and the pipes to it; closing it kills the child."""

    _proc: Any
    _pid: int
    _pipes: dict[int, Any]

    def _start(self, args: Any, shell: bool, stdin: Any, stdout: Any, stderr: Any, bufsize: int, **kwargs: Any) -> None:
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
        self.watch_child(transport._pid, transport.ended)
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
