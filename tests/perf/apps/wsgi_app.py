"""The WSGI application that fastwsgi runs in the rig, and its start: the argument is the port."""

import sys

from bodies import BODIES

HEADERS = {
    path: [("Content-Type", "text/plain"), ("Content-Length", str(len(body)))] for path, body in BODIES.items()
}
PIECES = {path: [body] for path, body in BODIES.items()}


def app(environ, start_response):
    path = environ["PATH_INFO"]
    start_response("200 OK", HEADERS[path])
    return PIECES[path]


if __name__ == "__main__":
    import fastwsgi

    fastwsgi.server.backlog = 4096
    fastwsgi.run(wsgi_app=app, host="127.0.0.1", port=int(sys.argv[1]))
