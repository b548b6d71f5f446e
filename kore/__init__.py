"""The public names of kore, a map and nothing else."""

from __future__ import annotations

from kore.version import __version__ as __version__
