"""Files below a directory, served below a URL: which file a path means, and what is answered.

A path is decoded once and its dot segments are resolved before anything is compared with it, so that every spelling
of a path meets the same map (and the same authentication) and no spelling leads above its root. What symbolic links may
do is for `kore.http.beneath`. The rules: the longest URL wins; a directory without its final slash is answered with
302; with it, by its index file; a missing file gets a second chance with the default extension; only regular files
are served. Names that end in .zst, .br and .gz beside a file are its compressed forms, sent to clients that accept
them, unless they are older than the file.

`serve` is the hot path of files: a request whose head has led to a small file within this second is answered by what
`FileCache.fresh` has for it.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any, Final

from kore.errors import ConfigurationError, ProtocolError
from kore.http.beneath import open_beneath, open_directory
from kore.http.conditional import outcome, range_applies
from kore.http.file_cache import SMALL_BYTES_MAX, Entry, FileCache, Variant, identity
from kore.http.media_types import MediaTypes
from kore.http.ranges import content_range, part_heads, wanted
from kore.http.request import ANSWERED, OPEN, Request
from kore.http.response import JOIN_BYTES_MAX
from kore.http.send_file import Pipes, Segment, send
from kore.http.send_memory import send_memory

ATTEMPTS: Final = 3
"""Look-ups of a file that changes while it is looked at, before 503."""

CODINGS: Final = ((b".zst", "zstd"), (b".br", "br"), (b".gz", "gzip"))
"""Compressed siblings: the suffix and the content coding (RFC 9110 8.4.1, RFC 8878, RFC 7932)."""

ALLOW: Final = "GET, HEAD"

STATUS: Final = {
    errno.ENOENT: 404, errno.ENOTDIR: 404, errno.ENAMETOOLONG: 404, errno.EISDIR: 404,
    errno.EXDEV: 404, errno.ELOOP: 404,  # a symbolic link that leads out, or round in circles
    errno.ENXIO: 404, errno.ENODEV: 404, errno.EINVAL: 404, errno.EOVERFLOW: 404, errno.ESTALE: 404,
    errno.EACCES: 403, errno.EPERM: 403,
    errno.EMFILE: 503, errno.ENFILE: 503, errno.ENOMEM: 503, errno.EAGAIN: 503,
}  # fmt: skip
"""What to answer when a file can't be opened; 500 for what is not listed."""

_escape = re.compile(rb"%([0-9A-Fa-f]{2})")
_bad_escape = re.compile(rb"%(?![0-9A-Fa-f]{2})").search
_control = re.compile(rb"[\x00-\x1f\x7f]").search
_unsafe = re.compile(rb"[^A-Za-z0-9\-._~!$&'()*+,;=:@]")
# No field of a request matters but these; one character behind the line end decides about nearly all others.
_special = re.compile(rb"\n(?:[iI][fF]-|[rR][aA][nN][gG][eE]:)").search
_fields_of = re.compile(
    rb"\n([iI][fF]-[^:\r]*+|[rR][aA][nN][gG][eE]|[aA][cC][cC][eE][pP][tT]-[eE][nN][cC][oO][dD][iI][nN][gG]):([^\r]*+)"
).findall

Fields = tuple[tuple[str, str], ...]


class Shared:
    """What all file maps of a worker have together: the cache of files, the pipes, the media types."""

    def __init__(self, cache: FileCache | None = None, pipes: Pipes | None = None) -> None:
        self.cache = cache or FileCache()
        self.pipes = pipes or Pipes()
        self._media_types: MediaTypes | None = None

    def media_types(self, own: Iterable[tuple[str, Iterable[str]]]) -> MediaTypes:
        """The table, with the application's entries."""
        if self._media_types is None:
            self._media_types = MediaTypes(own)
        return self._media_types


