"""The proof on requests, for a few seconds, and that its judges see what is wrong: the long run is tests/endurance."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

from tests.endurance import model, requests
from tests.endurance.exchange import Answer, Peer
from tests.endurance.generate import DEFECTS, VALID, Conversation, make
from tests.endurance.report import Result, Unavailable, silent

SEED = 7


def conversation(*sent: bytes) -> Conversation:
    return Conversation((), sent, finish_early=True)


def whole(kind: str) -> model.Request:
    reading = model.read(make(kind, SEED).data)
    assert reading.rest == model.NOTHING
    return reading.requests[0]


def right(request: model.Request) -> Answer:
    """The answer that the model expects."""
    fields = {"connection": "keep-alive" if request.keep_alive else "close"}
    return Answer(200, fields, json.dumps(request.seen).encode())


@pytest.mark.parametrize("io", ["parser", "uring", "epoll"])
def test_requests_cut_anywhere_are_read_as_meant_and_answered(io: str) -> None:
    """The proof itself, short."""
    try:
        result = requests.prove(io, requests=1500, seed=SEED, progress=silent)
    except Unavailable as reason:
        pytest.skip(str(reason))
    assert not result.failed, result.text()
    assert result.figures["requests"] >= 1500
    assert result.figures["valid"] > 500
    assert result.figures["invalid"] > 200


@pytest.mark.parametrize("kind", sorted(VALID))
def test_the_model_reads_what_is_valid(kind: str) -> None:
    for seed in range(20):
        data = make(kind, seed).data
        reading = model.read(data)
        assert reading.rest == model.NOTHING, data
        assert len(reading.requests) == 1


@pytest.mark.parametrize("kind", sorted(DEFECTS))
def test_the_model_refuses_each_defect(kind: str) -> None:
    reading = model.read(make("plain", 0).data + make(kind, 0).data + make("plain", 0).data)
    assert len(reading.requests) == 1
    assert reading.rest != model.NOTHING


def test_the_parser_is_judged_by_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """A parser that reads something else than the model is found out, whatever differs."""
    sent = conversation(b"POST /a?b HTTP/1.1\r\nHost: a\r\nX: y\r\nContent-Length: 3\r\n\r\nabc")
    requests.check_parser(sent)
    read = model.read
    for change in (
        {"path": "/b"}, {"query": None}, {"host": "b"}, {"body": b"abd"}, {"keep_alive": False}, {"fields": ()},
    ):
        def other(data: bytes, change: dict = change) -> model.Reading:
            found = read(data)
            return model.Reading([dataclasses.replace(each, **change) for each in found.requests], found.rest)

        monkeypatch.setattr(model, "read", other)
        with pytest.raises(AssertionError):
            requests.check_parser(sent)
    for rest in (model.WRONG, model.NOTHING):
        half = conversation(b"GET / HTTP/1.1\r\nHost: \0" if rest == model.NOTHING else b"GET / HTTP/1.1\r\n")
        monkeypatch.setattr(model, "read", lambda data, rest=rest: model.Reading([], rest))
        with pytest.raises(AssertionError):
            requests.check_parser(half)


def test_answers_are_judged() -> None:
    """Right ones pass; missing, wrong, surplus and unclosed ones do not."""
    request = next(
        found for seed in range(100) for found in model.read(make("h11", seed).data).requests
        if found.echoed and found.method == "GET")
    reading = model.Reading([request])

    def judge(*answers: Answer, rest: str = model.NOTHING, error: str = "") -> None:
        peer = Peer((), [], finish_early=True, answers=list(answers), error=error)
        requests.check_answers(peer, replace(reading, rest=rest), frozenset({400}))

    good = right(request)
    no = Answer(400, {"connection": "close"})
    judge(good)
    judge(good, no, rest=model.WRONG)
    judge(good, rest=model.INCOMPLETE)
    for wrong in (
        [], [good, good], [no], [replace(good, body=b"{}")], [replace(good, status=500)],
        [replace(good, fields={"connection": "close"})],
    ):
        with pytest.raises(AssertionError):
            judge(*wrong)
    other, open_ = replace(no, status=431), replace(no, fields={})
    for wrong in ([good], [good, good], [good, no, no], [good, other], [good, open_]):
        with pytest.raises(AssertionError):
            judge(*wrong, rest=model.WRONG)
    with pytest.raises(AssertionError, match="reset"):
        judge(good, error="reset")


def test_the_client_reads_answers_one_after_the_other() -> None:
    """Whatever way they are cut, HEAD and interim responses included; a FIN in the middle is seen."""
    wire = (
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n"  # to HEAD
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n0\r\n\r\n"
        b"HTTP/1.0 404 Not Found\r\nConnection: close\r\n\r\nrest"
    )
    for size in (1, 7, len(wire)):
        peer = Peer((), ["HEAD", "POST", "GET"], finish_early=True)
        for at in range(0, len(wire), size):
            peer.feed(wire[at : at + size])
        peer.feed(b"")
        assert not peer.error
        assert [(answer.status, answer.body) for answer in peer.answers] == [(200, b""), (200, b"ab"), (404, b"rest")]
        assert peer.interim == 1
    peer = Peer((), ["GET"], finish_early=True)
    peer.feed(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nab")
    peer.feed(b"")
    assert peer.error


@pytest.mark.parametrize(("more", "resident", "what"), [
    ({}, 0, ""),
    ({"pss": 1 << 20, "blocks": 12_000}, 4 << 20, ""),
    ({"pss": 4 << 20}, 0, "held memory"),
    ({"blocks": 37_500}, 0, "blocks of memory"),
    ({}, 12 << 20, "resident memory"),
    ({"fds": 1}, 0, "fds"),
    ({"tasks": 1}, 0, "tasks"),
])
def test_memory_is_judged(more: dict, resident: int, what: str) -> None:
    """A hundred bytes, or one object, forgotten with each request would be seen; the tides of caches are not a leak."""
    run = requests.Run(SimpleNamespace(pids=[10]), Result("requests", "x"), 100_000, 1, silent)
    run.samples = [[20 << 20]] * 75 + [[(20 << 20) + resident]] * 25
    run.before = {10: {"pss": 10 << 20, "blocks": 80_000, "fds": 9, "tasks": 0, "asyncio_tasks": 1}}
    run.judge_memory({10: {name: value + more.get(name, 0) for name, value in run.before[10].items()}})
    assert what in "\n".join(run.result.failures)
    assert bool(run.result.failed) == bool(what)
