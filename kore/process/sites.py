"""Call sites that tracing tells of: what travels from the tracer to the parent, each told once, and the hook they make.

The parent keeps them, so that a tracer that dies takes nothing along, and so that a line of the application is told
of once and not once by each worker.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Final

from kore.process.log import escape

SITES_MAX: Final = 1000
"""Call sites kept and told of; an application that has more is known by then."""

RULES_MAX: Final = 500
"""Different lines of the hook kept; a filter takes no more than 4096 instructions, about six of them a line."""

PLACES_SHOWN_MAX: Final = 4
"""Places in the comment of one line of the hook."""

UNKNOWN: Final = "<unknown>"

FULL: Final = "there are more call sites than are kept, which is {0} of {1} lines of the hook; the rest is not told of"


@dataclass(frozen=True, slots=True)
class Site:
    """A place in the application that makes a call which the sandbox forbids."""

    worker: int
    call: str
    """The call with its arguments, as it was the first time."""
    line: str | None
    """The statement of the hook that allows it."""
    deadly: bool
    """Without tracing it would end the worker."""
    place: str = UNKNOWN
    """``app.py:21 make``."""
    own: bool = False
    """Whether the place is one of the application's code."""
    kores: bool = False
    """Whether it is one of kore's, and none of the application's or of another library."""
    directory: str | None = None
    """Where it changes a file."""
    child: bool = False
    """Another process makes it, which the worker started."""

    @property
    def key(self) -> tuple[str, str]:
        """What makes it another site than another one."""
        return self.line or self.call.partition("(")[0], self.place

    def body(self) -> bytes:
        """It as the body of a message."""
        return json.dumps(asdict(self)).encode()

    def __str__(self) -> str:
        what = f"{self.call} would end the worker" if self.deadly else self.call
        foreign = "" if self.own or self.place == UNKNOWN else ", which is not the application's"
        if self.kores:
            foreign = ", which is kore's"
        cure = f"to allow it: {self.line}" if self.line else "no rule can allow it: it has no name"
        who = f"a child of worker {self.worker}" if self.child else f"worker {self.worker}"
        return f"{who}: {what}, at {self.place}{foreign}; {cure}"


def site_of_body(body: bytes) -> Site:
    """The site in a message of the tracer. Raises ValueError, TypeError."""
    return Site(**json.loads(body))


class Sites:
    """All that was told of."""

    def __init__(self) -> None:
        self._keys: set[tuple[str, str]] = set()
        self._rules: dict[str, list[Site]] = {}
        self._nameless: list[Site] = []
        self.full = False
        """Whether one had to be left out."""

    def add(self, site: Site) -> bool:
        """Keep it; False when it is known, or there is no room."""
        if site.key in self._keys:
            return False
        new_rule = site.line is not None and site.line not in self._rules
        # A new line of the hook is worth more than one more place of a known one.
        room = len(self._rules) < RULES_MAX if new_rule else len(self._keys) < SITES_MAX
        if not room:
            self.full = True
            return False
        self._keys.add(site.key)
        if site.line is None:
            self._nameless.append(site)
        else:
            self._rules.setdefault(site.line, []).append(site)
        return True

    def hook(self) -> str:
        """The hook that the application needs, as a function to paste, or a comment that says that it needs none."""
        if not self._rules and not self._nameless:
            return "# The application made no call that the sandbox forbids: it needs no seccomp hook.\n"
        needed = {rule: found for rule, found in self._rules.items() if not all(site.kores for site in found)}
        lines = [f"# {note}" for note in self._notes()]
        if needed:
            lines.append("def seccomp(self, s):")
            width = max(map(len, needed))
            lines += [f"    {rule:<{width}}  # {_comment(needed[rule])}" for rule in sorted(needed)]
        return "\n".join(lines) + "\n"

    def _notes(self) -> list[str]:
        notes = [f"No rule can allow {escape(site.call)}, at {escape(site.place)}." for site in self._nameless]
        for rule, sites in sorted(self._rules.items()):
            if all(site.kores for site in sites):
                notes.append(f"Not needed, unless kore was given a function to call there: {rule}, {_comment(sites)}")
        known = {site.directory for sites in self._rules.values() for site in sites if site.directory is not None}
        if known:
            where = _listed(sorted(map(json.dumps, known)))
            notes.append(f"It changes files in {where}: kore.config.sandbox_write must name what it may change.")
        if self.full:
            notes.append("It is not complete: " + FULL.format(SITES_MAX, RULES_MAX) + ".")
        return notes


def _comment(sites: list[Site]) -> str:
    shown = _listed([site.place for site in sorted(sites, key=lambda site: (not site.own, site.place))])
    first = sites[0]
    if first.line is not None and first.line.startswith("s.allow_arg"):
        shown = f"{first.call}: {shown}"
    return escape(shown)


def _listed(texts: list[str]) -> str:
    shown = ", ".join(texts[:PLACES_SHOWN_MAX])
    left = len(texts) - PLACES_SHOWN_MAX
    return f"{shown} and {left} more" if left > 0 else shown
