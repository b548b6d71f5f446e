"""What was measured, as ratios: per round first, then the median; as text, as JSON, as the table of the README."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.perf.cases import CASES, LATE_US_MAX, LESS_IS_BETTER, TARGETS, Case, Target
from tests.perf.load import Measurement

SANDBOX_NOTE = "kore runs without its sandbox, in deployment dev, but for the rows that name it"
BEGIN, END = "<!-- bench: begin -->", "<!-- bench: end -->"


@dataclass
class Results:
    """Measurements by case, label and round, and what could not be measured."""

    rounds: dict[str, dict[str, dict[int, Measurement]]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def add(self, case: str, label: str, number: int, measurement: Measurement) -> None:
        """One measurement of one round."""
        self.rounds.setdefault(case, {}).setdefault(label, {})[number] = measurement

    def median(self, case: str, label: str, figure: Callable[[Measurement], float]) -> float | None:
        """The median over the rounds of one figure, None when it was not measured."""
        values = [figure(one) for one in self.rounds.get(case, {}).get(label, {}).values()]
        return statistics.median(values) if values else None

    def compare(
        self, case: str, ours: str, theirs: str, pair: Callable[[Measurement, Measurement], float | None],
    ) -> float | None:
        """The median over the rounds in which both were measured of `pair(ours, theirs)`."""
        labels = self.rounds.get(case, {})
        a, b = labels.get(ours, {}), labels.get(theirs, {})
        values = [value for number in a if number in b if (value := pair(a[number], b[number])) is not None]
        return statistics.median(values) if values else None

    def ratio(self, case: str, ours: str, theirs: str) -> tuple[float | None, float | None]:
        """Requests per second, and requests per second of CPU time: ours by theirs, more is better in both."""
        return (
            self.compare(case, ours, theirs, lambda a, b: a.rate / b.rate if b.rate else None),
            self.compare(case, ours, theirs, lambda a, b: b.cpu / a.cpu if a.cpu else None),
        )

    def against(self, target: Target) -> tuple[float | None, float | None]:
        """The figures of a target: by throughput and by CPU time; only the first where CPU time says nothing."""
        if target.figure == "ratio":
            return self.ratio(target.case, target.ours, target.theirs)
        if target.figure == "p99_above":
            return self.compare(target.case, target.ours, target.theirs, p99_above), None
        return self.median(target.case, target.ours, lambda one: one.extra[target.figure]), None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            **self.facts,
            "missing": self.missing,
            "skipped": self.skipped,
            "targets": [
                {"name": target.name, "case": target.case, "least": target.least, "aim": target.aim,
                 "figure": target.figure, "throughput": throughput, "cpu": cpu,
                 "verdict": verdict(target, throughput), "verdict_cpu": verdict(target, cpu)}
                for target in TARGETS for throughput, cpu in [self.against(target)]
            ],
            "results": {
                case: {label: {str(number): one.as_dict() for number, one in rounds.items()}
                       for label, rounds in labels.items()}
                for case, labels in self.rounds.items()
            },
        }


def p99_above(ours: Measurement, theirs: Measurement) -> float | None:
    """How many microseconds our p99 lies above theirs; None when the generator was too late to tell."""
    if max(one.extra.get("late", 0.0) for one in (ours, theirs)) > LATE_US_MAX:
        return None
    return ours.p99 - theirs.p99


def verdict(target: Target, value: float | None) -> str:
    """What a figure is worth: "aim met", "met", "missed", or nothing where nothing is asked or known."""
    if value is None or (target.least is None and target.aim is None):
        return ""
    sign = -1 if target.figure in LESS_IS_BETTER else 1

    def reached(bound: float | None) -> bool:
        return bound is not None and sign * value >= sign * bound

    if reached(target.aim):
        return "aim met"
    if target.least is None:
        return "below the aim"
    return "met" if reached(target.least) else "MISSED"


def number(value: float | None, digits: int = 2) -> str:
    """A figure for a table, a dash when there is none."""
    return "-" if value is None else f"{value:,.{digits}f}"


def latency(value: float | None) -> str:
    """Microseconds; wrk gives no percentiles for pipelined requests (0), which is not a latency."""
    return number(value, 0) if value else "-"


def case_table(results: Results, case: Case) -> str:
    """All entries of one case: medians over the rounds, and kore's ratio to each."""
    if case.how == "startup":
        return _simple_table(results, case, [("seconds", "start_seconds", 3)])
    heads = f"{'req/s':>10}{'p50 µs':>8}{'p90':>8}{'p99':>8}{'CPU µs/req':>12}{'= user':>8}{'+ kernel':>9}{'errors':>8}"
    lines = [f"{case.name}: {case.title}", f"  {'':22}{heads}   kore-uring by it: req/s, per CPU second"]
    for label in _labels(results, case):
        def median(figure: str, label: str = label) -> float | None:
            return results.median(case.name, label, lambda one: getattr(one, figure))

        throughput, cpu = results.ratio(case.name, "kore-uring", label) if label != "kore-uring" else (None, None)
        lines.append(
            f"  {label:22}{number(median('rate'), 0):>10}{latency(median('p50')):>8}{latency(median('p90')):>8}"
            f"{latency(median('p99')):>8}{number(median('cpu')):>12}{number(median('cpu_user')):>8}"
            f"{number(median('cpu_system')):>9}{number(median('errors'), 0):>8}"
            f"   {number(throughput):>6}{number(cpu):>8}")
    if case.how == "idle":
        lines.append(_simple_table(results, case, [
            ("connections", "idle_open", 0), ("bytes each", "idle_bytes", 0), ("req/s by before", "idle_rate", 2)]))
    if case.how == "upload":
        lines.append(_simple_table(results, case, [("bytes of memory more", "upload_growth", 0)]))
    if case.entries[0].script in ("messages", "full", "resumed"):
        lines.append(_simple_table(results, case, [("the generator's share of its core", "busy", 2)]))
    if case.how == "paced":
        lines.append(_simple_table(results, case, [
            ("rate asked", "rate_asked", 0), ("generator's own lateness, p99 µs", "late", 0)]))
    return "\n".join(lines)


