"""The example of a site over TLS, started as its first line says and asked as its text says."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from tests.support import READY, ROOT, free_port, starter


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is missing")
def test_secure(tmp_path):
    """Over TLS it says so; who comes without is sent there, and follows."""
    text = (ROOT / "examples" / "secure.py").read_text()
    secure, plain = free_port(), free_port()
    assert text.count('port="8443"') == text.count('port="8888"') == 1
    (tmp_path / "secure.py").write_text(text.replace("8443", str(secure)).replace("8888", str(plain)))
    with starter(tmp_path) as programs:
        programs.kore("secure.py").wait_for(READY)
        trust = str(tmp_path / "data" / "kore" / "authority" / "authority.pem")
        for url in (f"https://localhost:{secure}/", f"http://localhost:{plain}/"):
            done = subprocess.run(
                ["curl", "-sSL", "--cacert", trust, url], capture_output=True, timeout=30, check=True)
            assert done.stdout == b"hello over https\n"
