"""What ``kore check`` prints: everything that would be served, and every option with where its value comes from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from kore.application import config as config_module
from kore.application.declared import application
from kore.application.plan import Plan
from kore.application.privileges import Deployment
from kore.application.settings import OPTIONS

Value = tuple[str, str]
"""A value as it is shown, and where it comes from."""


def effective(
    plan: Plan, deployment: Deployment, decided: Mapping[str, Value], notices: Sequence[str],
    certificates: Mapping[int, Sequence[str]],
) -> str:
    """The text. `decided` are values that are no options, or that something else than the application decided;
    `certificates` are lines about those of each domain, by its index.
    """
    served = _served(plan, deployment, certificates)
    return "\n".join([*served, *(f"notice: {one}" for one in notices), "", *_options(plan, decided)])


def _served(plan: Plan, deployment: Deployment, certificates: Mapping[int, Sequence[str]]) -> Iterator[str]:
    where = "in the foreground" if deployment.foreground else "in the background"
    yield f"deployment: {deployment.name or 'not set, started as root'}, {where}"
    for listener in plan.listeners:
        yield f"server {listener.name}: {'https' if listener.tls else 'http'} on {listener.url}"
        # A router has the domains of its server in the order of their declaration, as the plan has all.
        indexes = [index for index, planned in enumerate(plan.domains) if planned.server == listener.name]
        for index, domain in zip(indexes, plan.routers[listener.name].domains, strict=True):
            yield f"  domain {domain.pattern}"
            yield from (f"    {line}" for line in certificates.get(index, ()))
            for route in (*domain.routes, *domain.file_routes.values(), *domain.mounts):
                yield f"    {route.name}"
    if plan.tasks:
        yield f"tasks: {plan.tasks} in each worker"


def _options(plan: Plan, decided: Mapping[str, Value]) -> Iterator[str]:
    rows = []
    for name, option in OPTIONS.items():
        value = getattr(plan.settings, name)
        origin = config_module.origin(application.config, name)
        text = "not set" if value is None or value == () else _shown(option.kind.show, value, option.repeatable)
        rows.append((name, *decided.get(name, (text, origin or "default"))))
    rows += [(name, *value) for name, value in decided.items() if name not in OPTIONS]
    names = max(len(name) for name, _, _ in rows)
    values = min(max(len(text) for _, text, _ in rows), 40)
    for name, text, origin in rows:
        yield f"{name:<{names}} = {text:<{values}}  # {origin}"


def _shown(show: object, value: object, repeatable: bool) -> str:
    assert callable(show)
    if repeatable and isinstance(value, tuple):
        return ", ".join(str(show(one)) for one in value)
    return str(show(value))
