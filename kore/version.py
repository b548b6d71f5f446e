"""The version of kore, in the one place that the package, its build and its log read it from."""

from __future__ import annotations

__version__ = "0.1.0"
