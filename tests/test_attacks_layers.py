"""An attacker inside a worker: the whole sandbox stops every attack, and each layer alone those of the table."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import socket
import tempfile
from pathlib import Path

import pytest

from tests.attacks_harness import AS_ROOT, target
from tests.attacks_table import ATTACKS, LAYERS
from tests.support import children, skip_unless

BY_RING = re.compile(r"await ring\(|register\(")

OFF = {
    "filter": "from kore.sandbox import seccomp\nseccomp.confine = lambda *_: None\n",
    "Landlock": "from kore.sandbox import landlock\nlandlock.restrict_self = lambda *_, **__: ()\n",
    "ring": (
        "from kore.uring.ring import Ring\nRing.enable_restricted = Ring.enable\n"
        "Ring.enable = lambda self, _: self.enable_restricted(None)\n"
    ),
    "user": (
        "from kore.sandbox import privileges\nprivileges.give_up = lambda rights: privileges._enter(rights.root, "
        "rights.chroot)\nprivileges.restrain_parent = lambda _: None\n"
    ),
    "chroot": "",  # an argument of the command
}
"""What the application changes in kore, before the workers are forked, to be without a layer."""


@pytest.fixture(params=["uring", "epoll"])
def engine(request):
    skip_unless(request.param)
    return request.param


@pytest.fixture
def outside():
    """What attacks reach for: sockets, a place for files."""
    with contextlib.ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kore-attacked-")))
        place.chmod(0o755)
        for name in ("file", "other"):
            (place / name).write_text("x")
        tcp = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=100))
        udp = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        udp.bind(("127.0.0.1", 0))
        streams, datagrams = f"{place}/streams", f"{place}/datagrams"
        for path, kind in ((streams, socket.SOCK_STREAM), (datagrams, socket.SOCK_DGRAM)):
            sock = stack.enter_context(socket.socket(socket.AF_UNIX, kind))
            sock.bind(path)
            os.chmod(path, 0o777)
            if kind is socket.SOCK_STREAM:
                sock.listen(100)
        abstract = stack.enter_context(socket.socket(socket.AF_UNIX))
        abstract.bind(f"\0kore-{secrets.token_hex(8)}")
        abstract.listen(100)
        yield {
            "TCP": tcp.getsockname()[1], "UDP": udp.getsockname()[1], "PLACE": str(place), "STREAMS": streams,
            "DATAGRAMS": datagrams, "ABSTRACT": abstract.getsockname(),
        }  # fmt: skip


def tried(engine):
    """The attacks that there are on an engine: without a ring, none by it."""
    return {name: attack for name, attack in ATTACKS.items() if engine == "uring" or not BY_RING.search(attack.code)}


def outcomes(victim, engine, outside):
    """What becomes of every attack."""
    found = {}
    for name, attack in tried(engine).items():
        workers = children(victim.program.pid)
        code = "OTHER = next(pid for pid in WORKERS if pid != os.getpid())\n" + attack.code.strip()
        found[name] = victim.result(code, PARENT=victim.program.pid, WORKERS=workers, **outside)
    return found


@pytest.mark.parametrize("chroot", [False, True], ids=["outside of a root", "in a root"])
def test_no_attack_succeeds(tmp_path, engine, outside, chroot):
    """Each ends as the table says: an errno, or the death of the worker, which the log gives the name of the call."""
    if chroot and not AS_ROOT:
        pytest.skip("not root: there is no chroot")
    with target(tmp_path, engine, workers=2, chroot=chroot) as victim:
        found = outcomes(victim, engine, outside)
        attacks = tried(engine)
        assert found == {
            name: attacks[name].jailed if chroot and attacks[name].jailed else attacks[name].outcome for name in attacks
        }
        victim.serves()
        assert victim.program.process.poll() is None
    assert sorted(os.listdir(outside["PLACE"])) == ["datagrams", "file", "other", "streams"]


@pytest.mark.skipif(not AS_ROOT, reason="not root: two layers cannot be had, and much is impossible anyway")
@pytest.mark.parametrize("layer", [*LAYERS, "nothing"])
def test_a_layer_alone(tmp_path, engine, outside, layer):
    """With all others switched off a layer stops the attacks that name it and no others; no layer, none at all."""
    if layer == "ring" and engine != "uring":
        pytest.skip("there is no ring")
    text = "".join(OFF[other] for other in LAYERS if other != layer)
    with target(tmp_path, engine, text=text, workers=2, chroot=layer == "chroot", user=layer == "user") as victim:
        found = outcomes(victim, engine, outside)
    attacks = {name: attack for name, attack in tried(engine).items() if attack.layers is not None}
    stopped = {name: found[name] for name in attacks if not found[name].startswith("returned")}
    wanted = {name for name, attack in attacks.items() if layer in attack.layers.split()}
    assert {"not stopped": wanted - set(stopped), "stopped": {name: stopped[name] for name in set(stopped) - wanted}} \
        == {"not stopped": set(), "stopped": {}}