class FileMap:
    """Files below `directory` (relative to the working directory of the worker) are served below `url`.

    `auth` is for whoever calls `serve`. Raises ConfigurationError for a URL that no path can begin with.
    """

    def __init__(self, url: str, directory: str, auth: Any = None, *, shared: Shared | None = None) -> None:
        found = normal(url) if url.startswith("/") and url.endswith("/") else None
        if found is None:
            raise ConfigurationError(f"file map {url!r}: a URL from '/' to '/', of well-formed escapes")
        self.url = url
        self.directory = directory
        self.auth = auth
        self.prefix = found[0]
        self.shared = shared or Shared()
        self.fresh = self.shared.cache.fresh
        self._root = -1
        self._root_date = ""

    def share(self, shared: Shared) -> None:
        """Use the cache and the pipes of others. To be called before the first request."""
        self.shared = shared
        self.fresh = shared.cache.fresh

    def root(self, date: str) -> int:
        """The directory's fd, opened anew each second: a link that is pointed to another release takes effect."""
        if self._root_date is not date:
            root = open_directory(self.directory)
            self.close()
            self._root = root
            self._root_date = date
        return self._root

    def close(self) -> None:
        """Close the directory."""
        if self._root >= 0:
            os.close(self._root)
            self._root = -1
            self._root_date = ""


class FileMaps:
    """The file maps of a domain. They share one cache, that of `shared` if it is given."""

    def __init__(self, maps: Sequence[FileMap] = (), *, shared: Shared | None = None) -> None:
        self.shared = shared or Shared()
        # The longest first; sorting keeps the order of declaration among equals.
        self.maps = tuple(sorted(maps, key=lambda file_map: -len(file_map.prefix)))
        for file_map in self.maps:
            file_map.share(self.shared)

    def find(self, path: str) -> FileMap | None:
        """The map with the longest URL that `path`, as it was sent, lies below; None when there is none.

        A path that is a map's URL but for the final slash belongs to it if no other claims it. A path that can't be
        decoded belongs to the map whose URL it begins with as text, which answers it with 400.
        """
        found = normal(path)
        if found is None:
            return next((one for one in self.maps if path.startswith(one.url)), None)
        components, slash = found
        for file_map in self.maps:
            length = len(file_map.prefix)
            if components[:length] == file_map.prefix and (len(components) > length or slash):
                return file_map
        return next((one for one in self.maps if components == one.prefix), None)

    def close(self) -> None:
        """Close all directories and idle pipes. For whoever made it, when nothing is served any more."""
        for file_map in self.maps:
            file_map.close()
        self.shared.pipes.close()


def normal(path: str) -> tuple[tuple[bytes, ...], bool] | None:
    """The components of a path as it was sent, and whether it ends like a directory.

    Decoded once, where "+" is a plus (RFC 3986 2.1), empty components left out, dot segments resolved (RFC 3986 5.2.4).
    None for control characters and malformed escapes.
    """
    data = path.encode("utf-8", "surrogateescape")
    if b"%" in data:
        if _bad_escape(data):
            return None
        data = _escape.sub(lambda match: bytes((int(match[1], 16),)), data)
    if _control(data):
        return None
    pieces = data.split(b"/")
    components: list[bytes] = []
    for piece in pieces:
        if piece == b"..":
            if components:
                components.pop()
        elif piece not in (b"", b"."):
            components.append(piece)
    return tuple(components), pieces[-1] in (b"", b".", b"..")


def serve(request: Request, file_map: FileMap) -> None:
    """Answer `request` with the file of `file_map` that its path means, or with why there is none.

    A handler, when `file_map` is bound to it. Returns before a large file has been sent.
    """
    connection = request._connection
    variant = file_map.fresh.get(request._prepared)
    if (
        variant is not None
        and variant.date is connection.service.responses.date
        and request._response_headers is None
        and request._state == OPEN
        and not connection.close_after
        and _special(request._block) is None
    ):
        # The hot path: a file that was looked up in this second, for a request without conditions.
        if variant.memory is not None:
            send_memory(request, variant.memory, variant.memory.size - variant.size)
            return
        request._state = ANSWERED
        connection.write(variant.whole)
        if variant.size > JOIN_BYTES_MAX:
            connection.hold()
        return
    if request._prepared.head.method_name not in ("GET", "HEAD"):
        request.response_header("allow", ALLOW)
        request.response(405, None)
        return
    _look_up_and_answer(request, file_map)


