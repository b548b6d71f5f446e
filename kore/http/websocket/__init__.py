"""WebSockets (RFC 6455, RFC 7692): the codec, compression, the opening handshake, the connection, and broadcasts."""
