"""The worker's side of the key manager: what it waits for, for how long, and the order of what it is told."""

from __future__ import annotations

import socket
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kore.tls import link as link_module
from kore.tls import messages
from kore.tls.link import KeyLink, KeyRefusedError, KeysUnavailable
from kore.tls.messages import Assembly, MalformedError, Said, Told, read_ask, read_confirmed

BLOCK = bytes(32)


class Heard:
    """What the contexts would be told, in order."""

    def __init__(self) -> None:
        self.calls: list = []

    def __getattr__(self, name):
        return lambda *arguments: self.calls.append((name, *arguments))


class Rig:
    """A link, the manager's end of its socket, and a loop's turns by hand."""

    def __init__(self) -> None:
        self.turns: list = []
        self.link = KeyLink()
        self.link.soon = self.turns.append
        self.heard = self.link.listener = Heard()
        self.woken = 0
        self.link.on_available.append(self._woken)
        self.connect()

    def _woken(self) -> None:
        self.woken += 1

    def connect(self) -> None:
        self.manager, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.manager.settimeout(20)
        self.link.connect(theirs)

    def tell(self, *told: Told) -> None:
        for one in told:
            for piece in one.pieces():
                self.manager.send(piece)

    def turn(self) -> None:
        turns, self.turns[:] = list(self.turns), []
        for call in turns:
            call()

    def begin(self) -> None:
        """As after a start: everything is told."""
        self.tell(Told(Said.COMPLETE))
        assert self.link.receive()
        self.turn()

    def answers(self, *steps) -> threading.Thread:
        """A manager that reads one request and does these things with it."""

        def run() -> None:
            ask = read_ask(self.manager.recv(65536))
            for step in steps:
                step(ask)

        thread = threading.Thread(target=run)
        thread.start()
        return thread


@pytest.fixture
def rig():
    made = Rig()
    yield made
    made.link.close()
    made.manager.close()


def test_nobody_is_asked_before_the_manager_has_said_something(rig):
    with pytest.raises(KeysUnavailable):
        rig.link.sign(0, "ec", 0, BLOCK)
    rig.begin()
    assert rig.link.available
    assert rig.woken == 1
    assert rig.heard.calls == [("complete",)]


def test_a_signature_is_asked_for_and_comes(rig):
    rig.begin()
    asked = []
    thread = rig.answers(asked.append, lambda ask: rig.manager.send(messages.signed(ask.id, b"signature")))
    assert rig.link.sign(3, "rsa", 1, b"block", b"12345678") == b"signature"
    thread.join()
    (ask,) = asked
    assert (ask.domain, ask.kind, ask.padding, ask.block, ask.key) == (3, "rsa", 1, b"block", b"12345678")


def test_what_is_told_meanwhile_is_kept_in_its_order_for_the_next_turn(rig):
    """Contexts must not be changed in the middle of a handshake that uses them."""
    rig.begin()
    rig.heard.calls.clear()
    told = [Told(Said.CERTIFICATES, 1, ((b"leaf", b"issuer"),)), Told(Said.TICKETS, 0, ((b"new", b"old"),))]
    more = Told(Said.CERTIFICATES, 1, ((b"second",),))
    thread = rig.answers(
        lambda _: rig.tell(*told), lambda ask: rig.manager.send(messages.signed(ask.id, b"s")), lambda _: rig.tell(more)
    )
    assert rig.link.sign(1, "ec", 0, BLOCK) == b"s"
    thread.join()
    assert not rig.heard.calls
    rig.turn()
    assert rig.heard.calls == [("certificates", 1, [[b"leaf", b"issuer"]]), ("tickets", [b"new", b"old"])]
    assert rig.link.receive()
    assert rig.heard.calls[-1] == ("certificates", 1, [[b"second"]])


def test_a_manager_that_is_slow_is_asked_once(rig, monkeypatch):
    """The wait ends by time once; then nobody is asked until it has answered, and the late answer is nobody's."""
    monkeypatch.setattr(link_module, "SIGN_SECONDS_MAX", 0.01)
    rig.begin()
    for _ in range(5):
        with pytest.raises(KeysUnavailable):
            rig.link.sign(0, "ec", 0, BLOCK)
    assert not rig.link.available
    ask = read_ask(rig.manager.recv(65536))
    rig.manager.setblocking(False)
    with pytest.raises(BlockingIOError):
        rig.manager.recv(65536)
    rig.manager.settimeout(20)
    rig.manager.send(messages.signed(ask.id, b"late"))
    assert rig.link.receive()
    rig.turn()
    assert rig.link.available
    assert rig.woken == 2
    monkeypatch.undo()
    thread = rig.answers(
        lambda ask: rig.manager.send(messages.signed(ask.id - 1, b"somebody else's")),
        lambda ask: rig.manager.send(messages.signed(ask.id, b"in time")),
    )
    assert rig.link.sign(0, "ec", 0, BLOCK) == b"in time"
    thread.join()


def test_a_key_that_is_not_there_is_another_matter(rig):
    rig.begin()
    thread = rig.answers(lambda ask: rig.manager.send(messages.refused(ask.id, "no such key")))
    with pytest.raises(KeyRefusedError, match="no such key"):
        rig.link.sign(0, "ec", 0, BLOCK)
    thread.join()
    assert rig.link.available, "it answers"


