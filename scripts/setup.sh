#!/bin/sh
# Installs what is missing and nothing else: `setup.sh project` for running and testing, `setup.sh rig` for make bench,
# `setup.sh browser` and `setup.sh services` for what only some tests need.
# Plain sh; system packages by apt-get as root or through sudo; everything of Python goes into .venv.
set -eu
cd "$(dirname "$0")/.."
VENV=.venv

say() { printf 'setup: %s\n' "$*"; }

as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"
    elif command -v sudo >/dev/null 2>&1 && { [ -t 0 ] || sudo -n true 2>/dev/null; }; then sudo "$@"
    else return 1
    fi
}

# Packages start no service while we install them: nginx is wanted as a program, not on port 80.
apt_install() {
    command -v apt-get >/dev/null 2>&1 || return 1
    say "installing system packages: $*"
    as_root sh -c '
        set -e
        export DEBIAN_FRONTEND=noninteractive
        policy=/usr/sbin/policy-rc.d
        if [ ! -e $policy ]; then
            printf "#!/bin/sh\nexit 101\n" > $policy; chmod 755 $policy
            trap "rm -f $policy" EXIT
        fi
        log=$(mktemp)
        if ! { apt-get install -y --no-install-recommends "$@" ||
               { apt-get update && apt-get install -y --no-install-recommends "$@"; }; } >"$log" 2>&1 </dev/null
        then tail -n 5 "$log" >&2; rm -f "$log"; exit 1; fi
        rm -f "$log"' sh "$@"
}

