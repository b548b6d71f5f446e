"""Where an exception was raised, for the line that the log has of it."""

from __future__ import annotations

import asyncio
import contextlib
import json

import pytest

from kore.reactor import origin
from kore.reactor.loop import Loop
from tests.support import http_get, starter

HERE = "test_reactor_origin.py"


def raised(function) -> BaseException:
    try:
        function()
    except BaseException as error:
        error.__traceback__ = error.__traceback__.tb_next  # without the call above
        return error
    raise AssertionError("it raises nothing")


def test_in_the_application_it_is_the_innermost_line():
    def fails():
        return 1 / 0

    def calls():
        fails()

    line = fails.__code__.co_firstlineno + 1
    assert origin.place_of(raised(calls)) == f", at {HERE}:{line} fails"


def test_in_a_library_it_is_the_line_that_called_it():
    @contextlib.contextmanager
    def around():
        yield

    def parses():
        with around():
            return json.loads("{")

    assert origin.place_of(raised(parses)) == f", at {HERE}:{parses.__code__.co_firstlineno + 2} parses"


def test_where_the_application_was_not_it_is_the_innermost_of_all():
    found = origin.place_of(raised(lambda: json.loads("{")).with_traceback(None))
    assert found == ""
    error = raised(lambda: json.loads("{"))
    error.__traceback__ = error.__traceback__.tb_next
    assert origin.place_of(error).startswith(", at decoder.py:")


def test_in_kore_it_is_the_line_of_the_application_that_called_it():
    def asks():
        Loop.run_until_complete(None, None)

    assert origin.place_of(raised(asks)) == f", at {HERE}:{asks.__code__.co_firstlineno + 1} asks"


def test_of_a_group_it_is_where_the_group_was_raised():
    async def fails():
        raise KeyError("x")

    async def main():
        async with asyncio.TaskGroup() as group:
            group.create_task(fails())

    found = origin.place_of(raised(lambda: asyncio.run(main())))
    assert found == f", at {HERE}:{main.__code__.co_firstlineno + 1} main"


@pytest.mark.parametrize(("name", "kore", "library"), [
    (origin.__file__, True, False), (json.__file__, False, True), (pytest.__file__, False, True),
    ("<frozen importlib._bootstrap>", False, True), ("/srv/app.py", False, False), (__file__, False, False),
])
def test_whose_a_file_is(name, kore, library):
    assert (origin.kore_file(name), origin.library_file(name)) == (kore, library)


def test_the_log_tells_where_a_handler_failed(tmp_path):
    text = (
        "import json\n\n"
        "@kore.route('/parse', domain=home, methods=['get'])\n"
        "def parse(req):\n"
        "    req.response(200, json.loads('{'))\n"
    )
    with starter(tmp_path) as programs:
        program = programs.serve(text, workers=1)
        assert http_get(program.address, "/parse").startswith(b"HTTP/1.1 500 ")
        source = (tmp_path / "app.py").read_text().splitlines()
        line = source.index("    req.response(200, json.loads('{'))") + 1
        program.wait_for(rf"uncaught exception: JSONDecodeError\(.*\), at app\.py:{line} parse\]")
