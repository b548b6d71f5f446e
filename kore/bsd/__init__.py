"""What the BSDs have of their own: kqueue(2) as the engine's poller, and OpenBSD's pledge(2) as the sandbox."""
