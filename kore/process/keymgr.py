"""The key manager: the one process that reads private keys, and signs with them what workers sign in handshakes.

It gives up everything else first: network, other programs, other files, other users. Then it reads the pairs, with the
same rights as at each reload, so that what works at the start works later. Each worker has a thread here and a pair of
sockets; OpenSSL signs without Python's lock, so handshakes of several workers are signed at once. One thread does the
rest: files that change, tickets, what workers are to be told, and the parent.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

from kore.bsd import pledge
from kore.errors import SandboxError, StartError
from kore.process import locking, prctl, role
from kore.process.acme_desk import AcmeDesk
from kore.process.channel import ChannelError, Kind
from kore.process.confirming import Confirmations, Done
from kore.process.log import LOG_ERR, LOG_INFO, LOG_NOTICE
from kore.process.services import Place, Row
from kore.sandbox import landlock, privileges, seccomp
from kore.sandbox.confinement import Confinement
from kore.sandbox.policy import Features
from kore.tls import acme_store, authority, messages
from kore.tls.acme_link import WireError
from kore.tls.certificates import CertificateError, Pair
from kore.tls.entropy import seed_from
from kore.tls.keys import DomainFiles, KeyStore, NoKeyError
from kore.tls.messages import MalformedError, Said, Told
from kore.tls.tickets import ROTATION_SECONDS, Masters

if TYPE_CHECKING:
    from kore.process.parent import Parent

NAME: Final = "keymgr"

LOOK_SECONDS: Final = 2.0
"""How often files are looked at: a new pair is in use after two looks."""

REMARK_SECONDS: Final = 3600.0
"""How often certificates are looked at that expire."""

CONFIRM_LOOK_SECONDS: Final = 1.0
"""How often it is looked for workers that are late to confirm a challenge."""

SIGNATURES_PER_SECOND_MAX: Final = 5000
"""For one worker, which blocks for each: several times what handshakes allow. A captured one gets no more either."""

TELL_SECONDS: Final = 60.0
"""Between two lines in the log about one worker that asks for more."""

STACK_BYTES: Final = 512 * 1024
"""Of a thread: all of it is locked in memory."""


@dataclass(frozen=True, slots=True)
class KeyOrders:
    """What every key manager does alike, decided by the parent."""

    files: tuple[DomainFiles, ...]
    confinement: Confinement
    rand_file: str | None = None
    acme: acme_store.AcmeSettings | None = None
    """The authority, when a domain gets its certificates from one."""


def row_of(orders: KeyOrders, parent: Parent) -> Row:
    """The key manager in the parent's table."""

    def hear(kind: Kind, body: bytes) -> bool:
        if kind is not Kind.ABUSE:
            return False
        try:
            worker, pid, reason = body.decode("utf-8", "replace").split(" ", 2)
            text = f"it asked the key manager for {reason}"
            if int(worker):
                parent.kill_worker(int(worker), int(pid), text)
            else:
                parent.kill_service("acme", int(pid), text)
        except ValueError:
            return False  # it is not ours any more either
        return True

    return Row(
        name=NAME,
        what="the key manager",
        run=lambda place: KeyManager(orders, place).run(),
        serves=frozenset({"worker", "acme"}),
        signals=frozenset({signal.SIGUSR1}),
        filtered=orders.confinement.on,
        without=", and new handshakes wait",
        hear=hear,
    )


@dataclass(slots=True, eq=False)
class Client:
    """A worker's process, and its thread here."""

    worker: int
    pid: int
    sock: socket.socket
    told: dict[tuple[Said, int], Told] = field(default_factory=dict)
    """What it is still to be told; of one domain and kind only the last."""
    pieces: Iterator[bytes] = field(default_factory=lambda: iter(()))
    piece: bytes | None = None
    """The first of them that the socket had no room for."""

    def __str__(self) -> str:
        return f"worker {self.worker} (pid {self.pid})"


def folders_of(files: Iterable[DomainFiles]) -> tuple[str, ...]:
    """The directories of all files, and of what links among them lead to; as this process sees them.

    A rule for a file would be about the one that is there now, and not about the one that takes its place.
    """
    paths = [path for one in files for path in one.paths()]
    found = dict.fromkeys(os.path.dirname(place) for path in paths for place in (path, os.path.realpath(path)))
    return tuple(folder for folder in found if os.path.isdir(folder))


