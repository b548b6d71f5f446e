"""The parent: it forks services and workers, hears what they say, replaces those that die, and stops them in the end.

It serves nothing, runs no coroutine and has no ring, so there is little that could kill it. One selector waits for
signals, channels and the slow log; everything that must happen later is a deadline, never a sleep, and no wait for
a child ever blocks: a start that hangs and a worker that will not die are both only deadlines that pass.

The life of the parent is a line: STARTING, SERVING, STOPPING, ABORTING. ``run`` returns the exit code.
"""

from __future__ import annotations

import enum
import heapq
import os
import selectors
import signal
import socket
import time
from collections.abc import Callable
from typing import NoReturn

from kore.process import role
from kore.process.channel import Channel, ChannelError, Kind, channel_pair
from kore.process.forking import Blocked, fork
from kore.process.listening import Listening
from kore.process.log import LOG_ERR, LOG_INFO, LOG_NOTICE, Log
from kore.process.orders import Orders, WorkerPlace
from kore.process.output import Output, flush_own
from kore.process.relay import Relay
from kore.process.reopening import Reopening
from kore.process.report import Death, death_report, signal_name
from kore.process.seat import Seat
from kore.process.services import Service, Surroundings, introduce
from kore.process.supervision import Supervision
from kore.process.tracing import Tracing
from kore.reactor.origin import place_of

START_SECONDS_MAX = 60.0
"""From the first fork until the last worker is ready. Long, because workerstart may load a model or a database."""

KILL_GRACE_SECONDS = 1.0
"""Between a worker's own deadline (drained or not, it ends) and the SIGKILL for one that is stuck."""

MESSAGES_PER_TURN = 256
"""Messages read from one worker before the others and the signals get their turn."""

EXIT_STOPPED = 0
EXIT_FATAL = 1
EXIT_START_FAILED = 255


class State(enum.Enum):
    """Where the server is in its life."""

    STARTING = 1
    SERVING = 2
    STOPPING = 3  # workers drain
    ABORTING = 4  # workers were told to end at once


