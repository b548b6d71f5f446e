"""The pidfile: locked while its process lives, never through a symbolic link, removed only by its owner."""

from __future__ import annotations

import os

import pytest

from kore.errors import StartError
from kore.process.pidfile import HeldError, Pidfile


def test_it_holds_the_pid_and_is_removed(tmp_path):
    path = tmp_path / "kore.pid"
    pidfile = Pidfile(str(path))
    assert path.read_text() == f"{os.getpid()}\n"
    pidfile.remove()
    assert not path.exists()


def test_a_stale_pidfile_is_taken_over(tmp_path):
    path = tmp_path / "kore.pid"
    path.write_text("4194304 and a long rest\n")
    pidfile = Pidfile(str(path))
    assert path.read_text() == f"{os.getpid()}\n"
    pidfile.remove()


def test_a_second_server_is_refused_with_the_pid_of_the_first(tmp_path):
    path = str(tmp_path / "kore.pid")
    first = Pidfile(path)
    with pytest.raises(HeldError, match=f"pid {os.getpid()} is running with it"):
        Pidfile(path)
    first.remove()
    Pidfile(path).remove()


def test_a_symbolic_link_is_not_followed(tmp_path):
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "kore.pid").symlink_to(tmp_path / "victim")
    with pytest.raises(StartError, match="symbolic link"):
        Pidfile(str(tmp_path / "kore.pid"))
    assert (tmp_path / "victim").read_text() == "precious"


def test_a_directory_that_is_not_there_is_named(tmp_path):
    with pytest.raises(StartError, match=r"nowhere/kore\.pid: No such file"):
        Pidfile(str(tmp_path / "nowhere" / "kore.pid"))


def test_somebody_elses_file_under_the_same_name_is_left_alone(tmp_path):
    path = tmp_path / "kore.pid"
    pidfile = Pidfile(str(path))
    path.unlink()
    path.write_text("other\n")
    pidfile.remove()
    assert path.read_text() == "other\n"


def test_a_forked_child_does_not_remove_it(tmp_path):
    path = tmp_path / "kore.pid"
    pidfile = Pidfile(str(path))
    child = os.fork()
    if child == 0:
        pidfile.remove()
        os._exit(0)
    os.waitpid(child, 0)
    assert path.exists()
    pidfile.remove()
