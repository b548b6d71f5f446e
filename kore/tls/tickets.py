"""The masters that workers derive the keys of session tickets from: random, shared by all workers, replaced in time.

Who gets hold of one can read the sessions that were resumed with it, so none is old: a new one makes tickets after
ROTATION_SECONDS, and the one before is only understood. They are never written anywhere.
"""

from __future__ import annotations

import os
from typing import Final

from kore.tls.messages import TICKET_BYTES, Said, Told

ROTATION_SECONDS: Final = 12 * 3600.0

MASTERS_MAX: Final = 2
"""Kept: a ticket is good for at least ROTATION_SECONDS, longer than clients keep it by default."""


class Masters:
    """The masters, newest first."""

    def __init__(self) -> None:
        self.keys = [os.urandom(TICKET_BYTES)]

    def rotate(self) -> None:
        """A new one in front; the oldest goes."""
        self.keys = [os.urandom(TICKET_BYTES), *self.keys][:MASTERS_MAX]

    def told(self) -> Told:
        """What workers are told."""
        return Told(Said.TICKETS, 0, (tuple(self.keys),))
