"""What an application declares, from the first ``kore.config`` assignment to the one frozen Plan."""

from __future__ import annotations
