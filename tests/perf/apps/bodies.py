"""What every server of the rig answers: the paths and their bodies."""

BODIES = {
    "/": b"hello world",
    "/async": b"hello world",
    "/1k": b"k" * 1024,
    "/64k": b"k" * 65536,
    "/1m": b"k" * (1 << 20),
    "/files/1k": b"k" * 1024,
    "/files/64k": b"k" * 65536,
    "/files/1m": b"k" * (1 << 20),
}
