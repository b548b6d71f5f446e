"""The RSGI application that granian runs in the rig."""

from bodies import BODIES

HEADERS = [("content-type", "text/plain")]


async def app(scope, protocol):
    protocol.response_bytes(200, HEADERS, BODIES[scope.path])
