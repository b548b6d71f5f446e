"""The command: ``python -m tests.endurance NAME`` runs a proof on every engine and says whether it holds.

Exit status: 0 shown, 1 failed, 2 wrong arguments, 77 nothing could be tried here (the reason is printed).
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from tests.endurance.report import Line, Progress, Result, Unavailable

EXIT_SKIPPED = 77
ENGINES = ("uring", "epoll")


def prove_requests(io: str, options: argparse.Namespace, progress: Progress) -> Result:
    """Imported where it is wanted: hypothesis and h11 are not needed for the others."""
    from tests.endurance import requests

    return requests.prove(io, requests=options.requests, seed=options.seed, progress=progress)


def prove_syscalls(io: str, options: argparse.Namespace, progress: Progress) -> Result:
    """See tests.endurance.syscalls."""
    from tests.endurance import syscalls

    return syscalls.prove(io, requests=options.requests, progress=progress)


def prove_deaths(io: str, options: argparse.Namespace, progress: Progress) -> Result:
    """See tests.endurance.deaths."""
    from tests.endurance import deaths

    return deaths.prove(io, kills=options.kills, progress=progress)


def prove_soak(io: str, options: argparse.Namespace, progress: Progress) -> Result:
    """See tests.endurance.soak."""
    from tests.endurance import soak

    return soak.prove(io, seconds=options.minutes * 60, progress=progress)


def prove_broadcast(io: str, options: argparse.Namespace, progress: Progress) -> Result:
    """See tests.endurance.broadcast."""
    from tests.endurance import broadcast

    return broadcast.prove(
        io, clients=options.clients, messages=options.messages, kills=2, seed=options.seed, progress=progress)


def prove_slow(io: str, options: argparse.Namespace, progress: Progress) -> Result:
    """See tests.endurance.slow."""
    from tests.endurance import slow

    return slow.prove(io, connections=options.slow, progress=progress)


def prove_storm(io: str, options: argparse.Namespace, progress: Progress) -> Result:
    """See tests.endurance.storm."""
    from tests.endurance import storm

    return storm.prove(io, coroutines=options.coroutines, seed=options.seed, progress=progress)


def prove_tls(io: str, _options: argparse.Namespace, progress: Progress) -> Result:
    """See tests.endurance.tls."""
    from tests.endurance import tls

    return tls.prove(io, progress=progress)


PROOFS: dict[str, tuple[Callable[[str, argparse.Namespace, Progress], Result], tuple[str, ...]]] = {
    "requests": (prove_requests, ("parser", *ENGINES)),
    "syscalls": (prove_syscalls, ENGINES),
    "deaths": (prove_deaths, ENGINES),
    "broadcast": (prove_broadcast, ENGINES),
    "slow": (prove_slow, ENGINES),
    "storm": (prove_storm, ENGINES),
    "tls": (prove_tls, ENGINES),
    "soak": (prove_soak, ENGINES),
}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options, checked."""
    parser = argparse.ArgumentParser(prog="python -m tests.endurance", description=__doc__)
    parser.add_argument("name", choices=[*PROOFS, "all"], help="the proof")
    parser.add_argument("--io", help="only these: uring,epoll and for requests parser (default: all)")
    parser.add_argument("--json", type=Path, help="write the results there")
    parser.add_argument("--requests", type=int, help="requests of requests (100000) and of syscalls (20000)")
    parser.add_argument("--seed", type=int, default=1, help="of requests, broadcast and storm; default %(default)s")
    parser.add_argument("--clients", type=int, default=1000, help="of broadcast; default %(default)s")
    parser.add_argument("--messages", type=int, default=300, help="of broadcast, in each of 5 stretches; %(default)s")
    parser.add_argument("--slow", type=int, default=400, help="connections of slow; default %(default)s")
    parser.add_argument("--coroutines", type=int, default=10_000, help="of storm; default %(default)s")
    parser.add_argument("--kills", type=int, default=10, help="of deaths; default %(default)s")
    parser.add_argument("--minutes", type=float, default=20, help="of soak, on each engine; default %(default)g")
    options = parser.parse_args(arguments)
    wanted = set(options.io.split(",")) if options.io else None
    if wanted and not wanted <= {"parser", *ENGINES}:
        parser.error(f"--io {options.io}: allowed are parser, uring, epoll")
    options.runs = [
        (name, io) for name, (_, places) in PROOFS.items() for io in places
        if options.name in (name, "all") and (wanted is None or io in wanted)
    ]
    if not options.runs:
        parser.error(f"--io {options.io}: nothing of {options.name} runs there")
    if options.kills < 1 or options.minutes <= 0 or (options.requests is not None and options.requests < 1):
        parser.error("--requests, --kills and --minutes must be positive")
    if options.coroutines < 1:
        parser.error("--coroutines must be positive")
    if not 10 <= options.clients <= 4000 or options.messages < 1 or not 1 <= options.slow <= 1500:
        parser.error("--clients must be from 10 to 4000, --slow from 1 to 1500, --messages positive")
    return options


def run(name: str, io: str, options: argparse.Namespace, progress: Progress) -> Result:
    """One proof on one engine."""
    own = argparse.Namespace(**vars(options))
    own.requests = options.requests or {"requests": 100_000, "syscalls": 20_000}.get(name)
    began = time.monotonic()
    try:
        return PROOFS[name][0](io, own, progress)
    except Unavailable as reason:
        return Result(name, io, skipped=str(reason), seconds=time.monotonic() - began)


def stop(_number: int, _frame: object) -> NoReturn:
    """SIGTERM ends like Ctrl-C: through every finally, so that no server is left."""
    raise KeyboardInterrupt


def main(arguments: list[str] | None = None) -> int:
    """Run what was asked for."""
    options = parse(arguments)
    signal.signal(signal.SIGTERM, stop)
    line = Line()
    results = []
    interrupted = False
    for name, io in options.runs:
        try:
            results.append(run(name, io, options, line))
        except KeyboardInterrupt:
            interrupted = True
            break
        line.clear()
        print(results[-1].text(), flush=True)
    if options.json:
        facts = {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "machine": f"{len(os.sched_getaffinity(0))} CPUs, Linux {platform.release()}",
            "python": platform.python_version(),
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        found = {"facts": facts, "results": [result.as_dict() for result in results]}
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    if interrupted:
        return 130
    if any(result.failed for result in results):
        return 1
    return EXIT_SKIPPED if all(result.skipped for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
