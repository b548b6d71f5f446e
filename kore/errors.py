"""The exceptions kore raises, and what each means to who catches it."""

from __future__ import annotations


class ConfigurationError(ValueError):
    """Something an application declared cannot be used; the message names it, its value and what is allowed."""


class StartError(Exception):
    """The server cannot start; the message says what happened, where, and what to do. Printed as one line."""


class SandboxError(StartError):
    """`step`, of giving rights away, failed for `reason`: the process has more rights than it should and must end.

    It stops the whole server, since a worker that replaced this one would fail in the same way.
    """

    def __init__(self, step: str, reason: str) -> None:
        super().__init__(f"{step}: {reason}")
        self.step = step
        self.reason = reason


class ProtocolError(Exception):
    """The peer broke the protocol: `status` is what to answer, `reason` is for the log."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(status, reason)
        self.status = status
        self.reason = reason


class BodyError(ValueError):
    """A request's body is not what its Content-Type says; `status` is the answer where the application gives none."""

    def __init__(self, reason: str, status: int = 400) -> None:
        super().__init__(reason)
        self.status = status


class EngineError(OSError):
    """An I/O engine could not be set up: `call` failed with `errno`; `hint` is a likely reason."""

    def __init__(self, call: str, errno: int, strerror: str, hint: str) -> None:
        super().__init__(errno, strerror)
        self.call = call
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.call}: {self.strerror} (errno {self.errno}): {self.hint}"