def test_a_manager_that_dies_in_the_middle_and_its_successor(rig):
    rig.begin()
    rig.tell(Told(Said.CERTIFICATES, 0, ((b"told by the first",),)))
    half = next(Told(Said.REVOKED, 0, ((bytes(100_000),),)).pieces())
    rig.manager.send(half)
    thread = rig.answers(lambda _: rig.manager.close())
    with pytest.raises(KeysUnavailable, match="gone"):
        rig.link.sign(0, "ec", 0, BLOCK)
    thread.join()
    assert not rig.link.available
    assert not rig.link.receive()
    assert rig.link.fileno() == -1
    rig.connect()
    assert not rig.link.available
    rig.tell(Told(Said.CERTIFICATES, 0, ((b"told by the second",),)), Told(Said.COMPLETE))
    assert rig.link.receive()
    told = [call for call in rig.heard.calls if call[0] == "certificates"]
    assert told == [("certificates", 0, [[b"told by the first"]]), ("certificates", 0, [[b"told by the second"]])]
    rig.turn()
    assert rig.link.available
    assert rig.woken == 2


def test_a_challenge_is_confirmed_when_it_is_in_place(rig):
    rig.begin()
    rig.tell(Told(Said.CHALLENGE, 2, ((b"leaf",),)), Told(Said.CHALLENGE, 2, ((),)))
    assert rig.link.receive()
    assert rig.heard.calls[-2:] == [("challenge", 2, [b"leaf"]), ("challenge", 2, None)]
    assert read_confirmed(rig.manager.recv(100)) == (2, messages.challenge_id([b"leaf"]))
    assert read_confirmed(rig.manager.recv(100)) == (2, messages.challenge_id([]))


NONSENSE = {
    "one byte": b"x",
    "an unknown kind": b"\xff\0rest",
    "a request": messages.Ask(1, 0, "ec", 0, bytes(8), BLOCK).message(),
    "an answer without an id": bytes((Said.SIGNED, 0)),
    "a thing cut short": bytes((Said.CERTIFICATES, 0, 0, 0, 0, 1, 0, 1, 0, 0, 0, 9)),
    "a thing that is too long": next(Told(Said.COMPLETE).pieces()) + b"x",
}


@pytest.mark.parametrize("what", NONSENSE)
def test_a_manager_that_talks_nonsense_is_not_listened_to(rig, what):
    rig.begin()
    rig.manager.send(NONSENSE[what])
    assert not rig.link.receive()
    assert rig.link.fileno() == -1
    with pytest.raises(KeysUnavailable):
        rig.link.sign(0, "ec", 0, BLOCK)


def test_another_thing_in_the_middle_of_one_is_nonsense():
    first = list(Told(Said.REVOKED, 0, ((bytes(100_000),),)).pieces())
    assembly = Assembly()
    assert assembly.add(first[0]) is None
    with pytest.raises(MalformedError):
        assembly.add(next(Told(Said.COMPLETE).pieces()))


def test_what_is_told_has_a_bound(monkeypatch):
    monkeypatch.setattr(messages, "TOLD_BYTES_MAX", 100_000)
    assembly = Assembly()
    with pytest.raises(MalformedError, match="more than 100000 bytes"):
        for piece in Told(Said.REVOKED, 0, ((bytes(200_000),),)).pieces():
            assembly.add(piece)


chains = st.lists(st.lists(st.binary(max_size=40), max_size=4).map(tuple), max_size=4).map(tuple)


@given(st.sampled_from(sorted(messages.TOLD)), st.integers(0, 65535), chains, st.integers(1, 50))
def test_what_is_told_arrives_whole_however_it_is_cut(said, domain, told, size):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(messages, "PIECE_BYTES_MAX", size)
        assembly, expected = Assembly(), Told(said, domain, told)
        *earlier, last = expected.pieces()
        assert all(assembly.add(piece) is None for piece in earlier)
        assert assembly.add(last) == expected


@given(st.binary(max_size=200))
def test_no_bytes_are_anything_but_understood_or_refused(data):
    for read in (read_ask, lambda found: found and messages.read_answer(found), Assembly().add):
        try:
            read(data)
        except MalformedError:
            pass


@given(st.integers(0, 2**32 - 1), st.integers(0, 65535), st.sampled_from(sorted(messages.KINDS)), st.integers(0, 255),
       st.binary(min_size=8, max_size=8), st.binary(min_size=1, max_size=1024))
def test_a_request_arrives_as_it_was_sent(number, domain, kind, padding, key, block):
    ask = messages.Ask(number, domain, kind, padding, key, block)
    assert read_ask(ask.message()) == ask


@pytest.mark.parametrize("size", [0, 1, 16, 17, 17 + 1025, 60_000])
def test_requests_of_no_possible_length_are_malformed(size):
    with pytest.raises(MalformedError):
        read_ask((bytes((Said.ASK, 0, 0, 0, 1, 0, 0, 2, 0)) + bytes(60_000))[:size])
