"""Stacks that faulthandler wrote: the innermost line of the application is found, however they are cut or forged."""

from __future__ import annotations

import faulthandler
import os
import sysconfig
import threading

import pytest

import kore
from kore.sandbox.stack import DUMP_BYTES_MAX, Ownership, Place, places_of

LIBRARY = sysconfig.get_path("stdlib")
KORE = os.path.dirname(kore.__file__)
DUMP = f"""Stack (most recent call first):
  File "<frozen os>", line 225 in makedirs
  File "{LIBRARY}/pathlib.py", line 1116 in mkdir
  File "{KORE}/reactor/loop.py", line 5 in run
  File "/srv/shop/store/disk.py", line 21 in make
  File "/srv/shop/app.py", line 7 in index
""".encode()


def innermost(dump, application="/srv/shop"):
    return Ownership(application).innermost(places_of(dump))


def test_the_innermost_line_of_the_application():
    assert innermost(DUMP) == Place("/srv/shop/store/disk.py", 21, "make")
    assert len(places_of(DUMP)) == 5


def test_cut_anywhere_it_tells_less_and_nothing_wrong():
    whole = places_of(DUMP)
    for end in range(len(DUMP)):
        found = places_of(DUMP[:end])
        assert found == whole[: len(found)]


def test_what_this_interpreter_writes_is_understood(tmp_path):
    with open(tmp_path / "stack", "wb+") as file:
        thread = threading.Thread(target=faulthandler.dump_traceback, args=(file,), kwargs={"all_threads": False})
        thread.start()
        thread.join()
        faulthandler.dump_traceback(file, all_threads=False)
        file.seek(0)
        places = places_of(file.read())
    here = innermost((tmp_path / "stack").read_bytes(), os.path.dirname(__file__))
    assert here is not None
    assert here.file == __file__
    assert here.function == "test_what_this_interpreter_writes_is_understood"
    assert any(place.function == "run" and place.file.endswith("threading.py") for place in places)


@pytest.mark.parametrize(
    "hostile",
    [
        b"", b"\n", b"\0" * 100, b"\xff\xfe\n", b'  File "x", line 99999999999999 in y\n', b'  File "", line 1 in y\n',
        b'  File "x", line 1 in \n', b'File "x", line 1 in y\n', b'  File "x", line -1 in y\n',
    ],
)
def test_what_is_no_frame_is_none(hostile):
    assert places_of(hostile) == []


def test_long_names_and_long_stacks_are_bounded():
    (place,) = places_of(b'  File "%s", line 1 in %s\n' % (b"f" * 5000, b"g" * 5000))
    assert len(place.file) == len(place.function) == 256
    assert len(places_of(DUMP * 10_000)) <= DUMP_BYTES_MAX // 20


FILES = [
    ("/srv/shop/app.py", True),
    ("/srv/shop/.venv/lib/x.py", True),
    ("/opt/other.py", True),
    ("app.py", True),
    (f"{LIBRARY}/os.py", False),
    (f"{sysconfig.get_path('purelib')}/requests/api.py", False),
    (f"{KORE}/reactor/loop.py", False),
    ("<string>", False),
    ("<frozen os>", False),
]


@pytest.mark.parametrize(("file", "own"), FILES)
def test_whose_file_it_is(file, own):
    assert Ownership("/srv/shop").owns(file) is own


def test_an_application_that_is_installed_among_the_libraries_is_one_all_the_same():
    folder = f"{sysconfig.get_path('purelib')}/shop"
    assert Ownership(folder).owns(f"{folder}/app.py")
    assert not Ownership(folder).owns(f"{sysconfig.get_path('purelib')}/requests/api.py")
    outer = Ownership(os.path.dirname(KORE))  # kore itself lies below the application's folder
    assert not outer.owns(f"{KORE}/cli.py")


def test_files_of_kores_own_have_a_name():
    assert Ownership("/srv/shop").platforms(f"{KORE}/reactor/loop.py") == "kore/reactor/loop.py"
    assert Ownership("/srv/shop").platforms("/srv/shop/app.py") is None
    assert Ownership("/srv/shop").platforms(f"{KORE}x/loop.py") is None
    assert Ownership(KORE).platforms(f"{KORE}/reactor/loop.py") is None