usable() {  # a Python that is new enough and can make virtual environments with pip in them
    command -v "$1" >/dev/null 2>&1 &&
    "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

find_python() {
    # The distribution's own comes first: it is what sudo finds too, gets the security updates, and is built with
    # profile-guided optimisation, which one compiled with default options is not (by a fifth).
    for candidate in ${PYTHON:-} /usr/bin/python3 python3 python3.13 python3.12 python3.11 python3.14; do
        if usable "$candidate"; then command -v "$candidate"; return 0; fi
    done
    return 1
}

need_python() {
    python=$(find_python) && return 0
    apt_install python3 python3-venv || true
    python=$(find_python) && return 0
    # Ubuntu 22.04's python3 is 3.10; it has a newer one beside it.
    apt_install python3.12-venv 2>/dev/null || apt_install python3.11 python3.11-venv || true
    python=$(find_python) && return 0
    say "no Python of 3.11 or newer with the venv module; install one (Debian: apt-get install python3-venv)" >&2
    say "or name one: make setup PYTHON=/path/to/python3" >&2
    exit 1
}

give_back() {
    if [ -n "${SUDO_UID:-}" ]; then
        for path in "$VENV" kore.egg-info; do
            if [ -e "$path" ]; then chown -R "$SUDO_UID:${SUDO_GID:-$SUDO_UID}" "$path"; fi
        done
    fi
}

has_libseccomp() { "$python" -c 'import ctypes; ctypes.CDLL("libseccomp.so.2")' >/dev/null 2>&1; }

has_liburing() { "$python" -c 'import ctypes; ctypes.CDLL("liburing.so.2")' >/dev/null 2>&1; }

can_build() {  # extension modules of C with libcap, for this Python
    command -v cc >/dev/null 2>&1 && [ -e /usr/include/sys/capability.h ] && "$python" -c '
import os, sys, sysconfig
sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' >/dev/null 2>&1
}

sandbox() {  # python-prctl is compiled; without it the sandbox says what it misses, and its tests fail
    if ! "$VENV/bin/python" -c 'import prctl' >/dev/null 2>&1 && ! can_build; then
        version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
        apt_install gcc libc6-dev libcap-dev "python$version-dev" || say "no compiler, Python.h or sys/capability.h"
    fi
    "$python" -c 'import ctypes; ctypes.CDLL("libseccomp.so.2")' >/dev/null 2>&1 || apt_install libseccomp2 ||
        say "libseccomp.so.2 is missing: there is no system call filter"
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --no-input --use-pep517 -e '.[sandbox]' ||
        say "can't install python-prctl and pyseccomp: kore serves with kore.config.sandbox = 'no' only"
}

project() {
    need_python
    if ! has_liburing; then
        apt_install liburing2 || say "liburing.so.2 is missing and can't be installed: kore will serve with epoll"
    fi
    if ! has_libseccomp; then
        apt_install libseccomp2 || say "libseccomp.so.2 is missing and can't be installed: there will be no sandbox"
    fi
    # strace shows a test which system calls are made; curl is for who tries the example; openssl makes certificates.
    for tool in strace curl openssl; do
        command -v $tool >/dev/null 2>&1 || apt_install $tool || say "$tool is missing: tests that need it are skipped"
    done
    if [ -x "$VENV/bin/python" ] && usable "$VENV/bin/python"; then
        say "virtual environment $VENV is there"
    else
        say "making the virtual environment $VENV with $python ($("$python" -V))"
        "$python" -m venv --clear "$VENV"
    fi
    say "installing kore and its tools into $VENV"
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --no-input -e '.[dev]'
    sandbox
    touch "$VENV/.setup-done"
    give_back
    say "done"
}

browser() {  # for the one test that looks at an example's page as people do
    command -v chromium >/dev/null 2>&1 || command -v chromium-browser >/dev/null 2>&1 ||
        apt_install chromium || say "chromium is missing: the test of the chat's page is skipped"
}

services() {  # what tests talk to, as programs: no service is started here
    ls /usr/lib/postgresql/*/bin/postgres >/dev/null 2>&1 || apt_install postgresql ||
        say "postgresql is missing: tests that need it are skipped"
    for program in redis-server:redis-server nginx:nginx-light slowhttptest:slowhttptest wrk:wrk pebble:pebble \
        testssl:testssl.sh faketime:faketime; do
        command -v "${program%:*}" >/dev/null 2>&1 || [ -x "/usr/sbin/${program%:*}" ] || apt_install "${program#*:}" ||
            say "${program%:*} is missing: tests that need it are skipped"
    done
    if ! "$VENV/tls/bin/python" -c 'import sslyze' 2>/dev/null; then
        say "making the environment of the scanners of TLS, $VENV/tls"
        "$VENV/bin/python" -m venv "$VENV/tls" && "$VENV/tls/bin/python" -m pip install --quiet \
            --disable-pip-version-check --no-input -r tests/endurance/requirements.txt ||
            say "sslyze is missing: tests that need it are skipped"
        give_back
    fi
    # Debian keeps CPython's own tests in a package of their own.
    version=$("$VENV/bin/python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    "$VENV/bin/python" -c 'import test.test_asyncio' 2>/dev/null || apt_install "libpython$version-testsuite" ||
        say "the tests of CPython $version are missing: those of asyncio are skipped"
}

rig() {
    python=$VENV/bin/python
    command -v wrk >/dev/null 2>&1 || apt_install wrk || { say "wrk is missing: make bench can't run" >&2; exit 1; }
    if ! command -v nginx >/dev/null 2>&1 && [ ! -x /usr/sbin/nginx ]; then
        apt_install nginx-light || say "nginx is missing: the rig will say so"
    fi
    [ -x "$VENV/rig/bin/python" ] || { say "making the rig's environment $VENV/rig"; "$python" -m venv "$VENV/rig"; }
    say "installing the peers into $VENV/rig"
    # One by one: a peer that can't be had on this machine must not take the others along. The rig reports it as missing.
    sed -e 's/#.*//' -e '/^[[:space:]]*$/d' tests/perf/requirements.txt | while read -r requirement; do
        "$VENV/rig/bin/python" -m pip install --quiet --disable-pip-version-check --no-input "$requirement" </dev/null ||
            say "can't install $requirement; the rig will say that it is missing"
    done
    touch "$VENV/rig/.setup-done"
    give_back
    say "done"
}

case "${1:-project}" in
    project) project ;;
    rig) rig ;;
    browser) browser ;;
    services) services ;;
    *) echo "usage: setup.sh project|rig|browser|services" >&2; exit 2 ;;
esac
