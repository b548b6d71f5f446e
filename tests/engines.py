"""The engines that tests are parametrised over: those of this system, and kqueue where its stand-in was started with.

``KORE_IO`` leaves one of them (conftest.py). ``PYTHONPATH=$PWD/tests/kqueue`` gives programs the stand-in.
"""

from __future__ import annotations

import os
import select
from pathlib import Path

import pytest

ENGINES = ["uring", "epoll", *(["kqueue"] if hasattr(select, "kqueue") else [])]

_TESTS = Path(__file__).resolve().parent

def taken_for(system: str) -> dict[str, str]:
    """The environment of a program that takes its system for freebsd, netbsd or openbsd (kqueue/sitecustomize.py)."""
    return {"STANDIN_SYSTEM": system, "PYTHONPATH": os.pathsep.join((str(_TESTS.parent), str(_TESTS / "kqueue")))}


OPENBSD = taken_for("openbsd")


def skip_unconfined(engine: str) -> None:
    """Skip the test where the workers of `engine` can't be confined."""
    if engine == "kqueue":
        pytest.skip("kqueue: the sandbox is Linux's, and forbids the system calls that the stand-in makes")