def _look_up_and_answer(request: Request, file_map: FileMap) -> None:
    """The way of everything that is not known already."""
    try:
        for _ in range(ATTEMPTS):
            lookup = Lookup(request, file_map)
            location = lookup.find()
            if location is not None:
                request.response_header("location", location)
                request.response(302, None)
                return
            if _answer(request, lookup):
                return
        raise ProtocolError(503, "the file changes all the time")
    except ProtocolError as error:
        request.response(error.status, None)
    except OSError as error:
        status = STATUS.get(error.errno or 0, 500)
        if status >= 500:
            request._connection.server.log_error(f"{request!r}: {error}")
        request.response(status, None)


class Lookup:
    """One look at the file system for one request; `entry` is what it found."""

    def __init__(self, request: Request, file_map: FileMap) -> None:
        head = request._prepared.head
        server = request._connection.server
        found = normal(head.path)
        if found is None:
            raise ProtocolError(400, "a malformed escape or a control character in the path")
        self.components, self.slash = found[0][len(file_map.prefix) :], found[1]
        self.query = head.query
        self.file_map = file_map
        self.settings: Any = server.settings
        self.date = request._connection.service.responses.date
        self.cache = file_map.shared.cache
        self.root = file_map.root(self.date)
        self.key = (file_map, self.components, self.slash)
        self.entry: Entry

    def find(self) -> str | None:
        """Find the entry; instead, the location to send the client to. Raises OSError, ProtocolError."""
        before = self.cache.get(self.key)
        if before is not None and before.date is self.date:
            self.entry = before
            return None
        try:
            path, fd = self._open()
        except OSError:
            self.cache.drop(self.key)
            raise
        try:
            found = os.fstat(fd)
        finally:
            os.close(fd)
        if stat.S_ISDIR(found.st_mode) and not self.slash:
            return self._location()
        if not stat.S_ISREG(found.st_mode):
            raise ProtocolError(404, "neither a regular file nor a directory")
        self.entry = self._entry(path, found)
        if before is not None:
            self.entry.inherit(before)
        self.cache.put(self.key, self.entry)
        return None

    def _open(self) -> tuple[bytes, int]:
        """The path of the file below the root, and an fd of it."""
        path = b"/".join(self.components)
        if self.slash:
            # Not looked at first: that would take the right to list the directory.
            index = os.fsencode(getattr(self.settings, "filemap_index", "index.html"))
            path = path + b"/" + index if path else index
            return path, open_beneath(self.root, path)
        try:
            return path, open_beneath(self.root, path or b".")
        except FileNotFoundError:
            extension = getattr(self.settings, "filemap_ext", None)
            if not extension or not path:
                raise
        path += os.fsencode(extension)
        fd = open_beneath(self.root, path)
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise ProtocolError(404, "no regular file")
        return path, fd

    def _location(self) -> str:
        """The directory's path with its slash. Made anew: what was sent may begin with "//", which names a host."""
        components = [*self.file_map.prefix, *self.components]
        escaped = (_unsafe.sub(lambda match: b"%%%02X" % match[0][0], component) for component in components)
        path = "".join("/" + component.decode() for component in escaped) + "/"
        return path if self.query is None else f"{path}?{self.query}"

    def _entry(self, path: bytes, found: os.stat_result) -> Entry:
        """The file and its compressed siblings."""
        types = self.file_map.shared.media_types(getattr(self.settings, "http_media_type", ()))
        media_type = types.of(path)
        siblings = []
        for suffix, coding in CODINGS:
            try:
                fd = open_beneath(self.root, path + suffix)
            except OSError:
                continue
            try:
                sibling = os.fstat(fd)
            finally:
                os.close(fd)
            if stat.S_ISREG(sibling.st_mode) and sibling.st_mtime_ns >= found.st_mtime_ns:
                siblings.append(Variant(path + suffix, sibling, media_type, coding, varies=True))
        plain = Variant(path, found, media_type, "", varies=bool(siblings))
        return Entry(plain, tuple(siblings), self.date)

    def open(self, variant: Variant) -> int | None:
        """An fd of that file; None when it is not what it was, which is then forgotten. Raises OSError."""
        fd = open_beneath(self.root, variant.path)
        if identity(os.fstat(fd)) == variant.identity:
            return fd
        os.close(fd)
        self.cache.drop(self.key)
        return None

    def read(self, variant: Variant) -> bytes | None:
        """The bytes of a small file; None when it is not what it was. Raises OSError."""
        if variant.content is not None:
            return variant.content
        fd = self.open(variant)
        if fd is None:
            return None
        try:
            content = os.read(fd, variant.size) if variant.size else b""
            unchanged = identity(os.fstat(fd)) == variant.identity
        finally:
            os.close(fd)
        if len(content) != variant.size or not unchanged:
            self.cache.drop(self.key)
            return None
        self.cache.fill(self.key, self.entry, variant, content)
        return content


