"""What `make test` asks the machine before it runs: each answer is an exit status, and one line where it is no."""

from __future__ import annotations

import subprocess
import sys

import pytest

from kore.sandbox import landlock
from tests.support import ROOT, skip_unless


def asked(script: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, f"scripts/{script}"], cwd=ROOT, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("script", ["try_uring.py", "try_sandbox.py"])
def test_the_answer_is_a_status_and_a_reason(script):
    done = asked(script)
    assert not done.stderr
    assert done.returncode in (0, 1)
    assert bool(done.stdout.strip()) == bool(done.returncode), "no reason, or one without need"


def test_rings_are_found_where_tests_find_them():
    skip_unless("uring")
    assert asked("try_uring.py").returncode == 0


@pytest.mark.skipif(landlock.abi() < 1, reason="no Landlock in this kernel")
def test_a_sandbox_is_found_where_the_kernel_has_one():
    pytest.importorskip("pyseccomp")
    pytest.importorskip("prctl")
    done = asked("try_sandbox.py")
    assert done.returncode == 0, done.stdout
