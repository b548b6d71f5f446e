"""Which programs a spawner may start, and what the kernel must let run for them: loaders and interpreters.

Landlock asks for the right to execute a program, the loader that an ELF program names, and the interpreter of a script
(shared libraries are only read). So the rules for "these programs and no others" follow from the first bytes of each.
What has no path is not asked about: a program that may make a memfd(2) can run what it wrote there, unless its filter
refuses memfd_create(2).
"""

from __future__ import annotations

import os
import shutil
import stat
import struct
from collections.abc import Iterable
from typing import BinaryIO

INTERPRETERS_MAX = 4
"""Scripts whose interpreters are scripts: as many as the kernel follows (execve(2): ELOOP beyond)."""

DIRECTORY_ENTRIES_MAX = 4096
"""Files of a listed directory that are looked into for interpreters."""

_SHEBANG_BYTES = 256  # BINPRM_BUF_SIZE
_ELF_HEADERS_MAX = 256  # more than any program has; the kernel takes 64 KiB of them
_PATH_MAX = 4096
_PT_INTERP = 3


class Allowed:
    """The programs that may be started; made before the process is confined. No paths: all."""

    def __init__(self, paths: Iterable[str]) -> None:
        self.everything = True
        self.missing: list[str] = []
        """Paths that are not there, with the reason."""
        self._files: set[tuple[int, int]] = set()
        self._directories: list[str] = []
        self._listed: list[str] = []
        for path in paths:
            self.everything = False
            self._list(path)

    def _list(self, path: str) -> None:
        try:
            found = os.stat(path)
        except OSError as error:
            self.missing.append(f"{path}: {error.strerror}")
            return
        self._listed.append(os.path.realpath(path))
        if stat.S_ISDIR(found.st_mode):
            self._directories.append(os.path.realpath(path) + "/")
        else:
            self._files.add((found.st_dev, found.st_ino))

    def includes(self, path: str) -> bool:
        """Whether the program at `path` is one of them. Raises OSError when there is nothing there."""
        if self.everything:
            return True
        found = os.stat(path)
        return (found.st_dev, found.st_ino) in self._files or os.path.realpath(path).startswith(
            tuple(self._directories))

    def executables(self) -> tuple[str, ...]:
        """What must be executable for them: themselves, their loaders and interpreters."""
        if self.everything:
            return ("/",)
        found = dict.fromkeys(self._listed)
        for path in self._listed:
            for file in _files_of(path):
                found.update(dict.fromkeys(needed_by(file)))
        return tuple(found)


def _files_of(path: str) -> list[str]:
    """The file, or the files directly in the directory."""
    if not os.path.isdir(path):
        return [path]
    with os.scandir(path) as entries:
        return [entry.path for entry, _ in zip(entries, range(DIRECTORY_ENTRIES_MAX), strict=False) if entry.is_file()]


def needed_by(path: str) -> list[str]:
    """The loader or interpreters that the kernel opens to run a program; none for what it cannot run."""
    found: list[str] = []
    for _ in range(INTERPRETERS_MAX + 1):
        try:
            with open(path, "rb") as file:
                interpreter, argument = _interpreter(file)
        except OSError:
            break
        if interpreter is None:
            break
        found.append(interpreter)
        if argument is not None and os.path.basename(interpreter) == "env":  # which starts the real one
            other = shutil.which(argument)
            if other is not None:
                found.append(other)
                found += elf_loader_of(interpreter)
                interpreter = other
        path = interpreter
    return found


def elf_loader_of(path: str) -> list[str]:
    """The loader of one ELF program, if it has one."""
    try:
        with open(path, "rb") as file:
            loader = elf_interpreter(file)
    except OSError:
        return []
    return [] if loader is None else [loader]


def _interpreter(file: BinaryIO) -> tuple[str | None, str | None]:
    """What the kernel opens to run a file, and the first argument a script gives to it."""
    head = file.read(_SHEBANG_BYTES)
    if not head.startswith(b"#!"):
        file.seek(0)
        return elf_interpreter(file), None
    words = [os.fsdecode(word) for word in head[2:].partition(b"\n")[0].split()]
    return words[0] if words else None, words[1] if len(words) > 1 else None


def elf_interpreter(file: BinaryIO) -> str | None:
    """The loader that an ELF file names (elf(5), PT_INTERP); None for none, or for another kind of file."""
    head = file.read(64)
    if len(head) < 64 or not head.startswith(b"\x7fELF"):
        return None
    order = "<" if head[5] == 1 else ">"
    wide = head[4] == 2
    # e_phoff, then e_phentsize and e_phnum; in a program header p_offset and p_filesz.
    table_at, sizes_at, offset_at, length_at, word = (32, 54, 8, 32, "Q") if wide else (28, 42, 4, 16, "I")
    (table,) = struct.unpack_from(order + word, head, table_at)
    size, count = struct.unpack_from(order + "HH", head, sizes_at)
    try:
        file.seek(table)
        headers = file.read(size * min(count, _ELF_HEADERS_MAX))
        for at in range(0, len(headers), max(size, 1)):
            if struct.unpack_from(order + "I", headers, at) == (_PT_INTERP,):
                file.seek(struct.unpack_from(order + word, headers, at + offset_at)[0])
                length = struct.unpack_from(order + word, headers, at + length_at)[0]
                return os.fsdecode(file.read(min(length, _PATH_MAX)).rstrip(b"\0")) or None
    except (struct.error, OverflowError, ValueError):
        pass  # cut off, or not a file that the kernel runs
    return None
