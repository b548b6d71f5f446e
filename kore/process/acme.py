"""The ACME process: it alone speaks with the authority, and holds no key.

What strangers send is parsed here, so this process has little that is worth capturing: TCP to the port of the authority
and of the resolver, the files for that, and one pair of sockets with the key manager, which signs what a renewal takes
and nothing else (kore.tls.acme_policy), and keeps on disk what there is to keep. It has one thread and does one thing
after the other: requests have ends (kore.tls.acme_network), and between them it hears the parent.

What fails is logged with the moment at which it is tried again. SIGUSR1 has everything tried at once.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, TypeVar

from kore.bsd import pledge
from kore.errors import StartError
from kore.process import role
from kore.process.channel import ChannelError, Kind
from kore.process.log import LOG_ERR, LOG_INFO, LOG_NOTICE
from kore.process.services import Place, Row
from kore.sandbox import landlock, preload, privileges, seccomp
from kore.sandbox.confinement import Confinement
from kore.sandbox.policy import Features
from kore.tls import acme_schedule
from kore.tls.acme_link import MESSAGE_BYTES_MAX, Asker, KeysGoneError, RefusedError
from kore.tls.acme_schedule import Schedule, Standing, What

if TYPE_CHECKING:
    from kore.tls.acme_client import Authority

NAME: Final = "acme"

KEYS_SECONDS: Final = 5.0
"""Until a key manager is asked again that did not answer; one that takes its place is asked at once."""

PACKAGES: Final = ("acme", "josepy", "requests", "urllib3", "idna", "certifi")
"""What the client is made of, and what may import more of itself at any time."""

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class AcmeOrders:
    """What every ACME process does alike, decided by the parent."""

    provider: str
    names: tuple[str, ...]
    confinement: Confinement
    email: str | None = None
    ca_bundle: str | None = None
    """As the parent sees it."""


def row_of(orders: AcmeOrders) -> Row:
    """The ACME process in the parent's table."""
    return Row(
        name=NAME,
        what="the ACME process",
        run=lambda place: AcmeProcess(orders, place).run(),
        signals=frozenset({signal.SIGUSR1}),
        says_ready=False,  # nobody waits for it: until it has a certificate, a self-signed one serves
        filtered=orders.confinement.on,
        without=", and no certificate is renewed meanwhile",
    )


class _Ended(BaseException):
    """The parent wants this process to end, or is gone: nothing on the way may take it for an error."""


