"""Proof: scanners of TLS have nothing to object to: testssl.sh, and sslyze with Mozilla's profiles.

The server has an RSA and an ECDSA certificate of an authority that is made for the run and that both scanners are told
to trust. sslyze compares what it finds with Mozilla's intermediate profile, and with the modern one a server that
speaks TLS 1.3 only. testssl.sh must find nothing worse than LOW; where it rates (from 3.2 on), the grade must be an A.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.endurance.report import Progress, Result, Unavailable
from tests.endurance.server import Server, serving
from tests.support import ROOT

APP = Path(__file__).with_name("tls_app.py")
SSLYZE = ROOT / ".venv" / "tls" / "bin" / "python"
"""In an environment of its own: it wants other versions of what kore has too."""

KEYS = {"ec": ("ec", "-pkeyopt", "ec_paramgen_curve:P-256"), "rsa": ("rsa:2048",)}
DAYS = "89"  # testssl.sh warns of less than a month, Mozilla of more than three
SCAN_SECONDS_MAX = 600
TOO_BAD = ("MEDIUM", "HIGH", "CRITICAL", "FATAL")
FINDINGS_MIN = 20
"""A scan with less has not scanned."""

QUICK = ("-p", "-f", "-S", "-P")
"""Of testssl.sh: protocols, forward secrecy, the server's defaults and preferences. Without options it looks at all."""

# A certificate that says where its revocation would be told is what scanners want to see; nobody asks there.
EXTENSIONS = """
basicConstraints = critical, CA:FALSE
keyUsage = critical, digitalSignature
extendedKeyUsage = serverAuth
subjectAltName = DNS:localhost
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid
crlDistributionPoints = URI:http://localhost/list.crl
"""


def openssl(folder: Path, *arguments: str) -> None:
    """Run openssl(1) in a folder. Raises Unavailable."""
    try:
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True, stdin=subprocess.DEVNULL)
    except FileNotFoundError:
        raise Unavailable("openssl is not installed") from None


def make_pairs(folder: Path) -> None:
    """An authority, ca.pem, and a pair of each kind from it: ec.pem and ec.key, rsa.pem and rsa.key."""
    openssl(folder, "req", "-x509", "-nodes", "-newkey", *KEYS["ec"], "-keyout", "ca.key", "-out", "ca.pem",
            "-days", DAYS, "-subj", "/O=kore/CN=Authority of one run",
            "-addext", "keyUsage=critical,keyCertSign,cRLSign")
    (folder / "extensions").write_text(EXTENSIONS)
    for name, key in KEYS.items():
        openssl(folder, "req", "-new", "-nodes", "-newkey", *key, "-keyout", f"{name}.key", "-out", f"{name}.csr",
                "-subj", "/CN=localhost")
        openssl(folder, "x509", "-req", "-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial",
                "-days", DAYS, "-sha256", "-extfile", "extensions", "-out", f"{name}.pem")


def testssl(server: Server, folder: Path, options: tuple[str, ...], result: Result) -> None:
    """Have testssl.sh look at the server."""
    program = shutil.which("testssl") or shutil.which("testssl.sh")
    if program is None:
        raise Unavailable("testssl.sh is not installed (Debian: apt-get install testssl.sh)")
    found = folder / "testssl.json"
    command = [
        program, "--quiet", "--color", "0", "--warnings", "off", "--ip", "127.0.0.1", "--nodns", "none",
        "--add-ca", str(folder / "ca.pem"), "--jsonfile", str(found), *options, f"localhost:{server.address[1]}"]
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=SCAN_SECONDS_MAX)
    try:
        findings = json.loads(found.read_text())
    except (OSError, ValueError):
        result.fail(f"testssl.sh found nothing: {(done.stdout + done.stderr)[-500:]}")
        return
    for finding in findings:
        where = f"testssl.sh: {finding['id']}: {finding['severity']}: {finding['finding']}"
        result.check(finding["severity"] not in TOO_BAD, where)
        result.check(finding["id"] != "scanProblem", where)
        if finding["id"] == "overall_grade":
            result.figures["grade"] = finding["finding"]
            result.check(finding["finding"] in ("A", "A+"), where)
    result.check(len(findings) >= FINDINGS_MIN, f"testssl.sh has only {len(findings)} findings: {done.stdout[-500:]}")
    result.figures["findings"] = len(findings)


def sslyze(server: Server, folder: Path, profile: str, result: Result) -> None:
    """Have sslyze compare the server with one of Mozilla's profiles."""
    if not SSLYZE.exists():
        raise Unavailable(f"sslyze is not installed in {SSLYZE.parent.parent} (sh scripts/setup.sh services)")
    command = [
        str(SSLYZE), "-m", "sslyze", "--mozilla_config", profile, "--certinfo_ca_file", str(folder / "ca.pem"),
        f"localhost:{server.address[1]}"]
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=SCAN_SECONDS_MAX)
    compliant = f"localhost:{server.address[1]}: OK - Compliant." in done.stdout
    said = done.stdout.partition("COMPLIANCE AGAINST")[2] or done.stdout + done.stderr
    result.check(compliant and not done.returncode, f"sslyze, {profile}: {said[-1000:]}")
    result.figures[profile] = "compliant" if compliant else "not compliant"


def prove(io: str, *, progress: Progress, options: tuple[str, ...] = (), scanners: str = "sslyze testssl") -> Result:
    """The proof on one engine; `options` are what testssl.sh shall look at, all of it when there are none."""
    result = Result("tls", io)
    began = time.monotonic()
    with TemporaryDirectory(prefix="kore-endurance-") as name:
        folder = Path(name)
        os.chmod(folder, 0o755)
        make_pairs(folder)
        with serving(io, workers=2, app=APP, arguments=(name, "both", "ec", "rsa")) as server:
            if "sslyze" in scanners:
                progress(f"tls on {io}: sslyze, Mozilla's intermediate profile")
                sslyze(server, folder, "intermediate", result)
            if "testssl" in scanners:
                progress(f"tls on {io}: testssl.sh")
                testssl(server, folder, options, result)
            unscathed(server, result)
        if "sslyze" in scanners:
            with serving(io, workers=1, app=APP, arguments=(name, "1.3", "ec")) as server:
                progress(f"tls on {io}: sslyze, Mozilla's modern profile")
                sslyze(server, folder, "modern", result)
                unscathed(server, result)
    result.seconds = time.monotonic() - began
    return result


def unscathed(server: Server, result: Result) -> None:
    """No worker has died of it, or complained."""
    result.check(not server.death_lines, f"deaths: {server.death_lines}")
    result.check(not server.worker_lines, f"complaints: {server.worker_lines[:3]}")
    result.check(not server.program.err, f"standard error: {server.program.err[-500:]}")
