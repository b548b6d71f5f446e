"""From what an application declared to the filter of a worker: which features it has, and who hears of deadly calls."""

from __future__ import annotations

import faulthandler
from collections.abc import Callable

from kore import reactor
from kore.application.loading import Hooks
from kore.application.plan import Plan
from kore.process.orders import WorkerPlace
from kore.sandbox import seccomp
from kore.sandbox.confinement import Confinement
from kore.sandbox.policy import Features
from kore.sandbox.seccomp import Seccomp

HOOK_LABEL = "koreapp.seccomp"


def features_of(confinement: Confinement, plan: Plan, engine: str) -> Features:
    """What the workers of `plan` do on `engine`, within what they may."""
    return Features(
        engine=engine,
        files=any(domain.filemaps for domain in plan.domains),
        write=bool(confinement.write),
        connect=confinement.connects,
        resolver=confinement.names,
        paths=confinement.paths,
    )


def write_stacks(place: WorkerPlace, number: int) -> None:
    """Have each thread write its stack for the tracer when it gets signal `number`. Called before the filter is on.

    A call that the signal interrupts is made again: faulthandler sets SA_RESTART where it calls no former handler.
    """
    if place.stacks is not None:
        faulthandler.register(number, file=place.stacks, all_threads=False, chain=False)


def put_on(hooks: Hooks, features: Features, send_listener: Callable[[int], bool], *, tracing: bool) -> None:
    """Ask the application and put the filter on this worker; seccomp.confine() says how. Raises SandboxError."""

    def hook(rules: Seccomp) -> None:
        for function, arguments in ((hooks.kore_seccomp_hook, ()), (hooks.seccomp, (rules,))):
            if function is None:
                continue
            try:
                function(*arguments)
            except Exception as error:  # noqa: BLE001 (the matrix of section 4: the rules so far hold, the start goes on)
                reactor.report_exception(HOOK_LABEL, error)

    seccomp.confine(hook, features, tracing, send_listener)
