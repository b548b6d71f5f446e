"""TLS between the engine's streams and the HTTP parser, with private keys that no worker holds.

Nothing here is loaded unless a server that speaks TLS is declared.
"""
