"""Call sites are told once, are bounded, and make a hook that is Python whatever their texts are."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kore.process import sites
from kore.process.sites import Site, Sites, site_of_body

MKDIR = Site(1, 'mkdir("data", 0777)', 's.allow("mkdir")', deadly=False, place="app.py:21 make", own=True)
EXEC = Site(2, "execve()", 's.allow("execve", dangerous=True)', deadly=True)
SOCKET = Site(
    1, "socket(AF_PACKET, 3, 0)", 's.allow_arg("socket", 0, 17, dangerous=True)', deadly=False, place="app.py:3 f",
    own=True,
)


def changed(site, **fields):
    return replace(site, **fields)


class Recorder:
    """The object of the hook, as far as a text can use it."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        return lambda *arguments, **keywords: self.calls.append((name, *arguments))


def run(text):
    """What the hook in `text` adds."""
    names, recorder = {}, Recorder()
    exec(text, names)
    names["seccomp"](None, recorder)
    return recorder.calls


def test_a_site_travels_as_it_is():
    for site in (MKDIR, EXEC, changed(MKDIR, call='"\\\u2028\n', directory="x", child=True)):
        assert site_of_body(site.body()) == site


def test_each_is_told_once_whichever_worker_makes_it():
    found = Sites()
    assert found.add(MKDIR)
    assert not found.add(changed(MKDIR, worker=2, call='mkdir("other", 0777)'))
    assert found.add(changed(MKDIR, place="app.py:22 make"))
    assert found.add(EXEC)
    assert not found.full


def test_the_hook_is_sorted_and_says_where():
    found = Sites()
    for site in (SOCKET, EXEC, changed(MKDIR, place="/lib/x.py:1 run", own=False), MKDIR):
        found.add(site)
    assert found.hook() == '''\
def seccomp(self, s):
    s.allow("execve", dangerous=True)             # <unknown>
    s.allow("mkdir")                              # app.py:21 make, /lib/x.py:1 run
    s.allow_arg("socket", 0, 17, dangerous=True)  # socket(AF_PACKET, 3, 0): app.py:3 f
'''
    assert run(found.hook()) == [("allow", "execve"), ("allow", "mkdir"), ("allow_arg", "socket", 0, 17)]


def test_nothing_needed_is_said():
    assert Sites().hook() == "# The application made no call that the sandbox forbids: it needs no seccomp hook.\n"


def test_where_files_are_changed_is_said():
    found = Sites()
    for number in range(6):
        found.add(changed(MKDIR, place=f"app.py:{number} f", directory=f"d{number % 5}"))
    note, *rest = found.hook().splitlines()
    where = '"d0", "d1", "d2", "d3" and 1 more'
    assert note == f"# It changes files in {where}: kore.config.sandbox_write must name what it may change."
    assert rest[1].endswith("app.py:0 f, app.py:1 f, app.py:2 f, app.py:3 f and 2 more")


def test_a_call_without_a_name_is_a_comment():
    found = Sites()
    found.add(Site(1, "system call 999(0x1)", None, deadly=False, place="app.py:1 f", own=True))
    assert found.hook() == "# No rule can allow system call 999(0x1), at app.py:1 f.\n"


def test_what_kore_alone_does_is_a_comment():
    found = Sites()
    found.add(changed(EXEC, place="kore/x.py:1 f", kores=True))
    assert found.hook() == (
        "# Not needed, unless kore was given a function to call there: "
        's.allow("execve", dangerous=True), kore/x.py:1 f\n'
    )
    found.add(EXEC)
    assert run(found.hook()) == [("allow", "execve")]
    assert "Not needed" not in found.hook()


@pytest.mark.parametrize("hostile", ["x\nimport os", "x\r1 / 0", "x\x0c1 / 0", "x\u2028y", "\ud800", "x\0y"])
def test_no_text_gets_out_of_its_comment(hostile):
    found = Sites()
    found.add(changed(MKDIR, place=hostile, directory=hostile))
    found.add(changed(SOCKET, call=hostile, place=hostile))
    found.add(Site(1, hostile, None, deadly=False, place=hostile))
    text = found.hook()
    assert [line for line in text.splitlines() if not line.lstrip().startswith(("#", "s.", "def"))] == []
    assert len(run(text)) == 2
    text.encode()


def test_what_is_kept_is_bounded_and_new_lines_of_the_hook_come_before_more_places(monkeypatch):
    monkeypatch.setattr(sites, "SITES_MAX", 3)
    monkeypatch.setattr(sites, "RULES_MAX", 2)
    found = Sites()
    assert [found.add(changed(MKDIR, place=f"app.py:{number} f")) for number in range(5)] == [True] * 3 + [False] * 2
    assert found.full
    assert found.add(EXEC)
    assert not found.add(SOCKET)
    assert "It is not complete" in found.hook()
    assert len(run(found.hook())) == 2


def test_what_the_log_says():
    assert str(MKDIR) == 'worker 1: mkdir("data", 0777), at app.py:21 make; to allow it: s.allow("mkdir")'
    assert "execve() would end the worker, at <unknown>; to allow it: " in str(EXEC)
    assert str(changed(EXEC, child=True)).startswith("a child of worker 2: ")
    assert ", at x:1 f, which is not the application's; " in str(changed(MKDIR, place="x:1 f", own=False))
    assert ", at kore/x.py:1 f, which is kore's; " in str(changed(MKDIR, place="kore/x.py:1 f", own=False, kores=True))
    assert str(changed(MKDIR, line=None)).endswith("; no rule can allow it: it has no name")
