"""A chat over two workers, with its page, on http://127.0.0.1:8888: start it with `kore examples/chat.py`.

Open the page in several windows: whoever is served by which worker, everybody reads everybody. Each message goes to all
clients of all workers but the one it came from, which the page shows at once.
"""

import json

import kore

TEXT_MAX = 500

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>kore chat</title>
<style>
  body { font: 16px/1.5 system-ui, sans-serif; max-width: 40rem; margin: 0 auto; padding: 1rem; height: 100vh;
         box-sizing: border-box; display: flex; flex-direction: column; background: #f6f6f4; color: #222; }
  h1 { font-size: 1.2rem; margin: 0 0 .5rem; }
  #state { font-weight: normal; font-size: .9rem; color: #777; }
  #log { flex: 1; overflow-y: auto; list-style: none; margin: 0; padding: .5rem 0; }
  #log li { background: #fff; border-radius: .6rem; padding: .3rem .8rem; margin: .3rem 3rem .3rem 0;
            width: fit-content; overflow-wrap: anywhere; }
  #log li.mine { background: #d8ecd8; margin: .3rem 0 .3rem auto; }
  #log li.note { background: none; color: #777; margin: .3rem auto; }
  #log b { margin-right: .5rem; }
  form { display: flex; gap: .5rem; }
  input { font: inherit; padding: .5rem; border: 1px solid #bbb; border-radius: .4rem; min-width: 0; }
  #name { width: 7rem; }
  #text { flex: 1; }
  button { font: inherit; padding: .5rem 1rem; border: 0; border-radius: .4rem; background: #357a38; color: #fff; }
  button:disabled { background: #aaa; }
</style>
</head>
<body>
<h1>kore chat <span id="state">connecting</span></h1>
<ul id="log"></ul>
<form id="form">
  <input id="name" aria-label="your name" maxlength="20" value="guest">
  <input id="text" aria-label="message" maxlength="500" autocomplete="off" placeholder="say something" autofocus>
  <button id="send" disabled>Send</button>
</form>
<script>
const by = id => document.getElementById(id);
let socket, wait = 500;

function show(name, text, kind) {
  const item = document.createElement("li");
  item.className = kind;
  if (name) {
    const who = document.createElement("b");
    who.textContent = name;
    item.append(who);
  }
  item.append(text);
  by("log").append(item);
  while (by("log").children.length > 500) by("log").firstChild.remove();
  item.scrollIntoView();
}

function connect() {
  socket = new WebSocket((location.protocol === "https:" ? "wss://" : "ws://") + location.host + "/chat");
  socket.onmessage = event => {
    const message = JSON.parse(event.data);
    if (message.worker) {
      wait = 500;
      by("state").textContent = "worker " + message.worker;
      by("send").disabled = false;
    } else {
      show(message.name, message.text, message.name ? "theirs" : "note");
    }
  };
  socket.onclose = () => {
    by("state").textContent = "connecting again";
    by("send").disabled = true;
    setTimeout(connect, wait);
    wait = Math.min(wait * 2, 10000);
  };
}

by("form").onsubmit = event => {
  event.preventDefault();
  const text = by("text").value.trim(), name = by("name").value.trim() || "guest";
  if (!text || socket.readyState !== WebSocket.OPEN) return;
  socket.send(JSON.stringify({name, text}));
  show(name, text, "mine");
  by("text").value = "";
};

connect();
</script>
</body>
</html>
"""


class Chat:
    def configure(self, args):
        kore.config.workers = 2
        kore.config.deployment = "dev"

        kore.server("chat", ip="127.0.0.1", port="8888", tls=False)

        domain = kore.domain("*", attach="chat")
        domain.route("/", self.page, methods=["get"])
        domain.route("/chat", self.chat, methods=["get"])

    def page(self, req):
        req.response_header("content-type", "text/html; charset=utf-8")
        req.response(200, PAGE)

    def chat(self, req):
        # A browser says which page a WebSocket is for: other sites' pages are not to speak in their visitors' names.
        origin = req.request_header("origin")
        if origin is not None and origin.partition("://")[2] != req.host:
            req.response(403, b"this chat is for its own page\n")
            return
        req.websocket_handshake(self.onconnect, self.onmessage, self.ondisconnect)

    def onconnect(self, c):
        c.name = None
        c.websocket_send(kore.WEBSOCKET_OP_TEXT, json.dumps({"worker": kore.worker()}))

    def onmessage(self, c, op, data):
        # What a client sends may be anything; an exception here would close its connection, which is also an answer.
        message = json.loads(data)
        name, text = str(message["name"])[:20], str(message["text"])[:TEXT_MAX]
        if c.name != name:
            self.tell(c, {"text": f"{name} is here" if c.name is None else f"{c.name} is now {name}"})
            c.name = name
        self.tell(c, {"name": name, "text": text})

    def ondisconnect(self, c):
        if c.name is not None:
            self.tell(c, {"text": f"{c.name} has left"})

    def tell(self, c, message):
        data = json.dumps(message)
        kore.websocket_broadcast(c, kore.WEBSOCKET_OP_TEXT, data, kore.WEBSOCKET_BROADCAST_GLOBAL)


koreapp = Chat()