class AcmeProcess:
    """The process. `run` is called once, in it."""

    def __init__(self, orders: AcmeOrders, place: Place) -> None:
        self.orders = orders
        self.place = place
        self.schedule = Schedule(orders.names)
        self.keys = Asker(self._send, self._receive)
        self._sock: socket.socket | None = None
        self._fresh = False
        """Whether there is a key manager that has not been asked what there is."""
        self._hurry = False
        self._talking = False
        """Whether it may take long until the parent is heard."""
        self._ending = False
        self._cut: dict[str, Standing] = {}
        """What was known before an order that the key manager's end has ended: it may have noted worse."""
        self._wake_in, self._wake_out = socket.socketpair()

    def run(self) -> int:
        """Be the ACME process until the parent closes the channel; the exit code."""
        for sock in (self._wake_in, self._wake_out):
            sock.setblocking(False)
        signal.set_wakeup_fd(self._wake_out.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGUSR1, self._note_hurry)
        self._listen_always()
        from kore.tls.acme_client import Authority  # here: no other process has any use for it
        from kore.tls.acme_network import trust

        try:
            context = trust(self.orders.ca_bundle)
        except OSError as error:
            bundle = self.orders.ca_bundle or "the system's authorities"
            return self._fatal(f"no authority's certificate can be checked: {bundle}: {error}; see acme_ca_bundle")
        try:
            self._confine()
        except StartError as error:
            return self._fatal(f"the ACME process cannot be confined: {error}")
        authority = Authority(
            self.orders.provider, self.keys, context=context, email=self.orders.email, wait=self._rest)
        with contextlib.suppress(_Ended):
            while True:
                self._turn(authority)
        return 0

    def _fatal(self, reason: str) -> int:
        """End the server: this process can't be started, and no successor could."""
        self.place.channel.send_last(Kind.LOG, role.log_body(LOG_ERR, reason))
        self.place.channel.send_last(Kind.FATALX)
        return 1

    def _confine(self) -> None:
        """Give up everything but the way to the authority, for good. Raises StartError."""
        mine = self.orders.confinement
        "example.org".encode("idna")  # what a lookup imports
        if mine.on or mine.rights.chroot or mine.rights.identity is not None or pledge.available():
            preload.extensions()
            preload.library()
            for package in PACKAGES:
                preload.package(package, leave_out=["__main__"])
        privileges.give_up(replace(mine.rights, parent=self.place.parent))
        if pledge.available():
            pledge.pledge_acme()
        if not mine.on:
            return
        read = tuple(path for path in mine.read if os.path.exists(path))
        landlock.restrict_self(landlock.Rules(read=read, connect_ports=mine.connect_ports))
        seccomp.confine(None, Features(role=NAME, resolver=mine.names), False, self.place.channel.send_listener)

    # What is to be done.

    def _turn(self, authority: Authority) -> None:
        sock = self._sock
        if sock is None:
            self._poll(acme_schedule.LOOK_SECONDS_MAX, None)
            return
        try:
            if self._fresh or self._hurry:
                self._restore()
                self._fresh = self._fresh and self._sock is not sock
            if self._hurry:
                self._hurry = False
                self.schedule.hurry()
                role.role.log(LOG_INFO, "SIGUSR1: certificates that are due are asked for now")
            found = self.schedule.next(time.time())
            if isinstance(found, float):
                self._wait(found)
            elif found[1] is What.HINT:
                self._ask_window(authority, found[0])
            else:
                self._order(authority, found[0])
        except KeysGoneError as error:
            role.role.log(LOG_NOTICE, f"{error}; what was begun is begun again when it is there")
            if self._sock is sock:
                self._poll(KEYS_SECONDS, sock)

    def _restore(self) -> None:
        """Take what the key manager knows of each domain. Raises KeysGoneError."""
        for name in self.orders.names:
            not_before, not_after, noted = self.keys.standing(name)
            self.schedule.restored(name, acme_schedule.load(noted), not_before, not_after)
            if name in self._cut:
                self.schedule.restored(name, self._cut.pop(name), not_before, not_after)
                self._note(name)
            standing, now = self.schedule.standings[name], time.time()
            if standing.due(now) > now and standing.failures:
                again = moment(standing.due(now))
                role.role.log(LOG_NOTICE, f"no certificate for {name} yet: {standing.error}; tried again at {again}")

    def _order(self, authority: Authority, name: str) -> None:
        """Get a certificate. Raises KeysGoneError."""
        from kore.tls.acme_network import AuthorityError

        begun, before = self._sock, self.schedule.standings[name]
        role.role.log(LOG_INFO, f"a certificate for {name} is asked for at {self.orders.provider}")
        # Noted beforehand: a process that dies of what it is sent must not ask again each time that it is started.
        self.schedule.failed(name, time.time(), "the last attempt was cut off")
        self._note(name)
        self.schedule.standings[name] = before
        try:
            self._talk(lambda: authority.issue(name))
        except (KeysGoneError, _Ended):
            self._cut[name] = before  # nobody's fault
            if self._sock is begun:
                self._note(name)
                del self._cut[name]
            raise
        except (AuthorityError, RefusedError) as error:
            if self._sock is not begun:
                self._cut[name] = before
                raise KeysGoneError("the key manager went away") from None  # its successor refuses what it began
            retry_after = error.retry_after if isinstance(error, AuthorityError) else None
            seconds = self.schedule.failed(name, time.time(), str(error), retry_after)
            left = self.schedule.standings[name].not_after
            served = f"that of before is served, until {moment(left)}" if left else "a self-signed one is served"
            again = f"tried again at {moment(time.time() + seconds)}"
            role.role.log(LOG_ERR, f"no certificate for {name}: {error}; {served}; {again}")
        else:
            not_before, not_after, _ = self.keys.standing(name)
            self.schedule.installed(name, time.time(), not_before, not_after)
            due = self.schedule.standings[name].renewal()
            role.role.log(LOG_NOTICE, f"{name} has a certificate until {moment(not_after)}, renewed at {moment(due)}")
        self._note(name)

    def _ask_window(self, authority: Authority, name: str) -> None:
        """Ask when the authority suggests to renew (ARI). Raises KeysGoneError."""
        from kore.tls.acme_network import AuthorityError

        before = self.schedule.standings[name].renewal()
        try:
            leaf = self.keys.leaf(name)
            found = self._talk(lambda: authority.window(leaf))
        except (AuthorityError, RefusedError) as error:
            retry_after = error.retry_after if isinstance(error, AuthorityError) else None
            self.schedule.unhinted(name, time.time(), retry_after)
            role.role.log(LOG_NOTICE, f"when to renew {name} could not be asked: {error}")
        else:
            self.schedule.hinted(name, time.time(), found.window, found.ask_again)
            due = self.schedule.standings[name].renewal()
            if due != before:
                role.role.log(LOG_NOTICE, f"{name} is renewed at {moment(due)}, as the authority suggests")
        self._note(name)

    def _note(self, name: str) -> None:
        """Have it kept; what is not kept costs a try that comes too early. Raises KeysGoneError."""
        try:
            self.keys.note(name, self.schedule.standings[name].dump())
        except RefusedError as error:
            role.role.log(LOG_ERR, f"what is known of {name} is not kept: {error}")

    def _talk(self, call: Callable[[], Result]) -> Result:
        """What `call` returns, which speaks with the authority. Raises _Ended as soon as the parent wants that."""
        self._talking = True
        try:
            self._hear()
            return call()
        finally:
            self._talking = False

    def _listen_always(self) -> None:
        """Have the kernel say by a signal that the parent has closed its side: a request may take half a minute."""

        def look(_number: int, _frame: object) -> None:
            if self._talking and _closed(self.place.channel.fileno()):
                self._talking, self._ending = False, True
                raise _Ended

        signal.signal(signal.SIGIO, look)
        fd = self.place.channel.fileno()
        fcntl.fcntl(fd, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_ASYNC)

    # Waiting.

    def _note_hurry(self, _number: int, _frame: object) -> None:
        self._hurry = True

    def _rest(self, seconds: float) -> None:
        """In an order: wait for the authority. Raises _Ended; KeysGoneError when the order has lost its challenge."""
        begun, deadline = self._sock, time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            self._poll(left, None)
            if self._sock is not begun:
                raise KeysGoneError("the key manager went away during the order")

    def _wait(self, seconds: float) -> None:
        """Until something is to be done: the time has come, a key manager is there, somebody is in a hurry."""
        if not (self._hurry or self._fresh):
            self._poll(seconds, self._sock)

    def _send(self, message: bytes) -> None:
        if self._sock is None:
            raise KeysGoneError("the key manager is not there")
        try:
            self._sock.send(message)
        except OSError as error:
            self._lose()
            raise KeysGoneError(f"the key manager went away: {error.strerror}") from None

    def _receive(self, seconds: float) -> bytes | None:
        begun, deadline = self._sock, time.monotonic() + seconds
        while self._sock is not None and self._sock is begun:
            left = deadline - time.monotonic()
            if left <= 0:
                return None
            message = self._poll(left, self._sock)
            if message is not None:
                return message
        raise KeysGoneError("the key manager went away")

    def _poll(self, seconds: float, keys: socket.socket | None) -> bytes | None:
        """Wait for the parent, a signal, and `keys`: what the key manager says there, if it says anything."""
        poller = select.poll()
        heard = (self._wake_in, keys, None if self._ending else self.place.channel)
        for one in heard:
            if one is not None:
                poller.register(one.fileno(), select.POLLIN)
        poller.poll(seconds * 1000)
        with contextlib.suppress(BlockingIOError):
            while self._wake_in.recv(4096):
                pass
        self._hear()
        if keys is None or keys is not self._sock:
            return None
        try:
            message = keys.recv(MESSAGE_BYTES_MAX)
        except BlockingIOError:
            return None
        except OSError:
            message = b""
        if not message:
            self._lose()
            return None
        return message

    def _hear(self) -> None:
        """What the parent says. Raises _Ended, once: the key manager outlives this process, to be told the last."""
        if self._ending:
            return
        try:
            while (message := self.place.channel.receive_fd()) is not None:
                kind, _, fd = message
                if fd is None:
                    continue
                if kind is Kind.KEYS:
                    self._lose()
                    self._sock, self._fresh = socket.socket(fileno=fd), True
                    self._sock.setblocking(False)
                else:
                    os.close(fd)
        except (EOFError, ChannelError):
            self._ending = True
            raise _Ended from None

    def _lose(self) -> None:
        if self._sock is not None:
            self._sock.close()
            self._sock = None


def _closed(fd: int) -> bool:
    """Whether the other side of a socket has said its last."""
    poller = select.poll()
    poller.register(fd, select.POLLRDHUP if hasattr(select, "POLLRDHUP") else 0)
    return any(events & ~select.POLLIN for _, events in poller.poll(0))


def moment(seconds: float) -> str:
    """A time for people."""
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))
