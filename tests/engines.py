"""The engines that tests are parametrised over: those of this system, and kqueue where its stand-in was started with.

``KORE_IO`` leaves one of them (conftest.py). ``PYTHONPATH=$PWD/tests/kqueue`` gives programs the stand-in.
"""

from __future__ import annotations

import os
import select
import sys
from pathlib import Path

import pytest

ENGINES = ["uring", "epoll", *(["kqueue"] if hasattr(select, "kqueue") else [])]

STANDIN = "kqueue_standin" in sys.modules

_TESTS = Path(__file__).resolve().parent

OPENBSD = {
    "STANDIN_SYSTEM": "openbsd", "PYTHONPATH": os.pathsep.join((str(_TESTS.parent), str(_TESTS / "kqueue"))),
}
"""The environment of a program that takes this system for OpenBSD (kqueue/sitecustomize.py)."""


def skip_on_standin(engine: str, reason: str) -> None:
    """Skip the test on kqueue where that is the stand-in, which can't do what is tested."""
    if engine == "kqueue" and STANDIN:
        pytest.skip(f"the stand-in for kqueue: {reason}")
