"""Proof: a hundred thousand requests, valid and invalid, cut anywhere, are read as they were meant.

By the parser: in pieces as in one, and as the model reads them. By the server: each valid one gets the answer the model
expects, in order; an invalid one gets one status that says no, and the connection is closed. h11 makes a part of the
valid ones and reads all the answers. No worker dies, none complains, and memory stays flat after a warm-up.

A defect ends its connection, so what a conversation sends behind one is never read: it does not count.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator

import hypothesis
from hypothesis import HealthCheck, Phase
from hypothesis import strategies as st

from tests.endurance import model
from tests.endurance.exchange import Answer, Peer, exchange
from tests.endurance.generate import Conversation, Made, conversations
from tests.endurance.report import Progress, Result
from tests.endurance.server import Server, held, pss, serving
from tests.http_harness import END, HeadParser, events

PER_EXAMPLE = 16
"""Conversations at the same time: enough that the server is always in the middle of several."""

EXAMPLES_PER_ROUND = 100
"""Hypothesis remembers what it tried, so many small runs, each with a seed of its own, instead of a long one."""

SAMPLES = 100

WARM_UP_SHARE = 0.25
LONG_REQUESTS = 80_000
GROWTH_BYTES_MAX = 3 << 19
"""Of what one worker holds, after the warm-up: a hundred bytes forgotten with each of 37,500 requests would be more.
Not nothing, because blocks lie scattered over more pages after every tide of heads to be known and of bodies."""

BLOCKS_MAX = 15_000
"""Blocks of Python's allocator, whose number no scattering changes: one forgotten with each request would be 37,500.
The heads a worker knows, at times none and at times a thousand, are 13,000."""

FREE_GROWTH_BYTES_MAX = 8 << 20
"""Of what is resident, between the second quarter and the last: that is also what the allocator keeps back in holes,
and bodies of all sizes up to 100 kB make many."""

SHORT_GROWTH_BYTES_MAX = 10 << 20
"""In shorter runs: a worker's memory of 1024 heads, and its arenas, are still filling."""

SEASONED = HeadParser(model.HEADER_MAX)
"""A parser's memory that has seen everything before: what it knows may not blind it."""

REFUSALS = frozenset({400, 408, 411, 413, 414, 417, 421, 431, 501, 505})


class Count:
    """What was tried so far."""

    def __init__(self) -> None:
        self.requests = self.valid = self.refused = self.unfinished = self.conversations = 0

    def add(self, reading: model.Reading) -> None:
        """One conversation."""
        meant, rest = reading.requests, reading.rest
        self.conversations += 1
        self.valid += len(meant)
        self.refused += rest == model.WRONG
        self.unfinished += rest == model.INCOMPLETE
        self.requests += len(meant) + (rest != model.NOTHING)

    def figures(self) -> dict[str, object]:
        """For the report."""
        return {
            "requests": self.requests, "valid": self.valid, "invalid": self.refused, "unfinished": self.unfinished,
            "connections": self.conversations,
        }


def meant_by(conversation: Conversation) -> tuple[model.Reading, frozenset[int]]:
    """What the model reads, up to where the connection is closed, and what a refusal may say.

    Fails when the model does not see what is known by construction: a blind model would find everything right.
    """
    reading = model.read(conversation.data)
    requests = reading.requests
    statuses: frozenset[int] = REFUSALS
    for known, made in enumerate(conversation.made):
        if made.valid is None:
            break
        if not made.valid:
            assert len(requests) == known, f"the model misjudges what comes before {made.data[:200]!r}"
            assert reading.rest != model.NOTHING, f"the model accepts {made.data[:200]!r}"
            statuses = made.statuses
            break
        assert len(requests) > known, f"the model refuses {made.data[:200]!r}"
    for at, request in enumerate(requests):
        if not request.keep_alive:
            return model.Reading(requests[: at + 1]), statuses
    if reading.rest == model.INCOMPLETE:
        statuses = REFUSALS
    return reading, statuses if reading.early is None else statuses | {reading.early}


# The parser.


def check_parser(conversation: Conversation) -> model.Reading:
    """The parser reads pieces like the whole, and both like the model."""
    reading = model.read(conversation.data)
    meant, rest = reading.requests, reading.rest
    found = events(conversation.data, body_bytes_max=model.BODY_MAX, header_bytes_max=model.HEADER_MAX)
    limits = {"body_bytes_max": model.BODY_MAX, "header_bytes_max": model.HEADER_MAX}
    assert events(*conversation.pieces, **limits) == found, "cut, it is read differently"
    assert events(conversation.data, body_bytes_max=model.BODY_MAX, heads=SEASONED) == found, "known heads blind it"
    for request in meant:
        head, fields = found.pop(0)
        # shown() of the harness: the attributes of Head in their order.
        assert head[:8] == (
            model.METHODS[request.method], request.method, request.target, request.path, request.query, request.minor,
            request.host, head[7],
        ), f"{head} is not {request}"
        assert head[8] == request.keep_alive
        assert tuple(fields) == request.fields
        body = found.pop(0)
        if body is not END:
            assert body == request.body
            assert found.pop(0) is END
        else:
            assert not request.body
    refused = bool(found) and type(found[-1]) is tuple and type(found[-1][0]) is int
    assert refused if rest == model.WRONG else rest == model.INCOMPLETE or not found, f"{rest} is read as {found}"
    for made in conversation.made[len(meant) : len(meant) + 1]:
        if made.statuses and all(before.valid for before in conversation.made[: len(meant)]):
            assert found[-1][0] in made.statuses, f"{made.data[:100]!r} is refused with {found[-1]}"
    return reading


