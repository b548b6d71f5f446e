"""The command ``kore [options] app.py [arguments]``: what the options mean, and nothing of what they cause.

Options end at the first word that is none: what follows the application belongs to it, dashes and all. An option
overrules the application's settings. A first word that names something else to do (acme, check, doctor, trace) is that
and no application; a package of such a name is given as ./check. The floors above the standard library are imported
when something is served, so that -h and -v answer at once.
"""

from __future__ import annotations

import getopt
import importlib.util
import sys
from collections.abc import Sequence

from kore.version import __version__

USAGE = """\
usage: kore [options] app.py [arguments]
       kore [options] package/ [arguments]
       kore check [options] app.py [arguments]
       kore doctor
       kore trace [options] [--learn] [--output FILE] app.py [arguments]
       kore acme status [options] app.py [arguments]
       kore acme test [options] [--provider URL] app.py [arguments]

commands:
  check      load the application, print what would be served and every option with where its value comes from, and
             end: 0 when it could be served, 1 when not
  doctor     say what this machine gives a server and what would mend the rest: 0 all there, 1 a server starts and goes
             without something, 2 no server starts
  trace      run the application and tell, once for each of its lines, of every system call that the sandbox forbids,
             with the statement that allows it; nothing is refused meanwhile. With --learn, which may follow the
             application as well, the seccomp hook that it needs is printed at the end, and written to FILE

  acme status
             print what certificates there are, until when, when they are renewed, and what failed last: 0 all is well,
             1 not. The server may run
  acme test  go through an order for each domain with acme=True and install nothing: at the provider's staging place,
             where it is known or URL names it, else up to the provider's consent. The server must not run: this answers
             on its addresses. 0 when all certificates could be had, 1 when not

options:
  -c FILE    read a configuration file (not in this version)
  -d         run in the background, whatever the deployment
  -f         run in the foreground, whatever the deployment
  -n         do not chroot; change to the root directory instead
  -r         do not switch user: started as root, workers stay root
  -q         log nothing but what goes wrong and what the application logs
  -v         print version and features
  -h         print this
  --check    the same as the command check

environment:
  KORE_IO       uring, epoll or kqueue: the engine to use, strictly; unset: io_uring where the kernel gives one, else
                epoll; on the BSDs kqueue
  KORE_SANDBOX  yes or no: whether workers are confined, whatever the application says; unset: except in development
"""

EXIT_USAGE = 1

ACME = {"status": (), "test": ("provider=",)}
"""The commands of ``kore acme``, each with its own long options."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with `argv` (without the program's name; None: that of this process); the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["doctor"]:
        return _doctor(words[1:])
    if words[:1] == ["check"]:
        words[0] = "--check"
    tracing = words[:1] == ["trace"]
    if tracing:
        del words[0]
    acme = None
    if words[:1] == ["acme"]:
        acme = "".join(words[1:2])
        if acme not in ACME:
            return _misused(f"acme: {acme or 'nothing'} is none of its commands, which are {' and '.join(ACME)}")
        del words[:2]
    known = ["check", "help", "version", *(["learn", "output="] if tracing else []), *ACME.get(acme or "", ())]
    try:
        found, rest = getopt.getopt(words, "c:dfhnqrv", known)
    except getopt.GetoptError as error:
        return _misused(str(error))
    given = dict(found)
    if "-h" in given or "--help" in given:
        print(USAGE, end="")
        return 0
    if "-v" in given or "--version" in given:
        print(_version())
        return 0
    if "-c" in given:
        return _misused("-c: configuration files are not read by this version; set the options in the application")
    if "-d" in given and "-f" in given:
        return _misused("-d and -f contradict each other")
    if not rest:
        return _misused("no application given")
    if tracing:
        return _trace(given, rest)
    return _start(given, rest, acme)


def _trace(given: dict[str, str], rest: list[str]) -> int:
    """The command trace: an application that runs in the foreground, whatever the deployment."""
    if "-d" in given:
        return _misused("-d: trace runs in the foreground")
    given = {"-f": "", "--trace": ""} | given
    if rest[1:2] == ["--learn"]:
        del rest[1]
        given["--learn"] = ""
    if "--output" in given:
        given["--learn"] = ""
    return _start(given, rest)


def _doctor(words: list[str]) -> int:
    if words:
        return _misused(f"doctor takes no arguments, not {' '.join(words)}")
    from kore.process.doctor import report

    return report()


def _misused(reason: str) -> int:
    print(f"kore: {reason}; kore -h lists what there is", file=sys.stderr)
    return EXIT_USAGE


def _version() -> str:
    python = ".".join(map(str, sys.version_info[:3]))
    # ssl is a part of Python that it can be built without; the others are packages.
    tls = all(importlib.util.find_spec(module) for module in ("_ssl", "cryptography"))
    features = ["tls" if tls else "notls", *(["acme"] if tls and importlib.util.find_spec("acme") else [])]
    return f"kore {__version__} uring epoll kqueue python-{python} {' '.join(features)}"


def _start(given: dict[str, str], rest: list[str], acme: str | None = None) -> int:
    from kore.process.start import Options, start

    background = True if "-d" in given else False if "-f" in given else None
    options = Options(
        background=background,
        chroot=False if "-n" in given else None,
        switch_user=False if "-r" in given else None,
        quiet="-q" in given,
        check="--check" in given,
        trace="--trace" in given,
        learn="--learn" in given,
        output=given.get("--output"),
        acme=acme,
        provider=given.get("--provider"),
    )
    path, *arguments = rest
    try:
        return start(path, arguments, options)
    except KeyboardInterrupt:
        # Ctrl-C while the application was still being loaded; from then on the parent has handlers.
        return 130
