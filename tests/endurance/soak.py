"""Proof: after twenty minutes of everything that clients do, a server holds what it held after the warm-up.

The mixed load of tests.endurance.clients as a warm-up, quiet, the same load for the time that was asked for, and quiet
again. While the load runs, memory is sampled; in the quiets everything is counted.

The criteria, for each worker and for the parent:

- memory (Pss_Anon) under load: a straight line through the samples of the last 80 % of the load rises by less than
  SLOPE_BYTES_PER_MINUTE_MAX, when the load lasts at least LONG_SECONDS; in shorter runs a slope is noise, and memory
  may not be more than SHORT_GROWTH_BYTES_MAX above the warm one;
- fds, kore's tasks and asyncio's tasks: in the second quiet exactly as many as in the first;
- memory held, after a collection and with nothing kept back by the allocator: in the second quiet not more than
  HELD_BYTES_MAX above the first (SHORT_GROWTH_BYTES_MAX in shorter runs);
- objects that the garbage collector knows, after a collection: not more than OBJECTS_MAX above the first quiet;
- the clients: every answer that was to come came, and was right; the workers: the same processes, and no complaints.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import asdict, dataclass, field

from tests.endurance.clients import Mix
from tests.endurance.report import Progress, Result
from tests.endurance.server import Server, descriptors, held, pss, serving

LONG_SECONDS = 900.0
WARM_UP_SHARE = 0.25
WARM_UP_SECONDS = (1.5, 300.0)
"""Long enough for the collector, which comes after 20,000 objects, to come once: memory then is what it needs."""

SAMPLES = 240
SAMPLE_SECONDS_MIN = 0.2
SLOPE_BYTES_PER_MINUTE_MAX = 32 << 10
"""Half a megabyte in the sixteen minutes that are looked at. A hundred bytes forgotten with each of 9,000 connections a
minute, on two workers, are fourteen times that; with each request, more."""

SHORT_GROWTH_BYTES_MAX = 12 << 20
HELD_BYTES_MAX = 1 << 20
OBJECTS_MAX = 1000
"""Timers and caches come and go by hundreds; one object for each hundredth of 150,000 connections is more."""


@dataclass
class Track:
    """The samples of one process: seconds since the load began, and bytes."""

    pid: int
    times: list[float] = field(default_factory=list)
    bytes: list[int] = field(default_factory=list)

    def slope(self) -> float:
        """Bytes per minute, by least squares over the last 80 % of the time."""
        if not self.times:
            return 0.0
        first = self.times[0] + (self.times[-1] - self.times[0]) * 0.2
        points = [(t / 60, b) for t, b in zip(self.times, self.bytes, strict=True) if t >= first]
        mean_t = sum(t for t, _ in points) / len(points)
        mean_b = sum(b for _, b in points) / len(points)
        spread = sum((t - mean_t) ** 2 for t, _ in points)
        return sum((t - mean_t) * (b - mean_b) for t, b in points) / spread if spread else 0.0


class Run:
    """One server and its load."""

    def __init__(self, server: Server, seconds: float, result: Result, progress: Progress) -> None:
        self.server = server
        self.seconds = seconds
        self.result = result
        self.progress = progress
        self.tracks = [Track(pid) for pid in (*server.pids, server.program.pid)]
        self.mix = Mix(server.address)

    def run(self) -> None:
        """Warm up, quiet, load, quiet, judge."""
        low, high = WARM_UP_SECONDS
        warm_up = min(high, max(low, self.seconds * WARM_UP_SHARE))
        asyncio.run(self.under_load(warm_up, "warm-up", sample=False))
        before = held(self.server)
        warm = [pss(track.pid) for track in self.tracks]
        parent_fds = descriptors(self.server.program.pid)
        asyncio.run(self.under_load(self.seconds, "load", sample=True))
        after = held(self.server)
        self.judge(before, after, warm)
        self.result.check(
            descriptors(self.server.program.pid) == parent_fds,
            f"the parent had {parent_fds} fds and has {descriptors(self.server.program.pid)}")

    async def under_load(self, seconds: float, what: str, *, sample: bool) -> None:
        """Load for so long."""
        began = time.monotonic()
        clients = asyncio.create_task(self.mix.run(seconds))
        pause = max(SAMPLE_SECONDS_MIN, seconds / SAMPLES)
        while not clients.done():
            await asyncio.wait([clients], timeout=pause)
            passed = time.monotonic() - began
            self.progress(
                f"soak on {self.result.io}: {what}: {passed:.0f} of {seconds:.0f} s, "
                f"{sum(self.mix.counts.values())} exchanges, {len(self.mix.failures)} failures, "
                f"memory {', '.join(f'{pss(track.pid) // 1024} KiB' for track in self.tracks)}")
            if sample and passed <= seconds:
                for track in self.tracks:
                    track.times.append(round(passed, 1))
                    track.bytes.append(pss(track.pid))
        clients.result()

    def judge(self, before: dict[int, dict[str, int]], after: dict[int, dict[str, int]], warm: list[int]) -> None:
        """The criteria of the file's first words."""
        result = self.result
        for text in self.mix.failures:
            result.fail(text)
        for pid in self.server.pids:
            was, now = before.get(pid, {}), after.get(pid, {})
            for what in ("fds", "tasks", "asyncio_tasks"):
                had, has = was.get(what), now.get(what)
                result.check(had == has, f"worker {pid} had {had} {what} and has {has}")
            more = now.get("objects", 0) - was.get("objects", 0)
            result.check(more <= OBJECTS_MAX, f"worker {pid} has {more} objects more")
            held_more = now.get("pss", 0) - was.get("pss", 0)
            most = HELD_BYTES_MAX if self.seconds >= LONG_SECONDS else SHORT_GROWTH_BYTES_MAX
            result.check(held_more <= most, f"worker {pid} holds {held_more} bytes more")
        growth = [pss(track.pid) - base for track, base in zip(self.tracks, warm, strict=True)]
        slopes = [track.slope() for track in self.tracks]
        if self.seconds >= LONG_SECONDS:
            for track, slope in zip(self.tracks, slopes, strict=True):
                result.check(
                    slope < SLOPE_BYTES_PER_MINUTE_MAX,
                    f"memory of process {track.pid} grows by {slope / 1024:.0f} KiB a minute")
        else:
            result.check(max(growth) <= SHORT_GROWTH_BYTES_MAX, f"memory grew by {growth} bytes")
        result.check(set(after) == set(self.server.pids), f"the workers are {sorted(after)}, not {self.server.pids}")
        result.check(not self.server.death_lines, f"deaths: {self.server.death_lines[:3]}")
        result.check(not self.server.worker_lines, f"complaints: {self.server.worker_lines[:3]}")
        result.check(not self.server.program.err, f"standard error: {self.server.program.err[-1500:]}")
        more_objects = [after[pid]["objects"] - before[pid]["objects"] for pid in before if pid in after]
        result.figures |= {
            "load_seconds": self.seconds, "exchanges": sum(self.mix.counts.values()),
            "slope_kib_per_minute": " ".join(f"{slope / 1024:.1f}" for slope in slopes),
            "growth_kib": " ".join(str(each // 1024) for each in growth),
            "objects_more": " ".join(map(str, more_objects)),
            "held_more_kib": " ".join(str((after[p]["pss"] - before[p]["pss"]) // 1024) for p in before if p in after),
            "garbage_collected": " ".join(str(after[pid]["garbage"]) for pid in after),
            **dict(sorted(self.mix.counts.items())),
            "samples": [asdict(track) for track in self.tracks],
        }


def prove(io: str, *, seconds: float, progress: Progress) -> Result:
    """The proof on one engine."""
    result = Result("soak", io)
    began = time.monotonic()
    with serving(io, workers=2) as server:
        try:
            Run(server, seconds, result, progress).run()
        except AssertionError as error:
            result.fail(str(error))
    result.check(server.program.process.returncode == 0, f"exit code {server.program.process.returncode}")
    result.seconds = time.monotonic() - began
    return result