@dataclass(slots=True)
class Duty:
    """What is done every so many seconds."""

    seconds: float
    do: Callable[[], object]
    next: float = 0.0

    def __post_init__(self) -> None:
        self.next = time.monotonic() + self.seconds


class Pace:
    """So many at once, and so many a second: how long to wait before the next."""

    __slots__ = ("_rate", "_room", "_seen", "clock")

    def __init__(self, rate: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate = self._room = rate
        self.clock = clock
        self._seen = clock()

    def take(self) -> float:
        """Seconds to wait; 0 nearly always."""
        now = self.clock()
        self._room = min(self._rate, self._room + (now - self._seen) * self._rate) - 1
        self._seen = now
        return 0.0 if self._room >= 0 else -self._room / self._rate


class KeyManager:
    """The process. `run` is called once, in it."""

    def __init__(self, orders: KeyOrders, place: Place) -> None:
        self.orders = orders
        self.place = place
        self.clients: dict[int, Client] = {}
        """By the fd of the socket."""
        self.store = KeyStore(orders.files, role.role.log, self._tell_all)
        self.masters = Masters()
        self._selector = selectors.PollSelector()
        self._gone: list[Client] = []
        self._confirmations = Confirmations()
        self._reload = False
        self._wake_in, self._wake_out = socket.socketpair()
        self._acme: socket.socket | None = None
        self.desk: AcmeDesk | None = None
        if orders.acme is not None:
            self.desk = AcmeDesk(orders.acme, orders.files, self.store, role.role.log, self.challenge)

    def run(self) -> int:
        """Be the key manager until the parent closes the channel; the exit code."""
        threading.stack_size(STACK_BYTES)
        for sock in (self._wake_in, self._wake_out):
            sock.setblocking(False)
        signal.set_wakeup_fd(self._wake_out.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGUSR1, self._note_reload)
        failure = locking.lock_memory()
        if failure is not None and self.orders.confinement.on:
            role.role.log(LOG_NOTICE, f"keys may get into swap: {failure}; raise it (ulimit -l, LimitMEMLOCK=)")
        if self.desk is not None:
            acme_store.rehearse()
        try:
            local = self._local()
            self._confine()
        except CertificateError as error:
            return self._fatal(str(error))
        except SandboxError as error:
            return self._fatal(f"the key manager cannot be confined: {error}")
        if self.orders.rand_file is not None:
            seed_from(self.orders.rand_file, role.role.log)
        for domain, pair in local.items():
            self.store.use(domain, pair)
        try:
            if self.desk is not None:
                self.desk.load()
        except (OSError, ValueError) as error:
            where = self.orders.confinement.rights.root or "the current directory"
            text = f"{where}, where ACME's keys and certificates are kept: {error}"
            if not self.place.restarts:
                return self._fatal(text)
            role.role.log(LOG_ERR, text)
            return 1  # it was there before, and may be again for a successor
        if not self.store.load() and not self.place.restarts:
            return self._fatal("no domain has a certificate that can be served")
        try:
            self._promise()
        except StartError as error:
            return self._fatal(f"the key manager cannot be confined: {error}")
        self.place.channel.send_last(Kind.READY)
        self._loop()
        return 0

    def _fatal(self, reason: str) -> int:
        """End the server: this one can't be started, and no successor could."""
        self.place.channel.send_last(Kind.LOG, role.log_body(LOG_ERR, reason))
        self.place.channel.send_last(Kind.FATALX)
        return 1

    def _local(self) -> dict[int, Pair]:
        """Pairs of the local authority, by domain. Raises CertificateError.

        Its own files can be made and read only before all is given up; its key is forgotten then.
        """
        wanted = [files for files in self.orders.files if files.local]
        if not wanted:
            return {}
        try:
            found = authority.opened(authority.folder())
        except OSError as error:
            found = authority.unkept()
            role.role.log(LOG_NOTICE, f"the local authority can't be kept: {error.filename}: {error.strerror}")
        except CertificateError as error:
            if not self.place.restarts:
                raise
            found = authority.unkept()  # a server that runs is not ended by what became of a file
            role.role.log(LOG_ERR, f"{error}; until the next start {found.advice()}")
        if not self.place.restarts:
            names = ", ".join(dict.fromkeys(files.name for files in wanted))
            role.role.log(LOG_NOTICE, f"{names}: a certificate of the local authority is served; {found.advice()}")
        return {files.domain: found.issue(list(files.local)) for files in wanted}

    def _confine(self) -> None:
        """Give up everything but reading these files, for good. Raises SandboxError."""
        mine = self.orders.confinement
        privileges.give_up(replace(mine.rights, parent=self.place.parent))
        prctl.forbid_dumps()
        if not mine.on:
            return
        write = tuple(path for path in mine.write if os.path.exists(path))
        landlock.restrict_self(landlock.Rules(read=folders_of(self.orders.files), write=write))
        seccomp.confine(None, Features(role=NAME, write=bool(mine.write)), False, self.place.channel.send_listener)

    def _promise(self) -> None:
        """OpenBSD: all is read that is read only once. Raises StartError."""
        if pledge.available():
            pledge.pledge_keymgr(acme=self.desk is not None)

    # The loop of the first thread.

    def _loop(self) -> None:
        self._selector.register(self.place.channel, selectors.EVENT_READ, self._hear)
        self._selector.register(self._wake_in, selectors.EVENT_READ, self._woken)
        duties = [
            Duty(LOOK_SECONDS, self.store.look),
            Duty(REMARK_SECONDS, self.store.remark),
            Duty(ROTATION_SECONDS, self._rotate),
            Duty(CONFIRM_LOOK_SECONDS, self._confirmations.look),
        ]
        while True:
            first = min(duty.next for duty in duties)
            for key, _ in self._selector.select(max(0.0, first - time.monotonic())):
                if key.data() is False:
                    return
            now = time.monotonic()
            for duty in duties:
                if duty.next <= now:
                    duty.next = now + duty.seconds
                    duty.do()

    def _note_reload(self, _number: int, _frame: object) -> None:
        self._reload = True

    def _woken(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while self._wake_in.recv(4096):
                pass
        while self._gone:
            self._forget(self._gone.pop())
        self._confirmations.look()
        if self._reload:
            self._reload = False
            role.role.log(LOG_INFO, "SIGUSR1: certificates and keys are read again")
            self.store.load()
            self._reload_acme()

    def _reload_acme(self) -> None:
        try:
            if self.desk is not None:
                self.desk.load()
        except (OSError, ValueError) as error:
            role.role.log(LOG_ERR, f"ACME's keys and certificates: {error}; those of before are served on")

    def _rotate(self) -> None:
        self.masters.rotate()
        self._tell_all(self.masters.told())

    def _hear(self) -> bool:
        """What the parent says; False when it wants this process to end, or is gone."""
        channel = self.place.channel
        try:
            while (message := channel.receive_fd()) is not None:
                kind, body, fd = message
                if kind is Kind.JOIN and fd is not None:
                    worker, pid = map(int, body.split())
                    if worker:
                        self._join(Client(worker, pid, socket.socket(fileno=fd)))
                    else:
                        self._join_acme(pid, socket.socket(fileno=fd))
                elif fd is not None:
                    os.close(fd)
        except (EOFError, ChannelError):
            return False
        return True

    # The ACME process.

    def _join_acme(self, pid: int, sock: socket.socket) -> None:
        desk = self.desk
        if desk is None:
            sock.close()
            return
        self._leave_acme()
        desk.join(sock)

        def hear() -> None:
            try:
                if not desk.hear():
                    self._leave_acme()
            except WireError as error:
                self._leave_acme()
                role.role.log(LOG_ERR, f"the ACME process (pid {pid}) asks for what no honest one asks for: {error}")
                self.place.channel.send_last(Kind.ABUSE, b"0 %d %s" % (pid, str(error).encode()))

        self._selector.register(sock, selectors.EVENT_READ, hear)
        self._acme = sock

    def _leave_acme(self) -> None:
        if self._acme is not None and self.desk is not None:
            self._selector.unregister(self._acme)
            self._acme = None
            self.desk.leave()

    # Workers.

    def _join(self, client: Client) -> None:
        """A worker is there: tell it everything, and sign for it."""
        client.sock.setblocking(True)
        self.clients[client.sock.fileno()] = client
        self._confirmations.join(client)
        for told in (self.masters.told(), *self.store.told(), Told(Said.COMPLETE)):
            client.told[told.said, told.domain] = told
        self._flush(client)
        threading.Thread(target=self._guard, args=(client,), daemon=True).start()

    def _forget(self, client: Client) -> None:
        if self.clients.pop(client.sock.fileno(), None) is client:
            with contextlib.suppress(KeyError):
                self._selector.unregister(client.sock)
            client.sock.close()
            self._confirmations.leave(client)

    def challenge(self, domain: int, chain: Sequence[bytes], done: Done) -> None:
        """Have all workers answer a challenge with `chain`, an empty one with none; `done` is called when they do."""
        self.store.challenge(domain, chain)
        self._confirmations.wait(domain, messages.challenge_id(chain), done)
        self._confirmations.look()

    def _tell_all(self, told: Told) -> None:
        for client in list(self.clients.values()):
            # The last word goes to the end, behind what it may lean on.
            client.told.pop((told.said, told.domain), None)
            client.told[told.said, told.domain] = told
            self._flush(client)

    def _flush(self, client: Client) -> None:
        """Send what it is to be told as far as there is room; the rest when there is more."""
        try:
            while True:
                if client.piece is None:
                    client.piece = next(client.pieces, None)
                if client.piece is None:
                    if not client.told:
                        break
                    client.pieces = client.told.pop(next(iter(client.told))).pieces()
                    continue
                client.sock.send(client.piece, socket.MSG_DONTWAIT)
                client.piece = None
        except BlockingIOError:
            if client.sock.fileno() not in self._selector.get_map():
                self._selector.register(client.sock, selectors.EVENT_WRITE, lambda: self._flush(client))
            return
        except OSError:
            client.told.clear()  # it is gone, as its thread will say
        with contextlib.suppress(KeyError):
            self._selector.unregister(client.sock)

    # A worker's thread.

    def _guard(self, client: Client) -> None:
        try:
            self._serve(client)
        except Exception as error:  # noqa: BLE001 (a defect here must not leave a worker without answers and a word)
            role.role.log(LOG_ERR, f"signing for {client} ends by {error!r}")
            os._exit(1)
        finally:
            self._gone.append(client)
            self._wake()

    def _wake(self) -> None:
        """Have the first thread look."""
        with contextlib.suppress(BlockingIOError):
            self._wake_out.send(b"\0")

    def _serve(self, client: Client) -> None:
        """Sign for a worker until it is gone, or asks for what no honest one does."""
        pace, told = Pace(SIGNATURES_PER_SECOND_MAX), 0.0
        sock = client.sock
        while True:
            try:
                message = sock.recv(messages.MESSAGE_BYTES_MAX)
            except OSError:
                return
            if not message:
                return
            wait = pace.take()
            if wait:
                if time.monotonic() >= told:
                    told = time.monotonic() + TELL_SECONDS
                    most = f"{SIGNATURES_PER_SECOND_MAX} signatures a second"
                    role.role.log(LOG_ERR, f"{client} asks for more than {most}: it is kept waiting")
                time.sleep(wait)
            try:
                answer = self._answer(client, message)
            except MalformedError as error:
                self._abused(client, str(error))
                return
            try:
                if answer:
                    sock.send(answer)
            except OSError:
                return

    def _answer(self, client: Client, message: bytes) -> bytes:
        """What is sent back, b"" for nothing. Raises MalformedError."""
        confirmed = messages.read_confirmed(message)
        if confirmed is not None:
            self._confirmations.confirmed(client, *confirmed)
            self._wake()
            return b""
        ask = messages.read_ask(message)
        try:
            return messages.signed(ask.id, self.store.sign(ask))
        except NoKeyError as error:
            return messages.refused(ask.id, str(error))

    def _abused(self, client: Client, reason: str) -> None:
        """It is not what was forked any more: the parent kills it."""
        role.role.log(LOG_ERR, f"{client} asks for what no honest worker asks for: {reason}")
        body = b"%d %d %s" % (client.worker, client.pid, reason.encode("utf-8", "replace"))
        self.place.channel.send_last(Kind.ABUSE, body)
