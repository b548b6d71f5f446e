"""The log: its format, that nothing forges a line, and that a slow or broken sink costs lines and never the server."""

from __future__ import annotations

import os
import re

import pytest

from kore.errors import StartError
from kore.process.log import (
    BACKLOG_BYTES_MAX,
    LOG_INFO,
    TEXT_CHARACTERS_MAX,
    DescriptorSink,
    FileSink,
    Log,
    cut,
    escape,
    format_line,
)


def test_a_line_has_the_documented_format():
    line = format_line("[wrk 1]", "hello", 1_700_000_000.0625)
    assert line == b"2023-11-14 22:13:20.062 UTC proc=[wrk 1] log=[hello]\n"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\nb", r"a\nb"),
        ("a\r\n\tb", r"a\r\n\tb"),
        ("\x1b[31mred", r"\x1b[31mred"),
        ("\x00\x7f\x9b", r"\x00\x7f\x9b"),
        ("\u2028\u2029", r"\u2028\u2029"),
        ("\udc80", r"\udc80"),
        ("žluťoučký 🐎", "žluťoučký 🐎"),
        (r"C:\new", r"C:\new"),
    ],
)
def test_control_characters_cannot_forge_a_line(text, shown):
    assert escape(text) == shown
    assert format_line("[parent]", text, 0.0).count(b"\n") == 1


def test_a_long_text_is_cut_and_says_by_how_much():
    text = cut("x" * (TEXT_CHARACTERS_MAX + 5))
    assert text.startswith("x" * TEXT_CHARACTERS_MAX)
    assert text.endswith("(5 more characters)")
    assert cut("short") == "short"


def test_lines_reach_a_pipe_in_order():
    reading, writing = os.pipe()
    try:
        log = Log(DescriptorSink(writing))
        log.write(LOG_INFO, "[wrk 1]", "one")
        log.parent(LOG_INFO, "two")
        text = os.read(reading, 4096).decode()
        assert re.search(r"proc=\[wrk 1\] log=\[one\]\n.*proc=\[parent\] log=\[two\]\n", text)
    finally:
        os.close(reading)
        os.close(writing)


def test_a_full_pipe_never_blocks_keeps_what_fits_and_counts_the_rest():
    reading, writing = os.pipe()
    try:
        log = Log(DescriptorSink(writing))
        text = "x" * 1000
        sent = 2 * BACKLOG_BYTES_MAX // 1000
        for _ in range(sent):
            log.write(LOG_INFO, "[wrk 1]", text)  # would block for ever if it wrote without looking
        assert log.sink.waiting_fd() == writing
        os.set_blocking(reading, False)
        received = b""
        while log.sink.waiting_fd() is not None:
            received += os.read(reading, 1 << 20)
            log.flush()
        received += os.read(reading, 1 << 20)
        lines = received.decode().splitlines()
        dropped = re.search(r"log=\[(\d+) log lines were dropped", lines[-1])
        assert dropped is not None
        assert len(lines) - 1 + int(dropped[1]) == sent
        assert all(line.endswith(f"log=[{text}]") for line in lines[:-1]), "a line was torn"
    finally:
        os.close(reading)
        os.close(writing)


def test_a_flood_of_a_worker_does_not_hide_what_the_parent_says():
    reading, writing = os.pipe()
    try:
        log = Log(DescriptorSink(writing))
        for _ in range(2 * BACKLOG_BYTES_MAX // 1000):
            log.write(LOG_INFO, "[wrk 1]", "x" * 1000)
        log.parent(LOG_INFO, "worker 1 died")
        os.set_blocking(reading, False)
        received = b""
        while log.sink.waiting_fd() is not None:
            received += os.read(reading, 1 << 20)
            log.flush()
        received += os.read(reading, 1 << 20)
        assert b"proc=[parent] log=[worker 1 died]" in received
    finally:
        os.close(reading)
        os.close(writing)


def test_a_reader_that_is_gone_costs_lines_only():
    reading, writing = os.pipe()
    os.close(reading)
    try:
        log = Log(DescriptorSink(writing))
        log.parent(LOG_INFO, "nobody reads this")
        log.flush()
        assert log.sink.waiting_fd() is None
    finally:
        os.close(writing)


def test_a_full_disk_costs_lines_and_is_told_later(tmp_path):
    with open("/dev/full", "wb") as full:
        log = Log(DescriptorSink(full.fileno()))
        log.parent(LOG_INFO, "lost")
        log.sink = FileSink(str(tmp_path / "log"))
        log.parent(LOG_INFO, "kept")
        log.close()
    text = (tmp_path / "log").read_text()
    assert "1 log lines were dropped" in text
    assert "log=[kept]" in text


def test_a_logfile_is_appended_to_and_reopened_after_rotation(tmp_path):
    path = tmp_path / "log"
    path.write_text("before\n")
    log = Log(FileSink(str(path)))
    log.parent(LOG_INFO, "one")
    path.rename(tmp_path / "log.1")
    log.reopen()
    log.parent(LOG_INFO, "two")
    log.close()
    assert (tmp_path / "log.1").read_text().startswith("before\n")
    assert "log=[one]" in (tmp_path / "log.1").read_text()
    assert "log=[two]" in path.read_text()


def test_a_logfile_that_cannot_be_opened_again_leaves_the_old_one(tmp_path):
    directory = tmp_path / "logs"
    directory.mkdir()
    log = Log(FileSink(str(directory / "log")))
    directory.rename(tmp_path / "moved")
    log.reopen()
    log.parent(LOG_INFO, "still here")
    log.close()
    text = (tmp_path / "moved" / "log").read_text()
    assert "cannot be opened again" in text
    assert "still here" in text


def test_a_logfile_that_cannot_be_opened_says_which_and_why(tmp_path):
    with pytest.raises(StartError, match=r"logfile .*/nowhere/log: No such file"):
        FileSink(str(tmp_path / "nowhere" / "log"))
