"""A site over TLS, with a certificate that is made at the start: `kore examples/secure.py`, https://localhost:8443/.

The log says how to trust it; for curl that is `curl --cacert ~/.local/share/kore/authority/authority.pem`. Requests for
http://localhost:8888/ are sent there. For the public, name a certificate, or let one be fetched: the last lines of
`configure` show how, and docs/tls.md says more.
"""

import kore


class Secure:
    def configure(self, args):
        kore.config.workers = 1
        kore.config.deployment = "dev"

        kore.server("secure", ip="127.0.0.1", port="8443")
        kore.server("plain", ip="127.0.0.1", port="8888", tls=False)

        # Only in development a domain may go without certificates. Elsewhere it is
        #     kore.domain("www.example.org", attach="secure", cert="cert.pem", key="key.pem")
        # or, with port 443 open to the world,
        #     kore.domain("www.example.org", attach="secure", acme=True)
        domain = kore.domain("localhost", attach="secure")
        domain.route("/", self.index, methods=["get"])

        plain = kore.domain("localhost", attach="plain")
        plain.redirect("^/(.*)$", 308, "https://localhost:8443/$1")

    def index(self, req):
        req.response_header("content-type", "text/plain; charset=utf-8")
        req.response(200, f"hello over {req.protocol}\n".encode())


koreapp = Secure()
