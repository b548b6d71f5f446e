"""TLS: contexts and streams in the workers, private keys in the key manager, and what the two say to each other."""