def _answer(request: Request, lookup: Lookup) -> bool:
    """Answer with the entry that was found; False when it has changed since. Raises OSError."""
    prepared = request._prepared
    entry = lookup.entry
    conditions = _conditions(request._block)
    variant = _chosen(entry, conditions.get("accept-encoding"))
    status = outcome(conditions, variant.etag, variant.modified)
    if status != 200:
        # RFC 9110 15.4.5: a 304 says what a 200 would have said of caching, and nothing of the content.
        kept = ("etag", "vary") if status == 304 else ("vary",)
        _respond(request, status, tuple(field for field in variant.fields if field[0] in kept), b"")
        return True
    value = conditions.get("range")
    if value is not None and not prepared.is_head and range_applies(conditions, variant.etag, variant.modified):
        parts = wanted(value, variant.size)
        if parts is not None:
            return _answer_ranges(request, lookup, variant, parts)
    if prepared.is_head:
        _send(request, lookup, 200, variant.fields, [(0, variant.size)], -1)
    elif variant.size > SMALL_BYTES_MAX:
        fd = lookup.open(variant)
        if fd is None:
            return False
        _send(request, lookup, 200, variant.fields, [(0, variant.size)], fd)
    else:
        content = lookup.read(variant)
        if content is None:
            return False
        if entry.encoded or not _keep(request, lookup, variant, content):
            _respond(request, 200, variant.fields, content)
    return True


def _keep(request: Request, lookup: Lookup, variant: Variant, content: bytes) -> bool:
    """Answer an ordinary request, and the next of this second with the same bytes; False for any other request."""
    connection, prepared = request._connection, request._prepared
    heads = connection.service.responses
    # A head that may share what is made for everybody is one of a GET over HTTP/1.1 on a connection that stays, in
    # a domain without a log.
    if (
        prepared.heads is not heads.plain or not heads.keeping or connection.close_after
        or request._response_headers is not None or request._state != OPEN
    ):
        return False
    if variant.date is not heads.date:
        head = heads.build(200, 1, True, variant.fields, variant.size)
        lookup.cache.make(variant, head, content, heads.date, encrypted=connection.service.protocol != "http")
    if variant.content is not None:
        lookup.cache.remember(prepared, variant)
    if variant.memory is not None:
        send_memory(request, variant.memory, variant.memory.size - variant.size)
        return True
    request._state = ANSWERED
    connection.write(variant.whole)
    if variant.size > JOIN_BYTES_MAX:
        connection.hold()
    return True


