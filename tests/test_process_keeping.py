"""What is said of the key manager before it starts: where it lives, and who could read its keys besides."""

from __future__ import annotations

import os

import pytest

from tests.keymgr_harness import another_user
from tests.privileges_harness import a_user, needs_root
from tests.support import free_port, starter
from tests.tls_harness import server_pair

pytestmark = needs_root

APP = """
import kore
kore.config.deployment = "docker"
kore.config.root = {root!r}
kore.privsep("worker", skip=["chroot"])
kore.privsep("keymgr", skip=["chroot"])
kore.config.runas = {worker!r}
kore.config.keymgr_runas = {keymgr!r}
kore.config.keymgr_root = {keys!r}
kore.server("secure", ip="127.0.0.1", port="{port}")
kore.domain("a.test", cert="a.pem", key="a.key")
"""

SAME = "the key manager and the workers are the same user"
READ = "workers may read this key"


@pytest.fixture
def checked(tmp_path):
    """What `kore check` says."""

    def check(*, keys: str, keymgr: str, owner: int, mode: int) -> str:
        (tmp_path / "root").mkdir()
        (tmp_path / "keys").mkdir()
        place = tmp_path / keys
        pair = server_pair("a.test", "p256")
        pair.save(place / "a.pem")
        os.chown(place / "a.key", owner, owner)
        (place / "a.key").chmod(mode)
        text = APP.format(
            root=str(tmp_path / "root"), keys=str(place), worker=a_user().pw_name, keymgr=keymgr, port=free_port())
        (tmp_path / "app.py").write_text(text)
        with starter(tmp_path) as programs:
            program = programs.kore("check", "app.py", environment={"KORE_SANDBOX": "yes"})
            assert program.wait() == 0, program.err
            return program.out

    return check


def test_a_key_of_another_user_out_of_reach_is_no_news(checked):
    user = another_user()
    said = checked(keys="keys", keymgr=user.pw_name, owner=user.pw_uid, mode=0o400)
    assert SAME not in said
    assert READ not in said
    assert f"keys by chdir as user {user.pw_name}" in said


def test_one_user_for_both_is_told_of(checked):
    user = a_user()
    assert SAME in checked(keys="keys", keymgr=user.pw_name, owner=user.pw_uid, mode=0o400)


@pytest.mark.parametrize(("owner", "mode", "read"), [("worker", 0o400, True), ("other", 0o444, True),
                                                     ("other", 0o440, False), ("other", 0o400, False)])
def test_a_key_that_workers_can_read_is_told_of(checked, owner, mode, read):
    """Below what Landlock lets them read, with a mode that lets them."""
    user = another_user()
    uid = a_user().pw_uid if owner == "worker" else user.pw_uid
    assert (READ in checked(keys="root", keymgr=user.pw_name, owner=uid, mode=mode)) == read
