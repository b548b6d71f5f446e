"""System calls that Python has for socket objects only, made on a plain fd."""

from __future__ import annotations

from socket import AF_UNIX, SHUT_WR, SOCK_STREAM, socket

__all__ = ["SHUT_WR", "shutdown"]


def shutdown(fd: int, how: int) -> None:
    """shutdown(2). The family given to the socket object plays no part in it; giving one saves it from asking."""
    borrowed = socket(AF_UNIX, SOCK_STREAM, 0, fd)
    try:
        borrowed.shutdown(how)
    finally:
        borrowed.detach()
