"""A FIN is for the connection it was asked for, also when that ends at once and its fd becomes another's."""

from __future__ import annotations

import pytest
from driver_harness import own, unix_pair


def test_a_late_fin_does_not_end_the_next_connection(driver) -> None:
    """finish() and abort() in a row, and a new connection on the fd that became free, many times.

    A shutdown that the kernel carries out later, on whatever the fd is then, ends some of them.
    """
    for _ in range(60):
        pairs = [unix_pair() for _ in range(20)]
        owners = [own(driver, near) for near, _ in pairs]
        used = {owner.stream.fd for owner in owners}
        for owner in owners:
            owner.stream.finish()
        driver.wait(0)
        for owner in owners:
            owner.stream.abort()
        driver.wait(0)
        following = [unix_pair() for _ in range(20)]
        assert used & {sock.fileno() for pair in following for sock in pair}, "fds are used again"
        for one, two in following:
            one.sendall(b"x")
            assert two.recv(1) == b"x"
            two.sendall(b"x")
            assert one.recv(1) == b"x"
            for sock in (one, two):
                sock.setblocking(False)
                with pytest.raises(BlockingIOError):
                    sock.recv(1)
        for sock in (sock for pair in (*following, *pairs) for sock in pair):
            sock.close()
