"""What a proof says: a line while it runs, a verdict with its figures, and all of it as JSON.

A proof that cannot run here is skipped with the reason, which is neither a success nor a failure.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

FAILURES_MAX = 20
"""Failures kept of one run: the first tell what is wrong, the thousandth only that it goes on."""


class Unavailable(Exception):
    """What the proof needs is not to be had here; the text names it."""


@dataclass
class Result:
    """One proof on one engine: shown when it ended with neither failures nor a reason to skip it."""

    proof: str
    io: str
    figures: dict[str, Any] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    skipped: str = ""
    seconds: float = 0.0
    failed: int = 0

    def fail(self, text: str) -> None:
        """Something that must hold does not."""
        self.failed += 1
        if len(self.failures) < FAILURES_MAX:
            self.failures.append(text)

    def check(self, holds: object, text: str) -> None:
        """`text` says what went wrong when `holds` is false."""
        if not holds:
            self.fail(text)

    @property
    def verdict(self) -> str:
        """One word."""
        return "skipped" if self.skipped else "FAILED" if self.failed else "shown"

    def text(self) -> str:
        """For people: the verdict, the figures, and what went wrong."""
        figures = ", ".join(f"{name} {value}" for name, value in self.figures.items() if not isinstance(value, list))
        lines = [f"{self.proof} on {self.io}: {self.verdict} in {self.seconds:.1f} s: {self.skipped or figures}"]
        lines += [f"  {line}" for line in self.failures]
        if self.failed > len(self.failures):
            lines.append(f"  and {self.failed - len(self.failures)} more")
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """For programs."""
        return {**asdict(self), "verdict": self.verdict}


Progress = Callable[[str], None]


class Line:
    """A progress line on standard error: overwritten on a terminal, a line every few seconds elsewhere."""

    SECONDS_BETWEEN = 10.0

    def __init__(self) -> None:
        self.terminal = sys.stderr.isatty()
        self.said = 0.0

    def __call__(self, text: str) -> None:
        now = time.monotonic()
        if self.terminal and now - self.said > 0.1:
            print(f"\r\x1b[K{text[:150]}", end="", file=sys.stderr, flush=True)
        elif not self.terminal and now - self.said > self.SECONDS_BETWEEN:
            print(text, file=sys.stderr, flush=True)
        else:
            return
        self.said = now

    def clear(self) -> None:
        """Leave an empty line."""
        if self.terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def silent(_text: str) -> None:
    """For who does not watch."""
