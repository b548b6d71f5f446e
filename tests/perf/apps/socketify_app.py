"""The application that socketify runs in the rig; the argument is the port."""

import sys

from bodies import BODIES
from socketify import App


def answer(body):
    """A handler that ends with this body."""
    def handler(res, req):
        res.end(body)

    return handler


app = App()
for path, body in BODIES.items():
    app.get(path, answer(body))
app.ws("/ws", {"compression": 0, "message": lambda ws, message, op: ws.send(message, op)})
app.listen(int(sys.argv[1]), lambda config: None)
app.run()
