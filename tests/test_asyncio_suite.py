"""CPython's own tests of asyncio pass on our loop, on each engine, but for a list of exceptions with their reasons.

The suite is that of the Python which runs these tests; KORE_SUITE_PYTHON names another interpreter to be tried.
"""

from __future__ import annotations

import asyncio
import fnmatch
import importlib.util
import inspect
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
from asyncio_exceptions import FAILS, LEFT_OUT, MODULES, MODULES_LEFT_OUT, SKIPS
from reactor_harness import ENGINES, open_loop
from support import ROOT, skip_unless

from kore import reactor

PYTHON = os.environ.get("KORE_SUITE_PYTHON", sys.executable)
SECONDS_MAX = 180.0
"""For one module; the runner gives up before, with a stack."""

Report = dict[str, dict[str, object]]


def suite_folder() -> Path | None:
    """Where the suite of PYTHON is, None where it is not installed."""
    if sys.executable == PYTHON:
        spec = importlib.util.find_spec("test")
        origin = spec.origin if spec is not None else None
    else:
        origin = subprocess.check_output([PYTHON, "-c", "import test; print(test.__file__)"], text=True).strip()
    folder = Path(origin).parent / "test_asyncio" if origin else None
    return folder if folder is not None and folder.is_dir() else None


FOLDER = suite_folder()
PRESENT = [name for name in MODULES if FOLDER is None or (FOLDER / f"{name}.py").exists()]
needs_suite = pytest.mark.skipif(FOLDER is None, reason="test.test_asyncio (Debian: libpython3-testsuite) is missing")


def run_module(io: str, module: str, *only: str) -> tuple[Report, str]:
    """What became of each test of `module`, and what the run said on standard error."""
    paths = (str(ROOT), os.environ.get("PYTHONPATH", ""))
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    env.pop("PYTHONASYNCIODEBUG", None)
    command = [PYTHON, str(ROOT / "tests/asyncio_suite.py"), io, module, *only]
    done = subprocess.run(
        command, capture_output=True, text=True, errors="replace", env=env, cwd="/tmp", timeout=SECONDS_MAX
    )
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"test": ')]
    return {line["test"]: line for line in lines}, f"exit status {done.returncode}\n{done.stderr[-4000:]}"


@pytest.fixture(scope="module")
def runs():
    """What came of a module on an engine. The first question runs all modules on it, two at a time."""
    done: dict[str, dict[str, tuple[Report, str]]] = {}

    def result(io: str, module: str) -> tuple[Report, str]:
        if io not in done:
            with ThreadPoolExecutor(2) as pool:
                done[io] = dict(zip(PRESENT, pool.map(partial(run_module, io), PRESENT), strict=True))
        return done[io][module]

    return result


@needs_suite
@pytest.mark.parametrize("module", PRESENT)
@pytest.mark.parametrize("io", ENGINES)
def test_suite(runs, io, module):
    """All pass but the exceptions, and these fail. One that also fails on the stock loop is this machine's fault."""
    skip_unless(io)
    report, said = runs(io, module)
    assert said.startswith("exit status 0\n"), said
    assert report, said
    failed = {name for name, line in report.items() if line["end"] == "failed"}
    unexpected = sorted(failed - FAILS.keys())
    if unexpected:
        stock, _ = run_module("selector", module, *unexpected)
        unexpected = [name for name in unexpected if stock.get(name, {}).get("end") != "failed"]
    assert not unexpected, "\n".join(f"{name}\n{report[name]['said']}" for name in unexpected)
    # What a decorator skips has not made a loop before; of the rest, what the stock loop skips too is not about ours.
    skipped = {name for name, line in report.items() if line["end"] == "skipped" and line["ours"]} - SKIPS.keys()
    stock = run_module("selector", module, *skipped)[0] if skipped else {}
    assert not [name for name in skipped if stock.get(name, {}).get("end") != "skipped"]
    passing = sorted(name for name in FAILS if report.get(name, {}).get("end") == "ok")
    assert not passing, f"these are exceptions no more: {passing}"


@needs_suite
@pytest.mark.parametrize("io", ENGINES)
def test_our_loop_is_what_the_suite_ran_on(runs, io):
    """Most of the suite makes one of our loops: the substitution did not miss."""
    skip_unless(io)
    ours = [line for name in ("test_events", "test_streams", "test_ssl", "test_subprocess", "test_sock_lowlevel")
            for line in runs(io, name)[0].values() if line["ours"] and line["end"] == "ok"]
    assert len(ours) > 180
    for name in PRESENT:
        report = runs(io, name)[0].values()
        assert any(line["ours"] for line in report) or all(line["end"] == "skipped" for line in report), name
    for name, part in (("test_futures", 0.9), ("test_runners", 0.9), ("test_tasks", 0.9)):
        report = runs(io, name)[0].values()
        assert sum(bool(line["ours"]) for line in report) > part * len(report), name


@needs_suite
def test_every_module_of_the_suite_is_run_or_left_out_with_a_reason():
    known = {path.stem for path in FOLDER.glob("test_*.py")}
    assert known - set(MODULES) - MODULES_LEFT_OUT.keys() == set()


@needs_suite
def test_a_failing_test_is_seen(tmp_path):
    """The runner reports what fails, with or without our loop: an exception, tried on its own."""
    name = "test_events.EPollEventLoopTests.test_timeout_rounding"
    if "timeout_rounding" not in (FOLDER / "test_events.py").read_text():
        pytest.skip("this Python has no such test")
    report, said = run_module("epoll", "test_events", name)
    assert report[name]["end"] == "failed", said
    assert report[name]["ours"]
    assert "_selector" in report[name]["said"]
    report, said = run_module("selector", "test_events", name)
    assert report[name]["end"] == "ok", said
    assert not report[name]["ours"]


def test_the_exceptions_have_reasons_and_no_doubles():
    for name, reason in {**FAILS, **LEFT_OUT, **MODULES_LEFT_OUT, **SKIPS}.items():
        assert len(reason) > 6, name
    assert not [name for name in FAILS for pattern in LEFT_OUT if fnmatch.fnmatchcase(name, pattern)]


@pytest.mark.parametrize("io", ENGINES)
def test_every_method_of_an_event_loop_is_there(io):
    """None is left as asyncio's abstract loop has it, which raises NotImplementedError."""
    abstract = asyncio.AbstractEventLoop
    names = {name for name, value in vars(abstract).items() if inspect.isfunction(value)}
    assert len(names) > 50
    opened = open_loop(io)
    loop, _ = next(opened)
    missing = [
        name for name in names
        if not name.startswith("__") and getattr(reactor.Loop, name) in (getattr(abstract, name), None)
    ]
    assert missing == []
    assert isinstance(loop, abstract)
    assert next(opened, None) is None