class Parent:
    """The parent process of one server. ``run`` is called once."""

    def __init__(self, orders: Orders, log: Log) -> None:
        self.orders = orders
        self.log = log
        self.state = State.STARTING
        self.seats = [Seat(worker=worker) for worker in range(1, orders.workers + 1)]
        self.exit_code = EXIT_STOPPED
        self._pid = os.getpid()
        self._signals: list[int] = []
        self._deadlines: list[tuple[float, int, Callable[[], None]]] = []
        self._sequence = 0
        self._log_fd: int | None = None
        self._selector = selectors.DefaultSelector()
        self._relay = Relay(self._selector, log, self._after)
        self.tracing: Tracing | None = None
        if orders.tracing is not None:
            self.tracing = Tracing(log, orders.tracing)
        self._supervision = self.tracing or Supervision(self._selector, log)
        self.services = self._make_services()
        self._listening = Listening(log, self._after, orders.listeners, orders.backlog)
        self._reopening = Reopening(orders.access_logs, log, self._after)
        self._wake_in, self._wake_out = socket.socketpair()

    def run(self) -> int:
        """Start the workers, look after them until the end, and return the exit code.

        An exception here is a defect of kore; the workers are killed before it goes on its way.
        """
        self._take_signals()
        flush_own()
        try:
            self._after(START_SECONDS_MAX, self._start_expired)
            self._start_next()
            while not self._finished():
                self._turn()
        finally:
            self._kill()
            for seat in self.seats:
                if seat.pid:
                    os.waitpid(seat.pid, 0)
                    seat.left()
            for service in self.services:
                service.kill()
            self._restore_signals()  # before the fd that signals wake goes
            self._release()
        return self.exit_code

    # Services.

    def _make_services(self) -> list[Service]:
        around = Surroundings(
            selector=self._selector,
            log=self.log,
            title=self.orders.name,
            after=self._after,
            settle=self._settle_service,
            ready=self._service_ready,
            starting=lambda: self.state is State.STARTING,
            failed=self._start_failed,
            serving=lambda: self.state in (State.STARTING, State.SERVING),
            fatal=self._fatal,
        )
        services = [Service(row=row, around=around) for row in self.orders.services(self)]
        if self.tracing is not None:
            self.tracing.service = Service(row=self.tracing.row(), around=around)
            services.insert(0, self.tracing.service)
        return services

    def _start_next(self) -> None:
        """Fork what comes next in the order of the start, up to a service that the others wait for."""
        for service in self.services:
            if not service.pid and self.state is State.STARTING:
                service.fork()
            if not (service.ready or service.ended):
                return
        for seat in self.seats:
            if not seat.pid and self.state is State.STARTING:
                self._fork(seat)

    def _service_ready(self, service: Service) -> None:
        self._introduce_all(service)
        if self.state is State.STARTING and service.row.says_ready:
            self._start_next()

    def _introduce_all(self, service: Service) -> None:
        """Give it a pair with all it serves, and with all that serve it."""
        for other in self.services:
            if other.ready and other.row.name in service.row.serves:
                introduce(service, other, 0, self._after)
            if other.ready and service.row.name in other.row.serves:
                introduce(other, service, 0, self._after)
        if "worker" in service.row.serves:
            for seat in self.seats:
                if seat.pid:
                    introduce(service, seat, seat.worker, self._after)

    def kill_worker(self, worker: int, pid: int, reason: str) -> None:
        """Kill a worker for what a service saw it do, unless the process that did it is gone."""
        for seat in self.seats:
            if seat.worker == worker and seat.pid == pid:
                self.log.parent(LOG_ERR, f"worker {worker} (pid {pid}) is killed: {reason}")
                os.kill(pid, signal.SIGKILL)

    def kill_service(self, name: str, pid: int, reason: str) -> None:
        """The same of the service called `name`."""
        for service in self.services:
            if service.row.name == name and service.pid == pid:
                self.log.parent(LOG_ERR, f"{service.row.what} (pid {pid}) is killed: {reason}")
                os.kill(pid, signal.SIGKILL)

    # The loop.

    def _turn(self) -> None:
        timeout = None
        if self._deadlines:
            timeout = max(0.0, self._deadlines[0][0] - time.monotonic())
        self._watch_log()
        for key, _ in self._selector.select(timeout):
            key.data()
        # Handlers only note the number (they run between any two instructions); the work is done here.
        while self._signals:
            self._signalled(self._signals.pop(0))
        self._reap()
        now = time.monotonic()
        while self._deadlines and self._deadlines[0][0] <= now:
            heapq.heappop(self._deadlines)[2]()

    def _finished(self) -> bool:
        if self.state not in (State.STOPPING, State.ABORTING) or any(seat.pid for seat in self.seats):
            return False
        for service in reversed(self.services):
            service.stop()
            if service.pid:
                return False  # what it needs ends after it
        return True

    def _after(self, seconds: float, call: Callable[[], None]) -> None:
        self._sequence += 1
        heapq.heappush(self._deadlines, (time.monotonic() + seconds, self._sequence, call))

    def _watch_log(self) -> None:
        """Wait for the log's sink only while lines wait for it."""
        self.log.flush()
        fd = self.log.sink.waiting_fd()
        if fd == self._log_fd:
            return
        if self._log_fd is not None:
            self._selector.unregister(self._log_fd)
        if fd is not None:
            self._selector.register(fd, selectors.EVENT_WRITE, self.log.flush)
        self._log_fd = fd

    # Signals.

    def _take_signals(self) -> None:
        for sock in (self._wake_in, self._wake_out):
            sock.setblocking(False)
        self._selector.register(self._wake_in, selectors.EVENT_READ, self._drain_wake)
        self._old_wakeup = signal.set_wakeup_fd(self._wake_out.fileno(), warn_on_full_buffer=False)
        self._old_handlers = {
            number: signal.signal(number, signal.SIG_IGN if self._ignored(number) else self._note_signal)
            for number in self._handled_signals()
        }

    def _handled_signals(self) -> list[int]:
        numbers = {signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGUSR1, signal.SIGCHLD}
        return sorted(numbers | self.orders.trapped)

    def _ignored(self, number: int) -> bool:
        return number == signal.SIGINT and self.orders.ignore_interrupt

    def _restore_signals(self) -> None:
        for number, handler in self._old_handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        signal.set_wakeup_fd(self._old_wakeup)

    def _note_signal(self, number: int, _frame: object) -> None:
        self._signals.append(number)

    def _drain_wake(self) -> None:
        try:
            while self._wake_in.recv(4096):
                pass
        except BlockingIOError:
            pass

    def _signalled(self, number: int) -> None:
        if number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT):
            self._stop_signal(number)
        elif number == signal.SIGHUP:
            self._reopening.hangup(self.seats)
            self.log.parent(LOG_NOTICE, "SIGHUP: logs were opened again; code and settings are not reloaded")
            self._pass_on(number)
        elif number != signal.SIGCHLD:
            self._pass_on(number)

    def _pass_on(self, number: int) -> None:
        for service in self.services:
            if service.pid and number in service.row.signals:
                os.kill(service.pid, number)
        for seat in self.seats:
            if seat.pid:
                os.kill(seat.pid, number)

    def _stop_signal(self, number: int) -> None:
        name = signal_name(number)
        if self.state in (State.STARTING, State.SERVING):
            self.log.parent(LOG_NOTICE, f"{name}: stopping, at most {self.orders.drain_seconds:g} s to finish requests")
            self.stop(number)
        elif self.state is State.STOPPING:
            self.log.parent(LOG_NOTICE, f"{name} again: stopping at once")
            self.abort()
        else:
            self._kill()

    # Stopping.

    def stop(self, number: int = signal.SIGQUIT) -> None:
        """Have the workers finish what runs and end, within the time there is."""
        if self.state in (State.STOPPING, State.ABORTING):
            return
        self.state = State.STOPPING
        for seat in self.seats:
            if seat.channel is not None and not seat.channel.send(Kind.STOP, bytes((number,))):
                os.kill(seat.pid, signal.SIGTERM)  # it reads no messages; perhaps it hears this
        self._after(self.orders.drain_seconds + KILL_GRACE_SECONDS, self._kill)

    def abort(self) -> None:
        """Have the workers end without finishing anything."""
        if self.state is State.ABORTING:
            return
        self.state = State.ABORTING
        for seat in self.seats:
            if seat.channel is not None:
                seat.channel.send(Kind.ABORT)
        self._after(KILL_GRACE_SECONDS, self._kill)

    def _kill(self) -> None:
        """SIGKILL for every worker that is left. Nothing is reaped but here, so a pid is still its worker's."""
        for seat in self.seats:
            if seat.pid:
                self.log.parent(LOG_ERR, f"worker {seat.worker} (pid {seat.pid}) did not end in time and is killed")
                os.kill(seat.pid, signal.SIGKILL)

    # Workers.

    def _fork(self, seat: Seat) -> None:
        """Put a new process on `seat`. When there is none to be had, that counts as a death."""
        seat.board[0] = 0
        channels: list[Channel] = []
        stacks = output = None
        try:
            channels += channel_pair()
            channels += channel_pair()
            if self.orders.piped:
                output = Output(lambda text: self.log.write(LOG_INFO, seat.label, text))
            if self.tracing is not None:
                stacks = self.tracing.pipe(seat.worker)
        except OSError as error:
            self._close_ends(channels, output)
            self._no_worker(seat, f"no channel: {error.strerror}")
            return
        mine, theirs, my_messages, their_messages = channels
        my_messages.refuse_descriptors()
        if not self.orders.filtered:
            mine.refuse_descriptors()

        def become(blocked: Blocked) -> NoReturn:
            # Closed with the others: they would hide the parent's death from its own worker.
            seat.channel, seat.messages, seat.output = mine, my_messages, output
            self._become_worker(seat, theirs, their_messages, stacks, blocked)

        try:
            pid = fork(become)
        except OSError as error:
            self._close_ends(channels, output)
            self._no_worker(seat, f"no process: {error.strerror}")
            return
        theirs.close()
        their_messages.close()
        if self.tracing is not None:
            self.tracing.forked(seat.worker)
        seat.taken(pid, mine, my_messages, output)
        if output is not None:
            output.close_writing()
            self._selector.register(output, selectors.EVENT_READ, lambda: self._read_output(output))
        self._selector.register(mine, selectors.EVENT_READ, lambda: self._hear(seat, mine))
        self._relay.join(seat.worker, my_messages, lambda error: self._nonsense(seat, error))
        for service in self.services:
            if service.ready and "worker" in service.row.serves:
                introduce(service, seat, seat.worker, self._after)

    @staticmethod
    def _close_ends(channels: list[Channel], output: Output | None) -> None:
        """Close both ends of what was made for a worker that there is not."""
        for channel in channels:
            channel.close()
        if output is not None:
            output.close_writing()
            output.close()

    def _become_worker(
        self, seat: Seat, channel: Channel, messages: Channel, stacks: int | None, blocked: Blocked
    ) -> NoReturn:
        """In the child: give up what is the parent's, take the role, work, end. Never returns to the parent's stack."""
        code = 1
        try:
            early: list[int] = []
            if seat.output is not None:
                seat.output.take()
            signal.set_wakeup_fd(-1)
            for number in self._handled_signals():
                if number == signal.SIGCHLD:
                    signal.signal(number, signal.SIG_DFL)
                elif not self._ignored(number):
                    signal.signal(number, lambda received, _frame: early.append(received))
            self._release()
            for fd in self.orders.private_fds():
                os.close(fd)
            for other in self.seats:
                if other is not seat:
                    other.board.release()
            role.take(role.WorkerRole(seat.worker, channel))
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
            place = WorkerPlace(
                seat.worker, channel, messages, self.orders.workers, seat.board, stacks, self._pid, early_signals=early
            )
            code = self.orders.run_worker(place)
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        except BaseException as error:  # noqa: BLE001 (the stack above belongs to the parent: nothing may unwind into it)
            role.role.log(LOG_ERR, f"worker ended by {error!r}{place_of(error)}")
        finally:
            role.end(code)

    def _settle_service(self) -> None:
        """In the child: give up what is the parent's; no signal but the parent's end ends a service."""
        signal.set_wakeup_fd(-1)
        for number in self._handled_signals():
            signal.signal(number, signal.SIG_DFL if number == signal.SIGCHLD else signal.SIG_IGN)
        self._release()
        for fd in self.orders.private_fds():
            os.close(fd)
        self.orders.release_served()

    def _release(self) -> None:
        """Close the parent's own fds, in the parent at its end and in a child after the fork.

        The selector goes first and nothing is unregistered: its kernel object is shared with the parent.
        """
        self._selector.close()
        self._wake_in.close()
        self._wake_out.close()
        self._supervision.close()
        for service in self.services:
            service.release()
        for seat in self.seats:
            seat.close()

    def _no_worker(self, seat: Seat, reason: str) -> None:
        self.log.parent(LOG_ERR, f"worker {seat.worker} could not be started: {reason}")
        if self.state is State.STARTING:
            self._start_failed()
        elif self.state is State.SERVING:
            self._after(max(seat.next_delay(0.0), 0.1), lambda: self._restart(seat))

    def _reap(self) -> None:
        for service in self.services:
            service.reap()
        for seat in self.seats:
            if seat.pid:
                pid, status = os.waitpid(seat.pid, os.WNOHANG)
                if pid:
                    self._died(seat, status)
        if self._pid == 1:
            self._reap_strangers()

    def _reap_strangers(self) -> None:
        """As process 1 of a container, bury the orphans that the kernel hands over, whoever started them."""
        while any(child.pid for child in (*self.seats, *self.services)):
            ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            mine = {child.pid for child in (*self.seats, *self.services)}
            if ended is None or ended.si_pid in mine:
                return  # a worker's end is read where it means something, in the next turn
            os.waitpid(ended.si_pid, 0)

    def _died(self, seat: Seat, status: int) -> None:
        """What a worker's end means, by the life of the server."""
        pid, ready = seat.pid, seat.ready
        if seat.channel is not None:
            self._hear_last(seat, seat.channel)
            self._relay.leave(seat.worker)
        if seat.output is not None:
            if seat.output.fileno() in self._selector.get_map():
                self._selector.unregister(seat.output)
            seat.output.read_last()
        death = Death(status, self._supervision.leave(seat.worker))
        uptime = seat.left()
        if self.state is State.ABORTING or (self.state is State.STOPPING and death.clean):
            return
        index = int(seat.board[0])
        route = self.orders.route_name(index - 1) or f"route {index - 1}" if index else None
        report = death_report(seat.worker, pid, death, uptime=uptime, route=route, restarts=seat.restarts)
        self.log.parent(LOG_NOTICE if death.clean else LOG_ERR, report)
        if self.state is State.STOPPING:
            return
        if self.state is State.STARTING:
            self.log.parent(LOG_ERR, f"worker {seat.worker} failed to start")
            self._start_failed()
        elif not death.clean and not self.orders.restart:
            self.log.parent(LOG_ERR, "worker_death_policy is terminate: stopping")
            self.exit_code = EXIT_FATAL
            self.stop()
        else:
            delay = seat.next_delay(uptime if ready else 0.0)
            if delay:
                self.log.parent(LOG_NOTICE, f"worker {seat.worker} is started again in {delay:.1f} s")
            self._after(delay, lambda: self._restart(seat))

    def _restart(self, seat: Seat) -> None:
        if self.state is State.SERVING and not seat.pid:
            seat.restarts += 1
            self._fork(seat)

    def _start_failed(self) -> None:
        if self.state is State.STARTING:
            self.exit_code = self.exit_code or EXIT_START_FAILED
            self.abort()

    def _start_expired(self) -> None:
        if self.state is State.STARTING:
            services = [service.row.what for service in self.services if not service.ready]
            late = ", ".join(services or [f"worker {seat.worker}" for seat in self.seats if not seat.ready])
            self.log.parent(LOG_ERR, f"not ready after {START_SECONDS_MAX:g} s: {late}")
            self._start_failed()

    # Messages.

    def _hear(self, seat: Seat, channel: Channel) -> None:
        """Read what a worker sent; at the end of the channel, or at nonsense, stop listening."""
        try:
            for _ in range(MESSAGES_PER_TURN):
                message = channel.receive_fd()
                if message is None:
                    return
                self._message(seat, *message)
        except EOFError:
            self._selector.unregister(channel)
        except ChannelError as error:
            self._selector.unregister(channel)
            self._nonsense(seat, error)

    def _nonsense(self, seat: Seat, error: ChannelError) -> None:
        """Kill a worker that is not what was forked any more: nothing it says can be trusted."""
        self.log.parent(LOG_ERR, f"worker {seat.worker} (pid {seat.pid}) is killed: it sent {error}")
        os.kill(seat.pid, signal.SIGKILL)

    def _hear_last(self, seat: Seat, channel: Channel) -> None:
        """Read everything a dead worker left behind: no more than its channel's buffer held."""
        if channel.fileno() in self._selector.get_map():
            self._selector.unregister(channel)
        try:
            while (message := channel.receive_fd()) is not None:
                self._message(seat, *message)
        except (EOFError, ChannelError):
            pass  # all has been said

    def _read_output(self, output: Output) -> None:
        if output.read() is None:
            self._selector.unregister(output)

    def _message(self, seat: Seat, kind: Kind, body: bytes, fd: int | None) -> None:
        if kind is Kind.LISTENER and self.orders.filtered:
            self._supervision.join(seat.worker, seat.pid, fd)
            if seat.channel is not None:
                seat.channel.refuse_descriptors()
            return
        if fd is not None:
            os.close(fd)
            raise ChannelError(f"a descriptor with a {kind.name}")
        match kind:
            case Kind.LOG:
                priority, text = role.log_of_body(body)
                self.log.write(priority, seat.label, text)
            case Kind.DROPPED:
                count = body.decode("ascii", "backslashreplace")
                self.log.write(LOG_NOTICE, seat.label, f"{count} log lines were dropped: the parent was slow")
            case Kind.READY:
                self._ready(seat)
            case Kind.SHUTDOWN:
                self.log.parent(LOG_NOTICE, f"worker {seat.worker} asks to stop the server")
                self.stop()
            case Kind.FATALX:
                self._fatal(f"worker {seat.worker}")
            case _:
                raise ChannelError(f"a {kind.name}, which no worker sends here")

    def _fatal(self, who: str) -> None:
        self.log.parent(LOG_ERR, f"{who} stops the server: fatalx")
        self.exit_code = EXIT_FATAL
        self.abort() if self.state is State.STARTING else self.stop()

    def _ready(self, seat: Seat) -> None:
        seat.ready = True
        if self.state is State.SERVING:
            self.log.parent(LOG_INFO, f"worker {seat.worker} serves again, pid {seat.pid}")
        elif self.state is State.STARTING and all(each.ready for each in self.seats):
            self.state = State.SERVING
            self.orders.on_ready([each.pid for each in self.seats])
