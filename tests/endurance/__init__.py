"""The long proofs: what only shows after a hundred thousand requests, ten deaths or twenty minutes.

``python -m tests.endurance NAME`` runs one on every engine, with a progress line and an exit code; the suite runs
each for a few seconds (tests/test_endurance_*.py).
"""
