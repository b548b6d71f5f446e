"""The end of a child process by pidfd_open(2): Linux's way, on any engine that polls."""

from __future__ import annotations

import os
import signal
from select import POLLIN
from typing import Any

from kore.driver import Result


class PidfdChild:
    """See kore.driver.Child. Raises OSError as pidfd_open(2) does."""

    __slots__ = ("driver", "pidfd")

    def __init__(self, driver: Any, pid: int, callback: Result) -> None:
        self.pidfd = -1
        self.pidfd = os.pidfd_open(pid)
        self.driver = driver
        self.wait(callback)

    def wait(self, callback: Result) -> None:
        """See kore.driver.Child."""
        self.driver.poll(self.pidfd, POLLIN, callback)

    def kill(self) -> None:
        """See kore.driver.Child."""
        signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    def close(self) -> None:
        """See kore.driver.Child."""
        fd, self.pidfd = self.pidfd, -1
        if fd >= 0:
            os.close(fd)

    # The loop was closed before the process ended.
    def __del__(self) -> None:
        self.close()
