"""TLS: certificates and keys, the contexts and streams of connections, and signing with keys that no worker holds."""
