"""kore's loop for programs that choose their event loop by policy, or ask for one by a factory.

`new_event_loop` is the way for ``asyncio.Runner(loop_factory=...)``. Policies are deprecated from Python 3.14 on and
will go; the class exists for as long as asyncio has them.
"""

from __future__ import annotations

import asyncio
import warnings
from typing import Any

from kore.reactor.engine import new_driver
from kore.reactor.loop import Loop


def new_event_loop(io: str | None = None) -> Loop:
    """A loop of its own on engine `io` ("uring", "epoll", "kqueue"; None: $KORE_IO or the best there is).

    Raises EngineError.
    """
    return Loop(new_driver(io))


with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    _Base: Any = getattr(asyncio, "DefaultEventLoopPolicy", object)


class EventLoopPolicy(_Base):  # type: ignore[misc]
    """``asyncio.set_event_loop_policy(kore.reactor.EventLoopPolicy())`` makes every new loop one of kore's."""

    def new_event_loop(self) -> Loop:
        """A new loop of kore's."""
        return new_event_loop()