# The server.


def check_answers(peer: Peer, reading: model.Reading, statuses: frozenset[int]) -> None:
    """The answers to one conversation, against the model."""
    meant, rest, answers = reading.requests, reading.rest, peer.answers
    assert not peer.error, f"{peer.error} after {len(answers)} of {len(meant)} answers"
    for at, request in enumerate(meant):
        assert answers, f"no answer to request {at + 1}: {request}"
        answer = answers.pop(0)
        check_answer(answer, request)
        if answer.close:
            # An early refusal may leave a body unread, and then has to close (RFC 9112 9.3).
            unread = request.has_body and request.unwanted
            # HTTP/1.0 knows no chunks: the end of the connection is the end of the body (RFC 9112 6.3).
            streamed = request.minor == 0 and request.path.startswith("/echo/chunks")
            assert unread or streamed or not request.keep_alive, f"closed after request {at + 1}: {request}"
            assert not answers, f"{answers} after a response that closes"
            return
        assert request.keep_alive, f"request {at + 1} is not the last one for the server: {request}"
    if rest == model.WRONG:
        assert answers, "closed without a status"
    elif rest == model.NOTHING:
        assert not answers, f"answers to nothing: {answers}"
    if answers:
        assert len(answers) == 1, f"more than one answer: {answers}"
        assert answers[0].status in statuses, f"refused with {answers[0].status}, not {sorted(statuses)}"
        assert answers[0].close, "a refusal that does not close"


def check_answer(answer: Answer, request: model.Request) -> None:
    """One answer, against the model."""
    assert answer.status == request.answer, f"{answer} to {request}"
    if request.method == "HEAD":
        assert not answer.body
    elif answer.status == 200 and request.echoed:
        assert json.loads(answer.body) == request.seen
    elif answer.status == 200 and request.path != "*":
        assert answer.body == b"hello"
    else:
        assert not answer.body
    if answer.status == 405:
        assert answer.fields["allow"] == "GET, HEAD"


