"""The rig's command: chooses cases and servers, runs the rounds, prints what came out.

Exit status 0 when everything asked for was measured, 1 when something could not be.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NoReturn

from tests.perf import load, results
from tests.perf.cases import CASES, IDLE_CONNECTIONS, PEERS, Case, Entry
from tests.perf.database import database
from tests.perf.load import LoadFailure, Measurement
from tests.perf.servers import KINDS, ROOT, Server, StartFailure, default_python, raise_files_limit, versions

SHORT_SECONDS = 110.0  # of the two minutes; what does not fit is named as skipped
OTHERS = (*PEERS, "uvloop", "selector", "websockets")
FULL_LOAD_SECONDS = 2  # of the run that finds the rate for the paced case


class Rig:
    """One run: its options, the servers that are up, and the results so far."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.began = time.monotonic()
        cores = sorted(os.sched_getaffinity(0))
        self.server_core, self.load_core = cores[0], cores[-1]
        self.results = results.Results()
        self.servers: dict[str, Server] = {}
        self.done = self.steps = 0

    def out_of_time(self) -> bool:
        """Whether a short run has used its two minutes."""
        return bool(self.options.short) and time.monotonic() - self.began > SHORT_SECONDS

    def progress(self, text: str) -> None:
        """One line that is overwritten, or nothing where nobody watches."""
        share = 100 * self.done // max(self.steps, 1)
        if sys.stderr.isatty():
            print(f"\r\x1b[K[{share:3d} %] {text}", end="", file=sys.stderr, flush=True)

    def entries(self, case: Case) -> list[Entry]:
        """What takes part in a case."""
        return [
            entry for entry in case.entries
            if ("kore" in entry.server or entry.server.partition("-")[0] in self.options.peers)
            and (not self.options.short or entry.server in case.short)
        ]

    def rounds(self, case: Case) -> int:
        """How many rounds of a case."""
        least = 1 if self.options.short else case.rounds_min
        return max(least, min(self.options.rounds, case.rounds_max))

    def seconds(self, case: Case) -> int:
        """How long one round of a case is."""
        return max(1 if self.options.short else case.seconds_min, int(self.options.seconds))

    def start(self, name: str) -> Server | None:
        """A server, or None and the reason among the missing."""
        if name in self.results.missing:
            return None
        try:
            server = self.servers[name] = Server(KINDS[name], self.options.python, self.server_core)
        except (StartFailure, OSError) as error:
            self.results.missing[name] = str(error)
            return None
        if name.startswith("kore"):
            self.note_engine(name, server)
        self.note_tls(name, server)
        return server

    def note_tls(self, name: str, server: Server) -> None:
        """Keep what a server negotiates with who asks for the best."""
        if told := server.negotiated():
            self.results.facts.setdefault("tls", {})[name] = told

    def note_engine(self, name: str, server: Server) -> None:
        """Keep the line of kore's log that tells the engine."""
        engines = self.results.facts.setdefault("engines", {})
        lines = server.output.read_text(errors="replace").splitlines()
        told = next((line for line in lines if "uring" in line or "epoll" in line), server.kind.env["KORE_IO"])
        engines.setdefault(name, told)

    def stop_all(self) -> None:
        """Stop every server that is up."""
        while self.servers:
            self.servers.popitem()[1].close()

    def run(self, cases: list[Case]) -> None:
        """All cases, each with servers of its own."""
        self.steps = sum(len(self.entries(case)) * self.rounds(case) for case in cases)
        ways = {"full": self.run_full, "paced": self.run_full, "idle": self.run_idle, "startup": self.run_startup,
                "upload": self.run_upload}
        for case in cases:
            if self.out_of_time():
                self.results.skipped.append(f"{case.name} (out of time)")
                continue
            with contextlib.ExitStack() as stack:
                stack.callback(self.stop_all)
                if case.needs_database and self.entries(case):
                    try:
                        os.environ.update(stack.enter_context(database(self.load_core)))
                    except StartFailure as failure:
                        self.results.missing[f"{case.name}: PostgreSQL"] = str(failure)
                        continue
                ways[case.how](case)
            self.progress("")
            print(results.case_table(self.results, case), end="\n\n", flush=True)

    def run_full(self, case: Case) -> None:
        """Start everybody, look at their answers, then load them in turn, round by round."""
        entries = []
        for entry in self.entries(case):
            self.progress(f"{case.name}: starting {entry.server}")
            server = self.servers.get(entry.server) or self.start(entry.server)
            if server is not None and self.well(case, entry, server):
                entries.append(entry)
        told = self.results.facts.get("tls", {})
        if len({told.get(entry.server) for entry in entries}) > 1:
            self.results.missing[f"{case.name}: the same work for all"] = "they negotiate different TLS, as told above"
        rates: dict[str, float] = {}
        for entry in list(entries):
            warm = 1 if case.how == "full" else FULL_LOAD_SECONDS
            try:
                if not self.options.short or case.how == "paced":
                    rates[entry.label] = self.full(entry, warm).rate
            except LoadFailure as failure:  # of the handshakes' generator, which looks at all that it is given
                self.results.missing[f"{case.name}: {entry.label}"] = str(failure)
                entries.remove(entry)
        for number in range(self.rounds(case)):
            if self.out_of_time():
                self.results.skipped.append(f"{case.name} from round {number + 1} on (out of time)")
                return
            # Forth and back: what the machine does meanwhile favours nobody for being first.
            for entry in entries if number % 2 == 0 else entries[::-1]:
                self.progress(f"{case.name}: round {number + 1} of {self.rounds(case)}: {entry.label}")
                if case.how == "paced":
                    one = load.paced(
                        self.servers[entry.server], self.load_core, path=entry.path, connections=entry.connections,
                        seconds=self.seconds(case), rate=max(rates[entry.label] / 2, 1.0))
                else:
                    one = self.full(entry, self.options.seconds)
                self.results.add(case.name, entry.label, number, one)
                self.done += 1

    def well(self, case: Case, entry: Entry, server: Server) -> bool:
        """Whether a server gives the answer that all give; else it is missing from the case."""
        sys.path.insert(0, str(Path(__file__).with_name("apps")))
        from bodies import BODIES

        if case.name == "messages":
            return True  # the generator looks at each connection's first echo itself
        expected = BODIES.get(entry.path, BODIES["/"])
        if server.answers(entry.path) == expected:
            return True
        self.results.missing[f"{case.name}: {entry.label}"] = f"a wrong answer to {entry.path}: {server.last_words()}"
        return False

    def full(self, entry: Entry, seconds: int) -> Measurement:
        """Full load on the server of an entry."""
        if entry.script in ("full", "resumed"):
            return load.handshakes(
                self.servers[entry.server], self.load_core, seconds=seconds, mode=entry.script)
        if entry.script == "messages":
            return load.messages(
                self.servers[entry.server], self.load_core, connections=entry.connections, seconds=seconds)
        return load.full(
            self.servers[entry.server], self.load_core, path=entry.path, connections=entry.connections,
            seconds=seconds, script=entry.script)

    def run_idle(self, case: Case) -> None:
        """Fresh servers: full load, then the idle connections, their memory, and full load beside them."""
        for number in range(self.rounds(case)):
            for entry in self.entries(case):
                if self.out_of_time():
                    self.results.skipped.append(f"{case.name}: {entry.label} (out of time)")
                    continue
                self.progress(f"{case.name}: round {number + 1} of {self.rounds(case)}: {entry.label}")
                server = self.start(entry.server)
                if server is None:
                    continue
                try:
                    self.results.add(case.name, entry.label, number, self.beside_idle(entry, server))
                except LoadFailure as failure:
                    self.results.missing[f"{case.name}: {entry.label}"] = str(failure)
                finally:
                    self.servers.pop(entry.server).close()
                self.done += 1

    def beside_idle(self, entry: Entry, server: Server) -> Measurement:
        """One round of the idle case on one server."""
        before = self.full(entry, self.options.seconds)
        memory = server.memory()
        idle = load.IdleConnections(server, self.load_core, IDLE_CONNECTIONS)
        try:
            count = idle.wait()
            if not count:
                raise LoadFailure("not one idle connection was accepted")
            each = (server.memory() - memory) / count
            after = self.full(entry, self.options.seconds)
        finally:
            idle.close()
        after.extra.update(
            idle_open=count, idle_bytes=each, idle_rate=after.rate / before.rate if before.rate else 0.0)
        return after

    def run_upload(self, case: Case) -> None:
        """Fresh servers: one large body each."""
        for number in range(self.rounds(case)):
            for entry in self.entries(case):
                self.progress(f"{case.name}: round {number + 1} of {self.rounds(case)}: {entry.label}")
                server = self.start(entry.server)
                if server is None:
                    continue
                try:
                    self.results.add(case.name, entry.label, number, load.upload(server, self.load_core))
                except LoadFailure as failure:
                    self.results.missing[f"{case.name}: {entry.label}"] = str(failure)
                finally:
                    self.servers.pop(entry.server).close()
                self.done += 1

    def run_startup(self, case: Case) -> None:
        """From the command to the first response, again and again."""
        for number in range(self.rounds(case)):
            for entry in self.entries(case):
                self.progress(f"{case.name}: round {number + 1} of {self.rounds(case)}: {entry.label}")
                server = self.start(entry.server)
                if server is None:
                    continue
                cpu = server.cpu()
                self.results.add(case.name, entry.label, number, Measurement(
                    1, server.start_seconds, 0, 0, 0, 0, cpu.user * 1e6, cpu.system * 1e6,
                    {"start_seconds": server.start_seconds}))
                self.servers.pop(entry.server).close()
                self.done += 1


