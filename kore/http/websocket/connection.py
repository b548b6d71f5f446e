"""One client's WebSocket: the owner of its stream after the handshake, from the first frame to the last word.

The straight line of a message is `received` -> the application's onmsg -> `send` -> `Stream.write`. It is taken when
one whole small frame arrives and nothing waits; all else goes through `MessageParser`, which obeys the same rules.

A callback that suspends holds up the messages behind it: they wait here within bounds, then the client is not read.
A client that does not take its output is not read either, and dropped when more than a bound has piled up.

How it ends: OPEN until either side sends Close; CLOSING from ours until theirs; LINGERING, our FIN sent, until theirs.
The application hears of the end once, after what had come before it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from types import CoroutineType
from typing import Any, Final

from kore.http.output import RATE_MIN, reset_on_close, unsent
from kore.http.peer import Peer
from kore.http.websocket.broadcast import members
from kore.http.websocket.deflate import Inflater
from kore.http.websocket.frames import (
    ABNORMAL,
    BINARY,
    CLOSE,
    GOING_AWAY,
    HEADS,
    INTERNAL_ERROR,
    INVALID_DATA,
    MASK_TIMES,
    NO_CODE,
    NORMAL,
    PING,
    PONG,
    MessageParser,
    WebSocketError,
    close_frame,
)
from kore.http.websocket.sending import CLOSING, LINGERING, OPEN, Sending
from kore.reactor.trace import report_exception

TICK_S: Final = 0.5
"""The server's clock, which deadlines are ticks of; kore.http.server's constant of this name."""

BURST_MAX: Final = 64
"""Messages of one client delivered in one turn of the loop, as with pipelined requests."""

QUEUE_MESSAGES_MAX: Final = 64
QUEUE_BYTES_MAX: Final = 65536
"""Messages that wait for a callback to end; with as many, or this many bytes of them, the client is not read."""

HELD_BYTES_MAX: Final = 65536
"""Input kept while it cannot be used; above it the client is not read."""

CLOSE_S: Final = 5.0
"""How long the client is given to answer our Close; and to take what was sent before it."""

LINGER_S: Final = 2.0
"""How long input is read and thrown away after our FIN, so that no RST destroys our Close (RFC 6455 7.1.1)."""

GRACE_S: Final = 10.0
"""How long callbacks may still run for messages that came before a Close; then the running one is killed."""

NEVER: Final = 1 << 62

ON_MESSAGE = "python_runtime_wsconnect"  # the labels of kore-api.md section 4
ON_CONNECT = "python_runtime_connect"

Callback = Callable[..., Any]


def nothing(*_: object) -> None:
    """The callback of an application that gave none."""


class WebSocketConnection(Sending):
    """The owner of one stream. Made by the handshake; ends with `lost`."""

    __slots__ = (
        "bucket", "ending", "expires", "finished", "gone", "grace_at", "half_closed", "heard", "http", "label",
        "onconnect", "ondisconnect", "onmsg", "over", "parse_due", "parser", "peer", "pinged_at", "prepared", "queue",
        "queued_bytes", "quick_max", "ready", "server", "stuck_at", "taken", "task", "timeout_ticks", "told",
    )  # fmt: skip

    def __init__(
        self, http: Any, peer: Peer, callbacks: tuple[Callback, Callback, Callback], window_bits: int | None
    ) -> None:
        server = http.server
        settings = server.settings
        frame_max = getattr(settings, "websocket_maxframe", 0) or 16384
        message_max = getattr(settings, "websocket_max_message", 0) or 1 << 20
        self.http: Any = http
        self.server: Any = server
        self.prepared = http.prepared
        self.peer = peer
        self.onconnect, self.onmsg, self.ondisconnect = callbacks
        self.window_bits = window_bits
        self.parser = MessageParser(frame_max, message_max, None if window_bits is None else Inflater)
        self.quick_max = min(125, frame_max, message_max)
        self.ready = False  # a frame may come, nothing waits or is held back
        self.state = OPEN
        self.over = False  # no more messages are taken for the application
        self.told = False  # ondisconnect was called
        self.ending = (ABNORMAL, "")  # how it ends: the code and the reason of the first Close, whoever sent it
        self.taken: Callable[[], object] = nothing  # called when the client has taken its output
        self.gone = False  # the stream is
        self.finished = False
        self.half_closed = False  # the client sent its FIN
        self.task: Any = None  # the callback that is suspended
        self.label = ""  # which it is
        self.queue: deque[tuple[int, str | bytes]] = deque()
        self.queued_bytes = 0
        self.parse_due = True  # the loop will call us to go on: at first for what came with the handshake
        self.stuck_at: tuple[int, int] | None = None  # untaken output at the last look, and when that was
        self.congested = False
        self.base = self.extra = self.added = 0
        self.bucket = NEVER
        self.expires = NEVER
        self.grace_at = NEVER
        self.pinged_at = -1
        self.heard = server.now
        timeout_s = getattr(settings, "websocket_timeout", 120)
        self.timeout_ticks = ticks(timeout_s) if timeout_s else 0  # 0: none
        self.stream = http.stream
        self.write = self.stream.write

    # --- input ---------------------------------------------------------------------------------------------

    def received(self, data: bytes) -> None:
        """Bytes of the client, ``b""`` at its FIN."""
        self.heard = self.server.now
        if self.ready:
            size = len(data) - 6
            if 0 <= size <= self.quick_max and data[1] == size + 128:
                # The hot path: one whole small frame. The parser would take 2 us for what is done here in 0.6.
                op = data[0] - 128
                if op == 1 or op == 2:
                    number = int.from_bytes(data[6:], "little") ^ int.from_bytes(data[2:6], "little") * MASK_TIMES[size]
                    payload = number.to_bytes((size + 3) & ~3, "little")[:size]
                    message: str | bytes = payload
                    if op == 1:
                        try:
                            message = payload.decode()
                        except UnicodeDecodeError:
                            self._fail(INVALID_DATA, "text is not UTF-8")
                            return
                    try:
                        result = self.onmsg(self.peer, op, message)
                    except BaseException as error:  # noqa: BLE001 - as for a handler: not the worker's end
                        self._raised(ON_MESSAGE, error)
                        return
                    if result is not None and type(result) is CoroutineType:
                        self._begin(ON_MESSAGE, result)
                    return
        try:
            self._input(data)
        except Exception as error:  # noqa: BLE001 - a defect of ours costs this connection, not the worker
            report_exception("WebSocketConnection", error)
            self.stream.abort()

    def _input(self, data: bytes) -> None:
        if not data:
            self.half_closed = True
            if self.state == LINGERING:
                self.stream.close()
            elif not self.parse_due and self._may_parse():
                self._parse()
        elif self.state != LINGERING:
            self.ready = False
            self.parser.feed(data)
            if not self.parse_due and self._may_parse():
                self._parse()
            elif self.parser.buffered > HELD_BYTES_MAX:
                self.stream.pause()

    def _may_parse(self) -> bool:
        """Whether another event may be taken: no more messages wait than may, and the client takes its output."""
        return (
            self.state != LINGERING and not self.gone and (self.stuck_at is None or self.state == CLOSING)
            and len(self.queue) < QUEUE_MESSAGES_MAX and self.queued_bytes < QUEUE_BYTES_MAX
        )

    def _parse(self) -> None:
        """Take events from the parser until it needs more bytes, no more may be taken, or the turn is over."""
        for _ in range(BURST_MAX):
            if not self._may_parse():
                if self.state != LINGERING:
                    self.stream.pause()  # `_advance` or `drained` has us go on
                return
            try:
                event = self.parser.next()
            except WebSocketError as error:
                self._fail(error.code, error.reason)
                return
            if event is None:
                self._wait_for_more()
                return
            self._event(*event)
        self._parse_later()

    def _wait_for_more(self) -> None:
        if self.half_closed:
            self._ended_without_close()
            return
        if not self.stream.reading:
            self.stream.resume()
        self.ready = self.state == OPEN and self.task is None and not self.queue and self.parser.idle

    def _parse_later(self) -> None:
        """Go on in the next turn: the other clients want theirs, and output has to leave."""
        self.ready = False
        if not self.parse_due:
            self.parse_due = True
            self.server.loop.call_soon(self.parse_now)

    def parse_now(self) -> None:
        """Go on where the turn before, or the handshake, left off."""
        self.parse_due = False
        if self._may_parse():
            self._parse()

    def _event(self, op: int, payload: str | bytes) -> None:
        if op <= BINARY:
            if self.over:
                return  # RFC 6455 1.4: what comes after our Close is thrown away
            if self.task is None and not self.queue:
                self._deliver(op, payload)
            else:
                self.queue.append((op, payload))
                self.queued_bytes += len(payload)
        elif op == PING:
            if self.state == OPEN:
                assert isinstance(payload, bytes)
                self.transmit(HEADS[PONG][len(payload)] + payload)
        elif op == CLOSE:
            assert isinstance(payload, bytes)
            if self.state == OPEN:
                code = int.from_bytes(payload[:2], "big") if payload else NO_CODE
                self.ending = (code, payload[2:].decode())
                # RFC 6455 5.5.1: answered with the code that came.
                self.transmit(HEADS[CLOSE][len(payload[:2])] + payload[:2])
            self._linger()
            self._end()

    # --- callbacks -----------------------------------------------------------------------------------------

    def _deliver(self, op: int, payload: str | bytes) -> None:
        self._call(ON_MESSAGE, self.onmsg, op, payload)

    def _call(self, label: str, function: Callback, *arguments: object) -> None:
        try:
            result = function(self.peer, *arguments)
        except BaseException as error:  # noqa: BLE001 - as for a handler: not the worker's end
            self._raised(label, error)
            return
        if type(result) is CoroutineType:
            self._begin(label, result)

    def _begin(self, label: str, coroutine: Any) -> None:
        """Run a callback's coroutine; when it suspends, what comes waits for its end."""
        try:
            task = self.server.loop.begin(coroutine)
        except BaseException as error:  # noqa: BLE001 - as above
            self._raised(label, error)
            return
        if task is not None:
            self.ready = False
            self.task = task
            self.label = label
            if self.over:
                self._look_at(self.grace_at)
            task.on_end = self._task_ended

    def _task_ended(self, error: BaseException | None) -> None:
        self.task = None
        if error is not None and not isinstance(error, GeneratorExit):
            self._raised(self.label, error)
        self._advance()

    def _raised(self, label: str, error: BaseException) -> None:
        """The application raised: this connection is closed (kore-api.md section 4)."""
        report_exception(label, error)
        self._forget_queue()
        self.close(INTERNAL_ERROR)

    def start(self) -> None:
        """Tell the application of its new connection."""
        self._call(ON_CONNECT, self.onconnect)

    def _advance(self) -> None:
        """Deliver what waited; then take more, or tell the application that it is over."""
        queue = self.queue
        while queue and self.task is None:
            op, payload = queue.popleft()
            self.queued_bytes -= len(payload)
            self._deliver(op, payload)
        if self.task is None:
            if self.over:
                self._tell()
            elif not self.parse_due and self._may_parse():
                self._parse()

    def _tell(self) -> None:
        """Call ondisconnect, once; after it and the stream have ended, so has this connection."""
        if not self.told:
            self.told = True
            self._call(ON_CONNECT, self.ondisconnect)
        if self.gone:
            self.peer.lost()
            if self.task is None and not self.finished:
                self.finished = True
                self.server.closed(self)

    def _forget_queue(self) -> None:
        self.queue.clear()
        self.queued_bytes = 0

    # --- output that is not taken ------------------------------------------------------------------------------

    def stalled(self) -> None:
        """The client does not take its output: take no more from it, and give it a time."""
        if self.gone:
            return
        self.ready = False
        if not self.congested:
            self.congested = True
            self.base = self.stream.pending
            self.extra = 0
        self.stuck_at = (self._untaken(), self.server.now)
        self.added = 0
        if self.state == OPEN:
            self.stream.pause()
        self._look_at(self.server.now + self.server.write_ticks)

    def drained(self) -> None:
        """It has taken everything that was stuck."""
        self.stuck_at = None
        if self.gone:
            return
        if self.stream.out is None:
            self.congested = False
        self.taken()
        self.heard = self.server.now  # its time did not run while it was not read
        if self.state == LINGERING:
            self._deadline(LINGER_S)
        elif not self.parse_due and self._may_parse():
            self._parse_later()

    def _untaken(self) -> int:
        return self.stream.pending + unsent(self.stream.fd)

    # --- the end -------------------------------------------------------------------------------------------

    def disconnect(self) -> None:
        """The application wants it closed (`kore.connection.disconnect`): no more messages, and a Close."""
        self._forget_queue()
        self.close(NORMAL)

    def close(self, code: int, reason: str = "") -> None:
        """Begin the closing handshake (RFC 6455 7.1.2): Close, and the client's answer is waited for."""
        if self.state == OPEN and not self.gone:
            self.ending = (code, reason)
            self.transmit(close_frame(code, reason))
            if self.state == OPEN:  # unless even that was too much
                self._closing()

    def _closing(self) -> None:
        self.state = CLOSING
        if not self.stream.reading:
            self.stream.resume()
        self._deadline(CLOSE_S)
        self._end()

    def _fail(self, code: int, reason: str) -> None:
        """The client broke the protocol: say so, and hear no more of it (RFC 6455 7.1.7)."""
        if self.state == OPEN:
            self.ending = (code, reason)
        self.transmit(close_frame(code, reason))
        self._linger()
        self._end()

    def _ended_without_close(self) -> None:
        """The client's FIN and no Close: its connection is broken (RFC 6455 7.1.5)."""
        self.transmit(close_frame(None))
        self._linger()
        self._end()

    def _linger(self) -> None:
        """Our FIN after what was written; then the client's is waited for."""
        self.state = LINGERING
        self.ready = False
        self._deadline(LINGER_S)
        if self.half_closed:
            # The application hears of it first: `_end` calls back in the next turn, close() is for after it.
            self.server.loop.call_soon(self._close_stream)
            return
        self.stream.finish()
        if not self.stream.reading:
            self.stream.resume()

    def _close_stream(self) -> None:
        self.stream.close()

    def _end(self) -> None:
        """From here on the application's messages go nowhere; it hears of the end behind what came before."""
        if self.over:
            return
        self.over = True
        self.ready = False
        self.write = nothing  # also for who kept `send`
        vars(self.peer).pop("websocket_send", None)
        members(self.server).discard(self)
        self.grace_at = self.server.now + ticks(GRACE_S)
        if self.task is not None or self.queue:
            self._look_at(self.grace_at)
        # In the next turn: this may be within a callback.
        self.server.loop.call_soon(self._advance)

    def drain(self) -> None:
        """The server stops."""
        self.close(GOING_AWAY, "the server stops")

    def lost(self, error: int) -> None:  # noqa: ARG002 -- the contract's; why does not matter to the application
        """The stream is over. What came with a Close before is still worked off; a broken connection kills."""
        self.gone = True
        broken = not self.over
        self._end()
        self.parser = MessageParser(0, 0)
        http, self.http = self.http, None
        if http is not None:
            http.gone = True
        if broken:
            self._kill()
        elif self.task is None:
            self._advance()

    def _kill(self) -> None:
        """Close the callback that runs, forget what waits, and tell."""
        self._forget_queue()
        task, self.task = self.task, None
        if task is not None:
            task.on_end = None
            task.kill()
        self._advance()

    # --- time ----------------------------------------------------------------------------------------------

    def _deadline(self, seconds: float) -> None:
        self.expires = self.server.now + ticks(seconds)
        self._look_at(self.expires)

    def _look_at(self, tick: int) -> None:
        """Have the wheel come by at `tick` at the latest."""
        if tick < self.bucket and not self.finished:
            self.server.schedule(self, tick)

    def watch(self) -> None:
        """Begin to look whether the client is there."""
        self.heard = self.server.now
        if self.timeout_ticks:
            self._look_at(self.heard + (self.timeout_ticks + 1) // 2)

    def check(self, now: int) -> None:
        """The wheel came by: act on what is due, and say when to look again."""
        if self.finished:
            return
        self.bucket = NEVER
        over = self.over
        if over and now >= self.grace_at:
            self.grace_at = now + ticks(GRACE_S)  # ondisconnect has its own
            self._kill()
        if not self.gone:
            self._check_client(now)
        if over and (self.task is not None or self.queue):
            self._look_at(self.grace_at)

    def _check_client(self, now: int) -> None:
        moving = False
        if self.stuck_at is not None:
            before, since = self.stuck_at
            untaken = self._untaken()
            moving = untaken != before
            if now - since >= self.server.write_ticks:
                if before + self.added - untaken < RATE_MIN * self.server.settings.http_write_timeout:
                    self._reset()
                    return
                self.stuck_at = (untaken, now)
                self.added = 0
        if self.state != OPEN:
            if now < self.expires:
                self._look_at(self.expires)
            elif moving:
                self._deadline(CLOSE_S)  # it is still taking what came before our Close
            else:
                self._reset()
        elif self.stuck_at is not None:
            self._look_at(now + self.server.write_ticks)
        elif self.timeout_ticks:
            self._check_life(now)

    def _reset(self) -> None:
        """The client does nothing: give up what it has not taken."""
        reset_on_close(self.stream.fd)
        self.stream.abort()

    def _check_life(self, now: int) -> None:
        """Ask a client that has been silent for half of its time whether it is there; drop one that does not answer."""
        if not self.stream.reading:
            self.heard = now  # we did not listen
        silent = now - self.heard
        half = (self.timeout_ticks + 1) // 2
        if silent >= self.timeout_ticks:
            self._fail(INTERNAL_ERROR, "nothing was heard for too long")
            return
        if silent >= half:
            if self.pinged_at <= self.heard:
                self.pinged_at = now
                self.transmit(HEADS[PING][0])
            self._look_at(self.heard + self.timeout_ticks)
        else:
            self._look_at(self.heard + half)

    @property
    def idle(self) -> bool:
        """Never: it is closed by its closing handshake, which `drain` begins."""
        return False


def ticks(seconds: float) -> int:
    """Seconds in ticks of the server's clock, rounded up."""
    return int(seconds / TICK_S) + 1
