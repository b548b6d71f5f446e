"""The options that serving HTTP needs, under the names applications give them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class HttpSettings:
    """A snapshot of the options of the same names (docs/options.md): seconds, bytes and counts."""

    http_header_max: int = 4096
    http_header_timeout: int = 10
    http_body_max: int = 1024000
    http_body_timeout: int = 60
    http_write_timeout: int = 60
    http_keepalive_time: int = 20
    http_request_limit: int = 1000
    http_hsts_enable: int = 31536000
    http_server_version: str = "kore"
    http_pretty_error: bool = False
    http_body_disk_offload: int = 0
    http_body_disk_path: str = "tmp_files"
    filemap_ext: str | None = None
    filemap_index: str = "index.html"
    http_media_type: tuple[tuple[str, tuple[str, ...]], ...] = ()
    websocket_maxframe: int = 16384
    websocket_max_message: int = 1024 * 1024
    websocket_timeout: int = 120
    websocket_deflate: bool = True
    worker_max_connections: int = 512
    worker_accept_threshold: int = 16