def _answer_ranges(request: Request, lookup: Lookup, variant: Variant, parts: list[tuple[int, int]]) -> bool:
    """206, or 416 when there are no parts (RFC 9110 15.3.7, 15.5.17); False when the file has changed."""
    if not parts:
        _respond(request, 416, (("content-range", f"bytes */{variant.size}"), ("accept-ranges", "bytes")), b"")
        return True
    fields = variant.fields
    segments: list[Segment] = [(first, end - first) for first, end in parts]
    if len(parts) == 1:
        fields = (*fields, ("content-range", content_range(parts[0], variant.size)))
    else:
        boundary = os.urandom(16).hex()
        heads = part_heads(parts, variant.size, variant.media_type, boundary)
        segments = [*(piece for pair in zip(heads, segments, strict=False) for piece in pair), heads[-1]]
        others = (field for field in fields if field[0] != "content-type")
        fields = (("content-type", f"multipart/byteranges; boundary={boundary}"), *others)
    if variant.size > SMALL_BYTES_MAX:
        fd = lookup.open(variant)
        if fd is None:
            return False
        _send(request, lookup, 206, fields, segments, fd)
        return True
    content = lookup.read(variant)
    if content is None:
        return False
    pieces = (one if isinstance(one, bytes) else content[one[0] : one[0] + one[1]] for one in segments)
    _respond(request, 206, fields, b"".join(pieces))
    return True


def _respond(request: Request, status: int, fields: Fields, body: bytes) -> None:
    """A response whose body is at hand."""
    request._response_headers = list(_merged(request, fields))
    request.response(status, body or None)


def _send(request: Request, lookup: Lookup, status: int, fields: Fields, segments: list[Segment], fd: int) -> None:
    """A response whose body is in a file, or left out."""
    send(request, status, _merged(request, fields), segments, fd, lookup.file_map.shared.pipes)


def _merged(request: Request, fields: Fields) -> Fields:
    """`fields`, unless the application has set them on the response before."""
    own = request._response_headers
    if not own:
        return fields
    names = {name.lower() for name, _ in own}
    return (*own, *(field for field in fields if field[0] not in names))


def _conditions(block: bytes) -> dict[str, str]:
    """The fields of a head that decide about a file, by their names in lower case; repeated ones joined by commas."""
    found: dict[str, str] = {}
    for name, value in _fields_of(block):
        lower = name.decode("ascii").lower()
        text = value.decode("utf-8", "surrogateescape").strip(" \t")
        found[lower] = f"{found[lower]}, {text}" if lower in found else text
    return found


def _chosen(entry: Entry, accepted: str | None) -> Variant:
    """The variant that the client likes best (RFC 9110 12.5.3); of those it likes equally the smallest."""
    if accepted is None or not entry.encoded:
        return entry.plain
    weights, plain_weight = _weights(accepted)
    best, best_rank = entry.plain, (plain_weight, -entry.plain.size)
    for variant in entry.encoded:
        weight = weights.get(variant.coding, weights.get("*", 0.0))
        if weight and (weight, -variant.size) > best_rank:
            best, best_rank = variant, (weight, -variant.size)
    return best


@lru_cache(maxsize=64)  # browsers send a handful; a value is no longer than a head may be
def _weights(accepted: str) -> tuple[dict[str, float], float]:
    """The weights of content codings, and that of none: it is acceptable unless excluded, but liked the least."""
    weights: dict[str, float] = {}
    for element in accepted.split(","):
        coding, _, parameter = element.partition(";")
        name, _, value = parameter.strip(" \t").partition("=")
        weight = 1.0
        if name.strip(" \t").lower() == "q":
            match = _weight(value.strip(" \t"))
            weight = float(match[0]) if match is not None else 0.0
        coding = coding.strip(" \t").lower()
        weights.setdefault("gzip" if coding == "x-gzip" else coding, weight)
    return weights, weights.get("identity", 0.0)


_weight = re.compile(r"0(?:\.[0-9]{0,3})?|1(?:\.0{0,3})?").fullmatch
