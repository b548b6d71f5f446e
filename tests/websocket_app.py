"""The application that the tests of the WebSocket server talk to: it does what it is told, and logs what it hears."""

TEXT = '''
import asyncio
import sys

seen = {}

def log(text):
    kore.log(kore.LOG_INFO, text)

def path(text, *args, **kwargs):
    return kore.route(text, *args, domain=home, methods=["get", "post"], **kwargs)

def onconnect(c):
    c.number = len(seen)
    seen[c] = c.fd
    log(f"open {c.number}")

def onmsg(c, op, data):
    c.websocket_send(op, str(c.number) if data == "who" else data)

def ondisconnect(c):
    assert seen[c] == c.fd, (seen[c], c.fd)
    log(f"shut {c.number} {c.addr}")
    assert c.websocket_send(1, "nobody") is True
    asyncio.get_running_loop().call_later(0.05, later, c)

def later(c):
    log(f"later {c.number} {c.fd} {c.websocket_send(1, 'x')} {c.disconnect()}")

@path("/ws")
def ws(req):
    result = req.websocket_handshake(onconnect, onmsg, ondisconnect)
    log(f"handshake {result} {req.connection is not None}")

@path("/names")
def names(req):
    req.websocket_handshake("onconnect", "here.onmsg", None)

class Here:
    def onmsg(self, c, op, data):
        c.websocket_send(op, "here " + data)

here = Here()

@path("/no-such-name")
def no_such_name(req):
    req.websocket_handshake("onconnect", "nobody", None)

@path("/no-callback")
def no_callback(req):
    req.websocket_handshake(onconnect, 5, None)

@path("/none")
def none(req):
    req.websocket_handshake(None, None, None)

@path("/late")
async def late(req):
    await kore.suspend(100)
    req.websocket_handshake(onconnect, onmsg, ondisconnect)
    await kore.suspend(100)
    log("late handler ends")

@path("/goes-on")
async def goes_on(req):
    req.websocket_handshake(onconnect, onmsg, ondisconnect)
    await kore.suspend(100)
    log("handler went on")

@path("/twice")
def twice(req):
    req.websocket_handshake(onconnect, onmsg, ondisconnect)
    for again in (lambda: req.websocket_handshake(onconnect, onmsg, None), lambda: req.response(200, b"no")):
        try:
            again()
        except RuntimeError as error:
            log("twice refused")

@path("/raises")
def raises(req):
    req.websocket_handshake(onconnect, onmsg, ondisconnect)
    raise ValueError("after the handshake")

@path("/protocol")
def protocol(req):
    req.response_header("sec-websocket-protocol", "chat")
    req.websocket_handshake(None, onmsg, None)

@path("/not-a-websocket")
def not_a_websocket(req):
    try:
        req.connection.websocket_send(1, "x")
    except TypeError as error:
        req.response(200, str(error))

# What a client tells it to do.

def command(c, op, data):
    word, *rest = data.split()
    if word == "send":
        count, size = map(int, rest)
        for n in range(count):
            c.websocket_send(2, b"x" * size)
    elif word == "disconnect":
        log(f"disconnect {c.disconnect()}")
        c.websocket_send(1, "after disconnect")
    elif word == "raise":
        raise ValueError("told to")
    elif word == "exit":
        sys.exit(3)
    elif word == "both":
        c.websocket_send(1, "before")
        raise ValueError("told to")
    elif word == "bad":
        for arguments in ((3, "x"), (8, b""), ("1", "x"), (1, 5), (2, None), (1,), (1, "x", 2)):
            try:
                c.websocket_send(*arguments)
            except TypeError:
                c.websocket_send(1, "refused")
        try:
            c.websocket_send(1, bytes((255,)))
        except ValueError:
            c.websocket_send(1, "not text")
    elif word == "kinds":
        for what in (b"a", bytearray(b"a"), memoryview(b"a"), "a"):
            c.websocket_send(1, what)
            c.websocket_send(2, what)
    elif word == "kept":
        kept = c.websocket_send
        c.disconnect()
        log(f"kept {kept(1, 'x')}")
    else:
        onmsg(c, op, data)

@path("/command")
def commands(req):
    req.websocket_handshake(onconnect, command, ondisconnect)

def raising(*_):
    raise ValueError("callback")

@path("/raise-connect")
def raise_connect(req):
    req.websocket_handshake(raising, onmsg, lambda c: log("told"))

@path("/raise-disconnect")
def raise_disconnect(req):
    req.websocket_handshake(onconnect, onmsg, raising)

@path("/disconnect-at-once")
def disconnect_at_once(req):
    req.websocket_handshake(lambda c: c.disconnect(), onmsg, lambda c: log("told"))

# Callbacks that wait.

async def slow_connect(c):
    c.websocket_send(1, "connecting")
    await kore.suspend(100)
    c.websocket_send(1, "connected")
    c.done = 0

async def slow_message(c, op, data):
    try:
        if data == "fail":
            await kore.suspend(1)
            raise ValueError("async")
        await kore.suspend(0 if data.isdigit() else 200)
        c.done += 1
        c.websocket_send(1, data)
        log(f"did {data}")
    finally:
        if data == "long":
            log("long is over")

async def slow_disconnect(c):
    await kore.suspend(10)
    log(f"async told {c.done}")

@path("/async")
def slow(req):
    req.websocket_handshake(slow_connect, slow_message, slow_disconnect)

# Broadcasts.

def spread(c, op, data):
    kore.websocket_broadcast(c, op, data, kore.WEBSOCKET_BROADCAST_GLOBAL)

@path("/spread")
def spreading(req):
    req.websocket_handshake(None, spread, None)

def all_of_us(c, op, data):
    kore.websocket_broadcast(None, op, data, kore.WEBSOCKET_BROADCAST_LOCAL)

@path("/all")
def all_(req):
    req.websocket_handshake(None, all_of_us, None)

# More than a client takes.

async def pour(c):
    try:
        for n in range(100000):
            c.websocket_send(2, bytes(65536))
            await kore.suspend(0)
    finally:
        log("poured")

def pouring(c):
    c.task = kore.task_create(pour(c))

def stop_pouring(c):
    kore.task_kill(c.task)
    log("slow one told")

@path("/pour")
def pour_(req):
    req.websocket_handshake(pouring, None, stop_pouring)
'''
