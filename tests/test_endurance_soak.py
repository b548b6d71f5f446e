"""The soak, for seconds instead of minutes, and that it would notice what it looks for."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from tests.endurance import __main__ as command
from tests.endurance import clients, soak
from tests.endurance.report import Result, Unavailable, silent


@pytest.mark.parametrize("io", ["uring", "epoll"])
def test_the_server_holds_what_it_held_before_the_load(io: str) -> None:
    """The proof itself, short."""
    try:
        result = soak.prove(io, seconds=3, progress=silent)
    except Unavailable as reason:
        pytest.skip(str(reason))
    assert not result.failed, result.text()
    kinds = {kind.__name__ for kind, _, _ in clients.MIX} - {"silent"}
    assert kinds <= set(result.figures), "not every kind of client had a turn"


def test_the_slope_is_that_of_the_last_part() -> None:
    """Growth in the first fifth is the warm-up's, what follows is counted by the minute."""
    track = soak.Track(1)
    for second in range(0, 601, 5):
        track.times.append(second)
        track.bytes.append(50_000_000 + (second * 1_000_000 if second < 120 else 120_000_000 + (second - 120) * 100))
    assert track.slope() == pytest.approx(6000)
    assert soak.Track(1).slope() == 0


@pytest.fixture
def run():
    program = SimpleNamespace(out="", err="", pid=0)
    server = SimpleNamespace(address=("", 0), pids=[10], program=program, death_lines=[], worker_lines=[])
    return soak.Run(server, 1200, Result("soak", "x"), silent)


HELD = {"fds": 9, "tasks": 0, "asyncio_tasks": 1, "objects": 10_000, "garbage": 0, "pss": 10_000_000}


@pytest.mark.parametrize(("more", "slope", "what"), [
    ({}, 0, ""),
    ({"objects": 10_900}, 20_000 / 60, ""),
    ({"fds": 10}, 0, "9 fds"),
    ({"tasks": 1}, 0, "0 tasks"),
    ({"asyncio_tasks": 2}, 0, "1 asyncio_tasks"),
    ({"objects": 11_500}, 0, "1500 objects more"),
    ({"pss": 12_000_000}, 0, "holds 2000000 bytes more"),
    ({}, 60_000 / 60, "memory of process 10 grows by 59 KiB a minute"),
])
def test_what_grows_is_named(run, more: dict, slope: float, what: str) -> None:
    """One fd, one task, or some bytes with each connection."""
    for second in range(0, 1200, 5):
        run.tracks[0].times.append(second)
        run.tracks[0].bytes.append(int(50_000_000 + second * slope))
    run.judge({10: HELD}, {10: HELD | more}, [0, 0])
    assert what in "\n".join(run.result.failures)
    assert bool(run.result.failed) == bool(what)


def test_a_client_that_gets_a_wrong_answer_says_so() -> None:
    """Each kind of client fails on a server that answers everything with the same few bytes."""
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.read(65536)
            writer.write(b"HTTP/1.1 299 Odd\r\ncontent-length: 1\r\n\r\nx" * 20)
            await writer.drain()
        finally:
            writer.close()

    async def story() -> set[str]:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        async with server:
            mix = clients.Mix(server.sockets[0].getsockname()[:2])
            for kind, _, _ in clients.MIX:
                if kind not in (clients.leaving, clients.silent):
                    until = clients.time.monotonic() + 60
                    task = asyncio.create_task(mix.repeat(kind, 60, until, clients.random.Random(1)))
                    while not mix.counts[kind.__name__]:
                        await asyncio.sleep(0.001)
                    task.cancel()
                    await asyncio.wait([task])
        return {text.partition(":")[0] for text in mix.failures}

    assert asyncio.run(asyncio.wait_for(story(), 20)) == {
        kind.__name__ for kind, _, _ in clients.MIX} - {"leaving", "silent"}


@pytest.mark.parametrize("arguments", [
    ["nothing"], ["soak", "--io", "kqueue"], ["soak", "--io", "parser"], ["deaths", "--kills", "0"],
    ["soak", "--minutes", "0"],
])
def test_bad_arguments_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """A misspelt proof is an error and not a proof."""
    with pytest.raises(SystemExit) as ended:
        command.parse(arguments)
    assert ended.value.code == 2


def test_the_command_tells_by_its_exit_code(
    monkeypatch: pytest.MonkeyPatch, tmp_path, capsys: pytest.CaptureFixture[str]
) -> None:
    """0 shown, 1 failed, 77 not to be tried here; and all of it as JSON."""
    monkeypatch.setattr(command.signal, "signal", lambda *_: None)

    def outcome(what: str) -> int:
        def prove(io: str, options: object, progress: object) -> Result:
            result = Result("soak", io)
            if what == "skipped":
                raise Unavailable("no such thing")
            result.check(what == "shown" or io == "uring", "it leaks")
            return result

        monkeypatch.setitem(command.PROOFS, "soak", (prove, ("uring", "epoll")))
        return command.main(["soak", "--json", str(tmp_path / "result.json")])

    assert outcome("shown") == 0
    assert outcome("failed") == 1
    assert "it leaks" in capsys.readouterr().out
    assert '"verdict": "FAILED"' in (tmp_path / "result.json").read_text()
    assert outcome("skipped") == command.EXIT_SKIPPED
    assert "no such thing" in capsys.readouterr().out
