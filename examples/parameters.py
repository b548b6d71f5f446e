"""Parameters and authentication: http://127.0.0.1:8888, started with `kore examples/parameters.py`.

Try `curl 'http://127.0.0.1:8888/search?q=kore&page=2'`, and with a page that is no number; a sign-up with
`curl -d user=alice -d year=1999 http://127.0.0.1:8888/signup`; `curl -H 'x-key: open sesame' http://127.0.0.1:8888/key`;
and in a browser http://127.0.0.1:8888/members, which sends you to log in first.
"""

import hmac
import json
import secrets

import kore

TAKEN = {"root", "admin"}


class Parameters:
    def configure(self, args):
        kore.config.workers = 1
        kore.config.deployment = "dev"

        kore.server("default", ip="127.0.0.1", port="8888", tls=False)
        domain = kore.domain("*", attach="default")

        # A parameter without a rule never arrives. A rule is a regular expression ...
        domain.route("/search", self.search, methods=["get"],
            get={
                "q": "^.{1,100}$",
                "page": "^[0-9]{1,4}$",
            }
        )

        # ... or a function, which may be a coroutine: the handler runs when it has decided.
        domain.route("/signup", self.signup, methods=["post"],
            post={
                "user": self.is_free,
                "year": lambda req, value: value.isdigit() and 1900 <= int(value) <= 2026,
            }
        )

        # Only for those who know the key; all others get 403.
        domain.route("/key", self.secret, methods=["get"],
            auth={
                "type": "header",
                "value": "x-key",
                "verify": self.verify_key,
            }
        )

        # Only for those who are logged in; all others are sent to the login.
        domain.route("/members", self.secret, methods=["get"],
            auth={
                "type": "cookie",
                "value": "session",
                "verify": self.verify_session,
                "redirect": "/login",
            }
        )
        domain.route("/login", self.login, methods=["get", "post"], post={"password": "^hunter2$"})

        # Made before the workers are forked, so that all of them know it.
        self.session = secrets.token_urlsafe(32)

    def search(self, req):
        req.populate_get()
        query = req.argument("q")
        if query is None:
            req.response(400, "what are you looking for?\n")
            return
        found = {"query": query, "page": int(req.argument("page") or 1)}
        req.response_header("content-type", "application/json")
        req.response(200, json.dumps(found).encode() + b"\n")

    async def is_free(self, req, value):
        await kore.suspend(10)  # as long as asking a database takes
        return value.isalpha() and value not in TAKEN

    def signup(self, req):
        req.populate_post()
        user, year = req.argument("user"), req.argument("year")
        if user is None or year is None:
            req.response(422, "the name is taken or no name, or the year is none\n")
            return
        req.response(201, f"welcome, {user}, born in {year}\n")

    def verify_key(self, req, value):
        return hmac.compare_digest(value, "open sesame")

    def verify_session(self, req, value):
        return hmac.compare_digest(value, self.session)

    def secret(self, req):
        req.response(200, "what nobody else may see\n")

    def login(self, req):
        if req.method == kore.HTTP_METHOD_POST:
            req.populate_post()
            if req.argument("password"):
                req.response_header("set-cookie", f"session={self.session}; HttpOnly; SameSite=Strict; Path=/")
                req.response_header("location", "/members")
                req.response(303, None)
                return
        req.response_header("content-type", "text/html; charset=utf-8")
        req.response(200, LOGIN)


LOGIN = """<!doctype html>
<title>Log in</title>
<form method="post" action="/login">
<p><label>Password (it is hunter2): <input type="password" name="password" autofocus></label>
<button>Log in</button></p>
</form>
"""

koreapp = Parameters()
