"""From what an application declared to the filter of a worker: which features it has, and who hears of deadly calls."""

from __future__ import annotations

import faulthandler
import os
import sys

from kore import reactor
from kore.application.plan import Plan
from kore.process.channel import Kind
from kore.process.parent import WorkerPlace
from kore.sandbox import seccomp
from kore.sandbox.policy import Features
from kore.sandbox.seccomp import Seccomp

HOOK_LABEL = "koreapp.seccomp"

LISTENER_SECONDS_MAX = 5.0
"""For the parent to make room for the listener: it does nothing that takes longer."""

QUERIES = "kore.clients.postgresql.queries"
TRANSFERS = "kore.clients.transfers"


def features_of(plan: Plan, engine: str) -> Features:
    """What the workers of `plan` do on `engine`. Databases and transfers are known by what the application used."""
    queries = sys.modules.get(QUERIES)
    connect = bool(queries is not None and queries.databases) or TRANSFERS in sys.modules
    return Features(
        engine=engine,
        files=any(domain.filemaps for domain in plan.domains),
        write=bool(plan.settings.http_body_disk_offload),
        connect=connect,
        resolver=connect,
    )


def put_on(plan: Plan, features: Features, place: WorkerPlace, stack_signal: int | None) -> None:
    """Ask the application and put the filter on this worker. Raises SandboxError.

    With a `stack_signal` the tracer sends it to a thread of which it wants to know the stack.
    """
    channel = place.channel
    if stack_signal is not None and place.stacks is not None:
        # SA_RESTART is what faulthandler sets when it calls no former handler.
        faulthandler.register(stack_signal, file=place.stacks, all_threads=False, chain=False)

    def send(fd: int) -> bool:
        if channel.send_fd(Kind.LISTENER, b"", fd):
            return True
        channel.wait_for_room(LISTENER_SECONDS_MAX)  # the hook may have logged more than it takes
        return channel.send_fd(Kind.LISTENER, b"", fd)

    def hook(rules: Seccomp) -> None:
        for function, arguments in ((plan.hooks.kore_seccomp_hook, ()), (plan.hooks.seccomp, (rules,))):
            if function is None:
                continue
            try:
                function(*arguments)
            except Exception as error:  # noqa: BLE001 (the matrix of section 4: the rules so far hold, the start goes on)
                reactor.report_exception(HOOK_LABEL, error)

    seccomp.confine(hook, features, plan.settings.seccomp_tracing, send)


def wanted(plan: Plan) -> bool:
    """Whether the workers of `plan` get a filter: tracing needs one in every deployment."""
    return os.environ.get("KORE_SANDBOX") == "yes" or plan.settings.seccomp_tracing
