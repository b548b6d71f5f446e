"""``python -m kore`` is the command ``kore``."""

from __future__ import annotations

import sys

from kore.cli import main

if __name__ == "__main__":
    sys.exit(main())