def _labels(results: Results, case: Case) -> list[str]:
    return [entry.label for entry in case.entries if entry.label in results.rounds.get(case.name, {})]


def _simple_table(results: Results, case: Case, columns: list[tuple[str, str, int]]) -> str:
    width = [max(len(title), 9) + 3 for title, _, _ in columns]
    heads = "".join(f"{column[0]:>{w}}" for column, w in zip(columns, width, strict=True))
    lines = ["" if case.how != "startup" else f"{case.name}: {case.title}", f"  {'':22}{heads}"]
    for label in _labels(results, case):
        cells = ""
        for (_, name, digits), w in zip(columns, width, strict=True):
            value = results.median(case.name, label, lambda one, name=name: one.extra.get(name, float("nan")))
            cells += f"{number(value, digits):>{w}}"
        lines.append(f"  {label:22}{cells}")
    return "\n".join(lines)


def bound(target: Target, value: float | None) -> str:
    """A bound as it is read: 0.85, or at most 4,096."""
    if value is None:
        return "-"
    return ("<= " if target.figure in LESS_IS_BETTER else "") + number(value, 0 if value >= 100 or value == 0 else 2)


def target_table(results: Results) -> str:
    """Every target beside what was measured."""
    lines = [f"{'targets':52}{'at least':>10}{'aim':>10}{'measured':>11}{'':16}{'by CPU time':>12}"]
    asked = results.facts.get("cases", [case.name for case in CASES])
    for target in TARGETS:
        if target.case not in asked:
            continue
        throughput, cpu = results.against(target)
        digits = 0 if target.figure in ("idle_bytes", "p99_above", "upload_growth") else 2
        lines.append(
            f"{target.name:52}{bound(target, target.least):>10}{bound(target, target.aim):>10}"
            f"{number(throughput, digits):>11}  {verdict(target, throughput):14}{number(cpu):>12}"
            f"  {verdict(target, cpu)}".rstrip())
    if "paced" in asked and "paced" in results.rounds:
        lines.append(f"p99 at half load: rounds with the generator over {LATE_US_MAX} µs late do not count")
    lines.append(SANDBOX_NOTE)
    lines.append("ratios: more is better; by CPU time: requests per second of CPU (user and system), ours by theirs")
    return "\n".join(lines)


def facts_text(results: Results) -> str:
    """Where and with what it was measured."""
    facts = results.facts
    versions = ", ".join(f"{name} {version}" for name, version in sorted(facts["versions"].items()))
    lines = [
        f"{facts['date']}, {facts['machine']}, {facts['kernel']}, {facts['options']}",
        f"versions: {versions}",
    ]
    lines += [f"engine of {name}: {line}" for name, line in facts.get("engines", {}).items()]
    lines += [f"TLS of {name}: {line}" for name, line in facts.get("tls", {}).items()]
    lines += [f"missing: {name}: {reason}" for name, reason in results.missing.items()]
    lines += [f"skipped: {what}" for what in results.skipped]
    return "\n".join(lines)


def readme_table(results: Results) -> str:
    """The targets as a Markdown table, with date and machine."""
    facts = results.facts
    rows = ["| work | at least | aim | requests per second | per CPU second |", "| --- | --- | --- | --- | --- |"]
    for target in TARGETS:
        throughput, cpu = results.against(target)
        if throughput is None:
            continue
        digits = 0 if target.figure in ("idle_bytes", "p99_above", "upload_growth") else 2
        rows.append(f"| {target.name} | {bound(target, target.least)} | {bound(target, target.aim)} "
                    f"| {number(throughput, digits)} | {number(cpu)} |")
    peers = ("nginx", "fastwsgi", "granian", "uvicorn", "uvloop", "python")
    versions = ", ".join(f"{name} {facts['versions'][name]}" for name in peers if name in facts["versions"])
    where = f"{facts['date'][:10]}, {facts['machine']}, {facts['kernel']}; {versions}."
    note = f"{SANDBOX_NOTE[0].upper()}{SANDBOX_NOTE[1:]}: there it is what serves in production."
    more = "All figures and latencies: [docs/bench.json](docs/bench.json), [docs/bench.png](docs/bench.png)."
    return "\n".join([*rows, "", where, note, more])


def update_readme(path: Path, table: str) -> None:
    """Put the table between the two marks of the README; both must be there."""
    before, begin, rest = path.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{path} has no place for the table: {BEGIN} ... {END}")
    path.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}")
