"""Says whether workers can be confined here: exit status 0 when they can, 1 and one line of reason when not.

`make test` asks this to know whether the servers of its tests can be run inside the sandbox. A child process gives up
its rights, restricts itself by Landlock and puts a filter on, as a worker does.
"""

from __future__ import annotations

import os
import sys


def main() -> int:
    """Confine a child, and say how it went."""
    try:
        from kore.errors import SandboxError
        from kore.sandbox import landlock, privileges, program_policy, seccomp
    except ImportError as error:
        print(error)
        return 1
    if landlock.abi() < 1:
        print(landlock.missing(0)[0])
        return 1
    try:
        privileges.prepare()
        seccomp.preload()
    except SandboxError as error:
        print(error)
        return 1
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            privileges.give_up(privileges.Rights())
            landlock.restrict_self(landlock.Rules(read=("/",)))
            program_policy.put_on(connect=False, paths=False, listed=False)
            code = 0
        except Exception as error:  # noqa: BLE001 (a child of ours must not go on as if it were us)
            print(f"{type(error).__name__}: {error}", flush=True)
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


if __name__ == "__main__":
    sys.exit(main())
