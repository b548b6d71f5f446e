"""What the tests of the spawner share: one that is hired, used for kore.proc, and gone with the test."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator

from driver_harness import fds

from kore.reactor import spawning
from kore.sandbox.spawner import SpawnerClient, Terms, start_spawner


def hiring() -> Iterator[Callable[..., SpawnerClient]]:
    """For fixtures: what makes spawners, each in place of the one before; nothing of them is left open."""
    before = fds()

    def hire(**terms):
        spawning.close()
        spawner = start_spawner(Terms(**terms))
        spawning.use(spawner)
        return spawner

    yield hire
    spawning.close()
    gc.collect()
    assert fds() <= before
