"""Which media type a file is sent with, by the extension of its name.

The table has what browsers and feed readers act on, as IANA registers it. Text gets ``charset=utf-8`` (RFC 9110 8.3.2
gives text no default any more, and browsers guess); types that say their encoding themselves, as JSON, XML and SVG do,
get none. What an application declares wins.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

_TABLE: Final = """
application/atom+xml atom
application/epub+zip epub
application/gzip gz tgz
application/java-archive jar
application/json json map
application/ld+json jsonld
application/manifest+json webmanifest
application/msword doc
application/octet-stream bin deb dmg exe img iso msi
application/ogg ogx
application/pdf pdf
application/rss+xml rss
application/rtf rtf
application/vnd.apple.mpegurl m3u8
application/vnd.ms-excel xls
application/vnd.ms-fontobject eot
application/vnd.ms-powerpoint ppt
application/vnd.oasis.opendocument.presentation odp
application/vnd.oasis.opendocument.spreadsheet ods
application/vnd.oasis.opendocument.text odt
application/vnd.openxmlformats-officedocument.presentationml.presentation pptx
application/vnd.openxmlformats-officedocument.spreadsheetml.sheet xlsx
application/vnd.openxmlformats-officedocument.wordprocessingml.document docx
application/wasm wasm
application/x-7z-compressed 7z
application/x-bzip2 bz2
application/x-tar tar
application/x-x509-ca-cert crt der pem
application/x-xz xz
application/xhtml+xml xhtml
application/xml xml xsl
application/zip zip
application/zstd zst
audio/aac aac
audio/flac flac
audio/midi mid midi
audio/mp4 m4a
audio/mpeg mp3
audio/ogg oga ogg opus
audio/wav wav
audio/webm weba
font/collection ttc
font/otf otf
font/ttf ttf
font/woff woff
font/woff2 woff2
image/apng apng
image/avif avif
image/bmp bmp
image/gif gif
image/heic heic
image/jpeg jpeg jpg
image/jxl jxl
image/png png
image/svg+xml svg svgz
image/tiff tif tiff
image/vnd.microsoft.icon ico
image/webp webp
model/gltf+json gltf
model/gltf-binary glb
text/calendar ics
text/css css
text/csv csv
text/html htm html
text/javascript js mjs
text/markdown markdown md
text/plain conf diff ini log patch text txt
text/tab-separated-values tsv
text/vcard vcf
text/vtt vtt
text/x-python py
text/yaml yaml yml
video/mp2t ts
video/mp4 m4v mp4
video/mpeg mpeg mpg
video/ogg ogv
video/quicktime mov
video/webm webm
video/x-matroska mkv
video/x-msvideo avi
"""

EXTENSION_BYTES_MAX: Final = 64
"""Longer ones are in no table, and would only make the look-up longer."""


class MediaTypes:
    """The built-in table with an application's own entries: pairs of a type and its extensions, in any case."""

    def __init__(self, own: Iterable[tuple[str, Iterable[str]]] = ()) -> None:
        self._types: dict[bytes, str] = {}
        for line in _TABLE.split("\n"):
            name, *extensions = line.split() or ("",)
            self._add(name, extensions)
        for own_name, own_extensions in own:
            self._add(own_name, own_extensions)

    def _add(self, name: str, extensions: Iterable[str]) -> None:
        if name.startswith("text/") and ";" not in name:
            name += "; charset=utf-8"
        for extension in extensions:
            self._types[extension.lower().encode()] = name

    def of(self, path: bytes) -> str | None:
        """The value of content-type for a file of that name; None for one that is not known, which is sent without."""
        name = path[path.rfind(b"/") + 1 :]
        stem, _, extension = name.rpartition(b".")
        if not stem or len(extension) > EXTENSION_BYTES_MAX:
            return None  # no extension, or a hidden file without one
        return self._types.get(extension.lower())