def grown(samples: list[int]) -> int:
    """By how much the largest sample of the last quarter exceeds that of the second: caches come and go in between."""
    quarter = max(1, len(samples) // 4)
    return max(samples[-quarter:]) - max(samples[quarter : 2 * quarter] or samples[:1]) if samples else 0


# The runs.


def run_rounds(
    check: Callable[[list[Conversation]], None], count: Count, requests: int, seed: int, progress: Callable[[], None]
) -> str:
    """Have hypothesis make conversations until `requests` were tried; what went wrong, "" when nothing did.

    Hypothesis never hears of a failure: it would shrink it for minutes by trying it on a server that may hang.
    """
    number = 0
    failures: list[str] = []
    while count.requests < requests and not failures:
        examples = max(1, min(EXAMPLES_PER_ROUND, (requests - count.requests) // (PER_EXAMPLE * 4)))

        @hypothesis.seed(seed * 1_000_003 + number)
        @hypothesis.settings(
            max_examples=examples, database=None, deadline=None, suppress_health_check=list(HealthCheck),
            phases=[Phase.generate],
        )
        @hypothesis.given(st.lists(conversations(), min_size=1, max_size=PER_EXAMPLE))
        def one_round(batch: list[Conversation]) -> None:
            if not failures:
                try:
                    check(batch)
                except Exception as error:
                    failures.append(described(error))
                progress()

        one_round()
        number += 1
    return failures[0] if failures else ""


def described(error: Exception) -> str:
    """What went wrong, and what was sent."""
    return "; ".join([f"{error!r}"[:1500], *getattr(error, "__notes__", ())])


@contextlib.contextmanager
def about(conversation: Conversation) -> Iterator[None]:
    """Say with an exception which conversation it is about."""
    try:
        yield
    except Exception as error:
        kinds = [(made.kind, made.seed) for made in conversation.made]
        error.add_note(f"of the kinds and seeds {kinds}, sent {repr(conversation.pieces)[:1500]}")
        raise


def prove_parser(requests: int, seed: int, progress: Progress) -> Result:
    """The parser, without any server."""
    result = Result("requests", "parser")
    began = time.monotonic()
    count = Count()

    def check(batch: list[Conversation]) -> None:
        for conversation in batch:
            with about(conversation):
                count.add(check_parser(conversation))

    wrong = run_rounds(
        check, count, requests, seed, lambda: progress(f"parser: {count.requests} of {requests} requests"))
    result.check(not wrong, wrong)
    result.figures = {"seed": seed, **count.figures()}
    result.seconds = time.monotonic() - began
    return result


def prove_server(io: str, requests: int, seed: int, progress: Progress) -> Result:
    """The server on one engine."""
    result = Result("requests", io)
    began = time.monotonic()
    with serving(io, workers=2) as server:
        Run(server, result, requests, seed, progress).run()
    result.check(server.program.process.returncode == 0, f"exit code {server.program.process.returncode}")
    result.seconds = time.monotonic() - began
    return result


class Run:
    """One run against one server."""

    def __init__(self, server: Server, result: Result, requests: int, seed: int, progress: Progress) -> None:
        self.server = server
        self.result = result
        self.requests = requests
        self.seed = seed
        self.progress = progress
        self.count = Count()
        self.before: dict[int, dict[str, int]] = {}
        self.samples: list[list[int]] = []  # memory of each worker, at every SAMPLES-th of the requests

    def run(self) -> None:
        """Try everything, then look at the workers."""
        wrong = run_rounds(self.check, self.count, self.requests, self.seed, self.look)
        self.result.check(not wrong, wrong)
        self.result.figures = {"seed": self.seed, **self.count.figures(), "samples": self.samples}
        try:
            self.judge_memory(held(self.server))
        except (AssertionError, OSError) as error:
            self.result.fail(f"the server does not come to rest: {error!r}")
        self.result.check(all(pss(pid) for pid in self.server.pids), "a worker is gone")
        self.result.check(not self.server.death_lines, f"deaths: {self.server.death_lines[:3]}")
        self.result.check(not self.server.worker_lines, f"complaints: {self.server.worker_lines[:3]}")
        self.result.check(not self.server.program.err, f"standard error: {self.server.program.err[-1500:]}")

    def judge_memory(self, after: dict[int, dict[str, int]]) -> None:
        """What is held and what is resident stays what it was after the warm-up."""
        long = self.requests >= LONG_REQUESTS
        resident = [grown([sample[at] for sample in self.samples]) for at in range(len(self.server.pids))]
        more = {
            what: [after[pid][what] - said[what] for pid, said in self.before.items() if pid in after]
            for what in ("pss", "blocks", "fds", "tasks", "asyncio_tasks")
        }
        self.result.figures |= {
            "held_more_kib": " ".join(str(each // 1024) for each in more["pss"]),
            "resident_more_kib": " ".join(str(each // 1024) for each in resident),
            "resident_kib": " ".join(str(each // 1024) for each in self.samples[-1]) if self.samples else "",
            "blocks_more": " ".join(map(str, more["blocks"])),
        }
        self.result.check(len(more["pss"]) == len(self.server.pids), "not the workers of the beginning")
        for what, each, most in (
            ("held", more["pss"], GROWTH_BYTES_MAX if long else SHORT_GROWTH_BYTES_MAX),
            ("blocks of", more["blocks"], BLOCKS_MAX),
            ("resident", resident, FREE_GROWTH_BYTES_MAX if long else SHORT_GROWTH_BYTES_MAX),
        ):
            self.result.check(max(each, default=0) <= most, f"{what} memory grew by {each}, more than {most}")
        for what in ("fds", "tasks", "asyncio_tasks"):
            self.result.check(not any(more[what]), f"{what}: {more[what]} more")

    def look(self) -> None:
        """Between two examples."""
        self.progress(f"{self.result.io}: {self.count.requests} of {self.requests} requests")
        while self.count.requests * SAMPLES >= self.requests * (len(self.samples) + 1):
            self.samples.append([pss(pid) for pid in self.server.pids])
        if not self.before and self.count.requests >= self.requests * WARM_UP_SHARE:
            self.before = held(self.server)

    def check(self, batch: list[Conversation]) -> None:
        """All conversations of an example at the same time."""
        expected = [meant_by(conversation) for conversation in batch]
        peers = exchange(self.server.address, [
            Peer(conversation.pieces, [request.method for request in reading.requests], conversation.finish_early)
            for conversation, (reading, _) in zip(batch, expected, strict=True)
        ])
        for conversation, peer, (reading, statuses) in zip(batch, peers, expected, strict=True):
            self.count.add(reading)
            with about(conversation):
                check_answers(peer, reading, statuses)


def prove(io: str, *, requests: int, seed: int, progress: Progress) -> Result:
    """The part of the proof that `io` names: "parser" or an engine."""
    if io == "parser":
        return prove_parser(requests, seed, progress)
    return prove_server(io, requests, seed, progress)


__all__ = ["Made", "prove"]
