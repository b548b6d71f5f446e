"""How streams of the driver contract end, on real sockets and on every engine."""

from __future__ import annotations

import socket

from driver_harness import (
    NOT_THERE,
    SECONDS_MAX,
    Peer,
    own,
    processor_time,
    read_all,
    reset,
    run,
    run_until_lost,
    same,
    tcp_pair,
    turns,
    unix_pair,
    wait_readable,
)

TEN_MIB = 10 << 20
PATTERN = bytes(range(256)) * 4096  # 1 MiB in which every shift shows


def test_write_after_the_peer_ended(driver, each_pair) -> None:
    """A half-close by the peer ends the input once, and still gets its answer."""
    near, far = each_pair
    owner = own(driver, near)
    far.sendall(b"question")
    far.shutdown(socket.SHUT_WR)
    run(driver, lambda: owner.ends)
    before = processor_time()
    driver.wait(0.2)
    driver.wait(0.2)
    assert processor_time() - before < 0.1, "a half-closed stream keeps the processor busy"
    owner.stream.write(b"answer")
    owner.stream.write(bytes(TEN_MIB))
    reader = []
    thread = Peer(target=lambda: reader.append(read_all(far)))
    owner.stream.close()
    thread.start()
    run_until_lost(driver, owner)
    thread.join(SECONDS_MAX)
    assert same(reader[0], b"answer" + bytes(TEN_MIB))
    assert owner.ends == 1
    assert owner.losses == [0]


def test_finish_sends_the_end_after_the_output(driver, each_pair) -> None:
    """finish() half-closes behind the last byte; reading goes on; later writes are dropped."""
    near, far = each_pair
    owner = own(driver, near)
    owner.stream.write(bytes(TEN_MIB))
    turns(driver, 1)
    owner.stream.write(b"last")
    owner.stream.finish()
    owner.stream.finish()
    owner.stream.write(b"too late")
    received = []
    thread = Peer(target=lambda: received.append(read_all(far)))
    thread.start()
    run(driver, lambda: owner.stream.pending == 0)
    turns(driver)
    thread.join(SECONDS_MAX)
    assert same(received[0], bytes(TEN_MIB) + b"last")
    owner.stream.write(b"too late")
    far.sendall(b"still heard")
    run(driver, lambda: owner.data == b"still heard")
    assert not owner.losses
    owner.stream.close()
    run_until_lost(driver, owner)
    assert owner.losses == [0]
    assert far.recv(8) == b""


def test_finish_on_an_idle_stream(driver, each_pair) -> None:
    """finish() with nothing to send sends the end alone; when the peer ends too, the stream is quiet or over."""
    near, far = each_pair
    owner = own(driver, near)
    owner.stream.finish()
    turns(driver)
    assert far.recv(8) == b""
    far.shutdown(socket.SHUT_WR)
    run(driver, lambda: owner.ends)
    before = processor_time()
    driver.wait(0.2)
    driver.wait(0.2)
    assert processor_time() - before < 0.1, "a stream closed both ways keeps the processor busy"
    owner.stream.close()
    run_until_lost(driver, owner)
    assert owner.losses == [0]


def test_close_sends_what_was_written(driver, each_pair) -> None:
    """close() right after a write of more than the kernel takes: the peer gets all of it, then the end."""
    near, far = each_pair
    owner = own(driver, near)
    owner.stream.write(bytes(TEN_MIB))
    owner.stream.close()
    turns(driver)
    assert not owner.losses
    received = []
    thread = Peer(target=lambda: received.append(len(read_all(far))))
    thread.start()
    run_until_lost(driver, owner)
    thread.join(SECONDS_MAX)
    assert owner.losses == [0]
    assert owner.drains == 0
    assert received == [TEN_MIB]


def test_input_after_close_is_not_delivered(driver, each_pair) -> None:
    """While a close waits for its output to leave, input is nobody's, and does not keep the processor busy."""
    near, far = each_pair
    owner = own(driver, near)
    owner.stream.write(bytes(TEN_MIB))
    owner.stream.close()
    turns(driver)
    assert owner.stalls == 1, "without that nobody would set it a deadline"
    far.sendall(b"nobody listens")
    before = processor_time()
    driver.wait(0.2)
    driver.wait(0.2)
    assert processor_time() - before < 0.1, "input that nobody wants keeps the processor busy"
    assert not owner.data
    thread = Peer(target=lambda: read_until_end(far))
    thread.start()
    run_until_lost(driver, owner)
    thread.join(SECONDS_MAX)
    assert owner.losses == [0]


def read_until_end(sock: socket.socket) -> bytes:
    """Everything, to the end or the RST that a close with unread input causes (RFC 9293 3.6)."""
    data = bytearray()
    try:
        while piece := sock.recv(65536):
            data += piece
    except ConnectionResetError:
        pass
    return bytes(data)


