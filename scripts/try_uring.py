"""Says whether an io_uring can be had here: exit status 0 when it can, 1 and one line of reason when not.

`make test` asks this to know which engines the tests can run on. It really makes a ring, in this short-lived process.
"""

from __future__ import annotations

import sys


def main() -> int:
    """Make a ring and close it again."""
    try:
        from kore.uring.driver import UringDriver

        UringDriver().close()
    except (ImportError, OSError) as error:
        print(error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
