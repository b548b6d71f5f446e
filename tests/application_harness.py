"""What the tests of declarations share: short ways to declare servers and domains, and to ask a Plan for a route."""

from __future__ import annotations

from kore.application.declared import application
from kore.application.domains import PyDomain, domain
from kore.application.plan import Plan
from kore.application.servers import server
from kore.http.head import HeadParser


def serve(*names: str) -> None:
    for name in names or ("default",):
        server(name, ip="127.0.0.1", port=0, tls=False)


def declare_domain(name="*", **keywords) -> PyDomain:
    if not application.listeners:
        serve()
    return domain(name, **keywords)


def ask(plan: Plan, method: str, target: str, *, host="a.example", on="default"):
    head = HeadParser().parse(f"{method} {target} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
    return plan.routers[on].resolve(head)


def handler(req, *captures):
    pass


def other(req, *captures):
    pass


GOOD_AUTH = {"type": "cookie", "value": "session", "verify": handler}
