"""The integer constants of the reference, all of them but those that come with a client library.

The values are part of the interface: applications store them and compare with plain numbers (kore-api.md 5.1).
"""

from __future__ import annotations

LOG_ERR = 3
LOG_NOTICE = 5
LOG_INFO = 6

RESULT_ERROR = 0
RESULT_OK = 1
RESULT_RETRY = 2

MODULE_LOAD = 1
MODULE_UNLOAD = 2

TIMER_ONESHOT = 1

CONN_PROTO_UNKNOWN = 0
CONN_PROTO_HTTP = 1
CONN_PROTO_WEBSOCKET = 2

CONN_STATE_ESTABLISHED = 2

HTTP_METHOD_GET = 1
HTTP_METHOD_POST = 2
HTTP_METHOD_PUT = 4
HTTP_METHOD_DELETE = 16
HTTP_METHOD_HEAD = 32
HTTP_METHOD_OPTIONS = 64
HTTP_METHOD_PATCH = 128

WEBSOCKET_OP_TEXT = 1
WEBSOCKET_OP_BINARY = 2

WEBSOCKET_BROADCAST_LOCAL = 1
WEBSOCKET_BROADCAST_GLOBAL = 2