def facts(options: argparse.Namespace) -> dict[str, object]:
    """When, where and with what."""
    model = next((line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                  if line.startswith("model name")), platform.machine())
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": f"{len(os.sched_getaffinity(0))} CPUs of {model}",
        "kernel": f"Linux {platform.release()}",
        "options": f"{options.rounds} rounds of {options.seconds} s" + (", short" if options.short else ""),
        "cases": options.cases,
        "versions": versions(options.python),
    }


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options, checked."""
    names = [case.name for case in CASES]
    parser = argparse.ArgumentParser(prog="python -m tests.perf", description=__doc__)
    parser.add_argument("--short", action="store_true", help="fewer servers, rounds and seconds: at most two minutes")
    parser.add_argument("--cases", default=",".join(names), help=f"of {','.join(names)}")
    parser.add_argument("--peers", default=",".join(OTHERS), help=f"of {','.join(OTHERS)}")
    parser.add_argument("--rounds", type=int, help="default 9, short 2")
    parser.add_argument("--seconds", type=int, help="of each measurement; default 1")
    parser.add_argument("--json", type=Path, help="write everything there")
    parser.add_argument("--plot", type=Path, help="draw a PNG there (needs --json or --update)")
    parser.add_argument("--update", action="store_true", help="write docs/bench.json, a picture, README.md's table")
    parser.add_argument("--python", default=default_python(), help="interpreter for the servers; default %(default)s")
    options = parser.parse_args(arguments)
    options.rounds = options.rounds or (2 if options.short else 9)
    options.seconds = options.seconds or 1
    options.python = os.path.abspath(options.python)  # servers run in folders of their own
    options.cases = options.cases.split(",")
    options.peers = [name for name in options.peers.split(",") if name]
    for given, known in ((options.cases, names), (options.peers, OTHERS)):
        for name in given:
            if name not in known:
                parser.error(f"{name!r} is none of {', '.join(known)}")
    if options.update and (options.short or {*options.cases} != {*names} or {*options.peers} != {*OTHERS}):
        parser.error("--update writes the whole table, and would forget what is not measured: with all cases and peers")
    if options.update:
        options.json, options.plot = options.json or ROOT / "docs/bench.json", options.plot or ROOT / "docs/bench.png"
    if options.plot and not options.json:
        parser.error("--plot draws what --json writes: give both")
    return options


def write(rig: Rig) -> None:
    """JSON, picture and README, as asked."""
    options = rig.options
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(rig.results.as_dict(), indent=1, ensure_ascii=False) + "\n")
        print(f"written: {options.json}")
    if options.plot and set(rig.results.rounds) - {"startup"}:  # start-up times are one column: the table shows them
        options.plot.parent.mkdir(parents=True, exist_ok=True)
        drawn = subprocess.run(
            [options.python, str(Path(__file__).with_name("plot.py")), str(options.json), str(options.plot)],
            capture_output=True, text=True)
        print(f"written: {options.plot}" if drawn.returncode == 0 else f"no picture: {drawn.stderr.strip()[-200:]}")
    if options.update:
        results.update_readme(ROOT / "README.md", results.readme_table(rig.results))
        print(f"written: {ROOT / 'README.md'}")


def stop(_number: int, _frame: object) -> NoReturn:
    """SIGTERM ends like Ctrl-C: through every finally."""
    raise KeyboardInterrupt


def main() -> int:
    """Run what was asked for."""
    options = parse()
    if shutil.which("wrk") is None:
        print("the rig needs wrk (Debian: apt-get install wrk)", file=sys.stderr)
        return 1
    signal.signal(signal.SIGTERM, stop)
    rig = Rig(options)
    rig.results.facts = facts(options)
    if rig.server_core == rig.load_core:
        print("only one CPU: server and load share it, the figures say little", file=sys.stderr)
    if (files := raise_files_limit()) < IDLE_CONNECTIONS + 1100:
        print(f"only {files} open files are allowed: the idle case will have fewer connections", file=sys.stderr)
    interrupted = False
    try:
        rig.run([case for case in CASES if case.name in options.cases])
    except KeyboardInterrupt:
        interrupted = True
        rig.results.skipped.append("the rest (interrupted)")
    finally:
        rig.stop_all()
    rig.progress("")
    print(results.target_table(rig.results), end="\n\n")
    print(results.facts_text(rig.results))
    write(rig)
    if interrupted:
        return 130
    return 1 if rig.results.missing else 0


if __name__ == "__main__":
    sys.exit(main())