def test_close_with_nothing_to_send(driver, each_pair) -> None:
    """close() closes, tells once, and forgets what comes after it."""
    near, far = each_pair
    owner = own(driver, near)
    far.sendall(b"unread")
    owner.stream.close()
    owner.stream.close()
    run_until_lost(driver, owner)
    for late in (owner.stream.close, owner.stream.abort, owner.stream.finish, owner.stream.pause, owner.stream.resume):
        late()
    owner.stream.write(b"x")
    turns(driver)
    assert owner.losses == [0]
    assert not owner.data
    assert owner.stream.pending == 0


def test_write_after_close_is_dropped(driver, each_pair) -> None:
    """What is written after close() does not leave, also when earlier output is still waiting."""
    near, far = each_pair
    owner = own(driver, near)
    owner.stream.write(b"before")
    owner.stream.close()
    owner.stream.write(b"after")
    run_until_lost(driver, owner)
    assert read_all(far) == b"before"


def test_abort_drops_what_was_written(driver, each_pair) -> None:
    """abort() closes now, with output still waiting."""
    near, far = each_pair
    owner = own(driver, near)
    owner.stream.write(bytes(TEN_MIB))
    turns(driver)
    assert owner.stream.pending
    owner.stream.write(b"more")
    owner.stream.abort()
    owner.stream.abort()
    run_until_lost(driver, owner)
    assert owner.losses == [0]
    assert len(read_until_end(far)) < TEN_MIB


def test_abort_after_close(driver, each_pair) -> None:
    """A close that waits for a peer who does not read is cut short by abort()."""
    near, _ = each_pair
    owner = own(driver, near)
    owner.stream.write(bytes(TEN_MIB))
    owner.stream.close()
    turns(driver)
    assert not owner.losses
    owner.stream.abort()
    run_until_lost(driver, owner)
    assert owner.losses == [0]


def test_reset_by_the_peer(driver) -> None:
    """A RST is a loss with an errno, told once."""
    near, far = tcp_pair()
    owner = own(driver, near)
    turns(driver)
    reset(far)
    run_until_lost(driver, owner)
    assert owner.losses[0] in NOT_THERE
    assert not owner.ends
    turns(driver)


def test_reset_while_output_waits(driver) -> None:
    """A RST while the peer owes us room: lost, and nothing more is sent or drained."""
    near, far = tcp_pair()
    owner = own(driver, near)
    owner.stream.write(bytes(TEN_MIB))
    turns(driver)
    reset(far)
    run_until_lost(driver, owner)
    assert owner.losses[0] in NOT_THERE
    assert owner.drains == 0


def test_reset_while_closing(driver) -> None:
    """After close() a RST is no news: lost(0)."""
    near, far = tcp_pair()
    owner = own(driver, near)
    owner.stream.write(bytes(TEN_MIB))
    owner.stream.close()
    turns(driver)
    reset(far)
    run_until_lost(driver, owner)
    assert owner.losses == [0]


def test_reset_after_the_end_of_input(driver) -> None:
    """A peer that half-closes, then dies, is heard of: an application waiting to answer it can stop."""
    near, far = tcp_pair()
    owner = own(driver, near)
    far.shutdown(socket.SHUT_WR)
    run(driver, lambda: owner.ends)
    turns(driver)
    assert not owner.losses
    reset(far)
    run_until_lost(driver, owner)
    assert owner.losses[0] in NOT_THERE


def test_unix_peer_gone_after_the_end_of_input(driver) -> None:
    """On a unix socket a close tells more than a FIN: nobody is there to read the answer."""
    near, far = unix_pair()
    owner = own(driver, near)
    far.sendall(b"bye")
    far.close()
    run_until_lost(driver, owner)
    assert owner.data == b"bye"
    assert owner.ends == 1
    assert owner.losses[0] in NOT_THERE


def test_write_to_a_dead_peer(driver) -> None:
    """Writing where nobody reads ends in a loss, and raises nothing."""
    near, far = tcp_pair()
    owner = own(driver, near)
    owner.stream.pause()
    turns(driver)
    reset(far)
    owner.stream.write(b"x")
    owner.stream.write(b"y")
    run_until_lost(driver, owner)
    assert owner.losses[0] in NOT_THERE


def test_input_before_a_reset_is_delivered(driver) -> None:
    """What a peer sent before it died is not lost with it, when it was there first."""
    near, far = tcp_pair()
    far.sendall(b"last words")
    wait_readable(near.fileno())
    owner = own(driver, near)
    run(driver, lambda: owner.data)
    reset(far)
    run_until_lost(driver, owner)
    assert owner.data == b"last words"
